"""Numbers as the report shows them, bounds as shares, and modules as groups."""

import math

import pytest

from pipeline.report import bounds as report_bounds
from pipeline.report import spots as report_spots
from pipeline.report.numbers import MOST_GROUPS, grouped
from pipeline.report.spots import Spot
from tests import reports

INF = math.inf


def test_a_spot_knows_where_it_is():
    data = Spot({"targets": [{"speed": {"median_ms": 0.0161}, "value": "a<b"}], "none": None})
    found = data.targets[0].speed.median_ms
    assert (found.place, found.raw) == ("targets.0.speed.median_ms", 0.0161)
    expected = '<data value="0.0161" data-path="targets.0.speed.median_ms">0.0161 ms</data>'
    assert str(report_spots.FILTERS["ms"](found)) == expected
    assert data.targets[0]["value"].__html__() == '<span data-path="targets.0.value">a&lt;b</span>'
    assert [one.place for one in data.targets] == ["targets.0"]
    assert str(report_spots.FILTERS["ms"](data.none)) == ""
    with pytest.raises(AttributeError, match="has no `nothing`"):
        _ = data.targets[0].nothing


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("size", 106_500, "106.5 kB"),
        ("ms", 0.01614, "0.0161 ms"),
        ("ms", 12345.6, "12346 ms"),
        ("seconds", 0.004, "0.00 s"),
        ("seconds", 75.04, "75.0 s"),
        ("seconds", 600, "10.0 min"),
        ("seconds", 9000, "2.5 h"),
        ("db", INF, "equal"),
        ("db", -INF, "broken"),
        ("db", math.nan, "broken"),
        ("db", 126.34, "126.3 dB"),
        ("bare", 126.34, "126.3"),
        ("times", 9.774, "9.77x"),
        ("times", 123.4, "123x"),
        ("percent", 0.4213, "42.1%"),
        ("percent", 0.0004, "under 0.1%"),
        ("percent", 0, "0.0%"),
        ("percent", 12.5, "over 1000%"),
        ("percent", INF, "infinite"),
        ("fixed", 0.99777, "0.9978"),
        ("fixed", math.nan, "not a number"),
        ("times", -INF, "−infinite"),
        ("signed", -0.0024, "−0.0024"),
        ("digits", 5.3712e-7, "5.37e−07"),
        ("digits", -0.25, "−0.25"),
        ("digits", 0, "0"),
        ("whole", 12345, "12\u202f345"),
        ("large", 4_812_345, "4.81M"),
        ("date", 1_795_000_000, "2026-11-18 11:06 UTC"),
    ],
)
def test_numbers_read_as_what_they_are(name, value, text):
    shown = str(report_spots.FILTERS[name](Spot(value, "x")))
    assert shown == f'<data value="{value}" data-path="x">{text}</data>'
    assert reports.reads_as(text, value)


def test_a_text_of_another_number_is_found_out():
    assert not reports.reads_as("0.0161 ms", 0.0163)
    assert not reports.reads_as("equal", 140.0)
    assert not reports.reads_as("106.5 kB", 106_600)
    assert not reports.reads_as("under 0.1%", 0.002)


@pytest.mark.parametrize(
    ("bound", "value", "limit", "share"),
    [
        ("max_abs", 0.5, 1.0, 0.5),
        ("max_over_peak", 0.0, 0.0, None),
        ("max_abs", 0.1, 0.0, INF),
        ("cosine", 0.995, 0.99, 0.5),
        ("cosine", 1.0, 1.0, None),
        ("argmax_agreement", 0.9, 1.0, INF),
        ("sqnr_db", 86.0206, 80.0, 0.5),
        ("sqnr_db", INF, 80.0, 0.0),
        ("sqnr_db", -INF, 80.0, INF),
        ("sqnr_db", math.nan, 80.0, INF),
    ],
)
def test_the_share_of_a_bound(bound, value, limit, share):
    found = report_bounds.share(bound, value, limit)
    assert found == (share if share is None else pytest.approx(share, rel=1e-4))


def test_modules_are_as_deep_as_there_are_not_too_many():
    rows = [(f"layer{block}.{part}.conv{number}", 1) for block in range(4) for part in range(3) for number in range(3)]
    assert len(grouped(rows)) == 12 <= MOST_GROUPS < len(rows)
    assert list(grouped(rows))[:2] == ["layer0.0", "layer0.1"]
    assert list(grouped(rows[:9])) == [name for name, _ in rows[:9]]
    assert grouped([]) == {}

"""Pictures: the same bytes each time, nothing from outside, and every number that was drawn can be read back."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from pipeline.report import picture_depth, picture_timeline
from pipeline.report.picture_depth import Layer
from pipeline.report.picture_timeline import Bar
from pipeline.report.picture_tradeoff import Point, Scale, overview, overview_png, tradeoff

POINTS = (
    Point("int8-u8s8", 12.1, 0.968, passed=True, chosen=True),
    Point("int8-dynamic", 27.0, 0.97, passed=True, chosen=False),
    Point("fp32", 30.2, 0.9705, passed=True, chosen=False),
    Point("int8-u8u8", None, 0.91, passed=False, chosen=False),
)
SCALE = Scale(eager=0.9705, budget=0.9605, metric="accuracy", latency="latency in ms")
SVG = "{http://www.w3.org/2000/svg}"


def drawn(points=POINTS, name="one"):
    return tradeoff(points, SCALE, name=name)


def test_the_same_data_are_the_same_bytes_in_every_process():
    code = "from tests.unit.test_pictures import drawn; import sys; sys.stdout.write(drawn())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == drawn()


def test_nothing_comes_from_outside_and_no_clock_is_in_it():
    text = drawn()
    addresses = set(re.findall(r'https?://[^"\s<]+', text))
    assert addresses == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, not links
    assert re.findall(r'(?:href|src)="(?!#)', text) == []
    assert "metadata" not in text
    assert "@import" not in text


def test_colours_and_fonts_are_the_pages():
    text = drawn()
    assert set(re.findall(r"#[0-9a-f]{6}", text)) == set()
    assert {"currentColor", "var(--soft)", "var(--good)", "var(--bad)"} <= set(
        re.findall(r"currentColor|var\([-\w]+\)", text)
    )
    assert "font-family" not in text


def test_each_mark_tells_its_numbers():
    titles = [title.text for title in ET.fromstring(drawn()).iter(f"{SVG}title")]
    assert titles == [
        "int8-u8s8: 12.1 ms, 0.9680",
        "int8-dynamic: 27 ms, 0.9700",
        "fp32: 30.2 ms, 0.9705",
        "int8-u8u8: not timed, 0.9100",
    ]


def test_two_pictures_on_a_page_share_no_identifier():
    one, two = (set(re.findall(r'\bid="([^"]+)"', drawn(name=name))) for name in ("one", "two"))
    assert one
    assert not one & two
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn()))
    assert used <= one


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(POINTS, id="spread"),
        pytest.param(
            tuple(Point(f"form-{place}", 10 + place / 10, 0.97, passed=True, chosen=place == 0) for place in range(5)),
            id="in one place",
        ),
        pytest.param((Point("fp32", 0.0, 0.97, passed=True, chosen=True),), id="no time at all"),
    ],
)
def test_labels_lie_apart(points):
    """Boxes as wide as the letters of a wide font, from what is written in the SVG."""
    boxes = []
    for node in ET.fromstring(drawn(points)).iter(f"{SVG}text"):
        words = "".join(node.itertext())
        if not any(words.startswith(point.label) for point in points):
            continue
        place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", node.get("transform", ""))
        x, y = map(float, place.groups() if place else (node.get("x"), node.get("y")))
        anchor = re.search(r"text-anchor: (\w+)", node.get("style", ""))
        width = 5.2 * len(words)
        left = x - {"middle": width / 2, "end": width}.get(anchor.group(1) if anchor else "", 0)
        boxes.append((left, y - 8, left + width, y + 1))
    assert len(boxes) == len(points)
    for place, one in enumerate(boxes):
        for two in boxes[place + 1 :]:
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1], (one, two)


def texts(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def titles(svg):
    return [title.text for title in ET.fromstring(svg).iter(f"{SVG}title")]


def test_names_of_any_kind_are_drawn_as_they_are():
    odd = 'a<b>&"c" $x^2$ -- \\frac'
    svg = overview([Point(odd, 1.0, 0.97, passed=True, chosen=False), POINTS[2]], SCALE, name="odd")
    assert titles(svg)[0].startswith(odd)
    assert any("a<b>&" in text for text in texts(svg))


def test_thirty_targets_fit_and_a_wide_span_is_logarithmic():
    many = [Point(str(place), 0.1 * 1.3**place, 0.97, passed=True, chosen=False) for place in range(1, 31)]
    svg = overview(many, SCALE, name="many")
    assert len(titles(svg)) == 30
    assert any("logarithmic" in text for text in texts(svg))
    assert "logarithmic" not in " ".join(texts(drawn()))


def test_the_png_is_the_same_each_time():
    one, two = (overview_png(POINTS, SCALE) for _ in range(2))
    assert one == two
    assert one.startswith(b"\x89PNG")


def test_depth_tells_each_operator_and_tags_the_worst():
    layers = [Layer("stem", 40.0, tag="2"), Layer("body", float("inf")), Layer("head", 12.5, 10.0, tag="worst")]
    svg = picture_depth.depth(layers, name="depth", own="by itself", running="in the model")
    assert titles(svg) == [
        "stem: by itself 40.0 dB",
        "body: by itself inf dB",
        "head: by itself 12.5 dB, in the model 10.0 dB",
    ]
    assert {"2", "worst"} <= set(texts(svg))


def test_the_timeline_leaves_out_idle_time_and_shows_what_was_at_once():
    bars = [Bar("engine", "one", 0, 10), Bar("engine", "two", 2, 10), Bar("parity", "one", 100_000, 5, other=True)]
    svg = picture_timeline.timeline(bars, name="when")
    assert titles(svg) == ["engine/one: 10.00 s", "engine/two: 10.00 s", "parity/one: 5.00 s"]
    assert {"engine", "parity"} <= set(texts(svg))
    ticks = [float(text) for text in texts(svg) if text.replace(".", "").isdigit()]
    assert max(ticks) < 20, "a day between two exports would leave no room for them"

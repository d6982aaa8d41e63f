"""Profiles added up, and the tables of `exportyard profile` and `exportyard bench`."""

import math

import pytest

from pipeline import host, shares
from pipeline.commands import bench, profile
from pipeline.errors import UsageError
from pipeline.types import (
    Bench,
    BenchRow,
    Compilation,
    Machine,
    Place,
    Profile,
    ProfileRow,
    Ratio,
    Timing,
    WarmUp,
)


def row(operator, ms, module="", node="n", name="e", line=""):
    return ProfileRow(operator=operator, name=name, node=node, module=module, line=line, ms=ms)


PROFILE = Profile(
    scheme="fp32",
    sizes={"batch": 8},
    threads=1,
    calls=9,
    call_ms=12.0,
    plain_ms=10.5,
    rows=(
        row("Conv", 4.0, "encoder.layer.0.conv", name="c0", line="model.py:7"),
        row("Conv", 3.0, "encoder.layer.1.conv", name="c1"),
        row("Softmax", 1.0, ""),
        row("ReorderOutput", 2.0, "", node=""),
    ),
)


def test_time_by_module_with_what_is_known_of_none_at_the_end():
    found = shares.by_module(PROFILE)
    assert [(one.name, one.ms, one.operators) for one in found] == [
        ("encoder.layer.0.conv", 4.0, 1),
        ("encoder.layer.1.conv", 3.0, 1),
        (shares.ITSELF, 1.0, 1),
        (shares.NOT_ATTRIBUTED, 2.0, 1),
    ]
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert sum(one.ms for one in found) == pytest.approx(PROFILE.operators_ms)


def test_modules_of_some_depth_hold_those_inside():
    first = shares.by_module(PROFILE, 2)[0]
    assert (first.name, first.ms) == ("encoder.layer", 7.0)


def test_time_by_kind_of_operator():
    assert [(one.name, one.share) for one in shares.by_operator(PROFILE)] == [
        ("Conv", pytest.approx(0.7)),
        ("ReorderOutput", pytest.approx(0.2)),
        ("Softmax", pytest.approx(0.1)),
    ]


def test_a_profile_without_rows_has_no_shares():
    empty = Profile(scheme="fp32", not_profiled="an engine with buckets is several engines")
    assert shares.by_module(empty) == shares.slowest(empty, 3) == []


def test_the_headline_compares_the_sum_with_a_call():
    text = profile.headline("t", PROFILE)
    assert "operators 10 ms; a call 10.5 ms, 12 ms while profiled" in text
    assert "batch=8" in text


def test_modules_beyond_the_shown_ones_are_one_line():
    many = PROFILE.model_copy(update={"rows": tuple(row("Add", 1.0, f"m{number}") for number in range(25))})
    _, rows = profile.share_rows(many, profile.By.MODULE, None)
    assert len(rows) == profile.MOST + 1
    assert rows[-1] == ["5 more", "5", "5", "20.0%"]


def test_the_slowest_operators_with_their_lines():
    _, rows = profile.slowest_rows(PROFILE)
    assert rows[0] == ["Conv", "c0", "encoder.layer.0.conv", "model.py:7", "4", "40.0%"]
    assert rows[2][2] == shares.NOT_ATTRIBUTED


def test_what_torch_compile_does_in_one_line_and_a_row_for_each_place():
    found = Compilation(
        recipe="r",
        sizes=({"batch": 8}, {"batch": 1}),
        graphs=2,
        graph_breaks=(Place(line="model.py:5: print(x)", reason="print", advice="remove it"),),
        recompilations=(Place(reason="the graph holds only for 2 <= batch", sizes={"batch": 1}),),
        guards=(Place(reason="the trace took for granted that batch < 9", sizes={"batch": 9}),),
    )
    assert profile.compilation_line(found) == (
        "torch.compile: 2 graphs, 1 graph break, 1 recompilation at batch=8; batch=1"
    )
    assert [line[0] for line in profile.place_rows(found)] == ["graph break", "recompilation", "guard at capture"]
    lost = Compilation(recipe="r", not_followed="at batch = 8: RuntimeError: no")
    assert "can't follow" in profile.compilation_line(lost)


def bench_found(**changes):
    time = Timing(median_ms=2.0, p25_ms=1.9, p75_ms=2.2, repeats=9)
    half = Timing(median_ms=1.0, p25_ms=0.9, p75_ms=1.1, repeats=9)
    line = BenchRow(
        sizes={"batch": 1},
        threads=1,
        times={"eager": time, "t fp32": half},
        versus_eager={"eager": Ratio(median=1, p25=1, p75=1), "t fp32": Ratio(median=2, p25=1.9, p75=2.1)},
    )
    small = BenchRow(sizes={"batch": 64}, threads=1, times={"eager": time}, versus_eager={})
    machine = Machine(cpu="a cpu", cores=2, turbo=True, load_before=0.5)
    return Bench(recipe="r", machine=machine, seconds=1, rows=(line, small), **changes)


def test_a_runner_that_was_not_timed_at_some_sizes_has_an_empty_cell():
    assert [*bench._times(bench_found())] == [["eager", "2 (1.9-2.2)", "2 (1.9-2.2)"], ["t fp32", "1 (0.9-1.1)", ""]]


def test_ratios_are_told_only_where_there_is_something_to_compare_with():
    found = bench_found()
    assert [*bench._ratios(found, [row.versus_eager for row in found.rows])][1] == ["t fp32", "2.00", ""]
    assert [*bench._ratios(found, [row.versus_compile for row in found.rows])] == []


def test_the_machine_says_what_is_not_known():
    text = bench.machine_line(bench_found())
    assert "governor not told, turbo on, load average 0.50 before, not told after" in text
    assert "free to move" in text


def test_what_a_runner_took_before_it_was_timed():
    one = WarmUp(runner="compile", threads=1, build_s=0, first_s=12.345, graphs=3, graph_breaks=0, recompilations=2)
    assert bench.warm_up_row(one) == ["compile", "1", "0.00 s", "12.35 s", "3", "0", "2", ""]
    other = WarmUp(runner="e", threads=2, build_s=1, first_s=0, sqnr_db=123.45)
    assert bench.warm_up_row(other)[-4:] == ["", "", "", "123.5 dB"]
    assert bench.warm_up_row(other.model_copy(update={"sqnr_db": math.inf}))[-1] == "equal"


def test_numbers_of_threads_that_cannot_be_had_are_refused(monkeypatch):
    monkeypatch.setattr(host, "cpu_count", lambda: 4)
    assert bench.checked_threads(None) == [1, 4]
    assert bench.checked_threads([4, 2, 2]) == [2, 4]
    with pytest.raises(UsageError, match=r"--threads 5.*4 cores"):
        bench.checked_threads([5])
    with pytest.raises(UsageError, match="--seconds 0"):
        bench.checked_seconds(0)

"""Timing in turns: whose turn it is, what ratios are made of, at which sizes."""

import pytest

from pipeline import timing
from pipeline.timing import Turns
from pipeline.types import Axis

AXES = {"batch": Axis(min=1, opt=8, max=64), "seq": Axis(min=4, opt=32, max=128)}


def test_the_first_axis_takes_its_ends_and_the_others_stay_at_opt():
    assert timing.timed_sizes(AXES) == [{"batch": 1, "seq": 32}, {"batch": 8, "seq": 32}]
    assert timing.bench_sizes(AXES) == [{"batch": size, "seq": 32} for size in (1, 8, 64)]
    assert timing.bench_sizes({"batch": Axis(min=4, opt=4, max=4)}) == [{"batch": 4}]
    assert timing.bench_sizes({}) == [{}]


def test_each_round_begins_with_another_runner_and_none_is_left_out():
    names = ["a", "b", "c"]
    rounds = [timing.rotated(names, number) for number in range(4)]
    assert [order[0] for order in rounds] == ["a", "b", "c", "a"]
    assert all(sorted(order) == names for order in rounds)
    # whoever comes after whom stays the same, so that no runner has always the same one's traces only by chance
    assert rounds[1] == ["b", "c", "a"]


def test_runners_are_called_equally_often_and_in_turns():
    seen = []
    calls = {"slow": lambda: seen.append("slow") or sum(range(300_000)), "fast": lambda: seen.append("fast")}
    found = timing.interleaved(calls, seconds=0.05)
    assert len(found["slow"].clock_s) == len(found["fast"].clock_s) >= timing.LEAST_ROUNDS
    assert sum(found["slow"].clock_s) > sum(found["fast"].clock_s)
    # bursts of the fast one are between calls of the slow one, not after all of them
    last_of_fast = len(seen) - 1 - seen[::-1].index("fast")
    assert seen.index("fast") < last_of_fast
    assert "slow" in seen[seen.index("fast") : last_of_fast]


def test_ratios_on_one_thread_are_of_processor_time():
    turns = Turns(clock_s=[4.0, 8.0], cpu_s=[1.0, 1.0])
    assert turns.paired(1) == [1.0, 1.0]
    assert turns.paired(2) == [4.0, 8.0]


def test_a_ratio_is_formed_within_each_round():
    # the second round was ten times slower for both: their ratio is the same
    found = timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (found.median, found.p25, found.p75) == (2.0, 2.0, 2.0)


def test_quartiles_in_milliseconds():
    found = timing.timing([0.001, 0.002, 0.003])
    assert found.median_ms == pytest.approx(2.0)
    assert found.repeats == 3
    assert found.p25_ms < found.median_ms < found.p75_ms

"""Timing runners against each other on a machine that is never quiet.

Runners take turns call by call, and ratios are formed within a round before their median is taken: what slows one
round slows all of its calls. Each round begins with another runner, since the one before leaves its traces in caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline import host
from pipeline.types import Axis, Ratio, Timing

BURST_S = 0.01  # a turn of a fast runner
TICK_S = 1e-7
MOST_ROUNDS = 200
LEAST_ROUNDS = 5


def timed_threads() -> list[int]:
    """One thread, which two runs agree about best, and every core."""
    return sorted({1, host.cpu_count()})


def timed_sizes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """The first axis at its min (batch 1, as a rule) with the others at opt, then all at opt."""
    return _sizes(axes, ("min", "opt"))


def bench_sizes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """The first axis at its min, opt and max, the others at opt."""
    return _sizes(axes, ("min", "opt", "max"))


def _sizes(axes: Mapping[str, Axis], ends: Sequence[str]) -> list[dict[str, int]]:
    opt = {name: axis.opt for name, axis in axes.items()}
    if not opt:
        return [{}]
    first = next(iter(axes))
    found: list[dict[str, int]] = []
    for end in ends:
        sizes = opt | {first: getattr(axes[first], end)}
        if sizes not in found:
            found.append(sizes)
    return found


@dataclass(frozen=True)
class Turns:
    """Seconds of one call, one entry a round: on the clock, and of processor time over all threads."""

    clock_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def paired(self, threads: int) -> list[float]:
        """What ratios are made of: on one thread processor time, which other work on the machine spares."""
        return self.cpu_s if threads == 1 else self.clock_s


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float | None = None) -> dict[str, Turns]:
    """What one call of each runner costs in each round, the runners taking turns; as many rounds as time allows.

    A turn of a fast runner is a burst of calls after one that isn't counted: the threads of the runner before it spin
    for a while longer, and would be measured, too.

    Args:
        calls: by the runner's name.
        seconds: for all of them together; None leaves it to `host.measure_s`.
    """
    bursts: dict[str, int] = {}
    costs = 0.0
    for name, call in calls.items():
        call()
        begun = time.perf_counter()
        call()
        cost = time.perf_counter() - begun
        bursts[name] = max(1, min(100, int(BURST_S / max(cost, 1e-6))))
        costs += cost * (bursts[name] + 1)
    budget = host.measure_s() if seconds is None else seconds
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(costs, 1e-6))))
    found = {name: Turns() for name in calls}
    late = time.perf_counter() + 2 * budget  # a busy machine is slower than it was while warming up
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > late:
            break
        for name in rotated(list(calls), done):
            _turn(calls[name], bursts[name], found[name])
    return found


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """`names` in the same circle, beginning one further on in each round."""
    start = round_number % len(names) if names else 0
    return [*names[start:], *names[:start]]


def _turn(call: Callable[[], object], burst: int, turns: Turns) -> None:
    """Note the seconds a call, over a burst."""
    if burst > 1:
        call()
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(burst):
        call()
    turns.clock_s.append((time.perf_counter() - clock) / burst)
    turns.cpu_s.append((time.process_time() - cpu) / burst)


def timing(seconds: Sequence[float]) -> Timing:
    """Quartiles of times, given in seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Timing(median_ms=middle * 1e3, p25_ms=low * 1e3, p75_ms=high * 1e3, repeats=len(seconds))


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times faster `other` is than `base`, round by round."""
    # a turn too short for the processor's clock counts as one tick of it
    # on a device a slow engine has fewer rounds
    ratios = (max(one, TICK_S) / max(two, TICK_S) for one, two in zip(base, other, strict=False))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(median=middle, p25=low, p75=high)

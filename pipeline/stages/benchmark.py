"""Stage benchmark: how fast each candidate of a target is, next to eager PyTorch, in one interleaved run.

The machines are noisy, so runners take turns call by call, and ratios are formed within a round before their median
is taken: what slows one round slows all of its calls.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue

from pipeline import backends, buckets, host, reference, samples, targets
from pipeline.errors import BuildError
from pipeline.store import Stored, write_json
from pipeline.types import (
    Axis,
    Comparison,
    DeviceRunner,
    LatencyReport,
    LatencyRow,
    Ratio,
    Recipe,
    Reporter,
    Scheme,
    Target,
    Timing,
)

if TYPE_CHECKING:
    from pipeline.types import Tensors

BURST_S = 0.01  # a turn of a fast runner
TICK_S = 1e-7
MOST_ROUNDS = 200
LEAST_ROUNDS = 5


def benchmark(
    recipe: Recipe,
    target: Target,
    engines: Mapping[Scheme, Stored],
    program: Stored,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Time `engines` and eager PyTorch at batch 1 and at every axis's opt, on one core and on all of them.

    On a row's device the engines alone are timed, by its clock; under an emulator nothing is. Writes
    ``latency.json``.

    Raises:
        BuildError: an engine can't be loaded.
        UnavailableError: the device doesn't answer.
    """
    idle = targets.not_measured(target)
    if idle is not None:
        cpu, rows = target.arch, []
    elif target.device is not None:
        cpu, rows = f"{target.arch} (over RPC)", _on_device(recipe, target, engines, report)
    else:
        cpu, rows = host.cpu_name(), _here(recipe, target, engines, program, report)
    found = LatencyReport(recipe=recipe.name, target=target.name, cpu=cpu, rows=tuple(rows), not_measured=idle)
    write_json(out / "latency.json", found.plain())
    return {"rows": len(rows)}


def _here(
    recipe: Recipe, target: Target, engines: Mapping[Scheme, Stored], program: Stored, report: Reporter
) -> list[LatencyRow]:
    rows: list[LatencyRow] = []
    sizes_of = timed_sizes(_served(recipe, engines))
    steps = [(threads, sizes) for threads in timed_threads() for sizes in sizes_of]
    for threads in timed_threads():
        with contextlib.ExitStack() as stack:
            runners = {"eager": stack.enter_context(reference.eager(program, threads))}
            for scheme, engine in engines.items():
                runners[scheme] = stack.enter_context(backends.loaded(engine, target, threads))
            for sizes in sizes_of:
                report(len(rows), len(steps), f"latency {target.name} at {dict(sizes)}, {threads} threads")
                feeds = samples.feeds(recipe, sizes, seed=1)
                calls = {name: partial(run, feeds) for name, run in runners.items()}
                rows.append(_row(sizes, threads, interleaved(calls)))
    return rows


def compare_rows(
    recipe: Recipe,
    engines: Mapping[str, tuple[Stored, Target]],
    program: Stored,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Time engines of several rows and eager PyTorch in one run on one thread. Writes ``comparison.json``.

    Args:
        engines: by the name of the row; of this host.

    Raises:
        BuildError: an engine can't be loaded.
    """
    sizes_of = timed_sizes(_common([buckets.axes_of(recipe, engine) for engine, _ in engines.values()]))
    found: list[dict[str, Ratio]] = []
    with contextlib.ExitStack() as stack:
        eager = stack.enter_context(reference.eager(program, 1))
        runners = {
            name: stack.enter_context(backends.loaded(engine, target, 1)) for name, (engine, target) in engines.items()
        }
        for sizes in sizes_of:
            report(len(found), len(sizes_of), f"{len(engines)} rows at {dict(sizes)}")
            feeds = samples.feeds(recipe, sizes, seed=1)
            calls = {name: partial(run, feeds) for name, run in {"": eager, **runners}.items()}  # no row has no name
            turns = interleaved(calls)
            found.append({name: _ratio(turns[""].cpu_s, turns[name].cpu_s) for name in runners})
    write_json(out / "comparison.json", Comparison(sizes=tuple(sizes_of), versus_eager=tuple(found)).plain())
    return {"rows": list(engines)}


def _common(served: Sequence[Mapping[str, Axis]]) -> dict[str, Axis]:
    """The axes as far as all serve them; the largest bucket of a row may be less than the recipe's max."""
    found = {}
    for name, axis in served[0].items():
        most = min(one[name].max for one in served)
        found[name] = Axis(min=axis.min, opt=min(axis.opt, most), max=most)
    return found


def _on_device(recipe: Recipe, target: Target, engines: Mapping[Scheme, Stored], report: Reporter) -> list[LatencyRow]:
    rows: list[LatencyRow] = []
    sizes_of = timed_sizes(_served(recipe, engines))
    for threads in _device_threads(target, engines):
        for sizes in sizes_of:
            report(len(rows), 2 * len(sizes_of), f"latency {target.name} at {dict(sizes)}, {threads} threads")
            feeds = samples.feeds(recipe, sizes, seed=1)
            turns: dict[str, Turns] = {}
            for scheme, engine in engines.items():
                # one at a time: a board may not have the memory for two
                with _loaded_there(engine, target, threads) as run:
                    turns[scheme] = _timed_there(run, feeds)
            rows.append(_row(sizes, threads, turns))
    return rows


def _device_threads(target: Target, engines: Mapping[Scheme, Stored]) -> list[int]:
    with _loaded_there(next(iter(engines.values())), target, None) as run:
        return sorted({1, run.cores()})


@contextlib.contextmanager
def _loaded_there(engine: Stored, target: Target, threads: int | None) -> Iterator[DeviceRunner]:
    with backends.loaded(engine, target, threads) as run:
        if not hasattr(run, "seconds"):
            raise BuildError(
                f"backend `{target.backend}` takes a device but can't time an engine there",
                hint="its `load` must yield a `pipeline.types.DeviceRunner`",
            )
        yield cast("DeviceRunner", run)


def _timed_there(run: DeviceRunner, feeds: Tensors) -> Turns:
    cost = max(run.seconds(feeds, 1), 1e-6)
    calls = max(1, min(100, int(BURST_S / cost)))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(host.measure_s() / (cost * calls))))
    found = [run.seconds(feeds, calls) for _ in range(rounds)]
    return Turns(found, found)


def _served(recipe: Recipe, engines: Mapping[Scheme, Stored]) -> dict[str, Axis]:
    """The axes with the ranges that all engines of a row serve; buckets may leave less than the recipe has."""
    return buckets.axes_of(recipe, next(iter(engines.values())))


def timed_threads() -> list[int]:
    """One thread, which two runs agree about best, and every core."""
    return sorted({1, host.cpu_count()})


def timed_sizes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """The first axis at its min (batch 1, as a rule) with the others at opt, then all at opt."""
    opt = {name: axis.opt for name, axis in axes.items()}
    if not opt:
        return [{}]
    first = next(iter(axes))
    single = opt | {first: axes[first].min}
    return [single, opt] if single != opt else [opt]


@dataclass(frozen=True)
class Turns:
    """Seconds of one call, one entry a round: on the clock, and of processor time over all threads."""

    clock_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, Turns]:
    """What one call of each runner costs in each round, the runners taking turns; as many rounds as time allows.

    A turn of a fast runner is a burst of calls after one that isn't counted: the threads of the runner before it spin
    for a while longer, and would be measured, too.
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
    budget = host.measure_s()
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(costs, 1e-6))))
    found = {name: Turns() for name in calls}
    late = time.perf_counter() + 2 * budget  # a busy machine is slower than it was while warming up
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > late:
            break
        for name, call in calls.items():
            _turn(call, bursts[name], found[name])
    return found


def _turn(call: Callable[[], object], burst: int, turns: Turns) -> None:
    """Note the seconds a call, over a burst."""
    if burst > 1:
        call()
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(burst):
        call()
    turns.clock_s.append((time.perf_counter() - clock) / burst)
    turns.cpu_s.append((time.process_time() - cpu) / burst)


def _row(sizes: Mapping[str, int], threads: int, turns: Mapping[str, Turns]) -> LatencyRow:
    """Times are on the clock. Ratios on one thread are of processor time, which other work on the machine spares."""
    schemes: list[Scheme] = [name for name in turns if name != "eager"]  # type: ignore[misc]  # the rest are schemes
    paired = {name: one.cpu_s if threads == 1 else one.clock_s for name, one in turns.items()}
    return LatencyRow(
        sizes=sizes,
        threads=threads,
        eager=_timing(turns["eager"].clock_s) if "eager" in turns else None,
        engines={scheme: _timing(turns[scheme].clock_s) for scheme in schemes},
        versus_eager={scheme: _ratio(paired["eager"], paired[scheme]) for scheme in schemes}
        if "eager" in turns
        else {},
        versus_fp32={scheme: _ratio(paired["fp32"], paired[scheme]) for scheme in schemes} if "fp32" in turns else {},
    )


def _timing(seconds: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Timing(median_ms=middle * 1e3, p25_ms=low * 1e3, p75_ms=high * 1e3, repeats=len(seconds))


def _ratio(base: list[float], other: list[float]) -> Ratio:
    # a turn too short for the processor's clock counts as one tick of it
    # on a device a slow engine has fewer rounds
    ratios = (max(one, TICK_S) / max(two, TICK_S) for one, two in zip(base, other, strict=False))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(median=middle, p25=low, p75=high)

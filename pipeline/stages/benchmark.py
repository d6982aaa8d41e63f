"""Stage benchmark: how fast each candidate of a target is, next to eager PyTorch, in one interleaved run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue

from pipeline import backends, buckets, host, profiles, reference, samples, targets
from pipeline.errors import BuildError
from pipeline.store import Stored, write_json
from pipeline.timing import (
    BURST_S,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    Turns,
    interleaved,
    ratio,
    timed_sizes,
    timed_threads,
    timing,
)
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
)

if TYPE_CHECKING:
    from pipeline.types import Tensors


def benchmark(
    recipe: Recipe,
    target: Target,
    engines: Mapping[Scheme, Stored],
    forms: Mapping[Scheme, Stored],
    program: Stored,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Time `engines` and eager PyTorch at batch 1 and at every axis's opt, on one core and on all of them.

    On a row's device the engines alone are timed, by its clock; under an emulator nothing is. Writes
    ``latency.json``, and ``profile.json`` if the backend has a profiler.

    Args:
        recipe: gives axes and inputs.
        target: the row of all `engines`.
        engines: by their form.
        forms: what those were built from, if `backends.can_profile`.
        program: that eager PyTorch runs.
        out: empty folder.
        report: told how far the measuring is.

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
    profiled = profiles.profiles(recipe, target, engines, forms)
    if profiled is not None:
        write_json(out / profiles.FILE, profiled.plain())
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
            found.append({name: ratio(turns[""].cpu_s, turns[name].cpu_s) for name in runners})
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


def _row(sizes: Mapping[str, int], threads: int, turns: Mapping[str, Turns]) -> LatencyRow:
    """Times are on the clock; ratios as `Turns.paired`."""
    schemes: list[Scheme] = [name for name in turns if name != "eager"]  # type: ignore[misc]  # the rest are schemes
    paired = {name: one.paired(threads) for name, one in turns.items()}
    return LatencyRow(
        sizes=sizes,
        threads=threads,
        eager=timing(turns["eager"].clock_s) if "eager" in turns else None,
        engines={scheme: timing(turns[scheme].clock_s) for scheme in schemes},
        versus_eager={scheme: ratio(paired["eager"], paired[scheme]) for scheme in schemes} if "eager" in turns else {},
        versus_fp32={scheme: ratio(paired["fp32"], paired[scheme]) for scheme in schemes} if "fp32" in turns else {},
    )

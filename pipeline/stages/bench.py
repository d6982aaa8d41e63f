"""Stage bench: engines and baselines of PyTorch timed against each other in one interleaved run.

It isn't kept by a key, as other stages are: who asks for it wants it measured now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from pipeline import backends, baselines, buckets, compare, machine, recipes, reference, samples, timing
from pipeline import checkpoint as checkpoints
from pipeline import program as programs
from pipeline.errors import ExportyardError
from pipeline.explain.restoring import restored
from pipeline.store import Stored
from pipeline.timing import Turns
from pipeline.trial import Flat
from pipeline.types import Bench, BenchRow, Recipe, Reporter, Runner, Sizes, Target, WarmUp

if TYPE_CHECKING:
    import torch

    from pipeline.types import Tensors


@dataclass(frozen=True)
class Asked:
    """What is to be timed.

    Attributes:
        recipe: gives axes, inputs and the model's factory.
        checkpoint: the model's weights.
        program: captured from the model.
        engines: by what they are called in the result; all of this host.
        names: baselines, of `baselines.NAMES`.
        threads: numbers of threads.
        seconds: for each runner at each sizes and threads.
        pin: whether threads are kept on as many cores. A runtime that hands each call to a thread of its own (OpenVINO)
            then changes threads on that one core, which it needn't in use.
    """

    recipe: Recipe
    checkpoint: Stored
    program: Stored
    engines: Mapping[str, tuple[Stored, Target]]
    names: Sequence[str]
    threads: Sequence[int]
    seconds: float
    pin: bool = False

    def sizes(self) -> list[dict[str, int]]:
        """Of the axes, smallest first."""
        return timing.bench_sizes(self.recipe.axes)


@dataclass
class _Found:
    """What was found out so far."""

    warm_ups: list[WarmUp] = field(default_factory=list)
    rows: list[BenchRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def bench(asked: Asked, folder: Path, report: Reporter) -> Bench:
    """Time everything at every combination of sizes and threads.

    What can't be had, at all or at some sizes, is told in `Bench.left_out`; it stops nothing else.

    Args:
        asked: what to time.
        folder: for what is compiled meanwhile; removed by the caller.
        report: told how far the work is.
    """
    observer = machine.Observer()
    found = _Found()
    if asked.recipe.factory is not None and asked.program.artifact.facts.get("operators"):
        recipes.resolve(asked.recipe, asked.recipe.factory, "factory")  # without it, the program can't even be read
    model = _model(asked, found)
    for threads in asked.threads:
        with contextlib.ExitStack() as stack, _compilers_forget():
            runners = _started(asked, model, threads, folder, stack, found, report)
            for sizes in asked.sizes():
                what = f"{len(runners)} runners at {sizes}, {threads} threads"
                report(len(found.rows), len(asked.threads) * len(asked.sizes()), what)
                able = {name: run for name, run in runners.items() if _serves(asked, name, sizes, found)}
                with machine.pinned(threads if asked.pin else None) as cores, observer.timing():
                    turns = _timed(asked, able, sizes)
                found.rows.append(row(sizes, threads, cores, turns))
    state = observer.found()
    return Bench(
        recipe=asked.recipe.name,
        machine=state,
        seconds=asked.seconds,
        engines={name: engine.digest for name, (engine, _) in asked.engines.items()},
        tools=baselines.tools(),
        warm_ups=tuple(found.warm_ups),
        rows=tuple(found.rows),
        left_out=found.left_out,
        warnings=(*machine.warnings(state), *found.warnings),
    )


@contextlib.contextmanager
def _compilers_forget() -> Iterator[None]:
    """Inside, torch.compile knows nothing of what was compiled before, and afterwards nothing of what was inside."""
    import torch

    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def _model(asked: Asked, found: _Found) -> torch.nn.Module | None:
    """The user's model with a tuple of outputs; None if no baseline needs it, or it can't be had."""
    wanted = [name for name in asked.names if name in baselines.MODES]
    if not wanted:
        return None
    path = checkpoints.file_of(asked.checkpoint)
    try:
        with programs.quiet():
            model, _ = restored(asked.recipe, path, path)
    except ExportyardError as error:  # of a worker, say, which has the program alone
        found.left_out |= dict.fromkeys(wanted, error.message)
        return None
    flat = Flat(model, [spec.name for spec in asked.recipe.outputs], copies=False)
    flat.training = model.training
    return flat


def _started(
    asked: Asked,
    model: torch.nn.Module | None,
    threads: int,
    folder: Path,
    stack: contextlib.ExitStack,
    found: _Found,
    report: Reporter,
) -> dict[str, Runner]:
    """Every baseline and engine that can be had, each called once at each size."""
    sizes_of = asked.sizes()
    order = [*sizes_of[1:2], *sizes_of[:1], *sizes_of[2:]]  # compilers see opt first
    feeds = samples.feeds(asked.recipe, order[0], seed=1)
    with reference.eager(asked.program, threads) as eager:
        right = eager(feeds)
    runners: dict[str, Runner] = {}
    for name in (name for name in (*asked.names, *asked.engines) if name not in found.left_out):
        report(0, 0, f"{name} for {threads} threads")
        served = [sizes for sizes in order if _serves(asked, name, sizes, found)]
        if name in asked.engines:
            context = _loaded(asked, name, served, threads)
        else:
            context = baselines.started(name, asked.recipe, model, asked.program, served, threads, folder)
        try:
            begun = stack.enter_context(context)
            answer = begun.run(feeds) if name in asked.names else {}
        except Exception as error:  # compilers and engines have exceptions of their own
            found.left_out[name] = baselines.reason_of(error)
            continue
        runners[name] = begun.run
        sqnr_db = _compared(asked, name, right, answer, found) if name in asked.names else None
        found.warm_ups.append(begun.warm_up.model_copy(update={"sqnr_db": sqnr_db}))
    return runners


@contextlib.contextmanager
def _loaded(asked: Asked, name: str, served: Sequence[Sizes], threads: int) -> Iterator[baselines.Started]:
    """An engine as `baselines.started` gives a baseline."""
    engine, target = asked.engines[name]
    begun = perf_counter()
    with backends.loaded(engine, target, threads) as run:
        loaded = perf_counter()
        for sizes in served:
            run(samples.feeds(asked.recipe, sizes, seed=1))
        took = WarmUp(runner=name, threads=threads, build_s=loaded - begun, first_s=perf_counter() - loaded)
        yield baselines.Started(run, took)


def _compared(asked: Asked, name: str, right: Tensors, answer: Tensors, found: _Found) -> float | None:
    """The worst SQNR of a baseline's answer, in dB; one that the recipe's budget would refuse is a warning.

    Engines aren't asked: on random inputs INT8 may be far away, and parity has judged them on evaluation data.
    """
    kinds = {spec.name: spec.kind for spec in asked.recipe.outputs}
    gaps = compare.distances(right, answer, kinds)
    bounds = asked.recipe.budget.vs_eager
    broken = [text for gap in gaps if bounds is not None for text in compare.violations(gap, bounds)]
    if broken:
        text = f"baseline {name} answers otherwise than eager PyTorch: {'; '.join(broken)}"
        found.warnings += [text] if text not in found.warnings else []
    # a distance between indices means nothing
    return min((gap.sqnr_db for gap in gaps if gap.kind != "indices"), default=None)


def _serves(asked: Asked, name: str, sizes: Sizes, found: _Found) -> bool:
    """Whether a runner takes these sizes: engines with buckets may end before the recipe's axes do."""
    if name not in asked.engines:
        return True
    served = buckets.axes_of(asked.recipe, asked.engines[name][0])
    if all(served[axis].min <= size <= served[axis].max for axis, size in sizes.items()):
        return True
    most = ", ".join(f"{axis} = {one.max}" for axis, one in served.items())
    found.left_out.setdefault(name, f"serves sizes up to {most} only")
    return False


def _timed(asked: Asked, runners: Mapping[str, Runner], sizes: Sizes) -> dict[str, Turns]:
    feeds = samples.feeds(asked.recipe, sizes, seed=1)
    calls = {name: partial(run, feeds) for name, run in runners.items()}
    return timing.interleaved(calls, asked.seconds * len(calls))


def row(sizes: Sizes, threads: int, cores: tuple[int, ...], turns: Mapping[str, Turns]) -> BenchRow:
    """Times are on the clock; ratios as `Turns.paired`."""
    paired = {name: one.paired(threads) for name, one in turns.items()}

    def versus(base: str) -> dict[str, object]:
        return {} if base not in paired else {name: timing.ratio(paired[base], one) for name, one in paired.items()}

    return BenchRow.model_validate(
        {
            "sizes": sizes,
            "threads": threads,
            "pinned": cores,
            "times": {name: timing.timing(one.clock_s) for name, one in turns.items()},
            "versus_eager": versus(baselines.EAGER),
            "versus_compile": versus(baselines.COMPILE),
        }
    )

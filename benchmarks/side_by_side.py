"""What the INT8 benchmarks share: engines timed turn by turn, judged on evaluation data, written into a page."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import compare, host, metrics, samples
from pipeline.job import Job
from pipeline.types import Runner, Sizes

ROOT = Path(__file__).resolve().parents[1]
TARGET = "linux-x86_64-vnni-onnxruntime"
NOISE = 0.97  # two runs of one engine differ by less than this
BURST_S = 0.02  # least length of a turn
LEAST_ROUNDS = 7

Loader = Callable[[int], AbstractContextManager[Runner]]
"""Loads an engine for a number of threads."""


@dataclass(frozen=True)
class Ratio:
    """Speed relative to the base: median and quartiles of the ratios within each round; `ms` is the median time."""

    ms: float
    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    @property
    def slower(self) -> bool:
        """Whether it is slower than the base by more than noise, and three quarters of the rounds say so."""
        return self.median < NOISE and self.high < 1


@dataclass(frozen=True)
class Quality:
    """How far a form is from eager fp32 on the evaluation data, and what of the recipe's budget it breaks.

    `sqnr_db` and `cosine` are those of the worst output, indices left out.
    """

    sqnr_db: float
    cosine: float
    drop: float
    broken: tuple[str, ...]


def speeds(
    job: Job, loaders: Mapping[str, Loader], base: str, threads: int, sizes: Sequence[Sizes], seconds: float
) -> list[dict[str, Ratio]]:
    """Time all engines in turn, for about `seconds` at each of `sizes`.

    With one thread an engine's time is what the process used of the CPU, which doesn't count the time that other
    processes had it; several threads wait for each other, so there it is what the clock on the wall says.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    found = []
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(load(threads)) for name, load in loaders.items()}
        for one in sizes:
            feeds = samples.feeds(job.recipe, one, seed=1)
            spent = turns({name: partial(run, feeds) for name, run in runners.items()}, seconds, clock)
            found.append({name: _ratio(spent[base], own) for name, own in spent.items()})
    return found


def turns(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """What a call of each costs by `clock` in each round; each round begins with another one than the round before.

    Written apart from the pipeline's own timing, which it checks.
    """
    costs = {name: _turn(call, 1, time.perf_counter) for name, call in calls.items()}
    bursts = {name: max(1, min(200, int(BURST_S / cost))) for name, cost in costs.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + seconds
    while len(found[order[0]]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name in order:
            found[name].append(_turn(calls[name], bursts[name], clock))
        order.append(order.pop(0))
    return found


def _turn(call: Callable[[], object], burst: int, clock: Callable[[], float]) -> float:
    """Seconds a call, after one that isn't counted: caches are cold, and the engine before may still be busy."""
    call()
    begun = clock()
    for _ in range(burst):
        call()
    return (clock() - begun) / burst


def _ratio(base: list[float], own: list[float]) -> Ratio:
    ratios = [one / two for one, two in zip(base, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(own) * 1e3, middle, low, high, len(ratios))


def quality(job: Job, load: Loader) -> Quality:
    """Run a form on all evaluation data."""
    recipe, asked = job.recipe, job.answers().evaluation()
    reference = [outputs for _, outputs in asked]
    labels = [sample.labels for sample, _ in asked]
    with load(host.cpu_count()) as run:
        found = [run(sample.feeds) for sample, _ in asked]
    pooled = [
        compare.pooled(spec.name, [one[spec.name] for one in reference], [one[spec.name] for one in found], spec.kind)
        for spec in recipe.outputs
    ]
    eager, value = (metrics.evaluate(recipe, outputs, labels, reference) for outputs in (reference, found))
    drop = eager - value if recipe.evaluation.higher_is_better else value - eager
    bounds = recipe.budget.vs_eager
    broken = [text for one in pooled for text in compare.violations(one, bounds)] if bounds is not None else []
    if not drop <= recipe.budget.drop:
        broken.append(f"metric falls by {drop:.3g}, the budget is {recipe.budget.drop:g}")
    numbers = [one for one in pooled if one.kind != "indices"]
    return Quality(min(o.sqnr_db for o in numbers), min(o.cosine for o in numbers), drop, tuple(broken))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read in a terminal, too."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def conditions(command: str, load: Sequence[float]) -> str:
    """The command, the host and the versions behind a table; `load` is the load average before it began."""
    features = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8") if name in host.cpu_features()]
    versions = host.versions(["exportyard", "onnxruntime", "torch", "transformers"])
    return (
        f"Made by `{command}` on {host.cpu_count()} cores of {host.cpu_name()} ({', '.join(features) or 'no VNNI'}), "
        f"load average {load[0]:.1f} before; {', '.join(f'{name} {value}' for name, value in versions.items())}."
    )


def load_average() -> Sequence[float]:
    """How busy the machine is, over 1, 5 and 15 minutes."""
    return os.getloadavg()


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        SystemExit: the page has no such place.
    """
    before = page.read_text()
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f"{page} has no `<!-- table: {name} -->` ... `<!-- end -->`")
    page.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before))

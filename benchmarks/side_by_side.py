"""What the INT8 benchmarks share: engines timed turn by turn, judged on evaluation data, written into a page."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import compare, host, metrics, samples
from pipeline.job import Job
from pipeline.stages.benchmark import interleaved
from pipeline.types import Runner, Sizes

ROOT = Path(__file__).resolve().parents[1]
TARGET = "linux-x86_64-vnni-onnxruntime"
NOISE = 0.97  # two runs of one engine differ by less than this

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
    job: Job, loaders: Mapping[str, Loader], base: str, threads: int, sizes: Sequence[Sizes], blocks: int
) -> list[dict[str, Ratio]]:
    """Time all engines in turn, at each of `sizes`; `blocks` times what the pipeline's own benchmark does."""
    found = []
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(load(threads)) for name, load in loaders.items()}
        for one in sizes:
            feeds = samples.feeds(job.recipe, one, seed=1)
            calls = {name: partial(run, feeds) for name, run in runners.items()}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(blocks):
                for name, block in interleaved(calls).items():
                    seconds[name] += block
            found.append({name: _ratio(seconds[base], own) for name, own in seconds.items()})
    return found


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

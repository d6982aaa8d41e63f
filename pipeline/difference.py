"""Two releases side by side: what was changed, what came of it, and whether the recipe's policy allows that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import JsonValue

from pipeline import console
from pipeline.manifest import Engine, LatencyLine, Manifest
from pipeline.types import Regression, Timing, Worsening

COLUMNS = ["target", "form", "metric", "worst error", "time", "size", "verdict"]
_SHA256 = re.compile(r"\b([0-9a-f]{10})[0-9a-f]{54}\b")
_EXACT = 1e-12  # two numbers that were computed in another order may differ by this


@dataclass(frozen=True)
class Change:
    """Something that went into the releases, and differs; None where one of them has no such thing."""

    what: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Pair:
    """The engines of one target in two releases.

    Attributes:
        fall: how much worse the metric is, in its unit; None where the two have not the same metric.
        slower: mean ratio of the times of one call; None where they were not measured on the same CPU and sizes.
        surely: the same from quartiles, the good one after and the bad one before: above 1 only where the times are
            further apart than they scatter.
        larger: ratio of the sizes.
        changes: what differs in how the engine was made.
        regressions: what goes beyond the policy, in words.
    """

    target: str
    before: Engine | None
    after: Engine | None
    fall: float | None = None
    slower: float | None = None
    surely: float | None = None
    larger: float | None = None
    changes: tuple[Change, ...] = ()
    regressions: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether the two engines are the same files."""
        return self.before is not None and self.after is not None and _digests(self.before) == _digests(self.after)

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data."""
        return {
            "target": self.target,
            "before": _numbers(self.before),
            "after": _numbers(self.after),
            "same_files": self.same,
            "metric_fall": self.fall,
            "time_ratio": self.slower,
            "size_ratio": self.larger,
            "changes": [asdict(change) for change in self.changes],
            "regressions": [*self.regressions],
        }


@dataclass(frozen=True)
class Difference:
    """All that differs between two releases; `judged` is False where the recipe has no policy."""

    before: Manifest
    after: Manifest
    changes: tuple[Change, ...]
    pairs: tuple[Pair, ...]
    judged: bool

    @property
    def regressions(self) -> list[str]:
        """What goes beyond the policy, target by target."""
        return [f"{pair.target}: {text}" for pair in self.pairs for text in pair.regressions]

    def verdict(self) -> str:
        """All of it in one line."""
        if not self.judged:
            return "not judged: the recipe has no [regression] in recipe.toml"
        name = f"{self.after.recipe}@{self.after.version}"
        return f"{name} is {'a regression' if self.regressions else 'within the policy'}"

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data."""
        return {
            "recipe": self.after.recipe,
            "before": self.before.version,
            "after": self.after.version,
            "changes": [asdict(change) for change in self.changes],
            "targets": [pair.plain() for pair in self.pairs],
            "judged": self.judged,
            "regressions": [*self.regressions],
            "verdict": self.verdict(),
        }


def between(
    before: Manifest,
    after: Manifest,
    policy: Regression | None,
    *,
    higher_is_better: bool = True,
    code: Sequence[str] = (),
) -> Difference:
    """Compare two releases.

    Args:
        policy: the recipe's; None judges nothing.
        higher_is_better: of the recipe's metric.
        code: files of the recipe that differ between the two commits.
    """
    found = pairs(before.engines, after.engines, after.skipped, policy, higher_is_better=higher_is_better)
    return Difference(before, after, _changes(before, after, code), found, policy is not None)


def pairs(
    before: Mapping[str, Engine],
    after: Mapping[str, Engine],
    skipped: Mapping[str, str],
    policy: Regression | None,
    *,
    higher_is_better: bool = True,
) -> tuple[Pair, ...]:
    """Engines of two releases side by side, by target; `skipped` says why the second has none for a target."""
    return tuple(
        _pair(name, before.get(name), after.get(name), skipped, policy, higher_is_better)
        for name in sorted({*before, *after})
    )


def _changes(before: Manifest, after: Manifest, code: Sequence[str]) -> tuple[Change, ...]:
    found = changed("checkpoint", before.checkpoint, after.checkpoint)
    if before.source.commit != after.source.commit:
        commits = [f"{one.source.commit[:10]}{' (uncommitted changes)' * one.source.dirty}" for one in (before, after)]
        found.append(Change("code" + "".join(f"\n  {name}" for name in code), *commits))
    if before.data != after.data:
        found.append(Change("calibration and evaluation data", before.data, after.data))
    found += changed("tool", before.tools, after.tools)
    if before.signature != after.signature:
        found.append(Change("inputs, outputs or axes", _signature(before), _signature(after)))
    return tuple(found)


def _signature(found: Manifest) -> str:
    specs = (*found.signature.inputs, *found.signature.outputs)
    return ", ".join(f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]" for spec in specs)


def changed(title: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Entries that differ, each named by `title` and its key."""
    return [
        Change(f"{title} {name}", _text(before.get(name)), _text(after.get(name)))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _pair(
    name: str,
    old: Engine | None,
    new: Engine | None,
    skipped: Mapping[str, str],
    policy: Regression | None,
    higher_is_better: bool,
) -> Pair:
    if old is None or new is None:
        lost = new is None and policy is not None and policy.keep_targets
        why = skipped.get(name, "it was not asked for")
        return Pair(name, old, new, regressions=(f"has no engine any more: {why}",) if lost else ())
    one, other = old.parity.metric, new.parity.metric
    fall = None
    if one.name == other.name:
        fall = one.engine - other.engine if higher_is_better else other.engine - one.engine
    slower, surely = _times(old, new)
    found = Pair(
        name,
        old,
        new,
        fall=fall,
        slower=slower,
        surely=surely,
        larger=_size(new) / max(1, _size(old)),
        changes=tuple(changed("tool", old.tools, new.tools) + changed("row:", _row(old), _row(new))),
    )
    return found if policy is None else _judged(found, policy.of(name))


def _row(engine: Engine) -> dict[str, Any]:
    """What decides an engine's bytes in the row of its target."""
    return engine.target.model_dump(mode="json", exclude={"name", "summary", "pool", "device", "limits"})


def _times(old: Engine, new: Engine) -> tuple[float | None, float | None]:
    """Geometric means of the ratios of `_both`: of the medians, and of the quartiles that are nearest to each other."""
    both = _both(old, new)
    if not both or min(time.p25_ms for pair in both for time in pair) <= 0:
        return None, None
    return (
        _mean([after.median_ms / before.median_ms for before, after in both]),
        _mean([after.p25_ms / before.p75_ms for before, after in both]),
    )


def _both(old: Engine, new: Engine) -> list[tuple[Timing, Timing]]:
    """The times that were taken of both engines at the same sizes and threads, on one kind of CPU."""
    if old.latency.cpu != new.latency.cpu:
        return []
    known = {_case(row): row.engine for row in old.latency.rows}
    return [(known[_case(row)], row.engine) for row in new.latency.rows if _case(row) in known]


def _case(row: LatencyLine) -> tuple[object, ...]:
    return (*sorted(row.sizes.items()), row.threads)


def _mean(numbers: Sequence[float]) -> float:
    """Geometric: twice as fast at one size makes up for half as fast at another."""
    return math.exp(math.fsum(map(math.log, numbers)) / len(numbers))


def _judged(found: Pair, limits: Worsening) -> Pair:
    said = []
    if limits.drop is not None and found.fall is not None and found.fall > limits.drop + _EXACT:
        said.append(f"{_metric_name(found)} is worse by {found.fall:.4g}, allowed is {limits.drop:g}")
    if limits.slowdown is not None and _is_slower(found, limits.slowdown):
        said.append(f"a call takes {found.slower:.2f}x of the time, allowed is {1 + limits.slowdown:g}x")
    if limits.growth is not None and found.larger is not None and found.larger > 1 + limits.growth:
        said.append(f"it has {found.larger:.2f}x of the size, allowed is {1 + limits.growth:g}x")
    return replace(found, regressions=tuple(said))


def _is_slower(found: Pair, allowed: float) -> bool:
    """The same files take the same time, whatever a clock says; and a clock that scatters says nothing."""
    if found.same or found.slower is None or found.surely is None:
        return False
    return found.slower > 1 + allowed and found.surely > 1


def _metric_name(found: Pair) -> str:
    return found.after.parity.metric.name if found.after is not None else "the metric"


def _digests(engine: Engine) -> dict[str, str]:
    return {file.path: file.sha256 for file in engine.files}


def _size(engine: Engine) -> int:
    return sum(file.size_bytes for file in engine.files)


def _numbers(engine: Engine | None) -> dict[str, JsonValue] | None:
    if engine is None:
        return None
    return {
        "scheme": engine.scheme,
        "metric": engine.parity.metric.name,
        "value": engine.parity.metric.engine,
        "max_over_peak": _worst(engine),
        "median_ms": [row.engine.median_ms for row in engine.latency.rows],
        "size_bytes": _size(engine),
    }


def _worst(engine: Engine) -> float:
    return max((one.max_over_peak for one in engine.parity.vs_eager), default=0.0)


def change_row(found: Change, target: str) -> list[str]:
    """One line of the table of changes; `target` is empty where it is about all of them. Digests are shortened."""
    sides = ("-" if side is None else _SHA256.sub(r"\1", side) for side in (found.before, found.after))
    return [found.what, target, *sides]


def row(found: Pair) -> list[str]:
    """One line of the table of `COLUMNS`: the number before, the number after."""
    old, new = found.before, found.after
    if old is None or new is None:
        there = new or old
        form = there.scheme if there is not None else ""
        state = "[green]new[/]" if old is None else "[red]gone[/]" if found.regressions else "[yellow]gone[/]"
        return [found.target, form, "", "", "", "", state]
    metric = old.parity.metric.name == new.parity.metric.name and new.parity.metric.name
    verdict = "[green]same files[/]" if found.same else "[green]ok[/]"
    return [
        found.target,
        _arrow(old.scheme, new.scheme),
        _arrow(f"{old.parity.metric.engine:.4g}", f"{new.parity.metric.engine:.4g}") if metric else "another metric",
        _arrow(f"{_worst(old):.2g}", f"{_worst(new):.2g}"),
        _time(found, old, new),
        _arrow(console.size(_size(old)), console.size(_size(new))),
        "[red]regression[/]" if found.regressions else verdict,
    ]


def _time(found: Pair, old: Engine, new: Engine) -> str:
    if not old.latency.rows or not new.latency.rows:
        return "not measured"
    before, after = both_timed(old, new)
    if found.slower is None or before is None or after is None:
        return "not comparable"
    return f"{before:.3g} -> {after:.3g} ms ({found.slower:.2f}x)"


def both_timed(old: Engine, new: Engine) -> tuple[float, float] | tuple[None, None]:
    """Mean milliseconds of one call, over the sizes and threads at which both were timed on one kind of CPU."""
    both = _both(old, new)
    if not both or min(time.median_ms for pair in both for time in pair) <= 0:
        return None, None
    return _mean([one.median_ms for one, _ in both]), _mean([one.median_ms for _, one in both])


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"

"""How good a numeric form of a graph is: the questions that a search asks, each answered once and kept in a journal."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from pydantic import JsonValue, ValidationError

from pipeline import compare, digest, host, metrics, recipes
from pipeline import graph as graphs
from pipeline.errors import ConversionError, RecipeError
from pipeline.reference import Answers, Outputs, written
from pipeline.samples import Sample
from pipeline.types import Distance, Frozen, RangeMethod, Recipe, Reporter, Tolerance

FORMAT = 1  # part of every key of the journal: raise it when the numbers mean something else
ROWS = 64  # what the first look is over; a set that isn't twice as large is looked at as a whole
MARGIN = 0.02  # an engine rounds now and then to another side than its graph says; so much noise is left for that

Build = Callable[["Choice"], tuple[onnx.ModelProto, dict[str, JsonValue]]]


class Choice(Frozen):
    """A static INT8 form of a graph.

    Attributes:
        method: how ranges are read from the statistics.
        correct: whether mean errors are taken off the biases.
        smooth: whether large channels move from normalisations into weights.
        floats: names of the nodes that stay in float, sorted.
    """

    method: RangeMethod
    correct: bool = False
    smooth: bool = False
    floats: tuple[str, ...] = ()


class Trial(Frozen):
    """What one form did on evaluation data.

    Attributes:
        calls: how many evaluation samples it was run on.
        rows: how many rows these hold.
        metric: the recipe's metric; None where it can't be told for what the form returned.
        drop: how far it falls below that of eager fp32 on the same samples; infinite where it can't be told.
        vs_eager: the distance of each output from eager fp32.
    """

    choice: Choice
    calls: int
    rows: int
    metric: float | None
    drop: float
    vs_eager: tuple[Distance, ...]

    @property
    def sqnr_db(self) -> float:
        """Of the worst output; for indices, the share that differs counts as noise."""
        return min((_decibels(one) for one in self.vs_eager), default=-math.inf)


def _decibels(one: Distance) -> float:
    if one.kind != "indices":
        return one.sqnr_db
    wrong = 1 - (one.argmax_agreement if one.argmax_agreement is not None else 1.0)
    return -10 * math.log10(wrong) if wrong > 0 else math.inf


class Measured(Protocol):
    """What a budget is asked of: how far the metric falls, and the distance of each output from eager fp32."""

    @property
    def drop(self) -> float:
        """In the metric's unit."""
        ...

    @property
    def vs_eager(self) -> tuple[Distance, ...]:
        """Of each output."""
        ...


def outside(recipe: Recipe, trial: Measured, slack: float = 0.0) -> list[str]:
    """Where `trial` breaks the recipe's budget, in words; empty when it holds with a small margin.

    Args:
        recipe: has the budget.
        trial: on any part of the evaluation data.
        slack: what the metric may fall further, since it is coarse on few samples.
    """
    found = []
    if not trial.drop <= recipe.budget.drop + slack:
        found.append(f"the metric falls by {trial.drop:.4g}, the budget is {recipe.budget.drop:g}")
    if recipe.budget.vs_eager is not None:
        tight = _tighter(recipe.budget.vs_eager)
        found += [text for one in trial.vs_eager for text in compare.violations(one, tight)]
    return found


def _tighter(bound: Tolerance) -> Tolerance:
    changes: dict[str, float] = {}
    for name in ("max_abs", "max_over_peak", "rmse"):
        value = getattr(bound, name)
        if value is not None:
            changes[name] = value * (1 - MARGIN)
    if bound.sqnr_db is not None:
        changes["sqnr_db"] = bound.sqnr_db - 20 * math.log10(1 - MARGIN)
    if bound.cosine is not None:
        # one less the cosine goes with the square of the noise
        changes["cosine"] = 1 - (1 - bound.cosine) * (1 - MARGIN) ** 2
    return bound.model_copy(update=changes)


def spread(total: int, count: int) -> list[int]:
    """`count` places out of `total`, evenly spread; all of them where there are no more."""
    return sorted({place * total // count for place in range(count)}) if count < total else list(range(total))


class Evaluations:
    """Asks how good forms are, first on a few samples, then on all; nothing is asked twice.

    Attributes:
        trials: every answer that was used, in the order in which it was first needed.
    """

    def __init__(
        self, recipe: Recipe, answers: Answers, journal: Path, subject: Sequence[str], build: Build, report: Reporter
    ) -> None:
        """Read what the journal holds.

        Args:
            recipe: its metric and budget.
            answers: of eager fp32.
            journal: file that measurements are appended to; made if it isn't there.
            subject: digests and words for all that decides what `build` returns for a choice.
            build: makes the graph of a choice.
            report: told of each measurement.
        """
        self.trials: list[Trial] = []
        self._recipe, self._build, self._report, self._journal = recipe, build, report, journal
        self._asked = answers.evaluation()
        self._all = list(range(len(self._asked)))
        self._few = self._first_look()
        self._subject: list[JsonValue] = [
            FORMAT,
            *subject,
            answers.program.digest,
            answers.data.digest,
            recipe.model_dump(mode="json", include={"outputs", "evaluation"}),
            recipes.code_digest(recipe, recipe.evaluation.metric),
            dict(host.versions(["exportyard", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy"])),
        ]
        self._known = _read(journal)
        self._eager: dict[int, float] = {}

    def few(self, choice: Choice) -> Trial:
        """The answer for `choice` on a few samples."""
        return self._ask(choice, self._few)

    def holds(self, choice: Choice) -> bool:
        """Whether `choice` keeps the budget on all samples; what clearly doesn't fails on the first few."""
        first = self._ask(choice, self._few)
        if self._few == self._all:
            return not outside(self._recipe, first)
        # one row more or less must not decide
        if outside(self._recipe, first, slack=1 / first.rows):
            return False
        return not outside(self._recipe, self._ask(choice, self._all))

    def closest(self) -> Choice:
        """Of all that was asked, what came nearest to eager fp32."""
        return max(self.trials, key=lambda trial: trial.sqnr_db).choice

    def _first_look(self) -> list[int]:
        rows = sum(_rows(sample) for sample, _ in self._asked)
        if rows < 2 * ROWS:
            return self._all
        few = spread(len(self._asked), math.ceil(ROWS * len(self._asked) / rows))
        try:
            self._metric([self._asked[place][1] for place in few], few)
        except RecipeError:  # some metrics need more than a part of the data; if it's another fault, all will show it
            return self._all
        return few

    def _metric(self, outputs: list[Outputs], places: list[int]) -> float:
        labels = [self._asked[place][0].labels for place in places]
        return metrics.evaluate(self._recipe, outputs, labels, [self._asked[place][1] for place in places])

    def _ask(self, choice: Choice, places: list[int]) -> Trial:
        key = digest.of_json([*self._subject, choice.plain(), list(places)])
        if key not in self._known:
            self._known[key] = self._measure(choice, places)
            _append(self._journal, key, self._known[key])
        trial = self._known[key]
        if trial not in self.trials:
            self.trials.append(trial)
            self._report(len(self.trials), 0, f"search: {_spell(trial)}")
        return trial

    def _measure(self, choice: Choice, places: list[int]) -> Trial:
        asked = [self._asked[place] for place in places]
        outputs = self._run(self._build(choice)[0], [sample for sample, _ in asked])
        if len(places) not in self._eager:
            self._eager[len(places)] = self._metric([known for _, known in asked], places)
        eager = self._eager[len(places)]
        try:
            value = self._metric(outputs, places)
            fall = eager - value if self._recipe.evaluation.higher_is_better else value - eager
        except RecipeError:  # the metric took what eager fp32 returned, and doesn't take this
            value, fall = None, math.inf
        return Trial(
            choice=choice,
            calls=len(places),
            rows=sum(_rows(sample) for sample, _ in asked),
            metric=value,
            drop=fall,
            vs_eager=tuple(
                compare.pooled(spec.name, [known[spec.name] for _, known in asked], found, spec.kind)
                for spec in self._recipe.outputs
                for found in [[one[spec.name] for one in outputs]]
            ),
        )

    def _run(self, model: onnx.ModelProto, asked: list[Sample]) -> list[Outputs]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            graphs.save(model, path)
            try:
                run = written(path)
                return [run(sample.feeds) for sample in asked]
            except Exception as error:  # onnxruntime's own classes share no base
                raise ConversionError(
                    f"onnxruntime can't run the quantised graph: {str(error).splitlines()[0][:300]}",
                    hint="this is a fault of ours; remove the scheme for now",
                ) from error


def _rows(sample: Sample) -> int:
    """How many rows a sample holds: the first dimension of its first input."""
    array: Any = next(iter(sample.feeds.values()))
    return int(array.shape[0]) if array.ndim else 1


def _spell(trial: Trial) -> str:
    words = [trial.choice.method, *(name for name in ("correct", "smooth") if getattr(trial.choice, name))]
    if trial.choice.floats:
        words.append(f"{len(trial.choice.floats)} in float")
    return f"{' + '.join(words)}: {trial.sqnr_db:.1f} dB"


def _read(journal: Path) -> dict[str, Trial]:
    found: dict[str, Trial] = {}
    try:
        lines = journal.read_text().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            found[entry["key"]] = Trial.model_validate(entry["trial"])
        except (ValueError, KeyError, TypeError, ValidationError):
            continue  # a line that a kill cut short, or that an older version wrote: it is measured again
    return found


def _append(journal: Path, key: str, trial: Trial) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "trial": trial.plain()}, sort_keys=True)
    with journal.open("a+b") as stream:
        # what a kill cut short must not swallow this line, too
        stream.seek(0, os.SEEK_END)
        cut = stream.tell() > 0 and not _ends_a_line(stream)
        stream.write((b"\n" if cut else b"") + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _ends_a_line(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")

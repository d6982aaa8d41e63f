"""Stage: the fastest static INT8 form of a model that its budget allows, found by measurement.

First the cheap choices, which cost no speed: how ranges are read, and rewrites that keep more accuracy. If the budget
then holds, all that can be integer is. If not, the operators that lose most are left in float, as few as it takes.
Graphs are run as they are written, so that the choice doesn't depend on the processor that it is made on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from pydantic import JsonValue

from pipeline import calibrate, mixing, samples, sensitivity, tricks
from pipeline import graph as graphs
from pipeline.evaluations import Choice, Evaluations, Trial, outside, spread
from pipeline.graph import Graph
from pipeline.reference import Answers
from pipeline.sensitivity import Error, Sensitivity
from pipeline.stages import quantize
from pipeline.store import Stored, write_json
from pipeline.types import Frozen, RangeMethod, Recipe, Reporter, Scheme

METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "entropy")
LOOKS = 3  # calibration samples for local errors; eight give the same order and the same corrections
PEAKS = 16  # calibration samples that channels are weighed by
NEAR_DB = 0.5  # a second method this close to the best may be the best after a correction
TIE_DB = 0.05  # what differs less counts as equal, and the earlier one is taken
GAINS_DB = {"correct": 0.1, "smooth": 0.5}  # what a trick has to bring; smoothing may cost a multiplication
MANY = 4  # this many single operators in float, and whole modules may cost less


class Trick(Frozen):
    """A rewrite that was tried, by its effect on the worst output."""

    name: str
    before_db: float
    after_db: float
    kept: bool


class Search(Frozen):
    """``search.json``: what was tried, and what came of it.

    Attributes:
        chosen: the form that was written.
        within_budget: whether it holds the budget on all evaluation data.
        tricks: rewrites that apply to this model.
        sensitivity: the local error of each operator, in the chosen form.
        trials: every question that was asked, in order.
    """

    scheme: Scheme
    chosen: Choice
    within_budget: bool
    tricks: tuple[Trick, ...]
    sensitivity: Sensitivity
    trials: tuple[Trial, ...]


def search(
    recipe: Recipe,
    fp32: Stored,
    scheme: Scheme,
    statistics: Stored,
    answers: Answers,
    out: Path,
    journal: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Write ``model.onnx``, ``signature.json`` and ``search.json``.

    Where nothing holds the budget, the closest form is written all the same; parity will turn it down.

    Args:
        recipe: its budget, metric, and range method if it names one.
        fp32: the ONNX artifact to start from.
        scheme: a static one.
        statistics: artifact of the calibration.
        answers: gives the data, and what eager fp32 makes of it.
        out: empty folder.
        journal: file that keeps every measurement; what it holds already isn't measured again.
        report: told of each measurement.

    Raises:
        NotApplicable: the model has no operator that this form would change.
        DataError: there is no calibration.
        ConversionError: the form can't be written or run.
        RecipeError: the recipe's metric raised.
    """
    known = quantize.seen(recipe, scheme, statistics)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        forms = _Forms(recipe, fp32, scheme, known, answers, Path(scratch))
        asked = Evaluations(recipe, answers, journal, [fp32.digest, statistics.digest, scheme], forms.build, report)
        choice, tried = _whole(forms, asked)
        table = sensitivity.rank(forms.graph(choice.smooth), forms.errors(choice.method, choice.smooth))
        held = asked.holds(choice)
        if not held:
            mixed = _mixed(choice, table, asked)
            held, choice = mixed is not None, mixed or asked.closest()
        model, facts = forms.build(choice)
    quantize.write(model, fp32, out)
    found = Search(
        scheme=scheme,
        chosen=choice,
        within_budget=held,
        tricks=tuple(tried),
        sensitivity=table,
        trials=tuple(asked.trials),
    )
    write_json(out / "search.json", found.plain())
    return {
        **_explained(facts, table),
        "excluded": [*sorted(choice.floats)],
        "smoothed": choice.smooth,
        "bias_corrected": choice.correct,
        "within_budget": held,
        "evaluations": len(asked.trials),
        "weight_bytes_before": graphs.weight_bytes(onnx.load(fp32.file("model.onnx"))),
        "weight_bytes_after": graphs.weight_bytes(model),
    }


def _explained(facts: dict[str, JsonValue], table: Sensitivity) -> dict[str, JsonValue]:
    """`facts` with the reason for each operator that the search left in float."""
    losses = {row.node: row.sqnr_db for row in table.rows}
    reasons = facts["float_because"]
    assert isinstance(reasons, dict)
    told: dict[str, JsonValue] = {
        name: f"kept for the budget: {losses[name]:.1f} dB in 8 bits"
        if reason == "excluded" and name in losses
        else reason
        for name, reason in reasons.items()
    }
    return {**facts, "float_because": told}


# --- all that can be integer ---------------------------------------------------------------------------------------


def _whole(forms: _Forms, asked: Evaluations) -> tuple[Choice, list[Trick]]:
    """The best form with everything in integers: range method and tricks, by the error on some evaluation data."""
    fixed = quantize.fixed_method(forms.recipe)
    plain = [asked.few(Choice(method=method)) for method in (METHODS if fixed is None else (fixed,))]
    best = _best(plain)
    others = [trial for trial in plain if trial is not best and trial.sqnr_db >= best.sqnr_db - NEAR_DB]
    near = [best, *sorted(others, key=lambda trial: -trial.sqnr_db)[:1]]
    tried: list[Trick] = []
    corrected = _best([asked.few(trial.choice.model_copy(update={"correct": True})) for trial in near])
    best = _kept("correct", best, corrected, forms, tried)
    if forms.smoothable:
        smoothed = asked.few(best.choice.model_copy(update={"smooth": True}))
        best = _kept("smooth", best, smoothed, forms, tried)
    return best.choice, tried


def _best(trials: Sequence[Trial]) -> Trial:
    top = max(trial.sqnr_db for trial in trials)
    return next(trial for trial in trials if trial.sqnr_db >= top - TIE_DB)


def _kept(name: str, before: Trial, after: Trial, forms: _Forms, tried: list[Trick]) -> Trial:
    """`after` if it pays, else `before`; what leaves the budget doesn't pay."""
    good = [not outside(forms.recipe, trial) for trial in (before, after)]
    kept = good[1] if good[0] != good[1] else after.sqnr_db >= before.sqnr_db + GAINS_DB[name]
    tried.append(Trick(name=name, before_db=before.sqnr_db, after_db=after.sqnr_db, kept=kept))
    return after if kept else before


# --- some of it in float -------------------------------------------------------------------------------------------


def _mixed(choice: Choice, table: Sensitivity, asked: Evaluations) -> Choice | None:
    """`choice` with the operators in float that the budget needs; None where all but one of them aren't enough."""
    rows = {row.node: row for row in table.rows}
    weighty = [row.node for row in table.rows if row.macs_share > 0]
    # the least sensitive operator with weights stays: without any, there would be no INT8 at all
    ranked = [name for name in rows if name not in weighty[-1:]]

    def with_floats(names: Sequence[str]) -> Choice:
        return choice.model_copy(update={"floats": tuple(sorted(names))})

    single = mixing.least(ranked, lambda names: asked.holds(with_floats(names)))
    if single is None:
        return None
    found = [single]
    if len(single) >= MANY:
        modules = mixing.blocks(ranked, lambda name: rows[name].module)
        blocks = mixing.least(modules, lambda some: asked.holds(with_floats([name for one in some for name in one])))
        found += [] if blocks is None else [tuple(name for one in blocks for name in one)]
    # what is in float costs time by its multiplications
    return with_floats(min(found, key=lambda names: sum(rows[name].macs_share for name in names)))


# --- graphs --------------------------------------------------------------------------------------------------------


@dataclass
class _Forms:
    """Builds the graph of any `Choice`; keeps what several of them share."""

    recipe: Recipe
    fp32: Stored
    scheme: Scheme
    known: calibrate.Statistics
    answers: Answers
    scratch: Path

    def __post_init__(self) -> None:
        self._errors: dict[tuple[RangeMethod, bool], dict[str, Error]] = {}
        self._smoothed: tuple[Path, calibrate.Statistics] | None = None
        graph = self.graph(smooth=False)
        self.smoothable = bool(tricks.smoothable(graph, quantize.plan(graph, self.scheme, self.known)))

    def graph(self, smooth: bool) -> Graph:
        """The float graph to start from; every node in it has a name."""
        return Graph(onnx.load(self._base(smooth)[0]))

    def build(self, choice: Choice) -> tuple[onnx.ModelProto, dict[str, JsonValue]]:
        """The graph of `choice`, and facts about it."""
        known = self._base(choice.smooth)[1]
        graph = self.graph(choice.smooth)
        if choice.correct:
            chosen = quantize.plan(graph, self.scheme, known, choice.floats)
            tricks.correct_bias(graph, chosen, self._means(choice))
            graph = Graph(graph.model)
        facts = quantize.static(graph, self.scheme, known, choice.method, choice.floats)
        return graph.model, facts

    def errors(self, method: RangeMethod, smooth: bool) -> dict[str, Error]:
        """The local error of each operator, with everything in integers."""
        key = (method, smooth)
        if key not in self._errors:
            path, known = self._base(smooth)
            chosen = quantize.plan(self.graph(smooth), self.scheme, known)
            spans = calibrate.ranges(known, method)
            form = quantize.FORMS[self.scheme]
            self._errors[key] = sensitivity.measure(path, self._calibration(LOOKS), chosen, spans, form)
        return self._errors[key]

    def _means(self, choice: Choice) -> dict[str, NDArray[Any]]:
        errors = self.errors(choice.method, choice.smooth)
        return {name: error.mean for name, error in errors.items() if error.mean is not None}

    def _base(self, smooth: bool) -> tuple[Path, calibrate.Statistics]:
        if not smooth:
            return self.fp32.file("model.onnx"), self.known
        if self._smoothed is None:
            self._smoothed = self._smooth()
        return self._smoothed

    def _smooth(self) -> tuple[Path, calibrate.Statistics]:
        before, path = self.fp32.file("model.onnx"), self.scratch / "smooth.onnx"
        graph = self.graph(smooth=False)
        chosen = quantize.plan(graph, self.scheme, self.known)
        peaks = tricks.peaks(before, self._calibration(PEAKS), tricks.smoothable(graph, chosen))
        fresh = tricks.smooth(graph, chosen, peaks)
        graphs.save(graph.model, path)
        return path, {**self.known, **calibrate.collect(path, self._calibration(None), wanted=fresh)}

    def _calibration(self, count: int | None) -> Iterator[dict[str, NDArray[Any]]]:
        """`count` calibration feeds, evenly spread; all of them by default."""
        total = sum(1 for _ in samples.samples(self.recipe, self.answers.data, "calibration"))
        wanted = set(spread(total, total if count is None else count))
        found = samples.samples(self.recipe, self.answers.data, "calibration")
        return (sample.feeds for place, sample in enumerate(found) if place in wanted)

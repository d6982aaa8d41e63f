"""The search for the smallest part of a model that a backend compiles to something else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ExportyardError, first_line
from pipeline.explain.cut_graph import ONNX as GRAPH
from pipeline.explain.cut_graph import GraphForm
from pipeline.explain.cut_judge import Judge, Trial, worst
from pipeline.explain.cut_program import ProgramForm
from pipeline.explain.parts import Feeds, Form, Part, Plan
from pipeline.stages.build import build
from pipeline.store import Key, Stored, make
from pipeline.types import Reporter

CUTS = 3  # places at which a part is cut before it counts as one that can't be


class Search:
    """Builds parts of one form, each once, and finds the smallest that departs.

    Attributes:
        form: what is cut.
        plan: how.
        refused: why the last part that could not be built could not be.
        stuck: whether what `smallest` returned might be smaller, if smaller parts could be built.
    """

    def __init__(
        self,
        model: Stored,
        judge: Judge,
        feeds_list: Sequence[Feeds],
        tuning: Path | None,
        folder: Path,
        report: Reporter,
    ) -> None:
        make_form = GraphForm if GRAPH in model.artifact.files else ProgramForm
        self.form: Form = make_form(model, feeds_list)
        self.plan, self.refused, self.stuck = Plan(self.form), "", False
        self._model, self._judge, self._feeds = model, judge, feeds_list
        self._tuning, self._folder, self._report = tuning, folder, report
        self._again: Trial | None = None
        self._tried: dict[tuple[int, ...], Trial | None] = {}
        self._about = 2 * math.ceil(math.log2(max(2, len(self.plan.core)))) + 1
        self._count = 0

    def again(self) -> Trial:
        """The whole, built once more from the same form."""
        if self._again is None:
            engine = self._built(self._model, "all of it")
            self._again = worst(self._judge.whole(self._model, engine, self._feeds))
        return self._again

    def _built(self, model: Stored, what: str) -> Stored:
        self._count += 1
        self._report(self._count, max(self._about, self._count), f"part {self._count} of about {self._about}: {what}")
        target, scheme, tuning = self._judge.target, self._judge.scheme, self._tuning
        key = Key("engine", {"model": model.digest}, {"count": self._count})
        place = self._folder / f"engine-{self._count}"
        return make(place, key, lambda out: build(model, target, scheme, out, tuning)).stored

    def trial(self, places: Sequence[int]) -> Trial | None:
        """The steps `places` built alone and run on the values that they should get; None where they can't be."""
        key = tuple(places)
        if key not in self._tried:
            self._tried[key] = self._made(self.plan.part(key))
        return self._tried[key]

    def departs(self, places: Sequence[int]) -> bool:
        """Whether the steps `places` depart when they are built alone."""
        found = self.trial(places)
        return found is not None and found.departs

    def _made(self, part: Part) -> Trial | None:
        if not part.makes or not part.reads:
            return None
        count = sum(self.form.steps[place].role == "core" for place in part.steps)
        pair = self._engine(part, f"{count} operator{'s' if count > 1 else ''}")
        if pair is None:
            return None
        model, engine = pair
        calls, wanted = self._asked(part, model)
        scales = {name: scale for name in part.makes if (scale := self.form.scale(name)) is not None}
        try:
            return worst(self._judge.run(part, engine, calls, wanted, scales))
        except ExportyardError as error:  # it can't be loaded, or asked for these sizes
            self.refused = first_line(error)
            return None

    def _engine(self, part: Part, what: str) -> tuple[Stored, Stored] | None:
        """The part as a model, and its engine; None where there is none, and `refused` says why."""
        try:
            model = self.form.write(part, self._folder / f"model-{self._count}")
            return model, self._built(model, what)
        except ExportyardError as error:  # a tensor that no signature has, or a part that the backend can't take
            self.refused = first_line(error)
            return None

    def _asked(self, part: Part, model: Stored) -> tuple[list[Feeds], list[Feeds]]:
        """What the part is given at each call, and what it should answer."""
        values = self.form.values([*part.reads.values(), *part.makes])
        if not model.signature().axes:
            values = values[:1]  # its sizes may be those of the first call
        calls: list[Feeds] = [{name: one[source] for name, source in part.reads.items()} for one in values]
        return calls, [{name: one[name] for name in part.makes} for one in values]

    # --- the search ------------------------------------------------------------------------------------------------

    def smallest(self, places: Sequence[int]) -> Trial | None:
        """The smallest part of `places`, which depart together, that departs; None if there is no such part."""
        known: Trial | None = None
        while len(places) > 1:
            half, group = self._cut(places)
            if group is not None:
                # before anything else is cut, it isn't said that the compiler is to blame
                if known is None and not self.again().departs:
                    return None
                return self._around(places, group) or known
            if half is None:
                self.stuck = True
                break
            places, known = half, self.trial(half)
        return known if known is not None or len(places) > 1 else self._departing(places)

    def _departing(self, places: Sequence[int]) -> Trial | None:
        found = self.trial(places)
        return found if found is not None and found.departs else None

    def _cut(self, places: Sequence[int]) -> tuple[Sequence[int] | None, int | None]:
        """The half that departs, or else where both halves were right; neither where no cut could be built."""
        for cut in self.plan.cuts(places)[:CUTS]:
            first, second = places[:cut], places[cut:]
            if self.departs(first):
                return first, None
            if self.departs(second):
                return second, None
            if self.trial(first) is not None and self.trial(second) is not None:
                return None, cut
        return None, None

    def _around(self, places: Sequence[int], cut: int) -> Trial | None:
        """The smallest group on both sides of `cut` that departs; None where not even all of them do."""
        reach = 1
        while True:
            group = places[max(0, cut - reach) : cut + reach]
            if self.departs(group):
                return self.trial(self._shrunk(group))
            if len(group) == len(places):
                return None
            reach *= 2

    def _shrunk(self, group: Sequence[int]) -> Sequence[int]:
        """`group` without what isn't needed for it to depart: at its ends, then inside."""
        for from_start in (False, True):
            step = len(group) // 2
            while step:
                shorter = group[step:] if from_start else group[:-step]
                if shorter and self.departs(shorter):
                    group, step = shorter, min(step, len(shorter) // 2)
                else:
                    step //= 2
        for place in group[1:-1]:
            fewer = [one for one in group if one != place]
            if self.departs(fewer):
                group = fewer
        return group

    def on_the_way(self, found: Trial) -> tuple[float, float]:
        """SQNRs when the model runs freely up to there: the worst of what `found` reads, and that of its output.

        All before it is built once more for that. Where it can't be, they are those of `found` alone.
        """
        assert found.part is not None
        last = max(place for place in found.part.steps if self.form.steps[place].role == "core")
        reads = {source for source in found.part.reads.values() if source not in self.form.inputs}
        part = self.plan.part([place for place in self.plan.core if place <= last], [*reads, found.output])
        alone = math.inf, found.own
        pair = self._engine(part, "all before it") if reads and set(part.reads) <= set(self.form.inputs) else None
        if pair is None:
            return alone
        _, engine = pair
        calls, wanted = self._asked(part, pair[0])
        return self._judge.distances(engine, calls, wanted, reads, found.output) or alone

"""Two graphs of one model compared operator by operator: an engine, and what it was built from.

Each operator of the engine is run twice: on what the engine's operators before it made (so errors add up, as in use),
and on the reference's own values. What is wrong with its output in the second run is its own doing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline import compare
from pipeline.explain import pairs, rounding, steps
from pipeline.explain.operators import Operators
from pipeline.explain.pairs import View
from pipeline.explain.steps import Numbers, Step
from pipeline.graph import reads
from pipeline.macs import FAMILY
from pipeline.types import Reporter, no_report

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass
class _Tensor:
    """A tensor of the engine for each feed: given right inputs, and in the free run (None where that failed)."""

    right: list[Array | None]
    free: list[Array | None]
    view: View | None = None
    runs: tuple[onnx.NodeProto, ...] = ()
    roots: tuple[str, ...] = ()


@dataclass
class Walk:
    """The comparison of `engine` with `reference` on some `feeds`.

    Attributes:
        numbers: what the engine's own numbers explain beyond rounding, for a form of another precision.
        skipped: operators of the engine that could not be compared on their own, as they stand for no tensor that
            the reference has.
    """

    engine: Operators
    reference: Operators
    feeds: Sequence[Feeds]
    report: Reporter = no_report
    what: str = "explain"
    numbers: Numbers | None = None
    skipped: list[str] = field(default_factory=list)
    _values: list[dict[str, Array]] = field(default_factory=list)
    _tensors: dict[str, _Tensor] = field(default_factory=dict)
    _known: dict[str, float] = field(default_factory=dict)
    _blind: set[str] = field(default_factory=set)

    def steps(self) -> Iterator[Step]:
        """Every tensor that could be compared, in the engine's order."""
        self._values = [self.reference.all(feeds) for feeds in self.feeds]
        for name in self.feeds[0]:
            given: list[Array | None] = [feeds[name] for feeds in self.feeds]
            self._tensors[name] = _Tensor(given, list(given), View(name), (), (name,))
            self._known[name] = math.inf
        nodes = self.engine.graph.model.graph.node
        left = {name: len(readers) for name, readers in self.engine.graph.readers.items()}
        yield from self._folded()
        for place, node in enumerate(nodes):
            self.report(place, len(nodes), f"{self.what} {node.name}")
            yield from self._step(node)
            for name in dict.fromkeys(reads(node)):
                left[name] -= 1
                if not left[name] and name in self._tensors:
                    tensor = self._tensors[name]
                    tensor.right = tensor.free = [None] * len(self.feeds)

    def _folded(self) -> Iterator[Step]:
        """Constants of the engine that the reference computes."""
        for name in self.engine.constants:
            wanted = self._values[0].get(name)
            if wanted is None or name in self.reference.constants:
                continue
            value = self.engine.value(name)
            tensor = _Tensor([value] * len(self.feeds), [value] * len(self.feeds))
            yield self._compared(View(name), tensor, [])
            self._known[name] = math.inf

    def _step(self, node: onnx.NodeProto) -> Iterator[Step]:
        inputs = [self._tensors[name] for name in dict.fromkeys(reads(node)) if name in self._tensors]
        made = self._run(node)
        pending = [one for one in inputs if one.view is None]
        runs = (*{one.name: one for tensor in pending for one in tensor.runs}.values(), node)
        roots = tuple(dict.fromkeys(root for one in inputs for root in one.roots))
        views = [one.view for one in inputs if one.view is not None]
        for name, tensor in made.items():
            tensor.runs, tensor.roots = runs, roots
            self._tensors[name] = tensor
            for step in self._matched(node, name, tensor, inputs, views):
                tensor.view, tensor.runs, tensor.roots = step.view, (), (step.view.name,)
                tensor.right = [
                    steps.held(step.view.of(values[step.view.name]), one)
                    for values, one in zip(self._values, tensor.right, strict=True)
                ]
                if any(steps.beyond(values[step.view.name], tensor.right) for values in self._values):
                    self._blind.add(step.view.name)
                self._known[step.view.name] = min(step.after, self._known.get(step.view.name, math.inf))
                yield step
            if tensor.view is None and inputs:
                self.skipped.append(node.name)

    def _run(self, node: onnx.NodeProto) -> dict[str, _Tensor]:
        names = [name for name in dict.fromkeys(reads(node)) if name in self._tensors]
        made = {name: _Tensor([], []) for name in node.output if name}
        for place in range(len(self.feeds)):
            right = self._made(node, {name: self._tensors[name].right[place] for name in names})
            free = self._made(node, {name: self._tensors[name].free[place] for name in names})
            for name, tensor in made.items():
                tensor.right.append(right.get(name))
                tensor.free.append(free.get(name))
        return made

    def _made(self, node: onnx.NodeProto, inputs: Mapping[str, Array | None]) -> Mapping[str, Array]:
        given = {name: one for name, one in inputs.items() if one is not None}
        if len(given) < len(inputs):
            return {}
        try:
            return self.engine.run(node, given)
        except Exception:  # a fault before it, or its own: shapes that don't fit; that is a result
            return {}

    # --- which tensor it is ------------------------------------------------------------------------------------

    def _matched(
        self, node: onnx.NodeProto, name: str, tensor: _Tensor, inputs: Sequence[_Tensor], views: Sequence[View]
    ) -> Iterator[Step]:
        """The one step that ends with the tensor, or none if nobody can say what it is."""
        same = self.numbers.view(name) if self.numbers is not None else View(name)
        if same is not None and same.name in self._values[0]:
            yield self._compared(same, tensor, views)
            return
        if self.numbers is not None:  # a form keeps names, and its numbers are too coarse to tell tensors apart
            return
        if len(inputs) == 1 and len(views) == 1:
            laid = pairs.relaid(node, views[0])
            if laid is not None:
                yield self._compared(laid, tensor, views)
                return
        yield from self._by_numbers(node, tensor, views)

    def _by_numbers(self, node: onnx.NodeProto, tensor: _Tensor, views: Sequence[View]) -> Iterator[Step]:
        products = sum(run.op_type in FAMILY for run in tensor.runs)
        whole = any(FAMILY.get(run.op_type) == "Attention" for run in tensor.runs)
        names = list(pairs.ahead(self.reference.graph, tensor.roots, self._known, None if whole else products))
        found = self._scored(names, node, tensor, views)
        if found:
            best = self._compared(found[0][1], tensor, views)
            if not best.departs:
                yield best
                return
        names = [view.name for _, view in found]
        alone = all(run.name == node.name or not set(run.input) & set(self._tensors) for run in tensor.runs)
        guesses = set(pairs.guesses(node, names, self.reference.graph, self._known, alone=alone))
        likely = [view for _, view in found if view.name in guesses]
        sharing = [view for view in likely if self._shares(node, view)]
        if likely:
            yield self._compared((sharing or likely)[0], tensor, views)

    def _shares(self, node: onnx.NodeProto, view: View) -> bool:
        nodes, _ = pairs.cone(self.reference.graph, view.name, self._known)
        own = {name for name in node.input if name in self.engine.constants}
        return any(not own.isdisjoint(reads(one)) for one in nodes)

    def _scored(
        self, names: Iterable[str], node: onnx.NodeProto, tensor: _Tensor, views: Sequence[View]
    ) -> list[tuple[float, View]]:
        """What of `names` has the tensor's shape in some layout and its kind of numbers; the closest first."""
        found: list[tuple[float, View]] = []
        for name in names:
            if name in self._known:
                continue
            for layout in pairs.layouts(node, views):
                score = self._score(View(name, layout), tensor)
                if score is not None:
                    found.append((score, View(name, layout)))
        return sorted(found, key=lambda pair: -pair[0])

    def _score(self, view: View, tensor: _Tensor) -> float | None:
        worst = math.inf
        for values, made in zip(self._values, tensor.right, strict=True):
            wanted = values.get(view.name)
            if wanted is None or made is None or steps.kind(wanted) != steps.kind(made):
                return None
            back = view.back(made, wanted)
            if back is None:
                return None
            worst = min(worst, compare.distance(view.name, wanted, back).sqnr_db)
        return worst

    # --- how far it is -----------------------------------------------------------------------------------------

    def _compared(self, view: View, tensor: _Tensor, views: Sequence[View]) -> Step:
        nodes, used = pairs.cone(self.reference.graph, view.name, self._known)
        if view.name in self._known:  # only laid out anew
            nodes, used = [], [view.name]
        each = [self._at(place, view, tensor, nodes) for place in range(len(self.feeds))]
        place = min(range(len(each)), key=lambda at: steps.margin(each[at][0], each[at][1]))
        own, allowed, edges, count, made, wanted = each[place]
        read = {one.name for one in views} | set(tensor.roots)
        return Step(
            view=view,
            runs=tensor.runs,
            nodes=tuple(nodes),
            unread=tuple(name for name in used if not self._reads(read, name)),
            before=min((self._known[name] for name in used), default=math.inf),
            after=min(
                steps.distance(view, values[view.name], free)
                for values, free in zip(self._values, tensor.free, strict=True)
            ),
            own=own,
            allowed=allowed,
            edges=edges,
            summands=count,
            made=made,
            wanted=wanted,
            inputs={name: self._values[place][name] for name in used},
            blind=bool(self._blind & read),
        )

    def _reads(self, read: set[str], name: str) -> bool:
        """Whether `name` of the reference is read, as such or in another form."""
        return name in read or set(pairs.cone(self.reference.graph, name, read)[1]) <= read

    def _at(
        self, place: int, view: View, tensor: _Tensor, nodes: Sequence[onnx.NodeProto]
    ) -> tuple[float, float, int | None, int, Array | None, Array]:
        wanted, made = self._values[place][view.name], tensor.right[place]
        back = None if made is None else view.back(made, wanted)
        own = steps.distance(view, wanted, made)
        wanted, back = steps.without_fill(wanted, back)
        if own == math.inf:
            return own, own, None, 1, back, wanted
        narrow = max((rounding.unit(one.dtype) for one in self._numbers(place, tensor)), default=0.0)
        given = self._given(place, tensor)
        wide, count = self._rounding(place, nodes, given, narrow)
        off = wide.get(view.name)
        if not nodes and off is None and (view.factor is not None or narrow > rounding.unit(wanted.dtype)):
            off = (narrow if view.factor is None else rounding.BOTH * narrow) * np.abs(wanted)
        if steps.kind(wanted) == "float":
            noise = 0.0 if off is None else off if not nodes else rounding.BOTH * off
            return own, compare.distance(view.name, wanted, wanted + noise).sqnr_db, None, count, back, wanted
        edges = 0 if off is None else int(np.count_nonzero(off))
        # one step at each value on an edge
        moved = np.zeros(wanted.shape) if off is None else off
        return own, compare.distance(view.name, wanted, wanted + moved).sqnr_db, edges, count, back, wanted

    def _numbers(self, place: int, tensor: _Tensor) -> list[Array]:
        """In what the engine's operators compute: what they make, what they read, and their constants."""
        names = [name for run in tensor.runs for name in run.input]
        read = [
            self._tensors[name].right[place] if name in self._tensors else self.engine.value(name) for name in names
        ]
        return [one for one in (tensor.right[place], *read) if one is not None]

    def _given(self, place: int, tensor: _Tensor) -> dict[str, Array]:
        if self.numbers is None:
            return {}
        return self.numbers.wide(tensor.runs, self._values[place])

    def _rounding(
        self, place: int, nodes: Sequence[onnx.NodeProto], given: Mapping[str, Array], narrow: float
    ) -> tuple[dict[str, Array], int]:
        """How far each tensor that `nodes` make may be off by rounding alone, and how many numbers they add up."""
        wide: dict[str, Array] = dict(given)
        count = 1
        values = self._values[place]
        for node in nodes:
            inputs = {name: self._value(values, name) for name in reads(node)}
            off = rounding.amplitudes(self.reference, node, inputs, wide, narrow)
            wide |= {name: one for name, one in off.items() if one.any()}
            made = {name: values[name] for name in node.output if name}
            count = max(count, rounding.summands(node, inputs, made))
        return wide, count

    def _value(self, values: Mapping[str, Array], name: str) -> Array:
        found = values[name] if name in values else self.reference.value(name)
        assert found is not None, name
        return found

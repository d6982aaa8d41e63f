"""Two graphs of one model compared operator by operator: an engine, and what it was built from.

Each operator of the engine is run twice: on what the engine's operators before it made (so errors add up, as in use),
and on the reference's own values. What is wrong with its output in the second run is its own doing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline import compare, explain_rounding
from pipeline import explain_pairs as pairs
from pipeline.explain_operators import Operators
from pipeline.explain_pairs import View
from pipeline.graph import reads
from pipeline.macs import FAMILY
from pipeline.types import Reporter, no_report

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Step:
    """One tensor that both graphs have, and the operators of each that make it out of such tensors before.

    Attributes:
        view: which tensor of the reference it is.
        runs: the engine's operators; empty for a constant that the engine was built with.
        nodes: the reference's nodes.
        unread: tensors that the reference's nodes read and the engine's operators don't.
        before: worst SQNR (dB) of what is read, in the free run.
        after: SQNR of the tensor, likewise.
        own: SQNR of the tensor, given the reference's inputs.
        allowed: the least `own` that rounding explains.
        edges: how many integers may fall on either side; None for floats.
        summands: most numbers that one of `nodes` adds up.
        made: the tensor as the engine makes it of the reference's inputs, in the reference's layout.
        wanted: the reference's.
        inputs: of `nodes`, what the reference has, constants left out; for the feed that is judged.
        blind: the engine's numbers can't hold what is read, so that nothing can be said of what is made of it.
    """

    view: View
    runs: tuple[onnx.NodeProto, ...]
    nodes: tuple[onnx.NodeProto, ...]
    unread: tuple[str, ...]
    before: float
    after: float
    own: float
    allowed: float
    edges: int | None
    summands: int
    made: Array | None
    wanted: Array
    inputs: Mapping[str, Array]
    blind: bool = False

    @property
    def departs(self) -> bool:
        """Whether more is wrong than rounding explains."""
        return not self.blind and not self.own >= self.allowed


@dataclass
class _Tensor:
    """A tensor of the engine for each feed: given right inputs, and in the free run (None where that failed)."""

    right: list[Array | None]
    free: list[Array | None]
    view: View | None = None
    runs: tuple[onnx.NodeProto, ...] = ()
    roots: tuple[str, ...] = ()


class Numbers(Protocol):
    """Names and precision of a form whose reference is in other numbers."""

    def view(self, name: str) -> View | None:
        """The tensor of the reference that `name` is; None if it is none."""
        ...

    def wide(self, runs: Sequence[onnx.NodeProto], values: Mapping[str, Array]) -> dict[str, Array]:
        """How far off each tensor and constant of the reference may be that the form's operators `runs` read.

        Args:
            runs: operators of the form.
            values: of the reference.
        """
        ...


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
                    _cast(step.view.of(values[step.view.name]), one)
                    for values, one in zip(self._values, tensor.right, strict=True)
                ]
                if any(_beyond(values[step.view.name], tensor.right) for values in self._values):
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
            if wanted is None or made is None or _kind(wanted) != _kind(made):
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
        place = min(range(len(each)), key=lambda at: _margin(each[at][0], each[at][1]))
        own, allowed, edges, count, made, wanted = each[place]
        read = {one.name for one in views} | set(tensor.roots)
        return Step(
            view=view,
            runs=tensor.runs,
            nodes=tuple(nodes),
            unread=tuple(name for name in used if not self._reads(read, name)),
            before=min((self._known[name] for name in used), default=math.inf),
            after=min(
                _distance(view, values[view.name], free) for values, free in zip(self._values, tensor.free, strict=True)
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
        own = _distance(view, wanted, made)
        wanted, back = _without_fill(wanted, back)
        if own == math.inf:
            return own, own, None, 1, back, wanted
        narrow = max((explain_rounding.unit(one.dtype) for one in self._numbers(place, tensor)), default=0.0)
        given = self._given(place, tensor)
        wide, count = self._rounding(place, nodes, given, narrow)
        off = wide.get(view.name)
        if not nodes and off is None and (view.factor is not None or narrow > explain_rounding.unit(wanted.dtype)):
            off = (narrow if view.factor is None else explain_rounding.BOTH * narrow) * np.abs(wanted)
        if _kind(wanted) == "float":
            noise = 0.0 if off is None else off if not nodes else explain_rounding.BOTH * off
            return own, compare.distance(view.name, wanted, wanted + noise).sqnr_db, None, count, back, wanted
        edges = 0 if off is None else int(np.count_nonzero(off))
        # one step at each value on an edge
        steps = np.zeros(wanted.shape) if off is None else off
        return own, compare.distance(view.name, wanted, wanted + steps).sqnr_db, edges, count, back, wanted

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
            off = explain_rounding.amplitudes(self.reference, node, inputs, wide, narrow)
            wide |= {name: one for name, one in off.items() if one.any()}
            made = {name: values[name] for name in node.output if name}
            count = max(count, explain_rounding.summands(node, inputs, made))
        return wide, count

    def _value(self, values: Mapping[str, Array], name: str) -> Array:
        found = values[name] if name in values else self.reference.value(name)
        assert found is not None, name
        return found


def _margin(own: float, allowed: float) -> float:
    if own == math.inf:
        return math.inf
    return own - allowed if math.isfinite(own - allowed) else -math.inf


def _without_fill(wanted: Array, made: Array | None) -> tuple[Array, Array | None]:
    """Both without the numbers that stand for minus infinity in masks, where they agree; beside them nothing counts.

    These are of at least half the largest magnitude that a dtype holds.
    """
    if made is None or _kind(wanted) != "float" or _kind(made) != "float":
        return wanted, made
    ends = [float(np.finfo(one.dtype).max) / 2 for one in (wanted, made)]
    fill = (np.abs(wanted) >= ends[0]) & (np.abs(made) >= ends[1]) & (np.sign(wanted) == np.sign(made))
    return (np.where(fill, 0, wanted), np.where(fill, 0, made)) if fill.any() else (wanted, made)


def _distance(view: View, wanted: Array, made: Array | None) -> float:
    back = None if made is None else view.back(made, wanted)
    wanted, back = _without_fill(wanted, back)
    return -math.inf if back is None else compare.distance(view.name, wanted, back).sqnr_db


def _kind(value: Array) -> str:
    return "float" if np.issubdtype(value.dtype, np.floating) else "whole"


def _beyond(value: Array, made: Sequence[Array | None]) -> bool:
    """Whether `value` of the reference is too large for the numbers of what was `made` for it."""
    kinds = {one.dtype for one in made if one is not None and _kind(one) == "float"}
    if _kind(value) != "float" or not kinds:
        return False
    known = np.abs(value[np.isfinite(value)])
    largest = known[known < float(np.finfo(value.dtype).max) / 2].max(initial=0)
    return any(largest > np.finfo(kind).max for kind in kinds)


def _cast(value: Array, like: Array | None) -> Array:
    if like is None or like.dtype == value.dtype:
        return value
    if _kind(like) == "float" and _kind(value) == "float":
        end = float(np.finfo(like.dtype).max)
        value = np.where(np.isfinite(value), np.clip(value, -end, end), value)
    return pairs.resigned(value, like.dtype).astype(like.dtype)

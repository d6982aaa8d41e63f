"""Which part of the user's model an engine's operator runs: a node of the form, its PyTorch module, its source line.

Runtimes fuse, rename and insert operators. What is told here is what names say: of the operator, of the tensors that it
makes, of the weights that it reads; and where those are silent, that it comes right after an operator that is known. An
operator that none of this finds (a change of layout, as a rule) stays without a module: a guess is worth nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from pipeline.graph import Graph, reads
from pipeline.macs import FAMILY
from pipeline.origin import SCOPES, line_of, module_of
from pipeline.types import OperatorTime, ProfileRow

_HANDS_ON = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity"})
_SUFFIX = re.compile(r"_nchwc$|_token_\d+$")  # what ONNX Runtime adds to the name of what it makes anew
# what runtimes put before the name of an operator that they run in another layout, in integers or with others
_PREFIXES = ("Nhwc", "QLinear", "Fused", "Quick", "Skip", "Dynamic")


def attributed(found: Sequence[OperatorTime], ms: Mapping[str, float], form: Path | None) -> list[ProfileRow]:
    """A row for each operator, in the same order.

    Args:
        found: what was profiled.
        ms: what each takes of one call, by its name.
        form: the ONNX graph that the engine was built from; None leaves all operators without a module.
    """
    seeker = _Seeker(Graph(onnx.load(form, load_external_data=False))) if form is not None else None
    rows = []
    for operator in found:
        node = seeker.node_of(operator) if seeker is not None else None
        rows.append(
            ProfileRow(
                operator=operator.kind,
                name=operator.name,
                node=node.name if node is not None else "",
                module=module_of(node) if node is not None else "",
                line=line_of(node) if node is not None else "",
                ms=ms[operator.name],
            )
        )
    return rows


class _Seeker:
    """Finds the node of a form for which an operator stands; operators must come in the order they run in."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.model.graph.node}
        self.claimed: set[str] = set()
        self.made_by: dict[
            str, onnx.NodeProto
        ] = {}  # by a tensor of the engine, the node of the operator that makes it

    def node_of(self, operator: OperatorTime) -> onnx.NodeProto | None:
        """The node, or what makes the tensor that it hands on; None where names don't tell."""
        found = next(
            (node for seek in (self._told, self._by_results, self._by_weights, self._after) for node in seek(operator)),
            None,
        )
        if found is not None:
            self.claimed.add(found.name)
            for name in operator.makes:
                self.made_by[name] = found
            found = self._of_a_module(found)
        return found

    def _told(self, operator: OperatorTime) -> Iterator[onnx.NodeProto]:
        """By the names that the runtime gives, those that do the work first."""
        names = (*operator.stands_for, operator.name)
        known = [self.nodes[name] for name in names if name in self.nodes]
        known += [self.graph.makers[name] for name in names if name in self.graph.makers]
        yield from sorted(known, key=_rank)

    def _by_results(self, operator: OperatorTime) -> Iterator[onnx.NodeProto]:
        """By the tensor made; of a fused operator that is the last one's, and the work was done before it."""
        for name in (*operator.makes, _SUFFIX.sub("", operator.name)):
            last = self.graph.makers.get(name, self.nodes.get(name))
            if last is None:
                continue
            before = [last, *self._before(last, set(operator.reads))]
            yield from (node for node in before if node.op_type in FAMILY and operator.kind in FAMILY)
            yield from (node for node in before if node.op_type == _plain(operator.kind))
            yield last

    def _before(self, last: onnx.NodeProto, stops: set[str]) -> Iterator[onnx.NodeProto]:
        """Nodes that `last` comes after, one after the other, up to one that an operator stands for already."""
        seen, waiting = set(stops), list(reads(last))
        while waiting:
            name = waiting.pop(0)
            maker = self.graph.makers.get(name)
            if maker is None or name in seen or maker.name in self.claimed:
                continue
            seen.add(name)
            yield maker
            waiting += reads(maker)

    def _by_weights(self, operator: OperatorTime) -> Iterator[onnx.NodeProto]:
        """The only node that reads one of its weights."""
        for name in operator.reads:
            if self.graph.constant(name) is None:
                continue
            users = list(self._users(name))
            if len(users) == 1:
                yield users[0]

    def _users(self, name: str) -> Iterator[onnx.NodeProto]:
        for reader in self.graph.readers.get(name, []):
            if reader.op_type in _HANDS_ON:
                yield from self._users(reader.output[0])
            else:
                yield reader

    def _after(self, operator: OperatorTime) -> Iterator[onnx.NodeProto]:
        """The next node of the same kind after that of an operator whose tensor it reads, if there is only one."""
        for name in operator.reads:
            if name in self.made_by:
                ahead = list(self._ahead(self.made_by[name], _plain(operator.kind)))
                if len(ahead) == 1:
                    yield ahead[0]

    def _ahead(self, start: onnx.NodeProto, kind: str) -> Iterator[onnx.NodeProto]:
        waiting, seen = list(start.output), set()
        while waiting:
            name = waiting.pop()
            for reader in self.graph.readers.get(name, []):
                if reader.name in seen or reader.name in self.claimed:
                    continue
                seen.add(reader.name)
                if reader.op_type == kind:
                    yield reader
                elif reader.op_type not in FAMILY:
                    waiting += reader.output

    def _of_a_module(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """`node`, or what makes the tensor that it only writes in other numbers; None if that is of no module."""
        while not any(entry.key == SCOPES for entry in node.metadata_props):
            if node.op_type not in _HANDS_ON or node.input[0] not in self.graph.makers:
                return None
            node = self.graph.makers[node.input[0]]
        return node


def _rank(node: onnx.NodeProto) -> int:
    """Of several nodes in one operator: what multiplies, then anything else, then what only writes other numbers."""
    return 0 if node.op_type in FAMILY else 2 if node.op_type in _HANDS_ON else 1


def _plain(kind: str) -> str:
    """``MaxPool`` for ``NhwcMaxPool``."""
    for prefix in _PREFIXES:
        kind = kind.removeprefix(prefix)
    return kind

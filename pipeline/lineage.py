"""Which operator of an optimised graph stands for which nodes of the graph that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from pipeline.graph import Graph, reads
from pipeline.macs import FAMILY, UnclearError


def pairs(
    made: Graph, asked: Graph, nodes: Sequence[onnx.NodeProto], runs_in: Mapping[str, str]
) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """(operator that runs, node that it stands for) for each node that multiplies; in the order they run in.

    Names decide where the runtime kept some: of the tensor made, of the node, of a weight. What is left after that is
    paired only if all that is left of one family runs alike, so that it doesn't matter which is which.

    Args:
        made: the optimised graph.
        asked: the graph that it came from.
        nodes: those of `asked` that multiply.
        runs_in: for each operator of `made` that multiplies, by name, in what numbers.

    Raises:
        UnclearError: an operator or node remains whose partner could be one or another.
    """
    match = _Match(made, asked, nodes)
    left = [node for node in made.model.graph.node if node.op_type in FAMILY]
    for search in (match.by_result, match.by_constants):
        left = [runs for runs in left if not match.claim(runs, search(runs))]
    for runs, node in match.by_elimination(left, runs_in):
        match.claim(runs, [node])
    order = {runs.name: place for place, runs in enumerate(made.model.graph.node)}
    found = [(match.claimed[node.name], node) for node in nodes]
    return sorted(found, key=lambda pair: order[pair[0].name])


@dataclass
class _Match:
    """What is known so far: by the name of a node of `asked`, the operator that stands for it."""

    made: Graph
    asked: Graph
    nodes: Sequence[onnx.NodeProto]
    claimed: dict[str, onnx.NodeProto] = field(default_factory=dict)

    def claim(self, runs: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> bool:
        """Note that `runs` stands for `nodes`; False if there are none."""
        for node in nodes:
            self.claimed[node.name] = runs
        return bool(nodes)

    def by_result(self, runs: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The nodes that make what `runs` makes, if that has a known name; operators must come in order."""
        name = self._known_name(runs)
        if name is None:
            return []
        family = FAMILY[runs.op_type]
        found = list(self._before(name, set(runs.input), through=family == "Attention"))
        if family == "Attention":
            return found
        alike = [node for node in found if FAMILY[node.op_type] == family]
        return alike if len(alike) == 1 else []

    def _known_name(self, runs: onnx.NodeProto) -> str | None:
        """A tensor of the graph that `runs` makes: by the tensor's name, or by the node's, which tensors get, too."""
        nodes = {node.name: node for node in self.nodes}
        for name in (*runs.output, runs.name):
            if name in self.asked.makers:
                return str(name)
            if name in nodes:
                return str(nodes[name].output[0])
        return None

    def _before(self, name: str, stops: set[str], *, through: bool) -> Iterator[onnx.NodeProto]:
        """Unclaimed nodes that `name` is made by; with `through`, also those before them."""
        live = {node.name for node in self.nodes}
        seen, waiting = set(stops), [name]
        while waiting:
            current = waiting.pop()
            maker = self.asked.makers.get(current)
            if current in seen or maker is None:
                continue
            seen.add(current)
            if maker.name in live:
                if maker.name in self.claimed:
                    continue
                yield maker
                if not through:
                    continue
            waiting.extend(reads(maker))

    def by_constants(self, runs: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The one node that has a weight or bias of `runs`."""
        own = {name for name in runs.input if self.made.constant(name) is not None}
        found = [
            node
            for node in self.nodes
            if node.name not in self.claimed
            and FAMILY[node.op_type] == FAMILY[runs.op_type]
            and not own.isdisjoint(self._constants(node))
        ]
        return found if len(found) == 1 else []

    def _constants(self, node: onnx.NodeProto) -> set[str]:
        """Names of the weight and bias of `node`; not of scales, which others share."""
        found = set()
        for name in node.input[1:]:
            maker = self.asked.makers.get(name)
            first = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name
            if self.asked.constant(first) is not None:
                found.add(first)
        return found

    def by_elimination(
        self, remaining: Sequence[onnx.NodeProto], kinds: Mapping[str, str]
    ) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """What remains, where it makes no difference which is which."""
        left = [node for node in self.nodes if node.name not in self.claimed]
        for family in sorted({FAMILY[node.op_type] for node in (*left, *remaining)}):
            runs = [node for node in remaining if FAMILY[node.op_type] == family]
            nodes = [node for node in left if FAMILY[node.op_type] == family]
            alike = len({(node.op_type, kinds[node.name]) for node in runs}) <= 1
            if len(runs) != len(nodes) or not alike:
                name = (nodes or runs)[0].name
                raise UnclearError(
                    f"it isn't clear which of {len(runs)} operators of the engine stands for which of {len(nodes)} "
                    f"nodes of the graph, `{name}` among them"
                )
            yield from zip(runs, nodes, strict=True)

"""From a program to ExecuTorch's file: what XNNPACK can take goes to it, the rest to ExecuTorch's portable kernels."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue

from pipeline import program as programs
from pipeline import retrace
from pipeline.errors import BuildError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.types import Signature


@contextlib.contextmanager
def sizes_stay_open() -> Iterator[None]:
    """Inside, torch asks no questions about sizes when it traces a convolution.

    Which of its own kernels it would take depends on whether the batch is 16 or more, and the answer becomes a bound
    of the batch, although none of these kernels is in the engine.
    """
    nnpack: Any = torch.backends.nnpack
    with torch.backends.mkldnn.flags(enabled=False), nnpack.flags(enabled=False):
        yield


def lowered(program: ExportedProgram, signature: Signature) -> Any:
    """The program in ExecuTorch's own form; it is consumed. Nothing of what many libraries print on the way gets out.

    Raises:
        BuildError: it would serve smaller sizes than the signature promises.
        Exception: whatever ExecuTorch's passes meet.
    """
    module = program.module(check_guards=False)
    with programs.quiet():
        made = _lowered(program)
    if _narrowed(made, signature) is None:
        return made
    # a size at which it was traced equals some constant of the model, and was taken for that; the largest may not
    again = retrace.retraced(module, signature, {name: axis.max for name, axis in signature.axes.items()})
    with programs.quiet():
        made = _lowered(again)
    fault = _narrowed(made, signature)
    if fault is not None:
        raise BuildError(fault, hint="narrow the axis in recipe.toml, or give the row `buckets`")
    return made


def _lowered(program: ExportedProgram) -> Any:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import UnsqueezeCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # XNNPACK's reshape takes one dynamic dimension, but its partitioner checks that for `view` only
    class Unsqueeze(UnsqueezeCopyConfig):  # type: ignore[misc,unused-ignore]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            return _open_dimensions(node) <= 1 and bool(super().check_constraints(node, ep))

    class Convolution(ConvolutionConfig):  # type: ignore[misc,unused-ignore]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            one_dimensional = len(node.meta["val"].shape) == 3  # is reshaped into two
            if one_dimensional and _open_dimensions(node) > 1:
                return False
            return bool(super().check_constraints(node, ep))

    ours = {UnsqueezeCopyConfig: Unsqueeze, ConvolutionConfig: Convolution}
    configs = [ours.get(one, one) for one in ALL_PARTITIONER_CONFIGS]
    with sizes_stay_open():
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=configs)])
        return edge.to_executorch()


def _open_dimensions(node: Any) -> int:
    return sum(not isinstance(size, int) for size in node.meta["val"].shape)


def planned_bytes(engine: Any) -> int:
    """Memory that a runtime sets aside for activations, all axes at their largest sizes."""
    (plan,) = engine.executorch_program.execution_plan
    return sum(plan.non_const_buffer_sizes)


def kernels(engine: Any) -> dict[str, JsonValue]:
    """How many calls of each portable kernel the engine makes; a device's runtime must be built with these."""
    calls: Counter[str] = Counter()
    for node in engine.exported_program().graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            calls[str(node.target)] += 1
    return {name: calls[name] for name in sorted(calls)}


def delegates(engine: Any) -> int:
    """How many parts of the graph XNNPACK runs."""
    return sum(
        node.op == "call_function" and getattr(node.target, "__name__", "") == "executorch_call_delegate"
        for node in engine.exported_program().graph.nodes
    )


def _narrowed(engine: Any, signature: Signature) -> str | None:
    """Which input the engine plans for at smaller sizes than the signature promises, or None."""
    for spec, sizes in zip(signature.inputs, _planned(engine), strict=True):
        for dim, size in zip(spec.shape, sizes, strict=True):
            wanted = dim if isinstance(dim, int) else signature.axes[dim].max
            if size < wanted:
                return (
                    f"ExecuTorch narrows axis `{dim}` of input `{spec.name}` to at most {size}; the recipe asks for"
                    f" {wanted}"
                )
    return None


def _planned(engine: Any) -> list[list[int]]:
    """Largest sizes of each user input."""
    graph = engine.exported_program()
    names = graph.graph_signature.user_inputs
    found: Mapping[str, Any] = {node.name: node.meta["spec"] for node in graph.graph.find_nodes(op="placeholder")}
    return [list(found[name].shape) for name in names]

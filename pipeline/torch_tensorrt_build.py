"""Calls of Torch-TensorRT, and nothing else; their names and keywords are checked against its wheel (tests/apis)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch_tensorrt
from torch.export.passes import move_to_device_pass

from pipeline import tensorrt_plan as plan
from pipeline.tensorrt_plan import Profile, Settings

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.backends.torch_tensorrt import Settings as Own
    from pipeline.types import Signature

MIB = 1 << 20


def build(
    program: ExportedProgram, signature: Signature, ranges: Sequence[Profile], own: Own, shared: Settings, path: Path
) -> list[str]:
    """Compile `program` and save it at `path`; returns what it left to PyTorch."""
    program = move_to_device_pass(program, "cuda")
    inputs = _inputs(signature, ranges)
    if own.format == "engine":
        path.write_bytes(
            torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=inputs,
                disable_tf32=not shared.tf32,
                workspace_size=shared.workspace_mb * MIB,
                version_compatible=shared.version_compatible,
                optimization_level=shared.level,
                hardware_compatible=shared.hardware == "ampere_plus",
                require_full_compilation=True,
            )
        )
        return []
    compiled = torch_tensorrt.dynamo.compile(
        program,
        arg_inputs=inputs,
        disable_tf32=not shared.tf32,
        workspace_size=shared.workspace_mb * MIB,
        version_compatible=shared.version_compatible,
        optimization_level=shared.level,
        hardware_compatible=shared.hardware == "ampere_plus",
        require_full_compilation=own.whole,
        min_block_size=own.min_block,
    )
    kind = {"program": "exported_program", "aoti": "aot_inductor"}[own.format]
    torch_tensorrt.save(compiled, str(path), output_format=kind, arg_inputs=inputs, retrace=True)
    return plan.fallen_back(compiled)


def _inputs(signature: Signature, ranges: Sequence[Profile]) -> list[torch_tensorrt.Input]:
    """Input descriptions in the signature's order; dimensions that share an axis share a name."""
    found = []
    for spec in signature.inputs:
        dtype = getattr(torch, spec.dtype)
        one = ranges[0].get(spec.name) if ranges else None
        if one is None:
            found.append(torch_tensorrt.Input(shape=spec.shape, dtype=dtype, name=spec.name))
            continue
        axes = {
            index: dim
            for index, dim in enumerate(spec.shape)
            if isinstance(dim, str) and one.min[index] < one.max[index]
        }
        found.append(
            torch_tensorrt.Input(
                min_shape=one.min,
                opt_shape=one.opt,
                max_shape=one.max,
                dtype=dtype,
                name=spec.name,
                shared_dims=axes,
            )
        )
    return found


def loaded(path: Path, own: Own) -> Callable[..., Any]:
    """What `build` saved, as a function of tensors on the GPU."""
    if own.format == "aoti":
        package: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
        return package
    module: Callable[..., Any] = torch_tensorrt.load(str(path)).module(check_guards=False)
    return module


@contextlib.contextmanager
def graphs(module: Callable[..., Any], wanted: bool) -> Iterator[Callable[..., Any]]:
    """`module`, its calls recorded as CUDA graphs if `wanted`."""
    if not wanted:
        yield module
        return
    with torch_tensorrt.runtime.enable_cudagraphs(module) as fast:
        yield fast


def as_tuple(call: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """`call`, whose one output may come without a tuple around it."""

    def run(*arguments: torch.Tensor) -> tuple[Any, ...]:
        found = call(*arguments)
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)

    return run

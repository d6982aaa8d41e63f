"""A model with dynamic axes as the same model of fixed sizes: an ONNX graph, or a program that is traced again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from pipeline import buckets
from pipeline.errors import BuildError, first_line
from pipeline.store import Key, Stored, make, write_json
from pipeline.types import Signature, Sizes

ONNX, WEIGHTS, PROGRAM, SIGNATURE = "model.onnx", "model.onnx.data", "program.pt2", "signature.json"


def fixed(model: Stored, source: Literal["onnx", "program"], sizes: Sizes, folder: Path) -> Stored:
    """`model` with its axes fixed at `sizes`, as an artifact in `folder`, whose signature has numbers only.

    Raises:
        BuildError: an output has a size that the axes don't decide, or the program can't be traced at these sizes.
    """
    signature = buckets.at(model.signature(), sizes)

    def work(out: Path) -> Mapping[str, JsonValue]:
        if source == "program":
            _program(model, signature, out)
        else:
            _onnx(model, signature, out)
        write_json(out / SIGNATURE, signature.plain())
        return model.artifact.facts

    config: dict[str, JsonValue] = {"sizes": dict(sizes)}
    return make(folder, Key(model.artifact.kind, {"model": model.digest}, config), work).stored


def _onnx(model: Stored, signature: Signature, out: Path) -> None:
    """The graph with other shapes of its inputs and outputs; those of what is between are inferred anew."""
    import onnx

    read = onnx.load(model.file(ONNX), load_external_data=False)  # large weights stay beside it
    shapes = {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
    for value in (*read.graph.input, *read.graph.output):
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    del read.graph.value_info[:]
    onnx.save(onnx.shape_inference.infer_shapes(read, data_prop=True), out / ONNX)
    if WEIGHTS in model.artifact.files:
        shutil.copyfile(model.file(WEIGHTS), out / WEIGHTS)


def _program(model: Stored, signature: Signature, out: Path) -> None:
    """The program traced again with inputs of fixed sizes; its nodes keep what they say about the user's modules."""
    import torch

    from pipeline import program as programs

    dynamic = programs.load(model.file(PROGRAM))
    inputs = tuple(
        torch.zeros(buckets.shape_at(spec, {}), dtype=programs.DTYPES[spec.dtype]) for spec in signature.inputs
    )
    try:
        with programs.quiet(), torch.no_grad():
            static = torch.export.export(dynamic.module(check_guards=False), inputs, strict=False)
    except Exception as error:  # whatever the tracer meets
        shapes = {spec.name: list(spec.shape) for spec in signature.inputs}
        raise BuildError(
            f"the program can't be traced with inputs {shapes}: {type(error).__name__}: {first_line(error)}",
            hint="take `buckets` out of the row, or give it other sizes",
        ) from error
    programs.save(static, out / PROGRAM, out)

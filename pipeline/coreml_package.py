"""Core ML packages: converted from a program, named as the signature says, written with the same bytes every time."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import program as programs
from pipeline.errors import BuildError
from pipeline.types import Axis, Dim, DType, Signature, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PACKAGE = "model.mlpackage"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PARTS = {
    "model.mlmodel": ("CoreML Model Specification", "com.apple.CoreML/model.mlmodel"),
    "weights": ("CoreML Model Weights", "com.apple.CoreML/weights"),
}
# Core ML has no 64-bit integers and no booleans: these arrays come in and go out in 32 bits
NARROWED: Mapping[DType, str] = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "int64": "INT32",
    "int32": "INT32",
    "int16": "INT32",
    "int8": "INT32",
    "uint8": "INT32",
    "bool": "INT32",
}


def library() -> Any:
    """Coremltools, imported in silence: it says which versions of other libraries it was not tested with."""
    with quiet():
        import coremltools
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what coremltools prints, logs or warns gets out; progress bars included."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), programs.quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def converted(program: ExportedProgram, signature: Signature, deployment: str, half: bool) -> tuple[Any, bytes]:
    """The model's description, with the signature's names, and its weights.

    Args:
        program: in fp32.
        signature: its names take the place of the program's.
        deployment: the oldest system that is to run it, such as ``iOS17``.
        half: compute in float16, as the Neural Engine does.

    Raises:
        Exception: whatever coremltools meets.
    """
    tools = library()

    def convert(rewritten: ExportedProgram) -> Any:
        return tools.convert(
            rewritten,
            minimum_deployment_target=getattr(tools.target, deployment),
            compute_precision=tools.precision.FLOAT16 if half else tools.precision.FLOAT32,
            skip_model_load=True,
        )

    _respell(program)
    with quiet():
        try:
            model = convert(program.run_decompositions({}))
        except NotImplementedError:  # it knows few operators as users write them, and more of those they consist of
            model = convert(program.run_decompositions())
        spec = model.get_spec()
        for side, wanted in (("input", signature.inputs), ("output", signature.outputs)):
            found = [one.name for one in getattr(spec.description, side)]
            if len(found) != len(wanted):
                raise BuildError(f"Core ML's model has {len(found)} {side}s, the program {len(wanted)}: {found}")
            _rename(tools, spec, dict(zip(found, (one.name for one in wanted), strict=True)), side == "input")
        file = Path(model.weights_dir) / "weight.bin"
        weights = file.read_bytes() if file.exists() else b""  # a few small ones are in the description
    del spec.description.metadata.userDefined["com.github.apple.coremltools.conversion_date"]
    return spec, weights


def _respell(program: ExportedProgram) -> None:
    """Python's operators on tensors by the names that coremltools knows; it has none for ``|`` and ``^``."""
    import torch

    aten = torch.ops.aten
    known = {"aten.__or__.Tensor": aten.logical_or.default, "aten.__xor__.Tensor": aten.logical_xor.default}
    for node in program.graph.nodes:
        if str(node.target) in known and node.meta["val"].dtype == torch.bool:
            node.target = known[str(node.target)]


def _rename(tools: Any, spec: Any, names: Mapping[str, str], inputs: bool) -> None:
    """In two steps, since a new name may be an old one of another tensor."""
    steps = {old: f"renamed_{place}" for place, old in enumerate(names)}
    for change in (steps, {steps[old]: new for old, new in names.items()}):
        for old, new in change.items():
            tools.utils.rename_feature(spec, old, new, rename_inputs=inputs, rename_outputs=not inputs)


def write(spec: Any, weights: bytes, folder: Path) -> None:
    """The package below `folder`; its identifiers come from what they name, not from chance."""
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    if weights:
        (folder / WEIGHTS).parent.mkdir()
        (folder / WEIGHTS).write_bytes(weights)
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, path)): {
            "author": "com.apple.CoreML",
            "description": text,
            "name": name,
            "path": path,
        }
        for name, (text, path) in PARTS.items()
        if weights or name != "weights"
    }
    root = next(key for key, entry in entries.items() if entry["name"] == "model.mlmodel")
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (folder / "Manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> Any:
    """The description of the model in a package.

    Raises:
        BuildError: it can't be read.
    """
    spec = library().proto.Model_pb2.Model()
    try:
        spec.ParseFromString((folder / MODEL).read_bytes())
    except Exception as error:  # protobuf's DecodeError, or the file is missing
        raise BuildError(
            f"`{folder / MODEL}` is no Core ML model: {error}", hint="`exportyard export` builds it again"
        ) from error
    return spec


def fault(spec: Any, signature: Signature, half: bool = False) -> str | None:
    """Where the model is called otherwise than the signature says, or None; in `half` precision it returns that."""
    for side, wanted in (("input", signature.inputs), ("output", signature.outputs)):
        found = getattr(spec.description, side)
        if [one.name for one in found] != [one.name for one in wanted]:
            return f"its {side}s are {[one.name for one in found]}, not {[one.name for one in wanted]}"
        for feature, tensor in zip(found, wanted, strict=True):
            narrow = half and side == "output" and tensor.dtype == "float32"
            shown = tensor.model_copy(update={"dtype": "float16"}) if narrow else tensor
            wrong = _tensor_fault(feature.type.multiArrayType, shown, signature, side == "input")
            if wrong is not None:
                return f"{side} `{tensor.name}`: {wrong}"
    return None


def _tensor_fault(array: Any, tensor: TensorSpec, signature: Signature, sized: bool) -> str | None:
    kind = array.ArrayDataType.Name(array.dataType)
    if kind != NARROWED.get(tensor.dtype):
        return f"numbers are {kind}, the signature has {tensor.dtype}"
    if not sized:  # Core ML doesn't describe shapes of outputs that may vary
        return None
    ranges = [(one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges]
    if not ranges:
        ranges = [(size, size) for size in array.shape]
    wanted = [_range(dim, signature.axes) for dim in tensor.shape] or [(1, 1)]  # it has no scalars
    return None if ranges == wanted else f"sizes are {ranges}, the signature has {wanted}"


def _range(dim: Dim, axes: Mapping[str, Axis]) -> tuple[int, int]:
    return (dim, dim) if isinstance(dim, int) else (axes[dim].min, axes[dim].max)

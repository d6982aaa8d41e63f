"""From an ONNX graph or a program to a model of OpenVINO, and what OpenVINO's errors say about it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import BuildError, StoreError
from pipeline.types import Signature, Target

if TYPE_CHECKING:
    from pipeline.store import Stored


@dataclass(frozen=True)
class Imported:
    """A model as OpenVINO has it.

    Attributes:
        model: an ``openvino.Model``.
        source: the file that it came from; a graph if its name ends with ``.onnx``.
        bfloat: the graph rounds what it multiplies to bfloat16; `model` does not, since the instructions will.
    """

    model: Any
    source: Path
    bfloat: bool = False

    @property
    def attends_to_one(self) -> bool:
        """Whether it multiplies two tensors that both depend on the inputs, and that may have a single row or column
        and others times more: an attention over an axis whose min is 1.
        """
        varying: set[str] = set()
        for node in self.model.get_ordered_ops():
            inputs = [value.get_node().get_name() in varying for value in node.input_values()]
            if node.get_type_name() == "MatMul" and all(inputs):
                sizes = [size for value in node.input_values() for size in list(value.get_partial_shape())[-2:]]
                if any(size.is_dynamic and size.min_length <= 1 for size in sizes):
                    return True
            if node.get_type_name() == "Parameter" or any(inputs):
                varying.add(node.get_name())
        return False


def runtime() -> Any:
    """The package, kept from telling its makers about it: an import alone would send an event, without being asked."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: as if it weren't installed
    import openvino

    return openvino


def imported(model: Stored, target: Target, source: Literal["onnx", "program"]) -> Imported:
    """The model, its inputs and outputs in the signature's order, with the limits of its axes.

    Raises:
        BuildError: an operator can't be converted.
    """
    found = _from_program(model, target) if source == "program" else _from_onnx(model, target)
    signature = model.signature()
    _check(found, signature, target)
    _limit(found, signature, target)
    _rename(found)
    return found


def refused(of: Imported, target: Target, what: str, error: Exception) -> BuildError:
    """OpenVINO's error in words, with the operator and the module that it is about."""
    from pipeline import origin

    said = str(error)
    if of.source.suffix == ".onnx":
        place = origin.of_error(of.source, f"{said} {said.replace('.', ' ')}")  # it says `domain.Operator`
    else:
        from pipeline import program

        place = origin.of_program_error(program.load(of.source), said)
    other = "program" if of.source.suffix == ".onnx" else "onnx"
    return BuildError(
        f"openvino can't {what} the model for `{target.name}`: {plain(error)}{place}",
        hint=f'change that part of the model, or try `import = "{other}"` in the row',
    )


def plain(error: BaseException) -> str:
    """What OpenVINO says in the end: before that come places in its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "["))]
    return f"{type(error).__name__}: {(telling or lines or ['no message'])[-1][:300]}"


# --- conversion ----------------------------------------------------------------------------------------------------


def _from_onnx(model: Stored, target: Target) -> Imported:
    path = model.file("model.onnx")
    try:
        read = runtime().Core().read_model(path)
    except Exception as error:  # everything is a RuntimeError
        raise refused(Imported(None, path), target, "import", error) from error
    _stabilise(read)
    rounds = list(_roundings(read))
    for rounded, exact in rounds:
        rounded.replace(exact)
    return Imported(read, path, bfloat=bool(rounds) or _has_bfloat(read))


def _from_program(model: Stored, target: Target) -> Imported:
    from pipeline import program

    path = model.file("program.pt2")
    try:
        loaded = program.load(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its decoder's own
            return Imported(runtime().convert_model(loaded), path)
    except StoreError:
        raise
    except Exception as error:  # its own, and whatever decoding meets
        raise refused(Imported(None, path), target, "import", error) from error


def _stabilise(model: Any) -> None:
    """Of equal values ONNX takes the first; OpenVINO's import of TopK forgets that."""
    from openvino import opset11

    for node in model.get_ordered_ops():
        if node.get_type_name() != "TopK":
            continue
        given = node.get_attributes()
        stable = opset11.topk(
            *node.input_values(), given["axis"], given["mode"], given["sort"], given["index_element_type"], stable=True
        )
        stable.set_friendly_name(node.get_friendly_name())
        for before, after in zip(node.outputs(), stable.outputs(), strict=True):
            before.replace(after)  # which takes the names, too


def _roundings(model: Any) -> Iterator[tuple[Any, Any]]:
    """(result, operand) of each pair of conversions from float32 to bfloat16 and back."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or _type(node.output(0)) != "f32":
            continue
        narrow = node.input_value(0)
        maker = narrow.get_node()
        if _type(narrow) == "bf16" and maker.get_type_name() == "Convert" and _type(maker.input_value(0)) == "f32":
            yield node.output(0), maker.input_value(0)


def _has_bfloat(model: Any) -> bool:
    return any(
        node.get_type_name() == "Constant" and _type(node.output(0)) == "bf16" for node in model.get_ordered_ops()
    )


def _type(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _check(of: Imported, signature: Signature, target: Target) -> None:
    """The order is all that a caller has, so it must be the signature's."""
    for what, ports, specs in (
        ("inputs", of.model.inputs, signature.inputs),
        ("outputs", of.model.outputs, signature.outputs),
    ):
        names = [sorted(port.get_names()) for port in ports]
        kept = len(names) == len(specs) and (
            of.source.suffix != ".onnx" or all(spec.name in own for spec, own in zip(specs, names, strict=True))
        )
        if not kept:
            raise BuildError(
                f"openvino imported the model for `{target.name}` with {what} {names}, "
                f"its signature has {[spec.name for spec in specs]}"
            )
        for spec, port in zip(specs, ports, strict=True):
            port.add_names({spec.name})  # a program's outputs have names of its own


def _limit(of: Imported, signature: Signature, target: Target) -> None:
    """Give every input the least and largest size of its axes: what a program's import forgets, and a GPU plans by."""
    dimension, shape = runtime().Dimension, runtime().PartialShape
    axes: Mapping[str, Any] = {name: dimension(axis.min, axis.max) for name, axis in signature.axes.items()}
    try:
        of.model.reshape(
            {
                place: shape([dim if isinstance(dim, int) else axes[dim] for dim in spec.shape])
                for place, spec in enumerate(signature.inputs)
            }
        )
    except Exception as error:  # a size that the model can't have
        raise refused(of, target, "shape", error) from error


def _rename(of: Imported) -> None:
    """Equal models get equal bytes: operators that have no name from the source carry a counter of the process."""
    known: set[str] = set()
    if of.source.suffix == ".onnx":
        import onnx

        graph = onnx.load(of.source, load_external_data=False).graph
        known = {node.name for node in graph.node} | {name for node in graph.node for name in node.output}
        known |= {tensor.name for tensor in graph.initializer}
    of.model.set_friendly_name("model")
    for place, node in enumerate(of.model.get_ordered_ops()):
        if node.get_friendly_name() not in known and node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}:{place}")

"""From an ONNX graph or a program to a Relax module: TVM's importers, and what they need around them."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import BuildError, StoreError
from pipeline.types import Signature, Sizes, Target

if TYPE_CHECKING:
    from pipeline.store import Stored

_importing = threading.RLock()


def plain(error: BaseException) -> str:
    """The first line of TVM's message: the rest is its own trace, or the code that it could not handle."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def imported(model: Stored, target: Target, source: Literal["onnx", "program"]) -> Any:
    """The model as a Relax module, its inputs in the signature's order.

    Raises:
        BuildError: an operator can't be imported.
    """
    module = _from_program(model, target) if source == "program" else _from_onnx(model, target)
    _check_inputs(module, model.signature(), target)
    return module


def at_sizes(module: Any, sizes: Sizes) -> Any:
    """An imported module with its dynamic axes bound to sizes."""
    from tvm import relax

    return relax.transform.BindSymbolicVars(dict(sizes))(module) if sizes else module


def activations(model: Stored) -> str | None:
    """The type of a quantised graph's activations, ``uint8`` or ``int8``; None where nothing is quantised."""
    import onnx

    graph = onnx.load(model.file("model.onnx"), load_external_data=False).graph
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    kinds = {tensor.data_type for tensor in graph.initializer if tensor.name in zeros}
    if not kinds:
        return None
    return "uint8" if onnx.TensorProto.UINT8 in kinds else "int8"


def _from_onnx(model: Stored, target: Target) -> Any:
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    from pipeline.origin import of_error
    from pipeline.tvm.onnx import importable

    path = model.file("model.onnx")
    said = io.StringIO()
    try:
        with _import_of_a_model(said):
            return from_onnx(importable(onnx.load(path)), keep_params_in_input=False)
    except Exception as error:  # converters raise whatever they meet
        # for an operator that it has but can't convert, only what it prints has the operator's name
        place = of_error(path, f"{error} {said.getvalue()}")
        raise BuildError(
            f"tvm can't import the model for `{target.name}`: {plain(error)}{place}",
            hint='change that part of the model, or try `import = "program"` in the row',
        ) from error


def _from_program(model: Stored, target: Target) -> Any:
    from tvm.relax.frontend.torch import from_exported_program

    from pipeline import program

    try:
        loaded = program.load(model.file("program.pt2"))
        with _import_of_a_model(io.StringIO()):
            return from_exported_program(loaded, keep_params_as_input=False)
    except StoreError:
        raise
    except Exception as error:  # as above
        raise BuildError(
            f"tvm can't import the program for `{target.name}`: {plain(error)}",
            hint='change that part of the model, or try `import = "onnx"` in the row',
        ) from error


@contextlib.contextmanager
def _import_of_a_model(said: io.StringIO) -> Iterator[None]:
    """Importers print and warn; what else they do that doesn't suit us is put right while they run."""
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    changed = (
        (relax.op, "strided_slice", _slices_inside()),
        (onnx_frontend.Clip, "_impl_v13", classmethod(_clip)),
        (onnx_frontend.Reshape, "_impl_v13", _reshape_of(onnx_frontend.Reshape._impl_v13)),
        (onnx_frontend.Range, "_impl_v12", _range_of(onnx_frontend.Range._impl_v12)),
    )
    with _importing, warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        originals = [(place, name, vars(place)[name]) for place, name, _ in changed]
        for place, name, value in changed:
            setattr(place, name, value)
        try:
            yield
        finally:
            for place, name, value in originals:
                setattr(place, name, value)


def _slices_inside() -> Callable[..., Any]:
    """A slice whose end is an axis ends inside: TVM takes it for one that may end before, which makes shapes like
    ``min(seq, 512)``, and no later pass can work with those. torch has proved it for the whole range of the axis.
    """
    from tvm import relax, tirx

    original = relax.op.strided_slice

    def inside(x: Any, axes: Any, begin: Any, end: Any, strides: Any = None, assume_inbound: bool = False) -> Any:
        with contextlib.suppress(TypeError):  # an end that is a tensor can't be looked into
            assume_inbound |= any(not isinstance(one, int | tirx.IntImm) for one in end)
        return original(x, axes, begin, end, strides, assume_inbound=assume_inbound)

    return inside


def _clip(_converter: Any, builder: Any, inputs: Any, _attributes: Any, _params: Any) -> Any:
    """ONNX's Clip in operators: TVM's importer makes loop nests of it, which no pass over operators can look into."""
    from tvm import relax

    found = inputs[0]
    for bound, limit in ((inputs[1], relax.op.maximum), (inputs[2], relax.op.minimum)):
        if bound is not None:
            found = builder.emit(limit(found, bound))
    return found


def _reshape_of(original: Callable[..., Any]) -> Any:
    """A size that is made a list of one size: TVM's importer asks for its shape, which a size has not."""
    from tvm import ir, relax

    def reshape(_converter: Any, builder: Any, inputs: Any, attributes: Any, params: Any) -> Any:
        if ir.is_prim_expr(inputs[0]):
            return relax.ShapeExpr([inputs[0]])
        return original(builder, inputs, attributes, params)

    return classmethod(reshape)


def _range_of(original: Callable[..., Any]) -> Any:
    """Numbers up to a size are as many as that size says: TVM's importer makes up a new one, equal to no other."""
    from tvm import ir, relax

    def number(value: Any) -> Any:
        return value.value.numpy().item() if isinstance(value, ir.GenericConst) else None

    def arange(_converter: Any, builder: Any, inputs: Any, attributes: Any, params: Any) -> Any:
        start, limit, step = inputs[0], inputs[1], inputs[2]
        if number(start) == 0 and number(step) == 1 and ir.is_prim_expr(limit):
            return relax.op.arange(0, limit, 1, "int64")
        return original(builder, inputs, attributes, params)

    return classmethod(arange)


def _check_inputs(module: Any, signature: Signature, target: Target) -> None:
    found = [str(parameter) for parameter in module["main"].params]
    if len(found) != len(signature.inputs):
        raise BuildError(
            f"tvm imported the model for `{target.name}` with inputs {found}, "
            f"its signature has {[spec.name for spec in signature.inputs]}"
        )

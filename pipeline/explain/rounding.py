"""How far the output of operators may be from what it should be for no other reason than rounding.

A dot product of n numbers in floating point is off by at most about ``sqrt(n) * u * sum(|x| * |w|)``, where u is half
the distance from 1 to the next number: the probabilistic bound of N. J. Higham and T. Mary, "A new approach to
probabilistic rounding error analysis" (2019). Other operators return the exact result for inputs that are off by
that much, relatively (they are backward stable), which is looked at by moving the inputs. Integers are off only where
a value lies so near to the edge between two steps that rounding may put it on either side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.explain.operators import Operators
from pipeline.graph import attribute

Array = NDArray[Any]

LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm", "ReduceSum", "ReduceMean", "AveragePool", "GlobalAveragePool")
_SUMMING = (
    "LayerNormalization",
    "Softmax",
    "LogSoftmax",
    "ReduceL2",
    "ReduceL1",
    "ReduceLogSumExp",
    "RMSNormalization",
)
_QUANTIZE = "QuantizeLinear"
BOTH = 2.0
"""The reference rounds, and the engine does; so they are twice as far from each other as each is from the truth."""


def unit(dtype: np.dtype[Any]) -> float:
    """Half the distance from 1 to the next number of a float dtype; 0 for integers, which are exact."""
    return float(np.finfo(dtype).eps) / 2 if np.issubdtype(dtype, np.floating) else 0.0


def amplitudes(
    operators: Operators,
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    wide: Mapping[str, Array],
    narrow: float = 0.0,
) -> dict[str, Array]:
    """How far each element of the node's outputs may be off, as a typical magnitude.

    Args:
        operators: of the model that `node` is of.
        node: the operator.
        inputs: values of what it reads, constants included.
        wide: how far each element of an input may be off already; exact where it is missing.
        narrow: unit of the numbers that it is computed in elsewhere, if they are narrower.
    """
    made = operators.run(node, inputs, fixed=False)
    if node.op_type == _QUANTIZE:
        return _quantized(operators, node, inputs, wide)
    floats = [one.dtype for one in made.values() if np.issubdtype(one.dtype, np.floating)]
    share = math.sqrt(summands(node, inputs, made)) * max((unit(dtype) for dtype in floats), default=0.0)
    if floats:
        share = max(share, math.sqrt(summands(node, inputs, made)) * narrow)
    if node.op_type in LINEAR and floats:
        return _linear(operators, node, inputs, wide, share)
    return _moved(operators, node, inputs, wide, made, share, narrow)


def summands(node: onnx.NodeProto, inputs: Mapping[str, Array], made: Mapping[str, Array]) -> int:
    """How many numbers `node` adds up for one number of its output."""
    first = inputs[node.input[0]] if node.input and node.input[0] in inputs else None
    if first is None:
        return 1
    if node.op_type in ("Conv", "ConvTranspose"):
        weight = inputs[node.input[1]]
        rows = weight.shape[0] if node.op_type == "ConvTranspose" else weight.shape[1]
        return int(rows * np.prod(weight.shape[2:])) + (len(node.input) > 2)
    if node.op_type == "MatMul":
        return int(first.shape[-1])
    if node.op_type == "Gemm":
        return int(first.shape[0 if attribute(node, "transA", 0) else 1]) + (len(node.input) > 2)
    if node.op_type == "AveragePool":
        return int(np.prod(np.asarray(attribute(node, "kernel_shape", [1]))))
    if node.op_type.startswith(("Reduce", "Global")):
        size = max((one.size for one in made.values()), default=1)
        return max(first.size // max(size, 1), 1)
    if node.op_type in _SUMMING:
        axis = attribute(node, "axis", -1)
        assert isinstance(axis, int)
        return int(np.prod(first.shape[axis:])) if "Norm" in node.op_type else int(first.shape[axis])
    return 1


def _linear(
    operators: Operators,
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    wide: Mapping[str, Array],
    share: float,
) -> dict[str, Array]:
    """Its own rounding, and what comes in: errors of single elements are independent, so that their squares add up."""
    floats = [name for name in node.input if name and np.issubdtype(inputs[name].dtype, np.floating)]
    rest = {name: inputs[name] for name in node.input if name and name not in floats}
    second = node.input[1] if len(node.input) > 1 and node.input[1] in floats else None

    def passed(first: Mapping[str, Array], weight: Array | None) -> dict[str, Array]:
        given = {name: first.get(name, np.zeros(())) for name in floats}
        if second is not None and weight is not None:
            given[second] = weight
        full = {
            name: np.broadcast_to(one, inputs[name].shape).astype(inputs[name].dtype) for name, one in given.items()
        }
        return operators.run(node, rest | full, fixed=False)

    size = {name: np.abs(inputs[name]) for name in floats}
    weight = None if second is None else size[second]
    found = passed({name: share * one for name, one in size.items()}, weight)
    found = {name: np.abs(_wide(one)) for name, one in found.items()}
    parts = []
    first = {name: np.square(wide[name]) for name in floats if name in wide and name != second}
    if first:
        parts.append(passed(first, None if weight is None else np.square(weight)))
    if second is not None and second in wide:
        parts.append(passed({node.input[0]: np.square(size[node.input[0]])}, np.square(wide[second])))
    for part in parts:
        found = {name: np.hypot(one, np.sqrt(np.abs(_wide(part[name])))) for name, one in found.items()}
    return found


def _quantized(
    operators: Operators,
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    wide: Mapping[str, Array],
) -> dict[str, Array]:
    value = inputs[node.input[0]]
    reach = wide.get(node.input[0], 0) + unit(value.dtype) * np.abs(value)
    ends = [
        operators.run(node, {**inputs, node.input[0]: (value + sign * reach).astype(value.dtype)}, fixed=False)
        for sign in (-1, 1)
    ]
    low, high = (one[node.output[0]].astype(np.float64) for one in ends)
    return {node.output[0]: np.abs(high - low)}


def _moved(
    operators: Operators,
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    wide: Mapping[str, Array],
    made: Mapping[str, Array],
    share: float,
    narrow: float,
) -> dict[str, Array]:
    """By moving the inputs to and fro, each element in a direction of its own."""
    found = {name: _unit(one, narrow) * np.abs(_wide(one)) for name, one in made.items()}
    draw = np.random.default_rng(0)
    reach = {
        name: share * np.abs(_wide(one)) + wide.get(name, 0) for name, one in inputs.items() if _moves(one, name, wide)
    }
    if not any(one.any() for one in reach.values()):
        return found
    # an index or a choice flips only for some of the directions
    for _ in range(2 if all(_is_float(one) for one in made.values()) else 16):
        moved = {
            name: _as(inputs[name], _wide(inputs[name]) + far * draw.choice((-1.0, 1.0), far.shape))
            for name, far in reach.items()
        }
        try:
            other = operators.run(node, {**inputs, **moved}, fixed=False)
        except Exception:  # indices or sizes that must not be moved: it reads no values that round
            return found
        for name, one in made.items():
            if other[name].shape != one.shape:
                return found
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(_wide(other[name]) - _wide(one))
            found[name] = np.maximum(found[name], np.where(np.isfinite(gap), gap, 0))
    return found


def _unit(value: Array, narrow: float) -> float:
    own = unit(value.dtype)
    return max(own, narrow) if own else 0.0


def _moves(value: Array, name: str, wide: Mapping[str, Array]) -> bool:
    return np.issubdtype(value.dtype, np.floating) or (name in wide and value.dtype != np.bool_)


def _is_float(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))


def _wide(value: Array) -> Array:
    return value.astype(np.float64)


def _as(like: Array, value: Array) -> Array:
    """`value` in the dtype of `like`, inside of what that holds."""
    kind: Callable[..., Any] = np.finfo if np.issubdtype(like.dtype, np.floating) else np.iinfo
    ends = kind(like.dtype)
    kept = np.where(np.isfinite(like), np.clip(value, float(ends.min), float(ends.max)), like)
    return (kept if np.issubdtype(like.dtype, np.floating) else np.round(kept)).astype(like.dtype)

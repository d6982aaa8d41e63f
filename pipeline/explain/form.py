"""A numeric form of a graph compared with fp32: is an operator worse than its numbers explain?

Eight bits and sixteen bits lose accuracy, and that is no fault. What an operator may lose follows from its format: half
a step for each weight, with the scale that fits these weights; for an activation, what the worst of the range methods
would have lost over the calibration statistics; half a unit in the last place for float16. What an operator loses
beyond that, given the right inputs, is a fault of its scale, its range, its constants, or an overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline import calibrate, integer, origin, qdq
from pipeline.explain import faults as explain_faults
from pipeline.explain import rounding as explain_rounding
from pipeline.explain.advice import of_form
from pipeline.explain.engine import explains, layer
from pipeline.explain.faults import Fault
from pipeline.explain.graphs import Feeds, Walk
from pipeline.explain.operators import Operators
from pipeline.explain.pairs import View
from pipeline.explain.steps import Step
from pipeline.graph import attribute
from pipeline.macs import FAMILY
from pipeline.types import Departure, Layer, RangeMethod, Reporter, no_report

Array = NDArray[Any]
_SUFFIXES = (":float", ":dequantized", ":half")
_SMOOTH = ":smooth"
_QUANTIZE, _DEQUANTIZE, _DYNAMIC = "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"


@dataclass
class Format:
    """What the numbers of a form explain.

    Attributes:
        form: the graph.
        fp32: what it was made of.
        kind: of INT8; None for floats.
        statistics: of calibration, by tensor.
        corrected: biases were moved by the mean error that quantisation makes.
        smooth: large channels were divided by factors, and their weights multiplied.
    """

    form: Operators
    fp32: Operators
    kind: integer.Form | None
    statistics: calibrate.Statistics
    corrected: bool = False
    smooth: bool = False
    _quantizers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    _scales: dict[str, list[qdq.Scale]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.form.graph.model.graph.node:
            if node.op_type == _DEQUANTIZE and node.input[0] in self.form.graph.makers:
                view = self.view(node.output[0])
                if view is not None:
                    self._quantizers[view.name] = self.form.graph.makers[node.input[0]]

    def view(self, name: str) -> View | None:
        """The tensor of the fp32 graph that `name` of the form is, in whatever numbers; None if it is none."""
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        factor = self.form.value(f"{name}:factor") if name.endswith(_SMOOTH) else self._divided(name)
        return View(name.removesuffix(_SMOOTH), None, factor)

    def _divided(self, name: str) -> Array | None:
        """By what a normalisation that makes `name` multiplies in its own weights, where a smoothing went there."""
        was, now = self.fp32.graph.makers.get(name), self.form.graph.makers.get(name)
        if not self.smooth or was is None or now is None or was.op_type != "LayerNormalization":
            return None
        before, after = self.fp32.value(was.input[1]), self.form.value(now.input[1])
        if before is None or after is None or np.array_equal(before, after):
            return None
        return np.divide(after, before, out=np.ones_like(after), where=before != 0)

    def wide(self, runs: Sequence[onnx.NodeProto], values: Mapping[str, Array]) -> dict[str, Array]:
        """How far off its own numbers may leave each tensor and constant of fp32 that the operators `runs` read.

        Args:
            runs: operators of the form.
            values: of the fp32 graph.
        """
        found: dict[str, Array] = {}
        for node in runs:
            if node.op_type == _QUANTIZE:
                found |= self._activation(node, values)
            elif node.op_type == _DYNAMIC and node.input[0] in values:
                value = values[node.input[0]]
                width = float(value.max(initial=0)) - float(value.min(initial=0))
                found[node.input[0]] = np.full(value.shape, width / 255 / 2)
            elif node.op_type == _DEQUANTIZE and self.form.value(node.input[0]) is not None:
                found |= self._weight(node.output[0].removesuffix(":dequantized"), node)
            elif node.op_type == "MatMulInteger":
                found |= self._weight(node.input[1].removesuffix(":integer"), node)
            if self.corrected:
                found |= self._made_up_for(node, values)
        return found

    def _made_up_for(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
        """What a corrected bias of `node` makes up for: all that quantisation loses in its operator."""
        if FAMILY.get(node.op_type) is not None:
            view = self.view(node.input[0])
            maker = self._quantizers.get(view.name) if view is not None else None
            return {} if maker is None else self._activation(maker, values)
        if node.op_type != "Add":
            return {}
        product = next((self.form.graph.makers[name] for name in node.input if self._is_product(name)), None)
        was = self.fp32.graph.makers.get(product.output[0]) if product is not None else None
        if product is None or was is None:
            return {}
        weights = self.form.graph.makers.get(product.input[1])
        off = self.wide([product, *([] if weights is None else [weights])], values)
        inputs = {name: values[name] if name in values else self.fp32.value(name) for name in was.input if name}
        known = {name: one for name, one in inputs.items() if one is not None}
        return explain_rounding.amplitudes(self.fp32, was, known, off)

    def _is_product(self, name: str) -> bool:
        maker = self.form.graph.makers.get(name)
        return maker is not None and maker.op_type == "MatMul"

    def _activation(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
        view = self.view(node.input[0])
        if view is None or view.name not in values:
            return {}
        lost = self.worst(node, view.of(values[view.name]).astype(np.float32))
        return {view.name: lost if view.factor is None else lost / np.abs(view.factor)}

    def own(self, node: onnx.NodeProto) -> qdq.Scale:
        """The scale of a quantiser as it is."""
        scale, zero = self.form.value(node.input[1]), self.form.value(node.input[2])
        assert scale is not None and zero is not None  # noqa: PT018
        return qdq.Scale(node.input[1].removesuffix(":scale"), scale, zero)

    def wanted(self, node: onnx.NodeProto) -> list[qdq.Scale]:
        """The scales that the range methods would choose; none if calibration hasn't seen the tensor."""
        name = node.input[1].removesuffix(":scale")
        if name not in self._scales:
            readers = self.fp32.graph.readers.get(name, [])
            # what an activation cuts off needs no integers
            after = [readers[0].output[0]] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else []
            known = [self.statistics[one] for one in (name, *after) if one in self.statistics]
            ranges = [calibrate.range_of(one, method) for one in known for method in get_args(RangeMethod)]
            kind = self.kind
            self._scales[name] = [] if kind is None else [qdq.activation_scale(name, span, kind) for span in ranges]
        return self._scales[name]

    def worst(self, node: onnx.NodeProto, value: Array) -> Array:
        """What the worst of the range methods loses of `value`, element by element."""
        lost = [self._lost(value, scale) for scale in self.wanted(node) or [self.own(node)]]
        return max(lost, key=lambda one: float(np.square(one).sum()))

    def _lost(self, value: Array, how: qdq.Scale) -> Array:
        steps = qdq.quantized(value, how).astype(np.float32) - how.zero.astype(np.float32)
        rounding = float(np.finfo(np.float32).eps) * np.abs(value)
        return np.asarray(np.abs(steps * how.scale - value).astype(np.float64) + rounding)

    def _weight(self, name: str, node: onnx.NodeProto) -> dict[str, Array]:
        """Half a step for each number of a weight, with the scale that fits it best."""
        own = name if self.fp32.value(name) is not None else name.rpartition(":")[0]  # one form for each reader
        weight = self.fp32.value(own)
        if weight is None or weight.ndim < 2:  # a bias is in units of both scales: its steps are far finer
            return {}
        weight = weight.astype(np.float32)
        if node.op_type == "MatMulInteger":
            was = next((one for one in self.fp32.graph.readers.get(own, []) if one.name == node.name), None)
            axis: int | None = 0 if was is not None and attribute(was, "transB", 0) else 1
        else:
            axis = self._axis(node)
        factor = self._factor(weight, node, axis) if self.smooth else np.ones((), np.float32)
        step = qdq.weight_scale(name, (weight * factor).astype(np.float32), axis, None).scale
        shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
        half = np.abs(step).reshape(shape if axis is not None else ()) / 2
        return {own: np.broadcast_to(half / factor, weight.shape)}

    def _axis(self, node: onnx.NodeProto) -> int | None:
        scale = self.form.value(node.input[1])
        return int(attribute(node, "axis", 1)) if scale is not None and scale.size > 1 else None  # type: ignore[call-overload]

    def _factor(self, weight: Array, node: onnx.NodeProto, axis: int | None) -> Array:
        """What a smoothing has multiplied each row of a weight with."""
        if node.op_type != _DEQUANTIZE or weight.ndim != 2:
            return np.ones(())
        whole, scale, zero = (self.form.value(name) for name in node.input)
        assert whole is not None and scale is not None and zero is not None  # noqa: PT018
        shape = [-1 if place == axis else 1 for place in range(2)] if axis is not None else ()
        made = (whole.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
        along = 1 if axis is None else axis
        sizes = [np.linalg.norm(one, axis=along, keepdims=True) for one in (made, weight)]
        tiny = float(np.finfo(np.float32).tiny)
        return np.asarray(np.maximum(sizes[0], tiny) / np.maximum(sizes[1], tiny), np.float32)


def departures(
    form: onnx.ModelProto,
    fp32: onnx.ModelProto,
    kind: integer.Form | None,
    feeds: Sequence[Feeds],
    statistics: calibrate.Statistics,
    *,
    corrected: bool = False,
    smooth: bool = False,
    report: Reporter = no_report,
) -> tuple[tuple[Departure, ...], tuple[Layer, ...], int]:
    """What of `form` is worse than its numbers explain; as `explain_engine.departures`.

    Args:
        form: the graph in another numeric form.
        fp32: the graph that it was made of.
        kind: of INT8, None for floats.
        feeds: inputs to look at, at least one.
        statistics: of calibration, by tensor of `fp32`; empty if there are none.
        corrected: biases make up for mean errors.
        smooth: large channels were divided by factors, and their weights multiplied.
        report: told of each operator.
    """
    made, asked = Operators(form), Operators(fp32)
    numbers = Format(made, asked, kind, statistics, corrected, smooth)
    found: list[Departure] = []
    layers: list[Layer] = []
    walk = Walk(made, asked, feeds, report, "explain the form:", numbers)
    for step in walk.steps():
        layers.append(layer(step, asked))
        if step.departs:
            found.append(_departure(step, numbers))
    return tuple(found), _joined(layers), len(layers)


def _joined(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """One line a tensor: in floats or in integers it is the same one, and it loses what the worse of them does."""
    found: dict[str, Layer] = {}
    for one in layers:
        own = min(
            (each.own_db for each in (one, found.get(one.output)) if each and each.own_db is not None), default=None
        )
        found[one.output] = one.model_copy(update={"own_db": own})
    return tuple(found.values())


def _departure(step: Step, numbers: Format) -> Departure:
    fault = _fault(step, numbers)
    return Departure(
        level="form",
        operator=fault.node.op_type,
        node=fault.node.name,
        engine_node=step.runs[-1].name if step.runs else None,
        module=origin.module_of(fault.node),
        line=origin.line_of(fault.node),
        output=step.view.name,
        before=step.before,
        after=step.after,
        own=step.own,
        allowed=step.allowed,
        because="; ".join(filter(None, [_explains(step, numbers), fault.detail])),
        kind=fault.kind,
        suggestion=of_form(fault),
    )


def _explains(step: Step, numbers: Format) -> str:
    quantizes = any(run.op_type == _QUANTIZE for run in step.runs)
    if quantizes and not step.nodes:
        return f"the worst range method leaves {step.allowed:.0f} dB over the calibration statistics"
    if numbers.kind is not None and any(run.op_type in FAMILY for run in step.runs):
        return f"scales that fit its weights leave {step.allowed:.0f} dB"
    return explains(step)


def _fault(step: Step, numbers: Format) -> Fault:
    main = explain_faults.principal(step, numbers.fp32.graph)
    quantizer = next((run for run in step.runs if run.op_type == _QUANTIZE), None)
    if quantizer is not None and not step.nodes:
        return _range_fault(step, quantizer, main, numbers)
    if step.made is not None and np.count_nonzero(~np.isfinite(step.made) & np.isfinite(step.wanted)):
        return Fault(main, *explain_faults.by_numbers(step))
    for run in step.runs:
        found = _constant_fault(run, step, main, numbers) if run.op_type == _DEQUANTIZE else None
        if found is not None:
            return found
    return explain_faults.of(step, numbers.form, numbers.fp32)


def _range_fault(step: Step, node: onnx.NodeProto, main: onnx.NodeProto, numbers: Format) -> Fault:
    """What is wrong with the scale or zero point of an activation."""
    own, wanted = numbers.own(node), numbers.wanted(node)
    scales = [float(one.scale) for one in wanted]
    if scales and float(own.scale) < min(scales) / 2:
        lost = int(np.count_nonzero(np.abs(step.wanted - (step.made if step.made is not None else 0)) > own.scale))
        detail = f"{lost:,} of {step.wanted.size:,} values are cut off: the scale is {float(own.scale):.3g}"
        return Fault(main, "range saturates", f"{detail}, the range methods say {min(scales):.3g} to {max(scales):.3g}")
    zeros = {int(one.zero) for one in wanted}
    if wanted and int(own.zero) not in range(min(zeros), max(zeros) + 1):
        said = " or ".join(map(str, sorted(zeros)))
        return Fault(main, "zero point", f"it is {int(own.zero)}, the range methods say {said}")
    said = f", the range methods say {min(scales):.3g} to {max(scales):.3g}" if scales else ""
    return Fault(main, "scale", f"it is {float(own.scale):.3g}{said}")


def _constant_fault(run: onnx.NodeProto, step: Step, main: onnx.NodeProto, numbers: Format) -> Fault | None:
    """Whether a constant of the form is farther from that of fp32 than a step."""
    name = run.output[0].removesuffix(":dequantized")
    own = name if numbers.fp32.value(name) is not None else name.rpartition(":")[0]
    wanted = numbers.fp32.value(own)
    if wanted is None or numbers.form.value(run.input[0]) is None:
        return None
    made = numbers.form.run(run, {})[run.output[0]]
    scale = numbers.form.value(run.input[1])
    axis = numbers._axis(run)
    assert scale is not None
    if wanted.ndim == 1:
        allowed = numbers.wide(step.runs, step.inputs).get(own, np.abs(scale).reshape(-1))
        off = np.abs(made - wanted) > np.maximum(allowed, np.abs(scale).reshape(-1))
        kind = "bias"
    else:
        shape = [-1 if place == axis else 1 for place in range(wanted.ndim)] if axis is not None else ()
        off = np.abs(made - wanted) > np.abs(scale).reshape(shape)
        one, two = (np.linalg.norm(each) for each in (made, wanted))
        kind = "weights differ" if np.isclose(one, two, rtol=0.1) else "scale"
    reader = next((node for node in step.nodes if own in node.input), main)
    return Fault(reader, kind, f"`{own}` is off at {int(off.sum()):,} of {off.size:,} places") if off.any() else None

"""An engine of ONNX Runtime as a graph that can be looked into, compared with the form that it was built from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline import origin, ort_names
from pipeline.errors import BuildError
from pipeline.explain import advice
from pipeline.explain import faults as explain_faults
from pipeline.explain.graphs import Walk
from pipeline.explain.operators import Operators
from pipeline.explain.steps import Step
from pipeline.types import Departure, Layer, Reporter, no_report

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Found = tuple[tuple[Departure, ...], tuple[Layer, ...], int]


def as_run(engine: Path, source: Path, *, finished: bool) -> onnx.ModelProto:
    """The graph that a session runs which loads the engine's file.

    Args:
        engine: ``model.onnx`` or ``model.ort``.
        source: the graph that it was built from, whose names are kept.
        finished: the engine has its layout; otherwise it gets that of this processor when it is loaded.

    Raises:
        BuildError: this version of ONNX Runtime can't read it.
    """
    if finished and engine.suffix == ".onnx":
        return onnx.load(engine)
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if finished else levels.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions, too
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions share no class but Exception
            raise BuildError(
                f"onnxruntime can't load the engine `{engine}`: {' '.join(str(error).split())[:300]}",
                hint="give a file that this version of onnxruntime reads",
            ) from error
        model = onnx.load(path)
        ort_names.make_canonical(model, source)
    return model


def departures(
    engine: onnx.ModelProto, form: onnx.ModelProto, feeds: Sequence[Feeds], report: Reporter = no_report
) -> Found:
    """What of `engine` isn't what `form` says: its operators one by one, on the form's own values.

    Args:
        engine: the graph that runs.
        form: the graph that it was built from.
        feeds: inputs to look at, at least one.
        report: told of each operator.

    Returns:
        the departures, one line for each tensor that was compared, and how many these are; in the engine's order.
    """
    made, asked = Operators(engine), Operators(form)
    found: list[Departure] = []
    layers: list[Layer] = []
    for step in Walk(made, asked, feeds, report).steps():
        layers.append(layer(step, asked))
        if step.departs:
            found.append(_departure(step, made, asked))
    return tuple(found), tuple(layers), len(layers)


def layer(step: Step, reference: Operators) -> Layer:
    """A step as a line of the table of layers."""
    node = explain_faults.principal(step, reference.graph)
    return Layer(
        node=node.name,
        operator=node.op_type or "constant",
        module=origin.module_of(node),
        line=origin.line_of(node),
        output=step.view.name,
        after_db=step.after,
        own_db=step.own,
    )


def _departure(step: Step, engine: Operators, form: Operators) -> Departure:
    fault = explain_faults.of(step, engine, form)
    placed = fault.node if origin.module_of(fault.node) else explain_faults.principal(step, form.graph)
    return Departure(
        level="engine",
        operator=fault.node.op_type,
        node=fault.node.name,
        engine_node=step.runs[-1].name if step.runs else None,
        module=origin.module_of(placed),
        line=origin.line_of(placed),
        output=step.view.name,
        before=step.before,
        after=step.after,
        own=step.own,
        allowed=step.allowed,
        because="; ".join(filter(None, [explains(step), fault.detail])),
        kind=fault.kind,
        suggestion=advice.of_engine(fault, step.runs[-1].op_type if step.runs else None),
    )


def explains(step: Step) -> str:
    """How the allowed SQNR of a step is known."""
    if step.edges is not None:
        return (
            f"{step.edges:,} of {step.wanted.size:,} integers lie so near to an edge that rounding may move them a step"
        )
    if math.isinf(step.allowed):
        return "nothing is rounded there"
    numbers = "a number" if step.summands == 1 else f"sums of {step.summands:,} numbers"
    return f"rounding {numbers} in {np.dtype(step.wanted.dtype).name} explains {step.allowed:.0f} dB"

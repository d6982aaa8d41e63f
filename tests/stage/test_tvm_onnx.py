"""Operators that TVM's importer lacks, written in others: ONNX Runtime gives the same numbers for both."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm")

from pipeline.backends import find
from pipeline.errors import BuildError
from pipeline.stages.build import build
from pipeline.tvm.onnx import MOST_STEPS, importable
from tests.stage.test_tvm_integer import row, stored

INPUT, HIDDEN = 3, 4


def lstm(steps, direction="forward", *, bias=True, state=True, outputs=("y", "h", "c"), **attributes):
    rng = np.random.default_rng(0)
    sides = 2 if direction == "bidirectional" else 1
    shapes = {"w": (sides, 4 * HIDDEN, INPUT), "r": (sides, 4 * HIDDEN, HIDDEN), "b": (sides, 8 * HIDDEN)}
    constants = [numpy_helper.from_array(rng.random(shape, np.float32) - 0.5, name) for name, shape in shapes.items()]
    first = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [sides, "batch", HIDDEN])
        for name in ("h0", "c0")
        if state
    ]
    names = ["x", "w", "r", "b" if bias else "", "", *(one.name for one in first)]
    node = helper.make_node("LSTM", names, list(outputs), hidden_size=HIDDEN, direction=direction, **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, "batch", INPUT])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name]
    graph = helper.make_graph([node], "g", [x, *first], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def results_of(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    "options",
    [{}, {"state": False}, {"bias": False}, {"outputs": ("", "h")}],
    ids=["all", "from zeros", "no bias", "last state"],
)
def test_an_lstm_is_its_steps(direction, options):
    model = lstm(5, direction, **options)
    rng = np.random.default_rng(1)
    sizes = {"x": (5, 2, INPUT), "h0": (model.graph.initializer[0].dims[0], 2, HIDDEN)}
    feeds = {one.name: rng.random(sizes.get(one.name, sizes["h0"]), np.float32) - 0.5 for one in model.graph.input}
    want = results_of(model, feeds)

    changed = importable(model)

    onnx.checker.check_model(changed, full_check=True)
    assert "LSTM" not in {node.op_type for node in changed.graph.node}
    for one, expected in zip(results_of(changed, feeds), want, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "attributes"),
    [("steps", {}), (MOST_STEPS + 1, {}), (5, {"clip": 3.0}), (5, {"input_forget": 1})],
    ids=["dynamic", "too many", "clipped", "coupled gates"],
)
def test_what_is_no_short_plain_lstm_stays(steps, attributes):
    model = lstm(steps, **attributes)
    before = model.SerializeToString()

    assert importable(model).SerializeToString() == before


@pytest.mark.skipif(find("tvm").missing(row("x86-64-v3")) is not None, reason="TVM can't build for x86-64 here")
def test_what_stays_is_refused_with_its_module(tmp_path):
    model = lstm(MOST_STEPS + 1, state=False, outputs=("y",))
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'reader.lstm', 'lstm']")
    graph = stored(tmp_path / "onnx", model, (MOST_STEPS + 1, "batch", INPUT), (MOST_STEPS + 1, 1, "batch", HIDDEN))
    (tmp_path / "out").mkdir()

    with pytest.raises(BuildError, match=r"can't import .*LSTM \(operator `LSTM`.*in module `reader.lstm`"):
        build(graph, row("x86-64-v3"), "fp32", tmp_path / "out")

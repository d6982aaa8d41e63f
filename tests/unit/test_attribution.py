"""From an engine's operators back to the model: what names tell, and what they don't."""

import onnx
import pytest
from onnx import TensorProto, helper

from pipeline import ort_profile, profiles
from pipeline.attribution import attributed
from pipeline.origin import SCOPES, TRACE
from pipeline.types import OperatorTime


def node(kind, reads, makes, name, module=""):
    made = helper.make_node(kind, reads, makes, name=name)
    if module is not None:
        scopes = ["", "model", *([f"model.{module}"] if module else []), kind]
        made.metadata_props.add(key=SCOPES, value=repr(scopes))
        lines = ('"pipeline/trial.py", line 3', f'"recipes/m/model.py", line {len(name)}', '"torch/nn/f.py", line 9')
        made.metadata_props.add(key=TRACE, value="\n".join(f"File {line}" for line in lines))
    return made


@pytest.fixture
def form(tmp_path):
    """A small quantised graph: x, Q, DQ, Conv (stem), Relu (act), Q, DQ, MaxPool (pool), Gemm (the model itself)."""
    values = {name: helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("scale", "b")}
    values["w:integer"] = helper.make_tensor("w:integer", TensorProto.INT8, [1], [1])
    nodes = [
        node("QuantizeLinear", ["x", "scale"], ["x:q"], "qx", None),
        node("DequantizeLinear", ["x:q", "scale"], ["x:dq"], "dqx", None),
        node("DequantizeLinear", ["w:integer", "scale"], ["w"], "dqw", None),
        node("Conv", ["x:dq", "w"], ["c"], "node_conv", "stem"),
        node("Relu", ["c"], ["r"], "node_relu", "act"),
        node("QuantizeLinear", ["r", "scale"], ["r:q"], "qr", None),
        node("DequantizeLinear", ["r:q", "scale"], ["r:dq"], "dqr", None),
        node("MaxPool", ["r:dq"], ["p"], "node_pool", "pool"),
        node("Gemm", ["p", "b"], ["y"], "node_gemm", ""),
    ]
    float_x, float_y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [float_x], [float_y], list(values.values()))
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


def one(form, *operators):
    """(node, module) of each operator, which come in the order they run in."""
    rows = attributed(operators, {operator.name: 1.0 for operator in operators}, form)
    return [(row.node, row.module) for row in rows]


def test_a_name_that_was_kept(form):
    assert one(form, OperatorTime("node_pool", "MaxPool", (1,))) == [("node_pool", "pool")]


def test_a_fused_operator_stands_for_what_multiplies_in_it(form):
    fused = OperatorTime("Fused:0", "FusedConv", (1,), reads=("x:dq", "w"), makes=("r",))
    assert one(form, fused) == [("node_conv", "stem")]


def test_an_operator_is_known_by_its_weight(form):
    renamed = OperatorTime("QLinearConv:1", "QLinearConv", (1,), reads=("t:0", "scale", "w:integer"), makes=("t:1",))
    assert one(form, renamed) == [("node_conv", "stem")]


def test_an_operator_in_blocks_of_channels_is_called_after_what_it_makes(form):
    blocked = OperatorTime("r_nchwc", "Conv", (1,), reads=("t:0", "reorder"), makes=("reorder_token_1",))
    assert one(form, blocked) == [("node_conv", "stem")]


def test_an_operator_in_another_layout_comes_after_a_known_one(form):
    conv = OperatorTime("QLinearConv:1", "QLinearConv", (1,), reads=("t:0", "w:integer"), makes=("t:1",))
    pool = OperatorTime("NhwcMaxPool:2", "NhwcMaxPool", (1,), reads=("t:1",), makes=("t:2",))
    assert one(form, conv, pool) == [("node_conv", "stem"), ("node_pool", "pool")]


def test_a_change_of_layout_stays_without_a_module(form):
    assert one(form, OperatorTime("Reorder:3", "ReorderInput", (1,), reads=("x",), makes=("t:9",))) == [("", "")]


def test_quantising_a_result_belongs_to_the_module_that_makes_it_and_an_input_to_none(form):
    found = one(
        form,
        OperatorTime("qr", "QuantizeLinear", (1,), reads=("r",), makes=("r:q",)),
        OperatorTime("qx", "QuantizeLinear", (1,), reads=("x",), makes=("x:q",)),
    )
    assert found == [("node_relu", "act"), ("", "")]


def test_what_the_runtime_says_itself_comes_first(form):
    told = OperatorTime("Convolution:24", "Convolution", (1,), stands_for=("Multiply_1", "node_relu", "node_conv"))
    assert one(form, told) == [("node_conv", "stem")]


def test_the_line_is_the_users_and_the_model_itself_has_no_module(form):
    operator = OperatorTime("node_gemm", "Gemm", (1,))
    (row,) = attributed([operator], {"node_gemm": 2.5}, form)
    assert (row.node, row.module, row.line, row.ms) == ("node_gemm", "", f"recipes/m/model.py:{len('node_gemm')}", 2.5)


def test_without_a_graph_nothing_is_attributed():
    assert one(None, OperatorTime("node_conv", "Conv", (1,))) == [("", "")]


def event(name, start, length, kind="Conv", category="Node"):
    return {"cat": category, "name": name, "ts": start, "dur": length, "args": {"op_name": kind}}


def test_a_profile_of_onnx_runtime_by_operator():
    events = [
        event("model_run", 0, 100, category="Session"),
        event("a_kernel_time", 10, 20),
        event("b_kernel_time", 30, 5, "Relu"),
        event("a_kernel_time", 110, 24),
        event("b_fence_before", 120, 0),
    ]
    graph = {"a": node("Conv", ["x", "w"], ["y"], "a")}
    first, second = ort_profile.operators(events, graph)
    assert (first.name, first.kind, first.ms, first.reads, first.makes) == (
        "a",
        "Conv",
        (0.02, 0.024),
        ("x", "w"),
        ("y",),
    )
    assert (second.kind, second.ms, second.reads) == ("Relu", (0.005,), ())


def test_what_runs_in_the_body_of_a_loop_is_in_the_loops_time():
    events = [
        event("loop_kernel_time", 0, 50, "Loop"),
        event("inner_kernel_time", 0, 10),
        event("a_kernel_time", 50, 3),
    ]
    assert [(one.name, one.ms) for one in ort_profile.operators(events, {})] == [("loop", (0.05,)), ("a", (0.003,))]


def test_the_faster_half_of_the_calls_counts():
    assert profiles.undisturbed([5.0, 1.0, 9.0, 2.0]) == [1, 3]
    assert profiles.undisturbed([3.0]) == [0]
    operator = OperatorTime("a", "Conv", (50.0, 10.0, 90.0, 20.0))
    assert profiles.of_calls(operator, [1, 3], 4) == 15.0
    # an operator in a branch that ran once in four calls
    assert profiles.of_calls(OperatorTime("b", "If", (8.0,)), [1, 3], 4) == 2.0

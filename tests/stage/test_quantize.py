"""Numeric forms of small ONNX graphs, made without torch, and run by ONNX Runtime."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import calibrate, graph, integer, samples
from pipeline.compare import distance
from pipeline.errors import ConversionError, DataError, NotApplicable, UsageError
from pipeline.stages import quantize as stage
from pipeline.store import Key, Stored, make
from pipeline.types import Recipe, no_report

STATIC = ("int8-u8s8", "int8-s8s8", "int8-u8u8")
RNG = np.random.default_rng(0)


def weight(name: str, *shape: int, scale: float = 0.25) -> TensorProto:
    return numpy_helper.from_array((RNG.normal(size=shape) * scale).astype(np.float32), name)


def model(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    built = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        weights,
    )
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convnet() -> onnx.ModelProto:
    """Images [batch, 3, 16, 16] -> logits [batch, 10]: a stem, a residual block, a depthwise convolution, a head."""
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "w0", "b0"], ["c0"], name="stem", pads=[1, 1, 1, 1]),
        node("Relu", ["c0"], ["r0"], name="stem_relu"),
        node("MaxPool", ["r0"], ["p0"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p0", "w1", "b1"], ["c1"], name="block_1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], name="block_relu"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], name="block_2", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "p0"], ["s"], name="residual"),
        node("Relu", ["s"], ["r2"], name="out_relu"),
        node("Conv", ["r2", "w3"], ["c3"], name="depthwise", pads=[1, 1, 1, 1], group=16),
        node("GlobalAveragePool", ["c3"], ["g"], name="average"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "w4", "b4"], ["logits"], name="head", transB=1),
    ]
    weights = [
        *(weight("w0", 16, 3, 3, 3), weight("b0", 16), weight("w1", 16, 16, 3, 3, scale=0.1), weight("b1", 16)),
        *(weight("w2", 16, 16, 3, 3, scale=0.1), weight("b2", 16), weight("w3", 16, 1, 3, 3)),
        *(weight("w4", 10, 16), weight("b4", 10)),
    ]
    return model(
        nodes,
        [("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )


def encoder() -> onnx.ModelProto:
    """Ids and mask [batch, seq] -> hidden [batch, seq, 32]: an attention block with a mask."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["x"], name="embed"),
        *(node("MatMul", ["x", f"w{part}"], [part], name=f"project_{part}") for part in "qkv"),
        node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        node("Mul", ["scores", "root"], ["scaled"], name="scale"),
        node("Cast", ["mask"], ["seen"], name="cast", to=TensorProto.BOOL),
        node("Unsqueeze", ["seen", "one"], ["seen3"], name="unsqueeze"),
        node("Where", ["seen3", "scaled", "fill"], ["masked"], name="masked"),
        node("Softmax", ["masked"], ["share"], name="softmax"),
        node("MatMul", ["share", "v"], ["mixed"], name="mix"),
        node("MatMul", ["mixed", "wo"], ["o"], name="project_o"),
        node("Add", ["o", "x"], ["sum"], name="sum"),
        node("LayerNormalization", ["sum", "gain", "shift"], ["n"], name="norm"),
        node("MatMul", ["n", "w1"], ["h"], name="up"),
        node("Add", ["h", "b1"], ["hb"], name="up_bias"),
        node("Gelu", ["hb"], ["gelu"], name="gelu"),
        node("MatMul", ["gelu", "w2"], ["hidden"], name="down"),
    ]
    weights = [
        weight("table", 50, 32, scale=1.0),
        *(weight(f"w{part}", 32, 32) for part in "qkvo"),
        *(weight("w1", 32, 64), weight("b1", 64), weight("w2", 64, 32)),
        numpy_helper.from_array(np.ones(32, np.float32), "gain"),
        numpy_helper.from_array(np.zeros(32, np.float32), "shift"),
        numpy_helper.from_array(np.array(32**-0.5, np.float32), "root"),
        numpy_helper.from_array(np.array(np.finfo(np.float32).min), "fill"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    ids = ("ids", TensorProto.INT64, ["batch", "seq"])
    mask = ("mask", TensorProto.INT64, ["batch", "seq"])
    return model(nodes, [ids, mask], [("hidden", TensorProto.FLOAT, ["batch", "seq", 32])], weights)


def recipe(folder: Path, kind: str, method: str = "minmax") -> Recipe:
    ids = {"dtype": "int64", "shape": ["batch", "seq"]}
    inputs = {
        "convnet": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 16]}],
        "encoder": [{"name": "ids", "range": [0, 49], **ids}, {"name": "mask", "range": [1, 1], **ids}],
    }[kind]
    axes = {"batch": {"min": 1, "opt": 2, "max": 8}} | (
        {"seq": {"min": 2, "opt": 8, "max": 16}} if kind == "encoder" else {}
    )
    return Recipe.model_validate(
        {
            "name": kind,
            "checkpoint": "none.pt",
            "axes": axes,
            "inputs": inputs,
            "outputs": [{"name": "logits" if kind == "convnet" else "hidden"}],
            "calibration": {"data": "calibration.npz", "samples": 16, "method": method},
            "evaluation": {"data": "none.npz", "metric": "cosine"},
            "budget": {"drop": 0},
            "folder": folder,
            "root": folder,
        }
    )


def stored_model(path: Path, proto: onnx.ModelProto) -> Stored:
    def work(out: Path):
        onnx.save(proto, out / "model.onnx")
        (out / "signature.json").write_text("{}")
        return {}

    return make(path, Key("onnx"), work).stored


def stored_data(path: Path, one: Recipe, count: int = 8) -> Stored:
    """Calibration data as `samples.write` lays it out."""
    drawn = [samples.feeds(one, {axis: spec.opt for axis, spec in one.axes.items()}, seed) for seed in range(count)]
    stacked = {spec.name: np.stack([feeds[spec.name] for feeds in drawn]) for spec in one.inputs}
    one.folder.mkdir(exist_ok=True)
    np.savez(one.folder / "calibration.npz", **stacked)
    return make(path, Key("data"), lambda out: {"samples": samples.write(one, "calibration", out)}).stored


class Case:
    """A model with its recipe and calibration statistics, in a temporary folder."""

    def __init__(self, folder: Path, kind: str, proto: onnx.ModelProto, method: str = "minmax") -> None:
        self.folder = folder
        self.recipe = recipe(folder, kind, method)
        self.fp32 = stored_model(folder / "fp32", proto)
        data = stored_data(folder / "data", self.recipe)

        def work(out: Path):
            return stage.statistics(self.recipe, self.fp32, data, out, no_report)

        self.statistics = make(folder / "statistics", Key("statistics"), work).stored

    def quantize(self, scheme: str, name: str = "", exclude: tuple[str, ...] = ()) -> Stored:
        def work(out: Path):
            ranges = self.statistics if scheme in STATIC else None
            return stage.quantize(self.recipe, self.fp32, scheme, ranges, out, no_report, exclude)

        return make(self.folder / (name or scheme), Key("onnx"), work).stored

    def sqnr_db(self, other: Stored) -> float:
        sizes = {axis: spec.opt + 1 for axis, spec in self.recipe.axes.items()}
        feeds = samples.feeds(self.recipe, sizes, 99)
        one, two = (run(each.file("model.onnx"), feeds) for each in (self.fp32, other))
        return distance("out", one, two).sqnr_db


def run(path: Path, feeds) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Both models, calibrated once."""
    return {
        "convnet": Case(tmp_path_factory.mktemp("convnet"), "convnet", convnet()),
        "encoder": Case(tmp_path_factory.mktemp("encoder"), "encoder", encoder()),
    }


BOUNDS = {"fp16": 50, "bf16": 40, "int8-dynamic": 28, "int8-u8s8": 26, "int8-s8s8": 22, "int8-u8u8": 22}


@pytest.mark.parametrize("scheme", BOUNDS)
@pytest.mark.parametrize("kind", ["convnet", "encoder"])
def test_every_scheme_runs_and_stays_close(cases, kind, scheme):
    case = cases[kind]
    made = case.quantize(scheme)
    assert case.sqnr_db(made) > BOUNDS[scheme]
    assert made.file("signature.json").read_text() == case.fp32.file("signature.json").read_text()
    before, after = (onnx.load(each.file("model.onnx")).graph for each in (case.fp32, made))
    assert list(before.input) == list(after.input)
    assert list(before.output) == list(after.output)
    facts = made.artifact.facts
    assert facts["weight_bytes_after"] < facts["weight_bytes_before"]


@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8-dynamic", "int8-u8s8"])
def test_the_same_model_gives_the_same_bytes(cases, scheme):
    case = cases["convnet"]
    assert case.quantize(scheme, f"{scheme}-one").digest == case.quantize(scheme, f"{scheme}-two").digest


def optimised(path: Path, out: Path) -> Counter:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(out).graph.node)


def test_onnxruntime_runs_the_convolutions_and_what_lies_between_in_integers(cases, tmp_path):
    made = cases["convnet"].quantize("int8-u8s8")
    found = optimised(made.file("model.onnx"), tmp_path / "optimised.onnx")
    assert found["QLinearConv"] == 4
    assert found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert found["Conv"] == found["Add"] == found["Relu"] == 0
    assert found["QuantizeLinear"] == 1  # the input, and nothing after it


def test_onnxruntime_runs_products_with_weights_in_integers(cases, tmp_path):
    for scheme, kernels in (
        ("int8-u8s8", ["MatMulIntegerToFloat"]),
        ("int8-dynamic", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"]),
    ):
        found = optimised(cases["encoder"].quantize(scheme).file("model.onnx"), tmp_path / f"{scheme}.onnx")
        assert sum(found[kernel] for kernel in kernels) == 6
        assert found["MatMul"] + found["FusedMatMul"] == 2  # of activations with activations


def test_facts_say_what_became_integer_and_what_did_not(cases):
    facts = cases["encoder"].quantize("int8-u8s8").artifact.facts
    assert facts["quantized"] == {"MatMul": 6}
    assert facts["float"]["MatMul"] == 2
    assert facts["float_because"] == dict.fromkeys(("scores", "mix"), "the weight is not a float32 constant")
    assert facts["method"] == "minmax"
    assert facts["excluded"] == []


def test_excluded_nodes_stay_in_float(cases):
    case = cases["convnet"]
    made = case.quantize("int8-u8s8", "partly", ("block_1", "residual"))
    facts = made.artifact.facts
    assert facts["quantized"]["Conv"] == 3
    assert facts["float_because"] == {"block_1": "excluded"}
    assert case.sqnr_db(made) > BOUNDS["int8-u8s8"]
    with pytest.raises(UsageError, match="unknown node `blok_1`"):
        case.quantize("int8-u8s8", "misspelt", ("blok_1",))


@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
def test_every_range_method_makes_a_usable_model(tmp_path, method):
    case = Case(tmp_path, "convnet", convnet(), method)
    made = case.quantize("int8-u8s8")
    assert made.artifact.facts["method"] == method
    assert case.sqnr_db(made) > 20


def test_scales_come_from_our_ranges(cases):
    case = cases["convnet"]
    found = calibrate.load(case.statistics.file("statistics.safetensors"))
    built = onnx.load(case.quantize("int8-u8s8").file("model.onnx")).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in built.initializer}
    low, high = found["image"].low, found["image"].high
    assert constants["image:scale"] == pytest.approx((high - low) / 255)
    assert constants["image:zero"] == round(-low / float(constants["image:scale"]))
    assert constants["r0:zero"] == 0
    # a pool hands on values of its input, so it has no scale of its own
    assert "p0:scale" not in constants


def test_a_bias_far_larger_than_the_weights_is_kept(tmp_path):
    proto = convnet()
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "b1")
    small = next(tensor for tensor in proto.graph.initializer if tensor.name == "w1")
    bias.CopyFrom(numpy_helper.from_array(np.full(16, 3.0, np.float32), "b1"))
    small.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(small) * np.float32(1e-9), "w1"))
    case = Case(tmp_path, "convnet", proto)
    assert case.sqnr_db(case.quantize("int8-u8s8")) > 20


def test_static_schemes_need_calibration(cases, tmp_path):
    case = cases["convnet"]
    with pytest.raises(DataError, match=r"(?s)`int8-u8s8` needs calibration data.*hint: .*int8-dynamic"):
        stage.quantize(case.recipe, case.fp32, "int8-u8s8", None, tmp_path, no_report)


def test_statistics_of_another_model_are_refused(cases, tmp_path):
    convnet_case, other = cases["convnet"], cases["encoder"]
    with pytest.raises(ConversionError, match="they are of another graph"):
        stage.quantize(convnet_case.recipe, convnet_case.fp32, "int8-u8s8", other.statistics, tmp_path, no_report)


def test_bf16_rounds_what_is_multiplied_and_nothing_else(cases):
    case = cases["encoder"]
    made = case.quantize("bf16")
    built = onnx.load(made.file("model.onnx")).graph
    makers = {name: node for node in built.node for name in node.output}
    products = [node for node in built.node if node.op_type == "MatMul"]
    assert products
    for node in products:
        for name in node.input:
            assert makers[name].op_type == "Cast"
            narrow = makers.get(makers[name].input[0])
            assert narrow is None or narrow.attribute[0].i == TensorProto.BFLOAT16
    assert {tensor.data_type for tensor in built.initializer if tensor.name.endswith(":bf16")} == {TensorProto.BFLOAT16}
    assert made.artifact.facts["narrowed"] == {"MatMul": len(products)}
    assert made.artifact.facts["weight_bytes_after"] < made.artifact.facts["weight_bytes_before"]


def test_a_model_without_weights_has_nothing_to_quantise(tmp_path):
    proto = model(
        [helper.make_node("Softmax", ["image"], ["logits"])],
        [("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [("logits", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [],
    )
    case = Case(tmp_path, "convnet", proto)
    for scheme in ("int8-dynamic", "int8-u8s8"):
        with pytest.raises(NotApplicable, match=f"`{scheme}` changes nothing in this model.*it has Softmax"):
            case.quantize(scheme)
    with pytest.raises(NotApplicable, match="`bf16` changes nothing in this model"):
        case.quantize("bf16")


def test_a_tensor_with_infinities_keeps_its_readers_in_float(tmp_path):
    proto = convnet()
    # log of what a ReLU made is minus infinity at times
    proto.graph.node[4].CopyFrom(helper.make_node("Relu", ["c1"], ["zeros"], name="block_relu"))
    proto.graph.node.insert(5, helper.make_node("Log", ["zeros"], ["r1"], name="log"))
    case = Case(tmp_path, "convnet", proto)
    assert "r1" in case.statistics.artifact.facts["not_finite"]
    facts = case.quantize("int8-u8s8").artifact.facts
    assert facts["float_because"]["block_2"] == "NaN or infinity among its values"


def test_a_weight_beyond_float16_is_refused(tmp_path):
    proto = convnet()
    head = next(tensor for tensor in proto.graph.initializer if tensor.name == "w4")
    head.CopyFrom(numpy_helper.from_array(np.full((10, 16), 1e5, np.float32), "w4"))
    case = Case(tmp_path, "convnet", proto)
    with pytest.raises(ConversionError, match="`w4` reaches 100000, and float16 ends at 65504"):
        case.quantize("fp16")


def test_weights_that_do_not_fit_into_one_message_go_beside(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "INLINE_BYTES", 1000)
    case = cases["convnet"]
    made = case.quantize("int8-u8s8", "external")
    assert set(made.artifact.files) == {"model.onnx", "model.onnx.data", "signature.json"}
    assert case.sqnr_db(made) > BOUNDS["int8-u8s8"]
    # and what is read back from there calibrates and quantises all the same
    again = calibrate.collect(made.file("model.onnx"), [samples.feeds(case.recipe, {"batch": 1}, 0)])
    assert again == {}


def test_a_shared_weight_is_quantised_for_each_use(tmp_path):
    proto = model(
        [
            helper.make_node("Gather", ["table", "ids"], ["x"], name="embed"),
            helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
            helper.make_node("Gemm", ["flat", "table"], ["hidden2"], name="tied", transB=1),
            helper.make_node("Reshape", ["hidden2", "back"], ["hidden"], name="back"),
        ],
        [("ids", TensorProto.INT64, ["batch", "seq"]), ("mask", TensorProto.INT64, ["batch", "seq"])],
        [("hidden", TensorProto.FLOAT, ["rows", 50])],
        [
            weight("table", 50, 32, scale=1.0),
            weight("w", 32, 32),
            numpy_helper.from_array(np.array([-1, 32]), "rows"),
            numpy_helper.from_array(np.array([-1, 50]), "back"),
        ],
    )
    proto.graph.node.insert(2, helper.make_node("Reshape", ["h", "rows"], ["flat"], name="rows"))
    case = Case(tmp_path, "encoder", proto)
    for scheme in ("int8-u8s8", "int8-dynamic"):
        assert case.sqnr_db(case.quantize(scheme)) > 25


@pytest.mark.parametrize("include", [0, 1])
def test_an_average_that_onnxruntime_gets_wrong_in_integers_stays_in_float(include):
    pool = {"kernel_shape": [3, 3], "strides": [3, 3], "ceil_mode": 1, "count_include_pad": include}
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("AveragePool", ["c0"], ["p0"], name="pool", **pool),
        helper.make_node("Conv", ["p0", "w1"], ["features"], name="second"),
    ]
    ends = [("image", TensorProto.FLOAT, [2, 3, 7, 7])], [("features", TensorProto.FLOAT, [2, 8, 3, 3])]
    made = model(nodes, *ends, [weight("w0", 8, 3, 3, 3), weight("w1", 8, 8, 1, 1)])
    assert ("pool" in integer.plan(graph.Graph(made)).nodes) == (include == 0)


def test_every_activation_that_a_plan_may_need_is_observed():
    for proto in (convnet(), encoder()):
        index = graph.Graph(proto)
        known = set(integer.activations(index))
        names = [node.name for node in proto.graph.node]
        for left in [(), *((name,) for name in names), tuple(names[::2]), tuple(names[1::3])]:
            plan = integer.plan(index, exclude=left)
            nodes = [node for node in proto.graph.node if node.name in plan.nodes]
            read = {name for node in nodes for name in integer.data_inputs(node) if index.constant(name) is None}
            assert read - plan.tensors <= known


MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from pipeline import calibrate
rng = np.random.default_rng(0)
feeds = ({"x": rng.normal(size=(1, 3, 256, 256)).astype("f4")} for _ in range(int(sys.argv[2])))
calibrate.collect(Path(sys.argv[1]), feeds)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    # three tensors of 8 MB each: kept for 40 samples, they would be a gigabyte
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["a", "v"], ["b"], pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["b", "v"], ["y"], pads=[1, 1, 1, 1]),
        ],
        [("x", TensorProto.FLOAT, ["batch", 3, 256, 256])],
        [("y", TensorProto.FLOAT, ["batch", 32, 256, 256])],
        [weight("w", 32, 3, 3, 3), weight("v", 32, 32, 3, 3, scale=0.1)],
    )
    onnx.save(proto, tmp_path / "model.onnx")
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, tmp_path / "model.onnx", str(count)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for count in (5, 40)
    )
    assert many - few < 150

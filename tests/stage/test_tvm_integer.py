"""Quantised graphs through TVM: dot products of 8-bit integers where the CPU has them, and the same numbers."""

import io

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402
from tvm.relax.frontend.onnx import from_onnx  # noqa: E402

from pipeline import backends, host, store  # noqa: E402
from pipeline.backends import find  # noqa: E402
from pipeline.errors import BuildError  # noqa: E402
from pipeline.stages.audit import audit  # noqa: E402
from pipeline.stages.build import build  # noqa: E402
from pipeline.tvm import compile as tvm_compile  # noqa: E402
from pipeline.tvm import importer as tvm_import  # noqa: E402
from pipeline.tvm.cpu import registers_of  # noqa: E402
from pipeline.types import Audit, Axis, Signature, Target, TensorSpec  # noqa: E402
from tests import arm  # noqa: E402
from tests.arm import needs_emulator  # noqa: E402

VNNI = "icelake-server"
needs_vnni = pytest.mark.skipif("avx512_vnni" not in host.cpu_features(), reason="this CPU has no VNNI")


class Writer:
    """A graph in the making; every method returns the name of what it adds."""

    def __init__(self, activations=np.uint8):
        self.nodes, self.constants, self.activations = [], [], activations
        self.rng = np.random.default_rng(0)

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operator, *inputs, **attributes):
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def rounded(self, name, scale, zero):
        numbers = self.constant(np.float32(scale)), self.constant(self.activations(zero))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", name, *numbers), *numbers)

    def weight(self, *shape, axis=0):
        value = self.rng.integers(-127, 127, shape, dtype=np.int8)
        scale = (self.rng.random(shape[axis]) * 0.004).astype(np.float32)
        zero = np.zeros(shape[axis], np.int8)
        return self.node("DequantizeLinear", *map(self.constant, (value, scale, zero)), axis=axis)

    def bias(self, size):
        return self.constant(self.rng.random(size).astype(np.float32))

    def model(self, shape, result):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def product(depth, columns, activations=np.uint8, shape=("batch", "seq")):
    one = Writer(activations)
    left = one.rounded("x", 0.02, 120 if activations is np.uint8 else 0)
    found = one.node("MatMul", left, one.weight(depth, columns, axis=1))
    return one.model([*shape, depth], one.node("Gelu", one.node("Add", found, one.bias(columns))))


def pictures(channels, batch="batch"):
    """Convolutions with a border, with one pixel, with channels that fill no vector; a clip, a residual, pools."""
    one = Writer()
    x = one.rounded("x", 0.02, 120)
    first = one.node("Conv", x, one.weight(40, channels, 3, 3), one.bias(40), pads=[1] * 4)
    bounds = one.constant(np.float32(0)), one.constant(np.float32(6))
    inner = one.rounded(one.node("Clip", first, *bounds), 0.01, 0)
    inner = one.rounded(one.node("Conv", inner, one.weight(24, 40, 1, 1)), 0.01, 130)
    last = one.node("Conv", inner, one.weight(24, 24, 3, 3), pads=[1, 1, 1, 1], strides=[1, 1])
    total = one.rounded(one.node("Relu", one.node("Add", last, inner)), 0.01, 0)
    pooled = one.node("MaxPool", total, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    mean = one.node("ReduceMean", pooled, one.constant(np.array([2, 3])), keepdims=0)
    return one.model([batch, channels, 14, 14], mean)


def depthwise(channels, kernel, step=1, wide=1, activations=np.uint8, batch="batch"):
    """A kernel for each channel, a clip, and once more, so that integers go from one to the other."""
    one = Writer(activations)
    found = one.rounded("x", 0.02, 120 if activations is np.uint8 else -3)
    bounds = one.constant(np.float32(0)), one.constant(np.float32(6))
    for zero in (0, 1):
        weight, bias = one.weight(channels, 1, *kernel), one.bias(channels)
        pads = [size // 2 for size in kernel] * 2
        found = one.node(
            "Conv", found, weight, bias, group=channels, pads=pads, strides=[step] * 2, dilations=[wide] * 2
        )
        found = one.rounded(one.node("Clip", found, *bounds), 0.02, zero)
    return one.model([batch, channels, 15, 13], one.node("Relu", found))


def scheduled(model, cpu):
    with tvm_import._import_of_a_model(io.StringIO()):
        module = from_onnx(model, keep_params_in_input=False)
    machine = "aarch64" if cpu.startswith(("neoverse", "cortex")) else "x86_64"
    where = tvm.target.Target({"kind": "llvm", "mtriple": f"{machine}-linux-gnu", "mcpu": cpu})
    registers = registers_of(cpu)
    return tvm_compile.scheduled(tvm_compile.lowered(module, where, registers), where, registers), where


def as_written(model, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": feed})[0]


def assert_near(found, want):
    far = np.abs(found - want) / np.abs(want).max()
    # a value on the edge between two steps may fall on either side, and others read it
    assert (far > 2e-3).mean() < 2e-3
    assert far.max() < 0.02


def assert_same(model, shapes, integers):
    module, where = scheduled(model, VNNI)
    assert tvm_compile.integer_contractions_of(module) == integers
    machine = relax.VirtualMachine(tvm_compile.compiled(module, where), tvm.cpu())
    for shape in shapes:
        feed = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        want, found = as_written(model, feed), machine["main"](tvm.runtime.tensor(feed)).numpy()
        assert_near(found, want)


@needs_vnni
@pytest.mark.parametrize(("depth", "columns"), [(24, 48), (22, 10), (8, 100)])
def test_products_over_dynamic_axes(depth, columns):
    assert_same(product(depth, columns), [(1, 1, depth), (3, 5, depth), (2, 16, depth)], integers=1)


@needs_vnni
@pytest.mark.parametrize("batch", ["batch", 2], ids=["dynamic", "static"])
def test_convolutions_and_what_follows_them(batch):
    assert_same(pictures(3, batch), [(2, 3, 14, 14)], integers=3)


@needs_vnni
@pytest.mark.parametrize(
    ("channels", "kernel", "step", "wide"),
    [(32, (3, 3), 1, 1), (24, (3, 3), 2, 1), (16, (5, 5), 1, 1), (16, (3, 3), 1, 2), (16, (1, 7), 1, 1)],
)
@pytest.mark.parametrize("batch", ["batch", 2], ids=["dynamic", "static"])
def test_a_kernel_for_each_channel(channels, kernel, step, wide, batch):
    assert_same(depthwise(channels, kernel, step, wide, batch=batch), [(2, channels, 15, 13)], integers=2)


@needs_vnni
def test_what_follows_a_contraction_is_done_in_its_loop_nest():
    module, _ = scheduled(pictures(8, 2), VNNI)

    names = [variable.name_hint for variable in module.functions]
    assert len([name for name in names if "dot" in name]) == 3
    assert all("quantize" in name for name in names if "dot" in name)
    assert all(buffer not in str(module["main"]) for buffer in ("conv2d", 'dtype="int32")'))


def test_what_several_steps_read_is_made_once():
    module, _ = scheduled(product(24, 48), VNNI)  # a GELU reads twice what stands before it

    (nest,) = [str(function) for name, function in module.functions.items() if "dot" in name.name_hint]
    assert nest.count('T.Cast("float32", dot') == 1
    assert nest.count("T.erf(") == 1


@pytest.mark.parametrize(
    ("cpu", "activations", "instruction"),
    [("cascadelake", np.uint8, "vpdpbusd"), ("neoverse-n1", np.int8, "sdot")],
)
@pytest.mark.parametrize("model", ["product", "depthwise"])
def test_instructions_of_each_processor(cpu, activations, instruction, model):
    made = product(24, 48, activations) if model == "product" else depthwise(16, (3, 3), activations=activations)
    module, where = scheduled(made, cpu)
    assert tvm_compile.integer_contractions_of(module) == {"product": 1, "depthwise": 2}[model]

    (machine_code,) = tvm_compile.compiled(module, where).mod.imports

    assert machine_code.inspect_source("s").count(f"\t{instruction}\t") > 10


@pytest.mark.parametrize(("cpu", "activations"), [(VNNI, np.int8), ("neoverse-n1", np.uint8), ("x86-64-v3", np.uint8)])
def test_no_instruction_for_the_form(cpu, activations):
    module, _ = scheduled(product(24, 48, activations), cpu)

    assert tvm_compile.integer_contractions_of(module) == 0


def stored(folder, model, shape, result_shape):
    """An ONNX artifact: x -> the model's one output."""
    axes = {name: Axis(min=1, opt=4, max=8) for name in shape if isinstance(name, str)}
    (result,) = model.graph.output
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name=result.name, dtype="float32", shape=result_shape),),
        axes=axes,
    )

    def work(out):
        onnx.save(model, out / "model.onnx")
        store.write_json(out / "signature.json", signature.plain())
        return {}

    return store.make(folder, store.Key("onnx"), work).stored


def row(arch):
    return Target(
        name="here",
        backend="tvm",
        platform="linux",
        machine="x86_64",
        arch=arch,
        schemes=("int8-u8s8",),
        vs_onnx={"int8-u8s8": {"sqnr_db": 12}},
    )


@pytest.mark.skipif(find("tvm").missing(row("cascadelake")) is not None, reason="TVM can't build for x86-64 here")
def test_the_audit_says_what_runs_in_integers(tmp_path):
    model = stored(tmp_path / "onnx", pictures(3), ("batch", 3, 14, 14), ("batch", 24))
    target = row("cascadelake")
    engine = store.make(
        tmp_path / "engine", store.Key("engine"), lambda out: build(model, target, "int8-u8s8", out)
    ).stored
    (tmp_path / "audit").mkdir()

    audit(engine, model, target, "int8-u8s8", tmp_path / "audit")

    found = Audit.model_validate_json((tmp_path / "audit" / "audit.json").read_text())
    assert engine.artifact.facts["int8"] == 3
    assert found.int8_share == 1
    assert [row.runs_in for row in found.rows] == ["int8"] * 3


@pytest.mark.skipif(find("tvm").missing(row("x86-64-v3")) is not None, reason="TVM can't build for x86-64 here")
def test_a_processor_without_the_instruction_is_refused(tmp_path):
    model = stored(tmp_path / "onnx", product(24, 48), ("batch", "seq", 24), ("batch", "seq", 48))
    (tmp_path / "out").mkdir()

    with pytest.raises(BuildError, match="no dot products of uint8 with int8 on `x86-64-v3` \\(it has none"):
        build(model, row("x86-64-v3"), "int8-u8s8", tmp_path / "out")


@needs_emulator
@pytest.mark.parametrize("kind", ["product", "depthwise"])
def test_integers_on_an_emulated_board(tmp_path, kind):
    made = product(22, 40, np.int8) if kind == "product" else depthwise(24, (3, 3), 2, activations=np.int8)
    (batch, *rest), (result,) = (
        (("batch", "seq", 22) if kind == "product" else ("batch", 24, 15, 13)),
        made.graph.output,
    )
    shape = tuple(one.dim_param or one.dim_value for one in result.type.tensor_type.shape.dim)
    target = arm.row(arch="neoverse-n1", schemes=["int8-s8s8"], vs_onnx={"int8-s8s8": {"sqnr_db": 12}})
    model = stored(tmp_path / "onnx", made, (batch, *rest), shape)
    engine = store.make(
        tmp_path / "engine", store.Key("engine"), lambda out: build(model, target, "int8-s8s8", out)
    ).stored
    feed = np.random.default_rng(1).standard_normal([3 if isinstance(one, str) else one for one in (batch, *rest)])

    with backends.loaded(engine, target) as run:
        (found,) = run({"x": feed.astype(np.float32)}).values()

    assert engine.artifact.facts["int8"] == (1 if kind == "product" else 2)
    assert_near(found, as_written(made, feed.astype(np.float32)))

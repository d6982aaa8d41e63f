"""Engines that don't show what is inside: faults of their compilers, found by building them in parts."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline import backends, samples, store
from pipeline.errors import BuildError
from pipeline.explain import cutting
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Axis, Signature, TensorSpec, no_report
from tests import extras, miscompiling, small
from tests.contract.test_backends import row
from tests.models import BATCH, Entry
from tests.stage.test_quantize import Case, convnet, encoder

SIGNATURES = {
    "convnet": Signature(
        inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 3, 16, 16)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
        axes={"batch": Axis(min=1, opt=2, max=8)},
    ),
    "encoder": Signature(
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=("batch", "seq")) for name in ("ids", "mask")),
        outputs=(TensorSpec(name="hidden", dtype="float32", shape=("batch", "seq", 32)),),
        axes={"batch": Axis(min=1, opt=2, max=8), "seq": Axis(min=2, opt=8, max=16)},
    ),
}


def signed(stored, kind, folder):
    """`stored` with a signature, and with the shapes of all its tensors."""

    def work(out):
        model = onnx.load(stored.file("model.onnx"))
        onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), out / "model.onnx")
        store.write_json(out / "signature.json", SIGNATURES[kind].plain())
        return {}

    return store.make(folder, Key("onnx", {"model": stored.digest}), work).stored


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The recipe of a model of `test_quantize`, and one of its forms."""
    made = {}

    def form(kind, scheme="fp32"):
        if kind not in made:
            made[kind] = Case(tmp_path_factory.mktemp(kind), kind, {"convnet": convnet, "encoder": encoder}[kind]())
        case = made[kind]
        stored = case.fp32 if scheme == "fp32" else case.quantize(scheme)
        return case.recipe, signed(stored, kind, case.folder / f"signed-{scheme}")

    return form


def row_of(backend="onnxruntime", scheme="fp32", options=None):
    bounds = {"max_over_peak": 1e-4} if scheme == "fp32" else {"sqnr_db": 12}
    return row(backend, options or {}, schemes=[scheme], vs_onnx={scheme: bounds})


def engine_of(model, target, folder, scheme="fp32"):
    return store.make(folder, Key("engine"), lambda out: build(model, target, scheme, out)).stored


def explained(recipe, model, target, folder, scheme="fp32", engine=None, report=no_report):
    """What `departures` finds in the engine of `model`."""
    sizes = {name: axis.opt + 1 for name, axis in recipe.axes.items()}
    feeds = [samples.feeds(recipe, sizes, seed) for seed in (5, 6)]
    if "mask" in feeds[0]:
        feeds = [{**one, "mask": np.tri(*one["mask"].shape, 2, dtype=np.int64)} for one in feeds]
    engine = engine or engine_of(model, target, folder, scheme)
    return cutting.departures(recipe, model, engine, target, scheme, feeds, report)


def swapped(model):
    for node in miscompiling.nodes_of(model, "Transpose"):
        miscompiling.set_attribute(node, "perm", [0, 1, 2])
        node.op_type = "Identity"
        del node.attribute[:]


def unmasked(model):
    """Masked places are let through."""
    for node in miscompiling.nodes_of(model, "Where"):
        node.op_type = "Identity"
        node.input[:] = [node.input[1]]


def ahead(model):
    """The Add and the LayerNormalization behind it are fused to one that forgets what was added."""
    makers = {node.output[0]: node for node in model.graph.node}
    for node in miscompiling.nodes_of(model, "LayerNormalization"):
        maker = makers.get(node.input[0])
        if maker is not None and maker.op_type == "Add":
            node.input[0] = maker.input[0]


FAULTS = [
    ("convnet", miscompiling.wrong_bias("b1"), ["block_1"], "bias"),
    ("convnet", miscompiling.wrong_clamp(), ["stem", "stem_relu"], "fused wrongly"),
    ("convnet", miscompiling.wrong_clamp("w1"), ["block_1", "block_relu"], "fused wrongly"),
    ("encoder", miscompiling.softmax_over_the_wrong_axis, ["softmax"], "operator differs"),
    ("encoder", miscompiling.wrong_epsilon(0.1), ["norm"], "epsilon"),
    ("encoder", miscompiling.transposed("wo"), ["project_o"], "operator differs"),
    ("encoder", unmasked, ["masked"], "operator differs"),
    ("encoder", ahead, ["sum", "norm"], "fused wrongly"),
]
NAMES = ["bias", "clamp", "one_clamp", "axis", "epsilon", "transposed", "mask", "fused_sum"]


@pytest.mark.parametrize(("kind", "fault", "nodes", "what"), FAULTS, ids=NAMES)
def test_a_fault_of_the_compiler_is_named_to_the_operator(monkeypatch, forms, tmp_path, kind, fault, nodes, what):
    recipe, model = forms(kind)
    miscompiling.install(monkeypatch, fault)

    (found,), reason = explained(recipe, model, row_of(), tmp_path / "engine")

    assert reason is None
    assert (found.level, found.node, found.kind) == ("engine", nodes[0], what)
    assert found.own < found.allowed < found.before
    if len(nodes) > 1:
        assert all(f"`{name}`" in found.suggestion for name in nodes)


@pytest.mark.parametrize(("scheme", "kind"), [("int8-u8s8", "convnet"), ("int8-u8s8", "encoder"), ("fp16", "encoder")])
def test_forms_are_cut_so_that_their_kernels_stay(monkeypatch, forms, tmp_path, scheme, kind):
    recipe, model = forms(kind, scheme)
    fault, name = {
        "convnet": (wrong_scale, "block_2"),
        "encoder": (miscompiling.softmax_over_the_wrong_axis, "softmax"),
    }[kind]
    miscompiling.install(monkeypatch, fault)

    (found,), _ = explained(recipe, model, row_of(scheme=scheme), tmp_path / "engine", scheme)

    assert found.node == name
    if scheme.startswith("int8"):
        assert "one step of its scale" in found.because


def wrong_scale(model):
    """The convolution with the weight `w2` reads its weight with eight times its scale."""
    for node in miscompiling.nodes_of(model, "DequantizeLinear"):
        scale = miscompiling.constant(model, node.input[1])
        if scale is not None and node.input[0].startswith("w2"):
            miscompiling.set_constant(model, scale.name, miscompiling.number(model, scale.name) * 8)


@pytest.mark.parametrize("scheme", ["fp32", "int8-u8s8"])
@pytest.mark.parametrize("kind", ["convnet", "encoder"])
def test_a_healthy_engine_is_not_even_built_again(forms, tmp_path, kind, scheme):
    recipe, model = forms(kind, scheme)

    def never(done, total, what):
        pytest.fail(what)

    found = explained(recipe, model, row_of(scheme=scheme), tmp_path / "engine", scheme, report=never)

    assert found == ((), None)


def test_a_stale_engine_is_a_fault_of_its_file(forms, tmp_path):
    recipe, model = forms("convnet")
    other = miscompiling.altered(model, tmp_path / "other", miscompiling.wrong_bias("b0"))
    stale = engine_of(other, row_of(), tmp_path / "engine")

    (found,), _ = explained(recipe, model, row_of(), tmp_path / "engine", engine=stale)

    assert (found.kind, found.node, found.output) == ("file", "", "logits")
    assert f"remove `{stale.path}`" in found.suggestion


def short_table(model):
    """The table of rows has lost all but three, so that most indices are outside of it."""
    for node in miscompiling.nodes_of(model, "Gather"):
        if node.input[0] == "table":
            rows = miscompiling.number(model, "table")[:3]
            miscompiling.constant(model, "table").CopyFrom(onnx.numpy_helper.from_array(rows, "table"))


def test_a_part_that_fails_departs(monkeypatch, forms, tmp_path):
    recipe, model = forms("encoder")
    miscompiling.install(monkeypatch, short_table)

    (found,), _ = explained(recipe, model, row_of(), tmp_path / "engine")

    assert (found.node, found.kind, found.own) == ("embed", "fails", -np.inf)
    assert "fails: " in found.because


def test_progress_says_how_many_parts_there_may_be(monkeypatch, forms, tmp_path):
    recipe, model = forms("encoder")
    miscompiling.install(monkeypatch, miscompiling.wrong_epsilon(0.1))
    said = []

    explained(recipe, model, row_of(), tmp_path / "engine", report=lambda *step: said.append(step))

    done, total, what = said[0]
    assert (done, what) == (1, f"part 1 of about {total}: 14 operators")
    assert len(said) <= total


def test_a_row_of_another_machine_says_why(forms, tmp_path):
    recipe, model = forms("convnet")
    engine = engine_of(model, row_of(), tmp_path / "engine")
    elsewhere = row_of().model_copy(update={"machine": "riscv64", "arch": "generic"})

    found, reason = explained(recipe, model, elsewhere, tmp_path / "engine", engine=engine)

    assert found == ()
    assert "this host can't" in reason


# --- other backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8-u8s8"])
def test_openvino(monkeypatch, forms, tmp_path, scheme):
    extras.need("openvino", "openvino")
    recipe, model = forms("encoder", scheme)
    miscompiling.install(monkeypatch, miscompiling.softmax_over_the_wrong_axis, "openvino")

    (found,), _ = explained(recipe, model, row_of("openvino", scheme), tmp_path / "engine", scheme)

    assert found.node == "softmax"


@pytest.mark.slow
def test_tvm(monkeypatch, forms, tmp_path):
    extras.need("tvm", "tvm")
    recipe, model = forms("convnet")
    miscompiling.install(monkeypatch, miscompiling.wrong_clamp("w1"), "tvm")

    (found,), _ = explained(recipe, model, row_of("tvm"), tmp_path / "engine")

    assert found.node == "block_1"


def chosen():
    """Two rows of scores [batch, 3] -> the largest one's place [batch, 1], after a sum that a compiler may round."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("Add", ["x", "ones"], ["sum"], name="sum"),
        node("Exp", ["sum"], ["exp"], name="exp"),
        node("TopK", ["exp", "one"], ["best", "place"], name="choice"),
    ]
    ones = onnx.numpy_helper.from_array(np.ones(3, np.float32), "ones")
    one = onnx.numpy_helper.from_array(np.ones(1, np.int64), "one")
    graph = onnx.helper.make_graph(
        nodes,
        "chosen",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [value("place", onnx.TensorProto.INT64, ["batch", 1])],
        [ones, one],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def rounded(model):
    """What is added is a little more for one of the three."""
    if miscompiling.constant(model, "ones") is not None:
        miscompiling.set_constant(model, "ones", [1, 1 + 1e-6, 1])


def test_a_choice_between_almost_equal_values_is_nobodys_fault(monkeypatch, tmp_path):
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="place", dtype="int64", shape=("batch", 1)),),
        axes={"batch": Axis(min=1, opt=2, max=8)},
    )

    def work(out):
        onnx.save(chosen(), out / "model.onnx")
        store.write_json(out / "signature.json", signature.plain())
        return {}

    model = store.make(tmp_path / "model", Key("onnx"), work).stored
    recipe = small.recipe_of(ROWS, outputs=[{"name": "place", "kind": "indices"}])
    miscompiling.install(monkeypatch, rounded)
    engine = engine_of(model, row_of(), tmp_path / "engine")
    feeds = {"x": np.array([[0.5, 0.5, 0.25], [0, 1, 2]], np.float32)}

    (found,), _ = cutting.departures(recipe, model, engine, row_of(), "fp32", [feeds], no_report)

    assert (found.node, found.kind) == ("choice", "near tie")
    assert "argmax_agreement" in found.suggestion


def test_what_can_not_be_built_alone_is_told_together(monkeypatch, forms, tmp_path):
    recipe, model = forms("convnet")
    fault = miscompiling.wrong_clamp("w1")

    def stubborn(model):
        if len(model.graph.node) < 5:
            raise BuildError("it wants at least five")
        fault(model)

    miscompiling.install(monkeypatch, stubborn)

    (found,), _ = explained(recipe, model, row_of(), tmp_path / "engine")

    assert found.kind == "one of several"
    assert "Conv `block_1`, Relu `block_relu`" in found.suggestion
    assert "it wants at least five" in found.suggestion


class Rows(nn.Module):
    """[batch, 4, 8] -> [batch, 4], [batch, 4]: the largest of each row after some layers, and where it is."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        shares = torch.softmax(self.second(torch.relu(self.norm(self.first(x)))), dim=-1)
        best = shares.reshape(-1, 8).max(dim=-1)
        return best.values.reshape(x.shape[0], 4), best.indices.reshape(x.shape[0], 4)


ROWS = Entry("Rows", Rows, [("x", "float32", ["batch", 4, 8], [-2.0, 2.0])], ["best", "where"], BATCH)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    recipe = small.recipe_of(ROWS, factory=f"{__name__}:Rows")
    return recipe, small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", ROWS))


def other_program(change, stored, folder):
    """The program of `stored` after `change` of its graph module."""
    from pipeline import program as programs

    def work(out):
        loaded = programs.load(stored.file(programs.FILE))
        change(loaded.graph_module)
        loaded.graph_module.recompile()
        programs.save(loaded, out / programs.FILE, out)
        shutil.copyfile(stored.file("signature.json"), out / "signature.json")
        return {}

    return store.make(folder, Key("program", {"altered": stored.digest}), work).stored


def colder_softmax(module):
    for node in module.graph.nodes:
        if node.op == "call_function" and "softmax" in str(node.target):
            node.args = (node.args[0], 0, *node.args[2:])


def test_programs_are_cut_too(monkeypatch, rows, tmp_path):
    recipe, program = rows
    real, target = backends.find("torchscript"), row_of("torchscript")

    class Wrong:
        def __getattr__(self, name):
            return getattr(real, name)

        def build(self, model, target, out):
            return real.build(other_program(colder_softmax, model, out.parent / f"{out.name}-wrong"), target, out)

    monkeypatch.setattr(backends, "find", lambda name: Wrong())

    (found,), reason = explained(recipe, program, target, tmp_path / "engine")

    assert reason is None
    assert (found.operator, found.node) == ("aten.softmax.int", "softmax")
    assert found.line.startswith("tests/stage/test_cutting.py:")

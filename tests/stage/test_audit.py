"""What runs in INT8, read from engines of small graphs whose compute is counted by hand here."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pipeline import audit as audits
from pipeline import choice, samples
from pipeline.macs import UnclearError
from pipeline.stages.audit import audit
from pipeline.stages.build import build
from pipeline.store import Key, Stored, make
from pipeline.types import Audit, Signature, Target
from tests.stage import test_quantize as small
from tests.stage.test_quantize import convnet, encoder, model, weight

# multiply-accumulates of `convnet` at batch 2: outputs times what each is a sum of
MACS = {
    "stem": 2 * 16 * 16 * 16 * 27,
    "block_1": 2 * 16 * 8 * 8 * 144,
    "block_2": 2 * 16 * 8 * 8 * 144,
    "depthwise": 2 * 16 * 8 * 8 * 9,
    "head": 2 * 10 * 16,
}
MODULES = {name: f"body.{name}" for name in MACS}


def row(backend: str = "onnxruntime", **options: str) -> Target:
    return Target.model_validate(
        {
            "name": "t",
            "backend": backend,
            "platform": "any",
            "machine": "any",
            "arch": "generic",
            "schemes": ["fp32"],
            "vs_onnx": {"fp32": {"cosine": 0}},
            "options": options,
        }
    )


def signed(case: small.Case, folder: Path, graph: Stored) -> Stored:
    """`graph` with a real signature, and with notes on the modules that its nodes came from."""
    proto = onnx.load(graph.file("model.onnx"))
    for node in proto.graph.node:
        if node.name in MODULES:
            scopes = str(["", "model", f"model.body.{node.name}", node.name])
            node.metadata_props.append(onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=scopes))
    signature = Signature.model_validate(
        {
            "inputs": [{"name": i.name, "dtype": i.dtype, "shape": i.shape} for i in case.recipe.inputs],
            "outputs": [{"name": o.name, "dtype": "float32", "shape": []} for o in case.recipe.outputs],
            "axes": case.recipe.axes,
        }
    )

    def work(out: Path):
        onnx.save(proto, out / "model.onnx")
        (out / "signature.json").write_text(signature.model_dump_json())
        return {}

    return make(folder / f"signed-{graph.path.name}", Key("onnx"), work).stored


def audited(folder: Path, source: Stored, scheme: str, target: Target) -> Audit:
    name = f"{source.path.name}-{'-'.join(map(str, target.options.values()))}"
    engine = make(folder / f"e-{name}", Key("engine"), lambda out: build(source, target, scheme, out)).stored
    found = make(folder / f"a-{name}", Key("audit"), lambda out: audit(engine, source, target, scheme, out))
    return Audit.model_validate_json(found.stored.file("audit.json").read_text())


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return small.Case(tmp_path_factory.mktemp("convnet"), "convnet", convnet())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return small.Case(tmp_path_factory.mktemp("encoder"), "encoder", encoder())


@pytest.mark.parametrize("level", ["extended", "all"])
def test_a_convnet_in_int8_computes_in_int8_alone(case, tmp_path, level):
    source = signed(case, tmp_path, case.quantize("int8-u8s8"))
    found = audited(tmp_path, source, "int8-u8s8", row(optimization=level))
    assert found.int8_share == 1
    assert {one.node: one.macs for one in found.rows} == MACS
    assert {one.node: one.module for one in found.rows} == MODULES
    assert {one.runs_in for one in found.rows} == {"int8"}
    assert found.sizes == {"batch": 2}


@pytest.mark.parametrize("level", ["extended", "all"])
@pytest.mark.parametrize("name", MACS)
def test_an_operator_left_in_float_takes_its_compute_from_the_share(case, tmp_path, name, level):
    source = signed(case, tmp_path, case.quantize("int8-u8s8", f"without-{name}-{tmp_path.name}", exclude=(name,)))
    found = audited(tmp_path, source, "int8-u8s8", row(optimization=level))
    assert found.int8_share == pytest.approx(1 - MACS[name] / sum(MACS.values()), abs=1e-12)
    floats = [one for one in found.rows if one.runs_in == "fp32"]
    assert [(one.module, one.macs) for one in floats] == [(f"body.{name}", MACS[name])]
    assert not floats[0].fell_back  # it was asked to


def test_a_device_leaves_in_float_what_the_scheme_did(case, tmp_path):
    # by its default settings ONNX Runtime quantises such an operator's weights when it loads the engine
    source = signed(case, tmp_path, case.quantize("int8-u8s8", "kept", exclude=("block_1",)))
    target = row(optimization="extended")
    engine = make(tmp_path / "engine", Key("engine"), lambda out: build(source, target, "int8-u8s8", out)).stored
    feeds = samples.feeds(case.recipe, {"batch": 3}, 5)

    def answer(path, **settings):
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], **settings).run(None, feeds)[0]

    asked = answer(source.file("model.onnx"), disabled_optimizers=["WeightBiasQuantization"])
    assert np.abs(answer(engine.file("model.onnx")) - asked).max() < 1e-6
    assert np.abs(answer(source.file("model.onnx")) - asked).max() > 1e-4, "there is nothing to be kept from here"


def test_an_operator_that_the_runtime_left_unfused_fell_back(case, tmp_path):
    # on x86 signed activations become unsigned ones, which takes the pairs around one convolution apart
    source = signed(case, tmp_path, case.quantize("int8-s8s8"))
    found = audited(tmp_path, source, "int8-s8s8", row(optimization="extended"))
    fallen = [one for one in found.rows if one.fell_back]
    assert [(one.module, one.operator, one.runs_in) for one in fallen] == [("body.block_1", "Conv", "fp32")]
    assert found.int8_share == pytest.approx(1 - MACS["block_1"] / sum(MACS.values()), abs=1e-12)


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_floats_are_no_int8(case, tmp_path, scheme):
    source = signed(case, tmp_path, case.fp32 if scheme == "fp32" else case.quantize("fp16"))
    found = audited(tmp_path, source, scheme, row(optimization="all"))
    assert found.int8_share == 0
    assert {one.node: one.macs for one in found.rows} == MACS


@pytest.mark.parametrize("scheme", ["int8-u8s8", "int8-dynamic"])
def test_products_of_two_activations_stay_in_float_in_a_transformer(texts, tmp_path, scheme):
    source = signed(texts, tmp_path, texts.quantize(scheme))
    found = audited(tmp_path, source, scheme, row(optimization="extended"))
    assert {one.node for one in found.rows if one.runs_in == "fp32"} == {"scores", "mix"}
    tokens, width, seq = 2 * 8, 32, 8
    attention = 2 * tokens * width * seq
    weights = tokens * (4 * width * width + 2 * width * 64)
    assert found.int8_share == pytest.approx(weights / (weights + attention))
    assert not any(one.fell_back for one in found.rows)


def test_what_nobody_can_look_into_is_not_audited(case, tmp_path):
    source = signed(case, tmp_path, case.quantize("int8-u8s8"))
    flat = audited(tmp_path, source, "int8-u8s8", row(format="ort"))
    assert (flat.int8_share, flat.rows) == (None, ())
    assert flat.not_audited == "a graph in the `.ort` format can't be looked into"
    other = audited(tmp_path, signed(case, tmp_path, case.fp32), "fp32", row("echo"))
    assert other.int8_share is None
    assert other.not_audited == "engines of backend `echo` don't say what they run in"


def test_compute_inside_a_loop_is_not_guessed(case, tmp_path):
    def body(name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("MatMul", ["x", "w"], [name], name=f"in_{name}")], name, [], [value])

    branches = {"then_branch": body("yes"), "else_branch": body("no")}
    proto = model(
        [helper.make_node("If", ["which"], ["out"], name="choice", **branches)],
        [("x", TensorProto.FLOAT, [2, 4]), ("which", TensorProto.BOOL, [])],
        [("out", TensorProto.FLOAT, [2, 4])],
        [weight("w", 4, 4)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    empty = Signature(inputs=(), outputs=(), axes={})
    with pytest.raises(UnclearError, match="`choice` \\(If\\) multiplies inside its body"):
        audits.audit(path, path, empty)


def test_a_share_that_a_recipe_asks_for():
    def found(share: float | None, scheme: str = "int8-u8s8", why: str | None = None) -> Audit:
        return Audit(target="t", scheme=scheme, int8_share=share, not_audited=why)

    assert choice.too_little_int8(found(0.5), None) is None
    assert choice.too_little_int8(found(0.5), 0.5) is None
    assert choice.too_little_int8(found(0.0, "fp32"), 0.5) is None
    assert choice.too_little_int8(found(0.354), 0.8) == ("runs 35.4% of its compute in INT8, the recipe asks for 80.0%")
    assert choice.too_little_int8(found(None, why="it is closed"), 0.8) == (
        "can't be shown to run 80.0% of its compute in INT8: it is closed"
    )


def test_counting_needs_no_static_shapes(tmp_path):
    """A shape that inference can't find, since it depends on values, is measured."""
    node = helper.make_node
    proto = model(
        [
            node("NonZero", ["flags"], ["places"], name="places"),
            node("Transpose", ["places"], ["rows"], name="rows", perm=[1, 0]),
            node("GatherND", ["x", "rows"], ["some"], name="some"),
            node("MatMul", ["some", "w"], ["out"], name="product"),
        ],
        [("x", TensorProto.FLOAT, ["n", 4]), ("flags", TensorProto.INT64, ["n"])],
        [("out", TensorProto.FLOAT, ["k", 6])],
        [weight("w", 4, 6)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    inputs = [{"name": "x", "dtype": "float32", "shape": ["n", 4]}, {"name": "flags", "dtype": "int64", "shape": ["n"]}]
    axes = {"n": {"min": 1, "opt": 5, "max": 9}}
    signature = Signature.model_validate({"inputs": inputs, "outputs": [], "axes": axes})
    (row_,) = audits.audit(path, path, signature)
    assert (row_.macs, row_.runs_in) == (5 * 4 * 6, "fp32")
    assert audits.int8_share([row_]) == 0

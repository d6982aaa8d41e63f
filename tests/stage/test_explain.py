"""Faults planted by hand in engines and forms of small models: the very operator is named, and nobody else accused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import calibrate, half, samples
from pipeline.explain import engine as explain_engine
from pipeline.explain import form as explain_form
from pipeline.graph import Graph
from pipeline.stages.quantize import FORMS, STATISTICS
from tests import faults
from tests.stage import test_quantize as small
from tests.stage.test_quantize import Case, convnet, encoder, model, weight

SCHEMES = ("fp32", "int8-u8s8", "int8-u8u8", "int8-s8s8", "int8-dynamic")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Both models, calibrated once."""
    return {
        "convnet": Case(tmp_path_factory.mktemp("convnet"), "convnet", convnet()),
        "encoder": Case(tmp_path_factory.mktemp("encoder"), "encoder", encoder()),
    }


def form_of(case: Case, scheme: str) -> Path:
    stored = case.fp32 if scheme == "fp32" else case.quantize(scheme)
    return stored.file("model.onnx")


def feeds_of(case: Case) -> list[dict[str, np.ndarray]]:
    """At the least and at odd sizes; some of the tokens are padding."""
    found = []
    for seed, sizes in enumerate(
        ({axis: one.min for axis, one in case.recipe.axes.items()}, dict.fromkeys(case.recipe.axes, 5))
    ):
        drawn = samples.feeds(case.recipe, sizes, seed)
        if "mask" in drawn:
            drawn["mask"][:, -1] = 0
        found.append(drawn)
    return found


def engine_of(path: Path) -> onnx.ModelProto:
    return explain_engine.as_run(path, path, finished=False)


def of_form(case: Case, scheme: str, form: onnx.ModelProto, fp32: onnx.ModelProto):
    static = scheme in small.STATIC
    seen = calibrate.load(case.statistics.file(STATISTICS)) if static else {}
    return explain_form.departures(form, fp32, FORMS.get(scheme), feeds_of(case), seen)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_nothing_departs_where_all_is_right(cases, name, scheme):
    path = form_of(cases[name], scheme)
    form = onnx.load(path)
    found, layers, compared = explain_engine.departures(engine_of(path), form, feeds_of(cases[name]))
    assert [(one.node, one.own, one.allowed, one.because) for one in found] == []
    assert compared == len(layers) >= 9
    if scheme != "fp32":
        found, _, compared = of_form(cases[name], scheme, form, onnx.load(form_of(cases[name], "fp32")))
        assert [(one.node, one.own, one.allowed, one.because) for one in found] == []
        assert compared >= 9


NONE = {  # what has no operator that could have the fault
    *(("scale off by 2", "convnet", "fp32"), ("wrong resize mode", "convnet", "int8-u8s8")),
    *((fault, name, "fp32") for fault in ("wrong zero point", "saturating range") for name in ("convnet", "encoder")),
    *((fault, "convnet", "int8-u8s8") for fault in ("dropped mask", "wrong epsilon", "fused op differs")),
    *(("wrong resize mode", "encoder", scheme) for scheme in ("fp32", "int8-u8s8")),
}
PLACES = [
    (fault, name, scheme)
    for fault in faults.PLANTS
    for name in ("convnet", "encoder")
    for scheme in ("fp32", "int8-u8s8")
    if (fault, name, scheme) not in NONE
]


@pytest.mark.parametrize(("fault", "name", "scheme"), PLACES)
def test_the_very_operator_of_an_engine_is_named(cases, fault, name, scheme):
    path = form_of(cases[name], scheme)
    form, engine = onnx.load(path), engine_of(path)
    wanted = faults.PLANTS[fault](engine, form)
    found, _, _ = explain_engine.departures(engine, form, feeds_of(cases[name]))
    assert found
    assert found[0].node in wanted, found[0]
    assert found[0].level == "engine"
    assert found[0].own < found[0].allowed
    assert found[0].suggestion
    assert len(found) == 1, [one.node for one in found]


@pytest.mark.parametrize("fault", faults.FORM_PLANTS)
@pytest.mark.parametrize("scheme", ["int8-u8s8", "int8-s8s8"])
@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_the_very_operator_of_a_form_is_named(cases, fault, name, scheme):
    form, fp32 = (onnx.load(form_of(cases[name], one)) for one in (scheme, "fp32"))
    wanted = faults.FORM_PLANTS[fault](form, fp32)
    found, _, _ = of_form(cases[name], scheme, form, fp32)
    assert found[0].node in wanted, found[0]
    assert found[0].level == "form"
    kinds = {"saturating range": {"range saturates"}, "wrong zero point": {"zero point"}, "scale off by 2": {"scale"}}
    assert found[0].kind in kinds[fault]


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_an_overflow_of_float16_is_told_from_its_rounding(cases, name):
    fp32 = onnx.load(form_of(cases[name], "fp32"))
    rounded = onnx.ModelProto()
    rounded.CopyFrom(fp32)
    half.convert(Graph(rounded))
    assert of_form(cases[name], "fp16", rounded, fp32)[0] == ()
    wanted = faults.overflow(fp32)
    form = onnx.ModelProto()
    form.CopyFrom(fp32)
    half.convert(Graph(form))
    found, _, _ = of_form(cases[name], "fp16", form, fp32)
    assert [(one.node in wanted, one.kind) for one in found] == [(True, "overflow")]
    assert "fp16" in found[0].suggestion


def resized() -> onnx.ModelProto:
    """Images [batch, 3, 16, 16] -> [batch, 8, 32, 32]: a Resize between two convolutions."""
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["c0", "", "double"], ["up"], name="resize", mode="nearest", nearest_mode="floor"),
        helper.make_node("Conv", ["up", "w1"], ["logits"], name="second", pads=[1, 1, 1, 1]),
    ]
    nodes[1].attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    double = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "double")
    return model(
        nodes,
        [("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [("logits", TensorProto.FLOAT, ["batch", 8, 32, 32])],
        [weight("w0", 16, 3, 3, 3), weight("w1", 8, 16, 3, 3), double],
    )


def test_a_resize_of_another_mode_is_named(tmp_path):
    form = resized()
    path = tmp_path / "model.onnx"
    onnx.save(form, path)
    feeds = [{"image": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}]
    engine = engine_of(path)
    assert explain_engine.departures(engine, form, feeds)[0] == ()
    assert faults.wrong_pooling(engine, form) == {"resize"}
    found, _, _ = explain_engine.departures(engine, form, feeds)
    assert [(one.node, one.kind) for one in found] == [("resize", "resize")]


def test_an_engine_that_was_right_elsewhere_is_read_as_it_is(cases):
    # a portable engine gets its layout where it is loaded; one that has its layout keeps it
    path = form_of(cases["convnet"], "fp32")
    operators = {node.domain for node in explain_engine.as_run(path, path, finished=True).graph.node}
    assert operators == {""}
    assert "com.microsoft.nchwc" in {node.domain for node in engine_of(path).graph.node}

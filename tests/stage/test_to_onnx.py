"""To ONNX: names, opset, metadata, external data, and operators that ONNX doesn't have."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline import pins
from pipeline.errors import ConversionError, RecipeError
from pipeline.stages.to_onnx import to_onnx
from pipeline.store import Key, make
from tests import small

COLLIDE = small.by_name("NamesCollide")


@pytest.fixture
def convert(tmp_path):
    """Converts an entry of the catalogue; `inline_bytes` forces external data."""

    def run(entry, where="onnx", inline_bytes=None, **changes):
        recipe = small.recipe_of(entry, **changes)
        program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", entry))
        limit = {} if inline_bytes is None else {"inline_bytes": inline_bytes}
        return make(tmp_path / where, Key("onnx"), lambda out: to_onnx(recipe, program, out, **limit)).stored

    return run


def load(model) -> onnx.ModelProto:
    return onnx.load(model.file("model.onnx"))


def test_names_are_unique_and_dimensions_have_axis_names(convert):
    graph = load(convert(small.by_name("DerivedSizes"))).graph
    dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info]
    assert ["2*batch", "seq"] in dims
    assert not [dim for shape in dims for dim in shape if isinstance(dim, str) and dim.startswith("s") and dim != "seq"]


def test_an_output_may_have_the_name_of_an_internal_value(convert):
    graph = load(convert(COLLIDE)).graph
    made = [name for node in graph.node for name in node.output]
    every = [*made, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)]
    assert len(set(every)) == len(every)
    assert {"relu", "add", "linear_1"} <= set(made)
    assert {"one.bias", "one.weight", "two.bias", "two.weight"} <= {tensor.name for tensor in graph.initializer}


def test_nodes_say_which_module_they_come_from_and_nothing_of_this_machine(convert):
    model = convert(COLLIDE)
    gemm = next(node for node in load(model).graph.node if node.op_type == "Gemm")
    props = {prop.key: prop.value for prop in gemm.metadata_props}
    assert "model.one" in props["pkg.torch.onnx.name_scopes"]
    assert 'File "tests/models.py"' in props["pkg.torch.onnx.stack_trace"]
    assert b"/site-packages" not in model.file("model.onnx").read_bytes()
    assert str(small.__file__).removesuffix("small.py").encode() not in model.file("model.onnx").read_bytes()


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_opset_is_the_recipes(opset, convert):
    model = convert(small.by_name("MaskedAttention"), opset=opset)
    assert {one.domain: one.version for one in load(model).opset_import}[""] == opset
    assert model.artifact.facts["opset"] == opset


def test_large_weights_go_beside_the_graph(convert):
    inline = convert(small.by_name("ConvBatchNorm"))
    beside = convert(small.by_name("ConvBatchNorm"), "beside", inline_bytes=100)
    assert set(inline.artifact.files) == {"model.onnx", "signature.json"}
    assert set(beside.artifact.files) == {"model.onnx", "model.onnx.data", "signature.json"}
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    one, two = (onnxruntime.InferenceSession(m.file("model.onnx")).run(None, feeds)[0] for m in (inline, beside))
    np.testing.assert_array_equal(one, two)


def test_shared_weights_stay_shared(convert):
    model = convert(small.by_name("SharedWeights"))
    assert model.artifact.facts["parameter_bytes"] < 2 * 60 * 4
    sizes = [np.prod(tensor.dims) for tensor in load(model).graph.initializer]
    assert sizes.count(60) == 1


def test_folding_batch_norm_keeps_each_bias(convert):
    """The exporter's optimizer once gave a convolution the bias of another one (pytorch 166797)."""
    model = convert(small.by_name("ConvBatchNorm"))
    assert "BatchNormalization" not in model.artifact.facts["operators"]
    graph = load(model).graph
    biases = [node.input[2] for node in graph.node if node.op_type == "Conv"]
    assert len(set(biases)) == 3
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    want = small.seeded(small.by_name("ConvBatchNorm"))(x).detach().numpy()
    got = onnxruntime.InferenceSession(model.file("model.onnx")).run(None, {"x": x.numpy()})[0]
    small.assert_near(want, got, "three convolutions")


def test_facts_count_operators(convert):
    facts = convert(COLLIDE).artifact.facts
    assert facts["operators"] == {"Add": 1, "Gemm": 2, "Relu": 1}
    assert facts["nodes"] == 4
    assert facts["checked"] == "onnx.checker, ONNX Runtime"


# operators of the user's own


def test_a_translation_for_an_unknown_operator_is_refused(convert, tmp_path):
    (tmp_path / "misspelt.py").write_text("def table():\n    return {'catalogue::twice_plsu': len}\n")
    with pytest.raises(RecipeError, match=r"names the operator `catalogue::twice_plsu`[\s\S]*`catalogue::twice_plus`"):
        convert(
            small.by_name("CustomOperator"),
            translations="misspelt:table",
            folder=tmp_path,
            root=tmp_path,
            factory=FACTORY,
        )


def test_translations_must_be_a_table(convert, tmp_path):
    (tmp_path / "nothing.py").write_text("def table():\n    return None\n")
    with pytest.raises(RecipeError, match=r"returned a NoneType"):
        convert(
            small.by_name("CustomOperator"),
            translations="nothing:table",
            folder=tmp_path,
            root=tmp_path,
            factory=FACTORY,
        )


FACTORY = "tests.models:CustomOperator"


def test_an_exporter_that_breaks_is_one_message(convert, monkeypatch):
    def broken(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("step 3 failed\nwith a long text") from KeyError("inside")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ConversionError, match=r"the ONNX exporter failed: KeyError: 'inside'") as raised:
        convert(COLLIDE)
    assert raised.value.hint


def test_an_invalid_graph_is_refused(convert, monkeypatch):
    def spoil(model, *_):
        model.graph.node(0).op_type = "NoSuchOperator"

    monkeypatch.setattr(pins, "pin", spoil)
    with pytest.raises(ConversionError, match="the exported graph is not valid"):
        convert(COLLIDE)

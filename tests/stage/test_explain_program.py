"""Where a graph stops being its program: faults of conversion that are put into graphs, and graphs without any."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from pipeline.explain import program as explain_program
from pipeline.explain.program import departures
from pipeline.stages import to_onnx
from pipeline.store import Key, make
from tests import extras, small
from tests.models import BATCH, CATALOGUE, Entry


class Mixed(nn.Module):
    """Images [batch, 2, 6, 6] -> [batch, 5], through one operator of each kind that faults are put into."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 4, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        features = torch.relu(self.conv(x))
        features = self.batch_norm(self.wide(features))
        features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        rows = self.norm(features.mean(dim=1))
        scores = torch.softmax(rows @ rows.transpose(1, 2), dim=-1)
        hidden = F.gelu(self.hidden(scores @ rows))
        return self.head(hidden).mean(dim=1)


MIXED = Entry("Mixed", Mixed, [("x", "float32", ["batch", 2, 6, 6], [-1.0, 1.0])], ["out"], BATCH)
FACTORY = f"{__name__}:Mixed"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Recipe, program and graph of `Mixed`, which is broken down once."""
    root = tmp_path_factory.mktemp("mixed")
    recipe = small.recipe_of(MIXED, factory=FACTORY)
    program = small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", MIXED))
    graph, once = small.converted(root / "onnx", recipe, program), explain_program.decomposed(recipe, program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_program, "decomposed", lambda recipe, program: once)
        yield recipe, program, graph


def altered(stored, folder, change):
    """The graph of `stored` after `change`, as an artifact in `folder`."""

    def work(out):
        model = onnx.load(stored.file("model.onnx"))
        change(model)
        onnx.save(model, out / "model.onnx")
        (out / "signature.json").write_bytes(stored.file("signature.json").read_bytes())
        return {}

    return make(folder, Key("onnx", {"altered": stored.digest}), work).stored


def node_of(model, operator, place=0):
    return [node for node in model.graph.node if node.op_type == operator][place]


def constant_of(model, name):
    return next(one for one in model.graph.initializer if one.name == name)


def set_attribute(node, name, value):
    for found in [one for one in node.attribute if one.name == name]:
        node.attribute.remove(found)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def set_constant(model, name, value):
    constant_of(model, name).CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def number(model, name):
    return numpy_helper.to_array(constant_of(model, name))


def wrong_resize(model):
    set_attribute(node_of(model, "Resize"), "coordinate_transformation_mode", "align_corners")


def nearest_resize(model):
    set_attribute(node_of(model, "Resize"), "mode", "nearest")


def wrong_epsilon(model):
    set_attribute(node_of(model, "LayerNormalization"), "epsilon", 1e-4)


def wrong_axis(model):
    set_attribute(node_of(model, "Softmax"), "axis", 1)


def wrong_bias(model):
    bias = number(model, "conv.bias").copy()
    bias[2] += 1e-3
    set_constant(model, "conv.bias", bias)


def stale_weight(model):
    set_constant(model, "conv.weight", number(model, "conv.weight") * 1.001)


def transposed_weight(model):
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and _fixed(model, node, (12, 12)))
    set_constant(model, node.input[1], number(model, node.input[1]).T)


def _fixed(model, node, shape):
    return any(one.name == node.input[1] and tuple(one.dims) == shape for one in model.graph.initializer)


def wrong_gelu(model):
    set_attribute(node_of(model, "Gelu"), "approximate", "tanh")


def wrong_batch_norm(model):
    """As if the epsilon that was folded into the convolution had been 1e-3, and not 1e-5."""
    node = node_of(model, "Conv", 1)
    set_constant(model, node.input[1], number(model, node.input[1]) * np.sqrt(1.00001 / 1.001))


FAULTS = [
    (wrong_resize, "Resize", "", "resize"),
    (nearest_resize, "Resize", "", "resize"),
    (wrong_epsilon, "LayerNormalization", "norm", "epsilon"),
    (wrong_axis, "Softmax", "", "layout"),  # of a symmetric matrix
    (wrong_bias, "Conv", "conv", "bias"),
    (stale_weight, "Conv", "conv", "weights differ"),
    (transposed_weight, "MatMul", "hidden", "operator differs"),
    (wrong_gelu, "Gelu", "", "operator differs"),
    (wrong_batch_norm, "Conv", "batch_norm", "scale"),
]


@pytest.mark.parametrize(("fault", "operator", "module", "kind"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_fault_is_named_to_the_operator(mixed, tmp_path, fault, operator, module, kind):
    recipe, program, graph = mixed

    found = departures(recipe, program, altered(graph, tmp_path / "graph", fault), [small.feeds(recipe, {"batch": 3})])

    assert [(one.level, one.operator, one.module, one.kind) for one in found] == [
        ("conversion", operator, module, kind)
    ]
    assert found[0].own < found[0].allowed


def test_the_error_before_and_after_is_told(mixed, tmp_path):
    recipe, program, graph = mixed
    wrong = altered(graph, tmp_path / "graph", wrong_resize)

    (found,) = departures(recipe, program, wrong, [small.feeds(recipe, {"batch": 3})])

    assert found.before > 100
    assert found.after == pytest.approx(found.own, abs=1)
    assert found.line.startswith("tests/stage/test_explain_program.py:")


def test_two_faults_are_both_found_in_order(mixed, tmp_path):
    recipe, program, graph = mixed

    def change(model):
        wrong_axis(model)
        wrong_bias(model)

    found = departures(recipe, program, altered(graph, tmp_path / "graph", change), [small.feeds(recipe, {"batch": 2})])

    assert [one.operator for one in found] == ["Conv", "Softmax"]
    assert found[1].before < 100  # it inherits, and adds of its own


def healthy(name, folder, monkeypatch):
    """What is found in the graph of an entry of the catalogue as it was exported."""
    monkeypatch.setattr(explain_program, "decomposed", to_onnx.decomposed)
    entry = small.by_name(name)
    recipe = small.recipe_of(entry)
    program = small.captured(folder / "program", recipe, small.checkpoint(folder / "checkpoint", entry))
    graph = small.converted(folder / "onnx", recipe, program)
    sizes = {axis: bounds["opt"] for axis, bounds in entry.axes.items()}
    return departures(recipe, program, graph, [small.feeds(recipe, sizes)])


FEW = ["ConvBatchNorm", "NamesCollide", "MaskedAttention", "TopK", "ScalarInput", "HalfPrecision"]
MANY = [entry.name for entry in CATALOGUE if entry.fails is None and entry.name not in FEW]


@pytest.mark.parametrize("name", FEW)
def test_a_graph_as_it_was_exported_departs_nowhere(name, tmp_path, monkeypatch):
    assert healthy(name, tmp_path, monkeypatch) == ()


@extras.thorough
@pytest.mark.parametrize("name", MANY)
def test_no_graph_of_the_catalogue_departs(name, tmp_path, monkeypatch):
    assert healthy(name, tmp_path, monkeypatch) == ()

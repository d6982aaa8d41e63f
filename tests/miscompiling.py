"""A backend that compiles some operators to something else, and is another one in all other respects."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pipeline import backends, store
from pipeline.store import Key

Change = Callable[[onnx.ModelProto], None]


@dataclasses.dataclass(frozen=True)
class Miscompiling:
    """`inner`, which is given each graph after `change`; see `pipeline.types.Backend`."""

    inner: object
    change: Change

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def build(self, model, target, out):
        with tempfile.TemporaryDirectory() as folder:
            return self.inner.build(altered(model, Path(folder) / "model", self.change), target, out)


def altered(stored, folder, change):
    """The graph of `stored` after `change`, as an artifact in `folder`."""

    def work(out):
        model = onnx.load(stored.file("model.onnx"))
        change(model)
        onnx.save(model, out / "model.onnx")
        (out / "signature.json").write_bytes(stored.file("signature.json").read_bytes())
        return stored.artifact.facts

    return store.make(folder, Key("onnx", {"altered": stored.digest}), work).stored


def install(monkeypatch, change, name="onnxruntime"):
    """Let the backend `name` be one that compiles what `change` changes to something else."""
    wrong, real = Miscompiling(backends.find(name), change), backends.find
    monkeypatch.setattr(backends, "find", lambda asked: wrong if asked == name else real(asked))


# --- faults --------------------------------------------------------------------------------------------------------


def nodes_of(model, operator):
    return [node for node in model.graph.node if node.op_type == operator]


def set_attribute(node, name, value):
    for found in [one for one in node.attribute if one.name == name]:
        node.attribute.remove(found)
    node.attribute.append(helper.make_attribute(name, value))


def constant(model, name):
    return next((one for one in model.graph.initializer if one.name == name), None)


def set_constant(model, name, value):
    tensor = constant(model, name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, numpy_helper.to_array(tensor).dtype), name))


def number(model, name):
    return numpy_helper.to_array(constant(model, name))


def softmax_over_the_wrong_axis(model):
    for node in nodes_of(model, "Softmax"):
        set_attribute(node, "axis", 1)


def wrong_epsilon(value):
    def change(model):
        for node in nodes_of(model, "LayerNormalization"):
            set_attribute(node, "epsilon", value)

    return change


def transposed(weight):
    """The square weight `weight` of a MatMul is read the other way round."""

    def change(model):
        if constant(model, weight) is not None:
            set_constant(model, weight, number(model, weight).T)

    return change


def wrong_bias(bias):
    """The first number of the bias `bias` gets lost."""

    def change(model):
        if constant(model, bias) is not None:
            value = number(model, bias).copy()
            value[0] += 1
            set_constant(model, bias, value)

    return change


def wrong_clamp(of=None):
    """A convolution and the Relu behind it are fused to one that also ends at a half; `of` is its weight, or any."""

    def change(model):
        makers = {node.output[0]: node for node in model.graph.node}
        half = helper.make_tensor("half_of_fusion", onnx.TensorProto.FLOAT, [], [0.5])
        zero = helper.make_tensor("zero_of_fusion", onnx.TensorProto.FLOAT, [], [0.0])
        for node in nodes_of(model, "Relu"):
            maker = makers.get(node.input[0])
            if maker is not None and maker.op_type == "Conv" and of in (None, maker.input[1]):
                node.op_type = "Clip"
                node.input.extend([zero.name, half.name])
                if constant(model, half.name) is None:
                    model.graph.initializer.extend([zero, half])

    return change


def ignored_mask(model):
    """What is added to attention scores, four-dimensional and without a weight, is left out."""
    fixed = {one.name for one in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in nodes_of(model, "Add"):
        maker = makers.get(node.input[0])
        if maker is not None and maker.op_type in ("MatMul", "Mul", "Div") and not fixed & set(node.input):
            node.op_type = "Identity"
            del node.input[1:]

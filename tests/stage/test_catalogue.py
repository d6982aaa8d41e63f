"""Every tiny model of the catalogue, through capture, to_onnx and ONNX Runtime, at small, odd and large sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests import small
from tests.models import CATALOGUE, Entry

WORKS = [entry for entry in CATALOGUE if entry.fails is None]
FAILS = [entry for entry in CATALOGUE if entry.fails is not None]


def sizes_of(entry: Entry) -> list[dict[str, int]]:
    """Everything at min, at max, and at an odd size near opt."""
    odd = {name: min(axis["opt"] | 1, axis["max"]) for name, axis in entry.axes.items()}
    ends = [{name: axis[end] for name, axis in entry.axes.items()} for end in ("min", "max")]
    return [*ends, odd] if entry.axes else [{}]


@pytest.mark.parametrize("entry", WORKS, ids=lambda entry: entry.name)
def test_works(entry, tmp_path):
    recipe = small.recipe_of(entry)
    program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", entry))
    model = small.converted(tmp_path / "onnx", recipe, program)

    signature = model.signature()
    for name, shape in entry.shapes.items():
        assert list(next(one.shape for one in signature.outputs if one.name == name)) == shape
    graph = onnx.load(model.file("model.onnx")).graph
    assert [value.name for value in graph.input] == [name for name, *_ in entry.inputs]
    assert [value.name for value in graph.output] == entry.outputs
    for value, (_, _, shape, _) in zip(graph.input, entry.inputs, strict=True):
        assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == shape

    session = onnxruntime.InferenceSession(model.file("model.onnx"), providers=["CPUExecutionProvider"])
    eager = small.seeded(entry)
    for sizes in sizes_of(entry):
        feeds = small.feeds(recipe, sizes)
        with torch.no_grad():
            want = leaves(eager(*(torch.from_numpy(array.copy()) for array in feeds.values())), entry.outputs)
        got = session.run(entry.outputs, feeds)
        for name, one, two in zip(entry.outputs, want, got, strict=True):
            small.assert_near(one, two, f"output {name} at {sizes}")


def leaves(value, names) -> list[np.ndarray]:
    """The tensors that a model returns, in the order of the recipe's names."""
    if isinstance(value, dict) and set(value) == set(names):
        value = [value[name] for name in names]
    if hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    flat, _ = torch.utils._pytree.tree_flatten(value)
    return [one.detach().numpy() for one in flat if one is not None]


@pytest.mark.parametrize("entry", FAILS, ids=lambda entry: entry.name)
def test_fails_with_a_reason(entry, tmp_path):
    recipe = small.recipe_of(entry)
    weights = small.checkpoint(tmp_path / "checkpoint", entry)
    with pytest.raises(entry.fails, match=entry.match) as raised:
        small.converted(tmp_path / "onnx", recipe, small.captured(tmp_path / "program", recipe, weights))
    assert raised.value.hint
    assert len(str(raised.value).splitlines()) <= 10
    assert not (tmp_path / "onnx").exists()


def test_the_catalogue_is_large_and_names_are_unique():
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) >= 25

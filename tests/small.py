"""Small recipes and artifacts for tests that run single stages, without a workspace around them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import torch

from pipeline import digest, samples
from pipeline.stages.capture import capture
from pipeline.stages.to_onnx import to_onnx
from pipeline.store import Key, Stored, make
from pipeline.types import Recipe
from tests.models import CATALOGUE, Entry

RELATIVE = 1e-4


def by_name(name: str) -> Entry:
    """The entry of the catalogue called `name`."""
    return next(entry for entry in CATALOGUE if entry.name == name)


def recipe_of(entry: Entry, **changes: object) -> Recipe:
    """The recipe that describes `entry`; its code is tests/models.py itself."""
    root = Path(__file__).parents[1]
    table: dict[str, object] = {
        "name": entry.name.lower(),
        "checkpoint": "model.safetensors",
        "factory": f"tests.models:{entry.name}",
        "axes": entry.axes,
        "inputs": [
            {"name": name, "dtype": dtype, "shape": shape, "range": span} for name, dtype, shape, span in entry.inputs
        ],
        "outputs": [{"name": name} for name in entry.outputs],
        "translations": "tests.models:translations" if entry.translations else None,
        "evaluation": {"data": "none.npz", "metric": "cosine"},
        "budget": {"drop": 0},
        "folder": root,
        "root": root,
    }
    return Recipe.model_validate(table | changes)


def seeded(entry: Entry) -> torch.nn.Module:
    """The model of `entry` with weights that are the same in every process."""
    torch.manual_seed(zlib.crc32(entry.name.encode()))
    return entry.model().eval()


def checkpoint(path: Path, entry: Entry) -> Stored:
    """An artifact with the seeded weights of `entry`."""
    return stored_file(path, seeded(entry).state_dict())


def stored_file(path: Path, state: object, name: str = "model.pt") -> Stored:
    """An artifact of kind checkpoint whose one file is `state`: bytes as they are, anything else through torch.save."""

    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = state if isinstance(state, bytes) else buffer.getvalue()

    def work(out: Path) -> dict:
        (out / name).write_bytes(content)
        return {}

    return make(path, Key("checkpoint", {name: digest.of_bytes(content)}), work).stored


def captured(path: Path, recipe: Recipe, weights: Stored) -> Stored:
    """The program artifact of `recipe`."""
    return make(
        path,
        Key("program", {"checkpoint": weights.digest, "recipe": recipe.name}),
        lambda out: capture(recipe, weights, out),
    ).stored


def converted(path: Path, recipe: Recipe, program: Stored) -> Stored:
    """The ONNX artifact of `recipe`."""
    return make(path, Key("onnx"), lambda out: to_onnx(recipe, program, out)).stored


def feeds(recipe: Recipe, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of `recipe` at `sizes`."""
    return samples.feeds(recipe, sizes, seed=sum(sizes.values()))


def assert_near(want: np.ndarray, got: np.ndarray, what: str) -> None:
    """Same dtype and shape, and values within `RELATIVE` of the largest one (half precision: a hundred times that)."""
    assert want.dtype == got.dtype, what
    assert want.shape == got.shape, what
    slack = RELATIVE * (100 if want.dtype == np.float16 else 1)
    peak = float(np.abs(want).max()) if want.size and want.dtype.kind == "f" else 0
    np.testing.assert_allclose(got, want, rtol=slack, atol=slack * peak, err_msg=what)

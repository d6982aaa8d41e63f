"""Two small models, captured and converted once for all contract tests."""

import warnings
from dataclasses import dataclass

import pytest

from pipeline.store import Stored
from pipeline.types import Recipe
from tests import small


@dataclass(frozen=True)
class Model:
    recipe: Recipe
    program: Stored
    onnx: Stored

    def source(self, kind: str) -> Stored:
        return self.program if kind == "program" else self.onnx


def _model(name, root):
    entry = small.by_name(name)
    recipe = small.recipe_of(entry)
    program = small.captured(root / name / "program", recipe, small.checkpoint(root / name / "checkpoint", entry))
    return Model(recipe, program, small.converted(root / name / "onnx", recipe, program))


@pytest.fixture(scope="session", params=["ConvBatchNorm", "UnusedInput"])
def model(request, tmp_path_factory):
    with warnings.catch_warnings():
        # torch and onnxscript warn about themselves the first time that they export
        warnings.simplefilter("ignore")
        return _model(request.param, tmp_path_factory.mktemp("models"))

"""docs/recipes.md names every key, dtype, kind and method that there is, and its TOML is a recipe."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from pipeline import types
from pipeline.metrics import BUILT_IN

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
TABLES = {"axes", "calibration", "evaluation", "budget", "regression", "tolerance", "stress"}
KEYS = set(types.Recipe.model_fields) - {"folder", "root"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(KEYS - {"inputs", "outputs", *TABLES}, id="keys"),
        *(
            pytest.param(set(model.model_fields), id=model.__name__)
            for model in (
                *(types.InputSpec, types.OutputSpec, types.Calibration),
                *(types.Evaluation, types.Budget, types.Regression, types.Stress),
            )
        ),
        pytest.param(set(types.Tolerance.model_fields), id="bounds"),
        pytest.param(set(get_args(types.DType)), id="dtypes"),
        pytest.param(set(get_args(types.OutputKind)), id="kinds"),
        pytest.param({"auto", *get_args(types.RangeMethod)}, id="methods"),
        pytest.param(set(BUILT_IN), id="metrics"),
    ],
)
def test_every_word_that_a_recipe_may_use_is_explained(names: set[str]) -> None:
    assert {name for name in names if f"`{name}`" not in TEXT} == set()


def test_the_tables_of_a_recipe_are_explained() -> None:
    assert {f"[{name}]" for name in TABLES} <= set(re.findall(r"\[\w+\]", TEXT))


def test_the_tutorials_recipe_is_one() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    here = Path(__file__).parent
    recipe = types.Recipe.model_validate({**tomllib.loads(blocks[0]), "folder": here, "root": here})
    assert recipe.name == "gestures"

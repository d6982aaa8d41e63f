"""Recipes: reading them, the code behind them, and calling it."""

import shutil
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from pipeline import recipes
from pipeline.errors import RecipeError, UsageError, WorkspaceError
from pipeline.types import Recipe
from pipeline.workspace import Workspace
from tests import workspaces

MINIMAL = """
    name = "{name}"
    checkpoint = "weights.safetensors"
    factory = "model:build"

    [axes]
    batch = {{ min = 1, opt = 2, max = 4 }}

    [[inputs]]
    name = "x"
    dtype = "float32"
    shape = ["batch", 3]

    [[outputs]]
    name = "y"

    [evaluation]
    data = "data:evaluation"
    metric = "agreement"

    [budget]
    drop = 0.0
"""


def write(workspace: Path, name: str, text: str = MINIMAL, **modules: str) -> None:
    folder = workspace / "recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(dedent(text).format(name=name))
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(dedent(code))


def read(workspace: Path, name: str) -> Recipe:
    folder = workspace / "recipes"
    return recipes.read(folder, name, sorted(path.parent.name for path in folder.glob("*/recipe.toml")))


def changed(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


def test_a_minimal_recipe_is_read(tmp_path: Path) -> None:
    write(tmp_path, "net")
    recipe = read(tmp_path, "net")
    assert (recipe.name, recipe.inputs[0].shape, recipe.axes["batch"].opt) == ("net", ("batch", 3), 2)
    assert (recipe.folder, recipe.root) == (tmp_path / "recipes" / "net", tmp_path)


def test_a_misspelt_recipe_gets_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "digits")
    with pytest.raises(UsageError, match=r"unknown recipe `digit`[\s\S]*did you mean `digits`\?"):
        read(tmp_path, "digit")


def test_the_name_is_the_folders(tmp_path: Path) -> None:
    write(tmp_path, "net", changed("{name}", "other"))
    with pytest.raises(RecipeError, match=r"says name = `other`[\s\S]*folder's name, `net`"):
        read(tmp_path, "net")


def test_what_is_not_toml_names_the_line(tmp_path: Path) -> None:
    write(tmp_path, "net")
    (tmp_path / "recipes" / "net" / "recipe.toml").write_text('name = "net\n')
    with pytest.raises(WorkspaceError, match=r"not valid TOML.*line 1"):
        read(tmp_path, "net")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("factory =", "factroy =", r"unknown key `factroy`[\s\S]*did you mean `factory`\?"),
        ('metric = "agreement"', 'metrc = "agreement"', r"unknown key `evaluation.metrc`[\s\S]*mean `metric`\?"),
        ("min = 1,", "mim = 1,", r"unknown key `axes.batch.mim`[\s\S]*did you mean `min`\?"),
        (
            "shape = [",
            'unit = ""\n    shape = [',
            r"unknown key `inputs.0.unit`[\s\S]*known keys: dtype, name, range, shape",
        ),
        ("drop = 0.0", "drop = -1", r"`budget.drop` = -1: input should be greater than or equal to 0"),
        (
            "drop = 0.0",
            "drop = 0.0\n    [regression]\n    slowdwon = 0.1",
            r"unknown key `regression.slowdwon`[\s\S]*did you mean `slowdown`\?",
        ),
        (
            "drop = 0.0",
            "drop = 0.0\n    [regression.targets.x]\n    growth = -1",
            r"`regression.targets.x.growth` = -1: input should be greater than or equal to 0",
        ),
        ("opt = 2", "opt = 9", r"expected min <= opt <= max, got 1, 9, 4"),
        ('"batch", 3', '"bach", 3', r"axis `bach` is used by an input but not described in \[axes\]"),
        ('"batch", 3', "2, 3", r"axis `batch` is described in \[axes\] but no input has it"),
        ('name = "y"', 'name = "x"', r"`x` names both an input and an output"),
        ('dtype = "float32"', 'dtype = "float"', r"`inputs.0.dtype` = 'float'"),
        ('checkpoint = "weights.safetensors"', "", r"needs `checkpoint` \(a file\) or `train`"),
    ],
)
def test_a_wrong_recipe_is_refused_by_key_and_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    write(tmp_path, "net", changed(old, new))
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, "net")


def closure(recipe: Recipe, source: str = "model:build") -> list[str]:
    return [path.relative_to(recipe.root).as_posix() for path in recipes.code_files(recipe, source)]


CHAIN = {
    "model": "import layers\nfrom blocks import Block\ndef build(): return Block",
    "layers": "import math, torch\nX = 1",
    "blocks": "from shared.norms import Norm\nclass Block: pass",
    "data": "import numpy\ndef evaluation(): yield {}",
    "metric": "def score(outputs, labels): return 0",
}


@pytest.fixture
def net(tmp_path: Path) -> Recipe:
    """A recipe whose model imports two helpers, one of which imports a package shared by all recipes."""
    write(tmp_path, "net", **CHAIN)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text("")
    (tmp_path / "shared" / "norms.py").write_text("from . import scale\nclass Norm: pass")
    (tmp_path / "shared" / "scale.py").write_text("import onnx")
    return read(tmp_path, "net")


def test_code_is_followed_through_imports_and_no_further(net: Recipe) -> None:
    assert closure(net) == [
        "recipes/net/blocks.py",
        "recipes/net/layers.py",
        "recipes/net/model.py",
        "shared/__init__.py",
        "shared/norms.py",
        "shared/scale.py",
    ]
    assert closure(net, "data:evaluation") == ["recipes/net/data.py"]
    assert recipes.code_files(net, None, "weights.safetensors", "numpy:ones") == []


def test_installed_packages_count_by_their_versions(net: Recipe) -> None:
    assert set(recipes.code_tools(net, "model:build")) == {"torch", "onnx"}
    assert set(recipes.code_tools(net, "data:evaluation")) == {"numpy"}
    assert set(recipes.code_tools(net, "numpy:ones")) == {"numpy"}


def test_a_name_out_of_a_module_is_not_taken_for_a_package(net: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    monkeypatch.setattr(recipes.host, "distribution_of", looked_up.append)
    recipes.code_tools(net, "model:build")
    assert sorted(looked_up) == ["onnx", "torch"]


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("recipes/net/model.py", True),
        ("recipes/net/layers.py", True),
        ("shared/scale.py", True),
        ("recipes/net/data.py", False),
        ("recipes/net/metric.py", False),
        ("recipes/net/notes.py", False),
        ("other.py", False),
    ],
)
def test_only_an_edit_of_what_is_imported_changes_the_digest(net: Recipe, file: str, counts: bool) -> None:
    before = recipes.code_digest(net, "model:build")
    path = net.root / file
    path.write_text((path.read_text() if path.exists() else "") + "\n# edited\n")
    assert (recipes.code_digest(net, "model:build") != before) is counts


def test_the_digest_does_not_depend_on_where_the_workspace_is(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write(tmp_path / place, "net", **CHAIN)
    one, two = (recipes.code_digest(read(tmp_path / place, "net"), "model:build") for place in ("here", "there"))
    assert one == two


def test_two_recipes_may_both_have_a_module_called_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(
            tmp_path, name, model=f"from part import NAME\ndef build(): return '{name}' + NAME", part=f"NAME = '{name}'"
        )
    one, two = read(tmp_path, "one"), read(tmp_path, "two")
    answers = [recipes.call(recipe, "model:build", "factory") for recipe in (one, two, one)]
    assert answers == ["oneone", "twotwo", "oneone"]


def test_what_was_importable_before_a_recipe_stays_so_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        write(tmp_path, name, model=f"def build(): return '{name}'")
    one, two = read(tmp_path, "one"), read(tmp_path, "two")
    recipes.call(two, "model:build", "factory")
    monkeypatch.setattr(sys, "path", [*sys.path, str(one.folder)])
    before = sys.path[2:]
    for recipe in (one, two):
        assert recipes.call(recipe, "model:build", "factory") == recipe.name
        assert sys.path == [str(recipe.folder), str(tmp_path), *before]


def test_a_misspelt_callable_gets_the_nearest_name(net: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"`model` has no `bulid`[\s\S]*did you mean `build`\?"):
        recipes.resolve(net, "model:bulid", "factory")


def test_a_setting_must_name_something_to_call(tmp_path: Path) -> None:
    write(tmp_path, "net", model="build = 3")
    with pytest.raises(RecipeError, match=r"`factory = \"model:build\"` is a int"):
        recipes.resolve(read(tmp_path, "net"), "model:build", "factory")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def build(:", r"can't import `model` \(setting `factory`\): SyntaxError[\s\S]*model\.py:1"),
        ("import nowhere_at_all", r"ModuleNotFoundError: No module named 'nowhere_at_all'[\s\S]*model\.py:1"),
        ("def build():\n    return 1 / 0", r"raised: ZeroDivisionError[\s\S]*model\.py:2: return 1 / 0"),
    ],
)
def test_a_fault_in_the_users_code_is_shown_by_file_and_line(tmp_path: Path, code: str, message: str) -> None:
    write(tmp_path, "net", model=code)
    with pytest.raises(RecipeError, match=message):
        recipes.call(read(tmp_path, "net"), "model:build", "factory")


def test_an_environment_inside_the_workspace_is_not_the_users_code():
    workspace = Path(pytest.__file__).parents[4]
    assert not recipes.is_users(pytest.__file__, workspace)
    assert not recipes.is_users(recipes.__file__, Path(recipes.__file__).parents[1])
    assert recipes.is_users(__file__, Path(__file__).parents[2])


def test_modules_of_a_recipe_that_is_gone_are_forgotten(tmp_path):
    for name in ("one", "two"):
        root = workspaces.tiny(tmp_path / name)
        (root / "recipes/tiny/model.py").write_text(f"def build():\n    return {name!r}\n")
    first, second = (Workspace(tmp_path / name).recipe("tiny") for name in ("one", "two"))
    assert recipes.call(first, "model:build", "factory") == "one"
    shutil.rmtree(tmp_path / "one")
    assert recipes.call(second, "model:build", "factory") == "two"

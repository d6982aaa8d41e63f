"""What `[stress]` and `[tolerance]` may say, inputs made for stress, and kept inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline import tolerances, vectors
from pipeline.errors import DataError, RecipeError
from pipeline.stress import inputs as stress_inputs
from pipeline.types import Axis, InputSpec, Recipe, Target, Tolerance
from pipeline.workspace import Workspace
from tests import workspaces


@pytest.fixture
def recipe(tmp_path):
    return Workspace(workspaces.tiny(tmp_path)).recipe("tiny")


def with_lines(tmp_path, lines):
    workspaces.tiny(tmp_path, recipe=workspaces.RECIPE + lines)
    return Workspace(tmp_path).recipe("tiny")


def row(**bounds):
    fields = {"name": "t", "backend": "echo", "platform": "any", "machine": "any", "arch": "any", "schemes": ["fp32"]}
    return Target.model_validate({**fields, "vs_onnx": {"fp32": {"cosine": 0.9}, **bounds}})


# --- the recipe's tables -------------------------------------------------------------------------------------------


def test_the_recipes_tolerance_goes_before_the_rows_and_an_outputs_before_both(tmp_path):
    found = with_lines(
        tmp_path,
        """
    [tolerance]
    fp32 = { max_abs = 0.5 }
    [tolerance.outputs.logits]
    int8-u8s8 = { sqnr_db = 20 }
    """,
    )
    target = row(**{"int8-u8s8": {"sqnr_db": 12}, "int8-dynamic": {"sqnr_db": 25}})
    assert tolerances.of(found, target, "fp32") == {"logits": Tolerance(max_abs=0.5)}
    assert tolerances.of(found, target, "int8-u8s8") == {"logits": Tolerance(sqnr_db=20)}
    assert tolerances.of(found, target, "int8-dynamic") == {"logits": Tolerance(sqnr_db=25)}
    told = [tolerances.source(found, target, scheme, "logits") for scheme in ("fp32", "int8-u8s8", "int8-dynamic")]
    assert told == ["[tolerance]", "[tolerance.outputs.logits]", "vs_onnx of t"]


def test_a_recipe_is_the_same_after_a_round_trip(tmp_path):
    found = with_lines(tmp_path, "\n    [tolerance]\n    fp32 = { max_abs = 0.5 }\n")
    fields = {**found.model_dump(mode="json"), "folder": found.folder, "root": found.root}
    assert Recipe.model_validate(fields) == found


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[tolerance]\nfp33 = { max_abs = 1 }", "`fp33` is neither a scheme nor `outputs`"),
        ("[tolerance]\nfp32 = {}", "needs at least one bound"),
        ("[tolerance.outputs.logit]\nfp32 = { max_abs = 1 }", "`logit`, which is no output of ['logits']"),
        ('[stress]\nrows = "warn"', "`stress.rows` = 'warn'"),
        ('[stress]\nrow = "fail"', "unknown key `stress.row`"),
        ('[stress]\nmask = { image = "batch" }', "`image`, which is no input of ['images']"),
        ('[stress]\nmask = { images = "seq" }', "input `images` has no axis `seq`"),
        ('[stress]\nfree = ["image"]', "`[stress] free` names `image`"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, lines, said):
    with pytest.raises(RecipeError, match=r".*") as caught:
        with_lines(tmp_path, "\n" + lines)
    assert said in caught.value.message
    assert caught.value.hint


# --- inputs --------------------------------------------------------------------------------------------------------


def spec(dtype="float32", span=None):
    return InputSpec(name="x", dtype=dtype, shape=("n",), range=span)


@pytest.mark.parametrize(
    ("dtype", "span", "wanted"),
    [
        ("float32", (2.0, 5.0), (2, 5, 2)),
        ("float32", None, (-1, 1, 0)),
        ("int64", (3, 30521), (3, 30521, 3)),
        ("int8", (-128, -3), (-128, -3, -3)),
        ("bool", None, (False, True, False)),
    ],
)
def test_ends_and_zero_are_of_the_range(dtype, span, wanted):
    array = np.ones(4, dtype)
    made = [
        change(spec(dtype, span), array) for change in (stress_inputs.least, stress_inputs.greatest, stress_inputs.zero)
    ]
    assert [one.dtype for one in made] == [np.dtype(dtype)] * 3
    assert [one.tolist() for one in made] == [[value] * 4 for value in wanted]
    either = stress_inputs.either_end(spec(dtype, span), np.ones(64, dtype))
    assert set(either.tolist()) == set(wanted[:2])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("span", [None, (0.0, 1.0), (-1.0, 0.0)])
def test_denormals_are_denormal_and_in_the_range(dtype, span):
    made = stress_inputs.denormal(spec(dtype, span), np.ones(1000, dtype))
    low, high = span or (-1, 1)
    assert made.dtype == np.dtype(dtype)
    assert (made != 0).all()
    assert np.abs(made).max() < np.finfo(dtype).tiny
    assert low <= made.min() <= made.max() <= high


@pytest.mark.parametrize(("dtype", "span"), [("int64", None), ("float32", (1.0, 2.0)), ("float32", (0.0, 0.0))])
def test_there_are_no_denormals_of_whole_numbers_or_outside_the_range(dtype, span):
    assert stress_inputs.denormal(spec(dtype, span), np.ones(4, dtype)) is None


@given(st.lists(st.integers(1, 300), min_size=3, max_size=3).map(sorted))
def test_odd_sizes_lie_in_their_range_and_are_odd_where_they_can_be(three):
    axis = Axis(min=three[0], opt=three[1], max=three[2])
    below, above = (sizes["n"] for sizes in stress_inputs.odd_sizes({"n": axis}))
    assert axis.min <= below <= axis.opt <= above <= axis.max
    assert below % 2 or axis.min == axis.opt
    assert above % 2 or axis.opt == axis.max


# --- kept inputs ---------------------------------------------------------------------------------------------------


def test_a_kept_input_comes_back_under_its_content(recipe):
    feeds = {"images": workspaces.images(2, seed=3)}
    path = vectors.keep(recipe, feeds)
    assert vectors.keep(recipe, feeds) == path
    found = vectors.read(recipe)
    assert list(found) == [path.name]
    np.testing.assert_array_equal(found[path.name]["images"], feeds["images"])
    assert list(vectors.digests(recipe)) == [path.name]


def test_without_a_folder_there_is_none(recipe):
    assert (vectors.read(recipe), vectors.digests(recipe)) == ({}, {})


def damaged(folder):
    vectors_file(folder).write_bytes(b"nothing of the kind")


def vectors_file(folder):
    return next(path for path in folder.iterdir() if path.suffix == ".safetensors")


def changed(folder):
    save_file({"images": workspaces.images(2, seed=4)}, vectors_file(folder))


def renamed_input(folder):
    save_file({"image": workspaces.images(2, seed=4)}, vectors_file(folder))


def too_many_rows(folder):
    save_file({"images": workspaces.images(5, seed=4)}, vectors_file(folder))


def other_dtype(folder):
    save_file({"images": workspaces.images(2, seed=4).astype(np.float64)}, vectors_file(folder))


def with_nan(folder):
    save_file({"images": workspaces.images(2, seed=4) * np.float32(np.nan)}, vectors_file(folder))


def other_file(folder):
    (folder / "notes.txt").write_text("what this is about")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damaged, "is damaged"),
        (changed, "isn't what its name says"),
        (renamed_input, "input `images` is missing; got ['image']"),
        (too_many_rows, "axis `batch` is 5, outside 1 to 4"),
        (other_dtype, "dtype is float64, expected float32"),
        (with_nan, "it holds NaN"),
        (other_file, "notes.txt` is no kept input"),
    ],
)
def test_what_is_no_kept_input_of_this_recipe_is_named(recipe, harm, said):
    path = vectors.keep(recipe, {"images": workspaces.images(2, seed=3)})
    harm(path.parent)
    with pytest.raises(DataError) as caught:
        vectors.read(recipe)
    assert said in caught.value.message
    assert str(path.parent) in caught.value.message
    assert caught.value.hint

"""Samples: feeds of any size, and calibration data that is checked before it is used."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import samples
from pipeline.errors import DataError, RecipeError
from pipeline.store import Key, make
from pipeline.types import Recipe


def recipe_in(folder, **changes) -> Recipe:
    table = {
        "name": "tiny",
        "checkpoint": "weights.pt",
        "axes": {"batch": {"min": 1, "opt": 2, "max": 4}},
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", 3], "range": [-1, 5]},
            {"name": "ids", "dtype": "int64", "shape": ["batch"], "range": [2, 7]},
        ],
        "outputs": [{"name": "y"}],
        "calibration": {"data": "data.npz"},
        "evaluation": {"data": "data.npz", "metric": "cosine"},
        "budget": {"drop": 0},
        "folder": folder,
        "root": folder,
    }
    return Recipe.model_validate(table | changes)


def good(count=6):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(count, 3)).astype(np.float32), "ids": rng.integers(2, 8, count)}


@pytest.fixture
def stored(tmp_path):
    """Writes arrays as the recipe's data, and returns the artifact that the store makes of them."""

    def run(arrays, which="calibration", **changes):
        if isinstance(arrays, bytes):
            (tmp_path / "data.npz").write_bytes(arrays)
        elif arrays is not None:
            np.savez(tmp_path / "data.npz", **arrays)
        recipe = recipe_in(tmp_path, **changes)
        made = make(tmp_path / "out", Key("data"), lambda out: {"count": samples.write(recipe, which, out)})
        return recipe, made.stored

    return run


def test_feeds_are_in_range_and_reproducible(tmp_path):
    recipe = recipe_in(tmp_path)
    one, two, other = (samples.feeds(recipe, {"batch": 4}, seed) for seed in (1, 1, 2))
    assert one["x"].dtype == np.float32
    assert one["x"].shape == (4, 3)
    assert one["x"].min() >= -1
    assert one["x"].max() <= 5
    assert set(np.unique(samples.feeds(recipe, {"batch": 4000}, 0)["ids"])) == {2, 3, 4, 5, 6, 7}
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["x"], other["x"])


@given(low=st.integers(1, 5), middle=st.integers(0, 9), high=st.integers(0, 9))
def test_combinations_stay_in_range_and_have_both_ends(low, middle, high):
    axes = {
        "batch": {"min": low, "opt": low + middle, "max": low + middle + high},
        "seq": {"min": 4, "opt": 8, "max": 9},
    }
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", "seq"]}]
    recipe = recipe_in(".", axes=axes, inputs=inputs)
    found = samples.combinations(recipe.axes)
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)
    for name, axis in recipe.axes.items():
        sizes = {one[name] for one in found}
        assert {axis.min, axis.opt, axis.max} <= sizes
        assert min(sizes) >= axis.min
        assert max(sizes) <= axis.max


def test_samples_come_back_as_they_were_written(stored):
    arrays = good()
    recipe, data = stored(arrays)
    assert data.artifact.facts["count"] == 3
    found = list(samples.samples(recipe, data, "calibration"))
    np.testing.assert_array_equal(np.concatenate([one.feeds["x"] for one in found]), arrays["x"])
    np.testing.assert_array_equal(np.concatenate([one.feeds["ids"] for one in found]), arrays["ids"])


def test_labels_are_kept_apart(stored):
    arrays = good() | {"label": np.arange(6)}
    recipe, data = stored(arrays, "evaluation")
    found = list(samples.samples(recipe, data, "evaluation"))
    assert [set(one.feeds) for one in found] == [{"x", "ids"}] * 3
    np.testing.assert_array_equal(np.concatenate([one.labels["label"] for one in found]), np.arange(6))


def test_an_extra_dimension_is_one_call_each(stored):
    arrays = {name: np.stack([array[:2], array[2:4]]) for name, array in good().items()}
    recipe, data = stored(arrays)
    assert [one.feeds["x"].shape for one in samples.samples(recipe, data, "calibration")] == [(2, 3), (2, 3)]


def bad(**changes):
    return lambda: good() | changes


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


WRONG = {
    "missing file": (lambda: None, "there is no file"),
    "truncated": (lambda: b"PK\x03\x04half of it", "damaged or not a .npz file"),
    "one array": (lambda: npy(), "damaged or not a .npz file"),
    "empty": (lambda: {name: array[:0] for name, array in good().items()}, "there is no sample in it"),
    "missing input": (lambda: {"x": good()["x"]}, "input `ids` is not in it"),
    "wrong rank": (bad(x=np.zeros((6, 3, 3, 3), np.float32)), r"rank 4"),
    "wrong width": (bad(x=np.ones((6, 5), np.float32)), r"shape is \[2, 5\], expected"),
    "wrong dtype": (bad(x=np.ones((6, 3))), "dtype is float64, expected float32"),
    "NaN": (bad(x=np.full((6, 3), np.nan, np.float32)), "NaN or infinity"),
    "constant": (bad(x=np.full((6, 3), 2.5, np.float32)), r"input `x` is 2\.5 everywhere"),
    "not an input": (bad(extra=np.zeros(6)), "`extra` is not an input"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_refused(case, stored, tmp_path):
    arrays, match = WRONG[case]
    with pytest.raises(DataError, match=match) as raised:
        stored(arrays())
    assert raised.value.hint
    assert not (tmp_path / "out").exists()


def test_a_misspelt_file_gets_a_suggestion(stored, tmp_path):
    (tmp_path / "calib.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"there is no file[\s\S]*did you mean `calib.npz`"):
        stored(None, calibration={"data": "calbi.npz"})


def test_feeds_of_the_users_own_are_checked(tmp_path):
    (tmp_path / "feeding.py").write_text(
        "import numpy as np\n\ndef make(sizes, seed):\n    return {'x': np.zeros(3)}\n"
    )
    recipe = recipe_in(tmp_path, feeds="feeding:make")
    with pytest.raises(RecipeError, match=r"`feeds` at \{'batch': 2\}: input `ids` is missing"):
        samples.feeds(recipe, {"batch": 2}, 0)

"""Doubts about calibration data: said, but no reason to stop."""

import numpy as np
import pytest

from pipeline import samples
from pipeline.store import Key, make
from tests.unit.test_samples import recipe_in


def data(count=16, low=-1.0, high=1.0, ids=7):
    x = np.linspace(low, high, count * 3, dtype=np.float32).reshape(count, 3)
    return {"x": x, "ids": np.arange(count) % ids + 1}


def warned(folder, calibration, evaluation, **changes):
    np.savez(folder / "calibration.npz", **calibration)
    np.savez(folder / "evaluation.npz", **evaluation)
    recipe = recipe_in(
        folder,
        calibration={"data": "calibration.npz"},
        evaluation={"data": "evaluation.npz", "metric": "cosine"},
        **changes,
    )
    made = make(folder / "out", Key("data"), lambda out: samples.write_all(recipe, out))
    return made.stored.artifact.facts["warnings"]


def test_good_data_is_not_talked_about(tmp_path):
    assert warned(tmp_path, data(), data(32)) == []


@pytest.mark.parametrize(("rows", "told"), [(6, True), (8, False)])
def test_too_few_rows(tmp_path, rows, told):
    found = warned(tmp_path, data(rows), data())
    expected = f"[calibration] has {rows} rows; ranges read from fewer than 8 are chance, 100 to 500 are usual"
    assert found == ([expected] if told else [])


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        pytest.param(-1, 1, None, id="the same"),
        pytest.param(-0.55, 0.55, None, id="a little narrower"),
        pytest.param(-0.4, 0.4, "INT8 will cut off what calibration has not seen", id="less than half"),
        pytest.param(5, 9, "INT8 will cut off what calibration has not seen", id="elsewhere"),
        pytest.param(-9, 9, None, id="nine times as wide"),
        pytest.param(-20, 20, "INT8 will spend its steps on values that don't occur", id="twenty times as wide"),
    ],
)
def test_other_values_than_evaluation_meets(tmp_path, low, high, told):
    found = warned(tmp_path, data(low=low, high=high), data())
    if told is None:
        assert found == []
    else:
        span = f"goes from {low:.4g} to {high:.4g}, in [evaluation] from -1 to 1"
        assert found == [f"[calibration] input `x` {span}: {told}"]


def test_identifiers_have_no_range(tmp_path):
    assert warned(tmp_path, data(ids=2), data(ids=8)) == []


def test_without_calibration_there_is_nothing_to_doubt(tmp_path):
    np.savez(tmp_path / "evaluation.npz", **data())
    recipe = recipe_in(tmp_path, calibration=None, evaluation={"data": "evaluation.npz", "metric": "cosine"})
    made = make(tmp_path / "out", Key("data"), lambda out: samples.write_all(recipe, out))
    assert made.stored.artifact.facts == {"calibration": 0, "evaluation": 8, "warnings": []}

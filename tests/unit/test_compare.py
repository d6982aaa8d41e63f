"""Distances: known values, and what must hold for any tensors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import compare
from pipeline.errors import ParityError
from pipeline.types import Tolerance

FLOATS = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


def test_known_values():
    reference = np.array([[3.0, 4.0], [0.0, 0.0]])
    other = np.array([[3.0, 4.5], [0.0, 0.0]])
    found = compare.distance("y", reference, other, "logits")
    assert found.max_abs == 0.5
    assert found.max_over_peak == 0.125
    assert found.rmse == pytest.approx(0.25)
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert found.argmax_agreement == 1.0


@given(FLOATS)
def test_a_tensor_has_no_distance_from_itself(array):
    found = compare.distance("y", array, array.copy())
    assert (found.max_abs, found.rmse, found.sqnr_db) == (0, 0, math.inf)
    assert found.cosine == pytest.approx(1.0)


@given(FLOATS, st.integers(0, 10_000))
def test_a_nan_anywhere_is_far_from_everything(array, place):
    broken = array.copy()
    broken.reshape(-1)[place % array.size] = np.nan
    for one, two in ((array, broken), (broken, array), (broken, broken)):
        found = compare.distance("y", one, two)
        assert found.max_abs == math.inf
        assert compare.violations(found, Tolerance(max_abs=1e30))
        assert compare.violations(found, Tolerance(cosine=0.0001))
        assert compare.violations(found, Tolerance(sqnr_db=-1000))


def test_an_infinity_equals_itself_only():
    mask = np.array([-np.inf, 1.0])
    assert compare.distance("y", mask, mask.copy()).max_abs == 0
    assert compare.distance("y", mask, np.array([np.inf, 1.0])).max_abs == math.inf


@pytest.mark.parametrize("scale", [1e-300, 1e200])
def test_cosine_neither_overflows_nor_vanishes(scale):
    array = np.array([1.0, 2.0, 3.0]) * scale
    assert compare.distance("y", array, array * 2).cosine == pytest.approx(1.0)


def test_zeros_against_something():
    found = compare.distance("y", np.zeros(3), np.ones(3))
    assert (found.max_over_peak, found.sqnr_db, found.cosine) == (math.inf, -math.inf, 0.0)


def test_another_shape_is_an_error_and_no_broadcast():
    with pytest.raises(ParityError, match=r"`y` has shape \[3\], the model's is \[3, 1\]"):
        compare.distance("y", np.zeros((3, 1)), np.zeros(3))


def test_a_dropped_output_is_an_error():
    with pytest.raises(ParityError, match=r"missing \['b'\], unexpected \['c'\]"):
        compare.distances({"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "c": np.ones(1)}, {})


def test_indices_must_be_equal_unless_the_tolerance_says_otherwise():
    found = compare.distance("top", np.array([[1, 2], [3, 4]]), np.array([[1, 2], [4, 3]]), "indices")
    assert found.argmax_agreement == 0.5
    assert compare.violations(found, Tolerance(sqnr_db=0))
    assert not compare.violations(found, Tolerance(argmax_agreement=0.5))


@pytest.mark.parametrize(
    ("tolerance", "broken"),
    [
        (Tolerance(max_abs=0.4), "max_abs"),
        (Tolerance(max_over_peak=0.1), "max_over_peak"),
        (Tolerance(rmse=0.2), "rmse"),
        (Tolerance(sqnr_db=20.1), "sqnr_db"),
        (Tolerance(cosine=0.9999), "cosine"),
    ],
)
def test_each_bound_is_checked(tolerance, broken):
    found = compare.distance("y", np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.5], [0.0, 0.0]]))
    (text,) = compare.violations(found, tolerance)
    assert f"`y` {broken}" in text


def test_pooling_calls_of_different_shapes():
    one, two = np.ones((2, 3)), np.full((4, 3), 2.0)
    found = compare.pooled("y", [one, two], [one, two + 0.1], "embedding")
    assert found.max_abs == pytest.approx(0.1)
    assert found.cosine == pytest.approx(1.0)

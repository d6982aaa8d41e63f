"""Quantisations and what stands before them, as TVM does them: the numbers of ONNX Runtime, bit by bit."""

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from tvm import relax

from pipeline.tvm import compile as tvm_compile
from tests.stage.test_tvm_integer import Writer, as_written, scheduled

ANY_CPU = "x86-64-v3"


def found(model, feed):
    module, where = scheduled(model, ANY_CPU)
    machine = relax.VirtualMachine(tvm_compile.compiled(module, where), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(feed)).numpy()


@pytest.mark.parametrize(("activations", "zero"), [(np.uint8, 0), (np.uint8, 113), (np.uint8, 128), (np.int8, -3)])
def test_halves_go_to_the_even_step_and_large_numbers_to_the_ends(activations, zero):
    one = Writer(activations)
    model = one.model([2, 304], one.rounded("x", 0.25, zero))
    steps = np.arange(-150, 150)
    ends = np.array([1e9, -1e9, np.inf, -np.inf], np.float32)
    feed = np.stack([np.concatenate([0.25 * (steps + part), ends]) for part in (0.5, 0.25)]).astype(np.float32)

    np.testing.assert_array_equal(found(model, feed), as_written(model, feed))


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_clip_of_real_numbers_is_one_of_the_integers(low):
    one = Writer()
    first = one.rounded("x", 0.05, 60)
    bounds = one.constant(np.float32(low)), one.constant(np.float32(1.5))
    clipped = one.node("Clip", one.node("Add", first, one.bias(8)), *bounds)
    model = one.model([40, 8], one.rounded(clipped, 0.02, 51))
    feed = np.random.default_rng(1).standard_normal((40, 8), dtype=np.float32) * 2

    np.testing.assert_allclose(found(model, feed), as_written(model, feed), rtol=0, atol=1e-6)


def test_a_sum_that_others_read_stays():
    one = Writer()
    first = one.node("Add", one.rounded("x", 0.05, 60), one.bias(8))
    second = one.rounded(first, 0.02, 51)
    model = one.model([40, 8], one.node("Mul", first, second))
    feed = np.random.default_rng(1).standard_normal((40, 8), dtype=np.float32)

    np.testing.assert_allclose(found(model, feed), as_written(model, feed), rtol=1e-6, atol=1e-6)


def test_two_clips_count_both():
    one = Writer()
    first = one.node("Clip", "x", one.constant(np.float32(-1)), one.constant(np.float32(0.5)))
    second = one.node("Clip", first, one.constant(np.float32(0.25)), one.constant(np.float32(2)))
    model = one.model([40, 8], one.rounded(second, 0.01, 0))
    feed = np.random.default_rng(1).standard_normal((40, 8), dtype=np.float32)

    np.testing.assert_allclose(found(model, feed), as_written(model, feed), rtol=0, atol=1e-6)

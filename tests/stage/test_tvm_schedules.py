"""Schedules by rule: every loop nest that they change must still compute the same."""

import numpy as np
import pytest
import torch

tvm = pytest.importorskip("tvm")

from tvm import te, topi  # noqa: E402
from tvm.script import tirx as T  # noqa: E402

from pipeline.tvm import passes as tvm_passes  # noqa: E402
from pipeline.tvm import schedules as tvm_schedules  # noqa: E402
from pipeline.tvm.nests import Registers  # noqa: E402
from pipeline.tvm.schedules import SCHEDULED  # noqa: E402

WIDE = Registers(lanes=16, accumulators=14)
NARROW = Registers(lanes=4, accumulators=24, columns=4)
RNG = np.random.default_rng(0)


def scheduled(arguments, registers):
    """The function over `arguments`, scheduled; it must say that it was."""
    function = te.create_prim_func(arguments).with_attr("global_symbol", "main")
    module = tvm_schedules.scheduled(registers)(tvm.IRModule({"main": function}))
    assert module["main"].attrs[SCHEDULED]
    return module


def run(module, inputs, shape):
    with tvm.target.Target("llvm"):
        built = tvm.compile(module, target="llvm")
    arrays = [tvm.runtime.tensor(array) for array in inputs]
    out = tvm.runtime.tensor(np.full(shape, np.nan, "float32"))
    built["main"](*arrays, out)
    return out.numpy()


def random(*shape):
    return RNG.standard_normal(shape, dtype="float32")


@pytest.mark.parametrize("registers", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 10), (13, 37), (28, 64), (5, 48)])
def test_product_of_any_size_with_what_follows_it(rows, columns, registers):
    left, right = te.placeholder((rows, 24), name="left"), te.placeholder((24, columns), name="right")
    out = topi.nn.relu(topi.matmul(left, right))
    module = scheduled([left, right, out], registers)
    a, b = random(rows, 24), random(24, columns)

    np.testing.assert_allclose(run(module, [a, b], (rows, columns)), np.maximum(a @ b, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [WIDE, NARROW], ids=["wide", "narrow"])
def test_product_over_a_dynamic_axis(registers):
    batch = te.var("batch", "int64")
    left, right = te.placeholder((batch, 24), name="left"), te.placeholder((24, 40), name="right")
    module = scheduled([left, right, topi.nn.relu(topi.matmul(left, right))], registers)
    b = random(24, 40)
    for rows in (1, 2, 7, 15):
        a = random(rows, 24)

        np.testing.assert_allclose(run(module, [a, b], (rows, 40)), np.maximum(a @ b, 0), rtol=1e-4, atol=1e-5)


def test_product_runs_as_vectors_in_parallel():
    left, right = te.placeholder((28, 24), name="left"), te.placeholder((24, 64), name="right")
    text = scheduled([left, right, topi.matmul(left, right)], WIDE)["main"].script()

    assert "T.parallel" in text
    assert "T.vectorized(16)" in text
    assert "T.unroll(7)" in text  # 2 vectors a row leave room for 7 rows in 14 registers


@pytest.mark.parametrize("registers", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("lines", "stride", "channels"), [(18, 1, 32), (13, 1, 48), (34, 2, 64), (5, 1, 24)])
def test_depthwise_convolution_adds_its_border_band_by_band(lines, stride, channels, registers):
    image, kernel = te.placeholder((2, lines, 12, channels)), te.placeholder((3, 3, channels))
    padded = topi.nn.pad(image, (0, 1, 1, 0), (0, 1, 1, 0))
    dy, dx = te.reduce_axis((0, 3)), te.reduce_axis((0, 3))
    high, wide = (lines - 1) // stride + 1, 11 // stride + 1

    def sums(n, y, x, c):
        return te.sum(padded[n, y * stride + dy, x * stride + dx, c] * kernel[dy, dx, c], axis=[dy, dx])

    out = topi.nn.relu(te.compute((2, high, wide, channels), sums))
    module = scheduled([image, kernel, out], registers)
    a, b = random(2, lines, 12, channels), random(3, 3, channels)

    image_, kernel_ = (torch.from_numpy(array) for array in (a.transpose(0, 3, 1, 2), b.transpose(2, 0, 1)[:, None]))
    want = torch.relu(torch.nn.functional.conv2d(image_, kernel_, stride=stride, padding=1, groups=channels))
    got = run(module, [a, b], (2, high, wide, channels))
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    text = module["main"].script()
    assert text.count("T.parallel") == 1
    assert text.index("T.parallel") < text.index('T.sblock("PadInput")')


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (lambda x: topi.sum(x, axis=-1), lambda x: x.sum(-1)),
        (lambda x: topi.sum(x, axis=1), lambda x: x.sum(1)),
        (lambda x: topi.max(x, axis=(0, 1, 2), keepdims=True), lambda x: x.max(keepdims=True)),
        (lambda x: topi.transpose(topi.exp(x), (0, 2, 1)), lambda x: np.exp(x).transpose(0, 2, 1)),
        (lambda x: topi.nn.softmax(x), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    ],
    ids=["inner-sum", "middle-sum", "whole-max", "elementwise", "softmax"],
)
def test_everything_else(operation, reference):
    x = te.placeholder((3, 5, 32), name="x")
    array = random(3, 5, 32)
    want = reference(array)

    found = run(scheduled([x, operation(x)], WIDE), [array], want.shape)

    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_functions_that_have_a_schedule_are_left_alone():
    x = te.placeholder((4,), name="x")
    function = te.create_prim_func([x, topi.exp(x)]).with_attr(SCHEDULED, True)
    module = tvm.IRModule({"main": function})

    assert tvm_schedules.scheduled(WIDE)(module)["main"].same_as(function)


def test_stores_of_shape_functions_come_in_order_of_their_slots():
    @T.prim_func(s_tir=True)
    def shape_func(sizes: T.Buffer((T.int64(5),), "int64")):
        sizes[T.int64(3)] = sizes[T.int64(0)] * T.int64(2)
        sizes[T.int64(1)] = sizes[T.int64(0)] * T.int64(7)
        sizes[T.int64(4)] = sizes[T.int64(0)] * T.int64(5)

    ordered = tvm_passes.sorted_shape_functions()(tvm.IRModule({"shape_func": shape_func}))["shape_func"]

    assert [int(store.indices[0]) for store in ordered.body] == [1, 3, 4]

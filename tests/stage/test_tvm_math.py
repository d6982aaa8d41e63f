"""exp, erf and tanh as vector code: the numbers of the C library, at the ends, too."""

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import te, topi  # noqa: E402

from pipeline.tvm import math as tvm_math  # noqa: E402
from pipeline.tvm import nests as tvm_nests  # noqa: E402
from pipeline.tvm import schedules as tvm_schedules  # noqa: E402

ENDS = [np.nan, np.inf, -np.inf, 0, -0.0, 88.7, 88.8, 89, -87.2, -90, -100, -110, 1e-30, -1e-30, 3e38]


@pytest.mark.parametrize(
    ("operator", "reference"),
    [
        (topi.exp, np.exp),
        (topi.erf, np.vectorize(math.erf)),
        (topi.tanh, np.tanh),
        (topi.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    ],
    ids=["exp", "erf", "tanh", "sigmoid"],
)
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("lanes", [4, 16])
def test_as_exact_as_float32_allows(operator, reference, lanes):
    tvm_math.install()
    array = np.concatenate([ENDS, np.linspace(-100, 90, 4001), np.linspace(-6, 6, 4000)]).astype(np.float32)
    x = te.placeholder(array.shape, name="x")
    function = te.create_prim_func([x, operator(x)]).with_attr("global_symbol", "main")
    module = tvm_schedules.scheduled(tvm_nests.Registers(lanes, 12))(tvm.IRModule({"main": function}))
    built = tvm.compile(module, target=tvm.target.Target("llvm"))
    out = tvm.runtime.tensor(np.zeros_like(array))
    built["main"](tvm.runtime.tensor(array), out)

    want = reference(array.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(out.numpy(), want, rtol=4e-7, atol=1e-37)


def test_other_types_keep_their_own():
    tvm_math.install()
    x = te.placeholder((8,), name="x", dtype="float64")
    function = te.create_prim_func([x, topi.exp(x)]).with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target("llvm"))
    array = np.linspace(-3, 3, 8)
    out = tvm.runtime.tensor(np.zeros_like(array))
    built["main"](tvm.runtime.tensor(array), out)

    np.testing.assert_allclose(out.numpy(), np.exp(array), rtol=1e-14)

"""How fast ONNX Runtime multiplies matrices in each integer form on this CPU, and in fp32.

    python benchmarks/integer_forms.py [--size 1024] [--out docs/int8.md]

One product of two square matrices, activations first, weights second (constant, as in a model), turn by turn with
one thread and with all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks import side_by_side as sides
from pipeline.timing import timed_threads

SECONDS = 5.0  # of timing, for each number of threads
UNSIGNED, SIGNED, FLOAT = np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.float32)
FORMS = {
    "fp32": (FLOAT, FLOAT),
    "U8 x S8": (UNSIGNED, SIGNED),
    "U8 x U8": (UNSIGNED, UNSIGNED),
    "S8 x S8": (SIGNED, SIGNED),
    "S8 x U8": (SIGNED, UNSIGNED),
}


def product(first: np.dtype, second: np.dtype, size: int) -> bytes:
    """A model of one product: ``x`` [size, size] with a constant."""
    rng = np.random.default_rng(0)
    operator, out = ("MatMul", TensorProto.FLOAT) if first == FLOAT else ("MatMulInteger", TensorProto.INT32)
    weight = numpy_helper.from_array(_matrix(rng, second, size), "w")
    x = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(first), [size, size])
    y = helper.make_tensor_value_info("y", out, [size, size])
    graph = helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"])], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def _matrix(rng: np.random.Generator, dtype: np.dtype, size: int) -> np.ndarray:
    if dtype == FLOAT:
        return rng.normal(size=(size, size)).astype(dtype)
    ends = np.iinfo(dtype)
    return rng.integers(ends.min, ends.max, (size, size), dtype=dtype, endpoint=True)


def seconds(threads: int, size: int) -> dict[str, float]:
    """Median seconds of a product in each form."""
    calls = {}
    for name, (first, second) in FORMS.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = product(first, second, size)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        calls[name] = partial(session.run, None, {"x": _matrix(np.random.default_rng(1), first, size)})
    clock = time.process_time if threads == 1 else time.perf_counter
    return {name: statistics.median(times) for name, times in sides.turns(calls, SECONDS, clock).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="page whose table to replace")
    options = parser.parse_args()
    load = sides.load_average()
    by_threads = {threads: seconds(threads, options.size) for threads in timed_threads()}
    operations = 2 * options.size**3
    rows = []
    for name in FORMS:
        cells = [
            f"{operations / found[name] / 1e9:.0f} ({found['fp32'] / found[name]:.2f}x)"
            for found in by_threads.values()
        ]
        rows.append([name, *cells])
    head = [
        "activations x weights",
        *(f"{threads} thread{'s' * (threads > 1)}, GOP/s (of fp32)" for threads in by_threads),
    ]
    command = "python benchmarks/integer_forms.py" + ("" if options.size == 1024 else f" --size {options.size}")
    text = f"{sides.table(head, rows)}\n\n{sides.conditions(command, load)}"
    print(text)
    if options.out is not None:
        sides.write_between(options.out, "forms", text)


if __name__ == "__main__":
    main()

"""Our choice of TVM's schedules beside MetaSchedule's own search, on one convolution of ResNet-50 and one product.

    python benchmarks/tvm_search.py [--trials 64]

MetaSchedule looks in its own space for CPUs (tiles on four levels, vectors, unrolling, parallel loops) with its
evolutionary strategy. Its builder and runner work in this process: those that it brings start processes, which import
TVM for longer than they may take. Both searches time a nest in the same way, on one thread, by processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # run as a script, this folder is first on it, where the library `tvm` would be another file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tvm
from tvm import te
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from benchmarks import side_by_side as sides
from pipeline import host
from pipeline.backends.tvm import _before_threads, _take_threads
from pipeline.tvm import cpu as tvm_cpu
from pipeline.tvm import tuning as tvm_tuning


def product() -> Any:
    """[256, 384] by [384, 1536], as in an encoder layer."""
    left, right = te.placeholder((256, 384), name="left"), te.placeholder((384, 1536), name="right")
    along = te.reduce_axis((0, 384), name="along")
    out = te.compute((256, 1536), lambda i, j: te.sum(left[i, along] * right[along, j], axis=along), name="out")
    return _function(left, right, out)


def convolution() -> Any:
    """3x3, 128 channels, on 4 images of 28x28 with their border, channels last."""
    image, kernel = te.placeholder((4, 30, 30, 128), name="image"), te.placeholder((3, 3, 128, 128), name="kernel")
    dy, dx, c = (te.reduce_axis((0, length), name=name) for name, length in (("dy", 3), ("dx", 3), ("c", 128)))
    out = te.compute(
        (4, 28, 28, 128),
        lambda n, y, x, o: te.sum(image[n, y + dy, x + dx, c] * kernel[dy, dx, c, o], axis=[dy, dx, c]),
        name="out",
    )
    return _function(image, kernel, out)


def _function(*tensors: Any) -> Any:
    return te.create_prim_func(list(tensors)).with_attr("layout_free_buffers", [1])


@derived_object
class Builder(ms.builder.PyBuilder):  # type: ignore[misc]  # tvm ships no types
    """Compiles in this process, and keeps the code."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def build(self, inputs: list[Any]) -> list[Any]:
        """A result for each input; its path is a key of `kept`."""
        found = []
        for one in inputs:
            try:
                self.kept[f"{len(self.kept)}"] = ms.builder.local_builder.default_build(one.mod, one.target, None)
                found.append(ms.builder.BuilderResult(f"{len(self.kept) - 1}", None))
            except Exception as error:  # a schedule that can't be compiled is one that is not taken
                found.append(ms.builder.BuilderResult(None, str(error)[:200]))
        return found


@derived_object
class Runner(ms.runner.PyRunner):  # type: ignore[misc]
    """Times in this process, as our own search does."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def run(self, inputs: list[Any]) -> list[Any]:
        """A future that is done for each input."""
        return [_Done(self._seconds(one)) for one in inputs]

    def _seconds(self, one: Any) -> float:
        code = self.kept[str(one.artifact_path)]
        rng = np.random.default_rng(0)
        shapes = [[int(length) for length in info.shape] for info in one.args_info]
        operands = [tvm.runtime.tensor(rng.standard_normal(shape).astype("float32")) for shape in shapes]
        return tvm_tuning.milliseconds(getattr(code, "mod", code)["main"], operands, 2) / 1e3


@derived_object
class _Done(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return ms.runner.RunnerResult([self.seconds], None)


def by_metaschedule(function: Any, where: Any, trials: int) -> float:
    """Milliseconds of the best of `trials` schedules."""
    kept: dict[str, Any] = {}
    context = ms.TuneContext(
        mod=tvm.IRModule({"main": function}),
        target=where,
        space_generator="post-order-apply",
        search_strategy="evolutionary",
        task_name="nest",
        num_threads=1,
        rand_state=1,
    )
    database = ms.database.MemoryDatabase()
    with tempfile.TemporaryDirectory() as folder:
        ms.tune.tune_tasks(
            tasks=[context],
            task_weights=[1.0],
            work_dir=folder,
            max_trials_global=trials,
            num_trials_per_iter=16,
            builder=Builder(kept),
            runner=Runner(kept),
            cost_model="random",
            measure_callbacks=[ms.measure_callback.AddToDatabase()],
            database=database,
        )
    times = [min(float(one) for one in record.run_secs) for record in database.get_all_tuning_records()]
    return min(times) * 1e3


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    trials = parser.parse_args().trials
    _before_threads()
    _take_threads(1)
    cpu = tvm_cpu.native_cpu()
    where = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": host.cpu_count()})
    registers, load, rows = tvm_cpu.registers_of(cpu), sides.load_average(), []
    for name, function in (("product", product()), ("convolution", convolution())):
        found: list[Any] = []
        begun = time.perf_counter()
        module = tvm.IRModule({"main": function})
        tvm_tuning.tune(module, where, registers, {}, begun + 1e6, lambda _, record: found.append(record))  # noqa: B023
        ours = time.perf_counter() - begun
        best = by_metaschedule(function, where, trials)
        theirs = time.perf_counter() - begun - ours
        record = found[0]
        rows += [
            [name, "by rule", f"{record.rule_ms:.3f}", "1", ""],
            [name, "tuned", f"{record.ms:.3f}", "all", f"{ours:.0f}"],
            [name, "MetaSchedule", f"{best:.3f}", str(trials), f"{theirs:.0f}"],
        ]
    print(sides.table(["nest", "schedule", "ms", "tried", "search, s"], rows))
    print(sides.conditions(f"python benchmarks/tvm_search.py --trials {trials}", load))
    return 0


if __name__ == "__main__":
    sys.exit(main())

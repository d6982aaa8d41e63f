"""Tuning of TVM's schedules: what is measured, kept, found again and refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm")

from pipeline import backends, host, run, store
from pipeline.errors import UnavailableError, UsageError
from pipeline.stages.build import build
from pipeline.stages.tune import tune
from pipeline.store import Key, write_json
from pipeline.tvm import cpu as tvm_cpu
from pipeline.tvm import records as tvm_records
from pipeline.tvm import tuning as tvm_tuning
from pipeline.tvm.records import Record
from pipeline.types import Axis, Signature, Target, TensorSpec
from pipeline.workspace import Workspace
from tests import workspaces

WIDE = 128
ROWS = (
    workspaces.ROWS
    + f"""
    [targets.here-tvm]
    backend = "tvm"
    platform = "{host.system()}"
    machine = "{host.machine()}"
    arch = "native"
    schemes = ["fp32"]
    options = {{ tune = "cached" }}
    vs_onnx = {{ fp32 = {{ max_over_peak = 1e-4 }} }}
"""
)


def row(tune_option="minutes:5", **changes):
    table = {
        "name": "here-tvm",
        "backend": "tvm",
        "platform": host.system(),
        "machine": host.machine(),
        "arch": "native",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": {"max_over_peak": 1e-4}},
        "options": {"tune": tune_option},
    }
    return Target.model_validate(table | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """x [batch, 128] through two products of different sizes."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((WIDE, 64), (64, WIDE)))
    nodes = [helper.make_node("MatMul", ["x", "first"], ["h"]), helper.make_node("MatMul", ["h", "second"], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDE]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDE)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", WIDE)),),
        axes={"batch": Axis(min=1, opt=8, max=16)},
    )

    def work(out):
        onnx.save(proto, out / "model.onnx")
        write_json(out / "signature.json", signature.plain())
        return {}

    return store.make(tmp_path_factory.mktemp("model") / "onnx", Key("onnx"), work).stored


def tuned(model, target, shared, out, report=lambda *_: None):
    out.mkdir()
    return tune(backends.find("tvm"), model, target, shared, out, report)


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    """Records of `model`, measured once for all tests."""
    folder = tmp_path_factory.mktemp("records")
    steps = []
    tuned(model, row(), folder / "cpu.json", folder / "out", lambda done, total, _: steps.append((done, total)))
    assert steps[0] == (0, 2)
    assert steps[-1] == (2, 2)
    return folder / "cpu.json"


def test_every_workload_gets_a_record_in_words(shared):
    found = tvm_records.read(shared)

    assert sorted(found) == ["float32 s8 s128 r64: [a,c] [c,b] packed", "float32 s8 s64 r128: [a,c] [c,b] packed"]
    for record in found.values():
        assert 0 < record.ms <= record.rule_ms


def test_what_has_a_record_is_not_measured_again(model, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(tvm_tuning, "_Timed", None)  # measuring would fail
    before = shared.read_bytes()

    facts = tuned(model, row(), shared, tmp_path / "out")

    assert facts == {"workloads": 2, "not_tuned": []}
    assert shared.read_bytes() == before


def test_an_engine_with_dynamic_axes_takes_the_records_of_their_opt_sizes(model, shared, tmp_path):
    choices = {name: (2, 64, 1) if "s128" in name else (8, 16, 0) for name in tvm_records.read(shared)}
    tuning = tmp_path / "tuning"
    tuning.mkdir()
    tvm_records.write_choices(tuning / "choices.json", choices)

    def made(folder, *with_tuning):
        return store.make(
            tmp_path / folder, Key("engine"), lambda out: build(model, row(), "fp32", out, *with_tuning)
        ).stored

    plain, engine, again = made("plain"), made("engine", tuning), made("again", tuning)

    assert engine.artifact.facts["tuned"] == 2
    assert engine.artifact.facts["not_tuned"] == 0
    assert engine.file("model.so").read_bytes() != plain.file("model.so").read_bytes()
    assert engine.file("model.so").read_bytes() == again.file("model.so").read_bytes()
    for size in (1, 8, 13, 16):
        feed = {"x": np.random.default_rng(size).standard_normal((size, WIDE)).astype(np.float32)}
        with backends.loaded(plain, row()) as one, backends.loaded(engine, row()) as other:
            np.testing.assert_allclose(one(feed)["y"], other(feed)["y"], rtol=1e-4, atol=1e-4)


def test_cached_measures_nothing_and_says_what_it_lacks(model, tmp_path):
    facts = tuned(model, row("cached"), tmp_path / "none.json", tmp_path / "out")

    assert facts["workloads"] == 0
    assert len(facts["not_tuned"]) == 2
    assert not (tmp_path / "none.json").exists()


def test_buckets_are_tuned_one_by_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tvm_tuning, "TURNS", 1)
    target = row(buckets={"batch": [4, 16]})

    tuned(model, target, tmp_path / "cpu.json", tmp_path / "out")

    names = sorted(tvm_records.read_choices(tmp_path / "out" / "choices.json"))
    assert [name.split()[1] for name in names] == ["s16", "s16", "s4", "s4"]
    assert sorted(tvm_records.read(tmp_path / "cpu.json")) == names


def test_time_that_is_over_ends_it_before_the_next_workload(model, tmp_path, monkeypatch):
    clock = iter([0.0, *[1e9] * 1000])
    monkeypatch.setattr("pipeline.backends.tvm.time.monotonic", lambda: next(clock))

    facts = tuned(model, row("minutes:1"), tmp_path / "cpu.json", tmp_path / "out")

    assert len(facts["not_tuned"]) == 2


PROGRAM = """
import sys
from pathlib import Path
from pipeline import backends, store
from pipeline.types import Target
model, target, shared, out = sys.argv[1:]
Path(out).mkdir()
row = Target.model_validate_json(target)
backends.find("tvm").tune(store.load(Path(model)), row, Path(shared), Path(out), lambda *_: None)
"""


def test_a_killed_tuning_goes_on_where_it_was(model, tmp_path):
    shared = tmp_path / "cpu.json"
    given = [str(model.path), row().model_dump_json(), str(shared), str(tmp_path / "a")]
    command = [sys.executable, "-c", PROGRAM, *given]
    worker = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    until = time.monotonic() + 120
    while not shared.exists() and worker.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    first = tvm_records.read(shared)
    assert len(first) == 1

    tuned(model, row(), shared, tmp_path / "b")

    both = tvm_records.read(shared)
    assert len(both) == 2
    assert first.items() <= both.items()


def test_a_processor_that_this_host_lacks_can_not_be_measured(model, tmp_path):
    other = "aarch64" if host.machine() == "x86_64" else "x86_64"
    target = row(machine=other, arch="cortex-a72" if other == "aarch64" else "x86-64")

    with pytest.raises(UnavailableError, match="tuning runs code on the row's processor") as caught:
        tuned(model, target, tmp_path / "cpu.json", tmp_path / "out")
    assert '`tune = "cached"`' in caught.value.hint
    assert tuned(model, target.model_copy(update={"options": {"tune": "cached"}}), tmp_path / "x", tmp_path / "o")


@pytest.mark.parametrize("value", ["cahced", "minutes", "minutes:0", "minutes:-3"])
def test_a_misspelt_option_is_named(model, tmp_path, value):
    with pytest.raises(UsageError, match=f"value of `tune` `{value}`"):
        tuned(model, row(value), tmp_path / "cpu.json", tmp_path / "out")


def test_a_choice_that_does_not_fit_is_not_taken(monkeypatch):
    monkeypatch.setattr(tvm_tuning, "workload", lambda *_: "a workload")
    known = tvm_tuning.Known({"a workload": (5, 16, 0)}, {})

    assert known(None, None, [(8, 16, 0), (4, 16, 0)], (8, 16, 0)) == (8, 16, 0)


def test_new_records_are_looked_at_and_an_engine_that_needs_none_stays(tmp_path):
    workspaces.tiny(tmp_path, rows=ROWS)
    shared = tmp_path / "targets" / "tuning" / f"{tvm_cpu.native_cpu()}.json"

    def states():
        states = {}
        job = run.prepare(Workspace(tmp_path), "tiny", targets=["here-tvm"])
        run.export(job, watch=lambda *told: states.update([told[:2]]))
        return states["tuning/here-tvm/fp32"], states["engine/here-tvm/fp32"]

    assert states() == ("built", "built")
    assert states() == ("cached", "cached")
    tvm_records.add(shared, "float32 s9 s9 r9: [a,c] [c,b]", Record(choice=(1, 1, 0), ms=1, rule_ms=1))
    assert states() == ("built", "cached")

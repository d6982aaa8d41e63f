"""Engines for other machines: built here, run under an emulator or on a board behind TVM's RPC."""

import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import backends, emulator, run, samples, store
from pipeline.backends.tvm import BACKEND
from pipeline.errors import BuildError, UnavailableError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.workspace import Workspace
from tests import small, workspaces
from tests.arm import board, machine_of, needs_emulator, row

ROOT = Path(__file__).parents[2]
ROWS = [
    row(),
    row(arch="neoverse-n1"),
    row(arch="neoverse-v1"),
    row("armv7l", "cortex-a7"),
    row("riscv64", "generic-rv64"),
    row(arch="cortex-a53", platform="android"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    entry = small.by_name("ConvBatchNorm")
    recipe = small.recipe_of(entry)
    program = small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))
    return recipe, small.converted(root / "onnx", recipe, program)


def made(folder, model, target):
    return store.make(folder, Key("engine", {"row": target.name}), lambda out: build(model, target, "fp32", out)).stored


@pytest.mark.slow
@pytest.mark.parametrize("target", ROWS, ids=lambda target: f"{target.name}-{target.arch}")
def test_library_is_for_its_machine_and_the_same_each_time(tmp_path, model, target):
    first, second = (made(tmp_path / name, model[1], target) for name in ("first", "second"))

    assert machine_of(first.file("model.so")) == target.machine
    assert first.artifact.files == second.artifact.files
    assert first.artifact.facts["runtime"]["source"]


def test_android_library_names_what_it_needs(tmp_path, model):
    engine = made(tmp_path / "engine", model[1], row(arch="cortex-a53", platform="android"))
    content = engine.file("model.so").read_bytes()

    for name in (b"libc.so\0", b"libm.so\0", b"libtvm_ffi.so\0"):
        assert name in content


def test_web_gets_object_files(tmp_path, model):
    engine = made(tmp_path / "engine", model[1], row("wasm32", "generic", "web"))

    with tarfile.open(engine.file("model.tar")) as archive:
        entries = archive.getmembers()
        heads = [archive.extractfile(entry).read(4) for entry in entries]
    assert heads
    assert set(heads) == {b"\0asm"}
    assert {entry.mtime for entry in entries} == {0}


def test_misspelt_processor_of_another_machine(tmp_path, model):
    with pytest.raises(Exception, match=r"(?s)unknown LLVM processor `cortex-a27`.*did you mean `cortex-a"):
        made(tmp_path / "engine", model[1], row(arch="cortex-a27"))


def test_linker_that_fails_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr("pipeline.tvm.link.LINK", ("--no-such-flag",))

    with pytest.raises(BuildError, match="can't link the engine"):
        made(tmp_path / "engine", model[1], row())


# --- run -----------------------------------------------------------------------------------------------------------


def answers(engine, target, feeds):
    with BACKEND.load(engine, target) as call:
        return call(feeds)


def test_weights_beside_the_library_make_no_difference(tmp_path, model):
    recipe, onnx = model
    inside, beside = (
        row("x86_64", "x86-64-v3", options={"weights": place}, name=f"linux-{place}") for place in ("inside", "beside")
    )
    feeds = samples.feeds(recipe, {"batch": 2}, seed=1)
    engines = [made(tmp_path / target.name, onnx, target) for target in (inside, beside)]

    assert "weights.params" not in engines[0].artifact.files
    assert "weights.params" in engines[1].artifact.files
    for name, found in answers(engines[1], beside, feeds).items():
        np.testing.assert_array_equal(found, answers(engines[0], inside, feeds)[name])


def tiny(root, rows):
    return Workspace(workspaces.tiny(root, rows=rows))


def exported(workspace, recipe, target):
    job = run.prepare(workspace, recipe, targets=[target])
    return run.export(job)[0]


ROW = """
    [targets.board-tvm]
    backend = "tvm"
    platform = "linux"
    machine = "{machine}"
    arch = "{arch}"
    schemes = ["fp32"]
    options = {{ weights = "{weights}" }}
    vs_onnx = {{ fp32 = {{ max_over_peak = 1e-4 }} }}
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_board_is_measured_by_its_own_clock(tmp_path, weights):
    plain = ROW.format(machine="x86_64", arch="x86-64-v3", weights=weights)
    with board() as port:
        rows = plain + f'\n    [targets.board-tvm.device]\n    rpc = "127.0.0.1:{port}"\n'
        verdict = exported(tiny(tmp_path, rows), "tiny", "board-tvm")

    assert verdict.status == "passed", verdict.reason
    assert {timing.threads for timing in verdict.latency.rows} >= {1}
    for timing in verdict.latency.rows:
        assert timing.eager is None
        assert 0 < timing.engines["fp32"].median_ms < 1000
    assert verdict.latency.cpu == "x86-64-v3 (over RPC)"


def test_board_that_hangs_up_is_no_bug(tmp_path, model):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        target = row("x86_64", "x86-64-v3", device={"rpc": f"127.0.0.1:{listener.getsockname()[1]}"})
        engine = made(tmp_path / "engine", model[1], target)
        listener.close()
        with pytest.raises(UnavailableError, match="can't talk to the device"), backends.loaded(engine, target):
            pass


@needs_emulator
@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_emulated_engine_answers_like_the_graph(tmp_path, weights):
    verdict = exported(
        tiny(tmp_path, ROW.format(machine="aarch64", arch="cortex-a72", weights=weights)), "tiny", "board-tvm"
    )

    assert verdict.status == "passed", verdict.reason
    assert verdict.latency.rows == ()
    assert verdict.latency.not_measured.startswith("not measured on the device")
    assert all(size.error is None for size in verdict.parity.sizes)


@needs_emulator
def test_broken_engine_is_told_from_a_broken_emulator(tmp_path, model):
    engine = made(tmp_path / "engine", model[1], row())
    engine.file("model.so").write_bytes(b"not a library")

    with pytest.raises(BuildError, match="can't be loaded on the emulator"), backends.loaded(engine, row()):
        pass


@needs_emulator
def test_nothing_of_the_emulator_outlives_its_use():
    with emulator.serving("cortex-a72") as port, socket.create_connection(("127.0.0.1", port)):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


SHORT = {  # few and short texts: an emulator takes 0.05 s for a token
    "recipe.toml": [("opt = 64, max = 256 }", "opt = 8, max = 16 }")],
    "data.py": [
        ("LONGEST = 256", "LONGEST = 16"),
        (", 24, 32, 48, 64, 96, 128, 192, 256)", ")"),
        ("in (1, 3, 8, 16)", "in (8, 16)"),
    ],
}


def copied(root, name):
    shutil.copytree(ROOT / "recipes" / name, root / "recipes" / name)
    shutil.copytree(ROOT / "targets", root / "targets")
    return root / "recipes" / name


def shorten(folder):
    for name, changes in SHORT.items():
        text = (folder / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has changed"
            text = text.replace(old, new)
        (folder / name).write_text(text)


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "minilm"])
def test_recipe_holds_on_an_emulated_board(tmp_path, name):
    folder = copied(tmp_path, name)
    if name == "minilm":
        shorten(folder)
    verdict = exported(Workspace(tmp_path), name, "rpi4-aarch64-tvm")

    assert verdict.status == "passed", verdict.reason
    assert machine_of(verdict.engine.file("model.so")) == "aarch64"
    worst = max(found.max_over_peak for size in verdict.parity.sizes for found in size.vs_onnx)
    assert worst < 1e-5

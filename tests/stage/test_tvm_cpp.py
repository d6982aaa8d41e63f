"""The C++ consumer of examples/: compiled, and run without Python, here and under an emulator."""

import os
import subprocess

import numpy as np
import pytest

from pipeline import emulator, samples, store
from pipeline.stages.build import build
from pipeline.store import Key
from tests import consumers, small
from tests.arm import needs_emulator, row


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The program for this host, and how it is started."""
    folders = consumers.tvm_libraries()
    program = consumers.tvm_run(["g++"], folders, tmp_path_factory.mktemp("here") / "tvm_run")
    return lambda *words: subprocess.run(
        [program, *words],
        env=os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """The program for 64-bit Arm, and how it is started under the emulator."""
    zig = [*consumers.ZIG, "-Wl,--allow-shlib-undefined"]
    program = consumers.tvm_run(zig, [emulator.folder()], tmp_path_factory.mktemp("arm") / "tvm_run")
    return lambda *words: subprocess.run(
        [*emulator.qemu("cortex-a72"), "-E", f"LD_LIBRARY_PATH={emulator.folder()}", program, *words],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", params=["ConvBatchNorm", "IntAndBool"])
def model(request, tmp_path_factory):
    """One with weights to speak of; and one with inputs of whole numbers and truths, and three outputs."""
    root = tmp_path_factory.mktemp("model")
    entry = small.by_name(request.param)
    recipe = small.recipe_of(entry)
    program = small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))
    return recipe, small.converted(root / "onnx", recipe, program)


def agrees(program, folder, model, target):
    """The program answers like ONNX Runtime, or the test fails."""
    import onnxruntime

    recipe, onnx = model
    engine = store.make(folder / "engine", Key("engine"), lambda out: build(onnx, target, "fp32", out)).stored
    feeds = samples.feeds(recipe, {"batch": 3}, seed=5)
    for name, array in feeds.items():
        (folder / f"{name}.raw").write_bytes(array.tobytes())
    done = program(engine.path, folder, folder, "batch=3")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(onnx.file("model.onnx"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in engine.signature().outputs]
    for name, want in zip(names, session.run(names, feeds), strict=True):
        got = np.fromfile(folder / f"{name}.raw", want.dtype).reshape(want.shape)
        small.assert_near(want, got, name)
        assert f"{name} [ {' '.join(map(str, want.shape))} ]" in done.stdout


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_engine_runs_without_python(tmp_path, here, model, weights):
    agrees(here, tmp_path, model, row("x86_64", "x86-64-v3", options={"weights": weights}))


@needs_emulator
@pytest.mark.slow
def test_engine_runs_without_python_on_an_emulated_board(tmp_path, arm, model):
    agrees(arm, tmp_path, model, row())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "usage: tvm_run"),
        (("no-such-folder", "some-target"), "can't read `no-such-folder/manifest.json`"),
        (("no-such-folder", ".", "."), "can't read `no-such-folder/signature.json`"),
    ],
)
def test_what_is_wrong_is_said(here, words, told):
    done = here(*words)

    assert done.returncode == 2
    assert told in done.stderr

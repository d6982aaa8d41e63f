"""The C++ consumers in examples/ on an emulated board: 64-bit Arm, and no Python."""

import pytest

from pipeline import emulator
from tests import browser, consumers
from tests.arm import machine_of, needs_emulator
from tests.consumers import ARM_TVM, EXAMPLES, ORT, ran

pytestmark = [needs_emulator, pytest.mark.slow]
LIBRARY = "onnxruntime-node/bin/napi-v6/linux/arm64/libonnxruntime.so.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release folder with an engine for each of the programs."""
    return consumers.released(tmp_path_factory.mktemp("arm") / "yard", rows=consumers.ARM_ROWS)


def emulated(program, *words, **environment):
    named = [word for name, value in environment.items() for word in ("-E", f"{name}={value}")]
    return ran(*emulator.qemu("cortex-a72"), *named, program, *words)


def test_onnxruntime(folder, tmp_path):
    program = consumers.ort_run(consumers.ZIG, tmp_path / "ort_run")
    library = browser.npm_modules(EXAMPLES / "node") / LIBRARY
    code, told = emulated(program, folder, ORT, ONNXRUNTIME=library)

    assert machine_of(program) == machine_of(library) == "aarch64"
    assert code == 0, told
    assert told.count("ok ") == 2 * 3


def test_tvm(folder, tmp_path):
    zig = [*consumers.ZIG, "-Wl,--allow-shlib-undefined"]
    program = consumers.tvm_run(zig, [emulator.folder()], tmp_path / "tvm_run")
    code, told = emulated(program, folder, ARM_TVM, LD_LIBRARY_PATH=emulator.folder())

    assert machine_of(program) == "aarch64"
    assert code == 0, told
    assert told.count("ok ") == 2 * 3

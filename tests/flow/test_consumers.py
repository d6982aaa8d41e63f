"""The consumers in examples/: each runs a release by what is in it, and reproduces its golden vectors."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests import consumers
from tests.consumers import BUCKETS, EXAMPLES, ORT, TVM, ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release folder with all its engines; not to be changed."""
    return consumers.published(tmp_path_factory.mktemp("consumers") / "yard", rows=consumers.ROWS) / (
        "artifacts/tiny/release"
    )


@pytest.fixture
def spoiled(folder, tmp_path) -> Path:
    """A release whose golden vectors no engine reproduces."""
    shutil.copytree(folder, tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "golden.safetensors"
    tensors = load_file(path)
    tensors["odd/out/logits"][0, 0] += 0.01
    tensors["min/out/label"][0] += 1
    save_file(tensors, path)
    return tmp_path / "spoiled"


def python(release, *words):
    return ran(sys.executable, "-I", EXAMPLES / "python_onnxruntime" / "release.py", release, *words)


@pytest.mark.parametrize("target", [ORT, BUCKETS])
def test_python_with_onnxruntime_alone(folder, target):
    code, told = python(folder, "--target", target)

    assert code == 0, told
    assert told.count("ok ") == 2 * 3


def test_python_finds_wrong_numbers(spoiled):
    code, told = python(spoiled, "--target", ORT)

    assert code == 1
    assert "WRONG odd  logits: differs by 1.0e-02" in told
    assert "WRONG min  label: 0.0000 equal" in told
    assert told.count("WRONG") == 2


@pytest.fixture(scope="module")
def ort_run(tmp_path_factory):
    """The C++ program for ONNX Runtime, with the library of the Python package."""
    program = consumers.ort_run(["g++"], tmp_path_factory.mktemp("ort") / "ort_run")
    library = next((consumers.package("onnxruntime") / "capi").glob("libonnxruntime.so.*"))
    return lambda *words: ran(program, *words, env=os.environ | {"ONNXRUNTIME": str(library)})


def test_cpp_with_onnxruntime(ort_run, folder):
    code, told = ort_run(folder, ORT)

    assert code == 0, told
    assert told.startswith(f"tiny v1.0.0, {ORT} (fp32)\n")
    assert told.count("ok ") == 2 * 3


def test_cpp_finds_wrong_numbers(ort_run, spoiled):
    code, told = ort_run(spoiled, ORT)

    assert code == 1
    assert "WRONG odd  logits: differs by 1.0e-02" in told
    assert "WRONG min  label: 0.0000 equal" in told
    assert told.count("WRONG") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "usage: ort_run RELEASE_FOLDER [TARGET]"),
        (("no-such-folder",), "can't read `no-such-folder/manifest.json`"),
        (("RELEASE", "no-such-target"), "the release has no engine for `no-such-target`"),
        (("RELEASE", BUCKETS), f"`{BUCKETS}` has buckets"),
        (("RELEASE",), "name a target: 2 would do"),
    ],
)
def test_cpp_says_what_is_missing(ort_run, folder, words, told):
    code, output = ort_run(*(folder if word == "RELEASE" else word for word in words))

    assert code == 2
    assert told in output


def test_cpp_with_tvm(tmp_path, folder, spoiled):
    places = consumers.tvm_libraries()
    program = consumers.tvm_run(["g++"], places, tmp_path / "tvm_run")
    env = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, places))}
    code, told = ran(program, folder, TVM, env=env)
    wrong = ran(program, spoiled, TVM, env=env)

    assert code == 0, told
    assert told.count("ok ") == 2 * 3
    assert wrong[0] == 1
    assert wrong[1].count("WRONG") == 2

"""The consumers in examples/: each runs a release by what is in it, and reproduces its golden vectors."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests import consumers
from tests.consumers import BUCKETS, EXAMPLES, ORT, ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release folder with all its engines; not to be changed."""
    return consumers.published(tmp_path_factory.mktemp("consumers") / "yard", rows=consumers.rows()) / (
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

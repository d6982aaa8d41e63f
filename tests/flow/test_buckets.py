"""A release whose engines have buckets: published, pulled, and run by what the manifest and the documents say alone."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import initial, manifest, pull, release, run
from pipeline.errors import ReleaseError
from pipeline.workspace import ROWS, Workspace
from tests import workspaces

DOCUMENT = Path(__file__).parents[2] / "docs" / "releases.md"
ROW = """
    [targets.any-onnxruntime]
    backend = "onnxruntime"
    platform = "any"
    machine = "any"
    arch = "generic"
    schemes = ["int8-u8u8", "fp32"]
    vs_onnx = { fp32 = { sqnr_db = 80 }, int8-u8u8 = { sqnr_db = 25 } }

    [targets.any-onnxruntime.buckets]
    batch = [1, 3]
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A workspace with one release of `tiny`, and its job."""
    root = workspaces.under_git(workspaces.tiny(tmp_path_factory.mktemp("buckets") / "workspace", rows=ROW))
    initial.init(root, root.parent / "remote")
    subprocess.run(["git", "commit", "-qam", "remote"], cwd=root, check=False)
    job = run.prepare(Workspace(root), "tiny")
    verdicts = run.export(job)
    assert verdicts[0].status == "passed", verdicts[0].reason
    release.publish(job, verdicts, allow_dirty=True)
    return root, job, verdicts


@pytest.fixture
def pulled(published, tmp_path):
    return pull.fetch(published[0], "tiny", "1.0.0", None, tmp_path / "edge").folder


def test_the_manifest_says_which_files_are_for_which_sizes(pulled):
    engine = manifest.load(pulled).engines["any-onnxruntime"]

    assert engine.selector.axes["batch"].model_dump() == {"min": 1, "opt": 2, "max": 3}
    assert [dict(one.sizes) for one in engine.selector.buckets] == [{"batch": 1}, {"batch": 3}]
    for one in engine.selector.buckets:
        folder = f"engines/any-onnxruntime/batch{one.sizes['batch']}"
        assert one.files == (f"{folder}/model.onnx", f"{folder}/signature.json")
        assert set(one.files) <= {file.path for file in engine.files}
        assert all((pulled / name).is_file() for name in one.files)


def test_the_documented_consumer_gives_the_golden_answers(pulled):
    (code,) = re.findall(r"```python\n(import json, numpy, onnxruntime\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
    asks = """
    from safetensors.numpy import load_file, save_file

    golden = load_file("golden.safetensors")
    found = {}
    for case, sizes in manifest["golden"]["cases"].items():
        found[case] = run("any-onnxruntime", {"images": golden[f"{case}/in/images"]})["logits"]
    save_file(found, "found.safetensors")
    try:
        run("any-onnxruntime", {"images": numpy.zeros((4, 1, 8, 8), "float32")})
    except StopIteration:
        print("too large")
    """
    command = [sys.executable, "-c", code + dedent(asks)]
    done = subprocess.run(command, cwd=pulled, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "too large\n"
    golden, found = load_file(pulled / "golden.safetensors"), load_file(pulled / "found.safetensors")
    bound = manifest.parse((pulled / "manifest.json").read_text(), "manifest").engines["any-onnxruntime"].golden
    assert set(found) == {"min", "odd", "opt"}
    for case, logits in found.items():
        assert logits.shape == golden[f"{case}/out/logits"].shape
        assert np.abs(logits - golden[f"{case}/out/logits"]).max() <= bound["logits"].max_abs


def test_a_damaged_bucket_is_found(pulled):
    (pulled / "engines/any-onnxruntime/batch3/model.onnx").write_bytes(b"")

    with pytest.raises(ReleaseError, match=r"batch3/model\.onnx` has 0 bytes"):
        manifest.load(pulled)


def test_the_same_engines_are_not_released_twice_but_other_buckets_are(published):
    root, job, verdicts = published
    assert not release.publish(job, verdicts, allow_dirty=True).fresh

    (root / ROWS).write_text((root / ROWS).read_text().replace("[1, 3]", "[2, 3]"))
    again = run.prepare(Workspace(root), "tiny")
    done = release.publish(again, run.export(again), allow_dirty=True)

    assert (done.fresh, done.version) == (True, "1.0.1")


def test_int8_is_counted_in_the_bucket_of_the_opt_sizes(published):
    found = published[2][0].audits["int8-u8u8"]

    assert (found.sizes, found.not_audited) == ({"batch": 3}, None)
    assert found.int8_share == 1

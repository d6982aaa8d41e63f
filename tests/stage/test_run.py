"""The chain: what is made, what is made again and why, and what a kill leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli, run, store
from pipeline.workspace import Workspace
from tests import workspaces

FOLDER = Path("recipes/tiny")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workspace with a finished export, only to be looked at."""
    root = workspaces.tiny(tmp_path_factory.mktemp("exported"))
    verdicts = run.export(run.prepare(Workspace(root), "tiny"))
    return root, verdicts


@pytest.fixture
def root(exported, tmp_path):
    """A copy of a finished export, to be changed."""
    subprocess.run(["cp", "-a", f"{exported[0]}/.", tmp_path], check=True)
    return tmp_path


def states(root, **options):
    """The state of each step of an export."""
    found = {}
    run.export(
        run.prepare(Workspace(root), "tiny", **options), watch=lambda step, state, _: found.update({step: state})
    )
    return found


def worked(found):
    return sorted(step for step, state in found.items() if state != "cached")


def test_every_target_passes_with_its_evidence(exported):
    _, verdicts = exported
    assert [(verdict.target.name, verdict.status) for verdict in verdicts] == [
        ("any-onnxruntime", "passed"),
        ("any-echo", "passed"),
    ]
    first = verdicts[0]
    assert set(first.candidates) == {"int8-u8u8", "fp32"}
    assert {tuple(one.sizes.values()) for one in first.parity.sizes} == {(1,), (2,), (4,)}
    assert first.latency.rows[0].engines.keys() == {"int8-u8u8", "fp32"}
    assert all(row.eager.median_ms > 0 for row in first.latency.rows)


def test_a_second_export_makes_nothing(root):
    assert worked(states(root)) == []


def test_with_nothing_to_do_torch_is_not_even_imported(root):
    script = (
        "import sys; from pipeline import cli; "
        f"code = cli.invoke(['export', 'tiny', '-C', {str(root)!r}]); "
        "print(code, sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'prefect', 'dvc', 'tvm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    subprocess.run(command, capture_output=True, check=True)  # draws the report, which is part of a first export
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "nothing to do" in done.stderr


def test_an_unrelated_file_makes_nothing_stale(root):
    (root / FOLDER / "notes.py").write_text("x = 1\n")
    (root / "README.md").write_text("hello\n")
    assert worked(states(root)) == []


def test_calibration_data_changed_in_place(root):
    np.savez(root / FOLDER / "calibration.npz", images=workspaces.images(16, seed=5))
    found = worked(states(root))
    assert "statistics" in found
    assert "onnx/int8-u8u8" in found
    assert "program" not in found
    assert "engine/any-echo/fp32" not in found


def test_a_comment_in_the_model_rebuilds_the_program_and_nothing_after_it(root):
    with (root / FOLDER / "model.py").open("a") as text:
        text.write("# a comment\n")
    assert worked(states(root)) == ["program"]


def test_another_checkpoint(root, tmp_path):
    from safetensors.numpy import save_file

    save_file(workspaces.weights(seed=1), tmp_path / "new.safetensors")
    found = worked(states(root, checkpoint=tmp_path / "new.safetensors"))
    assert "program" in found
    assert "parity/any-onnxruntime/fp32" in found
    assert "data" not in found


def test_the_row_of_one_target(root):
    rows = root / "targets/targets.toml"
    rows.write_text(rows.read_text().replace('"extended"', '"basic"'))
    found = worked(states(root))
    assert "engine/any-onnxruntime/fp32" in found
    assert not any("any-echo" in step for step in found)


def test_a_damaged_engine_is_made_again_and_that_is_said(root):
    engine = root / "artifacts/tiny/engine/any-onnxruntime/fp32/model.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    found = states(root)
    assert found["engine/any-onnxruntime/fp32"].startswith("rebuilt (damaged: `model.onnx` has other bytes")
    assert worked(found) == ["engine/any-onnxruntime/fp32"]


def test_an_engine_outside_the_budget_is_kept_but_does_not_pass(root):
    recipe = root / FOLDER / "recipe.toml"
    recipe.write_text(recipe.read_text() + "vs_eager = { sqnr_db = 60 }\n")
    verdicts = run.export(run.prepare(Workspace(root), "tiny"))
    first = verdicts[0]
    assert first.scheme == "fp32"
    assert not first.candidates["int8-u8u8"].passed
    assert "too far from eager fp32" in first.candidates["int8-u8u8"].reasons[0]
    assert "int8-u8u8 too far from eager fp32" in first.reason
    store.load(root / "artifacts/tiny/engine/any-onnxruntime/int8-u8u8")


def test_one_target_fails_and_the_other_stands(root, capsys):
    rows = root / "targets/targets.toml"
    rows.write_text(rows.read_text().replace("reference = true", 'fail = "build"'))
    assert cli.invoke(["export", "tiny", "-C", str(root)]) == 9
    out, err = capsys.readouterr()
    assert "any-onnxruntime" in out
    assert "failed" in out
    assert "Traceback" not in err
    page = (root / "artifacts/tiny/report/index.html").read_text()
    assert "Not ready for release" in page


def test_several_targets_at_once_give_the_same_engines(exported, tmp_path):
    root = workspaces.tiny(tmp_path)
    verdicts = run.export(run.prepare(Workspace(root), "tiny"), jobs=2)
    assert {v.target.name: v.status for v in verdicts} == {"any-onnxruntime": "passed", "any-echo": "passed"}
    for name in ("engine/any-onnxruntime/fp32", "engine/any-onnxruntime/int8-u8u8", "engine/any-echo/fp32"):
        one, two = (store.load(base / "artifacts/tiny" / name) for base in (root, exported[0]))
        assert one.digest == two.digest


def start(root):
    environment = os.environ | {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "pipeline", "export", "tiny", "-C", str(root)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


@pytest.mark.slow
def test_killed_at_every_stage_the_next_run_goes_on(exported, tmp_path):
    root = workspaces.tiny(tmp_path)
    finished = []
    for _ in range(20):
        process = start(root)
        line = process.stderr.readline()
        if " built" not in line:
            process.stderr.read()
            break
        process.kill()
        process.wait()
        process.stderr.close()
        finished.append(line.split()[2])
    process.stderr.close()
    assert process.wait() == 0
    assert len(finished) == len(set(finished)), "a finished step was made again"
    assert len(finished) >= 8
    for made in sorted((exported[0] / "artifacts/tiny").rglob("artifact.json")):
        folder = made.parent.relative_to(exported[0])
        kind = store.load(exported[0] / folder)
        if kind.artifact.kind in ("checkpoint", "data", "program", "statistics", "engine"):  # the rest are measurements
            assert store.load(root / folder).digest == kind.digest
    assert not list(root.rglob("*.tmp"))


def test_ctrl_c_ends_with_one_line(tmp_path):
    root = workspaces.tiny(tmp_path)
    process = start(root)
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert "checkpoint" in first
    assert "interrupted: what was finished is kept" in rest
    assert "Traceback" not in rest
    assert store.peek(root / "artifacts/tiny/checkpoint") is not None
    assert not list(root.rglob("*.tmp"))

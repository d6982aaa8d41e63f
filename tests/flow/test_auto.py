"""A row that chooses among rows: which one it takes, what it says of the others, and what is released."""

import json
import subprocess

import pytest

from pipeline import cli, initial, manifest, pull, release, run
from pipeline.errors import UsageError
from pipeline.types import Comparison
from pipeline.workspace import ROWS, Workspace
from tests import workspaces

MORE = """
    [targets.any-wrong]
    backend = "echo"
    platform = "any"
    machine = "any"
    arch = "none"
    schemes = ["fp32"]
    vs_onnx = { fp32 = { sqnr_db = 80 } }

    [targets.elsewhere]
    backend = "echo"
    platform = "any"
    machine = "any"
    arch = "none"
    schemes = ["fp32"]
    options = { fail = "missing" }
    vs_onnx = { fp32 = { sqnr_db = 80 } }

    [targets.any-auto]
    summary = "the fastest"
    backend = "auto"
    platform = "any"
    machine = "any"
    arch = "native"
    candidates = ["any-echo", "any-onnxruntime", "any-wrong", "elsewhere"]

    [targets.none-auto]
    backend = "auto"
    platform = "any"
    machine = "any"
    arch = "native"
    candidates = ["elsewhere", "any-wrong"]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workspace whose rows that choose were exported; its job and the verdicts."""
    root = workspaces.tiny(tmp_path_factory.mktemp("auto") / "workspace", rows=workspaces.ROWS + MORE)
    initial.init(workspaces.under_git(root), root.parent / "remote")
    subprocess.run(["git", "commit", "-qam", "remote"], cwd=root, check=False)
    job = run.prepare(Workspace(root), "tiny", targets=["any-auto", "none-auto"])
    return root, job, run.export(job)


def test_the_fastest_row_wins_and_the_others_are_told(exported):
    _, job, (best, none) = exported

    assert [target.name for target in job.targets] == ["any-echo", "any-onnxruntime", "any-wrong", "elsewhere"]
    assert (best.target.name, best.status, best.built_for) == ("any-auto", "passed", "any-onnxruntime")
    assert (best.target.backend, best.target.summary) == ("onnxruntime", "the fastest")
    assert best.engine.path.parent.name == "any-onnxruntime"
    for part in (
        r"any-onnxruntime is the fastest row, ",
        r"any-echo has 0.",
        r"any-wrong failed: fp32 not its ONNX graph",
        r"elsewhere not built here: ",
    ):
        assert part in best.reason
    compared = Comparison.model_validate_json(job.made["latency/any-auto"].stored.file("comparison.json").read_text())
    assert [set(at) for at in compared.versus_eager] == [{"any-onnxruntime", "any-echo"}] * 2
    assert (none.target.name, none.status) == ("none-auto", "failed")
    assert none.reason.startswith("none of its rows passed; elsewhere not built here")


def test_the_release_has_the_engine_and_the_evidence(exported, tmp_path):
    root, job, verdicts = exported
    release.publish(job, verdicts[:1], allow_dirty=True)
    found = manifest.load(pull.fetch(root, "tiny", "1.0.0", None, tmp_path / "edge").folder)

    engine = found.engines["any-auto"]
    assert (engine.target.name, engine.target.backend) == ("any-auto", "onnxruntime")
    assert all(file.path.startswith("engines/any-auto/") for file in engine.files)
    tried = {(one.target, one.scheme): one for one in found.tried["any-auto"]}
    assert set(tried) == {
        *(("any-onnxruntime", scheme) for scheme in ("fp32", "int8-u8u8")),
        *(("any-echo", "fp32"), ("any-wrong", "fp32")),
    }
    assert [one.target for one in tried.values() if one.chosen] == ["any-onnxruntime"]
    assert tried["any-echo", "fp32"].outcome == "the best of its row, which another one outdoes"
    assert tried["any-echo", "fp32"].speeds
    stages = (root / "dvc.yaml").read_text()
    assert "engine/any-echo" in stages
    assert "any-auto" not in stages


def test_the_command_line_takes_such_a_row(exported, capsys):
    root = str(exported[0])

    assert cli.invoke(["export", "tiny", "--target", "any-auto", "--json", "-C", root]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["target"], found["status"]) == ("any-auto", "passed")
    assert cli.invoke(["targets", "-C", root]) == 0
    assert cli.invoke(["status", "tiny", "--target", "any-auto", "-C", root]) == 0
    assert cli.invoke(["make", "tiny", "engine/any-auto", "-C", root]) == UsageError.exit_code
    assert "`any-auto` has no engine of its own: it chooses among any-echo" in capsys.readouterr().err


def test_a_row_that_chooses_is_no_candidate(tmp_path):
    more = MORE.replace("any-auto]", "auto-auto]").replace('"any-echo", ', '"none-auto", ')
    root = workspaces.tiny(tmp_path, rows=workspaces.ROWS + more)

    with pytest.raises(UsageError, match="`auto-auto` chooses among others, and so does its candidate `none-auto`"):
        run.prepare(Workspace(root), "tiny", targets=["auto-auto"])


def test_a_misspelt_candidate_is_named(exported, tmp_path):
    root = workspaces.tiny(tmp_path, rows=(exported[0] / ROWS).read_text().replace('"any-echo", ', '"any-ecko", '))

    with pytest.raises(UsageError, match=r"(?s)unknown target `any-ecko`.*`any-echo`"):
        run.prepare(Workspace(root), "tiny", targets=["any-auto"])

"""The command `explain`: what it says of engines that are right, and of one with a fault."""

import json
import re

import onnx
import pytest
from safetensors.numpy import save_file

from pipeline import cli, run
from pipeline.errors import ParityError
from pipeline.workspace import Workspace
from tests import faults, workspaces

TARGET = "any-onnxruntime"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with a finished export."""
    made = workspaces.tiny(tmp_path_factory.mktemp("explained"))
    run.export(run.prepare(Workspace(made), "tiny", targets=[TARGET]))
    return made


def explained(capsys, root, *options: str) -> tuple[int, list[dict]]:
    code = cli.invoke(["explain", "tiny", "-C", str(root), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("scheme", ["fp32", "int8-u8u8"])
def test_nothing_departs_in_an_engine_that_is_right(root, capsys, scheme):
    code, found = explained(capsys, root, "--target", TARGET, "--scheme", scheme)
    assert code == 0
    assert [(one["scheme"], one["departures"]) for one in found] == [(scheme, [])]
    assert found[0]["compared"] > 2
    assert found[0]["not_compared"] is None
    assert {one["module"] for one in found[0]["layers"]} >= {"conv", "head"}
    kept = root / "artifacts" / "tiny" / "explanation" / TARGET / scheme / "explanation.json"
    assert json.loads(kept.read_text()) == found[0]


def test_an_explanation_that_is_there_is_not_made_again(root, capsys):
    explained(capsys, root, "--target", TARGET, "--scheme", "fp32")
    kept = root / "artifacts" / "tiny" / "explanation" / TARGET / "fp32" / "explanation.json"
    before = kept.stat().st_mtime_ns
    assert explained(capsys, root, "--target", TARGET, "--scheme", "fp32")[0] == 0
    assert kept.stat().st_mtime_ns == before


def broken(root, tmp_path):
    """The engine of the store with a wrong bias."""
    artifacts = root / "artifacts" / "tiny"
    engine = onnx.load(artifacts / "engine" / TARGET / "fp32" / "model.onnx")
    faults.wrong_bias(engine, onnx.load(artifacts / "onnx" / "fp32" / "model.onnx"))
    onnx.save(engine, tmp_path / "broken.onnx")
    return str(tmp_path / "broken.onnx")


def test_an_engine_from_elsewhere_with_a_wrong_bias(root, tmp_path, capsys):
    options = ("--target", TARGET, "--scheme", "fp32", "--engine", broken(root, tmp_path))
    code, found = explained(capsys, root, *options)
    assert code == ParityError.exit_code
    (one,) = found[0]["departures"]
    assert (one["level"], one["operator"], one["kind"]) == ("engine", "Conv", "bias")
    assert one["module"] == "conv"
    assert one["line"].startswith("recipes/tiny/model.py:"), one["line"]
    assert one["own"] < one["allowed"]


def test_the_verdict_comes_first(root, tmp_path, capsys):
    options = ["--target", TARGET, "--scheme", "fp32", "--engine", broken(root, tmp_path)]
    assert cli.invoke(["explain", "tiny", "-C", str(root), *options]) == ParityError.exit_code
    said = capsys.readouterr()
    assert f"{TARGET} fp32: conv (Conv, recipes/tiny/model.py:" in said.err.replace("\n", " ")
    assert "on right inputs where rounding explains" in " ".join(said.err.split())
    assert "export again" in said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "none.onnx"], "needs one `--target` and a `--scheme`"),
        (["--engine", "none.onnx", "--target", TARGET, "--scheme", "fp32"], "there is no engine `none.onnx`"),
        (["--target", TARGET, "--scheme", "fp23"], "did you mean `fp32`?"),
    ],
)
def test_a_wrong_option_is_told(root, capsys, options, message):
    assert cli.invoke(["explain", "tiny", "-C", str(root), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_engine(root, tmp_path, capsys):
    (tmp_path / "engine.onnx").write_bytes(b"no graph")
    options = ["--target", TARGET, "--scheme", "fp32", "--engine", str(tmp_path / "engine.onnx")]
    assert cli.invoke(["explain", "tiny", "-C", str(root), *options]) not in (0, 1, ParityError.exit_code)
    assert "can't load the engine" in capsys.readouterr().err


def test_a_form_that_is_right_and_fails_all_the_same(tmp_path, capsys):
    root = workspaces.tiny(tmp_path)
    path = root / "recipes" / "tiny" / "recipe.toml"
    path.write_text(f"{path.read_text()}\nvs_eager = {{ sqnr_db = 90 }}\n")  # [budget] is its last table
    other = root / "other.safetensors"
    save_file(workspaces.weights(seed=1), other)
    code = cli.invoke(["explain", "tiny", "-C", str(root), "--target", TARGET, "--checkpoint", str(other)])
    told = " ".join("".join(capsys.readouterr()).split())
    assert code == 0, told
    assert re.search(rf"{TARGET} int8-u8u8: nothing departs: \d+ tensors compared (?!compared)", told)
    assert "it fails parity all the same: too far from eager fp32: `logits` sqnr_db" in told
    assert "exportyard quantize tiny --explain" in told

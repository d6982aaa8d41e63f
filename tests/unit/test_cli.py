"""The command line's surface is a promise: what there is, what it costs to ask, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli

SURFACE = {
    "init": {"--remote"},
    "recipes": {"-C", "--json"},
    "targets": {"-C", "--json"},
    "export": {"--checkpoint", "--target", "-t", "--jobs", "-j", "-C", "--json"},
    "parity": {"--target", "-t", "-C", "--json"},
    "quantize": {"--target", "-t", "--explain", "-C", "--json"},
    "publish": {"--checkpoint", "--target", "-t", "--bump", "--jobs", "-j", "--allow-dirty", "-C", "--json"},
    "releases": {"-C", "--json"},
    "pull": {"--to", "--from", "--target", "-t", "-C", "--json"},
    "status": {"--checkpoint", "--target", "-t", "-C", "--json"},
    "make": {"-C"},
    "doctor": {"-C", "--json"},
}
HEAVY = ("torch", "prefect", "dvc", "numpy", "onnx", "onnxruntime", "tvm", "git")


def test_the_surface_is_frozen():
    import typer

    group = typer.main.get_command(cli.app)
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        - {"--help", "--no-json", "--no-allow-dirty", "--no-explain"}
        for name, command in group.commands.items()
    }
    assert found == SURFACE


@pytest.mark.parametrize("command", ["", *SURFACE])
def test_each_command_explains_itself(command, capsys):
    assert cli._run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    assert len(text.splitlines()) > 5


def loaded_by(code, folder):
    """Heavy modules that a fresh interpreter has after `code`."""
    script = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_command_line_loads_nothing_heavy(tmp_path):
    assert loaded_by("import pipeline.cli", tmp_path) == "[]"


def test_help_loads_nothing_heavy(tmp_path):
    assert loaded_by("from pipeline import cli; cli._run(['export', '--help'])", tmp_path) == "[]"


def test_the_version(capsys):
    assert cli._run(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_a_bug_of_ours_is_said_and_its_details_kept(monkeypatch, capsys):
    monkeypatch.delenv("EXPORTYARD_DEBUG", raising=False)

    def broken(_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli.workspace, "find", broken)
    assert cli._run(["recipes"]) == 1
    err = capsys.readouterr().err
    assert "a bug in exportyard: ZeroDivisionError: oh" in err
    log = err.split("report it with `")[1].split("`")[0]
    assert "Traceback" in Path(log).read_text()


def test_interrupted(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.workspace, "find", stop)
    assert cli._run(["recipes"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_recipes_and_targets_as_json(tmp_path, capsys):
    from tests import workspaces

    workspaces.tiny(tmp_path)
    assert cli._run(["recipes", "--json", "-C", str(tmp_path)]) == 0
    assert [recipe["name"] for recipe in json.loads(capsys.readouterr().out)] == ["tiny"]
    assert cli._run(["targets", "--json", "-C", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["missing"] for row in rows} == {"any-onnxruntime": None, "any-echo": None}

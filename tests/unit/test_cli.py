"""The command line's surface is a promise: what there is, what it costs to ask, and how it fails."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, workspace

SURFACE = {
    "init": {"--remote"},
    "recipes": {"-C", "--json"},
    "targets": {"-C", "--json"},
    "export": {"--checkpoint", "--target", "-t", "--jobs", "-j", "-C", "--json"},
    "parity": {"--target", "-t", "-C", "--json"},
    "stress": {"--target", "-t", "--scheme", "--seconds", "--seed", "--keep", "-C", "--json"},
    "tolerance": {"--target", "-t", "--margin", "-C", "--json"},
    "profile": {"--target", "-t", "--by", "--depth", "--scheme", "-C", "--json"},
    "bench": {"--target", "-t", "--threads", "--seconds", "--baseline", "--pin", "--all", "-C", "--json"},
    "quantize": {"--target", "-t", "--explain", "-C", "--json"},
    "explain": {"--target", "-t", "--scheme", "-s", "--engine", "--layers", "--checkpoint", "-C", "--json"},
    "publish": {
        *("--checkpoint", "--target", "-t", "--bump", "--jobs", "-j", "--allow-dirty", "--allow-regression"),
        *("-C", "--json"),
    },
    "releases": {"-C", "--json"},
    "pull": {
        *("--to", "--from", "--key", "--target", "-t", "--backend", "--check"),
        *("--watch", "--every", "--back", "-C", "--json"),
    },
    "mirror": {"--all", "--verify", "--registry", "-C", "--json"},
    "promote": {"--registry", "-C", "--json"},
    "rollback": {"--registry", "-C", "--json"},
    "channels": {"-C", "--json"},
    "gc": {"--keep", "--yes", "--registry", "-C", "--json"},
    "status": {"--checkpoint", "--target", "-t", "-C", "--json"},
    "make": {"-C"},
    "notify": {"--recipe", "--again", "--event", "-C", "--json"},
    "watch": {"--recipe", "--pattern", "--once", "--poll", "-C"},
    "doctor": {"-C", "--json"},
    "deploy": {"--dry-run", "-C", "--json"},
    "worker": {"--limit", "-C"},
    "setup": set(),
    "diff": {"-C", "--json"},
    "verify": {"--key", "--expect", "--json"},
    "keygen": set(),
}
HEAVY = ("torch", "prefect", "dvc", "numpy", "onnx", "onnxruntime", "tvm", "git", "cryptography")


def test_the_surface_is_frozen():
    import typer

    group = typer.main.get_command(cli.app)
    found = {
        name: {
            option
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("-") and not option.startswith("--no-") and option != "--help"
        }
        for name, command in group.commands.items()
    }
    assert found == SURFACE


@pytest.mark.parametrize("command", ["", *SURFACE])
def test_each_command_explains_itself(command, capsys):
    assert cli.invoke([*command.split(), "--help"]) == 0
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
    assert loaded_by("from pipeline import cli; cli.invoke(['export', '--help'])", tmp_path) == "[]"


def test_the_version(capsys):
    assert cli.invoke(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_a_bug_of_ours_is_said_and_its_details_kept(monkeypatch, capsys):
    monkeypatch.delenv("EXPORTYARD_DEBUG", raising=False)

    def broken(_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(workspace, "find", broken)
    assert cli.invoke(["recipes"]) == 1
    err = capsys.readouterr().err
    assert "a bug in exportyard: ZeroDivisionError: oh" in err
    log = err.split("report it with `")[1].split("`")[0]
    assert "Traceback" in Path(log).read_text()


def test_interrupted(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "find", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.invoke(["recipes"])


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_stopped_while_modules_are_imported(number, word):
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", "targets"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    seen = iter(process.stderr.readline, "")
    assert any("pipeline.errors" in line for line in seen)
    process.send_signal(number)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + number
    assert f"{word}: what was finished is kept" in rest
    assert "Traceback" not in rest


def test_output_that_can_not_be_written():
    command = [sys.executable, "-m", "pipeline", "targets"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "can't write" in done.stderr
    assert "Traceback" not in done.stderr


def test_recipes_and_targets_as_json(tmp_path, capsys):
    from tests import workspaces

    workspaces.tiny(tmp_path)
    assert cli.invoke(["recipes", "--json", "-C", str(tmp_path)]) == 0
    assert [recipe["name"] for recipe in json.loads(capsys.readouterr().out)] == ["tiny"]
    assert cli.invoke(["targets", "--json", "-C", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["missing"] for row in rows} == {"any-onnxruntime": None, "any-echo": None}

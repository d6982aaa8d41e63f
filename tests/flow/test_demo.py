"""The demo's own parts; the flow that it runs has tests of its own, and `make demo` is run by hand and by CI."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from flows import demo, server
from pipeline import git
from pipeline.errors import UnavailableError, UsageError
from pipeline.workspace import find

REPOSITORY = Path(demo.__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the demo reads of a clone."""
    root = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "recipes/digits", root / "recipes/digits")
    shutil.copytree(REPOSITORY / "targets", root / "targets")
    return root


def commits(root: Path) -> list[str]:
    return git.run(root, "log", "--format=%s").splitlines()


def test_the_scratch_workspace_follows_the_clone(clone: Path) -> None:
    root, remote = clone / ".scratch/demo", clone / ".scratch/remote"
    (clone / "recipes/digits/weights.safetensors").write_bytes(b"not a source")
    root.parent.mkdir()
    demo.prepare(clone, root, remote)
    assert find(root).recipe("digits").name == "digits"
    assert not (root / "recipes/digits/weights.safetensors").exists()
    assert git.run(root, "status", "--porcelain") == ""
    first = commits(root)

    demo.prepare(clone, root, remote)
    assert commits(root) == first

    (clone / "recipes/digits/model.py").write_text("changed = True\n")
    (clone / "recipes/digits/data.py").unlink()
    demo.prepare(clone, root, remote)
    assert commits(root) == ["Take digits and the target rows from the clone", *first]
    assert (root / "recipes/digits/model.py").read_text() == "changed = True\n"
    assert not (root / "recipes/digits/data.py").exists()
    assert git.run(root, "status", "--porcelain") == ""
    assert not (clone / ".git").exists()


def test_two_demos_in_one_clone_are_one_too_many(tmp_path: Path) -> None:
    with demo.alone(tmp_path), pytest.raises(UsageError, match="another demo is running"), demo.alone(tmp_path):
        pass
    with demo.alone(tmp_path):
        pass


def test_a_server_that_does_not_start_is_an_error_with_a_way_out(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = clone / "prefect"
    broken.write_text(f"#!{sys.executable}\nraise SystemExit('no server today')\n")
    broken.chmod(0o755)
    monkeypatch.setattr(server, "script", lambda _: broken)
    monkeypatch.setattr(demo, "CLONE", clone)
    assert demo.main() == UnavailableError.exit_code
    said = capsys.readouterr().err
    assert "no server today" in said
    assert "hint: the whole log is" in said
    assert "Traceback" not in said


def test_ctrl_c_is_not_a_failure_to_explain(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(home: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "local_server", interrupted)
    monkeypatch.setattr(demo, "CLONE", clone)
    assert demo.main() == 130
    assert "`make demo` goes on from there" in capsys.readouterr().err

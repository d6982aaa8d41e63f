"""A new workspace: complete, under git and DVC, and never at the cost of what was there."""

import tomllib
from pathlib import Path

import pytest

from pipeline import initial, targets, workspace
from pipeline.errors import UsageError, WorkspaceError
from tests.releases import run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _identity(monkeypatch, tmp_path):
    (tmp_path / "gitconfig").write_text("[user]\n  name = test\n  email = test@example.com\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))


@pytest.mark.parametrize(("packaged", "original"), [("targets.toml", "targets/targets.toml"), ("prefect.yaml",) * 2])
def test_what_a_new_workspace_starts_with_is_this_repository_s_own(packaged, original):
    assert (REPOSITORY / "pipeline/scaffold" / packaged).samefile(REPOSITORY / original)


def test_a_new_workspace(tmp_path):
    root = tmp_path / "deep" / "models"
    done = initial.init(root, tmp_path / "remote")
    found = workspace.find(root)
    assert found.recipe_names() == ["example"]
    assert found.recipe("example").evaluation.metric == "accuracy"
    assert found.rows() == targets.read(REPOSITORY / "targets/targets.toml")
    assert (root / "artifacts").is_dir()
    assert run(root, "git", "status", "--porcelain") == ""
    assert run(root, "git", "log", "--format=%s %an") == "Make an exportyard workspace test"
    config = (root / ".dvc/config").read_text()
    assert "analytics = False" in config
    assert f"url = {tmp_path}/remote" in config
    assert done[-1] == "committed it"
    assert initial.init(root) == [f"`{root}` is a workspace already, and lacks nothing"]


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "recipes/mine").mkdir(parents=True)
    (tmp_path / "recipes/mine/recipe.toml").write_text("# mine")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / ".gitignore").write_text("mine\n__pycache__/")
    run(tmp_path, "git", "init", "-q", "-b", "trunk")
    run(tmp_path, "git", "commit", "-q", "--allow-empty", "-m", "mine")
    done = initial.init(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["mine", "__pycache__/"]
    assert "/artifacts/*/*/" in lines
    assert lines.count("__pycache__/") == 1
    assert not (tmp_path / "recipes/example").exists()
    assert run(tmp_path, "git", "log", "--format=%s") == "mine"
    assert any(line.startswith("not committed: `git add ") for line in done)
    assert any("no DVC remote yet" in line for line in done)


def test_without_an_identity_nothing_is_committed(tmp_path, monkeypatch):
    (tmp_path / "gitconfig").write_text("")
    done = initial.init(tmp_path / "models")
    assert "git doesn't know who you are" in done[-1]
    assert (tmp_path / "models/.dvc/config").is_file()


def test_in_a_folder_of_a_repository_and_in_one_that_it_ignores(tmp_path):
    run(tmp_path, "git", "init", "-q")
    (tmp_path / ".gitignore").write_text("/scratch/\n")
    run(tmp_path, "git", "add", ".gitignore")
    run(tmp_path, "git", "commit", "-qm", "first")
    inside = initial.init(tmp_path / "models")
    assert "made a git repository" not in inside
    assert not (tmp_path / "models/.git").exists()
    apart = initial.init(tmp_path / "scratch/models")
    assert "made a git repository" in apart
    assert (tmp_path / "scratch/models/.git").is_dir()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        initial.init(tmp_path / "models")


def test_a_folder_where_nothing_can_be_made(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/recipes").write_text("a file where a folder must be")
    with pytest.raises(WorkspaceError, match="can't write"):
        initial.init(tmp_path / "models")


def test_this_repository_is_a_workspace():
    assert workspace.find(REPOSITORY / "docs").root == REPOSITORY
    assert "analytics = False" in (REPOSITORY / ".dvc/config").read_text()
    assert (REPOSITORY / "dvc.yaml").read_text().startswith("#")


def test_the_package_ships_the_scaffold():
    shipped = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "scaffold/**" in shipped["pipeline"]
    hidden = [path.name for path in (REPOSITORY / "pipeline/scaffold").rglob("*") if path.name.startswith(".")]
    assert hidden == []

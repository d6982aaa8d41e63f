"""Releases of a real workspace, compared from git alone."""

import json
from textwrap import dedent

import pytest

from pipeline import cli, git, initial, registry
from tests import releases
from tests.releases import run
from tests.workspaces import RECIPE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with two releases of `toy`, between which a file of the recipe was changed."""
    root = tmp_path_factory.mktemp("compared") / "workspace"
    root.mkdir()
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "config", "user.email", "test@example.com")
    initial.init(root, root.parent / "remote")
    (root / "recipes/toy").mkdir()
    recipe = dedent(RECIPE).replace('"tiny"', '"toy"') + "\n[regression]\ngrowth = 0.2\n"
    (root / "recipes/toy/recipe.toml").write_text(recipe)
    (root / "targets/targets.toml").write_text('[targets.any-echo]\nbackend = "echo"\n')
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    releases.publish(root, "1.0.0", "one")
    releases.publish(root, "1.1.0", "a much larger one")
    return root


def test_two_releases(root, capsys):
    assert cli.invoke(["diff", "toy", "1.0.0", "v1.1.0", "-C", str(root)]) == 0
    told = capsys.readouterr().out
    assert "regression: any-echo: it has" in told
    assert "verdict: toy@1.1.0 is a regression" in told
    assert cli.invoke(["diff", "toy", "1.1.0", "1.0.0", "-C", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"], found["regressions"]) == ("1.1.0", "1.0.0", [])
    assert [pair["target"] for pair in found["targets"]] == ["any-echo", "linux-echo"]


def test_a_version_that_is_not_there(root, capsys):
    assert cli.invoke(["diff", "toy", "1.0.0", "1.2.0", "-C", str(root)]) == 2
    assert "unknown version `1.2.0`" in capsys.readouterr().err


def test_files_that_differ_between_two_commits(root):
    first = git.head(root)
    (root / "recipes/toy/model.py").write_text("x = 1\n")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "another model")
    assert registry.changed_files(root, "toy", first, git.head(root)) == ["recipes/toy/model.py"]
    assert registry.changed_files(root, "toy", "0" * 40, first) == []

"""A release that is worse than the one before is not published, unless somebody says so."""

import pytest

from pipeline import cli, git, store
from pipeline.errors import UsageError
from pipeline.run import prepare
from pipeline.workspace import Workspace


def publish(bench, *more):
    return cli.invoke(["publish", "tiny", "--json", *more, "-C", str(bench.root)])


def policy(bench, text):
    path = bench.root / "recipes/tiny/recipe.toml"
    path.write_text(path.read_text() + f"\n[regression]\n{text}\n")
    bench.commit()


def test_a_regression_is_refused(bench, capsys):
    policy(bench, "keep_targets = true\ngrowth = 0.1")
    assert publish(bench) == 0
    capsys.readouterr()
    assert publish(bench, "--target", "good") == 12
    said = capsys.readouterr().err
    assert "1.0.1 would be worse than the release before" in said
    assert "other: has no engine any more: it was not asked for" in said
    assert "--allow-regression" in said
    assert bench.tags() == ["tiny@v1.0.0"]
    assert store.load(bench.root / "artifacts/tiny/release").artifact.facts["targets"] == ["good", "other"]
    assert publish(bench, "--target", "good", "--allow-regression") == 0
    told = git.run(bench.root, "tag", "--list", "--format=%(contents)", "tiny@v1.0.1")
    assert "accepted regression: other: has no engine any more" in told


def test_a_policy_for_a_target_that_there_is_not(bench):
    policy(bench, "targets.god.drop = 0.1")
    with pytest.raises(UsageError, match=r"(?s)unknown target `god` in `regression\.targets`.*did you mean `good`"):
        prepare(Workspace(bench.root), "tiny")

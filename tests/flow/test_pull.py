"""Pulling a release: every byte checked, installed whole or not at all."""

import shutil
from pathlib import Path

import pytest

from pipeline import cli, manifest, pull
from pipeline.errors import ExportyardError, ReleaseError, UsageError
from tests.releases import TARGETS, publish, run, with_origin, write_release


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a workspace, its remote and a bare origin: two releases of `toy`. Read only."""
    base = tmp_path_factory.mktemp("published")
    root = with_origin(base, base / "remote")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    publish(root, "1.0.0", "one")
    publish(root, "1.1.0", "two")
    return base


@pytest.fixture
def url(published):
    """The origin as a URL: a device that has neither the workspace nor its cache."""
    return f"file://{published}/origin.git"


@pytest.fixture
def workspace(published, tmp_path):
    """A copy of the workspace, to be damaged; its remote is the shared one."""
    shutil.copytree(published / "workspace", tmp_path / "workspace")
    return tmp_path / "workspace"


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]


def test_the_latest_from_a_workspace(published, tmp_path):
    pulled = pull.fetch(published / "workspace", "toy", None, None, tmp_path / "here")
    assert (pulled.tag, pulled.version, pulled.targets, pulled.changed) == ("toy@v1.1.0", "1.1.0", TARGETS, True)
    assert manifest.load(tmp_path / "here").version == "1.1.0"
    assert (tmp_path / "here/engines/any-echo/model.bin").read_text() == "two for any-echo"
    assert pulled.size_bytes == sum(
        len(data) for name, data in content(pulled.folder).items() if name != "manifest.json"
    )
    again = pull.fetch(published / "workspace", "toy", "v1.1.0", None, tmp_path / "here")
    assert not again.changed


def test_one_version_and_some_targets_from_a_url(url, tmp_path):
    pulled = pull.fetch(url, "toy", "1.0.0", ["linux-echo"], tmp_path / "deep" / "here")
    assert sorted(content(pulled.folder)) == ["engines/linux-echo/model.bin", "golden.safetensors", "manifest.json"]
    assert manifest.load(pulled.folder, ["linux-echo"]).version == "1.0.0"
    newer = pull.fetch(url, "toy", None, ["any-echo"], tmp_path / "deep" / "here")
    assert (newer.version, newer.targets) == ("1.1.0", ("any-echo",))
    assert sorted(content(newer.folder)) == ["engines/any-echo/model.bin", "golden.safetensors", "manifest.json"]
    assert left_over(newer.folder) == []


@pytest.mark.parametrize(
    ("recipe", "version", "targets", "message"),
    [
        ("tyo", None, None, "unknown released recipe `tyo`[^$]*did you mean `toy`"),
        ("toy", "1.0.1", None, r"unknown version `1\.0\.1`[^$]*there are `1\.1\.0`, `1\.0\.0`"),
        ("toy", "newest", None, "`newest` is not a version"),
        ("toy", None, ["any-ehco"], "unknown target `any-ehco`[^$]*did you mean `any-echo`"),
    ],
)
def test_a_misspelt_name(published, tmp_path, recipe, version, targets, message):
    with pytest.raises(UsageError, match=message):
        pull.fetch(published / "origin.git", recipe, version, targets, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_target_that_was_skipped(published, tmp_path):
    with pytest.raises(ReleaseError, match="no engine for `web-any-echo`: not built here: no browser"):
        pull.fetch(published / "workspace", "toy", None, ["web-any-echo"], tmp_path / "here")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no folder `nowhere`"),
        ("file:///nowhere.git", r"can't read the git repository `file:///nowhere\.git`"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, source, message):
    with pytest.raises(ReleaseError, match=message):
        pull.fetch(source, "toy", None, None, tmp_path / "here")


def test_a_folder_without_git(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(ReleaseError, match="is not in a git work tree"):
        pull.fetch(tmp_path / "plain", "toy", None, None, tmp_path / "here")


def spoil(objects: Path, text: str) -> None:
    """Flip one bit in each stored object that holds `text`."""
    found = [path for path in objects.rglob("*") if path.is_file() and path.read_bytes() == text.encode()]
    assert found
    for path in found:
        path.chmod(0o644)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_a_damaged_cache_is_refused_and_the_older_release_stays(workspace, tmp_path):
    here = tmp_path / "here"
    pull.fetch(workspace, "toy", "1.0.0", None, here)
    before = content(here)
    spoil(workspace / ".dvc/cache", "two for linux-echo")
    with pytest.raises(ReleaseError, match=r"nothing was installed: `engines/linux-echo/model\.bin` has other bytes"):
        pull.fetch(workspace, "toy", None, None, here)
    assert content(here) == before
    assert left_over(here) == []
    assert pull.fetch(workspace, "toy", None, ["any-echo"], here).changed


def test_a_damaged_or_emptied_remote_is_refused(workspace, tmp_path):
    remote, here = tmp_path / "remote", tmp_path / "here"
    text = (workspace / ".dvc/config").read_text()
    for spoiled in (True, False):
        shutil.rmtree(workspace / ".dvc/cache", ignore_errors=True)
        shutil.rmtree(remote, ignore_errors=True)
        shutil.copytree(Path(text.rpartition("url = ")[2].strip()), remote)
        (workspace / ".dvc/config.local").write_text(f"['remote \"storage\"']\n    url = {remote}\n")
        if spoiled:
            spoil(remote, "two for any-echo")
        else:
            shutil.rmtree(remote)
        with pytest.raises(ReleaseError, match="nothing was installed: `"):
            pull.fetch(workspace, "toy", None, None, here)
        assert not here.exists()
        assert left_over(here) == []


def test_a_folder_with_something_else_is_not_touched(published, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "thesis.txt").write_text("precious")
    with pytest.raises(ReleaseError, match="is not empty and holds no release"):
        pull.fetch(published / "workspace", "toy", None, None, here)
    assert content(here) == {"thesis.txt": b"precious"}


def test_a_file_is_not_replaced(published, tmp_path):
    (tmp_path / "here").write_text("precious")
    with pytest.raises(ReleaseError, match="is a file"):
        pull.fetch(published / "workspace", "toy", None, None, tmp_path / "here")


def test_notes_beside_a_release_are_not_lost(published, tmp_path):
    here = tmp_path / "here"
    pull.fetch(published / "workspace", "toy", "1.0.0", None, here)
    (here / "notes.txt").write_text("precious")
    with pytest.raises(ReleaseError, match=r"notes\.txt` is not part of the release there and would be lost"):
        pull.fetch(published / "workspace", "toy", None, None, here)
    assert (here / "notes.txt").read_text() == "precious"


def test_a_release_of_another_recipe_is_not_replaced(published, tmp_path):
    write_release(tmp_path / "here", "1.0.0", "other", recipe="other")
    with pytest.raises(ReleaseError, match="holds a release of `other`"):
        pull.fetch(published / "workspace", "toy", None, None, tmp_path / "here")


def test_a_damaged_copy_is_replaced(published, tmp_path):
    here = tmp_path / "here"
    pull.fetch(published / "workspace", "toy", None, None, here)
    (here / "golden.safetensors").write_text("rotten")
    assert pull.fetch(published / "workspace", "toy", None, None, here).changed
    assert manifest.load(here).version == "1.1.0"


def test_a_pull_killed_between_its_renames_is_put_right(published, tmp_path):
    here = tmp_path / "here"
    pull.fetch(published / "workspace", "toy", "1.0.0", None, here)
    here.rename(tmp_path / ".here.old")
    with pytest.raises(ExportyardError, match="unknown target"):
        pull.fetch(published / "workspace", "toy", None, ["nonsense"], here)
    assert pull.fetch(published / "workspace", "toy", None, None, here).version == "1.1.0"
    assert left_over(here) == []


def test_a_withdrawn_release_is_not_the_latest(workspace, tmp_path):
    run(workspace, "git", "tag", "toy@v1.1.0!")
    assert pull.fetch(workspace, "toy", None, None, tmp_path / "latest").version == "1.0.0"
    assert pull.fetch(workspace, "toy", "1.1.0", None, tmp_path / "named").version == "1.1.0"


def test_a_channel_of_a_workspace(workspace, tmp_path, capsys):
    run(workspace, "git", "tag", "-a", "toy#prod#1", "-m", "prod", "toy@v1.0.0^{}")
    arguments = ["pull", "--from", str(workspace), "--to", str(tmp_path / "here")]
    assert cli.invoke([*arguments, "toy#prod"]) == 0
    assert manifest.load(tmp_path / "here").version == "1.0.0"
    assert cli.invoke([*arguments, "toy#prodd"]) == 2
    assert "did you mean `prod`" in capsys.readouterr().err
    assert cli.invoke([*arguments, "toy", "--check"]) == 2
    assert "are for a static registry" in capsys.readouterr().err


def test_a_tag_without_a_manifest(workspace, tmp_path):
    run(workspace, "git", "tag", "toy@v9.0.0", "HEAD~2")
    with pytest.raises(ReleaseError, match="exportyard did not make it"):
        pull.fetch(workspace, "toy", None, None, tmp_path / "here")

"""Channels in git and in the static registry, which GTO and DVC agree with; and what is swept out of the registry."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import channels, cli, depots, garbage, layout, mirror, trust
from pipeline.errors import ReleaseError
from tests.releases import dvc, publish, run, with_origin, write_release


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A workspace with an origin and three releases of `toy`, the last one withdrawn. Read only."""
    base = tmp_path_factory.mktemp("published")
    root = with_origin(base, base / "remote")
    (base / "registry").mkdir()
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    for version, content in (("1.0.0", "one"), ("1.1.0", "two"), ("1.2.0", "three")):
        publish(root, version, content)
    return base


@pytest.fixture
def root(published, tmp_path):
    """A copy of the workspace with an origin and an empty registry of its own."""
    for name in ("workspace", "origin.git", "registry"):
        shutil.copytree(published / name, tmp_path / name)
    root = tmp_path / "workspace"
    run(root, "git", "remote", "set-url", "origin", str(tmp_path / "origin.git"))
    with (root / ".dvc/config").open("a") as config:
        config.write(f"['remote \"registry\"']\n    url = {tmp_path / 'registry'}\n")
    run(root, "git", "commit", "-qam", "registry")
    return root


@pytest.fixture
def depot(root):
    found = depots.of(root)
    assert found is not None
    return found


PROMOTE = """
import sys
from pathlib import Path
from pipeline import channels
channels.promote(Path(sys.argv[1]), "toy", sys.argv[2], "prod")
"""


def exportyard(capsys, root: Path, *arguments: str, code: int = 0) -> str:
    """What a command prints, on stdout or on stderr."""
    assert cli.invoke([*arguments, "-C", str(root)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def gto(root: Path, *arguments: str) -> str:
    code = f"from gto.cli import app; app({[*arguments]!r})"
    return run(root, sys.executable, "-W", "ignore", "-c", code)


def pointed(depot) -> dict[str, tuple[str, int]]:
    """By channel of the registry, version and serial."""
    found = layout.index(depot, "toy").channels()
    return {
        name: (layout.notes(one)[layout.OF_VERSION], int(layout.notes(one)[layout.SERIAL]))
        for name, one in found.items()
    }


def test_a_workspace_without_a_registry(published, capsys):
    assert depots.of(published / "workspace") is None
    said = exportyard(capsys, published / "workspace", "mirror", "toy", code=2)
    assert "has no static registry" in said
    assert "dvc remote add registry" in said


def test_mirror_brings_all_that_git_has_and_nothing_twice(root, depot, capsys):
    run(root, "git", "tag", "-a", "toy@v1.2.0!", "-m", "wrong labels")
    shutil.rmtree(root / "artifacts/toy/release")
    said = exportyard(capsys, root, "mirror", "--all")
    assert said.startswith(f"toy: 3 versions in {depot.name}; 1.0.0, 1.1.0, 1.2.0 (")
    assert exportyard(capsys, root, "mirror", "toy").endswith("; nothing new\n")
    found = layout.index(depot, "toy").releases()
    assert {version: layout.notes(one).get(layout.WITHDRAWN) for version, one in found.items()} == {
        "1.0.0": None,
        "1.1.0": None,
        "1.2.0": "wrong labels",
    }
    rotten = next(path for path in depot.root.rglob("*") if path.is_file() and path.read_bytes() == b"golden of two")
    rotten.write_bytes(b"golden of twp")
    assert "1.1.0 (13 B)" in exportyard(capsys, root, "mirror", "toy@1.1.0", "--verify")
    assert "did you mean" in exportyard(capsys, root, "mirror", "tyo", code=2)
    assert "give either" in exportyard(capsys, root, "mirror", code=2)


def test_a_release_that_cannot_be_had_does_not_keep_the_others_away(root, depot, capsys):
    run(root, "git", "tag", "-a", "toy@v0.9.0", "-m", "by hand", "HEAD~4")
    said = exportyard(capsys, root, "mirror", "toy", code=12)
    assert "`toy@v0.9.0`" in said
    assert "the registry has 3 versions" in said
    assert [*layout.index(depot, "toy").releases()] == ["1.0.0", "1.1.0", "1.2.0"]


def test_promote_and_roll_back(root, depot, capsys):
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        assert exportyard(capsys, root, "promote", f"toy@{version}", "prod").startswith(f"toy#prod is {version}")
    exportyard(capsys, root, "promote", "toy@v1.2.0", "canary")
    assert exportyard(capsys, root, "promote", "toy@1.2.0", "prod") == "toy#prod is 1.2.0, as before\n"
    assert pointed(depot) == {"prod": ("1.2.0", 3), "canary": ("1.2.0", 4)}
    assert exportyard(capsys, root, "rollback", "toy", "prod") == "toy#prod is 1.1.0 (was 1.2.0)\n"
    assert exportyard(capsys, root, "rollback", "toy", "prod") == "toy#prod is 1.0.0 (was 1.1.0)\n"
    assert "nothing to go back to" in exportyard(capsys, root, "rollback", "toy", "prod", code=12)
    assert pointed(depot) == {"prod": ("1.0.0", 7), "canary": ("1.2.0", 4)}
    assert gto(root, "show", "toy#prod", "--version") == "v1.0.0"
    assert gto(root, "show", "toy#canary", "--version") == "v1.2.0"
    got = root.parent / "got"
    dvc(root.parent, "artifacts", "get", str(root.parent / "origin.git"), "toy", "--stage", "prod", "-o", str(got))
    assert (got / "engines/any-echo/model.bin").read_text() == "one for any-echo"
    assert exportyard(capsys, root, "rollback", "toy", "prod", "1.2.0") == "toy#prod is 1.2.0 (was 1.0.0)\n"
    assert gto(root, "show", "toy#prod", "--version") == "v1.2.0"
    (prod,) = (
        one for one in json.loads(exportyard(capsys, root, "channels", "toy", "--json")) if one["channel"] == "prod"
    )
    assert (prod["version"], prod["before"], prod["by"]) == ("1.2.0", ["1.0.0"], "test")
    assert "canary" in exportyard(capsys, root, "channels", "toy")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["promote", "toy@9.9.9", "prod"], 2, r"unknown version `9.9.9`"),
        (["promote", "tyo@1.0.0", "prod"], 2, "did you mean `toy`"),
        (["promote", "toy", "prod"], 2, "`toy` names no version"),
        (["promote", "toy@1.0.0", "v2"], 2, "`v2` can't be the name of a channel"),
        (["promote", "toy@1.0.0", "my channel"], 2, "`my channel` can't be the name of a channel"),
        (["rollback", "toy", "prod"], 2, "unknown channel `prod` in `toy`"),
    ],
)
def test_a_misspelt_name(published, capsys, arguments, code, message):
    assert message in exportyard(capsys, published / "workspace", *arguments, code=code)
    assert "#" not in run(published / "origin.git", "git", "tag")


def test_a_withdrawn_version_is_neither_promoted_nor_rolled_back_to(root):
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        channels.promote(root, "toy", version, "prod")
    run(root, "git", "tag", "-a", "toy@v1.1.0!", "-m", "wrong labels")
    assert channels.rollback(root, "toy", "prod").version == "1.0.0"
    with pytest.raises(ReleaseError, match=r"`toy@v1\.1\.0` is withdrawn"):
        channels.promote(root, "toy", "1.1.0", "prod")


def test_two_clones_promote_in_turn_and_see_each_other(root):
    run(root.parent, "git", "clone", "-q", str(root.parent / "origin.git"), "other")
    other = root.parent / "other"
    run(other, "git", "config", "user.name", "other")
    run(other, "git", "config", "user.email", "other@example.com")
    assert channels.promote(root, "toy", "1.0.0", "prod").serial == 1
    assert channels.promote(other, "toy", "1.1.0", "prod").serial == 2
    assert channels.promote(root, "toy", "1.2.0", "prod").serial == 3
    assert channels.rollback(other, "toy", "prod").version == "1.1.0"


def test_promotions_at_once_come_one_after_the_other(root):
    clones = []
    for who in range(3):
        run(root.parent, "git", "clone", "-q", str(root.parent / "origin.git"), f"clone-{who}")
        clones.append(root.parent / f"clone-{who}")
        run(clones[-1], "git", "config", "user.name", "test")
        run(clones[-1], "git", "config", "user.email", "test@example.com")
    versions = ("1.0.0", "1.1.0", "1.2.0")
    working = [
        subprocess.Popen([sys.executable, "-c", PROMOTE, str(clone), version])
        for clone, version in zip(clones, versions, strict=True)
    ]
    assert [one.wait() for one in working] == [0, 0, 0]
    tags = run(root.parent / "origin.git", "git", "tag", "--list", "toy#prod*").split()
    numbers = [int(tag.rpartition("#")[2]) for tag in tags]
    assert len(set(numbers)) == len(numbers) >= 3
    run(root, "git", "fetch", "-q", "--tags")
    found = channels.channels(root, "toy")["prod"]
    assert found.now is not None
    assert found.now.tag.number == max(int(tag.rpartition("#")[2]) for tag in tags if "!" not in tag)
    assert gto(root, "show", "toy#prod", "--version") == f"v{found.now.version}"


def test_an_origin_that_is_away_leaves_the_channel_where_it_was(root):
    channels.promote(root, "toy", "1.0.0", "prod")
    (root.parent / "origin.git").rename(root.parent / "away.git")
    with pytest.raises(
        ReleaseError, match="can't ask origin where the channels of `toy` point, so nothing was changed"
    ):
        channels.promote(root, "toy", "1.1.0", "prod")
    assert channels.channels(root, "toy")["prod"].plain()["version"] == "1.0.0"


def test_a_registry_that_is_away_follows_later(root, depot, capsys):
    exportyard(capsys, root, "promote", "toy@1.0.0", "prod")
    depot.root.rename(root.parent / "away")
    said = exportyard(capsys, root, "promote", "toy@1.1.0", "prod", code=10)
    assert "`toy#prod` is 1.1.0, but not in the registry yet" in said
    assert "`exportyard mirror toy`" in said
    (root.parent / "away").rename(depot.root)
    assert pointed(depot) == {"prod": ("1.0.0", 1)}
    exportyard(capsys, root, "mirror", "toy")
    assert pointed(depot) == {"prod": ("1.1.0", 2)}


def test_one_who_is_behind_does_not_set_a_channel_back(root, depot):
    channels.promote(root, "toy", "1.0.0", "prod")
    mirror.mirror(root, depot, "toy")
    shutil.copytree(root, root.parent / "behind")
    channels.promote(root, "toy", "1.1.0", "prod")
    mirror.mirror(root, depot, "toy")
    mirror.mirror(root.parent / "behind", depot, "toy")
    assert pointed(depot) == {"prod": ("1.1.0", 2)}


def test_a_channel_is_signed_where_there_is_a_key(root, depot, tmp_path, monkeypatch):
    public = trust.keygen(tmp_path / "key")
    channels.promote(root, "toy", "1.0.0", "prod")
    monkeypatch.setenv(trust.SIGNING_KEY, str(tmp_path / "key"))
    mirror.mirror(root, depot, "toy")
    (entry,) = layout.index(depot, "toy").channels().values()
    signed = depot.read(layout.blob("toy", layout.notes(entry)[layout.STATEMENT]))
    assert signed is not None
    said = trust.read_statement(signed, public, "the channel")
    assert said["subject"] == [{"name": "toy", "digest": {"sha256": entry["digest"].removeprefix("sha256:")}}]
    assert said["predicate"].pop("assigned").endswith("Z")
    assert said["predicate"] == {"recipe": "toy", "channel": "prod", "version": "1.0.0", "serial": 1}
    before = depot.read("toy/index.json")
    monkeypatch.delenv(trust.SIGNING_KEY)
    mirror.mirror(root, depot, "toy")  # without the key nothing is unsigned again
    assert depot.read("toy/index.json") == before


# --- what is swept ---------------------------------------------------------------------------------------------------


def laid_out(folder: Path, depot, *versions: str) -> None:
    for version in versions:
        write_release(folder / version, version, f"content of {version}")
        layout.lay_out(folder / version, depot)


def older(depot) -> None:
    """Make all that is in a registry two hours older."""
    for path in depot.root.rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)


def test_gc_deletes_only_what_nothing_leads_to(tmp_path, capsys):
    (tmp_path / "registry").mkdir()
    depot = depots.at(tmp_path / "registry")
    laid_out(tmp_path, depot, "1.0.0", "1.1.0")
    before = {path: path.read_bytes() for path in depot.root.rglob("*") if path.is_file()}
    layout.put_blob(depot, "toy", b"of a publisher that was killed")
    (depot.root / "toy/blobs/sha256/.0123.tmp").write_bytes(b"half")
    (depot.root / "somebody-elses").mkdir()
    (depot.root / "somebody-elses/thing").write_text("precious")
    (young,) = [garbage.usage(depot, name) for name in garbage.recipes(depot)]
    assert (young.free_bytes, young.young_bytes, young.names) == (0, 34, ())
    older(depot)
    count = len(list(depot.root.rglob("*")))
    assert garbage.usage(depot, "toy").free_bytes == 34
    assert cli.invoke(["gc", "--registry", str(depot.root)]) == 0
    assert "34 B" in capsys.readouterr().out
    assert len(list(depot.root.rglob("*"))) == count
    assert cli.invoke(["gc", "--registry", str(depot.root), "--yes"]) == 0
    left = {path: path.read_bytes() for path in depot.root.rglob("*") if path.is_file()}
    assert {path: data for path, data in left.items() if path.name not in (".lock", ".sweep", "thing")} == {
        path: data for path, data in before.items() if path.name not in (".lock", ".sweep")
    }
    assert (depot.root / "somebody-elses/thing").read_text() == "precious"


def test_gc_keeps_the_newest_and_those_of_channels(root, depot, capsys):
    exportyard(capsys, root, "promote", "toy@1.0.0", "prod")
    exportyard(capsys, root, "mirror", "toy")
    exportyard(capsys, root, "gc", "--keep", "1")
    assert [*layout.index(depot, "toy").releases()] == ["1.0.0", "1.1.0", "1.2.0"]
    done = json.loads(exportyard(capsys, root, "gc", "toy", "--keep", "1", "--yes", "--json"))
    assert [(one["kept"], one["dropped"]) for one in done] == [(["1.0.0", "1.2.0"], ["1.1.0"])]
    assert done[0]["free_bytes"] > 0
    assert [*layout.index(depot, "toy").releases()] == ["1.0.0", "1.2.0"]
    assert pointed(depot) == {"prod": ("1.0.0", 1)}
    assert garbage.usage(depot, "toy").free_bytes == 0
    exportyard(capsys, root, "mirror", "toy")
    assert [*layout.index(depot, "toy").releases()] == ["1.0.0", "1.1.0", "1.2.0"]
    assert garbage.usage(depot, "toy").kept == ("1.0.0", "1.1.0", "1.2.0")


def test_gc_of_a_damaged_registry_deletes_nothing(tmp_path):
    (tmp_path / "registry").mkdir()
    depot = depots.at(tmp_path / "registry")
    laid_out(tmp_path, depot, "1.0.0")
    (entry,) = layout.index(depot, "toy").releases().values()
    depot.remove([layout.blob("toy", entry["digest"])])
    older(depot)
    count = len(depot.entries("toy/blobs/sha256"))
    with pytest.raises(ReleaseError, match="is damaged: `toy` lists sha256:"):
        garbage.sweep(depot, "toy")
    assert len(depot.entries("toy/blobs/sha256")) == count


def test_a_publisher_that_a_sweep_has_overtaken_puts_its_files_there_again(tmp_path, monkeypatch):
    (tmp_path / "registry").mkdir()
    depot = depots.at(tmp_path / "registry")
    laid_out(tmp_path, depot, "1.0.0", "1.1.0")
    change = layout.change

    def swept_before(place, recipe, work):
        monkeypatch.undo()
        older(depot)
        garbage.sweep(depot, recipe, keep=1)
        return change(place, recipe, work)

    write_release(tmp_path / "new", "1.2.0", "content of 1.0.0")  # its engines are those of 1.0.0
    monkeypatch.setattr(layout, "change", swept_before)
    layout.lay_out(tmp_path / "new", depot)
    assert sorted(layout.index(depot, "toy").releases()) == ["1.1.0", "1.2.0"]
    assert garbage.usage(depot, "toy").free_bytes == 0
    for name in (tmp_path / "new").rglob("*.bin"):
        found = depot.read(layout.blob("toy", trust.digest.of_file(name)))
        assert found == name.read_bytes()

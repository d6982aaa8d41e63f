"""The static registry: whole releases or none, whoever writes at the same time and wherever a writer is killed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import depots, layout
from pipeline.errors import ReleaseError, UnavailableError, UsageError
from tests.releases import TARGETS, run, write_release


@pytest.fixture
def depot(tmp_path):
    (tmp_path / "registry").mkdir()
    return depots.at(tmp_path / "registry")


def release(folder: Path, version: str = "1.0.0", content: str = "one", recipe: str = "toy") -> Path:
    write_release(folder, version, content, recipe)
    return folder


def blob(depot, recipe: str, descriptor: dict) -> bytes:
    """The bytes that a descriptor means, checked."""
    data = depot.read(layout.blob(recipe, descriptor["digest"]))
    assert data is not None
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == descriptor["digest"]
    assert len(data) == descriptor["size"]
    return data


def read(depot, recipe: str = "toy") -> dict[str, dict[str, bytes]]:
    """By version, the files of each release, read as a device does: from the index down, every digest compared."""
    found = {}
    for version, entry in layout.index(depot, recipe).releases().items():
        files = {}
        for part in json.loads(blob(depot, recipe, entry))["manifests"]:
            for layer in json.loads(blob(depot, recipe, part))["layers"]:
                files[layer["annotations"][layout.TITLE]] = blob(depot, recipe, layer)
        found[version] = files
    return found


def test_a_release_is_laid_out_as_oci_has_it(depot, tmp_path):
    folder = release(tmp_path / "release")
    done = layout.lay_out(folder, depot)
    assert (done.recipe, done.version, done.changed) == ("toy", "1.0.0", True)
    assert json.loads(depot.read("toy/oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert read(depot) == {"1.0.0": files}
    top, *targets = json.loads(depot.read("toy/index.json"))["manifests"]
    assert top["digest"] == done.digest
    assert top["annotations"][layout.NAME] == "v1.0.0"
    assert [one["annotations"][layout.NAME] for one in targets] == [f"v1.0.0-{name}" for name in TARGETS]
    image = json.loads(blob(depot, "toy", targets[0]))
    titles = [layer["annotations"][layout.TITLE] for layer in image["layers"]]
    assert titles == ["manifest.json", "golden.safetensors", "engines/any-echo/model.bin"]
    assert blob(depot, "toy", image["config"]) == b"{}"


def test_the_same_release_again_changes_nothing_and_versions_share_blobs(depot, tmp_path):
    first = release(tmp_path / "first")
    layout.lay_out(first, depot)
    before = {path: path.stat().st_mtime_ns for path in depot.root.rglob("*")}
    again = layout.lay_out(first, depot)
    assert (again.changed, again.sent_bytes) == (False, 0)
    assert {path: path.stat().st_mtime_ns for path in depot.root.rglob("*")} == before
    count = len(depot.entries("toy/blobs/sha256"))
    layout.lay_out(release(tmp_path / "second", "1.0.1"), depot)
    assert len(depot.entries("toy/blobs/sha256")) == count + 5  # manifest.json, three that list it, and their index
    assert list(read(depot)) == ["1.0.0", "1.0.1"]


def test_another_release_of_the_same_number_is_refused(depot, tmp_path):
    layout.lay_out(release(tmp_path / "first"), depot)
    before = depot.read("toy/index.json")
    with pytest.raises(ReleaseError, match=r"another release under the number 1\.0\.0 of `toy`"):
        layout.lay_out(release(tmp_path / "second", content="two"), depot)
    assert depot.read("toy/index.json") == before


def test_what_is_said_about_a_release_may_be_added(depot, tmp_path):
    folder = release(tmp_path / "release")
    layout.lay_out(folder, depot)
    (folder / "sbom.json").write_text("{}")
    assert layout.lay_out(folder, depot).changed
    assert read(depot)["1.0.0"]["sbom.json"] == b"{}"


def test_a_withdrawn_release_says_so(depot, tmp_path):
    layout.lay_out(release(tmp_path / "release"), depot, withdrawn="wrong labels")
    (entry,) = layout.index(depot, "toy").releases().values()
    assert layout.notes(entry)[layout.WITHDRAWN] == "wrong labels"


def test_a_file_with_other_bytes_is_refused(depot, tmp_path):
    folder = release(tmp_path / "release")
    (folder / "engines/any-echo/model.bin").write_text("rotten")
    with pytest.raises(ReleaseError, match=r"any-echo/model\.bin` has other bytes than its manifest says"):
        layout.lay_out(folder, depot)
    (folder / "engines/any-echo/model.bin").unlink()
    with pytest.raises(ReleaseError, match=r"can't read `.*any-echo/model\.bin`"):
        layout.lay_out(folder, depot)
    assert depot.read("toy/index.json") is None
    assert not [path for path in depot.root.rglob("*") if path.name.endswith(".tmp")]


def test_damage_is_found_and_replaced_where_that_is_asked_for(depot, tmp_path):
    folder = release(tmp_path / "release")
    layout.lay_out(folder, depot)
    rotten = next(path for path in depot.root.rglob("*") if path.is_file() and path.read_bytes() == b"golden of one")
    rotten.write_bytes(b"golden of onf")
    assert layout.lay_out(folder, depot).sent_bytes == 0
    assert layout.lay_out(folder, depot, verify=True).sent_bytes == len(b"golden of one")
    assert rotten.read_bytes() == b"golden of one"
    rotten.write_bytes(b"short")  # this is seen without reading
    assert layout.lay_out(folder, depot).sent_bytes == len(b"golden of one")


def test_a_folder_that_is_away_is_not_made_anew(tmp_path):
    with pytest.raises(UnavailableError, match="there is no such folder"):
        layout.lay_out(release(tmp_path / "release"), depots.at(tmp_path / "away"))
    assert not (tmp_path / "away").exists()


def test_an_index_of_somebody_else_is_not_replaced(depot, tmp_path):
    (depot.root / "toy").mkdir()
    (depot.root / "toy/index.json").write_text('{"manifests": [{}]}')
    with pytest.raises(ReleaseError, match=r"`toy/index\.json` in the registry .* can't be understood"):
        layout.lay_out(release(tmp_path / "release"), depot)
    assert (depot.root / "toy/index.json").read_text() == '{"manifests": [{}]}'


def test_no_registry_by_http(tmp_path):
    with pytest.raises(UsageError, match="can't lay out a registry at `https://example"):
        depots.at("https://example.com/models")


# --- killed, and many at once ----------------------------------------------------------------------------------------


def test_killed_anywhere_what_was_there_stays_readable_and_a_rerun_finishes(depot, tmp_path):
    layout.lay_out(release(tmp_path / "first"), depot)
    first = read(depot)
    second = release(tmp_path / "second", "1.1.0", "two")
    (tmp_path / "killed").mkdir()
    killed = int(
        run(
            Path.cwd(),
            sys.executable,
            "-m",
            "tests.laying",
            "kills",
            *map(str, (second, depot.root, tmp_path / "killed")),
        )
    )
    assert killed > 30
    layout.lay_out(second, depot)
    both = read(depot)
    seen = set()
    for left in sorted((tmp_path / "killed").iterdir()):
        after = depots.at(left)
        seen.add(len(read(after)))
        assert read(after) in (first, both)
        for entry in after.entries("toy/blobs/sha256"):
            name = entry.name.rpartition("/")[2]
            assert name.endswith(".tmp") or after.digest(entry.name) == name
        layout.lay_out(second, after)
        assert read(after) == both
        assert after.read("toy/index.json") == depot.read("toy/index.json")
    assert seen == {1, 2}


def test_three_publishers_with_twenty_releases_each_at_once(depot, tmp_path):
    """Each has versions of its own, all share a recipe, and some files are the same in all of them."""
    publishers, releases = 3, 20
    commands = []
    for who in range(publishers):
        for turn in range(releases):
            release(tmp_path / f"publisher-{who}" / f"{turn:02}", f"{who + 1}.0.{turn}", f"content {turn // 2}")
        commands.append(
            [sys.executable, "-m", "tests.laying", "all", str(tmp_path / f"publisher-{who}"), str(depot.root)]
        )
    working = [subprocess.Popen(command) for command in commands]
    assert [one.wait() for one in working] == [0] * publishers
    found = read(depot)
    assert len(found) == publishers * releases
    for version, files in found.items():
        who, _, turn = version.split(".")
        folder = tmp_path / f"publisher-{int(who) - 1}" / f"{int(turn):02}"
        assert files == {name: (folder / name).read_bytes() for name in files}
    assert len(layout.index(depot, "toy").entries) == publishers * releases * (1 + len(TARGETS))
    assert not list(depot.root.rglob("*.tmp"))

"""The static registry: whole releases or none, whoever writes at the same time and wherever a writer is killed."""

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline import depot_bucket, depots, garbage, layout, manifest
from pipeline.errors import ReleaseError, UnavailableError, UsageError
from tests import buckets, extras
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


def test_what_is_said_about_a_release_may_change(depot, tmp_path):
    folder = release(tmp_path / "release")
    path = folder / "manifest.json"
    path.write_text(manifest.parse(path.read_text(), "").model_copy(update={"beside": ("sbom.json",)}).text())
    with pytest.raises(ReleaseError, match=r"can't read `.*sbom\.json`"):
        layout.lay_out(folder, depot)
    for said in ("{}", '{"more": 1}'):
        (folder / "sbom.json").write_text(said)
        assert layout.lay_out(folder, depot).changed
        assert read(depot)["1.0.0"]["sbom.json"] == said.encode()


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


# --- on S3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """A new bucket of a server on this machine."""
    extras.need("moto", "s3-tests")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication

    answer, turn = DomainDispatcherApplication.__call__, threading.Lock()

    def in_turn(*request):
        with turn:
            return answer(*request)

    # S3 compares and writes in one step; moto's server does so only if nobody else writes meanwhile
    monkeypatch.setattr(DomainDispatcherApplication, "__call__", in_turn)
    with buckets.bucket(monkeypatch) as name:
        yield depots.at(f"s3://{name}/registry")


def entry_of(depot) -> str:
    """Some blob."""
    return layout.blob("toy", layout.index(depot, "toy").entries[0]["digest"])


def test_a_bucket_holds_the_same_as_a_folder(bucket, depot, tmp_path):
    for version, content in (("1.0.0", "one"), ("1.1.0", "two")):
        folder = release(tmp_path / version, version, content)
        for place in (bucket, depot):
            assert layout.lay_out(folder, place).changed
    assert not layout.lay_out(folder, bucket, verify=True).changed
    assert read(bucket) == read(depot)
    assert bucket.read("toy/index.json") == depot.read("toy/index.json")
    for name, caching in (("toy/index.json", "no-cache"), (entry_of(bucket), "public, max-age=31536000, immutable")):
        with urllib.request.urlopen(bucket.files.sign(f"{bucket.root}/{name}")) as answer:
            assert answer.headers["Cache-Control"] == caching
    assert bucket.folders() == ["toy"]
    names = {entry.name: entry.size_bytes for entry in depot.entries("toy/blobs/sha256")}
    assert {entry.name: entry.size_bytes for entry in bucket.entries("toy/blobs/sha256")} == names
    assert bucket.digest("toy/nothing") is None
    for place in (bucket, depot):
        done = garbage.sweep(place, "toy", keep=1)
        assert (done.kept, done.dropped) == (("1.1.0",), ("1.0.0",))
        assert list(read(place)) == ["1.1.0"]
        assert garbage.usage(place, "toy").names == ()
    assert [entry.name for entry in bucket.entries("toy")] == ["toy/index.json", "toy/oci-layout"]
    names = [entry.name for entry in bucket.entries("toy/blobs/sha256")]
    assert set(names) == {entry.name for entry in depot.entries("toy/blobs/sha256")}


def test_whoever_fills_a_bucket_waits_for_its_sweep(bucket, tmp_path):
    """The note of a sweep that was killed is believed for a while only."""
    with bucket.sweeping("toy"):
        filling = threading.Thread(target=layout.lay_out, args=(release(tmp_path / "release"), bucket))
        filling.start()
        filling.join(2)
        assert filling.is_alive()
    filling.join(60)
    assert list(read(bucket)) == ["1.0.0"]


def test_a_large_file_goes_up_under_another_name_first(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(depot_bucket, "_ONE_PUT", 4)
    folder = release(tmp_path / "release")
    layout.lay_out(folder, bucket)
    assert read(bucket)["1.0.0"]["engines/any-echo/model.bin"] == b"one for any-echo"
    assert not [one.name for one in bucket.entries("toy/blobs/sha256") if one.name.endswith(".part")]


def test_a_bucket_that_is_not_there(bucket, tmp_path):
    with pytest.raises(UnavailableError, match="`s3://nowhere/registry` can't be used: there is no such bucket"):
        layout.lay_out(release(tmp_path / "release"), depots.at("s3://nowhere/registry"))


def test_a_server_that_is_away(bucket, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    files = S3FileSystem(
        endpoint_url="http://127.0.0.1:9",
        key="x",
        secret="x",
        config_kwargs={"retries": {"max_attempts": 0}},
        skip_instance_cache=True,
    )
    files.retries = 1
    with pytest.raises(UnavailableError, match=r"`s3://models/registry` can't be used: .*127\.0\.0\.1:9"):
        layout.lay_out(release(tmp_path / "release"), depot_bucket.BucketDepot(files, "models/registry"))


def test_two_publishers_to_a_bucket_at_once(bucket, tmp_path):
    commands = []
    for who in range(2):
        for turn in range(4):
            release(tmp_path / f"publisher-{who}" / str(turn), f"{who + 1}.0.{turn}", f"content {turn}")
        commands.append([sys.executable, "-m", "tests.laying", "all", str(tmp_path / f"publisher-{who}"), bucket.name])
    working = [subprocess.Popen(command) for command in commands]
    assert [one.wait() for one in working] == [0, 0]
    assert len(read(bucket)) == 8


# --- into a real registry --------------------------------------------------------------------------------------------


@pytest.fixture
def oci_registry(tmp_path):
    """The address of Debian's docker-registry, on this machine."""
    for program in ("skopeo", "docker-registry"):
        if shutil.which(program) is None:
            extras.skip(f"`{program}` is not installed (`apt install skopeo docker-registry`)")
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
    settings = tmp_path / "registry.yml"
    settings.write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {address}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path / 'storage'}}}}}\n"
    )
    server = subprocess.Popen(["docker-registry", "serve", str(settings)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/"):
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


def skopeo(*arguments: str) -> str:
    return run(Path.cwd(), "skopeo", "--insecure-policy", *arguments)


def test_skopeo_copies_a_target_and_a_whole_release_into_a_registry_and_back(depot, tmp_path, oci_registry):
    folder = release(tmp_path / "release")
    layout.lay_out(folder, depot)
    source, got = f"oci:{depot.root}/toy", {}
    for tag, more in (("v1.0.0-linux-echo", []), ("v1.0.0", ["--all"])):
        there, got[tag] = f"docker://{oci_registry}/models/toy:{tag}", tmp_path / tag
        skopeo("copy", *more, "--dest-tls-verify=false", f"{source}:{tag}", there)
        skopeo("copy", *more, "--src-tls-verify=false", there, f"oci:{got[tag]}:{tag}")
    top, *_, target = layout.index(depot, "toy").entries
    (whole,) = json.loads((got["v1.0.0"] / "index.json").read_text())["manifests"]
    parts = json.loads((got["v1.0.0"] / "blobs/sha256" / whole["digest"][7:]).read_text())["manifests"]
    # older versions of skopeo write the list of parts anew, without what they don't know; the parts stay as they are
    assert [one["digest"] for one in parts] == [
        one["digest"] for one in json.loads(blob(depot, "toy", top))["manifests"]
    ]
    (copied,) = json.loads((got["v1.0.0-linux-echo"] / "index.json").read_text())["manifests"]
    assert copied["digest"] == target["digest"]
    blobs = got["v1.0.0-linux-echo"] / "blobs/sha256"
    layers = json.loads((blobs / copied["digest"][7:]).read_text())["layers"]
    files = {one["annotations"][layout.TITLE]: (blobs / one["digest"][7:]).read_bytes() for one in layers}
    assert sorted(files) == ["engines/linux-echo/model.bin", "golden.safetensors", "manifest.json"]
    assert all(data == (folder / name).read_bytes() for name, data in files.items())

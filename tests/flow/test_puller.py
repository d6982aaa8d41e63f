"""`exportyard-pull`: from a static registry, over networks and disks that fail, into a folder that is always whole."""

import ast
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import cli, manifest, puller, trust
from tests import buckets
from tests.registries import assign, blobs, publish, read_state, release, serving, sign
from tests.releases import TARGETS

PULLER = Path(puller.__file__)
SOON = puller.Options(retries=4, first_pause_s=0.001, longest_pause_s=0.01, timeout_s=5)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """A private key; its public one is beside it."""
    folder = tmp_path_factory.mktemp("keys")
    trust.keygen(folder / "key")
    trust.keygen(folder / "other")
    return folder / "key"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, key):
    """A registry with two signed releases of `toy`, their folders, and the channel `prod`. Read only."""
    base = tmp_path_factory.mktemp("shelf")
    for version, content in (("1.0.0", "one"), ("1.1.0", "two")):
        publish(base / "registry", release(base / version, version, content, key=key))
    assign(base / "registry", "prod", "1.0.0", 1, key)
    return base


@pytest.fixture
def copied(shelf, tmp_path):
    """A copy of the shelf, to be changed."""
    shutil.copytree(shelf, tmp_path / "shelf")
    return tmp_path / "shelf"


def pull(source, to: Path, asked: str = "toy", **more) -> puller.Pulled:
    recipe, version, channel = puller.asked(asked)
    wish = puller.Wish(str(source), recipe, to, version, channel, **more)
    talk = puller.Talk(quiet=True)
    return puller.pull(wish, talk, puller.Registry(puller.source_of(wish.source, SOON), recipe, talk, SOON))


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}."))


def pub(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


# --- what is pulled ------------------------------------------------------------------------------------------------


def test_the_newest_a_version_and_a_channel(shelf, tmp_path):
    here = tmp_path / "deep" / "here"
    with serving(shelf / "registry") as server:
        pulled = pull(server.url, here)
        assert (pulled.version, pulled.targets, pulled.changed) == ("1.1.0", TARGETS, True)
        assert content(here) == content(shelf / "1.1.0")
        assert manifest.load(here).version == "1.1.0"
        assert beside(here) == []
        assert not pull(server.url, here, "toy@1.1.0").changed
        assert pull(server.url, here, "toy#prod").version == "1.0.0"
    assert content(here) == content(shelf / "1.0.0")
    assert content(here.with_name(".here.previous")) == content(shelf / "1.1.0")


def test_some_targets_from_a_folder(shelf, tmp_path):
    here = tmp_path / "here"
    assert pull(shelf / "registry", here, targets=("linux-echo",)).targets == ("linux-echo",)
    assert sorted(content(here)) == [
        "engines/linux-echo/model.bin",
        "golden.safetensors",
        "manifest.json",
        "provenance.json",
        "sbom.json",
        "signature.json",
    ]
    assert pull(f"file://{shelf}/registry", here, targets=("any-echo",)).changed
    assert beside(here) == []  # the same version with other engines is no version before


@pytest.mark.parametrize(
    ("asked", "targets", "message", "hint"),
    [
        ("tyo", (), "there is no `tyo` in the registry", "see the name"),
        ("toy@1.0.1", (), "unknown version `1.0.1`", "did you mean `1.0.0`"),
        ("toy#prood", (), "unknown channel `prood`", "did you mean `prod`"),
        ("toy", ("any-ehco",), "unknown target `any-ehco`", "did you mean `any-echo`"),
    ],
)
def test_a_misspelt_name(shelf, tmp_path, asked, targets, message, hint):
    with pytest.raises(puller.UsageError, match=message) as caught:
        pull(shelf / "registry", tmp_path / "here", asked, targets=targets)
    assert hint in caught.value.hint
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("text", ["", "../toy", "toy@newest", "toy#", "toy@", "a b", "toy@1.0.0#prod"])
def test_what_names_no_release(text):
    with pytest.raises(puller.UsageError, match="names no release"):
        puller.asked(text)


def test_a_target_that_was_skipped(shelf, tmp_path):
    with pytest.raises(puller.ReleaseError, match="no engine for `web-any-echo`: not built here: no browser"):
        pull(shelf / "registry", tmp_path / "here", targets=("web-any-echo",))


def test_a_withdrawn_release_and_a_pre_release_are_not_the_newest(copied, tmp_path):
    publish(copied / "registry", copied / "1.1.0", withdrawn="wrong labels")
    publish(copied / "registry", release(copied / "2", "2.0.0-rc.1", "three"))
    assert pull(copied / "registry", tmp_path / "here").version == "1.0.0"
    assert pull(copied / "registry", tmp_path / "here", "toy@2.0.0-rc.1").version == "2.0.0-rc.1"
    assert pull(copied / "registry", tmp_path / "here", "toy@v1.1.0").version == "1.1.0"


def test_only_what_is_missing_is_fetched(copied, tmp_path):
    (copied / "3").mkdir()
    shutil.copytree(copied / "1.1.0" / "engines", copied / "3" / "engines")
    made = manifest.parse((copied / "1.1.0/manifest.json").read_text(), "1.1.0")
    made = made.model_copy(update={"version": "1.2.0", "beside": ()})
    shutil.copy(copied / "1.1.0/golden.safetensors", copied / "3")
    (copied / "3/manifest.json").write_text(made.text())
    publish(copied / "registry", copied / "3")
    with serving(copied / "registry") as server:
        pull(server.url, tmp_path / "here", "toy@1.1.0")
        server.asked.clear()
        assert pull(server.url, tmp_path / "here").version == "1.2.0"
        digests = {file.sha256 for file in made.files()}
        assert not [name for name, _ in server.asked if name.rpartition("/")[2] in digests]


# --- networks that fail --------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_ended(copied, tmp_path):
    big = os.urandom(3 << 20)
    with_big(copied, big)
    blob = blobs(copied / "registry", copied / "big")["engines/any-echo/model.bin"]
    name = blob.relative_to(copied / "registry").as_posix()
    with serving(copied / "registry") as server:
        server.only, server.script = blob.name, ["cut", "cut", "reset", "cut"]
        pull(server.url, tmp_path / "here", "toy@3.0.0", targets=("any-echo",))
        starts = [int(span[6:-1]) if span else 0 for asked, span in server.asked if asked == name]
        assert len(starts) == 5
        assert starts == sorted(starts)
        # what was sent before the server cut the line may be lost; never more than one piece a cut
        assert server.sent[name] <= len(big) + (len(starts) - 1) * puller.CHUNK
    assert (tmp_path / "here/engines/any-echo/model.bin").read_bytes() == big


def with_big(shelf: Path, data: bytes) -> None:
    """Version 3.0.0, with one engine of many bytes."""
    from pipeline import store
    from tests.releases import manifest_of, write_release

    folder = shelf / "big"
    write_release(folder, "3.0.0", "big")
    (folder / "manifest.json").unlink()
    (folder / "engines/any-echo/model.bin").write_bytes(data)
    (folder / "manifest.json").write_text(manifest_of(store.describe(folder), "3.0.0").text())
    publish(shelf / "registry", folder)


def test_killed_and_started_again(copied, tmp_path):
    data = os.urandom(6 << 20)
    with_big(copied, data)
    blob = blobs(copied / "registry", copied / "big")["engines/any-echo/model.bin"]
    here, kept = tmp_path / "here", tmp_path / ".here.partial" / blob.name
    with serving(copied / "registry") as server:
        server.slow = 2e-3
        command = [sys.executable, "-I", str(PULLER), "toy@3.0.0", "--from", server.url, "--to", str(here)]
        process = subprocess.Popen(command)
        while not kept.exists() or kept.stat().st_size < 1 << 20:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        size = kept.stat().st_size
        server.slow = 0.0
        server.asked.clear()
        assert not here.exists()
        pull(server.url, here)
        spans = [span for name, span in server.asked if name.endswith(blob.name)]
        assert spans == [f"bytes={size}-"]
    assert (here / "engines/any-echo/model.bin").read_bytes() == data
    assert beside(here) == []


def test_a_server_that_can_not_begin_in_the_middle(copied, tmp_path):
    data = os.urandom(1 << 20)
    with_big(copied, data)
    with serving(copied / "registry") as server:
        server.ranges = False
        server.only = blob_of(copied, "engines/any-echo/model.bin")
        server.script = ["cut"] * 3
        pull(server.url, tmp_path / "here", "toy@3.0.0", targets=("any-echo",))
    assert (tmp_path / "here/engines/any-echo/model.bin").read_bytes() == data


def test_what_was_kept_is_not_believed(shelf, tmp_path):
    blob = blobs(shelf / "registry", shelf / "1.1.0")["engines/any-echo/model.bin"]
    kept = tmp_path / ".here.partial"
    for rotten in (b"x" * blob.stat().st_size, b"x", b"x" * 9999):
        kept.mkdir()
        (kept / blob.name).write_bytes(rotten)
        pull(shelf / "registry", tmp_path / "here")
        assert content(tmp_path / "here") == content(shelf / "1.1.0")
        shutil.rmtree(tmp_path / "here")


def test_a_registry_that_is_away(shelf, tmp_path):
    with serving(shelf / "registry") as server:
        url = server.url
    with pytest.raises(puller.UnavailableError, match="5 times in a row: ConnectionRefusedError"):
        pull(url, tmp_path / "here")
    with serving(shelf / "registry") as server:
        server.kinds, server.faults = ("503",), 1.0
        with pytest.raises(puller.UnavailableError, match="the server answers 503"):
            pull(server.url, tmp_path / "here")
    assert [*tmp_path.iterdir()] == []


def test_a_silent_server(shelf, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, "-I", str(PULLER), "toy", "--from", url, "--to", str(tmp_path / "here")]
        done = subprocess.run(
            [*command, "--retries", "0", "--timeout", "0.2"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 10
    assert "no answer within 0.2 s" in done.stderr


def test_name_and_word_in_the_address_and_a_proxy(shelf, tmp_path, monkeypatch):
    with serving(shelf / "registry") as server:
        address = server.url.replace("://", "://me:s%40crt@")
        pull(address, tmp_path / "here")
        assert {one.get("Authorization") for one in server.headers} == {"Basic bWU6c0BjcnQ="}
        server.kinds, server.faults = ("503",), 1.0
        with pytest.raises(puller.UnavailableError) as caught:
            pull(address, tmp_path / "here")
        assert "crt" not in caught.value.message
    # a proxy is asked for whole addresses
    with serving(shelf / "registry") as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(puller.UsageError, match="there is no `toy`"):
            pull("http://registry.example/models", tmp_path / "there")
        assert server.asked[0][0] == "http://registry.example/models/toy/index.json"


def test_a_server_that_sends_elsewhere(copied, tmp_path):
    """Redirects are followed, also in the middle; the password is only for the first server."""
    data = os.urandom(1 << 20)
    with_big(copied, data)
    with serving(copied / "registry") as storage, serving(tmp_path) as server:
        server.elsewhere = storage.url
        storage.only, storage.script = blob_of(copied, "engines/any-echo/model.bin"), ["cut", "cut"]
        pull(server.url.replace("://", "://me:word@"), tmp_path / "here", "toy@3.0.0", targets=("any-echo",))
        assert all("Authorization" in one for one in server.headers)
        assert not any("Authorization" in one for one in storage.headers)
        assert [one.get("Cache-Control") for one in server.headers][:2] == ["no-cache", None]
    assert (tmp_path / "here/engines/any-echo/model.bin").read_bytes() == data


def blob_of(shelf: Path, name: str) -> str:
    """The digest of a file of version 3.0.0."""
    return blobs(shelf / "registry", shelf / "big")[name].name


def test_an_index_that_moves_while_it_is_read(copied, tmp_path, monkeypatch):
    registry = copied / "registry"
    real, moved = puller.describe, []

    def describe(source, entry):
        if not moved:  # somebody publishes, and cleans up, between the index and what it leads to
            moved.append(entry.version)
            publish(registry, release(copied / "2", "1.2.0", "three"))
            raise puller._missing(source.source, "a blob")
        return real(source, entry)

    monkeypatch.setattr(puller, "describe", describe)
    assert pull(registry, tmp_path / "here").version == "1.2.0"
    assert moved == ["1.1.0"]


# --- 1,000 faults --------------------------------------------------------------------------------------------------

FAULTS = 1000 if os.environ.get("EXPORTYARD_TEST_ALL") else 100


def test_random_faults_never_install_a_wrong_file(shelf, tmp_path, key, monkeypatch):
    """Faults of networks and disks, one or many a pull, and rivals: a release is installed whole, or stays."""
    good = {version: content(shelf / version) for version in ("1.0.0", "1.1.0")}
    rng, codes, faults = random.Random(7), [], 0
    full = fill_up_at_times(monkeypatch, rng)
    with serving(shelf / "registry", faults=0.25, seed=7) as server:

        def attempt(here: Path) -> None:
            asked = rng.choice(["toy", "toy@1.0.0", "toy#prod"])
            try:
                pull(server.url, here, asked, key=pub(key) if rng.random() < 0.5 else None)
                codes.append(0)
            except puller.PullError as error:
                codes.append(error.exit_code)

        while faults + server.failed + len(full) < FAULTS:
            here = tmp_path / f"here{rng.randrange(5)}"
            before = content(here) if here.exists() else None
            faults += damage(rng, here, good)
            rivals = [threading.Thread(target=attempt, args=(here,)) for _ in range(rng.choice([1, 1, 1, 3]))]
            count = len(codes)
            for rival in rivals:
                rival.start()
            for rival in rivals:
                rival.join()
            faults += len(rivals) - 1
            assert len(codes) == count + len(rivals)  # and none has failed in another way
            kept = [*good.values()] if 0 in codes[count:] else [before, *good.values()]
            assert (content(here) if here.exists() else None) in kept
            if codes[-1] == 0:
                assert not here.with_name(f".{here.name}.partial").exists()
    assert set(codes) <= {0, 2, 10, 12, 13}  # 2: the server said that there is no index
    assert codes.count(0) > len(codes) / 4
    assert 13 in codes or len(full) < 3


def fill_up_at_times(monkeypatch, rng: random.Random) -> list[int]:
    """Let the disk be full now and then; what is returned grows with each time."""
    times: list[int] = []
    for name in ("_write", "_put"):
        real = getattr(puller, name)

        def tried(*arguments, real=real):
            if rng.random() < 0.03:
                times.append(1)
                raise puller.DiskError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        monkeypatch.setattr(puller, name, tried)
    return times


def damage(rng: random.Random, here: Path, good: dict[str, dict[str, bytes]]) -> bool:
    """Half of a blob, or other bytes of it, may be left from before; whether it is so now."""
    if rng.random() > 0.3:
        return False
    data = rng.choice([*good["1.1.0"].values(), *good["1.0.0"].values()])
    kept = here.with_name(f".{here.name}.partial")
    kept.mkdir(exist_ok=True)
    half = bytearray(data[: rng.randrange(len(data) + 1)])
    if half and rng.random() < 0.5:
        half[rng.randrange(len(half))] ^= 1
    (kept / hashlib.sha256(data).hexdigest()).write_bytes(half)
    return True


def test_a_registry_that_is_damaged_itself(copied, tmp_path):
    for name, blob in blobs(copied / "registry", copied / "1.1.0").items():
        whole = blob.read_bytes()
        here = tmp_path / "here"
        pull(copied / "registry", here, "toy@1.0.0")
        for rotten in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], whole + b"x", b""):
            blob.write_bytes(rotten)
            if rotten[: len(whole)] == whole and name != "manifest.json":
                continue  # what is behind the end is never read
            with pytest.raises(puller.ReleaseError):
                pull(copied / "registry", here)
            assert content(here) == content(copied / "1.0.0")
        blob.unlink()
        with pytest.raises(puller.ReleaseError, match="lacks `toy/blobs"):
            pull(copied / "registry", here)
        blob.write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "other"},
        {"version": "1.0.9"},
        {"format": 2},
        {"golden": {"file": {"path": "../../evil", "sha256": "0" * 64, "size_bytes": 1}, "cases": {}}},
        {"golden": {"file": {"path": "manifest.json", "sha256": "0" * 64, "size_bytes": 1}, "cases": {}}},
        {"golden": {"file": {"path": "/etc/passwd", "sha256": "0" * 64, "size_bytes": 1}, "cases": {}}},
        {"golden": {"file": {"path": "golden.safetensors", "sha256": "../x", "size_bytes": 1}, "cases": {}}},
        {"engines": []},
    ],
)
def test_a_manifest_that_is_none(copied, change):
    text = json.loads((copied / "1.1.0/manifest.json").read_text()) | change
    release = puller.Release({}, {})
    registry = puller.Registry(puller.Folder("here"), "toy", puller.Talk(quiet=True))
    layers = [{"digest": "sha256:3", "annotations": {"org.opencontainers.image.title": "manifest.json"}}]
    registry.blob = lambda digest: json.dumps(
        {
            "sha256:1": {"manifests": [{"digest": "sha256:2", "annotations": {"dev.exportyard.part": "release"}}]},
            "sha256:2": {"layers": layers},
            "sha256:3": text,
        }[digest]
    ).encode()
    with pytest.raises(puller.ReleaseError):
        release = puller.describe(registry, puller.Entry("sha256:1", "1.1.0", ""))
    assert release.content == {}


# --- disks that fail -----------------------------------------------------------------------------------------------


def command(source, to: Path, *more: str, asked: str = "toy") -> list[str]:
    return [sys.executable, "-I", str(PULLER), asked, "--from", str(source), "--to", str(to), *more]


def test_a_full_disk(copied, tmp_path):
    with_big(copied, os.urandom(1 << 20))
    here = tmp_path / "here"
    pull(copied / "registry", here, "toy@1.0.0")
    script = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    limited = [sys.executable, "-c", script + "os.execv(sys.argv[1], sys.argv[1:])"]
    done = subprocess.run([*limited, *command(copied / "registry", here)], capture_output=True, text=True, check=False)
    assert done.returncode == 13
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert content(here) == content(copied / "1.0.0")
    assert beside(here) == []  # a full disk is not kept full


def test_too_little_space_is_said_before(shelf, tmp_path, monkeypatch):
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:4], 0, *real(path)[5:]]))
    with pytest.raises(puller.StoreError, match=r"no space for .*: 47 B are needed, 0 B are free"):
        pull(shelf / "registry", tmp_path / "here")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_can_not_be_written(shelf, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(puller.StoreError, match="can't write"):
        pull(shelf / "registry", tmp_path / "file" / "here")


def test_many_pulls_into_one_folder(shelf, tmp_path):
    here = tmp_path / "here"
    with serving(shelf / "registry", faults=0.1, seed=3) as server:
        server.kinds = ("503", "cut", "flip")
        asked = ["toy", "toy@1.0.0"] * 3
        running = [
            subprocess.Popen(command(server.url, here, "-q", asked=one), stdout=subprocess.PIPE) for one in asked
        ]
        said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(asked), said
    assert content(here) in (content(shelf / "1.0.0"), content(shelf / "1.1.0"))
    assert beside(here) in ([], [".here.previous"])


def test_what_is_no_release_is_not_replaced(shelf, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    pull(shelf / "registry", here)  # an empty folder may be filled
    (here / "notes.txt").write_text("precious")
    with pytest.raises(puller.ReleaseError, match=r"notes\.txt` is not part of the release there and would be lost"):
        pull(shelf / "registry", here, "toy@1.0.0")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("precious")
    with pytest.raises(puller.ReleaseError, match="is not empty and holds no release"):
        pull(shelf / "registry", tmp_path / "thesis")
    with pytest.raises(puller.ReleaseError, match="is a file"):
        pull(shelf / "registry", here / "notes.txt")
    release(tmp_path / "other", "1.0.0", "other", recipe="other")
    with pytest.raises(puller.ReleaseError, match="holds a release of `other`"):
        pull(shelf / "registry", tmp_path / "other")


def test_a_damaged_copy_is_put_right(shelf, tmp_path):
    here = tmp_path / "here"
    pull(shelf / "registry", here)
    (here / "golden.safetensors").write_text("rotten")
    assert pull(shelf / "registry", here).changed
    assert content(here) == content(shelf / "1.1.0")
    assert beside(here) == []


def test_a_copy_whose_manifest_is_damaged_is_put_right(shelf, tmp_path):
    here = tmp_path / "here"
    pull(shelf / "registry", here, "toy@1.0.0")
    pull(shelf / "registry", here)
    (here / "manifest.json").write_bytes(b"\0" * 100)
    (here / "notes.txt").write_text("mine")
    with pytest.raises(puller.ReleaseError, match="holds no release of ours"):
        pull(shelf / "registry", here)
    (here / "notes.txt").unlink()
    assert pull(shelf / "registry", here).changed
    assert content(here) == content(shelf / "1.1.0")
    assert content(here.with_name(".here.previous")) == content(shelf / "1.0.0")  # and not the damaged one


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_step_of_the_installation(shelf, tmp_path, exchange):
    """After each kill the folder holds one of both versions, whole, or the next pull brings it back."""
    here = tmp_path / "here"
    for step in range(1, 60):
        for path in (here, here.with_name(".here.partial"), here.with_name(".here.previous")):
            shutil.rmtree(path, ignore_errors=True)
        pull(shelf / "registry", here, "toy@1.0.0")
        child = os.fork()
        if child == 0:
            die_at(step, exchange)
            pull(shelf / "registry", here)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if exchange:
            assert content(here) in (content(shelf / "1.0.0"), content(shelf / "1.1.0"))
        assert pull(shelf / "registry", here).version == "1.1.0"
        assert content(here) == content(shelf / "1.1.0")
        previous = here.with_name(".here.previous")
        assert content(previous) == content(shelf / "1.0.0")
        assert beside(here) == [".here.previous"]
        if done == 0:
            break
        assert done == -signal.SIGKILL
    assert 8 < step < 59


def die_at(count: int, exchange: bool) -> None:
    left = count

    def watch(owner, name):
        known = getattr(owner, name)

        def watched(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return known(*arguments, **options)

        setattr(owner, name, watched)

    if not exchange:
        puller._exchange = lambda one, other: False
    for name in ("rename", "replace", "mkdir", "rmdir", "unlink"):
        watch(Path, name)
    for owner, name in ((os, "link"), (os, "fsync"), (shutil, "rmtree"), (puller, "_exchange")):
        watch(owner, name)


def test_back_and_forth(shelf, tmp_path, key):
    here = tmp_path / "here"
    wish = puller.Wish("", "toy", here)
    with pytest.raises(puller.ReleaseError, match="there is no version before"):
        puller.back(wish)
    pull(shelf / "registry", here, "toy@1.0.0")
    pull(shelf / "registry", here)
    assert puller.back(wish).version == "1.0.0"
    assert content(here) == content(shelf / "1.0.0")
    signed = puller.Wish("", "", here, key=pub(key))
    assert puller.back(signed).version == "1.1.0"
    assert content(here) == content(shelf / "1.1.0")
    (here.with_name(".here.previous") / "golden.safetensors").write_text("golden 0f one")
    with pytest.raises(puller.ReleaseError, match="the version before is damaged"):
        puller.back(wish)
    assert content(here) == content(shelf / "1.1.0")


# --- trust ---------------------------------------------------------------------------------------------------------


def test_a_signed_release(shelf, tmp_path, key):
    assert pull(shelf / "registry", tmp_path / "here", key=pub(key)).signed
    assert pull(shelf / "registry", tmp_path / "here", "toy#prod", key=pub(key)).version == "1.0.0"
    state = read_state(tmp_path / "here")
    assert (state["toy"]["version"], state["toy#prod"]["serial"]) == ("1.1.0", 1)
    with pytest.raises(puller.ReleaseError, match="can't be trusted, nothing was installed: the key that was given"):
        pull(shelf / "registry", tmp_path / "there", key=key.with_name("other.pub"))
    assert not (tmp_path / "there").exists()


def publish_signed(base: Path, key: Path, version: str, change) -> Path:
    """Lay out a release whose signature, or files, `change` has spoilt."""
    folder = release(base / f"signed-{version}", version, "signed", key=key)
    change(folder)
    publish(base / "registry", folder)
    return base / "registry"


def unsigned(folder: Path) -> None:
    (folder / "signature.json").unlink()
    text = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(text | {"beside": []}))


def replaced(folder: Path) -> None:
    text = json.loads((folder / "manifest.json").read_text())
    text["tools"] = {"torch": "0.0.1"}
    (folder / "manifest.json").write_text(json.dumps(text))


def nonsense(folder: Path) -> None:
    (folder / "signature.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unsigned, "it is not signed"),
        (replaced, "`manifest.json` is not what was signed"),
        (nonsense, "not a signature in DSSE's form"),
    ],
)
def test_a_release_that_was_tampered_with(copied, tmp_path, key, change, message):
    registry = publish_signed(copied, key, "1.2.0", change)
    with pytest.raises(puller.ReleaseError, match=message):
        pull(registry, tmp_path / "here", key=pub(key))
    assert [*tmp_path.glob("*here*")] == []


def test_the_signature_of_another_release(copied, tmp_path, key):
    registry = publish_signed(
        copied, key, "1.2.0", lambda folder: shutil.copy(copied / "1.1.0/signature.json", folder / "signature.json")
    )
    with pytest.raises(puller.ReleaseError, match=r"`manifest\.json` is not what was signed"):
        pull(registry, tmp_path / "here", key=pub(key))


@pytest.mark.parametrize(
    "change",
    [{"resources": []}, {"resources": [{"name": "x", "algorithm": "blake2b", "digest": "00"}]}, {"resources": None}],
)
def test_a_signature_of_something_else(copied, tmp_path, key, change):
    registry = publish_signed(copied, key, "1.2.0", lambda folder: sign(folder, key, **change))
    with pytest.raises(puller.ReleaseError, match="what is signed is no list of a model's files"):
        pull(registry, tmp_path / "here", key=pub(key))


def test_a_channel_is_not_turned_back(copied, tmp_path, key):
    here, registry = tmp_path / "here", copied / "registry"
    assign(registry, "prod", "1.1.0", 2, key)
    old = (registry / "toy/index.json").read_bytes()
    assign(registry, "prod", "1.0.0", 3, key)  # a rollback that the publisher wants
    assert pull(registry, here, "toy#prod", key=pub(key)).version == "1.0.0"
    (registry / "toy/index.json").write_bytes(old)
    with pytest.raises(puller.ReleaseError, match=r"was turned back.*assignment 3 \(v1\.0\.0\).*gives 2 \(v1\.1\.0\)"):
        pull(registry, here, "toy#prod", key=pub(key))
    assign(registry, "prod", "1.1.0", 3, key)
    with pytest.raises(puller.ReleaseError, match="was turned back"):
        pull(registry, here, "toy#prod", key=pub(key))
    assert content(here) == content(copied / "1.0.0")
    assign(registry, "prod", "1.1.0", 4, key)
    assert pull(registry, here, "toy#prod", key=pub(key)).version == "1.1.0"


def test_the_newest_does_not_go_back_by_itself(copied, tmp_path, key):
    here, registry = tmp_path / "here", copied / "registry"
    pull(registry, here, key=pub(key))
    publish(registry, copied / "1.1.0", withdrawn="hidden")
    with pytest.raises(puller.ReleaseError, match=r"was v1\.1\.0, and the registry now says v1\.0\.0") as caught:
        pull(registry, here, key=pub(key))
    assert caught.value.hint == "if that is meant, name it: `toy@1.0.0`"
    assert pull(registry, here, "toy@1.0.0", key=pub(key)).version == "1.0.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel": "beta"}, "about something else"),
        ({"recipe": "other"}, "about something else"),
        ({"version": "1.1.0"}, r"v1\.0\.0, and v1\.1\.0 was signed"),
        ({"serial": "9"}, "its serial number is '9'"),
        ({"serial": -1}, "its serial number is -1"),
    ],
)
def test_a_channel_statement_that_says_something_else(copied, tmp_path, key, change, message):
    assign(copied / "registry", "prod", "1.0.0", 9, key, **change)
    with pytest.raises(puller.ReleaseError, match=message):
        pull(copied / "registry", tmp_path / "here", "toy#prod", key=pub(key))


def test_a_channel_that_is_not_signed(copied, tmp_path, key):
    assign(copied / "registry", "beta", "1.0.0", 1)
    assert pull(copied / "registry", tmp_path / "here", "toy#beta").version == "1.0.0"
    with pytest.raises(puller.ReleaseError, match=r"channel `beta` of `toy` can't be trusted.*it is not signed"):
        pull(copied / "registry", tmp_path / "here", "toy#beta", key=pub(key))


def test_signatures_are_those_of_the_standard(key):
    """Against OpenSSL: good ones hold; any other message, key or number does not."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    private = serialization.load_pem_private_key(key.read_bytes(), None)
    point, other = puller.public_key(pub(key)), puller.public_key(key.with_name("other.pub"))
    for length in (0, 1, 64, 1000):
        message = os.urandom(length)
        signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
        r, s = utils.decode_dss_signature(signature)
        encode = utils.encode_dss_signature
        assert puller.is_signed(point, message, signature)
        assert puller.is_signed(point, message, encode(r, puller._N - s))
        assert not puller.is_signed(other, message, signature)
        assert not puller.is_signed(point, message + b"x", signature)
        wrong = [encode(*pair) for pair in ((r, s + 1), (r, 0), (0, s), (r, s + puller._N), (r + puller._N, s))]
        assert not any(puller.is_signed(point, message, one) for one in [*wrong, signature[:-1], signature + b"x", b""])


def test_keys_that_are_none(key, tmp_path, capsys):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "p384").write_bytes(ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*pem))
    (tmp_path / "off").write_text(pub(key).read_text().replace("AE", "AF", 1).replace("Q", "R"))
    (tmp_path / "text").write_text("no key")
    for path, message in ((key, "is a private key"), (tmp_path / "none", "can't read the key")):
        with pytest.raises(puller.UsageError, match=message):
            puller.public_key(path)
    for name in ("p384", "off", "text"):
        with pytest.raises(puller.UsageError, match="is no public key of the kind EC P-256"):
            puller.public_key(tmp_path / name)


# --- which target --------------------------------------------------------------------------------------------------


def rows(**engines):
    """A manifest's engines: by name with dashes as underscores, part of the row and a time in ms."""
    made = {}
    for name, (row, time_ms) in engines.items():
        line = {"sizes": {"batch": 1}, "threads": 1, "engine": {"median_ms": time_ms}}
        target = {"backend": "onnxruntime", "platform": "linux", "machine": "x86_64", "arch": "generic"} | row
        made[name] = {"target": target, "latency": {"rows": [line] if time_ms else []}}
    return {"recipe": "toy", "version": "1.0.0", "engines": made}


@pytest.fixture
def server_of_2020(monkeypatch):
    """A machine with AVX2, and without VNNI or a GPU."""
    monkeypatch.setattr(puller.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(puller.platform, "system", lambda: "Linux")
    monkeypatch.setattr(puller, "cpu_features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(puller, "gpus", set)


def test_the_fastest_engine_that_runs_here(server_of_2020, monkeypatch):
    found = rows(
        vnni=({"requires": ["avx2", "avx512_vnni|avx_vnni"]}, 1.0),
        arm=({"machine": "aarch64"}, 0.5),
        android=({"platform": "android"}, 0.5),
        cuda=({"arch": "sm90"}, 0.1),
        avx2=({"requires": ["avx2", "fma"]}, 2.0),
        tvm=({"backend": "tvm"}, 3.0),
        untimed=({"platform": "any", "machine": "any"}, None),
    )
    name, why = puller.best(found)
    assert name == "avx2"
    assert "the fastest of 3 that run here: 2 ms at batch=1 on 1 thread" in why
    assert "vnni (this CPU lacks avx512_vnni or avx_vnni)" in why
    assert "cuda (it is for an NVIDIA GPU sm90, here is none)" in why
    assert puller.best(found, ["tvm"])[0] == "tvm"
    with pytest.raises(puller.UnavailableError, match="no engine of `toy` v1"):
        puller.best(found, ["openvino"])
    monkeypatch.setattr(puller, "gpus", lambda: {"sm90"})
    assert puller.best(found)[0] == "cuda"


def test_auto_on_the_command_line(shelf, tmp_path, capsys):
    here = str(tmp_path / "here")
    arguments = ["toy", "--from", str(shelf / "registry"), "--to", here, "-t", "auto", "--json"]
    assert puller.main(arguments) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["targets"] == ["any-echo"]
    assert "any-echo: the first of 2 that run here; none was measured" in said.err


# --- golden vectors ------------------------------------------------------------------------------------------------


def test_engines_that_can_not_be_checked_are_not_installed(shelf, tmp_path):
    with pytest.raises(puller.UnavailableError, match=r"none of the engines can be checked.*one of `echo`"):
        pull(shelf / "registry", tmp_path / "here", check=True)
    assert not (tmp_path / "here").exists()


@pytest.fixture(scope="module")
def doubling(tmp_path_factory):
    """A registry with an engine of ONNX Runtime, and one with two buckets, whose output is twice the input."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper
    from safetensors.numpy import save_file

    base = tmp_path_factory.mktemp("doubling")
    folder = base / "release"
    feeds = {case: np.linspace(-1, 1, 3 * size, dtype=np.float32).reshape(size, 3) for case, size in SIZES.items()}
    folder.mkdir()
    tensors = {f"{case}/in/x": array for case, array in feeds.items()}
    tensors |= {f"{case}/out/y": 2 * array for case, array in feeds.items()}
    save_file(tensors, folder / "golden.safetensors")
    for name, size in (("any-onnxruntime", "batch"), ("any-buckets/batch2", 2), ("any-buckets/batch8", 8)):
        x, y = (helper.make_tensor_value_info(one, TensorProto.FLOAT, [size, 3]) for one in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
        path = folder / "engines" / name / "model.onnx"
        path.parent.mkdir(parents=True)
        model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
        onnx.save(model, path)
    write_doubling(folder, "1.0.0")
    publish(base / "registry", folder)
    return base


SIZES = {"min": 1, "odd": 5, "opt": 8}


def write_doubling(folder: Path, version: str, **bounds) -> None:
    """The manifest of what is in `folder`; `bounds` are those of the golden vectors."""
    from pipeline import store
    from pipeline.manifest import Bucket, Golden, ReleaseFile, Selector
    from pipeline.types import Axis, Signature, TensorSpec, Tolerance
    from tests.releases import manifest_of, target

    (folder / "manifest.json").unlink(missing_ok=True)
    facts = store.describe(folder)
    stand_ins = {f"engines/{name}/model.bin": facts["golden.safetensors"] for name in TARGETS}
    made = manifest_of(facts | stand_ins, version)
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", 3)) for name in "xy"]
    axes = {"batch": Axis(min=1, opt=8, max=8)}
    engines = {}
    for name in ("any-onnxruntime", "any-buckets"):
        files = tuple(
            ReleaseFile(path=path, **facts[path].model_dump())
            for path in sorted(facts)
            if path.startswith(f"engines/{name}/")
        )
        parts = tuple(
            Bucket(sizes={"batch": size}, files=(f"engines/{name}/batch{size}/model.onnx",)) for size in (2, 8)
        )
        engines[name] = made.engines["any-echo"].model_copy(
            update={
                "target": target(name).model_copy(update={"backend": "onnxruntime"}),
                "files": files,
                "golden": {"y": Tolerance(**bounds or {"max_abs": 0})},
                "selector": Selector(axes=axes, buckets=parts) if name == "any-buckets" else None,
            }
        )
    file = ReleaseFile(path="golden.safetensors", **facts["golden.safetensors"].model_dump())
    golden = Golden(file=file, cases={case: {"batch": size} for case, size in SIZES.items()})
    signature = Signature(inputs=specs[:1], outputs=specs[1:], axes=axes)
    update = {"engines": engines, "golden": golden, "signature": signature}
    (folder / "manifest.json").write_text(made.model_copy(update=update).text())


def test_the_golden_vectors_are_run(doubling, tmp_path, capsys):
    arguments = ["toy", "--from", str(doubling / "registry"), "--to", str(tmp_path / "here"), "--check"]
    assert puller.main(arguments) == 0
    said = capsys.readouterr().err
    for name in ("any-onnxruntime", "any-buckets"):
        assert f"checked: {name} reproduces 3 golden cases (largest difference 0)" in said
    assert puller.main([*arguments, "-q"]) == 0  # also if it is there already


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        ("numbers", 11, r"`any-\w+`, min: `y` differs by 2, allowed are 0; nothing was installed"),
        ("engine", 11, r"`any-\w+` does not run on this device, nothing was installed: "),
        ("bound", 11, r"this puller does not know the bound `cosine`"),
    ],
)
def test_an_engine_that_answers_something_else_is_not_installed(doubling, tmp_path, spoil, code, message):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(doubling, tmp_path / "doubling")
    folder = tmp_path / "doubling/release"
    if spoil == "numbers":
        tensors = load_file(folder / "golden.safetensors")
        tensors["min/out/y"] = tensors["min/out/y"] + np.float32(2)
        save_file(tensors, folder / "golden.safetensors")
    if spoil == "engine":
        for path in folder.glob("engines/**/model.onnx"):
            path.write_bytes(b"no model")
    write_doubling(folder, "1.1.0", **({"cosine": 0.9} if spoil == "bound" else {}))
    publish(tmp_path / "doubling/registry", folder)
    here = tmp_path / "here"
    pull(tmp_path / "doubling/registry", here, "toy@1.0.0", check=True)
    with pytest.raises(puller.ParityError, match=message) as caught:
        pull(tmp_path / "doubling/registry", here, check=True)
    assert caught.value.exit_code == code
    assert content(here) == content(doubling / "release")
    assert pull(tmp_path / "doubling/registry", here).version == "1.1.0"


def test_a_device_without_onnxruntime(doubling, tmp_path):
    run = command(doubling / "registry", tmp_path / "here", "--check")
    done = subprocess.run([run[0], "-I", "-S", *run[2:]], capture_output=True, text=True, check=False)
    assert done.returncode == 10
    assert "the package `numpy` is not installed" in done.stderr
    assert not (tmp_path / "here").exists()


# --- the bucket ----------------------------------------------------------------------------------------------------


def test_signed_requests_are_those_of_the_standard():
    """AWS's own example of a GET of an object."""
    made = puller.signed(
        "https://examplebucket.s3.amazonaws.com/test.txt",
        {"range": "bytes=0-9"},
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "",
        "us-east-1",
        "20130524T000000Z",
    )
    signature = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    assert made["authorization"].endswith(f"Signature={signature}")
    assert "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date" in made["authorization"]


def test_a_bucket(shelf, tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    shutil.copytree(shelf / "registry", tmp_path / "www" / "bucket" / "models")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    with serving(tmp_path / "www") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        pull("s3://bucket/models/", tmp_path / "here", "toy@1.0.0")
        assert "authorization" not in {name.lower() for one in server.headers for name in one}
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        pull("s3://bucket/models", tmp_path / "here")
        last = {name.lower(): value for name, value in server.headers[-1].items()}
        assert last["authorization"].startswith("AWS4-HMAC-SHA256 Credential=me/")
        assert last["x-amz-security-token"] == "token"
    assert content(tmp_path / "here") == content(shelf / "1.1.0")


def test_a_bucket_of_moto(shelf, tmp_path, monkeypatch):
    """A server of S3 that isn't ours, with an index that only a signed request may read."""
    with buckets.bucket(monkeypatch) as name:
        import fsspec

        place = f"s3://{name}/edge"
        fsspec.filesystem("s3", skip_instance_cache=True).put(f"{shelf}/registry", f"{name}/edge", recursive=True)
        assert pull(place, tmp_path / "here").version == "1.1.0"
        assert content(tmp_path / "here") == content(shelf / "1.1.0")
        with pytest.raises(puller.UsageError, match="there is no `other`"):
            pull(place, tmp_path / "here", "other")
        # half a blob is here
        blob = blobs(shelf / "registry", shelf / "1.1.0")["engines/any-echo/model.bin"]
        (tmp_path / ".there.partial").mkdir()
        (tmp_path / ".there.partial" / blob.name).write_bytes(blob.read_bytes()[:9])
        assert pull(place, tmp_path / "there").changed


# --- following a channel -------------------------------------------------------------------------------------------


def publish_damaged(shelf: Path, version: str) -> None:
    """A release whose golden vectors the registry has lost."""
    publish(shelf / "registry", release(shelf / version, version, f"damaged {version}"))
    blobs(shelf / "registry", shelf / version)["golden.safetensors"].unlink()


def test_watching_a_channel(copied, tmp_path):
    registry, here = copied / "registry", tmp_path / "here"
    with serving(registry) as server:
        process = subprocess.Popen(
            command(server.url, here, "--watch", "--every", "0.05", "--json", asked="toy#prod"),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["version"] == "1.0.0"
        asked = len(server.asked)
        while len(server.asked) < asked + 3:
            time.sleep(0.01)
        assert {name for name, _ in server.asked[asked:]} == {"toy/index.json"}
        server.script = ["500"] * 3 + ["garbage"] * 3
        assign(registry, "prod", "1.1.0", 2)
        assert json.loads(process.stdout.readline())["version"] == "1.1.0"
        publish_damaged(copied, "1.2.0")
        assign(registry, "prod", "1.2.0", 3)
        asked = len(server.asked)
        while len(server.asked) < asked + 30:  # it is refused, and looked for no further
            time.sleep(0.01)
        assign(registry, "prod", "1.0.0", 4)
        assert json.loads(process.stdout.readline())["version"] == "1.0.0"
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        process.stdout.close()
    assert content(here) == content(copied / "1.0.0")


# --- the program ---------------------------------------------------------------------------------------------------


def test_it_is_one_file_for_old_pythons():
    """It can be parsed by Python 3.9, and imports only the standard library."""
    tree = ast.parse(PULLER.read_text(), feature_version=(3, 9))
    named = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert named - {"numpy", "onnxruntime"} <= sys.stdlib_module_names


def test_it_runs_alone(shelf, tmp_path):
    """As a device has it: fetched from the registry, with nothing but Python."""
    program = tmp_path / "exportyard-pull.py"
    shutil.copy(shelf / "registry" / "exportyard-pull.py", program)
    assert program.read_bytes() == PULLER.read_bytes()
    run = [sys.executable, "-I", "-S", str(program), "toy", "--from", str(shelf / "registry"), "--to"]
    done = subprocess.run([*run, "here"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        0,
        f"toy@v1.1.0 in {tmp_path}/here: any-echo, linux-echo (47 B, all verified)\n",
    )
    assert done.stderr.count("has a signature, which was not checked") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to pull, and from where?"),
        (["toy"], "what to pull, and from where?"),
        (["toy", "--from", "ftp://x"], "can't pull from `ftp://x`"),
        (["toy", "--from", "x", "--back", "--watch"], "`--back` takes nothing but"),
        (["toy", "--from", "x", "--backend", "tvm"], "says among what `--target auto` chooses"),
        (["toy", "--from", "x", "--every", "0"], "are above 0"),
    ],
)
def test_options_that_make_no_sense(arguments, message, tmp_path, capsys):
    assert puller.main([*arguments, "--to", str(tmp_path / "here")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "hint: " in said


def test_what_is_no_registry(shelf, tmp_path):
    """Then the command takes git; a registry that is away is no reason to."""
    (tmp_path / "www/toy").mkdir(parents=True)
    (tmp_path / "www/toy/index.json").write_text("<html>sign in</html>")
    with serving(tmp_path / "www") as server:
        assert not puller.is_registry(server.url, "toy", SOON)
        assert not puller.is_registry(server.url, "other", SOON)
        assert server.asked[0] == ("toy/index.json", "")
    assert not puller.is_registry(str(tmp_path), "toy")
    assert not puller.is_registry("git@host:models", "toy")
    assert not puller.is_registry("ssh://host/models", "toy")
    assert not puller.is_registry("https://host.invalid/models.git", "toy")
    assert puller.is_registry(f"file://{shelf}/registry", "toy")
    assert puller.is_registry(str(shelf / "registry"), "tyo")  # whose own error is the better one
    with serving(shelf / "registry") as registry:
        assert puller.is_registry(registry.url, "tyo", SOON)
    with pytest.raises(puller.UnavailableError, match="ConnectionRefusedError"):
        puller.is_registry(server.url, "toy", SOON)


def test_a_bug_is_said_in_one_line(shelf, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("EXPORTYARD_DEBUG", raising=False)

    def broken(*arguments):
        raise ZeroDivisionError("oh \033[2J")

    monkeypatch.setattr(puller, "describe", broken)
    assert puller.main(["toy", "--from", str(shelf / "registry"), "--to", str(tmp_path / "here")]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: a bug in exportyard-pull: ZeroDivisionError: oh ?[2J"


def test_the_bar_of_a_terminal(copied, tmp_path):
    import pty

    with_big(copied, os.urandom(4 << 20))
    master, slave = pty.openpty()
    with serving(copied / "registry") as server:
        server.slow = 5e-3
        process = subprocess.Popen(command(server.url, tmp_path / "here", asked="toy@3.0.0"), stderr=slave)
        os.close(slave)
        said = b""
        with contextlib.suppress(OSError):  # a terminal that is closed
            while piece := os.read(master, 4096):
                said += piece
        os.close(master)
    assert process.wait() == 0
    assert b"% of 4.2 MB, " in said
    assert said.endswith(b"\r\x1b[K")


@pytest.mark.parametrize("requests", [1, 5])  # the index, or files by several threads
def test_interrupted(shelf, tmp_path, requests):
    with serving(shelf / "registry") as server:
        server.stuck = requests
        process = subprocess.Popen(command(server.url, tmp_path / "here"), stderr=subprocess.PIPE, text=True)
        while len(server.asked) < requests:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, said = process.communicate()
        assert time.monotonic() - begun < 5
        server.stuck = 0
    assert process.returncode == 130
    assert "what has come is kept" in said
    assert "Traceback" not in said


def test_no_thread_is_left():
    assert [thread for thread in threading.enumerate() if thread.name == puller.AGENT] == []


# --- `exportyard pull` ---------------------------------------------------------------------------------------------


def test_the_command_takes_a_registry(shelf, tmp_path, capsys, key):
    here, arguments = (
        str(tmp_path / "here"),
        ["pull", "toy#prod", "--key", str(pub(key)), "--to", str(tmp_path / "here")],
    )
    with serving(shelf / "registry") as server:
        assert cli.invoke([*arguments, "--from", server.url, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["tag"], found["channel"], found["signed"]) == ("toy@v1.0.0", "prod", True)
        assert cli.invoke(["pull", "toy", "--from", str(shelf / "registry"), "--to", here, "-t", "auto"]) == 0
        assert "toy@v1.1.0 in" in capsys.readouterr().out
        assert cli.invoke(["pull", "toy", "--to", here, "--back"]) == 0
        assert "toy@v1.0.0 in" in capsys.readouterr().out
        assert cli.invoke(["pull", "toy@9.9.9", "--from", server.url, "--to", here]) == 2
        assert "unknown version `9.9.9`" in capsys.readouterr().err
        server.faults, server.kinds = 1.0, ("404",)
        assert cli.invoke(["pull", "toy#prod", "--from", server.url, "--to", here]) == 2
        assert "channels are read from a static registry or a folder" in capsys.readouterr().err


def test_the_command_loads_neither_torch_nor_dvc(shelf, tmp_path):
    script = f"""
import sys
from pipeline import cli
assert cli.invoke(["pull", "toy", "--from", {str(shelf / "registry")!r}, "--to", "here"]) == 0
print([name for name in ("torch", "dvc", "numpy", "onnx", "onnxruntime", "git") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

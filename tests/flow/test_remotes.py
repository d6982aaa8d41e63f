"""Releases whose DVC remote is a bucket on S3, or a folder that devices read by http."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

from pipeline import depots, layout, manifest, mirror, pull
from pipeline.errors import ReleaseError
from tests import buckets, extras
from tests.releases import dvc, publish, run, with_origin


@pytest.fixture
def s3(monkeypatch):
    """``s3://<new bucket>`` of a server on this machine."""
    extras.need("dvc_s3", "s3")
    with buckets.bucket(monkeypatch) as name:
        yield f"s3://{name}"


@pytest.fixture
def web(tmp_path):
    """A folder, and the address at which a web server shows it."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def workspace(base: Path, remotes: dict[str, str], local: dict[str, str] | None = None) -> Path:
    """A workspace with an origin; the remote `storage` is the default, `local` replaces URLs on this machine only."""
    root = with_origin(base)
    for name, url in remotes.items():
        dvc(root, "remote", "add", *(["-d"] if name == "storage" else []), name, url)
    for name, url in (local or {}).items():
        dvc(root, "remote", "modify", "--local", name, "url", url)
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    return root


def test_a_bucket_holds_data_and_registry_and_damage_in_it_is_refused(s3, tmp_path):
    root = workspace(tmp_path, {"storage": f"{s3}/dvc", "registry": f"{s3}/registry"})
    text = publish(root, "1.0.0", "one")
    origin = f"file://{tmp_path}/origin.git"
    assert pull.fetch(origin, "toy", None, None, tmp_path / "pulled").version == "1.0.0"
    dvc(tmp_path, "artifacts", "get", origin, "toy", "--rev", "v1.0.0", "-o", "got")
    dvc(tmp_path, "get", "--rev", text.tag, origin, "artifacts/toy/release", "-o", "folder")
    for name in ("got", "folder"):
        assert (tmp_path / name / "engines/any-echo/model.bin").read_text() == "one for any-echo"
    depot = depots.of(root)
    assert depot is not None
    assert depot.name == f"{s3}/registry"
    assert mirror.mirror(root, depot, "toy").fresh == ("1.0.0",)
    assert [*layout.index(depot, "toy").releases()] == ["1.0.0"]
    files = depot.files
    for path in files.find(f"{s3}/dvc"):
        if files.cat_file(path) == b"one for any-echo":
            files.pipe_file(path, b"two for any-echo")
    with pytest.raises(ReleaseError, match=r"nothing was installed: `engines/any-echo/model\.bin`"):
        pull.fetch(origin, "toy", None, None, tmp_path / "again")


def test_devices_read_by_http_what_a_publisher_writes_to_a_folder(web, tmp_path):
    folder, address = web
    root = workspace(tmp_path, {"storage": f"{address}/dvc"}, {"storage": str(folder / "dvc")})
    (folder / "dvc").mkdir()
    publish(root, "1.0.0", "one")
    origin = f"file://{tmp_path}/origin.git"
    assert pull.fetch(origin, "toy", None, None, tmp_path / "pulled").version == "1.0.0"
    assert manifest.load(tmp_path / "pulled").version == "1.0.0"
    dvc(tmp_path, "artifacts", "get", origin, "toy", "--rev", "v1.0.0", "-o", "got")
    assert (tmp_path / "got/engines/any-echo/model.bin").read_text() == "one for any-echo"
    for path in folder.rglob("*"):
        if path.is_file() and path.read_bytes() == b"one for any-echo":
            path.chmod(0o644)
            path.write_bytes(b"two for any-echo")
    with pytest.raises(ReleaseError, match=r"nothing was installed: `engines/any-echo/model\.bin`"):
        pull.fetch(origin, "toy", None, None, tmp_path / "again")

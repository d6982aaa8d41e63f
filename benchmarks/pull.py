"""How fast `exportyard-pull` is against curl, and how much memory it takes: 1 GiB from a web server on this machine.

    python -m benchmarks.pull [--gib 1] [--rounds 3] [--folder DIR]

curl writes the file and checks nothing; the pull checks every digest, waits until all is on the disk, and installs. The
server has the file in memory. The rounds alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PULLER = Path(__file__).parents[1] / "pipeline" / "puller.py"


class _Handler(BaseHTTPRequestHandler):
    """Static files by `sendfile`, as nginx does it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path.cwd() / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        size = path.stat().st_size
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with path.open("rb") as stream, contextlib.suppress(ConnectionError):
            self.connection.sendfile(stream, start)

    def log_message(self, *_: object) -> None:
        pass


def serve() -> None:
    """Serve the current folder, and print the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a server process."""
    command = [sys.executable, "-m", "benchmarks.pull", "--serve"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
        try:
            yield url
        finally:
            process.kill()


def registry(base: Path, size: int) -> Path:
    """A registry with one release whose engine has `size` random bytes; the path of that blob."""
    from pipeline import depots, layout, store
    from tests.releases import TARGETS, manifest_of, write_release

    folder = base / "release"
    write_release(folder, "1.0.0", "one")
    with (folder / "engines" / TARGETS[0] / "model.bin").open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(os.urandom(1 << 20))
    (folder / "manifest.json").unlink()
    made = manifest_of(store.describe(folder), "1.0.0")
    (folder / "manifest.json").write_text(made.text())
    place = base / "registry"
    place.mkdir()
    layout.lay_out(folder, depots.at(place))
    shutil.rmtree(folder)
    return place / layout.blob("toy", made.engines[TARGETS[0]].files[0].sha256)


def timed(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Seconds on the clock and of CPU, and the most resident memory in bytes, of a command that must succeed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--serve", action="store_true")
    given = parser.parse_args()
    if given.serve:
        serve()
    size = int(given.gib * (1 << 30))
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        base = Path(name)
        blob = registry(base, size)
        with serving(base / "registry") as url:
            address = f"{url}/{blob.relative_to(base / 'registry').as_posix()}"
            curl = ["curl", "--silent", "--fail", "--output", "file", address]
            pull = [sys.executable, "-I", str(PULLER), "toy", "--from", url, "--to", "here"]
            rows = [(timed(curl, base / "curl"), timed(pull, base / "pull")) for _ in range(given.rounds)]
    for one, other in rows:
        print(
            f"curl {one[0]:.2f} s ({one[1]:.2f} of CPU), pull {other[0]:.2f} s ({other[1]:.2f}): "
            f"{one[0] / other[0]:.2f} of curl's speed"
        )
    print(f"median: {statistics.median(one[0] / other[0] for one, other in rows):.2f} of curl's speed")
    curl_s, pull_s = (min(row[place][0] for row in rows) for place in (0, 1))
    print(f"fastest rounds: curl {curl_s:.2f} s, pull {pull_s:.2f} s: {curl_s / pull_s:.2f} of curl's speed")
    print(f"memory: {max(other[2] for _, other in rows) / 1e6:.0f} MB at most")


if __name__ == "__main__":
    main()

"""Static registries for tests: releases laid out in a folder, channels, signatures, and a web server that fails."""

import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline import depots, layout, manifest, trust
from tests.releases import write_release

PIECE = 16 << 10


def publish(registry: Path, release: Path, *, withdrawn: str | None = None) -> str:
    """Lay out the release in the folder `release`; its digest there."""
    registry.mkdir(parents=True, exist_ok=True)
    return layout.lay_out(release, depots.at(registry), withdrawn=withdrawn).digest


def release(folder: Path, version: str, content: str, recipe: str = "toy", *, key: Path | None = None) -> Path:
    """A release of two small engines, signed if there is a key."""
    write_release(folder, version, content, recipe, key=key)
    return folder


def sign(folder: Path, key: Path, **changes: Any) -> None:
    """Write ``signature.json`` in OpenSSF's form; `changes` replace keys of the statement's predicate."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    listed = [
        {"name": name, "algorithm": "sha256", "digest": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in names
        if name not in ("signature.json", "artifact.json")
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed)).hexdigest()
    statement = {
        "_type": trust.STATEMENT,
        "subject": [{"name": folder.name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": {"method": "files"}, "resources": listed} | changes,
    }
    (folder / "signature.json").write_text(trust.sign_bundle(statement, key))


def assign(registry: Path, channel: str, version: str, serial: int, key: Path | None = None, /, **changes: Any) -> None:
    """Let a channel of `toy` point to a version; `changes` replace keys of what is signed."""
    depot = depots.at(registry)
    found = layout.index(depot, "toy")
    entry = found.releases()[version]
    notes = {"dev.exportyard.channel": channel, "dev.exportyard.version": version, "dev.exportyard.serial": str(serial)}
    if key is not None:
        said = {"recipe": "toy", "channel": channel, "version": version, "serial": serial} | changes
        subject = {"name": "toy", "digest": {"sha256": entry["digest"].removeprefix("sha256:")}}
        statement = {
            "_type": trust.STATEMENT,
            "subject": [subject],
            "predicateType": "urn:exportyard:channel:v1",
            "predicate": said | {"assigned": "2026-01-01T00:00:00Z"},
        }
        notes["dev.exportyard.statement"] = layout.put_blob(depot, "toy", trust.sign_statement(statement, key))
    fresh = entry | {"annotations": notes}
    kept = tuple(one for one in found.entries if layout.notes(one).get("dev.exportyard.channel") != channel)
    layout.change(depot, "toy", lambda _: layout.Index("toy", (*kept, fresh)))


def blobs(registry: Path, release: Path, recipe: str = "toy") -> dict[str, Path]:
    """Where the registry has each file of a release."""
    content = manifest.parse((release / manifest.FILE).read_text(), str(release))
    found = {file.path: file.sha256 for file in content.files()}
    found[manifest.FILE] = hashlib.sha256((release / manifest.FILE).read_bytes()).hexdigest()
    return {name: registry / layout.blob(recipe, sha256) for name, sha256 in found.items()}


class Server(ThreadingHTTPServer):
    """A web server with Range and ETag over a folder, which fails as it is told to.

    Attributes:
        faults: how likely each answer is to fail, in some way that `random` chooses among `kinds`.
        script: what happens to the next answers, before chance decides; empty for one that is right.
        only: end of the paths that fail.
        failed: how many have failed.
        sent: bytes of bodies that were sent, by path.
        asked: the paths, in order, with their Range; `headers` the same.
        ranges: whether it can begin in the middle.
        slow: seconds before each piece of a body.
        stuck: from this request on there is no answer; 0 for never.
        elsewhere: another server, to which all are sent.
    """

    daemon_threads = True

    def __init__(self, root: Path, faults: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.faults, self.random = root, faults, random.Random(seed)
        self.sent: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.ranges, self.slow, self.failed, self.stuck = True, 0.0, 0, 0
        self.script: list[str] = []
        self.only = self.elsewhere = ""
        self.kinds = ("500", "503", "drop", "cut", "flip", "garbage", "short", "404", "reset")
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, name: str) -> str:
        """What goes wrong with the next answer; empty if nothing does."""
        if not name.endswith(self.only):
            return ""
        with self.lock:
            if self.script:
                found = self.script.pop(0)
            else:
                found = self.random.choice(self.kinds) if self.random.random() < self.faults else ""
            self.failed += bool(found)
            return found

    def number(self, most: int) -> int:
        """A random number from 0 to `most` - 1."""
        with self.lock:
            return self.random.randrange(max(most, 1))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no news."""


@contextlib.contextmanager
def serving(root: Path, faults: float = 0.0, seed: int = 0) -> Iterator[Server]:
    """A server while it is needed."""
    with Server(root, faults, seed) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name, span = self.path.lstrip("/"), self.headers.get("Range", "")
        with self.server.lock:
            self.server.asked.append((name, span))
            self.server.headers.append(dict(self.headers))
        while 0 < self.server.stuck <= len(self.server.asked):
            time.sleep(0.01)
        if self.server.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.server.elsewhere}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        fault = self.server.fault(name)
        path = self.server.root / name
        if fault in ("500", "503", "404") or not path.is_file():
            return self._refuse(int(fault) if fault.isdigit() else 404)
        if fault == "drop":
            self.close_connection = True
            return None
        data = path.read_bytes()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return None
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.server.ranges else 0
        if start and start >= len(data):
            return self._refuse(416)
        self._send(name, data, start, tag, fault)
        return None

    def _send(self, name: str, data: bytes, start: int, tag: str, fault: str) -> None:
        body = bytearray(data[start:])
        if fault == "flip" and body:
            body[self.server.number(len(body))] ^= 1 << self.server.number(8)
        if fault == "garbage":
            body = bytearray(b"<html>sign in to this network</html>")
        if fault == "short":
            body = body[: self.server.number(len(body))]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        self.end_headers()
        if fault in ("cut", "reset"):
            body = body[: self.server.number(len(body))]
            self.close_connection = True
        for place in range(0, len(body), PIECE):
            time.sleep(self.server.slow)
            self.wfile.write(body[place : place + PIECE])
        with self.server.lock:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def read_state(folder: Path) -> dict[str, Any]:
    """What is remembered of signed channels."""
    found: dict[str, Any] = json.loads(folder.with_name(f".{folder.name}.state.json").read_text())
    return found

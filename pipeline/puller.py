#!/usr/bin/env python3
"""exportyard-pull: get a release from a static registry, prove it, and install it whole or not at all.

One file on purpose: Python 3.9 or later with its standard library is all it needs, and it lies in every registry, so
that a device can fetch it from there. `exportyard pull` is the same code. It imports nothing of the rest of exportyard.

    <registry>/<recipe>/index.json              names: versions and channels, each with a digest
    <registry>/<recipe>/blobs/sha256/<hex>      everything else, by its digest

Beside the folder DIR that it installs, it keeps:

    .DIR.partial/       what has come so far; gone after a pull that succeeded
    .DIR.previous/      the version before, which `--back` brings back
    .DIR.state.json     what signed channels have said, so that nobody can turn them back
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import hmac
import json
import os
import platform
import queue
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TypeVar, Union

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Result = TypeVar("Result")
AGENT = "exportyard-pull/1"
PULLER, _FIRST_LINE = "exportyard-pull.py", b'#!/usr/bin/env python3\n"""exportyard-pull: '
MANIFEST, SIGNATURE, NOTE, GOLDEN = "manifest.json", "signature.json", "artifact.json", "golden.safetensors"
BESIDE = ("provenance.json", "sbom.json", SIGNATURE)  # of a release, beside the manifest and what it lists
RELEASE = "application/vnd.exportyard.release.v1"
LABEL = "dev.exportyard."
CHANNEL_PREDICATE = "urn:exportyard:channel:v1"
SIGNATURE_PREDICATE = "https://model_signing/signature/v1.0"
STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
DOCUMENT_BYTES = 16 << 20  # more is no index and no manifest
CHUNK, LEAST, BUFFERS = 1 << 20, 16 << 10, 4  # what is read at once, at most and at least; and how many such wait
AT_ONCE = 4  # files
KEY = "EXPORTYARD_KEY"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NUMBER = r"(0|[1-9][0-9]*)"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?")
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be better the next time
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


# --- errors --------------------------------------------------------------------------------------------------------


class PullError(Exception):
    """A pull that failed, and why; nothing was installed. `hint` says what to type or change."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(PullError):
    """A recipe, version, channel, target or option that doesn't exist."""

    exit_code = 2


class UnavailableError(PullError):
    """The registry can't be reached, or this device lacks what was asked for."""

    exit_code = 10


class ParityError(PullError):
    """An engine does not reproduce the golden vectors."""

    exit_code = 11


class ReleaseError(PullError):
    """The release is damaged, or can't be trusted."""

    exit_code = 12


class StoreError(PullError):
    """The folder can't be written."""

    exit_code = 13


class AbsentError(Exception):
    """The registry has no such file."""


class CutError(Exception):
    """A transfer has ended too early, or did not begin; it may be better the next time.

    Attributes:
        pause_s: how long the server wants to be left alone, if it said so.
    """

    def __init__(self, message: str, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class DamagedError(CutError):
    """Something came whole, and is not what it should be."""


class MissingError(ReleaseError):
    """The registry lacks what its index has led to, as when it was replaced in between."""


# --- what people see -----------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """Lines and a bar on stderr; the bar only on a terminal.

    Attributes:
        quiet: say nothing at all.
    """

    quiet: bool = False
    _said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: int = 0
    _total: int = 0
    _begun: float = 0.0
    _drawn: float = 0.0

    def say(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            with self._lock:
                print(f"\r\033[K{printable(text)}" if self._drawn else printable(text), file=sys.stderr, flush=True)
                self._drawn = 0.0

    def once(self, text: str) -> None:
        """One line, but not a second time."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def begin(self, total: int) -> None:
        """So many bytes are to come."""
        self._done, self._total, self._begun = 0, total, time.monotonic()

    def came(self, count: int) -> None:
        """So many more of them are there; fewer, if it is negative."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if not self.quiet and sys.stderr.isatty() and now - max(self._drawn, self._begun) > 0.2:
                self._drawn = now
                share, speed = self._done / max(self._total, 1), self._done / (now - self._begun)
                bar = "#" * int(24 * share)
                text = f"[{bar:<24}] {share:4.0%} of {size_text(self._total)}, {size_text(int(speed))}/s"
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._drawn:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
                self._drawn = 0.0


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor: it may come from a registry."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)


def size_text(number: int) -> str:
    """A size in bytes as people read it: ``91.2 MB``."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _unknown(what: str, name: str, choices: Iterable[str], where: str) -> UsageError:
    import difflib

    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = "there are " + ", ".join(f"`{one}`" for one in known[:12]) if known else f"there is no {what} yet"
    return UsageError(f"unknown {what} `{name}` in {where}", hint=f"did you mean `{close[0]}`?" if close else listed)


# --- where a registry is -------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """Bytes on their way; `start` is where in the file they begin, `tag` the server's word for the file's state."""

    body: Any  # has readinto and close
    start: int = 0
    tag: str = ""


@dataclass
class Options:
    """How patient to be: failures in a row, and seconds without a byte."""

    retries: int = 6
    timeout_s: float = 30.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0


class Folder:
    """A registry in a folder of this machine."""

    patient = False  # a file that is short stays so

    def __init__(self, place: str) -> None:
        self.name = place
        self._root = Path(place).expanduser()

    def open(self, name: str, start: int = 0, tag: str = "") -> Reply:  # noqa: ARG002  a folder is read anew
        """The file `name` from `start` on.

        Raises:
            AbsentError: there is none.
            CutError: it can't be read.
        """
        try:
            body = (self._root / name).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise AbsentError(name) from None
        except OSError as error:
            raise CutError(error.strerror or str(error)) from None
        body.seek(start)
        return Reply(body, start)


class Web:
    """A registry behind http or https. Proxies come from the environment; name and password may stand in the URL."""

    patient = True

    def __init__(self, place: str, options: Options) -> None:
        parts = urllib.parse.urlsplit(place)
        host = parts.netloc.rpartition("@")[2]
        self.name = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._root, self._options = self.name, options
        self._authorization = ""
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._authorization = "Basic " + base64.b64encode(pair.encode()).decode()
        self._opener = urllib.request.build_opener()

    def open(self, name: str, start: int = 0, tag: str = "") -> Reply:
        """The file `name`, from `start` on if the server can do that.

        Args:
            tag: of a copy that is here; the body is then empty if nothing has changed since.

        Raises:
            AbsentError: there is none.
            CutError: it did not come.
            UnavailableError: it will never come.
        """
        request = self._request(name, f"bytes={start}-" if start else "")
        if name.endswith("/index.json"):  # all else never changes
            request.add_header("Cache-Control", "no-cache")
        if tag:
            request.add_header("If-None-Match", tag)
        try:
            response = self._opener.open(request, timeout=self._options.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 304:
                    return Reply(None, tag=tag)
                if self._corrected(error):
                    return self.open(name, start, tag)
                raise self._refusal(name, error, start) from None
        except (OSError, HTTPException, ValueError) as error:
            raise self._failure(error) from None
        if start and response.status == 206:
            start = _range_start(response.headers.get("Content-Range", ""), start)
        elif response.status != 200:
            response.close()
            raise CutError(f"the server answers {response.status}")
        else:
            start = 0
        return Reply(response, start, response.headers.get("ETag", ""))

    def _request(self, name: str, span: str) -> urllib.request.Request:
        request = urllib.request.Request(f"{self._root}/{urllib.parse.quote(name)}")  # noqa: S310  http or https
        request.add_header("User-Agent", AGENT)
        if span:
            request.add_header("Range", span)
        if self._authorization:  # for this server, and not for one that it names
            request.add_unredirected_header("Authorization", self._authorization)
        return request

    def _corrected(self, error: urllib.error.HTTPError) -> bool:  # noqa: ARG002
        """Whether the server has said how to ask better, and it wasn't asked that way."""
        return False

    def _refusal(self, name: str, error: urllib.error.HTTPError, start: int) -> Exception:
        if error.code in (404, 410):
            return AbsentError(name)
        if error.code in _AGAIN:
            pause = error.headers.get("Retry-After", "")
            return CutError(f"the server answers {error.code}", float(pause) if pause.isdigit() else 0.0)
        if error.code == 416:
            return CutError(f"`{name}` ends at or before {start} bytes")
        return UnavailableError(
            f"`{self.name}` refuses `{name}`: {error.code} {error.reason}{self._why(error)}", hint=self._advice()
        )

    def _why(self, error: urllib.error.HTTPError) -> str:  # noqa: ARG002
        return ""

    def _advice(self) -> str:
        return "see the address; where it asks for them, name and password go before the host: https://NAME:WORD@HOST/"

    def _failure(self, error: Exception) -> Exception:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return UnavailableError(
                f"`{self.name}` can't show that it is what it says: {reason.verify_message}",
                hint="see the clock of this device; SSL_CERT_FILE names a file with other authorities",
            )
        if isinstance(error, (ValueError, UnicodeError)) and not isinstance(error, OSError):
            return UsageError(f"`{self.name}` is no address that can be asked: {error}", hint="give `--from URL`")
        if isinstance(reason, socket.timeout):
            return CutError(f"no answer within {self._options.timeout_s:g} s")
        return CutError(f"{type(reason).__name__}: {str(reason)[:200]}")


def _range_start(text: str, wanted: int) -> int:
    found = re.match(r"bytes (\d+)-", text)
    if found is None or int(found[1]) > wanted:
        raise CutError(f"the server sends another part than was asked for (`{text[:60]}`)")
    return int(found[1])


class Bucket(Web):
    """A registry in a bucket of S3 or of what speaks like it; keys from AWS_* variables, or anonymous without."""

    def __init__(self, place: str, options: Options) -> None:
        super().__init__(place, options)
        self._bucket, _, prefix = place[len("s3://") :].rstrip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._endpoint = (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "").rstrip("/")
        if self._endpoint and urllib.parse.urlsplit(self._endpoint).scheme not in ("http", "https"):
            raise UsageError(f"AWS_ENDPOINT_URL is `{self._endpoint}`", hint="expected http://HOST or https://HOST")

    def _request(self, name: str, span: str) -> urllib.request.Request:
        path = urllib.parse.quote(f"{self._prefix}{name}", safe="/-_.~")
        if self._endpoint:
            url = f"{self._endpoint}/{self._bucket}/{path}"
        elif "." in self._bucket:  # no certificate covers two labels
            url = f"https://s3.{self._region}.amazonaws.com/{self._bucket}/{path}"
        else:
            url = f"https://{self._bucket}.s3.{self._region}.amazonaws.com/{path}"
        request = urllib.request.Request(url)  # noqa: S310  http or https
        request.add_header("User-Agent", AGENT)
        headers = {"range": span} if span else {}
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if key and secret:
            now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            token = os.environ.get("AWS_SESSION_TOKEN", "")
            headers = signed(url, headers, key, secret, token, self._region, now)
        for header, value in headers.items():
            request.add_unredirected_header(header, value)
        return request

    def _corrected(self, error: urllib.error.HTTPError) -> bool:
        region = error.headers.get("x-amz-bucket-region", "")
        if error.code not in (301, 307, 400) or region in ("", self._region) or self._endpoint:
            return False
        self._region = region
        return True

    def _why(self, error: urllib.error.HTTPError) -> str:
        with contextlib.suppress(OSError, HTTPException):
            found = re.search(r"<Code>(\w+)</Code>", error.read(4096).decode(errors="replace"))
            return f" ({found[1]})" if found else ""
        return ""

    def _advice(self) -> str:
        return "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; S3 also refuses so what it hasn't got"


def signed(
    url: str, headers: Mapping[str, str], key: str, secret: str, token: str, region: str, now: str
) -> dict[str, str]:
    """`headers` of a GET without a body, and those that sign them: AWS Signature Version 4.

    Args:
        headers: names in lower case.
        now: as ``20130524T000000Z``.
    """
    parts = urllib.parse.urlsplit(url)
    empty = hashlib.sha256(b"").hexdigest()
    found = dict(headers) | {"host": parts.netloc, "x-amz-content-sha256": empty, "x-amz-date": now}
    if token:
        found["x-amz-security-token"] = token
    names = ";".join(sorted(found))
    lines = "".join(f"{name}:{found[name].strip()}\n" for name in sorted(found))
    canonical = f"GET\n{parts.path}\n{parts.query}\n{lines}\n{names}\n{empty}"
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    mac = f"AWS4{secret}".encode()
    for part in (*scope.split("/"), text):
        mac = hmac.new(mac, part.encode(), hashlib.sha256).digest()
    credential = f"AWS4-HMAC-SHA256 Credential={key}/{scope},SignedHeaders={names},Signature={mac.hex()}"
    del found["host"]  # urllib writes it
    return found | {"authorization": credential}


Source = Union[Folder, Web]  # noqa: UP007  read at run time, by Python 3.9 too


def source_of(place: str, options: Options) -> Source:
    """The registry at `place`: a URL, ``s3://bucket/prefix``, or a folder.

    Raises:
        UsageError: it is an address of another kind.
    """
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme in ("http", "https"):
        return Web(place, options)
    if scheme == "s3":
        return Bucket(place, options)
    if scheme == "file":
        return Folder(urllib.request.url2pathname(urllib.parse.urlsplit(place).path))
    if scheme:
        raise UsageError(f"can't pull from `{place}`", hint="give http(s)://HOST/PATH, s3://BUCKET/PATH or a folder")
    return Folder(place)


def is_registry(place: str, recipe: str, options: Options | None = None) -> bool:
    """Whether `place` is a static registry, with `recipe` or without it; a git repository is none.

    Raises:
        UnavailableError: it can't be reached.
    """
    if place.startswith("s3://"):
        return True
    if place.endswith(".git") or ("://" in place and not place.lower().startswith(("http://", "https://", "file://"))):
        return False
    if "://" not in place and not Path(place).expanduser().is_dir():
        return False
    options = options or Options()
    source = source_of(place, options)
    try:
        Registry(source, recipe, Talk(quiet=True), options).index()
        return True
    except (UsageError, ReleaseError):
        return _has_puller(source)


def _has_puller(source: Source) -> bool:
    """Whether this file is there, which every registry has."""
    try:
        reply = source.open(PULLER)
    except (AbsentError, CutError, PullError):
        return False
    if reply.body is None:
        return False
    with contextlib.closing(reply.body):
        return bool(reply.body.read(len(_FIRST_LINE)) == _FIRST_LINE)


# --- reading small documents ---------------------------------------------------------------------------------------


@dataclass
class Registry:
    """One recipe's part of a registry, whose every document is checked while it is read.

    Attributes:
        tag: the server's word for the state of the index that was read last, whose bytes are `text`.
        stop: set when what reads or waits is to end.
    """

    source: Source
    recipe: str
    talk: Talk
    options: Options = field(default_factory=Options)
    tag: str = ""
    text: bytes = b""
    stop: threading.Event = field(default_factory=threading.Event)

    def pause(self, failed: int, error: CutError) -> None:
        """Wait after so many failures in a row.

        Raises:
            KeyboardInterrupt: the pull is to end.
        """
        pause = min(self.options.first_pause_s * 2 ** (failed - 1), self.options.longest_pause_s)
        pause = max(pause, min(error.pause_s, 60.0))
        if failed > 2:
            self.talk.say(f"{error}; trying again in {pause:.1f} s")
        if self.stop.wait(pause):
            raise KeyboardInterrupt

    def index(self) -> dict[str, Any]:
        """``index.json`` as it is now.

        Raises:
            UsageError: the registry doesn't have the recipe.
            ReleaseError: what is there is no index.
        """
        name = f"{self.recipe}/index.json"

        def read() -> dict[str, Any]:
            reply = self.source.open(name, 0, self.tag)
            if reply.body is not None:
                self.text, self.tag = _whole(reply, name), reply.tag
            found = _parsed(self.text)
            if found is None or not isinstance(found.get("manifests"), list):
                self.tag = ""
                raise DamagedError(f"`{name}` in `{self.source.name}` is no index of releases")
            return found

        try:
            return _patiently(read, self)
        except AbsentError:
            raise UsageError(
                f"there is no `{self.recipe}` in the registry `{self.source.name}`",
                hint="see the name and the address: `<registry>/<recipe>/index.json` must be there",
            ) from None

    def blob(self, digest: str) -> bytes:
        """A small blob.

        Raises:
            ReleaseError: it isn't there, or has other bytes.
        """
        name = _blob_name(self.recipe, digest)

        def read() -> bytes:
            content = _whole(self.source.open(name), name)
            if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
                raise DamagedError(f"`{name}` in `{self.source.name}` has other bytes than its digest says")
            return content

        try:
            return _patiently(read, self)
        except AbsentError:
            raise _missing(self.source, name) from None

    def document(self, digest: str) -> dict[str, Any]:
        """A small blob that is a JSON object.

        Raises:
            ReleaseError: it isn't there, has other bytes, or is something else.
        """
        found = _parsed(self.blob(digest))
        if found is None:
            raise ReleaseError(f"{digest} in `{self.source.name}` is not JSON", hint="tell whoever keeps the registry")
        return found


def _blob_name(recipe: str, digest: str) -> str:
    found = _DIGEST.fullmatch(digest)
    if found is None:
        raise ReleaseError(f"the registry names a blob `{digest[:80]}`", hint="tell whoever keeps the registry")
    return f"{recipe}/blobs/sha256/{found[1]}"


def _missing(source: Source, name: str) -> MissingError:
    return MissingError(
        f"the registry `{source.name}` lacks `{name}`, nothing was installed",
        hint="whoever publishes can complete it with `exportyard mirror RECIPE`",
    )


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(reply: Reply, name: str) -> bytes:
    content = bytearray()
    with contextlib.closing(reply.body) as body:
        try:
            while piece := body.read(CHUNK):
                content += piece
                if len(content) > DOCUMENT_BYTES:
                    raise ReleaseError(f"`{name}` is too large to be what it should be", hint="see `--from`")
        except (OSError, HTTPException) as error:
            raise CutError(f"`{name}`: {type(error).__name__}: {str(error)[:200]}") from None
    return bytes(content)


def _patiently(read: Callable[[], Result], registry: Registry) -> Result:
    """What `read` returns, tried again after a `CutError`, for a while."""
    failed = 0
    while True:
        try:
            return read()
        except CutError as error:
            failed += 1
            # what came whole, and wrong, is seldom better the third time
            most = min(registry.options.retries, 2) if isinstance(error, DamagedError) else registry.options.retries
            if not registry.source.patient or failed > most:
                raise _gave_up(registry.source, error, failed) from None
            registry.pause(failed, error)


def _gave_up(source: Source, error: CutError, failed: int) -> PullError:
    if isinstance(error, DamagedError):
        return ReleaseError(f"{error}, nothing was installed", hint="tell whoever keeps the registry")
    if not source.patient:
        return ReleaseError(f"`{source.name}` is damaged: {error}", hint="tell whoever keeps the registry")
    return UnavailableError(
        f"`{source.name}` can't be read, {failed} times in a row: {error}",
        hint="what has come is kept: the same command goes on from there",
    )


# --- files on their way --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file of a release; `path` is relative to it, with `/`."""

    path: str
    sha256: str
    size: int


class Hasher:
    """sha256 of what is given to it, in a thread of its own, while the next piece is read and written."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._waiting: queue.Queue[tuple[bytearray, int] | None] = queue.Queue()
        self.free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(BUFFERS):
            self.free.put(bytearray(CHUNK))
        self._thread = threading.Thread(target=self._work, name=AGENT, daemon=True)
        self._thread.start()

    def add(self, buffer: bytearray, count: int) -> None:
        """The first `count` bytes of a buffer that came from `free`, to which it returns."""
        self._waiting.put((buffer, count))

    def end(self) -> str:
        """The digest of all, in hex."""
        self._waiting.put(None)
        self._thread.join()
        return self._sha.hexdigest()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            buffer, count = item
            self._sha.update(memoryview(buffer)[:count])
            self.free.put(buffer)


@dataclass
class Part:
    """A file that is being filled: `have` bytes of it are there, and given to `hasher`."""

    stream: BinaryIO
    hasher: Hasher
    have: int = 0

    def fill(self, body: Any, until: int, registry: Registry, *, write: bool = True) -> None:
        """Take bytes from `body` up to `until`, or to its end; without `write` they are in the file already.

        Raises:
            KeyboardInterrupt: the pull is to end.
        """
        piece = LEAST
        while self.have < until:
            if registry.stop.is_set():
                raise KeyboardInterrupt
            buffer = self.hasher.free.get()
            count, begun = 0, time.monotonic()
            try:
                count = body.readinto(memoryview(buffer)[: min(piece, until - self.have)])
                # what is cut off in the middle of a piece is lost: so a slow line gets small ones
                took = time.monotonic() - begun
                piece = min(2 * piece, CHUNK) if took < 0.05 else max(piece // 2, LEAST) if took > 0.5 else piece
                if write and count:
                    _write(self.stream, memoryview(buffer)[:count])
            finally:
                self.hasher.add(buffer, count)
            if not count:
                return
            self.have += count
            registry.talk.came(count)


def _write(stream: BinaryIO, content: memoryview) -> None:
    """All of it, or OSError: a raw file takes less where a disk is full."""
    try:
        while len(content):
            content = content[stream.write(content) :]
    except OSError as error:
        raise DiskError(error.errno, error.strerror) from error


class DiskError(OSError):
    """The disk's fault, and not the network's."""


def fetch(registry: Registry, file: File, folder: Path) -> None:
    """Put the blob of `file` into `folder`, under its digest; what is there of it already is not fetched again.

    Raises:
        ReleaseError: the registry lacks it, or has other bytes.
        UnavailableError: the registry can't be reached any more; what came is kept.
    """
    path, name = folder / file.sha256, _blob_name(registry.recipe, f"sha256:{file.sha256}")
    damaged = 0
    while True:
        kept = _receive(registry, file, path, name)
        if kept is None:
            return
        path.unlink()
        registry.talk.came(-file.size)
        # bytes that lay here, or that a network has changed, are worth another try; a folder that is damaged isn't
        damaged += 0 if kept else 1
        if damaged > (2 if registry.source.patient else 0):
            raise ReleaseError(
                f"`{name}` in `{registry.source.name}` has other bytes than its digest says, nothing was installed "
                f"(it is `{file.path}`)",
                hint="whoever publishes can repair it with `exportyard mirror RECIPE`",
            )


def _receive(registry: Registry, file: File, path: Path, name: str) -> int | None:
    """Fill `path`. None when its digest is right, else how much of it was here before."""
    failed = 0
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as stream:
        if os.fstat(stream.fileno()).st_size > file.size:
            stream.truncate(0)
        part = Part(stream, Hasher())
        try:
            part.fill(stream, file.size, registry, write=False)
            kept = part.have
            while part.have < file.size:
                before = part.have
                try:
                    _more(registry, name, part, file.size)
                except CutError as error:
                    failed = 1 if part.have > before else failed + 1
                    if not registry.source.patient or failed > registry.options.retries:
                        raise _gave_up(registry.source, error, failed) from None
                    registry.pause(failed, error)
                except AbsentError:
                    raise _missing(registry.source, name) from None
        finally:
            found = part.hasher.end()
        os.fsync(stream.fileno())
    return None if found == file.sha256 else kept


def _more(registry: Registry, name: str, part: Part, size: int) -> None:
    """What one request brings.

    Raises:
        CutError: not all that was missing.
    """
    reply = registry.source.open(name, part.have)
    with contextlib.closing(reply.body) as body:
        try:
            _skip(body, part.have - reply.start)
            part.fill(body, size, registry)
        except DiskError:
            raise
        except (OSError, HTTPException) as error:
            raise CutError(f"the connection was lost ({type(error).__name__})") from None
    if part.have < size:
        raise CutError(f"the transfer of `{name}` ended at {part.have} of {size} bytes")


def _skip(body: Any, count: int) -> None:
    """Read past what is here already, where a server can't begin in the middle."""
    buffer = bytearray(CHUNK)
    while count > 0:
        came = body.readinto(memoryview(buffer)[: min(CHUNK, count)])
        if not came:
            return
        count -= came


def fetch_all(registry: Registry, files: Sequence[File], folder: Path) -> None:
    """`fetch` of several files, some at a time; the first failure ends all.

    Raises:
        PullError, OSError: as `fetch`.
    """
    todo: queue.SimpleQueue[File] = queue.SimpleQueue()
    for file in {file.sha256: file for file in files}.values():
        todo.put(file)
    failures: list[BaseException] = []
    own = Registry(registry.source, registry.recipe, registry.talk, registry.options)  # with a `stop` of its own

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not own.stop.is_set():
                try:
                    fetch(own, todo.get_nowait(), folder)
                except (KeyboardInterrupt, PullError, OSError, MemoryError) as error:
                    failures.append(error)
                    own.stop.set()

    threads = [threading.Thread(target=work, name=AGENT, daemon=True) for _ in range(min(AT_ONCE, todo.qsize()))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        own.stop.set()
    if failures:
        raise failures[0]


# --- which release -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What to pull.

    Attributes:
        source: http(s)://, s3:// or a folder; empty only to bring back what was there before.
        version: without `v`; the newest if it is empty, and `channel` is, too.
        targets: names, and `auto`; all if there is none.
        backends: among the engines of which `auto` chooses; all if there is none.
        key: file with the public key that the release must be signed with.
        check: run the golden vectors before it is installed.
    """

    source: str
    recipe: str
    to: Path
    version: str = ""
    channel: str = ""
    targets: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    key: Path | None = None
    check: bool = False


@dataclass(frozen=True)
class Pulled:
    """A release that is in `folder` now, checked; `changed` is False when it was there already."""

    recipe: str
    version: str
    channel: str
    folder: Path
    targets: tuple[str, ...]
    size_bytes: int
    changed: bool
    signed: bool


def asked(text: str) -> tuple[str, str, str]:
    """Recipe, version and channel of ``RECIPE``, ``RECIPE@VERSION`` or ``RECIPE#CHANNEL``; two of them may be empty.

    Raises:
        UsageError: it is none of these.
    """
    recipe, sign, rest = re.fullmatch(r"([^@#]*)([@#]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    version = rest[1:] if sign == "@" and rest.startswith("v") else rest
    good = _NAME.fullmatch(recipe) and (not sign or (_VERSION if sign == "@" else _NAME).fullmatch(version))
    if not good:
        raise UsageError(f"`{text}` names no release", hint="`digits`, `digits@1.2.0` or `digits#prod`")
    return recipe, version if sign == "@" else "", version if sign == "#" else ""


def _rank(version: str) -> tuple[Any, ...]:
    """Orders versions by precedence: ``1.0.0-rc.2 < 1.0.0-rc.10 < 1.0.0``."""
    major, minor, patch, label = _VERSION.fullmatch(version).groups()  # type: ignore[union-attr]
    parts = [(not one.isdigit(), int(one) if one.isdigit() else 0, one) for one in (label or "").split(".") if one]
    return int(major), int(minor), int(patch), not label, parts


@dataclass(frozen=True)
class Entry:
    """What the index says of one release, or of the channel that leads to it."""

    digest: str
    version: str
    withdrawn: str
    statement: str = ""


def entries(index: Mapping[str, Any]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Releases by version, and channels by name; what is neither is left out."""
    releases: dict[str, Entry] = {}
    channels: dict[str, Entry] = {}
    for one in index["manifests"]:
        notes = one.get("annotations") if isinstance(one, dict) else None
        if not isinstance(notes, dict) or one.get("artifactType") != RELEASE:
            continue
        said = {name[len(LABEL) :]: str(value) for name, value in notes.items() if name.startswith(LABEL)}
        if _VERSION.fullmatch(said.get("version", "")) is None:
            continue
        entry = Entry(
            digest=str(one.get("digest")),
            version=said["version"],
            withdrawn=said.get("withdrawn", ""),
            statement=said.get("statement", ""),
        )
        if "channel" in said:
            channels[said["channel"]] = entry
        else:
            releases[entry.version] = entry
    return releases, channels


def choose(index: Mapping[str, Any], wish: Wish, where: str) -> Entry:
    """The release that is wished for; the newest is never a withdrawn one, and a pre-release only if all are.

    Raises:
        UsageError: there is no such version or channel.
        ReleaseError: all were withdrawn.
    """
    releases, channels = entries(index)
    if wish.channel:
        if wish.channel not in channels:
            raise _unknown("channel", wish.channel, channels, f"`{wish.recipe}` in `{where}`")
        return channels[wish.channel]
    if wish.version:
        if wish.version not in releases:
            raise _unknown("version", wish.version, releases, f"`{wish.recipe}` in `{where}`")
        return releases[wish.version]
    usable = [one for one in releases.values() if not one.withdrawn]
    final = [one for one in usable if "-" not in one.version] or usable
    if not final:
        what = "was withdrawn" if releases else "is missing: there is none yet"
        raise ReleaseError(f"every release of `{wish.recipe}` {what}", hint="name a version to get it all the same")
    return max(final, key=lambda one: _rank(one.version))


@dataclass(frozen=True)
class Release:
    """A release as the registry has it: its manifest, and the small files that go with it."""

    content: dict[str, Any]
    documents: dict[str, bytes]

    @property
    def version(self) -> str:
        """Without `v`."""
        return str(self.content["version"])


def describe(registry: Registry, entry: Entry) -> Release:
    """Read the manifest of a release, and what lies beside it.

    Raises:
        ReleaseError: it is not what the index says.
    """
    wrong = "the registry's documents of this release contradict each other"
    hint = "tell whoever keeps the registry"
    try:
        listed = registry.document(entry.digest)["manifests"]
        common = next(one for one in listed if one.get("annotations", {}).get(f"{LABEL}part") == "release")
        layers = registry.document(common["digest"])["layers"]
        digests = {one["annotations"]["org.opencontainers.image.title"]: str(one["digest"]) for one in layers}
        text = registry.blob(digests[MANIFEST])
        content = read_manifest(text, f"{registry.source.name}: {registry.recipe} v{entry.version}")
        beside = {name: registry.blob(digests[name]) for name in content.get("beside", ())}
    except (KeyError, TypeError, StopIteration, AttributeError):
        raise ReleaseError(f"{wrong}: `{entry.digest}` is no release", hint=hint) from None
    if (content["recipe"], content["version"]) != (registry.recipe, entry.version):
        raise ReleaseError(
            f"the registry gives `{content['recipe']}` v{content['version']} out as `{registry.recipe}` "
            f"v{entry.version}, nothing was installed",
            hint=hint,
        )
    return Release(content, {MANIFEST: text, **beside})


def read_manifest(text: bytes, where: str) -> dict[str, Any]:
    """``manifest.json``, as far as a device relies on it.

    Raises:
        ReleaseError: it isn't one, or is of a newer format.
    """
    content = _parsed(text)
    try:
        if content is None or content["format"] != 1:
            raise ValueError("it is of another format")
        if not isinstance(content["recipe"], str) or _VERSION.fullmatch(content["version"]) is None:
            raise ValueError("it has no version")
        files = [*_files(content), File(MANIFEST, "", 0), *(File(name, "", 0) for name in BESIDE)]
        paths = [file.path for file in files]
        if len(set(paths)) < len(paths):
            raise ValueError("it lists a file twice")
        if not set(content.get("beside", ())) <= set(BESIDE):
            raise ValueError("it knows of files beside it that this puller doesn't know")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(
            f"`{where}` is not a release manifest: {error}", hint="if a newer exportyard made it, get a newer puller"
        ) from None
    return content


def _files(content: Mapping[str, Any], targets: Iterable[str] | None = None) -> list[File]:
    """What the manifest lists: the golden vectors, and the engines of `targets` (all if it is None)."""
    engines = content["engines"]
    chosen = engines if targets is None else targets
    listed = [content["golden"]["file"], *(one for name in chosen for one in engines[name]["files"])]
    found = []
    for one in listed:
        path, sha256, size = str(one["path"]), str(one["sha256"]), int(one["size_bytes"])
        # a manifest may come from anywhere, and its paths are written to
        if any(part in ("", ".", "..") for part in path.split("/")) or set(path) & {"\\", "\0", "\n"}:
            raise ValueError(f"`{path}` is not a plain path")
        if re.fullmatch(r"[0-9a-f]{64}", sha256) is None or size < 0:
            raise ValueError(f"`{path}` has no digest")
        found.append(File(path, sha256, size))
    return found


def _document_files(documents: Mapping[str, bytes]) -> list[File]:
    return [File(name, hashlib.sha256(text).hexdigest(), len(text)) for name, text in documents.items()]


# --- trust ---------------------------------------------------------------------------------------------------------

_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_SPKI = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")  # how a public key on P-256 begins


def public_key(path: Path) -> tuple[int, int]:
    """The point of a public key on P-256, from its PEM file.

    Raises:
        UsageError: it can't be read, or is something else.
    """
    hint = "`exportyard keygen FILE` makes a pair; devices get FILE.pub"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UsageError(f"can't read the key `{path}`: {error.strerror}", hint=hint) from None
    if "PRIVATE KEY" in text:
        raise UsageError(f"`{path}` is a private key, which belongs on no device", hint=hint)
    found = re.search(r"-----BEGIN PUBLIC KEY-----(.*?)-----END PUBLIC KEY-----", text, re.DOTALL)
    try:
        raw = base64.b64decode("".join(found[1].split()), validate=True) if found else b""
    except binascii.Error:
        raw = b""
    x, y = int.from_bytes(raw[-64:-32], "big"), int.from_bytes(raw[-32:], "big")
    on_curve = x < _P and y < _P and (y * y - (x * x * x - 3 * x + _B)) % _P == 0
    if not raw.startswith(_SPKI) or len(raw) != len(_SPKI) + 64 or not on_curve:
        raise UsageError(f"`{path}` is no public key of the kind EC P-256, in PEM", hint=hint)
    return x, y


def _add(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    """The sum of two points of the curve; None is the point at infinity."""
    if one is None or other is None:
        return one or other
    (x1, y1), (x2, y2) = one, other
    if x1 == x2 and (y1 + y2) % _P == 0:
        return None
    slope = (3 * x1 * x1 - 3) * pow(2 * y1, -1, _P) if one == other else (y2 - y1) * pow(x2 - x1, -1, _P)
    x3 = (slope * slope - x1 - x2) % _P
    return x3, (slope * (x1 - x3) - y1) % _P


def _der_pair(signature: bytes) -> tuple[int, int] | None:
    """Both numbers of an ECDSA signature in DER."""
    found = re.fullmatch(rb"\x30(.)\x02([\x01-\x21])(.*)", signature, re.DOTALL)
    if found is None or found[1][0] != len(signature) - 2:
        return None
    first, rest = found[3][: found[2][0]], found[3][found[2][0] :]
    if rest[:1] != b"\x02" or len(rest) < 3 or rest[1] != len(rest) - 2 or rest[1] > 33:
        return None
    return int.from_bytes(first, "big"), int.from_bytes(rest[2:], "big")


def is_signed(key: tuple[int, int], message: bytes, signature: bytes) -> bool:
    """Whether `signature` (DER) is that of `message` by `key`: ECDSA on P-256 with SHA-256."""
    pair = _der_pair(signature)
    if pair is None or not all(0 < number < _N for number in pair):
        return False
    r, s = pair
    inverse = pow(s, -1, _N)
    u = int.from_bytes(hashlib.sha256(message).digest(), "big") * inverse % _N
    v = r * inverse % _N
    both, point = _add(_G, key), None
    for bit in range(255, -1, -1):
        point = _add(point, point)
        step = (u >> bit & 1, v >> bit & 1)
        if step != (0, 0):
            point = _add(point, {(1, 0): _G, (0, 1): key, (1, 1): both}[step])
    return point is not None and point[0] % _N == r


def opened(envelope: Mapping[str, Any], key: tuple[int, int], what: str) -> dict[str, Any]:
    """The in-toto statement in a DSSE envelope that `key` has signed; `what` it is, for messages.

    Raises:
        ReleaseError: it isn't signed by `key`, or is no statement.
    """
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind = str(envelope["payloadType"])
        signatures = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"]]
    except (KeyError, TypeError, ValueError):
        raise _distrust(what, "it is not a signature in DSSE's form") from None
    message = f"DSSEv1 {len(kind.encode())} {kind} {len(payload)} ".encode() + payload
    if kind != PAYLOAD or not any(is_signed(key, message, one) for one in signatures[:4]):
        raise _distrust(what, "the key that was given has not signed it")
    statement = _parsed(payload)
    if statement is None or statement.get("_type") != STATEMENT:
        raise _distrust(what, "what is signed is no statement that in-toto knows")
    return statement


def _distrust(what: str, why: str) -> ReleaseError:
    return ReleaseError(
        f"{what} can't be trusted, nothing was installed: {why}",
        hint="see that `--key` is the publisher's; if it is, somebody has changed what is in the registry",
    )


def check_signature(release: Release, key: tuple[int, int]) -> None:
    """Compare all that the manifest lists, and the manifest, with what was signed.

    Raises:
        ReleaseError: the release is not signed by `key`, or a file of it is not the one that was.
    """
    what = f"`{release.content['recipe']}` v{release.version}"
    if SIGNATURE not in release.documents:
        raise _distrust(what, "it is not signed")
    bundle = _parsed(release.documents[SIGNATURE]) or {}
    envelope = bundle.get("dsseEnvelope")
    statement = opened(envelope if isinstance(envelope, dict) else {}, key, what)
    found = _resources(statement, what)
    others = {name: text for name, text in release.documents.items() if name != SIGNATURE}
    for file in [*_document_files(others), *_files(release.content)]:
        if found.get(file.path) != file.sha256:
            raise _distrust(what, f"`{file.path}` is {'not' if file.path in found else 'no part of'} what was signed")


def _resources(statement: Mapping[str, Any], what: str) -> dict[str, str]:
    """Digest by path, of a signature in OpenSSF's form for models."""
    try:
        if statement["predicateType"] != SIGNATURE_PREDICATE:
            raise ValueError
        listed = statement["predicate"]["resources"]
        if any(one["algorithm"] != "sha256" for one in listed):
            raise ValueError
        root = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed)).hexdigest()
        if [one["digest"]["sha256"] for one in statement["subject"]] != [root]:
            raise ValueError
        return {str(one["name"]): str(one["digest"]) for one in listed}
    except (KeyError, TypeError, ValueError):
        raise _distrust(what, "what is signed is no list of a model's files") from None


def check_channel(statement: Mapping[str, Any], wish: Wish, entry: Entry) -> int:
    """Compare what the index says of a channel with what was signed; the assignment's serial number.

    Raises:
        ReleaseError: they differ.
    """
    what = f"channel `{wish.channel}` of `{wish.recipe}`"
    try:
        said = statement["predicate"]
        subjects = [(one["name"], "sha256:" + one["digest"]["sha256"]) for one in statement["subject"]]
        names = (statement["predicateType"], said["recipe"], said["channel"])
        version, serial = said["version"], said["serial"]
    except (KeyError, TypeError):
        raise _distrust(what, "what is signed is no assignment of a channel") from None
    if names != (CHANNEL_PREDICATE, wish.recipe, wish.channel):
        raise _distrust(what, "what is signed is about something else")
    if version != entry.version or subjects != [(wish.recipe, entry.digest)]:
        raise _distrust(what, f"the registry says v{entry.version}, and v{version} was signed")
    if not isinstance(serial, int) or isinstance(serial, bool) or serial < 0:
        raise _distrust(what, f"its serial number is {serial!r}")
    return serial


# --- this device ---------------------------------------------------------------------------------------------------


def unfit(row: Mapping[str, Any]) -> str | None:
    """Why an engine of this target row does not run on this device, or None if nothing speaks against it."""
    system = {"darwin": "macos"}.get(platform.system().lower(), platform.system().lower())
    if hasattr(sys, "getandroidapilevel"):
        system = "android"
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if row.get("platform") not in ("any", system):
        return f"it is for {row.get('platform')}, this device is {system}"
    if row.get("machine") not in ("any", machine):
        return f"it is for {row.get('machine')}, this device is {machine}"
    features = cpu_features()
    lacking = [one for one in row.get("requires", ()) if not features.intersection(one.split("|"))]
    if lacking:
        return f"this CPU lacks {', '.join(one.replace('|', ' or ') for one in lacking)}"
    return _no_accelerator(str(row.get("arch", "")))


def cpu_features() -> frozenset[str]:
    """CPU features by Linux's names; empty where the kernel doesn't tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _no_accelerator(arch: str) -> str | None:
    if re.fullmatch(r"sm\d+", arch):
        there = gpus()
        return (
            None if arch in there else f"it is for an NVIDIA GPU {arch}, here is {', '.join(sorted(there)) or 'none'}"
        )
    if arch == "gpu":
        return None if [*Path("/dev/dri").glob("renderD*")] else "it is for a GPU, and there is none in /dev/dri"
    if arch == "npu":
        return None if [*Path("/dev/accel").glob("accel*")] else "it is for an NPU, and there is none in /dev/accel"
    return None


def gpus() -> set[str]:
    """NVIDIA's GPUs here, by their architecture: ``sm90``."""
    with contextlib.suppress(OSError):
        if "Orin" in Path("/proc/device-tree/model").read_text(errors="replace"):
            return {"sm87"}
    program = shutil.which("nvidia-smi")
    if program is None:
        return set()
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return {"sm" + line.strip().replace(".", "") for line in said.splitlines() if line.strip()}
    return set()


def targets_of(content: Mapping[str, Any], wish: Wish, talk: Talk) -> tuple[str, ...]:
    """The targets that are wished for, `auto` resolved; all, if none is named.

    Raises:
        UsageError: the release knows no such target.
        ReleaseError: it has no engine for one of them.
        UnavailableError: none of its engines runs here.
    """
    engines, skipped = content["engines"], content.get("skipped", {})
    where = f"`{content['recipe']}` v{content['version']}"
    if not wish.targets:
        return tuple(engines)
    found = []
    for name in wish.targets:
        if name in engines:
            found.append(name)
        elif name == "auto":
            chosen, why = best(content, wish.backends)
            talk.say(f"{chosen}: {why}")
            found.append(chosen)
        elif name in skipped:
            listed = ", ".join(f"`{one}`" for one in engines)
            raise ReleaseError(f"{where} has no engine for `{name}`: {skipped[name]}", hint=f"it has: {listed}")
        else:
            raise _unknown("target", name, [*engines, "auto"], where)
    return tuple(dict.fromkeys(found))


def best(content: Mapping[str, Any], backends: Sequence[str] = ()) -> tuple[str, str]:
    """The target whose engine is the fastest of those that run here, and why it is that one.

    Raises:
        UnavailableError: none does.
    """
    against, runnable = {}, []
    for name, engine in sorted(content["engines"].items()):
        row = engine["target"]
        wanted = not backends or row.get("backend") in backends
        why = unfit(row) if wanted else f"it is for `{row.get('backend')}`"
        if why is None:
            runnable.append(name)
        else:
            against[name] = why
    if not runnable:
        reasons = "\n".join(f"  {name}: {why}" for name, why in [*against.items()][:6])
        raise UnavailableError(
            f"no engine of `{content['recipe']}` v{content['version']} runs on this device:\n{reasons}",
            hint="`--target T` gets one all the same",
        )
    chosen, why = _fastest({name: content["engines"][name] for name in runnable})
    others = f"; not {', '.join(f'{name} ({reason})' for name, reason in against.items())}" if against else ""
    return chosen, why + others


def _fastest(engines: Mapping[str, Any]) -> tuple[str, str]:
    if len(engines) == 1:
        return next(iter(engines)), "the only engine that runs here"
    times = {name: _times(engine) for name, engine in engines.items()}
    timed = {name: rows for name, rows in times.items() if rows}
    if not timed:
        return next(iter(engines)), f"the first of {len(engines)} that run here; none was measured"
    common = set.intersection(*(set(rows) for rows in timed.values()))
    # on one thread and at the smallest sizes, if there is a choice: the most common use of a device
    at = min(common, key=lambda row: (row[1], row[0]), default=None)
    if at is None:
        return next(iter(timed)), f"the first of {len(timed)} that run here; they were measured at different sizes"
    chosen = min(timed, key=lambda name: timed[name][at])
    sizes = ", ".join(f"{axis}={size}" for axis, size in at[0])
    return chosen, (
        f"the fastest of {len(engines)} that run here: {timed[chosen][at]:.3g} ms"
        f"{f' at {sizes}' if sizes else ''} on {at[1]} thread{'s' if at[1] != 1 else ''}"
    )


def _times(engine: Mapping[str, Any]) -> dict[tuple[tuple[tuple[str, int], ...], int], float]:
    """Median time in ms by axis sizes and number of threads."""
    found = {}
    for row in engine["latency"]["rows"]:
        found[tuple(sorted(row["sizes"].items())), int(row["threads"])] = float(row["engine"]["median_ms"])
    return found


# --- golden vectors ------------------------------------------------------------------------------------------------

_RUNTIMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def check_golden(folder: Path, content: Mapping[str, Any], targets: Iterable[str], talk: Talk) -> None:
    """Run the golden vectors through the engines in `folder`, as far as this device can run them.

    Raises:
        ParityError: an engine fails, or answers something else than the model.
        UnavailableError: no engine can be run here.
    """
    against = {name: _not_checked(content["engines"][name]) for name in targets}
    for name, why in against.items():
        if why is not None:
            talk.say(f"not checked: {name}: {why}")
            continue
        cases, worst = _compare(folder, content, name)
        talk.say(f"checked: {name} reproduces {cases} golden cases (largest difference {worst:.3g})")
    if against and None not in against.values():
        raise UnavailableError(
            "none of the engines can be checked on this device, nothing was installed: "
            + "; ".join(f"{name}: {why}" for name, why in [*against.items()][:4]),
            hint="leave out `--check`, or take a target that runs here (`--target auto`)",
        )


def _not_checked(engine: Mapping[str, Any]) -> str | None:
    import importlib.util

    row = engine["target"]
    if _model_file(engine["files"]) is None or row.get("backend") != "onnxruntime":
        return f"`--check` runs engines of ONNX Runtime, and this is one of `{row.get('backend')}`"
    for package in ("numpy", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"the package `{package}` is not installed (`pip install onnxruntime`)"
    return unfit(row)


def _model_file(files: Iterable[Mapping[str, Any]]) -> str | None:
    return next((one["path"] for one in files if one["path"].endswith(("/model.onnx", "/model.ort"))), None)


def _compare(folder: Path, content: Mapping[str, Any], target: str) -> tuple[int, float]:
    """How many cases were run, and the largest difference."""
    engine = content["engines"][target]
    axes = (engine.get("selector") or content["signature"])["axes"]
    tensors = read_safetensors(folder / content["golden"]["file"]["path"])
    sessions: dict[str, Any] = {}
    served, worst = 0, 0.0
    for case, sizes in content["golden"]["cases"].items():
        if any(not axes[axis]["min"] <= size <= axes[axis]["max"] for axis, size in sizes.items()):
            continue
        try:
            made = _run(folder, content, target, sizes, _named(tensors, f"{case}/in/"), sessions)
        except PullError:
            raise
        except Exception as error:  # a runtime's own exceptions share no class
            raise ParityError(
                f"`{target}` does not run on this device, nothing was installed: {' '.join(str(error).split())[:300]}",
                hint="see the version of onnxruntime against `tools` in the manifest",
            ) from None
        for name, wanted in _named(tensors, f"{case}/out/").items():
            worst = max(worst, _differ(made[name], wanted, engine["golden"][name], f"`{target}`, {case}: `{name}`"))
        served += 1
    return served, worst


def _named(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}


def _run(
    folder: Path,
    content: Mapping[str, Any],
    target: str,
    sizes: Mapping[str, int],
    feeds: Mapping[str, Any],
    sessions: dict[str, Any],
) -> dict[str, Any]:
    """The engine's outputs; where it has buckets, those of the first that is large enough, padded with zeros."""
    import numpy

    engine = content["engines"][target]
    files = [str(one["path"]) for one in engine["files"]]
    if engine.get("selector"):
        buckets = engine["selector"]["buckets"]
        bucket = next(one for one in buckets if all(sizes[axis] <= size for axis, size in one["sizes"].items()))
        files, feeds = bucket["files"], dict(feeds)
        for spec in content["signature"]["inputs"]:
            given = feeds[spec["name"]]
            whole = numpy.zeros([bucket["sizes"].get(dim, dim) for dim in spec["shape"]], given.dtype)
            whole[tuple(map(slice, given.shape))] = given
            feeds[spec["name"]] = whole
    path = next(name for name in files if name.endswith(("/model.onnx", "/model.ort")))
    session = sessions.get(path) or sessions.setdefault(path, _session(folder / path, engine["target"]))
    names = [spec["name"] for spec in content["signature"]["outputs"]]
    return dict(zip(names, session.run(names, dict(feeds))))  # noqa: B905  Python 3.9 has no `strict`


def _session(path: Path, row: Mapping[str, Any]) -> Any:
    import onnxruntime

    options, chosen = onnxruntime.SessionOptions(), row.get("options", {})
    options.log_severity_level = 3
    if chosen.get("optimization") == "all":  # it is laid out for its CPU already
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider = _RUNTIMES.get(chosen.get("provider", "cpu"))
    if provider is not None and provider not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"this onnxruntime has no {provider}, nothing was installed", hint="`pip install onnxruntime-gpu`"
        )
    providers = [provider] if provider else []
    return onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])


def _differ(made: Any, wanted: Any, bounds: Mapping[str, Any], where: str) -> float:
    """The largest difference, if it is within `bounds`."""
    import numpy

    made = made[tuple(map(slice, wanted.shape))]  # what a bucket has padded is cut off
    if made.shape != wanted.shape:
        raise ParityError(f"{where} has the shape {list(made.shape)}, expected {list(wanted.shape)}")
    strange = sorted(set(bounds) - {"max_abs", "argmax_agreement"})
    if strange:
        raise ParityError(f"{where}: this puller does not know the bound `{strange[0]}`", hint="get a newer one")
    with numpy.errstate(invalid="ignore"):  # infinities that are equal
        gap = numpy.where(made == wanted, 0.0, numpy.abs(made.astype("f8") - wanted.astype("f8")))
    largest, equal = float(gap.max(initial=0.0)), float((made == wanted).mean()) if made.size else 1.0
    if "max_abs" in bounds and not largest <= float(bounds["max_abs"]):
        what = f"differs by {largest:.3g}, allowed are {float(bounds['max_abs']):.3g}"
    elif "argmax_agreement" in bounds and equal < float(bounds["argmax_agreement"]):
        what = f"has {equal:.4f} equal, at least {float(bounds['argmax_agreement']):.4f} must be"
    else:
        return largest if "max_abs" in bounds else 0.0
    raise ParityError(f"{where} {what}; nothing was installed", hint="see the versions in the manifest's `tools`")


def read_safetensors(path: Path) -> dict[str, Any]:
    """All tensors of a file, as numpy arrays.

    Raises:
        ReleaseError: it is no such file, or has numbers that numpy hasn't got.
    """
    import numpy

    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = {}
    try:
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            kind = "?" if entry["dtype"] == "BOOL" else _DTYPES[entry["dtype"]]
            found[name] = numpy.frombuffer(raw[begin:end], kind).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"can't read the golden vectors `{path.name}`: {error!r}") from None
    return found


# --- the folder that is installed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The folder of a release, and what lies beside it (see the module)."""

    to: Path

    @property
    def partial(self) -> Path:
        """Blobs by digest; its lock lets in one pull at a time."""
        return self.to.with_name(f".{self.to.name}.partial")

    @property
    def previous(self) -> Path:
        """The version before."""
        return self.to.with_name(f".{self.to.name}.previous")

    @property
    def state(self) -> Path:
        """What signed channels have said."""
        return self.to.with_name(f".{self.to.name}.state.json")

    @property
    def tree(self) -> Path:
        """The next release, while it is put together; for an instant the old one."""
        return self.partial / "tree"

    @property
    def old(self) -> Path:
        """What was installed until now, on its way to `previous`."""
        return self.partial / "old"

    @property
    def intent(self) -> Path:
        """The digest of the manifest that is being installed."""
        return self.partial / "next"


def _place(to: Path) -> Place:
    path = Path(os.path.realpath(to))  # what a link leads to is replaced, and not the link
    if not path.name:
        raise UsageError(f"`{to}` can't be replaced", hint="pull into a folder below it")
    return Place(path)


@contextlib.contextmanager
def _alone(place: Place, talk: Talk) -> Iterator[None]:
    """Pulls into one folder queue. The lock is on a folder that is removed by who holds it, so nothing of it stays."""
    if fcntl is None:
        raise UnavailableError("this system has no locks that exportyard-pull knows", hint="use Linux or macOS")
    while True:
        place.partial.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(place.partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            talk.say(f"another pull into `{place.to}` is at work; waiting for its end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), place.partial.stat()):
                break
        os.close(descriptor)
    try:
        yield
        shutil.rmtree(place.partial)
    except OSError as error:
        if error.errno in _FULL:
            _make_room(place)
        raise
    finally:
        with contextlib.suppress(OSError):
            place.partial.rmdir()  # if nothing came
        os.close(descriptor)


def _make_room(place: Place) -> None:
    """Remove what has come: a full disk is not kept full."""
    with contextlib.suppress(OSError):
        _recover(place)
        for path in place.partial.iterdir():
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                path.unlink()


@contextlib.contextmanager
def _explained(place: Place) -> Iterator[None]:
    """Turn what the operating system refuses into a message."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            what = error.filename or place.to
            raise StoreError(
                f"can't write `{what}`: {error.strerror or error}; nothing was installed",
                hint="see that the folder is no mount point, and that it and the one above it can be written",
            ) from None
        raise StoreError(
            f"no space left for `{place.to}`; nothing was installed",
            hint="free some space (`df -h`), or pull elsewhere",
        ) from None


def _manifest_digest(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def _recover(place: Place) -> None:
    """Finish or undo what a pull was at when it was killed."""
    if place.tree.exists() and place.intent.exists():
        intended = place.intent.read_text()
        # the two folders have changed places already
        if intended == _manifest_digest(place.to) != _manifest_digest(place.tree) and not place.old.exists():
            place.tree.rename(place.old)
    if place.old.exists():
        if place.to.exists():
            _keep_old(place)
        else:
            place.old.rename(place.to)
    shutil.rmtree(place.tree, ignore_errors=True)


def _keep_old(place: Place) -> None:
    """What was installed becomes the previous version, unless it is the same one or damaged."""
    if _manifest_digest(place.old) == _manifest_digest(place.to) or _installed(place.old) is None:
        shutil.rmtree(place.old)
        return
    if place.previous.exists():
        shutil.rmtree(place.previous)
    place.old.rename(place.previous)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextlib.contextmanager
def _quiet_parent(place: Place) -> Iterator[None]:
    """`exportyard pull` from git locks the folder above while it installs."""
    descriptor = os.open(place.to.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(place: Place) -> None:
    """Put `tree` where `to` is, and what was there aside."""
    with _quiet_parent(place):
        _put(place.intent, _manifest_digest(place.tree).encode())
        if not place.to.exists() or not any(place.to.iterdir()):
            place.tree.rename(place.to)
            return
        if _exchange(place.tree, place.to):
            place.tree.rename(place.old)
        else:
            place.to.rename(place.old)
            place.tree.rename(place.to)
        _keep_old(place)


def _put(path: Path, content: bytes) -> None:
    """Write a small file, in one step."""
    side = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with side.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        side.replace(path)
    except OSError:
        side.unlink(missing_ok=True)
        raise


def _digest_of(path: Path) -> str:
    hashed, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hashed.update(memoryview(buffer)[:count])
    return hashed.hexdigest()


def fault(folder: Path, files: Iterable[File]) -> str | None:
    """What is wrong with the release in `folder`, which should have `files` and nothing else; None if nothing is."""
    known = {file.path: file for file in files}
    for strange in _strangers(folder, known):
        return f"`{strange}` is not part of the release"
    for file in known.values():
        path = folder / file.path
        if path.is_symlink() or not path.is_file():
            return f"`{file.path}` is missing"
        if path.stat().st_size != file.size:
            return f"`{file.path}` has {path.stat().st_size} bytes, expected {file.size}"
        if _digest_of(path) != file.sha256:
            return f"`{file.path}` has other bytes than the manifest says (sha256 differs)"
    return None


def _strangers(folder: Path, known: Iterable[str]) -> list[str]:
    there = {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_symlink() or not one.is_dir()}
    return sorted(there - set(known) - {NOTE})


def _installed(folder: Path) -> dict[str, Any] | None:
    """The manifest of the release in `folder`; None if there is none."""
    try:
        return read_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except (OSError, ReleaseError):
        return None


def _check_destination(place: Place, recipe: str) -> None:
    """Refuse a folder whose content a release must not replace.

    Raises:
        ReleaseError: it holds something else.
    """
    to, elsewhere = place.to, "pull into another folder with `--to DIR`"
    if to.exists() and not to.is_dir():
        raise ReleaseError(f"`{to}` is a file", hint=elsewhere)
    if not to.exists() or not any(to.iterdir()):
        return
    older = _installed(to)
    if older is None:
        if _is_damaged_release(to):
            return
        raise ReleaseError(f"`{to}` is not empty and holds no release of ours", hint=elsewhere)
    if older["recipe"] != recipe:
        raise ReleaseError(f"`{to}` holds a release of `{older['recipe']}`", hint=elsewhere)
    strange = _strangers(to, [MANIFEST, *BESIDE, *(file.path for file in _files(older))])
    if strange:
        raise ReleaseError(
            f"`{to / strange[0]}` is not part of the release there and would be lost", hint=f"move it, or {elsewhere}"
        )


def _is_damaged_release(folder: Path) -> bool:
    """Whether all that is wrong with the release in `folder` may be its manifest, as after a disk has failed."""
    others = [name for name in _strangers(folder, [MANIFEST, GOLDEN, *BESIDE]) if not name.startswith("engines/")]
    return (folder / MANIFEST).is_file() and (folder / GOLDEN).is_file() and not others


def _reuse(place: Place, files: Iterable[File]) -> set[str]:
    """Copy what versions that are here have in common with the new one; digests that need not be fetched."""
    have: dict[str, Path] = {}
    for folder in (place.previous, place.to):
        older = _installed(folder)
        have.update({file.sha256: folder / file.path for file in _files(older)} if older else {})
    found = set()
    for file in files:
        path = place.partial / file.sha256
        if file.sha256 in have and not path.exists():
            if _copied(have[file.sha256], path) == file.sha256:
                found.add(file.sha256)
            else:
                path.unlink(missing_ok=True)
    return found


def _copied(source: Path, path: Path) -> str:
    """Copy a file; the digest of what was copied, and no copy if it can't be read."""
    hashed = hashlib.sha256()
    try:
        reader = source.open("rb", buffering=0)
    except OSError:
        return ""
    with reader, path.open("wb", buffering=0) as writer:
        while piece := reader.read(CHUNK):
            hashed.update(piece)
            _write(writer, memoryview(piece))
        os.fsync(writer.fileno())
    return hashed.hexdigest()


def _fill(place: Place, files: Iterable[File], documents: Mapping[str, bytes]) -> None:
    """Put the next release together, of blobs that are all here."""
    place.tree.mkdir()
    there: dict[str, Path] = {}
    for file in files:
        path, blob = place.tree / file.path, place.partial / file.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.sha256 in there:
            shutil.copyfile(there[file.sha256], path)  # not a link: whoever edits one would edit both
            continue
        there[file.sha256] = path
        try:
            os.link(blob, path)
        except OSError:  # this file system has no links
            blob.replace(path)
    for name, text in documents.items():
        _put(place.tree / name, text)


# --- a pull --------------------------------------------------------------------------------------------------------


def pull(wish: Wish, talk: Talk | None = None, registry: Registry | None = None) -> Pulled:
    """Install what is wished for into `wish.to`, whole or not at all.

    Args:
        registry: one that was asked before; it remembers its index.

    Raises:
        PullError: in its five kinds; what was installed is as it was.
    """
    talk = talk or Talk()
    registry = registry or Registry(source_of(wish.source, Options()), wish.recipe, talk)
    place = _place(wish.to)
    key = public_key(wish.key) if wish.key is not None else None
    with _explained(place), _alone(place, talk):
        _recover(place)
        for _ in range(3):
            index = registry.index()
            text = registry.text
            try:
                return _pulled(registry, index, wish, place, key)
            except MissingError:
                registry.index()
                if registry.text == text:  # it wasn't replaced meanwhile
                    raise
        return _pulled(registry, registry.index(), wish, place, key)


def _pulled(
    registry: Registry, index: Mapping[str, Any], wish: Wish, place: Place, key: tuple[int, int] | None
) -> Pulled:
    talk = registry.talk
    entry = choose(index, wish, registry.source.name)
    if entry.withdrawn:
        talk.once(f"`{wish.recipe}` v{entry.version} was withdrawn: {entry.withdrawn}")
    release = _trusted(registry, wish, entry, place, key)
    targets = targets_of(release.content, wish, talk)
    blobs = _files(release.content, targets)
    files = [*blobs, *_document_files(release.documents)]
    size = sum(file.size for file in blobs)
    done = Pulled(
        wish.recipe, release.version, wish.channel, place.to, targets, size, changed=False, signed=key is not None
    )
    if place.to.is_dir() and fault(place.to, files) is None:
        if wish.check:
            check_golden(place.to, release.content, targets, talk)
        return done
    _check_destination(place, wish.recipe)
    have = _reuse(place, blobs)
    wanted = [file for file in blobs if file.sha256 not in have]
    _check_space(place, wanted)
    talk.begin(sum(file.size for file in wanted))
    try:
        fetch_all(registry, wanted, place.partial)
    finally:
        talk.end()
    try:
        _fill(place, blobs, release.documents)
        if wish.check:
            check_golden(place.tree, release.content, targets, talk)
    except BaseException:
        shutil.rmtree(place.tree, ignore_errors=True)
        raise
    _install(place)
    return dataclasses.replace(done, changed=True)


def _trusted(registry: Registry, wish: Wish, entry: Entry, place: Place, key: tuple[int, int] | None) -> Release:
    """The release, after its signatures were verified, if there is a key for that."""
    serial = None
    if key is not None and wish.channel:
        what = f"channel `{wish.channel}` of `{wish.recipe}`"
        if not entry.statement:
            raise _distrust(what, "it is not signed")
        serial = check_channel(opened(registry.document(entry.statement), key, what), wish, entry)
    release = describe(registry, entry)
    if key is None:
        signed = "has a signature, which was not checked (`--key FILE.pub` does)"
        there = SIGNATURE in release.documents
        registry.talk.once(f"`{wish.recipe}` {signed if there else 'is not signed'}: its digests were checked")
        return release
    check_signature(release, key)
    if serial is not None or not wish.version:
        _remember(place, wish, entry, serial)
    return release


def _remember(place: Place, wish: Wish, entry: Entry, serial: int | None) -> None:
    """Compare with what this folder was told before, and write it down.

    Args:
        serial: of the channel's assignment; None where the newest version is wished for.

    Raises:
        ReleaseError: this is older.
    """
    try:
        state = _parsed(place.state.read_bytes()) or {}
    except FileNotFoundError:
        state = {}
    name = f"{wish.recipe}#{wish.channel}" if wish.channel else wish.recipe
    before = state.get(name)
    before = before if isinstance(before, dict) else {}
    if serial is None:
        if before and _rank(entry.version) < _rank(str(before["version"])):
            raise ReleaseError(
                f"the newest `{wish.recipe}` was v{before['version']}, and the registry now says v{entry.version}; "
                "nothing was installed",
                hint=f"if that is meant, name it: `{wish.recipe}@{entry.version}`",
            )
    elif before and (serial, entry.digest) != (before["serial"], before["digest"]) and serial <= before["serial"]:
        raise ReleaseError(
            f"`{name}` was turned back, nothing was installed: assignment {before['serial']} (v{before['version']}) "
            f"was seen here, and the registry now gives {serial} (v{entry.version})",
            hint=f"`exportyard rollback` makes a new assignment; if the registry was made anew, delete `{place.state}`",
        )
    fresh = {"version": entry.version, "digest": entry.digest} | ({} if serial is None else {"serial": serial})
    if fresh != before:
        _put(place.state, json.dumps(state | {name: fresh}, indent=2, sort_keys=True).encode() + b"\n")


def _check_space(place: Place, wanted: Iterable[File]) -> None:
    missing = 0
    for file in wanted:
        path = place.partial / file.sha256
        missing += file.size - (min(file.size, path.stat().st_size) if path.exists() else 0)
    found = os.statvfs(place.partial)
    free = found.f_bavail * found.f_frsize
    if missing > free:
        raise StoreError(
            f"no space for `{place.to}`: {size_text(missing)} are needed, {size_text(free)} are free",
            hint="free some space (`df -h`), or pull elsewhere",
        )


def back(wish: Wish, talk: Talk | None = None) -> Pulled:
    """Let the version before and what is installed change places.

    Raises:
        ReleaseError: there is none, or it is damaged, or not signed by `wish.key`.
    """
    place = _place(wish.to)
    key = public_key(wish.key) if wish.key is not None else None
    with _explained(place), _alone(place, talk or Talk()):
        _recover(place)
        content = _installed(place.previous)
        if content is None or _installed(place.to) is None:
            raise ReleaseError(f"there is no version before the one in `{place.to}`", hint="pull one by its name")
        if wish.recipe and content["recipe"] != wish.recipe:
            raise ReleaseError(f"`{place.to}` holds `{content['recipe']}`, and not `{wish.recipe}`", hint="see `--to`")
        documents = {name: (place.previous / name).read_bytes() for name in (MANIFEST, *content.get("beside", ()))}
        targets = tuple(name for name in content["engines"] if _has(place.previous, content, name))
        files = _files(content, targets)
        wrong = fault(place.previous, [*files, *_document_files(documents)])
        if wrong is not None:
            raise ReleaseError(f"the version before is damaged, nothing was changed: {wrong}", hint="pull it again")
        if key is not None:
            check_signature(Release(content, documents), key)
        with _quiet_parent(place):
            if not _exchange(place.previous, place.to):
                place.to.rename(place.old)
                place.previous.rename(place.to)
                place.old.rename(place.previous)
    size = sum(file.size for file in files)
    return Pulled(content["recipe"], content["version"], "", place.to, targets, size, True, key is not None)


def _has(folder: Path, content: Mapping[str, Any], target: str) -> bool:
    return all((folder / one["path"]).is_file() for one in content["engines"][target]["files"])


def watch(
    wish: Wish, every_s: float, talk: Talk, tell: Callable[[Pulled], None], options: Options | None = None
) -> None:
    """`pull`, and again whenever the index changes, until it is interrupted; `tell` of each release that came.

    A failure is said, and what is installed stays; only the first pull may end it.

    Raises:
        PullError: the first pull failed for a reason that time does not mend.
    """
    options = options or Options(retries=2)
    registry = Registry(source_of(wish.source, options), wish.recipe, talk, options)
    done: bytes | None = None
    refused: bytes | None = None
    again, away = 0.0, ""
    while True:
        try:
            registry.index()
            if registry.text != done and (registry.text != refused or time.monotonic() > again):
                found = pull(wish, talk, registry)
                if found.changed or done is None:
                    tell(found)
                done = registry.text
            away = ""
        except UnavailableError as error:
            if away != error.message:  # once, and not each time
                talk.say(f"{error.message}; looking again every {every_s:g} s")
            away = error.message
        except PullError as error:
            if done is None:
                raise
            talk.once(f"error: {error.message}")
            # the same again may cost a download; what was wrong with it is seldom put right without a new index
            refused, again = registry.text, time.monotonic() + 10 * every_s
        time.sleep(every_s)


# --- the command line ----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exportyard-pull",
        description="Get a release from a static registry, check every byte, and install it whole or not at all.",
        epilog="Exit codes: 2 no such name, 10 out of reach, 11 golden vectors, 12 damaged or not trusted, 13 disk.",
    )
    add = parser.add_argument
    add("release", metavar="RECIPE[@VERSION|#CHANNEL]", nargs="?", help="the newest version if none is given")
    add("--from", dest="source", metavar="URL|DIR", help="http(s)://HOST/PATH, s3://BUCKET/PATH or a folder")
    add("--to", metavar="DIR", type=Path, required=True, help="the folder to install into")
    add("--target", "-t", metavar="T", action="append", default=[], help="engines to get; `auto`: the best for here")
    add("--backend", metavar="B", action="append", default=[], help="`auto` chooses among engines of B only")
    add("--key", metavar="FILE", type=Path, help=f"public key that must have signed it (default: {KEY})")
    add("--check", action="store_true", help="run the golden vectors before it is installed")
    add("--watch", action="store_true", help="go on, and update when the channel or the newest version moves")
    add("--every", metavar="S", type=float, default=60.0, help="seconds between two looks (default: 60)")
    add("--back", action="store_true", help="bring back the version that was installed before")
    add("--retries", metavar="N", type=int, default=Options.retries, help="failures in a row before giving up")
    add("--timeout", metavar="S", type=float, default=Options.timeout_s, help="seconds without a byte")
    add("--json", action="store_true", help="print JSON for a program to read")
    add("--quiet", "-q", action="store_true", help="print nothing but the result and errors")
    return parser


def wish_of(given: argparse.Namespace) -> Wish:
    """What the command line asks for.

    Raises:
        UsageError: options that exclude each other, or lack each other.
    """
    if given.back and (given.watch or given.check or given.target):
        raise UsageError("`--back` takes nothing but `--to` and `--key`", hint="leave out the other options")
    if not given.back and not (given.release and given.source):
        raise UsageError(
            "what to pull, and from where?", hint="`exportyard-pull RECIPE --from URL --to DIR`; `--help` lists more"
        )
    if given.backend and "auto" not in given.target:
        raise UsageError("`--backend` says among what `--target auto` chooses", hint="add `--target auto`")
    if not given.every > 0 or not given.timeout > 0 or given.retries < 0:
        raise UsageError("`--every` and `--timeout` are above 0, `--retries` is not below", hint="see `--help`")
    recipe, version, channel = asked(given.release) if given.release else ("", "", "")
    key = given.key or (Path(os.environ[KEY]) if os.environ.get(KEY) else None)
    return Wish(
        source=given.source or "",
        recipe=recipe,
        to=given.to,
        version=version,
        channel=channel,
        targets=tuple(given.target),
        backends=tuple(given.backend),
        key=key,
        check=given.check,
    )


def plain(pulled: Pulled) -> dict[str, Any]:
    """As JSON has it."""
    found = dataclasses.asdict(pulled) | {"folder": str(pulled.folder), "targets": list(pulled.targets)}
    return found | {"channel": pulled.channel or None}


def words(pulled: Pulled) -> str:
    """The result on one line."""
    name = f"{pulled.recipe}@v{pulled.version}{f' ({pulled.channel})' if pulled.channel else ''}"
    state = "" if pulled.changed else " was there already"
    verified = "signature and digests verified" if pulled.signed else "all verified"
    return f"{name} in {pulled.folder}{state}: {', '.join(pulled.targets)} ({size_text(pulled.size_bytes)}, {verified})"


def _work(given: argparse.Namespace) -> None:
    def tell(pulled: Pulled) -> None:
        print(json.dumps(plain(pulled)) if given.json else words(pulled), flush=True)

    wish, talk = wish_of(given), Talk(quiet=given.quiet)
    options = Options(retries=min(given.retries, 2) if given.watch else given.retries, timeout_s=given.timeout)
    if given.back:
        tell(back(wish, talk))
    elif given.watch:
        watch(wish, given.every, talk, tell, options)
    else:
        tell(pull(wish, talk, Registry(source_of(wish.source, options), wish.recipe, talk, options)))


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    with contextlib.suppress(ValueError):  # not in a thread
        signal.signal(signal.SIGTERM, _end)
    try:
        _work(_parser().parse_args(arguments))
    except PullError as error:
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        print(printable(f"error: {error.message}{hint}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: what has come is kept; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if os.environ.get("EXPORTYARD_DEBUG"):
            raise
        print(printable(f"error: a bug in exportyard-pull: {type(error).__name__}: {error}"), file=sys.stderr)
        print("\nhint: nothing was installed; EXPORTYARD_DEBUG=1 shows where it is", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

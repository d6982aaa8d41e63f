"""The exchange: how workers that share no disk hand each other files and artifacts, by content.

It is a folder of a remote, on any file system that fsspec knows: `exportyard/` in the workspace's default DVC remote.

    files/<ab>/<sha256>      bytes
    keys/<key>               where the artifact with this key is described: a sha256
    notes/<name>             JSON, written once

Nothing is changed once it is there, and nothing is believed: every byte is checked against its digest on the way in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import JsonValue, ValidationError

from pipeline import digest, places, store
from pipeline.errors import StoreError, UnavailableError, WorkspaceError, first_line
from pipeline.store import Key, Stored
from pipeline.types import Artifact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")
FOLDER = "exportyard"
PATIENCE_S = "EXPORTYARD_REMOTE_PATIENCE_S"
_PATIENCE_S = 120.0  # how long a remote may be away before that is an error
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_CHUNK = 1 << 20
# these show a file only when all of it is there; elsewhere it is written under another name first
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "memory"})

log = logging.getLogger("pipeline.exchange")


class AbsentError(StoreError):
    """The exchange doesn't hold what was asked for, or only damaged bytes of it."""


@dataclass(frozen=True)
class Exchange:
    """See the module.

    Attributes:
        root: its folder, as `files` names it.
        cache: a folder of this machine where what was fetched stays, for other runs.
        folder: of the remote, if it is one of this machine's.
    """

    files: AbstractFileSystem
    root: str
    cache: Path
    folder: Path | None = None

    # --- bytes -----------------------------------------------------------------------------------------------------

    def put_file(self, path: Path, sha256: str | None = None) -> str:
        """Hand over one file; its sha256, which may be known already. What is there isn't sent again.

        Raises:
            UnavailableError: the remote can't be reached or written.
        """
        found, size = sha256 or digest.of_file(path), path.stat().st_size
        place = self._file(found)
        if self._patiently(lambda: self._size(place)) != size:
            self._patiently(lambda: self._send(path, place))
        return found

    def fetch_file(self, sha256: str, path: Path) -> None:
        """Write the bytes with this sha256 to `path`, which must not exist; or nothing at all.

        Raises:
            AbsentError: they aren't there, or are damaged.
            UnavailableError: the remote can't be reached.
        """
        kept = self.cache / sha256
        if not kept.is_file() or digest.of_file(kept) != sha256:
            self._patiently(lambda: self._receive(sha256, kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(kept, path)
        except OSError:  # another file system
            shutil.copyfile(kept, path)

    def _receive(self, sha256: str, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        place, hashed = self._file(sha256), hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=".", suffix=".tmp") as fresh:
            try:
                with self.files.open(place, "rb") as stream:
                    while block := stream.read(_CHUNK):
                        hashed.update(block)
                        fresh.write(block)
            except FileNotFoundError:
                raise AbsentError(
                    f"the exchange `{self.root}` doesn't hold {sha256[:16]}",
                    hint="run the export again: what is missing is made and handed over again",
                ) from None
            if hashed.hexdigest() != sha256:
                self.files.rm_file(place)  # so that whoever has the right bytes puts them there again
                raise AbsentError(
                    f"`{place}` was damaged, and is removed", hint="run the export again: it is made again"
                )
            fresh.flush()
            Path(fresh.name).chmod(0o644)
            os.link(fresh.name, side := kept.with_name(f".{sha256}.{uuid.uuid4().hex}"))
            side.replace(kept)

    # --- artifacts -------------------------------------------------------------------------------------------------

    def put(self, stored: Stored) -> str:
        """Hand over an artifact: all its files, then its description, then its key. What `get` takes is returned.

        Raises:
            UnavailableError: the remote can't be reached or written.
        """
        for name, fact in stored.artifact.files.items():
            self.put_file(stored.file(name), fact.sha256)
        reference = self.put_file(stored.path / store.MANIFEST)
        self._write(f"keys/{stored.artifact.key}", reference)
        return reference

    def get(self, reference: str, folder: Path) -> Stored:
        """The artifact that `put` has named so, as `folder`; what was there is replaced whole.

        Raises:
            AbsentError: the exchange lacks some of it.
            UnavailableError: the remote can't be reached.
        """
        artifact = self.description(reference)
        if store.peek(folder) == artifact and store.damage(folder, artifact) is None:
            return Stored(folder, artifact)

        def fill(out: Path) -> None:
            lost: AbsentError | None = None
            wanted = {store.MANIFEST: reference} | {name: fact.sha256 for name, fact in artifact.files.items()}
            for name, sha256 in wanted.items():
                try:
                    self.fetch_file(sha256, out / name)
                except AbsentError as error:  # the others are tried, too, so that all that is damaged is removed now
                    lost = lost or error
            if lost is not None:
                raise lost

        return store.place(folder, fill)

    def reference(self, key: Key) -> str | None:
        """Of the artifact that `key` describes; None when nobody has handed it over."""
        return self._read(f"keys/{key.digest}")

    def description(self, reference: str) -> Artifact:
        """An artifact's description, without its files.

        Raises:
            AbsentError: it isn't there.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.fetch_file(reference, Path(folder) / store.MANIFEST)
            try:
                return Artifact.model_validate_json((Path(folder) / store.MANIFEST).read_text())
            except ValidationError as error:
                raise AbsentError(f"{reference[:16]} is no artifact's description: {first_line(error)}") from None

    # --- notes -----------------------------------------------------------------------------------------------------

    def leave(self, name: str, note: Mapping[str, JsonValue]) -> None:
        """Leave a note for whoever looks for `name`."""
        self._write(f"notes/{name}", store.json_text(note))

    def note(self, name: str) -> dict[str, Any] | None:
        """The note that somebody left, or None.

        Raises:
            StoreError: what is there is no note.
        """
        text = self._read(f"notes/{name}")
        if text is None:
            return None
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            raise StoreError(f"`{self.root}/notes/{name}` is damaged", hint="run the export again") from None
        return found

    # --- the file system -------------------------------------------------------------------------------------------

    def _file(self, sha256: str) -> str:
        return f"{self.root}/files/{sha256[:2]}/{sha256}"

    def _size(self, place: str) -> int | None:
        self.files.invalidate_cache()
        try:
            return int(self.files.info(place)["size"])
        except FileNotFoundError:
            return None

    def _send(self, path: Path, place: str) -> None:
        self.files.makedirs(place.rpartition("/")[0], exist_ok=True)
        if self._is_whole():
            self.files.put_file(str(path), place)
            return
        side = f"{place}.{uuid.uuid4().hex}"
        try:
            self.files.put_file(str(path), side)
            self.files.mv(side, place)
        except BaseException:
            if self.files.exists(side):
                self.files.rm_file(side)
            raise

    def _write(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as stream:
            stream.write(text)
            stream.flush()
            self._patiently(lambda: self._send(Path(stream.name), f"{self.root}/{name}"))

    def _read(self, name: str) -> str | None:
        def read() -> str | None:
            self.files.invalidate_cache()
            try:
                return bytes(self.files.cat_file(f"{self.root}/{name}")).decode()
            except FileNotFoundError:
                return None

        return self._patiently(read)

    def _is_whole(self) -> bool:
        return not _WHOLE.isdisjoint(places.protocols(self.files))

    def _patiently(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, tried again for a while when the remote is away."""
        limit = time.monotonic() + float(os.environ.get(PATIENCE_S, _PATIENCE_S))
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return self._tried(work)
            except StoreError:
                raise
            except Exception as error:  # every file system has failures of its own
                if time.monotonic() + pause > limit:
                    raise UnavailableError(
                        f"the remote `{self.root}` can't be used: {type(error).__name__}: {first_line(error)}",
                        hint="see whether it can be reached and written from here (`dvc push`), and run this again: "
                        "what is done stays done",
                    ) from error
                log.warning("the remote is away (%s), trying again in %.0f s", first_line(error), pause)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _tried(self, work: Callable[[], Result]) -> Result:
        """The result of `work`; a folder that is away is neither taken for an empty one nor made anew.

        Raises:
            FileNotFoundError: the remote is a folder that isn't there, as of a disk that is not mounted.
        """
        self._check_there()
        try:
            return work()
        finally:
            self._check_there()

    def _check_there(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder `{self.folder}`; mount it, or make it if the remote is new")


def of(root: Path) -> Exchange:
    """The exchange of the workspace at `root`: in its default DVC remote.

    Raises:
        WorkspaceError: there is no default remote, or it can't be written (http).
        UnavailableError: DVC, or its plug-in for that remote, is not installed.
    """
    files, place, is_folder = _remote(root)
    folder = Path(place) if is_folder else None
    return Exchange(files, f"{place.rstrip('/')}/{FOLDER}", root / ".scratch" / "exchange", folder)


def _remote(root: Path) -> tuple[AbstractFileSystem, str, bool]:
    """The default remote's file system, the place in it, and whether that is a folder of this machine."""
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
    except ImportError:
        raise UnavailableError("DVC is not installed", hint="`pip install dvc`, then run this again") from None
    try:
        with Repo(str(root)) as repo:
            remote = repo.cloud.get_remote()
            files, place = remote.fs.fs, str(remote.path)
    except (DvcException, ImportError) as error:
        raise WorkspaceError(
            f"`{root}` has no DVC remote through which workers can hand each other files: {first_line(error)}",
            hint="`dvc remote add -d storage s3://BUCKET/PATH` (or a folder that all see), and commit `.dvc/config`",
        ) from error
    if "http" in remote.fs.protocol:
        raise WorkspaceError(
            f"the DVC remote `{place}` can only be read", hint="make a remote that can be written the default one"
        )
    return files, place, remote.fs.protocol == "local"

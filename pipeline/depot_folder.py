"""A static registry in a folder, which a web server may serve."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline import digest
from pipeline.depot import LEFT, Change, Entry, check_readable, other_bytes
from pipeline.errors import UnavailableError

_LOCK, _SWEEP = ".lock", ".sweep"  # never removed, or two processes could each hold "the" lock


@dataclass(frozen=True)
class FolderDepot:
    """A registry in a folder, which must be there: a disk that isn't mounted is not taken for an empty one."""

    root: Path

    @property
    def name(self) -> str:
        """See `Depot`."""
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        """See `Depot`."""
        with self._explained():
            try:
                return (self.root / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See `Depot`."""
        found = {}
        with self._explained():
            for name in names:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found[name] = (self.root / name).stat().st_size
        return found

    def put(self, name: str, data: bytes) -> None:
        """See `Depot`."""
        with self._explained(), self._fresh(name) as path:
            path.write_bytes(data)

    def put_file(self, name: str, source: Path, sha256: str) -> None:
        """See `Depot`."""
        check_readable(source)
        with self._explained(), self._fresh(name) as path:
            # the system copies several times faster than a loop of ours writes, and what is hashed is what is there now
            shutil.copyfile(source, path)
            if digest.of_file(path) != sha256:
                raise other_bytes(source)

    def digest(self, name: str) -> str | None:
        """See `Depot`."""
        with self._explained():
            try:
                return digest.of_file(self.root / name)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def change(self, name: str, work: Change) -> None:
        """See `Depot`."""
        recipe = name.partition("/")[0]
        with self._locked(recipe, _LOCK, fcntl.LOCK_EX):
            made = work(self.read(name))
            if made is not None:
                self.put(name, made)

    def folders(self) -> list[str]:
        """See `Depot`."""
        with self._explained():
            return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def entries(self, folder: str) -> list[Entry]:
        """See `Depot`."""
        found, now = [], time.time()
        with self._explained():
            for path in (self.root / folder).iterdir() if (self.root / folder).is_dir() else ():
                with contextlib.suppress(FileNotFoundError):  # another process is at work, too
                    state = path.stat()
                    found.append(Entry(f"{folder}/{path.name}", state.st_size, now - state.st_mtime))
        return found

    def remove(self, names: Iterable[str]) -> None:
        """See `Depot`."""
        with self._explained():
            for name in names:
                (self.root / name).unlink(missing_ok=True)

    def sweeping(self, recipe: str) -> AbstractContextManager[None]:
        """See `Depot`."""
        return self._locked(recipe, _SWEEP, fcntl.LOCK_EX)

    def after_sweep(self, recipe: str) -> None:
        """See `Depot`."""
        with self._locked(recipe, _SWEEP, fcntl.LOCK_SH):
            pass

    @contextlib.contextmanager
    def _locked(self, recipe: str, name: str, how: int) -> Iterator[None]:
        with self._explained():
            (self.root / recipe).mkdir(exist_ok=True)
            # opened for writing, as network file systems want it
            lock = (self.root / recipe / name).open("ab")
        with lock:
            fcntl.flock(lock, how)
            yield

    @contextlib.contextmanager
    def _fresh(self, name: str) -> Iterator[Path]:
        """A path to write to, which takes its name when the context ends and all of it is on the disk."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, side = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:16]}.", suffix=LEFT)
        try:
            yield Path(side)
            os.fchmod(descriptor, 0o644)  # a web server is often another user
            os.fsync(descriptor)
            Path(side).replace(path)
        except BaseException:
            Path(side).unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        _sync(path.parent)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            if not self.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "no such folder", str(self.root))
            yield
        except OSError as error:
            away = not self.root.is_dir()
            hint = "mount it, or make it if the registry is new" if away else "see that it is writable and has space"
            what = (
                "there is no such folder"
                if away
                else f"{error.strerror or error} ({error.filename2 or error.filename or self.root})"
            )
            raise UnavailableError(f"the registry `{self.root}` can't be used: {what}", hint=hint) from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A place for a static registry, whatever it lies on. Every file in it appears whole or not at all.

Names of files are POSIX and relative to the registry. Several machines may write to one registry at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import ReleaseError

LEFT = ".tmp"  # how names of half-written files end
_BLOCK = 1 << 20

Change = Callable[[bytes | None], bytes | None]
"""A file's content in (None if it isn't there), its new content out; None leaves it as it is."""


@dataclass(frozen=True)
class Entry:
    """One file: its name in the registry, its size, and how long ago it was written."""

    name: str
    size_bytes: int
    age_s: float


class Depot(Protocol):
    """A place for a registry. Every method raises UnavailableError when it can't be reached, read or written."""

    @property
    def name(self) -> str:
        """What people call it: a path, or a URL."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if it isn't there."""
        ...

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """How large these files are; those that aren't there are left out."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a file, replacing what is there."""
        ...

    def put_file(self, name: str, source: Path, sha256: str) -> None:
        """Write a copy of `source`, replacing what is there.

        Raises:
            ReleaseError: `source` has another digest, or can't be read; nothing was written.
        """
        ...

    def digest(self, name: str) -> str | None:
        """The sha256 of a file's bytes, which are all read; None if it isn't there."""
        ...

    def change(self, name: str, work: Change) -> None:
        """Replace a file by what `work` makes of it; what others do to it at the same time is not lost.

        `work` may be called several times.
        """
        ...

    def folders(self) -> list[str]:
        """Names of the folders in the registry."""
        ...

    def entries(self, folder: str) -> list[Entry]:
        """All files directly in one folder."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Delete files; those that aren't there any more are no error."""
        ...

    def sweeping(self, recipe: str) -> AbstractContextManager[None]:
        """Inside, nobody else sweeps the files of this recipe."""
        ...

    def after_sweep(self, recipe: str) -> None:
        """Wait until nobody sweeps; a sweep that begins later sees all that was written before this call."""
        ...


def blocks(source: Path) -> Iterator[memoryview]:
    """The bytes of a release's file, block by block; a block is only good until the next one is asked for.

    Raises:
        ReleaseError: it can't be read.
    """
    block = memoryview(bytearray(_BLOCK))
    try:
        with source.open("rb", buffering=0) as reader:
            while count := reader.readinto(block):
                yield block[:count]
    except OSError as error:
        raise _unreadable(source, error) from error


def check_readable(source: Path) -> None:
    """Refuse a release's file that isn't there, or may not be read.

    Raises:
        ReleaseError: as said.
    """
    try:
        source.open("rb").close()
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Path, error: OSError) -> ReleaseError:
    return ReleaseError(f"can't read `{source}`: {error.strerror}", hint="get the release again with `exportyard pull`")


def other_bytes(source: Path) -> ReleaseError:
    """A file of a release is not what its manifest says."""
    return ReleaseError(
        f"`{source}` has other bytes than its manifest says, and was not put into the registry",
        hint="get the release again with `exportyard pull`",
    )

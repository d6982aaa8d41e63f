"""What a watcher knows: the files that it has taken in, and what it still has to tell the server, in order.

Lines of JSON in one file, each written at once and never changed, so that a watcher that is killed loses none and
goes on where it was. Losing the file is no harm: the server knows which checkpoints it was told about.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline import store, turns
from pipeline.errors import UsageError


@dataclass(frozen=True)
class Found:
    """A checkpoint that lies in the exchange.

    Attributes:
        file: its name, without folders; its ending says of what kind it is.
    """

    recipe: str
    sha256: str
    file: str

    @property
    def checkpoint(self) -> str:
        """What the flow `export` takes for a checkpoint in the exchange."""
        return f"sha256:{self.sha256}/{self.file}"

    @property
    def key(self) -> str:
        """What two reports of the same checkpoint have in common."""
        return f"{self.recipe}:{self.sha256}"


@dataclass
class Inbox:
    """See the module. Made by `opened`."""

    path: Path
    _files: set[tuple[str, str]] = field(default_factory=set)
    _found: dict[str, Found] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def has(self, name: str, stamp: str) -> bool:
        """Whether this file was taken in as it is now."""
        return (name, stamp) in self._files

    def take(self, name: str, stamp: str, found: Found) -> bool:
        """Remember a file; False when its content was known already."""
        fresh = found.key not in self._found
        self._write({"name": name, "stamp": stamp, **asdict(found)})
        self._files.add((name, stamp))
        self._found.setdefault(found.key, found)
        return fresh

    def waiting(self) -> list[Found]:
        """What the server was not told yet, in the order in which it came."""
        return [found for key, found in self._found.items() if key not in self._ended]

    def end(self, found: Found, what: str) -> None:
        """Remember what came of telling: a run, or the reason why there will be none."""
        self._write({"ended": found.key, "what": what})
        self._ended.add(found.key)

    def _write(self, line: dict[str, str]) -> None:
        with store.explaining(self.path), self.path.open("ab", buffering=0) as stream:
            stream.write(f"{json.dumps(line)}\n".encode())
            os.fsync(stream.fileno())

    def _read(self) -> None:
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # half a line, with which a machine has gone down
                continue
            if "ended" in entry:
                self._ended.add(entry["ended"])
            else:
                found = Found(entry["recipe"], entry["sha256"], entry["file"])
                self._files.add((entry["name"], entry["stamp"]))
                self._found.setdefault(found.key, found)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Inbox]:
    """The inbox in the file `path`, which is nobody else's meanwhile.

    Raises:
        UsageError: another watcher has it.
        StoreError: the file can't be written.
    """
    with turns.only_one(path.with_suffix(".lock"), _refuse):
        with store.explaining(path):
            path.touch()
        _end_line(path)
        inbox = Inbox(path)
        inbox._read()
        yield inbox


def _refuse() -> None:
    raise UsageError(
        "another watcher of this workspace watches there", hint="one is enough; stop it first (Ctrl-C, SIGTERM)"
    )


def _end_line(path: Path) -> None:
    """End the last line, if it was written half."""
    with path.open("rb+") as stream:
        if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")

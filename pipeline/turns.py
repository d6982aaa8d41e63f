"""Turns: what must not happen at the same time on one machine, kept apart by locks that end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import store


@contextlib.contextmanager
def only_one(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Inside, no other process holds `path`, a file that is made for this purpose; `waiting` is called if one does.

    Raises:
        StoreError: the file can't be made.
    """
    with store.explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_free(path: Path) -> bool:
    """Whether no process holds `path`, as `only_one` does."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def on_this_machine(*, alone: bool) -> Iterator[None]:
    """Among this user's processes: `alone`, to measure speed, or together with others that are not.

    Two engines that are measured at once measure each other, and so does one that is measured beside a build.
    """
    path = Path(tempfile.gettempdir()) / f"exportyard-{os.getuid()}.lock"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield

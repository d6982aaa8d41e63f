"""Work in processes of its own: that end with their parent, and with limits to what they may take."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, TypeVar

from pipeline import supervisor

Result = TypeVar("Result")
STDERR = 2
_PATIENCE_S = 15.0  # for a supervisor to end what it has started


@contextlib.contextmanager
def native_silence() -> Iterator[None]:
    """Inside, nothing that C++ code logs reaches the terminal."""
    kept = os.dup(STDERR)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), STDERR)
            yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)


def end_with_parent() -> None:
    """In a worker process: end as soon as the parent does, which `kill -9` gives no chance to say goodbye."""
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)  # the store takes what was half written for what a killed process left

        threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Spent:
    """What a piece of work took: on the clock, and the most memory that all its processes had at one time."""

    seconds: float
    peak_bytes: int


class EndedError(Exception):
    """Work that was ended, or that has ended itself without an answer.

    Args:
        why: ``time`` or ``memory``, which there was too much of; or ``died``.
        how: of what has died: ``SIGSEGV``, ``exit code 1`` ...
    """

    def __init__(self, why: str, how: str, spent: Spent) -> None:
        super().__init__(f"{why}: {how}" if how else why)
        self.why, self.how, self.spent = why, how, spent


def alone(
    work: Callable[..., Result],
    *arguments: object,
    log: Path,
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> tuple[Result, Spent]:
    """The result of `work`, done in a process of its own, and what that took.

    However it ends, and even if this process is killed, nothing that `work` has started lives on: neither what C code
    keeps busy, nor children, nor what they have put into sessions of their own.

    Args:
        work: a function at the top of a module.
        arguments: of `work`; they and the result are pickled.
        log: a file to which everything is appended that these processes print.
        seconds: the limit; starting Python and importing what `work` needs counts, too.
        memory_bytes: limit of the resident memory of all these processes together. It is looked at several times a
            second, and memory that they share counts for each of them.

    Raises:
        EndedError: it took too much, or died.
        Exception: whatever `work` raised.
    """
    with tempfile.TemporaryDirectory(prefix="exportyard-") as place:
        folder = Path(place)
        limits = {"path": [str(one) for one in sys.path], "seconds": seconds, "memory_bytes": memory_bytes}
        (folder / supervisor.LIMITS).write_text(json.dumps(limits))
        (folder / supervisor.TASK).write_bytes(pickle.dumps((work, arguments)))
        _supervised(folder, log)
        return _answer(folder)


def _supervised(folder: Path, log: Path) -> None:
    """Let a supervisor do the work in `folder`, to its end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            # by path: this Python need not find us, and -P keeps the names beside the file out of `sys.path`
            [sys.executable, "-P", supervisor.__file__, str(folder)],
            stdin=subprocess.PIPE,  # which ends with this process, however that ends
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on a terminal is for this process
        )
    assert process.stdin is not None
    try:
        process.wait()
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
        if not (folder / supervisor.END).is_file():  # somebody has killed the supervisor
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answer(folder: Path) -> tuple[Any, Spent]:
    """What a supervisor left in `folder`."""
    try:
        end = json.loads((folder / supervisor.END).read_text())
    except (OSError, ValueError):
        raise EndedError("died", "its supervisor was killed", Spent(0.0, 0)) from None
    spent = Spent(end.get("seconds", 0.0), end.get("peak_bytes", 0))
    if end["why"] in ("time", "memory"):
        raise EndedError(end["why"], "", spent)
    try:
        failed, value = pickle.loads((folder / supervisor.ANSWER).read_bytes())  # noqa: S301  by our own process, in a folder of its own
    except (OSError, EOFError, pickle.UnpicklingError):
        raise EndedError("died", _how(end["status"]), spent) from None
    if failed:
        raise value
    return value, spent


def _how(status: int | None) -> str:
    """A wait status in words."""
    if status is None:
        return "it can't be ended"
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"

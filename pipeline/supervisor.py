"""A process that does one piece of work in a child of its own, and ends that child with all its descendants.

It is started by path (see `processes.alone`), and needs only the standard library. It ends them when the work is done,
when it takes too much time or memory, and when the process that has started it is gone, however that happened.

The work's own folder has ``task`` (two values, pickled) and ``limits.json``; it gets ``answer`` (pickled) and
``end.json``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

LIMITS, TASK, ANSWER, END = "limits.json", "task", "answer", "end.json"
POLL_S, SOON_S = 0.2, 0.01
_LOAD = 20  # looking may take one part in so many of a core's time
_PATIENCE_S = 10.0  # for processes that were killed to be gone: one in a driver's hands may take its time
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Process(NamedTuple):
    """What there is to know of a process that lives."""

    parent: int
    group: int
    resident_bytes: int


def supervise(folder: Path) -> None:
    """Do the work in `folder` and write down how it ended: ``done``, ``time``, ``memory`` or ``parent``."""
    limits = json.loads((folder / LIMITS).read_text())
    signal.signal(signal.SIGTERM, _terminated)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # descendants whose own parent ends become ours, sessions of their own or not
    done, held = os.pipe()
    me, parent = os.getpid(), os.getppid()
    child = os.fork()
    if child == 0:
        os.close(done)
        _work(folder, limits["path"], me)
    os.close(held)  # now the child's end is the end of the pipe
    begun = time.monotonic()
    found: dict[str, object] = {"why": "parent"}
    try:
        why, peak = _watch(child, done, begun, limits)
        found = {"why": why, "peak_bytes": peak, "seconds": time.monotonic() - begun}
    finally:
        found["status"] = _end_all(child)
        if os.getppid() == parent:
            (folder / END).write_text(json.dumps(found))
        else:  # nobody is left to clear up
            shutil.rmtree(folder, ignore_errors=True)


def _watch(child: int, done: int, begun: float, limits: dict[str, float | None]) -> tuple[str, int]:
    """Wait for what comes first; why it was the end, and the most memory that all processes had together."""
    seconds, memory = limits["seconds"], limits["memory_bytes"]
    peak, pause, heard = 0, 0.0, [sys.stdin.fileno(), done]
    while True:
        ready, _, _ = select.select(heard, [], [], pause)
        if _ended(child):
            return "done", peak
        if sys.stdin.fileno() in ready:
            return "parent", peak
        if done in ready:  # the child is about to end, or a library has closed every file
            heard.remove(done)
        looked = time.monotonic()
        peak = max(peak, sum(one.resident_bytes for one in descendants().values()))
        if memory is not None and peak > memory:
            return "memory", peak
        if seconds is not None and looked - begun > seconds:
            return "time", peak
        pause = max(POLL_S if done in heard else SOON_S, _LOAD * (time.monotonic() - looked))


def _ended(child: int) -> bool:
    """Whether it has; its status is kept for `_end_all`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_all(child: int) -> int | None:
    """Kill whatever is below this process; the status of `child`, None if it was not to be had in time."""
    until, status = time.monotonic() + _PATIENCE_S, None
    while time.monotonic() < until:
        for pid in descendants():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while (one := os.waitpid(-1, os.WNOHANG))[0]:
                status = one[1] if one[0] == child else status
        except ChildProcessError:  # none is left
            break
        time.sleep(SOON_S)
    return status


def descendants() -> dict[int, Process]:
    """Every process that lives and was started, directly or not, by this one; and those of its group."""
    table, me = dict(_processes()), os.getpid()
    below: dict[int, list[int]] = {}
    for pid, one in table.items():
        below.setdefault(one.parent, []).append(pid)
    found, todo = {}, [me, *(pid for pid, one in table.items() if one.group == me)]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found[pid] = table.get(pid)
            todo += below.get(pid, [])
    return {pid: one for pid, one in found.items() if one is not None and pid != me}


def _processes() -> Iterator[tuple[int, Process]]:
    """Every process that this user may see, but for those that have ended."""
    if not os.path.isdir("/proc/self"):  # noqa: PTH112  no `Path` is made for each of many files here
        yield from _told_by_ps()
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                # the command, in parentheses, may have any character in it
                state, parent, group, *others = file.read().rpartition(b")")[2].split()
                if state != b"Z":
                    yield int(name), Process(int(parent), int(group), int(others[18]) * page)


def _told_by_ps() -> Iterator[tuple[int, Process]]:
    """As `_processes`, where there is no ``/proc``."""
    command = ["ps", "-A", "-o", "pid=,ppid=,pgid=,rss=,stat="]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, parent, group, kilobytes, state = line.split()[:5]
        if not state.startswith("Z"):
            yield int(pid), Process(int(parent), int(group), int(kilobytes) * 1024)


def _work(folder: Path, path: list[str], parent: int) -> NoReturn:
    """In the child: do the work and write down the answer."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:] = path
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # both are files
    faulthandler.enable()
    try:
        work, arguments = pickle.loads((folder / TASK).read_bytes())  # noqa: S301  by our own parent, in a folder of its own
        answer = False, work(*arguments)
    except BaseException as error:  # a library's `sys.exit()` is a failure, too
        traceback.print_exception(error.__cause__ or error)  # what is raised from it says the same in our words
        answer = True, error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    (folder / ANSWER).write_bytes(_pickled(answer))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _pickled(answer: tuple[bool, object]) -> bytes:
    """`answer`, or what it says where it is an exception that can't be sent."""
    try:
        found = pickle.dumps(answer)
        pickle.loads(found)  # noqa: S301
    except Exception:
        return pickle.dumps((True, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))

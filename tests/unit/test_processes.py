"""Work that is done in processes of its own: what comes back, and that nothing of it lives on."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import processes
from pipeline.errors import BuildError
from pipeline.processes import EndedError

HOUR = 3600
MB = 1_000_000


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def is_gone(pid, limit_s=5):
    """Whether a process ends within `limit_s`; one that only waits for its parent to take note has ended."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def read_pids(path, count, limit_s=20):
    """The process numbers that `family` writes, once there are `count`."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        found = path.read_text().split() if path.exists() else []
        if len(found) == count:
            return [int(one) for one in found]
        time.sleep(0.02)
    raise AssertionError(f"{found} are not {count}")


def note(path):
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")


def sleep_in_c():
    """Deaf to every signal that Python would handle, since C code holds the interpreter's lock."""
    ctypes.PyDLL(None).sleep(HOUR)


def family(path):
    """A child in a session of its own, whose own child has lost its parent, and this process, busy in C."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(path)
            sleep_in_c()
        os._exit(0)
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note(path)
        sleep_in_c()
    note(path)
    sleep_in_c()


def eat(megabytes):
    """In a child, since it is the sum that counts."""
    if os.fork() == 0:
        held = bytearray(b"x") * (megabytes * MB)
        time.sleep(HOUR)
        del held
    time.sleep(HOUR)


def refuse():
    raise BuildError("no", hint="yes")


def talk():
    print("from Python")
    os.system("echo from a child >&2")
    refuse()


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def raise_odd():
    raise OddError("can't be", "sent")


def test_result_and_error_come_back(log):
    found, spent = processes.alone(os.path.join, "a", "b", log=log)
    assert found == "a/b"
    assert 0 < spent.seconds < 20
    with pytest.raises(FileNotFoundError, match="nowhere"):
        processes.alone(os.stat, "/nowhere", log=log)


def test_our_errors_keep_their_hint_and_the_log_has_what_was_printed(log):
    log.write_text("earlier\n")
    with pytest.raises(BuildError, match="no") as raised:
        processes.alone(talk, log=log)
    assert raised.value.hint == "yes"
    lines = log.read_text().splitlines()
    assert lines[:3] == ["earlier", "from Python", "from a child"]
    assert "pipeline.errors.BuildError: no" in lines


def test_an_error_that_cannot_be_sent_is_told(log):
    with pytest.raises(RuntimeError, match="OddError: can't be sent"):
        processes.alone(raise_odd, log=log)
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        processes.alone(sys.exit, 3, log=log)


def test_what_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path, log):
    begun = time.monotonic()
    with pytest.raises(EndedError) as raised:
        processes.alone(family, tmp_path / "pids", log=log, seconds=1)
    assert raised.value.why == "time"
    assert 1 < raised.value.spent.seconds < 2
    assert time.monotonic() - begun < 4
    assert all(is_gone(pid, 0.1) for pid in read_pids(tmp_path / "pids", 3))


def test_memory_is_that_of_all_processes_together(log):
    with pytest.raises(EndedError) as raised:
        processes.alone(eat, 300, log=log, seconds=30, memory_bytes=200 * MB)
    assert raised.value.why == "memory"
    assert raised.value.spent.peak_bytes > 200 * MB
    _, spent = processes.alone(bytearray, 100 * MB, log=log, memory_bytes=1000 * MB)
    assert spent.seconds < 20


@pytest.mark.parametrize(("call", "how"), [((os._exit, 7), "exit code 7"), ((os.abort,), "SIGABRT")])
def test_a_process_that_dies_without_an_answer(log, call, how):
    with pytest.raises(EndedError) as raised:
        processes.alone(*call, log=log)
    assert (raised.value.why, raised.value.how) == ("died", how)


PARENT = """
import sys
from pathlib import Path
from pipeline import processes
from tests.unit.test_processes import family

processes.alone(family, Path(sys.argv[1]), log=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_nothing_outlives_the_parent(tmp_path, log, number):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT, str(tmp_path / "pids"), str(log)]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as parent:
        pids = read_pids(tmp_path / "pids", 3)
        supervisor = int(Path(f"/proc/{pids[-1]}/stat").read_text().rpartition(")")[2].split()[3])
        parent.send_signal(number)
        assert all(is_gone(pid) for pid in [*pids, supervisor])


def test_nothing_outlives_a_killed_supervisor_but_the_error_says_so(tmp_path, log):
    with pytest.raises(EndedError, match="its supervisor was killed"):
        processes.alone(kill_supervisor, tmp_path / "pids", log=log)
    assert all(is_gone(pid) for pid in read_pids(tmp_path / "pids", 2))


def kill_supervisor(path):
    """With a child in the same group, which the kernel doesn't end with the supervisor."""
    note(path)
    child = os.fork()
    if child == 0:
        note(path)
        time.sleep(HOUR)
    while len(Path(path).read_text().split()) < 2:
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(HOUR)

"""Turns between processes: one at a time, told when it has to wait, and free again when the other one dies."""

import subprocess
import sys
import threading
import time

import pytest

from pipeline import turns
from pipeline.errors import StoreError

HOLD = """
import sys, time
from pathlib import Path
from pipeline import turns
with turns.only_one(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_waits_until_the_first_is_gone_however_it_goes(tmp_path):
    path = tmp_path / "deep" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        waited = []
        ending = threading.Timer(0.5, other.kill)
        ending.start()
        begun = time.monotonic()
        with turns.only_one(path, lambda: waited.append(1)):
            assert time.monotonic() - begun > 0.3
        assert waited == [1]
    with turns.only_one(path, lambda: pytest.fail("nobody holds it")):
        pass


def test_a_lock_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't make"), turns.only_one(tmp_path / "file" / "lock", lambda: None):
        pass


def test_measuring_excludes_all_else_on_this_machine():
    inside, done = threading.Event(), threading.Event()

    def measure():
        with turns.on_this_machine(alone=True):
            inside.set()
            done.wait(5)

    with turns.on_this_machine(alone=False), turns.on_this_machine(alone=False):
        thread = threading.Thread(target=measure)
        thread.start()
        assert not inside.wait(0.3)
    assert inside.wait(5)
    done.set()
    thread.join()

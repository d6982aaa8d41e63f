"""Work that is done in a process of its own, and ended when it takes too long."""

import os
import time
from pathlib import Path

import pytest

from pipeline import processes
from pipeline.errors import BuildError


def test_result_and_error_come_back():
    assert processes.within(30, os.path.join, "a", "b") == "a/b"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        processes.within(30, os.stat, "/nowhere")


def refuse():
    raise BuildError("no", hint="yes")


def test_our_errors_keep_their_hint():
    with pytest.raises(BuildError, match="no") as raised:
        processes.within(30, refuse)
    assert raised.value.hint == "yes"


def sleep_and_write(path):
    time.sleep(3)
    Path(path).touch()


def test_what_takes_too_long_is_ended(tmp_path):
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        processes.within(1, sleep_and_write, str(tmp_path / "late"))
    assert time.monotonic() - begun < 2.9
    time.sleep(max(0, 3.5 - (time.monotonic() - begun)))
    assert not (tmp_path / "late").exists()


def test_a_process_that_dies_says_nothing():
    with pytest.raises(EOFError):
        processes.within(30, os._exit, 1)

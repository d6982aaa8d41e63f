"""Work in processes of its own: that end with their parent, and that can be ended when they take too long."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import TypeVar

Result = TypeVar("Result")
STDERR = 2


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


def within(seconds: float, work: Callable[..., Result], *arguments: object) -> Result:
    """The result of `work`, done in a process of its own, which is killed after `seconds`.

    Args:
        seconds: the limit; starting Python and importing what `work` needs counts, too.
        work: a function at the top of a module.
        arguments: of `work`; they and the result are pickled.

    Raises:
        TimeoutError: it took longer.
        EOFError: the process died, most likely out of memory.
        Exception: whatever `work` raised.
    """
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sending, work, arguments))
    child.start()
    sending.close()  # so that the end of the child is the end of the pipe
    try:
        if not receiving.poll(seconds):
            raise TimeoutError
        failed, value = receiving.recv()
    finally:
        child.kill()
        child.join()
        receiving.close()
    if failed:
        raise value
    result: Result = value
    return result


def _send(sending: Connection, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    end_with_parent()
    try:
        answer = False, work(*arguments)
    except Exception as error:
        answer = True, error
    sending.send(answer)

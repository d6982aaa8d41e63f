"""The process of the command line: what happens before a command is known, and after it has ended."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

# Tracing and converting make millions of small objects that live on; looking through them at Python's own pace takes
# a tenth of an export's time (`benchmarks/overhead.py`).
GARBAGE_THRESHOLDS = (200_000, 30, 30)


class Ending:
    """A handler that takes SIGTERM like Ctrl-C, and remembers which of them came."""

    def __init__(self) -> None:
        self.signal = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Stop what runs."""
        del frame
        self.signal = signal.Signals(number)
        raise KeyboardInterrupt


def main() -> None:
    """Entry point. Whatever happens, also while modules are imported, ends in a message and an exit code."""
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    ending = Ending()
    signal.signal(signal.SIGTERM, ending)
    # a shell can close both (`>&-`), and Python then has nothing in their place
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115  open as long as the process is
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    try:
        from pipeline import cli

        code = cli.invoke(sys.argv[1:])
    except KeyboardInterrupt:
        word = "terminated" if ending.signal == signal.SIGTERM else "interrupted"
        print(f"\n{word}: what was finished is kept; the same command goes on from there", file=sys.stderr)
        code = 128 + ending.signal
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End at once: Python would first free every module and tensor, which takes a second or two after an export."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `exportyard targets | head`
        pass
    except (OSError, ValueError) as error:  # a full disk, or user code has closed it
        print(f"error: can't write the output: {error}", file=sys.stderr)
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()

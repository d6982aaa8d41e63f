"""When each step was made and how long that took: a log beside the artifacts, which keep no clock themselves."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from pipeline import host, store
from pipeline.errors import StoreError
from pipeline.types import Frozen

FILE = ".logs/steps.jsonl"
_LOOSE = 4  # times as many lines as steps, and the log is written anew


class StepTime(Frozen):
    """One line of the log: a step that was made.

    Attributes:
        key: of the artifact (`store.Key`), by which one sees whether the line is about what lies there now.
        start: seconds since 1970, by the clock of the machine that made it.
        seconds: on the clock; of the step alone, without what it needed first.
        where: that machine, for people.
    """

    step: str
    key: str
    start: float
    seconds: float
    where: str


def here() -> str:
    """This machine, for people."""
    return f"{platform.node()} ({host.cpu_name()})"


def note(folder: Path, found: Iterable[StepTime]) -> None:
    """Add lines to the log of the recipe whose artifacts are in `folder`; several processes may do that at once.

    A log that can't be written is no reason to lose what was made.
    """
    text = "".join(f"{one.model_dump_json()}\n" for one in found)
    with contextlib.suppress(OSError):
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, text.encode())  # one call, so that lines of two processes don't mix
        finally:
            os.close(file)


def read(folder: Path, keys: Mapping[str, str]) -> list[StepTime]:
    """The newest line of each step whose artifact has the key in `keys`, by the time at which it began.

    A step without such a line was made elsewhere, or before there was this log.
    """
    found = {one.step: one for one in _lines(folder) if keys.get(one.step) == one.key}
    return sorted(found.values(), key=lambda one: (one.start, one.step))


def shorten(folder: Path) -> None:
    """Write the log anew, with one line a step, if it has become much longer than that; while nobody adds to it."""
    lines = _lines(folder)
    kept = {one.step: one for one in lines}
    if len(lines) > _LOOSE * len(kept):
        text = "".join(f"{one.model_dump_json()}\n" for one in kept.values())
        with contextlib.suppress(StoreError):
            store.write_whole(folder / FILE, text)


def _lines(folder: Path) -> list[StepTime]:
    try:
        text = (folder / FILE).read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValidationError):  # cut off by a full disk
            found.append(StepTime.model_validate_json(line))
    return found

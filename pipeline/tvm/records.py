"""Records of tuning: the schedule that was the fastest one for a workload on a kind of CPU.

They are kept in one JSON file a CPU, ``targets/tuning/<cpu>.json``: small, sorted, one line a workload, so that they
can be reviewed and merged like code, and shared between models, machines and people like it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.store import write_json
from pipeline.types import Frozen

CHOICES = "choices.json"  # of one model: what its build takes


class Record(Frozen):
    """What was found out about one workload.

    Attributes:
        choice: what the rule should take (see `tvm_schedules`).
        ms: of the nest with that choice, on one thread, in milliseconds.
        rule_ms: of the nest as the rule makes it by itself.
    """

    choice: tuple[int, ...]
    ms: float
    rule_ms: float


def read(path: Path) -> dict[str, Record]:
    """The records in a file, by workload; none where there is no file.

    Raises:
        UsageError: it isn't a file of records.
    """
    try:
        found = json.loads(path.read_text())
        return {name: Record.model_validate(fields) for name, fields in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise UsageError(
            f"`{path}` is not a file of tuning records: {str(error).splitlines()[0]}",
            hint="restore it with git, or delete it: it can be measured again",
        ) from None


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Replace the file, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(records[name].plain())}" for name in sorted(records)]
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n")
    part.replace(path)


def add(path: Path, name: str, record: Record) -> None:
    """One more record in the file, beside those that other processes add at the same time."""
    with _alone(path):
        write(path, {**read(path), name: record})


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_choices(path: Path, choices: Mapping[str, tuple[int, ...]]) -> None:
    """The choices that one model needs, without the times: the same choices make the same bytes."""
    write_json(path, {name: [*choice] for name, choice in choices.items()})


def read_choices(path: Path) -> dict[str, tuple[int, ...]]:
    """What `write_choices` wrote."""
    return {name: tuple(choice) for name, choice in json.loads(path.read_text()).items()}

"""Builders that may take only so much: each in processes of its own, with what it prints in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline import processes
from pipeline.errors import BuildError, LimitError
from pipeline.processes import EndedError, Spent
from pipeline.types import Limits, Target

Result = TypeVar("Result")
GB = 1e9
_TOLD = 40  # lines of a builder's log that a flow's run shows

log = logging.getLogger(__name__)


def of(target: Target, others: Limits | None) -> Limits | None:
    """What the row's builders may take: its own limits, and those of `others` that it doesn't have."""
    if target.limits is None or others is None:
        return target.limits or others
    return others.model_copy(update=target.limits.model_dump(exclude_none=True))


def kept(target: Target, limits: Limits, file: Path, work: Callable[..., Result], *arguments: object) -> Result:
    """The result of `work`, which builds for `target`; see `processes.alone`. `file` gets what it prints.

    Raises:
        LimitError: it took more than `limits` allow, or died.
        Exception: whatever `work` raised; a `BuildError` then names `file`.
    """
    seconds = None if limits.minutes is None else 60 * limits.minutes
    memory = None if limits.memory_gb is None else int(GB * limits.memory_gb)
    begun = file.stat().st_size
    try:
        found, spent = processes.alone(work, *arguments, log=file, seconds=seconds, memory_bytes=memory)
    except EndedError as error:
        raise _refused(target, limits, error, file) from None
    except BuildError as error:
        raise type(error)(f"{error.message} ({_where(file)})", hint=error.hint) from None
    finally:
        _tell(target, file, begun)
    _note(file, f"built in {_took(spent)}")
    return found


def _refused(target: Target, limits: Limits, error: EndedError, file: Path) -> LimitError:
    """What has become of a builder, in words; its log gets them, too."""
    if error.why == "time":
        told = f"ended after {limits.minutes:g} min, {_limit(target, 'minutes')}"
        hint = "raise it, or leave the target out; the log shows how far the builder was"
    elif error.why == "memory":
        told = f"ended at {error.spent.peak_bytes / GB:.1f} GB of memory, above {limits.memory_gb:g} GB, "
        told += _limit(target, "memory_gb")
        hint = "raise it, or leave the target out"
    else:
        told = f"the builder of `{target.name}` died ({error.how})"
        hint = "see its log; SIGKILL is mostly the system's way to get memory back"
    _note(file, f"{told}; {_took(error.spent)}")
    return LimitError(f"{told} ({_where(file)})", hint=hint)


def _limit(target: Target, name: str) -> str:
    own = target.limits is not None and getattr(target.limits, name) is not None
    return (
        f"the limit of `limits.{name}` in row `{target.name}`" if own else f"the limit of rows without `limits.{name}`"
    )


def _took(spent: Spent) -> str:
    return f"{spent.seconds:.1f} s, at most {spent.peak_bytes / GB:.2f} GB of memory"


def _where(file: Path) -> str:
    """The log's place in its workspace: the same on every host."""
    return f"log: `{Path(*file.parts[-4:])}`"


def _note(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(f"== {text}\n")


def _tell(target: Target, file: Path, begun: int) -> None:
    """Show the end of what a builder has printed in the run of a flow, which hears of what is logged here."""
    with file.open("rb") as stream:
        stream.seek(begun)
        lines = stream.read().decode(errors="replace").splitlines()
    if lines:
        log.info("%s: the last lines of its log\n%s", target.name, "\n".join(lines[-_TOLD:]))

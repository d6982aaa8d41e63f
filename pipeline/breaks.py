"""Why torch.export could not follow a model: the user's lines, the reason and a suggestion for each, in few words."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._logging._internal import DTRACE_ENV_VAR, LazyTraceHandler
from torch._logging.structured import INTERN_TABLE

from pipeline import program as programs
from pipeline import ranges
from pipeline.errors import CaptureError
from pipeline.types import Place, Recipe

_SHOWN = 3
_BRANCH = re.compile(r"\s*(if|elif|while|assert)\b|\bif\b.*\belse\b|.*:\s*$")
_LOOP = re.compile(r"\s*for\b|.*\brange\(")
_NUMBER = re.compile(r"\.item\(\)|\bint\(|\bfloat\(|\bbool\(|\.tolist\(\)|\[[^\]]*:[^\]]*\]")
_OPERATOR = re.compile(r"(?:operator|op(?:erator)?:?) [`']?(?:torch\.ops\.)?([a-z_]\w*(?:::|\.)\w+)")


@dataclass(frozen=True)
class Break:
    """One place that can't be followed: ``file:line: code``, why, and what to write instead."""

    where: str
    reason: str
    advice: str


@contextlib.contextmanager
def tidy_traces() -> Iterator[None]:
    """A draft export writes its trace into a folder of its own, and leaves it, open, when it is done: end both here."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get(DTRACE_ENV_VAR)
        os.environ[DTRACE_ENV_VAR] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[DTRACE_ENV_VAR]
            else:
                os.environ[DTRACE_ENV_VAR] = before
            for handler in gc.get_objects():
                if isinstance(handler, LazyTraceHandler) and handler.root_dir == folder:
                    handler.close()


def explain(
    recipe: Recipe, error: Exception, strict: Exception, draft: Callable[[], Any], symbols: dict[str, str]
) -> CaptureError:
    """The error for a model that could be traced neither way.

    Args:
        error: what the non-strict trace raised.
        strict: what the strict trace raised.
        draft: runs a draft export, which goes on after a break, and returns its report; it may raise.
        symbols: axis name for each symbol that torch's messages may have.
    """
    try:
        found = _from_report(draft(), recipe.root)
    except Exception:  # the draft only explains: without it, the first trace's own error does
        found = []
    if not found:
        found = [
            _from_error(error, recipe.root) or _from_error(strict, recipe.root) or Break("", _first(error), _advice(""))
        ]
    lines = [f"recipe `{recipe.name}`: torch.export can't follow the model ({_count(len(found))})"]
    for one in found[:_SHOWN]:
        lines += ([f"  at {one.where}"] if one.where else []) + [f"     {programs.in_axes(one.reason, symbols)}"]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    return CaptureError("\n".join(lines), hint="; ".join(dict.fromkeys(one.advice for one in found[:_SHOWN])))


def place(where: str, reason: str, root: Path) -> Place:
    """A graph break of torch.compile, in our words.

    Args:
        where: ``file:line: code``.
        reason: as torch tells it.
        root: of the workspace; the file is told relative to it.
    """
    file, _, rest = where.partition(":")
    shown = f"{programs.short_path(file, root)}:{rest}" if rest else where
    code = where.partition(": ")[2]
    if reason.startswith("generic_jump") or "ata-dependent" in reason:
        told, advice = _data_dependent(code)
    else:
        told, advice = reason.strip().splitlines()[0].rstrip("."), _advice(code + reason)
    return Place(line=shown, reason=told, advice=advice)


def _count(places: int) -> str:
    return "1 place" if places == 1 else f"{places} places"


def _from_report(report: Any, root: Path) -> list[Break]:
    """What a draft export had to work around, each place once, in the order of execution."""
    # torch writes each file name into its trace only once a process, so the report alone doesn't know all
    files = {number: name for name, number in INTERN_TABLE.items()} | report.str_to_filename
    found: dict[str, Break] = {}
    for failure in report.failures:
        kind = failure.failure_type.name
        if kind == "DATA_DEPENDENT_ERROR":
            frames = [
                traceback.FrameSummary(
                    files.get(frame["filename"], ""),
                    frame["line"],
                    frame["name"],
                    line=frame["loc"],
                )
                for frame in failure.data["user_stack"]
            ]
            where = ranges.user_line(frames, root) or ""
            reason, advice = _data_dependent(where.partition(": ")[2])
        elif "FAKE_KERNEL" in kind:
            operator = str(failure.data["op"])
            where, reason = "", f"operator `{operator}` does not say what shape it returns"
            advice = f'describe it with `@torch.library.register_fake("{operator}")`'
        else:
            continue
        found.setdefault(where or reason, Break(where, reason, advice))
    return list(found.values())


def _from_error(error: Exception, root: Path) -> Break | None:
    frames = list(traceback.extract_tb(error.__traceback__)) + list(getattr(error, "real_stack", None) or [])
    where = ranges.user_line(frames, root)
    if where is None:
        return None
    code = where.partition(": ")[2]
    if "ata-dependent" in str(error):
        return Break(where, *_data_dependent(code))
    return Break(where, _first(error), _advice(code + _first(error)))


def _data_dependent(code: str) -> tuple[str, str]:
    if _LOOP.match(code):
        return "how often the loop runs depends on a tensor's values", "loop a fixed number of times and mask the rest"
    if _NUMBER.search(code) and not _BRANCH.match(code):
        return (
            "a size or Python number is computed from a tensor's values",
            "keep it a tensor (`torch.where`, masks), or take sizes from `x.shape`",
        )
    return (
        "which way the code goes depends on a tensor's values",
        "compute both and choose with `torch.where`, or use `torch.cond`",
    )


def _advice(text: str) -> str:
    if "numpy" in text:
        return "stay in PyTorch: NumPy can't be traced; use the torch function of the same name"
    if "fake impl" in text or "register_fake" in text or "Meta" in text:
        return "describe the operator's output with `@torch.library.register_fake`"
    if "shape" in text or "size" in text:
        return "write sizes with `x.shape`, or make the axis static (min = opt = max) in recipe.toml"
    return "write that line with torch functions, or move it out of `forward`"


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""Every way exportyard can fail, with its exit code, on one page.

A message names the value at fault, what was expected, and ends in a ``hint:`` with what to type.
An error here means "the user can act on it"; anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExportyardError(Exception):
    """Root of the tree.

    Args:
        message: what is wrong, naming the file or value.
        hint: what to type or change next; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments don't survive the default pickling, and worker processes send errors back
        return (_restore, (type(self), self.message, self.hint))


def _restore(kind: type[ExportyardError], message: str, hint: str | None) -> ExportyardError:
    return kind(message, hint=hint)


class UsageError(ExportyardError):
    """A name or option that doesn't exist, or options that exclude each other."""

    exit_code = 2


class WorkspaceError(ExportyardError):
    """No workspace here, or its files can't be read."""

    exit_code = 3


class RecipeError(ExportyardError):
    """The recipe's file or its own code is at fault."""

    exit_code = 4


class CheckpointError(ExportyardError):
    """The checkpoint is missing, damaged, unsafe, or belongs to another model."""

    exit_code = 5


class DataError(ExportyardError):
    """Calibration or evaluation data can't be used."""

    exit_code = 6


class CaptureError(ExportyardError):
    """torch.export can't follow the model."""

    exit_code = 7


class ConversionError(ExportyardError):
    """The ONNX exporter, or a pass over the graph, failed."""

    exit_code = 8


class NotApplicable(ConversionError):  # noqa: N818  a fact about the model, not a fault
    """This form has no meaning for this model: no operator could be quantised, say, or one has no ONNX form at all."""


class BuildError(ExportyardError):
    """A backend could not make or load an engine."""

    exit_code = 9


class LimitError(BuildError):
    """A builder took more time or memory than it may and was ended, or it died."""


class UnavailableError(ExportyardError):
    """Not on this host: a package, compiler or device is missing."""

    exit_code = 10


class ParityError(ExportyardError):
    """An engine is not the model that it was built from."""

    exit_code = 11


class ReleaseError(ExportyardError):
    """The release can't be made, found or trusted."""

    exit_code = 12


class StoreError(ExportyardError):
    """Artifacts can't be written or are damaged."""

    exit_code = 13


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; empty when it has none, or can't be told."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a user's exception whose own __str__ fails
        return ""
    return lines[0][:200] if lines else ""


def last_line(error: BaseException) -> str:
    """The end of an exception's message, where libraries that print their own traces put the cause; 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else "no message"
    return text[:300] if type(error).__name__ in text else f"{type(error).__name__}: {text}"[:300]


def root_line(error: BaseException) -> str:
    """The first line of what an exception began with: compilers wrap each other's failures; 300 characters."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    known = list(choices)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if found:
        return found[0]
    return next((choice for choice in known if name and (name in choice or choice in name)), None)


def unknown(what: str, name: str, choices: Iterable[str], *, where: str = "") -> UsageError:
    """The error for a misspelt name: names the nearest choice, or lists them all when none is near."""
    known = sorted(choices)
    close = nearest(name, known)
    place = f" in {where}" if where else ""
    if close is not None:
        hint = f"did you mean `{close}`?"
    elif known:
        hint = "known: " + ", ".join(f"`{choice}`" for choice in known)
    else:
        hint = f"there is no {what} yet"
    return UsageError(f"unknown {what} `{name}`{place}", hint=hint)

"""`exportyard pull` from a static registry: the program for devices, `pipeline.puller`, in our own words for errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import errors, puller
from pipeline.puller import Pulled, Talk, Wish

EVERY_S = 60.0
_KINDS: dict[int, type[errors.ExportyardError]] = {
    kind.exit_code: kind
    for kind in (
        errors.UsageError,
        errors.UnavailableError,
        errors.ParityError,
        errors.ReleaseError,
        errors.StoreError,
    )
}


def wish(
    source: str,
    release: str,
    to: Path,
    targets: list[str] | None = None,
    backends: list[str] | None = None,
    key: Path | None = None,
    *,
    check: bool = False,
) -> Wish:
    """What a user asks for; `release` is ``RECIPE``, ``RECIPE@VERSION`` or ``RECIPE#CHANNEL``.

    Raises:
        UsageError: it is none of these.
    """
    if backends and "auto" not in (targets or ()):
        raise errors.UsageError("`--backend` says among what `--target auto` chooses", hint="add `--target auto`")
    with explained():
        name, version, channel = puller.asked(release)
    return Wish(source, name, to, version, channel, tuple(targets or ()), tuple(backends or ()), key, check)


def is_registry(wanted: Wish) -> bool:
    """Whether the source is a static registry; else it is for git.

    Raises:
        UnavailableError: it can't be reached.
    """
    with explained():
        return puller.is_registry(wanted.source, wanted.recipe)


def pull(wanted: Wish) -> Pulled:
    """As `puller.pull`."""
    with explained():
        return puller.pull(wanted)


def back(wanted: Wish) -> Pulled:
    """As `puller.back`."""
    with explained():
        return puller.back(wanted)


def watch(wanted: Wish, every_s: float, tell: Callable[[Pulled], None]) -> None:
    """As `puller.watch`."""
    with explained():
        puller.watch(wanted, every_s, Talk(), tell)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """The puller's errors as ours, which have the same names: it is one file and can't import them."""
    try:
        yield
    except puller.PullError as error:
        kind = _KINDS[error.exit_code]
        raise kind(error.message, hint=error.hint) from error

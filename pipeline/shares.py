"""What of an engine's time goes where: the rows of a profile, added up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.types import Profile, ProfileRow

NOT_ATTRIBUTED = "not attributed"
ITSELF = "the model itself"


@dataclass(frozen=True)
class Share:
    """A part of the operators' time.

    Attributes:
        name: of what it is of.
        ms: of one call.
        share: of all operators' time, 0 to 1.
        operators: how many of the engine's operators it is.
    """

    name: str
    ms: float
    share: float
    operators: int


def by_module(profile: Profile, depth: int | None = None) -> list[Share]:
    """Time by PyTorch module, most first; what belongs to no module that is known is a line of its own, at the end.

    Args:
        profile: to add up.
        depth: of the modules told: 1 is ``encoder``, 2 ``encoder.layer``; None is the innermost ones.
    """
    found = _added(profile, lambda row: module_of(row, depth))
    return sorted(found, key=lambda one: (one.name == NOT_ATTRIBUTED, -one.ms))


def by_operator(profile: Profile) -> list[Share]:
    """Time by kind of operator, most first."""
    return sorted(_added(profile, lambda row: row.operator), key=lambda one: -one.ms)


def slowest(profile: Profile, count: int) -> list[tuple[ProfileRow, float]]:
    """The operators that take most of the time, each with its share of all."""
    total = profile.operators_ms or 1
    rows = sorted(profile.rows, key=lambda row: -row.ms)
    return [(row, row.ms / total) for row in rows[:count]]


def module_of(row: ProfileRow, depth: int | None = None) -> str:
    """The module of an operator, or what stands for it where there is none."""
    if not row.node:
        return NOT_ATTRIBUTED
    return ".".join(row.module.split(".")[:depth]) or ITSELF


def _added(profile: Profile, name_of: Callable[[ProfileRow], str]) -> list[Share]:
    total = profile.operators_ms or 1
    parts: dict[str, list[float]] = {}
    for row in profile.rows:
        parts.setdefault(name_of(row), []).append(row.ms)
    return [Share(name, sum(ms), sum(ms) / total, len(ms)) for name, ms in parts.items()]

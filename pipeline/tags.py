"""Versions and the tags that carry them: ``<recipe>@v<semver>``, GTO's grammar, one template and one regex.

A workspace in a subfolder of its git repository puts the folder in front, as GTO does: ``edge/models=digits@v1.0.0``.
``<recipe>@v1.0.0!`` withdraws a version: it is no longer the latest, and its number stays taken.
``<recipe>#prod#3`` lets a channel point to the version at that commit; ``<recipe>#prod!#4`` takes that back.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ReleaseError, UsageError, unknown

Bump = Literal["patch", "minor", "major"]
BUMPS: tuple[Bump, ...] = ("patch", "minor", "major")

_NUMBER = r"(?:0|[1-9][0-9]*)"
_LABEL = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_SEMVER = re.compile(
    rf"(?P<major>{_NUMBER})\.(?P<minor>{_NUMBER})\.(?P<patch>{_NUMBER})(?:-(?P<label>{_LABEL}(?:\.{_LABEL})*))?"
)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_TAG = re.compile(
    r"(?:(?P<folder>[A-Za-z0-9_./-]+)=)?(?P<recipe>[^@=#]+)@v(?P<version>[^@=#!]+)(?P<withdrawn>!?)(?:#[0-9]+)?"
)
_STAGE = re.compile(
    r"(?:(?P<folder>[A-Za-z0-9_./-]+)=)?(?P<recipe>[^@=#]+)#(?P<stage>[^@=#!]+)(?P<taken_out>!?)#(?P<number>[0-9]+)"
)


@functools.total_ordering
@dataclass(frozen=True)
class Version:
    """A semantic version without build metadata; ordered by precedence (``1.0.0-rc.2 < 1.0.0-rc.10 < 1.0.0``)."""

    major: int
    minor: int
    patch: int
    label: str = ""

    def __str__(self) -> str:
        core = f"{self.major}.{self.minor}.{self.patch}"
        return f"{core}-{self.label}" if self.label else core

    def __lt__(self, other: Version) -> bool:
        return self._rank() < other._rank()

    def _rank(self) -> tuple[int, int, int, bool, list[tuple[bool, int, str]]]:
        # numbers come before words, and a version without a label comes after all that have one
        parts = [
            (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in self.label.split(".") if part
        ]
        return self.major, self.minor, self.patch, not self.label, parts


@dataclass(frozen=True)
class Tag:
    """What a release tag says. `folder` is the workspace's place in its git repository, empty at the root."""

    recipe: str
    version: Version
    folder: str = ""
    withdrawn: bool = False

    def __str__(self) -> str:
        front = f"{self.folder}=" if self.folder else ""
        return f"{front}{self.recipe}@v{self.version}{'!' if self.withdrawn else ''}"


@dataclass(frozen=True)
class StageTag:
    """What a tag about a channel says; GTO calls these stages. `number` counts all of a recipe's."""

    recipe: str
    stage: str
    number: int
    folder: str = ""
    taken_out: bool = False

    def __str__(self) -> str:
        front = f"{self.folder}=" if self.folder else ""
        return f"{front}{self.recipe}#{self.stage}{'!' if self.taken_out else ''}#{self.number}"


def parse(text: str) -> Version:
    """The version that a user wrote, with or without ``v``.

    Raises:
        UsageError: it is not a semantic version.
    """
    found = _SEMVER.fullmatch(text.removeprefix("v"))
    if found is None:
        raise UsageError(f"`{text}` is not a version", hint="a version looks like `1.2.0` or `v2.0.0-rc.1`")
    return _version(found)


def _version(found: re.Match[str]) -> Version:
    return Version(int(found["major"]), int(found["minor"]), int(found["patch"]), found["label"] or "")


def parse_tag(text: str) -> Tag | None:
    """What a git tag says about a release, or None for any other tag."""
    found = _TAG.fullmatch(text)
    if found is None or _NAME.fullmatch(found["recipe"]) is None:
        return None
    version = _SEMVER.fullmatch(found["version"])
    if version is None:
        return None
    return Tag(found["recipe"], _version(version), found["folder"] or "", bool(found["withdrawn"]))


def parse_stage(text: str) -> StageTag | None:
    """What a git tag says about a channel, or None for any other tag."""
    found = _STAGE.fullmatch(text)
    if found is None or _NAME.fullmatch(found["recipe"]) is None:
        return None
    return StageTag(
        found["recipe"], found["stage"], int(found["number"]), found["folder"] or "", bool(found["taken_out"])
    )


def check_name(recipe: str) -> None:
    """Refuse a recipe name that a release tag can't carry.

    Raises:
        ReleaseError: it has other characters than letters, digits, ``-`` and ``_``, or these at an end.
    """
    if _NAME.fullmatch(recipe) is None:
        raise ReleaseError(
            f"recipe `{recipe}` can't be released: a tag allows letters and digits, and `-` and `_` between them",
            hint=f"rename the recipe, for example to `{re.sub(r'[^A-Za-z0-9]+', '-', recipe).strip('-')}`",
        )


def next_version(existing: Iterable[Version], bump: str = "patch", first: str = "1.0.0") -> Version:
    """The version after the highest of `existing`; `first` when there is none. ``1.0.0-rc.1`` is followed by ``1.0.0``.

    Raises:
        UsageError: `bump` is not patch, minor or major, or `first` is no version.
    """
    if bump not in BUMPS:
        raise unknown("bump", bump, BUMPS)
    known = list(existing)
    if not known:
        return parse(first)
    top = max(known)
    if bump == "major":
        return Version(top.major + 1, 0, 0)
    if bump == "minor":
        return Version(top.major, top.minor + 1, 0)
    return Version(top.major, top.minor, top.patch if top.label else top.patch + 1)

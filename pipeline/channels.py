"""Channels: names such as ``prod`` that point to a version. They are git tags, in GTO's grammar: ``digits#prod#3``.

The tag is at the commit of the version's release; its number is higher than that of every earlier one of the channel.
``digits#prod!#4`` takes a version out of the channel again. GTO lists the highest version that was not taken out, and
DVC takes the newest tag; so going back to a lower version first takes the higher ones out, a second earlier.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline import git, layout, record, registry, tags, trust
from pipeline.depot import Depot
from pipeline.errors import ReleaseError, UsageError, unknown
from pipeline.layout import Index, Plain
from pipeline.registry import ORIGIN, Release
from pipeline.tags import StageTag, Version

STATEMENT = "urn:exportyard:channel:v1"
_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_LIKE_VERSION = re.compile(r"v[0-9].*")  # `oci:DIR:v1.0.0` is a release
_TRIES = 10


@dataclass(frozen=True)
class Event:
    """One tag: a version came into a channel, or was taken out of it.

    Attributes:
        seconds: since 1970, when that was.
        who: has done it.
    """

    tag: StageTag
    version: Version
    commit: str
    seconds: int
    who: str

    @property
    def assigned(self) -> str:
        """When that was, as RFC 3339 has it."""
        return datetime.fromtimestamp(self.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Channel:
    """Where one channel points.

    Attributes:
        now: the assignment that counts; None when all versions were taken out.
        before: the versions that it pointed to before, the last one first: where a rollback leads.
    """

    name: str
    now: Event | None
    before: tuple[Version, ...]
    serial: int

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data."""
        now = self.now
        return {
            "channel": self.name,
            "version": str(now.version) if now else None,
            "serial": self.serial,
            "assigned": now.assigned if now else None,
            "by": now.who if now else None,
            "before": [str(version) for version in self.before],
        }


@dataclass(frozen=True)
class Promoted:
    """A channel that points to `version`; `changed` is False when it did before."""

    channel: str
    version: str
    serial: int
    changed: bool
    was: str | None


# --- read ------------------------------------------------------------------------------------------------------------


def channels(root: Path, recipe: str) -> dict[str, Channel]:
    """All channels of a recipe, as the git repository at `root` has them.

    Raises:
        ReleaseError: `root` is not in a git work tree.
    """
    found: dict[str, list[Event]] = {}
    for event in _events(root, recipe):
        found.setdefault(event.tag.stage, []).append(event)
    return {name: _channel(name, events) for name, events in sorted(found.items())}


def _channel(name: str, events: Sequence[Event]) -> Channel:
    """What came of the events, in order. To assign a version from earlier on is to go back to it."""
    stack: list[Event] = []
    for event in events:
        versions = [one.version for one in stack]
        if event.tag.taken_out:
            stack = [one for one in stack if one.version != event.version]
        elif event.version in versions:
            stack = [*stack[: versions.index(event.version)], event]
        else:
            stack.append(event)
    before = tuple(one.version for one in reversed(stack[:-1]))
    return Channel(name, stack[-1] if stack else None, before, max(event.tag.number for event in events))


def _events(root: Path, recipe: str) -> list[Event]:
    """All events of a recipe, in order; tags without an author, or at no release, say nothing (not to GTO, either)."""
    git.top(root)
    folder = git.folder_of(root)
    at = {one.commit: one.version for one in registry.versions(root, recipe)}
    lines = git.run(
        root,
        "for-each-ref",
        "--format=%(refname:strip=2)%00%(*objectname)%00%(taggerdate:unix)%00%(taggername)",
        "refs/tags",
    ).splitlines()
    found = []
    for line in lines:
        name, commit, seconds, who = line.split("\0")
        tag = tags.parse_stage(name)
        if tag is not None and (tag.recipe, tag.folder) == (recipe, folder) and commit in at:
            found.append(Event(tag, at[commit], commit, int(seconds), who))
    return sorted(found, key=lambda event: event.tag.number)


# --- change ----------------------------------------------------------------------------------------------------------


def promote(root: Path, recipe: str, version: str, channel: str) -> Promoted:
    """Let a channel point to a version, here and at origin.

    Raises:
        UsageError: there is no such version, or the channel can't be called so.
        ReleaseError: the version is withdrawn; or git or origin refused.
    """
    _check_name(channel)
    with _turn(root, recipe):
        return _assign(root, recipe, _released(root, recipe, version), channel)


def rollback(root: Path, recipe: str, channel: str, version: str | None = None) -> Promoted:
    """Let a channel point to the version before, or to `version`, here and at origin.

    Raises:
        UsageError: there is no such channel or version.
        ReleaseError: there is nothing to go back to; or as `promote`.
    """
    with _turn(root, recipe):
        known = channels(root, recipe)
        if channel not in known:
            raise unknown("channel", channel, known, where=f"`{recipe}`")
        if version is None:
            version = _before(root, recipe, known[channel])
        return _assign(root, recipe, _released(root, recipe, version), channel)


def _before(root: Path, recipe: str, channel: Channel) -> str:
    standing = {one.version for one in registry.versions(root, recipe) if not one.withdrawn}
    found = next((version for version in channel.before if version in standing), None)
    if found is None:
        raise ReleaseError(
            f"there is nothing to go back to: `{channel.name}` of `{recipe}` pointed to no other version before",
            hint=f"`exportyard rollback {recipe} {channel.name} VERSION` names one (`exportyard releases {recipe}`)",
        )
    return str(found)


@contextlib.contextmanager
def _turn(root: Path, recipe: str) -> Iterator[None]:
    """Inside, nobody else here publishes or promotes, and git has what origin has of the recipe."""
    with record.queue(root):
        _fetch(root, recipe)
        yield


def _fetch(root: Path, recipe: str) -> None:
    if not registry.has_origin(root):
        return
    front = f"{git.folder_of(root)}=".lstrip("=") + recipe
    names = [f"refs/tags/{front}{sign}*:refs/tags/{front}{sign}*" for sign in "@#"]
    try:
        git.run(root, "fetch", "--quiet", "--no-tags", ORIGIN, *names)
    except git.GitError as error:
        raise ReleaseError(
            f"can't ask origin where the channels of `{recipe}` point, so nothing was changed: {error.said[:300]}",
            hint="see with `git fetch` that origin can be reached, and that no tag of it differs from yours",
        ) from error


def _released(root: Path, recipe: str, version: str) -> Release:
    found = registry.versions(root, recipe)
    tag = registry.pick(registry.tags_of(root), recipe, version, "this repository")
    for release in found:
        if release.version == tag.version:
            if release.withdrawn:
                raise ReleaseError(
                    f"`{release.tag}` is withdrawn", hint=f"promote another version (`exportyard releases {recipe}`)"
                )
            return release
    raise unknown("version", version, [str(one.version) for one in found], where=f"the releases of `{recipe}`")


def _check_name(channel: str) -> None:
    if _NAME.fullmatch(channel) is None or _LIKE_VERSION.fullmatch(channel):
        raise UsageError(
            f"`{channel}` can't be the name of a channel",
            hint="letters and digits, with `-` and `_` between them, and not like a version: `prod`, `canary-eu`",
        )


def _assign(root: Path, recipe: str, release: Release, channel: str) -> Promoted:
    identity = git.identity(root)
    for _ in range(_TRIES):
        events = _events(root, recipe)
        here = [event for event in events if event.tag.stage == channel]
        now = _channel(channel, here) if here else None
        was = str(now.now.version) if now and now.now else None
        if now is not None and now.now is not None and now.now.version == release.version:
            return Promoted(channel, str(release.version), now.now.tag.number, changed=False, was=was)
        higher = _higher(here, release.version)
        # the assignment has the next number, whatever else there is to say: of two at once, one finds it taken
        number = max([event.tag.number for event in events], default=0) + 1
        seconds = max([int(time.time()), *(event.seconds + 1 for event in events)])
        folder = git.folder_of(root)
        wanted = {StageTag(recipe, channel, number, folder): (release.commit, seconds + len(higher))}
        for place, event in enumerate(higher):
            wanted[StageTag(recipe, channel, number + 1 + place, folder, taken_out=True)] = (
                event.commit,
                seconds + place,
            )
        made = {str(tag): _tag_object(root, at, str(tag), identity, when) for tag, (at, when) in wanted.items()}
        if _named(root, recipe, made):
            return Promoted(channel, str(release.version), number, changed=True, was=was)
    raise ReleaseError(
        f"others assign channels of `{recipe}` all the time; nothing was changed", hint="run this again in a moment"
    )


def _higher(here: Sequence[Event], version: Version) -> list[Event]:
    """The assignments of higher versions that nobody has taken back; GTO would show them in the channel."""
    standing: dict[Version, Event] = {}
    for event in here:
        if event.tag.taken_out:
            standing.pop(event.version, None)
        else:
            standing[event.version] = event
    return [event for higher, event in sorted(standing.items()) if higher > version]


def _tag_object(root: Path, commit: str, name: str, identity: str, seconds: int) -> str:
    """Write an annotated tag into git's object store; it has no name yet."""
    who, _, zone = identity.rpartition(" ")
    who = who.rpartition(" ")[0]
    lines = [f"object {commit}", "type commit", f"tag {name}", f"tagger {who} {seconds} {zone}", "", name, ""]
    return git.run(root, "mktag", stdin="\n".join(lines))


def _named(root: Path, recipe: str, made: dict[str, str]) -> bool:
    """Give tags their names, at origin and here, all or none; False if others were faster."""
    if registry.has_origin(root):
        names = [f"{sha}:refs/tags/{name}" for name, sha in made.items()]
        try:
            git.run(root, "push", "--quiet", "--atomic", ORIGIN, *names)
        except git.GitError as error:
            before = set(_numbers(root))
            _fetch(root, recipe)
            if set(_numbers(root)) != before:
                return False
            raise ReleaseError(
                f"the push of `{next(iter(made))}` to origin failed; nothing was changed\n  {error.said[:300]}",
                hint="see with `git push --dry-run` that origin can be reached and takes pushes",
            ) from error
    git.run(
        root, "update-ref", "--stdin", stdin="".join(f"create refs/tags/{name} {sha}\n" for name, sha in made.items())
    )
    return True


def _numbers(root: Path) -> list[str]:
    return [
        name
        for name in git.run(root, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags").splitlines()
        if "#" in name
    ]


# --- in the registry -------------------------------------------------------------------------------------------------


def carry_over(root: Path, depot: Depot, recipe: str) -> list[str]:
    """Say in a registry where the channels of git point; returns the channels that moved there.

    One that the registry has with a higher number is left alone: somebody else has promoted since. Channels whose
    release isn't in the registry are left alone, too.

    Raises:
        ReleaseError: the signing key can't be read.
        UnavailableError: the registry can't be reached or written.
    """
    known = channels(root, recipe)
    moved: list[str] = []

    def carry(found: Index) -> Index:
        nonlocal moved
        moved = []
        for channel in known.values():
            before = found.channels().get(channel.name)
            entry = _entry(depot, recipe, channel, found, before)
            if entry != before:
                moved.append(channel.name)
                kept = found.without([before] if before else []).entries
                found = Index(recipe, (*kept, entry) if entry else kept)
        return found

    if known:
        layout.change(depot, recipe, carry)
    return moved


def _entry(depot: Depot, recipe: str, channel: Channel, found: Index, before: Plain | None) -> Plain | None:
    """The line of the index about a channel."""
    notes = layout.notes(before) if before else {}
    if before and int(notes[layout.SERIAL]) > channel.serial:
        return before
    if channel.now is None:
        return None
    version, serial = str(channel.now.version), channel.now.tag.number
    release = found.releases().get(version)
    if release is None:
        return before
    same = before is not None and (before["digest"], notes[layout.SERIAL]) == (release["digest"], str(serial))
    said = {
        layout.NAME: channel.name,
        layout.OF_VERSION: version,
        layout.OF_CHANNEL: channel.name,
        layout.SERIAL: str(serial),
    }
    key = trust.signing_key()
    if key is not None:
        statement = _statement(recipe, channel.name, channel.now, serial, release["digest"])
        said[layout.STATEMENT] = layout.put_blob(depot, recipe, trust.sign_statement(statement, key))
    elif same and layout.STATEMENT in notes:  # somebody with a key has said so
        return before
    return {**release, "annotations": said}


def _statement(recipe: str, channel: str, now: Event, serial: int, sha256: str) -> dict[str, Any]:
    return {
        "_type": trust.STATEMENT,
        "subject": [{"name": recipe, "digest": {"sha256": sha256.removeprefix("sha256:")}}],
        "predicateType": STATEMENT,
        "predicate": {
            "recipe": recipe,
            "channel": channel,
            "version": str(now.version),
            "serial": serial,
            "assigned": now.assigned,
        },
    }

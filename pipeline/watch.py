"""Watching a place for new checkpoints: each whole one goes into the exchange, and somebody is told of it, once.

A file counts when it has not changed for some seconds and is as long as it says itself. It is copied before it is
looked at, so that what is told is what was checked, whatever becomes of the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import errors
from pipeline.errors import ExportyardError, UnavailableError
from pipeline.inbox import Found, Inbox
from pipeline.places import Place, Seen, broken

STILL_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0

Say = Callable[[str, str, str], None]
"""Called with a word, a file's name and details: ``whole``, ``digits/best.pt``, ``1.2 MB, sha256 ...``."""


@dataclass(frozen=True)
class Told:
    """What came of telling the server of a checkpoint.

    Attributes:
        run: id of the flow run that exports it.
        url: where a browser shows that run; its id where nothing does.
        fresh: False when the server had been told before.
        state: of that run.
    """

    run: str
    url: str
    fresh: bool
    state: str


@dataclass
class Watch:
    """One place being watched.

    Attributes:
        recipes: names of the recipes that there are now.
        hand_over: puts a file into the exchange; its sha256. UnavailableError: later may help.
        tell: tells the server of a checkpoint. UnavailableError: later may help.
        still_s: how long a file must not have changed.
        scratch: an existing folder on a disk with room for a checkpoint.
    """

    place: Place
    inbox: Inbox
    recipes: Callable[[], Collection[str]]
    hand_over: Callable[[Path], str]
    tell: Callable[[Found], Told]
    say: Say
    scratch: Path
    still_s: float = STILL_S
    _since: dict[str, tuple[str, float]] = field(default_factory=dict)
    _said: dict[str, str] = field(default_factory=dict)
    _refused: set[tuple[str, str]] = field(default_factory=set)
    _away: bool = False
    _pause_s: float = 0.0
    _next: float = 0.0

    def once(self) -> list[str]:
        """Take in all that lies there and tell of it; what is left to do, in words."""
        left = self.look()
        if left:
            time.sleep(self.still_s)
            left = self.look()
        self.deliver()
        waiting = self.inbox.waiting()
        return [*left, *([f"{len(waiting)} to tell the server of"] if waiting else [])]

    def go_on(self, poll_s: float) -> None:
        """Do so for ever; KeyboardInterrupt ends it."""
        while True:
            self.look()
            if time.monotonic() >= self._next:
                self.deliver()
            time.sleep(poll_s)

    def look(self) -> list[str]:
        """Take in what is new and whole; names of files that may become so, and why they aren't."""
        try:
            seen = self.place.seen()
        except UnavailableError as error:
            self._once("away", self.place.name, error.message)
            self._away = True
            return [error.message]
        if self._away:
            self._once("back", self.place.name, "")
            self._away = False
        if not seen:  # perhaps a name was misspelt, which an object store can't tell
            self._once("empty", self.place.name, "no checkpoint yet")
        known = self.recipes()
        there = {one.name for one in seen}
        self._since = {name: since for name, since in self._since.items() if name in there}
        new = [one for one in seen if not self.inbox.has(one.name, one.stamp) and self._wanted(one, known)]
        left: list[str] = []
        for one in new:
            try:
                why = self._consider(one)
            except UnavailableError as error:  # those behind it wait, too, since they came after it
                self._once("waiting", one.name, error.message)
                return [*left, f"{one.name}: {error.message}"]
            if why is not None:
                left.append(f"{one.name}: {why}")
        return left

    def _wanted(self, seen: Seen, known: Collection[str]) -> bool:
        if seen.recipe not in known:
            refused = errors.unknown("recipe", seen.recipe, known)
            self._once("refused", seen.name, f"{refused.message}; {refused.hint}")
            return False
        return (seen.name, seen.stamp) not in self._refused

    def _consider(self, seen: Seen) -> str | None:
        """Take the file in if its time has come; else why not."""
        stamp, since = self._since.get(seen.name, ("", 0.0))
        now = time.monotonic()
        if stamp != seen.stamp:
            if not stamp:
                self.say("new", seen.name, f"{seen.size} bytes")
            self._since[seen.name] = (seen.stamp, now)
            return "it may still be written"
        if now - since < self.still_s:
            return "it may still be written"
        return self._take(seen)

    def _take(self, seen: Seen) -> str | None:
        with TemporaryDirectory(dir=self.scratch) as folder:
            copy = Path(folder) / Path(seen.name).name
            try:
                self.place.copy(seen, copy)
                same = self.place.shows(seen)
            except UnavailableError as error:  # this one file can't be read, which others needn't wait for
                self._once("waiting", seen.name, error.message)
                return error.message
            if not same:
                del self._since[seen.name]
                return "it changes while it is read"
            why = broken(copy)
            if why is not None:
                self._refused.add((seen.name, seen.stamp))
                self.say("refused", seen.name, why)
                return None
            found = Found(seen.recipe, self.hand_over(copy), copy.name)
        fresh = self.inbox.take(seen.name, seen.stamp, found)
        del self._since[seen.name]
        self._said.pop(seen.name, None)
        self.say("whole" if fresh else "known", seen.name, f"sha256 {found.sha256[:16]}")
        return None

    def deliver(self) -> None:
        """Tell the server what it doesn't know, in order; when it is away, the pause until the next try grows."""
        for found in self.inbox.waiting():
            name = f"{found.recipe} {found.file}"
            try:
                told = self.tell(found)
            except UnavailableError as error:
                self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
                self._next = time.monotonic() + self._pause_s
                self._once("waiting", name, error.message)
                return
            except ExportyardError as error:
                self.inbox.end(found, f"refused: {error.message}")
                self.say("refused", name, error.message)
                continue
            self.inbox.end(found, told.run)
            self._pause_s = 0.0
            self._said.pop(name, None)
            self.say("started" if told.fresh else "known", name, f"{told.url} ({told.state})")

    def _once(self, word: str, name: str, details: str) -> None:
        """Say it, unless it was the last thing said of this name."""
        if self._said.get(name) != details:
            self._said[name] = details
            self.say(word, name, details)

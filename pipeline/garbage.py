"""What a static registry holds, how much of it nothing leads to any more, and how to be rid of that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from pydantic import JsonValue

from pipeline import layout, tags
from pipeline.depot import LEFT, Depot, Entry
from pipeline.errors import ReleaseError
from pipeline.layout import Index, Plain

_YOUNG_S = 3600.0  # what is younger and not listed yet may be about to be


@dataclass(frozen=True)
class Usage:
    """What one recipe takes in a registry, and what a sweep would do.

    Attributes:
        kept: versions that stay, the lowest first.
        dropped: versions that would go, since newer ones are enough.
        size_bytes: of all that stays.
        alone_bytes: what that would take if no version shared a file with another.
        free_bytes: of what would go.
        young_bytes: of what nothing leads to, and what stays for now, since somebody may be about to publish it.
        names: of the files that would go.
    """

    recipe: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    size_bytes: int
    alone_bytes: int
    free_bytes: int
    young_bytes: int
    names: tuple[str, ...]

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data, without the names."""
        return {
            "recipe": self.recipe,
            "kept": [*self.kept],
            "dropped": [*self.dropped],
            "size_bytes": self.size_bytes,
            "alone_bytes": self.alone_bytes,
            "free_bytes": self.free_bytes,
            "young_bytes": self.young_bytes,
            "files": len(self.names),
        }


def recipes(depot: Depot) -> list[str]:
    """The recipes in a registry; folders that are no layout of ours are none of our business."""
    names = depot.folders()
    there = depot.sizes(f"{name}/oci-layout" for name in names)
    return [name for name in names if f"{name}/oci-layout" in there]


def usage(depot: Depot, recipe: str, keep: int | None = None) -> Usage:
    """What a recipe takes, and what `sweep` would do with it.

    Args:
        keep: how many of the newest versions shall stay, beside those that a channel points to; None is all.

    Raises:
        ReleaseError: the registry is damaged: something is listed that isn't there.
        UnavailableError: it can't be read.
    """
    found = layout.index(depot, recipe)
    dropped = _dropped(found, keep)
    rest = found.without([entry for version in dropped for entry in found.about(version)])
    walk = _Walk(depot, recipe)
    listed, reached = walk.reached(found.entries), walk.reached(rest.entries)
    there = [entry for folder in (recipe, f"{recipe}/blobs/sha256") for entry in depot.entries(folder)]
    there = [one for one in there if one.name.endswith(LEFT) or "/blobs/" in one.name]
    loose = [one for one in there if one.name not in reached]
    # what was listed until now isn't about to be published
    gone = [one for one in loose if one.name in listed or one.age_s > _YOUNG_S]
    versions = [*rest.releases()]
    alone = [walk.reached(rest.about(version)) for version in versions]
    beside = reached.keys() - {name for one in alone for name in one}  # what channels say
    return Usage(
        recipe,
        kept=tuple(sorted(versions, key=tags.parse)),
        dropped=dropped,
        size_bytes=_total([one for one in there if one.name in reached]),
        alone_bytes=sum(sum(one.values()) for one in alone) + sum(reached[name] for name in beside),
        free_bytes=_total(gone),
        young_bytes=_total(loose) - _total(gone),
        names=tuple(one.name for one in gone),
    )


def sweep(depot: Depot, recipe: str, keep: int | None = None) -> Usage:
    """Take out the versions that `keep` doesn't keep, and delete what nothing leads to; returns what was done.

    Raises:
        ReleaseError, UnavailableError: as `usage`.
    """
    with depot.sweeping(recipe):
        before = usage(depot, recipe, keep)
        if before.dropped:
            layout.change(depot, recipe, partial(_without, keep))
        # whoever has published meanwhile is in the index, and whoever is about to finds out that we were here
        reached = _Walk(depot, recipe).reached(layout.index(depot, recipe).entries)
        depot.remove(sorted({*before.names} - reached.keys()))
    return before


def _without(keep: int | None, found: Index) -> Index:
    return found.without([entry for version in _dropped(found, keep) for entry in found.about(version)])


def _dropped(found: Index, keep: int | None) -> tuple[str, ...]:
    if keep is None:
        return ()
    pointed = {layout.notes(entry)[layout.OF_VERSION] for entry in found.channels().values()}
    versions = sorted(found.releases(), key=tags.parse)
    return tuple(version for version in versions[: max(0, len(versions) - keep)] if version not in pointed)


@dataclass(frozen=True)
class _Walk:
    """From entries of an index down to blobs; what describes others is read once."""

    depot: Depot
    recipe: str
    known: dict[str, list[Plain]] = field(default_factory=dict)

    def reached(self, entries: Sequence[Plain]) -> dict[str, int]:
        """All blobs that these entries lead to, with their sizes."""
        found: dict[str, int] = {}
        left = [*entries]
        while left:
            entry = left.pop()
            said = entry.get("annotations", {}).get(layout.STATEMENT)
            if said is not None:
                found |= self.depot.sizes([layout.blob(self.recipe, said)])
            name = layout.blob(self.recipe, entry["digest"])
            if name not in found:
                found[name] = entry["size"]
                left += self._below(entry)
        return found

    def _below(self, entry: Plain) -> list[Plain]:
        sha256 = entry["digest"]
        if entry["mediaType"] not in (layout.IMAGE_INDEX, layout.IMAGE_MANIFEST):
            return []
        if sha256 not in self.known:
            try:
                content = json.loads(self.depot.read(layout.blob(self.recipe, sha256)) or b"")
                is_index = entry["mediaType"] == layout.IMAGE_INDEX
                self.known[sha256] = content["manifests"] if is_index else [content["config"], *content["layers"]]
            except (ValueError, KeyError, TypeError):
                raise ReleaseError(
                    f"the registry `{self.depot.name}` is damaged: `{self.recipe}` lists {sha256[:19]}, which isn't "
                    "there whole; nothing was deleted",
                    hint=f"`exportyard mirror {self.recipe} --verify` puts it there again",
                ) from None
        return self.known[sha256]


def _total(entries: Sequence[Entry]) -> int:
    return sum(one.size_bytes for one in entries)

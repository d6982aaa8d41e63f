"""Commands for the static registry and its channels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, workspace
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, Registry
from pipeline.errors import UsageError, unknown

if TYPE_CHECKING:
    from pipeline.channels import Promoted
    from pipeline.depot import Depot


def mirror(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE[@VERSION]", help="All its versions if none is given.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every recipe of the workspace.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every byte, and replace what is damaged.")] = False,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Put releases into the static registry that aren't there yet, and say there where channels point."""
    from pipeline import mirror as mirrors
    from pipeline import tags

    if everything == bool(recipe):
        raise UsageError("give either a recipe or `--all`", hint="`exportyard mirror RECIPE`")
    found, (name, _, version) = workspace.find(root), recipe.partition("@")
    depot = _depot(found.root, registry)
    wanted = [tags.parse(version)] if version else None
    names = mirrors.released(found.root, None if everything else name, wanted)
    done = [mirrors.mirror(found.root, depot, one, wanted, verify=verify) for one in names]
    if as_json:
        print(json.dumps([asdict(one) for one in done], indent=2))
        return
    for one in done:
        fresh = f"{', '.join(one.fresh)} ({console.size(one.sent_bytes)})" if one.fresh else "nothing new"
        print(
            f"{one.recipe}: {len(one.versions)} version{'s' if len(one.versions) != 1 else ''} in {depot.name}; {fresh}"
        )


def _depot(root: Path, given: str | None) -> Depot:
    """The static registry that was named, or the workspace's own."""
    found = _own_depot(root, given)
    if found is None:
        raise UsageError(
            "this workspace has no static registry",
            hint="`dvc remote add registry s3://BUCKET/PATH` (or a folder), or name one with `--registry`",
        )
    return found


def _own_depot(root: Path, given: str | None) -> Depot | None:
    from pipeline import depots

    return depots.at(given) if given is not None else depots.of(root)


def promote(
    release: Annotated[str, typer.Argument(metavar="RECIPE@VERSION", help="A release.")],
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as `prod`; made if it is new.")],
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a channel point to a version: by a git tag, and in the static registry if there is one."""
    from pipeline import channels

    found, (name, _, version) = workspace.find(root), release.partition("@")
    if not version:
        raise UsageError(f"`{release}` names no version", hint=f"`exportyard promote {name}@1.0.0 {channel}`")
    _show_promoted(found.root, name, channels.promote(found.root, name, version, channel), registry, as_json=as_json)


def rollback(
    recipe: RecipeName,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as `prod`.")],
    version: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Argument(metavar="VERSION", help="Where to (default: to the version before)."),
    ] = None,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a channel point to the version again that it pointed to before."""
    from pipeline import channels

    found = workspace.find(root)
    done = channels.rollback(found.root, recipe, channel, version)
    _show_promoted(found.root, recipe, done, registry, as_json=as_json)


def _show_promoted(root: Path, recipe: str, done: Promoted, registry: str | None, *, as_json: bool) -> None:
    """Say where a channel points now, after the static registry says so, too."""
    from pipeline import mirror as mirrors

    depot = _own_depot(root, registry)
    if depot is not None:
        mirrors.promoted(root, depot, recipe, done)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    was = f" (was {done.was})" if done.changed and done.was else "" if done.changed else ", as before"
    print(f"{recipe}#{done.channel} is {done.version}{was}")


def channels(recipe: RecipeName, root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the channels of a recipe, and the versions that they point to."""
    from pipeline import channels

    known = channels.channels(workspace.find(root).root, recipe)
    if as_json:
        print(json.dumps([one.plain() for one in known.values()], indent=2))
        return
    if not known:
        console.say(f"`{recipe}` has no channel yet\n\nhint: `exportyard promote {recipe}@VERSION prod`")
    rows = [
        [
            one.name,
            str(one.now.version) if one.now else "none",
            one.now.assigned if one.now else "",
            escape(one.now.who) if one.now else "",
            ", ".join(map(str, one.before[:5])),
        ]
        for one in known.values()
    ]
    console.table(["channel", "version", "since", "by", "before"], rows)


def gc(
    recipe: Annotated[
        Optional[list[str]],  # noqa: UP045  see above
        typer.Argument(metavar="[RECIPE]...", help="Recipes in the registry (default: all)."),
    ] = None,
    keep: Annotated[
        Optional[int],  # noqa: UP045  see above
        typer.Option("--keep", metavar="N", min=1, help="Keep the newest N versions, and those of channels."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only said.")] = False,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what the static registry takes and what nothing leads to any more; with --yes, delete that."""
    from pipeline import depots, garbage

    depot = depots.at(registry) if registry is not None else _depot(workspace.find(root).root, None)
    known = garbage.recipes(depot)
    for name in recipe or ():
        if name not in known:
            raise unknown("recipe", name, known, where=f"the registry `{depot.name}`")
    work = garbage.sweep if yes else garbage.usage
    found = [work(depot, name, keep) for name in recipe or known]
    if as_json:
        print(json.dumps([one.plain() for one in found], indent=2))
        return
    rows = [
        [
            one.recipe,
            str(len(one.kept)),
            console.size(one.size_bytes),
            console.size(one.alone_bytes - one.size_bytes),
            ", ".join(one.dropped),
            console.size(one.free_bytes),
        ]
        for one in found
    ]
    columns = ["recipe", "versions", "size", "saved by sharing", "versions to go", "freed" if yes else "to free"]
    console.table(columns, rows, numbers=["versions", "size", "saved by sharing", columns[-1]])
    young = sum(one.young_bytes for one in found)
    if young:
        console.say(
            f"{console.size(young)} are younger than an hour, and stay until somebody has listed them or they are older"
        )
    if not yes and any(one.names for one in found):
        console.say(
            "nothing was deleted; `--yes` does it. Tags in git stay, and `exportyard mirror` brings versions back"
        )

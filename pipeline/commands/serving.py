"""Commands that need a Prefect server."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, workspace
from pipeline.commands.options import HERE, AsJson, Folder
from pipeline.errors import UnavailableError, UsageError


def _need_prefect() -> None:
    """Raise UnavailableError where the package that only `flows/` uses is missing."""
    if find_spec("prefect") is None:
        raise UnavailableError("Prefect is not installed", hint="`pip install 'exportyard[flows]'`")


def notify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="File with trained weights.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="R", help="Name of a folder below recipes/.")],
    again: Annotated[bool, typer.Option("--again", help="Export it even if that was started before.")] = False,
    event: Annotated[bool, typer.Option("--event", help="Send the event checkpoint.created instead.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Tell the Prefect server of a new checkpoint, which exports it once; a training job's last line."""
    _need_prefect()
    from flows import api, notify

    if again and event:
        raise UsageError("an event can't ask for another export", hint="leave out `--event` or `--again`")
    found = workspace.find(root)
    with api.connected() as client:  # before anything is read or sent
        client.hello()
    offered = notify.offer(found, recipe, checkpoint)
    if event:
        sent = notify.emit(offered)
        print(json.dumps({"event": sent, "checkpoint": offered.checkpoint}) if as_json else f"sent event {sent}")
        return
    told = notify.start(offered, again=again)
    if as_json:
        print(json.dumps(asdict(told) | {"checkpoint": offered.checkpoint}))
        return
    print(f"started {told.url}" if told.fresh else f"known already: {told.url} ({told.state})")
    if not told.fresh and told.state in ("Failed", "Crashed", "Cancelled"):
        console.say("`--again` starts another export of the same checkpoint")


def watch(
    place: Annotated[str, typer.Argument(metavar="DIR|URL", help="A folder, or s3://bucket/prefix.")],
    recipe: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--recipe", metavar="R", help="Whose checkpoints these are (default: DIR/RECIPE/FILE)."),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--pattern", metavar="GLOB", help="Of file names (default: all kinds of checkpoints)."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    poll: Annotated[float, typer.Option("--poll", metavar="S", min=0.1, help="Seconds between two looks.")] = 5.0,
    root: Folder = HERE,
) -> None:
    """Start an export of each new checkpoint in a folder or bucket, once it is whole; until Ctrl-C or SIGTERM."""
    _need_prefect()
    from flows.watch import watching

    def say(word: str, name: str, details: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {word:<8} {name}  {details}".rstrip(), flush=True)

    with watching(workspace.find(root), place, recipe, pattern, say) as found:
        if once:
            left = found.once()
            if left:
                raise UnavailableError("\n  ".join(["not done yet:", *left]), hint="what is left is seen the next time")
            return
        console.say(f"watching `{found.place.name}`; Ctrl-C ends it")
        try:
            found.go_on(poll)
        except KeyboardInterrupt:
            console.say("ended; the same command goes on from there")


def deploy(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make work pools, deployments and automations on the Prefect server, as prefect.yaml and the targets say."""
    _need_prefect()
    from flows.deploy import deploy

    changes = deploy(workspace.find(root), dry=dry_run)
    if as_json:
        print(json.dumps([asdict(change) for change in changes], indent=2))
        return
    colours = {"created": "green", "updated": "yellow", "removed": "red", "unchanged": "dim"}
    rows = [[one.kind, escape(one.name), f"[{colours[one.state]}]{one.state}[/]", one.what] for one in changes]
    console.table(["kind", "name", "state", "what of it"], rows)
    if dry_run:
        console.say("nothing was changed; without `--dry-run` it is")


def worker(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Work pool whose runs this machine takes.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Runs at the same time.")] = 1,
    root: Folder = HERE,
) -> None:
    """Run what is scheduled in a work pool, in this clone of the workspace, until Ctrl-C or SIGTERM."""
    _need_prefect()
    from flows.steps import prepare_worker

    prepare_worker(workspace.find(root))
    from flows.worker import work

    work(pool, limit)

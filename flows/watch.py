"""Watching a place for checkpoints and telling the server: for ever by the command line, once by the flow `watch`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import notify, stages
from flows.api import address
from flows.steps import entered
from pipeline import digest, exchange, inbox, places
from pipeline.errors import ExportyardError, UnavailableError
from pipeline.watch import STILL_S, Say, Watch
from pipeline.workspace import Workspace

log = logging.getLogger("pipeline.flow")


@contextlib.contextmanager
def watching(
    workspace: Workspace, place: str, recipe: str | None, pattern: str | None, say: Say, still_s: float = STILL_S
) -> Iterator[Watch]:
    """A watch on `place` that tells the server of the profile; what it knows is kept in the workspace.

    Args:
        recipe: whose checkpoints lie there; None when they lie in one folder a recipe.
        pattern: of file names; None for all that may be checkpoints.

    Raises:
        UsageError: no such place or recipe, or another watcher is at it.
        UnavailableError: no server is set.
        WorkspaceError: the workspace has no remote through which workers could get the files.
    """
    if recipe is not None:
        workspace.recipe(recipe)
    found = places.at(place, recipe, pattern)
    shared = exchange.of(workspace.root)
    scratch = workspace.root / ".scratch" / "watch"
    # another server, or another question, has to be told anew
    name = digest.of_json([found.root, recipe, pattern, address()])[:16]
    with inbox.opened(scratch / f"{name}.jsonl") as known:
        yield Watch(found, known, workspace.recipe_names, shared.put_file, notify.start, say, scratch, still_s)


@flow(name="watch", persist_result=False, result_serializer="json")
def watch(
    place: str, recipe: str | None = None, pattern: str | None = None, workspace: str | None = None
) -> State[Any]:
    """Look once for new checkpoints, and start an export of each.

    Args:
        place: a folder, or a URL such as `s3://bucket/prefix`.
        recipe: whose checkpoints lie there; by default they lie in one folder a recipe.
        pattern: of file names, such as `*.safetensors`; by default all that may be checkpoints.
        workspace: a folder in the workspace; by default the working directory.
    """
    stages.listen()
    words: list[str] = []

    def say(word: str, name: str, details: str) -> None:
        words.append(word)
        log.info("%s %s: %s", word, name, details)

    try:
        with watching(entered(workspace), place, recipe, pattern, say) as found:
            left = found.once()
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    if found.inbox.waiting():
        return Failed(message="; ".join(left), data=UnavailableError("; ".join(left)))
    counts = [f"{words.count(word)} {word}" for word in ("started", "refused") if word in words]
    return Completed(message="; ".join([*counts, *(f"next time: {one}" for one in left)]) or "nothing new")

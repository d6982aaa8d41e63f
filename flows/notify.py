"""Telling the server of a new checkpoint: it starts one export of it, however often and in whichever way it is told.

What keeps it to one is the run's idempotency key, `<recipe>:<sha256>`, of which the server makes one run. Events have
none: so an event starts the small flow `checkpoint`, which tells the server like everybody else.
"""

from __future__ import annotations

import os
import time
import uuid
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed
from prefect.utilities.urls import url_for

from flows import stages
from flows.api import connected
from flows.export import IN_EXCHANGE
from flows.steps import entered
from pipeline import exchange
from pipeline.errors import CheckpointError, ExportyardError, UnavailableError, UsageError, first_line
from pipeline.inbox import Found
from pipeline.job import check_checkpoint_file
from pipeline.watch import Told
from pipeline.workspace import Workspace

DEPLOYMENT = "export/all"
EVENT = "checkpoint.created"
EVENT_LIMIT_S = 30.0


def offer(workspace: Workspace, recipe: str, path: Path) -> Found:
    """Check that `path` is a checkpoint that can be read, and put it into the exchange, where every worker finds it.

    Raises:
        UsageError: there is no such recipe.
        CheckpointError: missing, damaged, unsafe, or changed meanwhile.
        UnavailableError: the remote can't be reached.
    """
    workspace.recipe(recipe)
    check_checkpoint_file(path)
    before = path.stat()
    _read(path)
    sha256 = exchange.of(workspace.root).put_file(path)
    after = path.stat()
    if (before.st_mtime_ns, before.st_size, before.st_ino) != (after.st_mtime_ns, after.st_size, after.st_ino):
        raise CheckpointError(
            f"the checkpoint `{path}` was changed while it was read", hint="tell about it when it is written"
        )
    return Found(recipe, sha256, path.name)


def _read(path: Path) -> None:
    from pipeline import checkpoint

    if path.suffix != ".pt2":
        checkpoint.read(path)
        return
    try:  # a program: loading it needs the recipe's operators, but its parts have sums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise CheckpointError(
            f"the checkpoint `{path}` is truncated, or not a file that torch.export.save wrote: {damaged}",
            hint="copy or save it again",
        )


def start(found: Found, *, again: bool = False) -> Told:
    """Let the server start an export of the checkpoint, unless it has done so before.

    Args:
        again: start another one all the same.

    Raises:
        UnavailableError: the server can't be reached, or has no deployment for it.
        UsageError: the server has refused it.
    """
    key = f"{found.key}:{uuid.uuid4().hex[:8]}" if again else found.key
    with connected() as client:
        known = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])), limit=1
        )
        if known:
            return _told(known[0], fresh=False)
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise UnavailableError(
                f"the server has no deployment `{DEPLOYMENT}`, which exports checkpoints", hint="`exportyard deploy`"
            ) from None
        # somebody else may have told it since we asked, and then this is that run
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"recipe": found.recipe, "checkpoint": found.checkpoint},
            idempotency_key=key,
        )
        return _told(run, fresh=True)


def _told(run: FlowRun, *, fresh: bool) -> Told:
    url = url_for("flow-run", obj_id=run.id) or str(run.id)
    return Told(str(run.id), url, fresh, run.state_name or "unknown")


# --- events --------------------------------------------------------------------------------------------------------


def emit(found: Found) -> str:
    """Tell the server by the event `checkpoint.created` instead, and wait until it is written down there; its id.

    Raises:
        UnavailableError: the server can't be reached, doesn't keep the event, or has no automation that waits for it.
    """
    event = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": EVENT,
        "resource": {
            "prefect.resource.id": f"checkpoint.{found.recipe}.{found.sha256[:16]}",
            "prefect.resource.name": found.file,
        },
        "payload": {"recipe": found.recipe, "checkpoint": found.checkpoint, "sha256": found.sha256},
    }
    with connected() as client:
        if not any(_waits(automation) for automation in client.read_automations()):
            raise UnavailableError(
                f"no automation of the server waits for `{EVENT}`",
                hint="`exportyard deploy` makes it; or leave out `--event`",
            )
        client.request("POST", "/events", json=[event])
        _await_event(client, event["id"])
    return str(event["id"])


def _waits(automation: Automation) -> bool:
    return automation.enabled and EVENT in (getattr(automation.trigger, "expect", None) or ())


def _await_event(client: SyncPrefectClient, event: Any) -> None:
    limit = time.monotonic() + EVENT_LIMIT_S
    while time.monotonic() < limit:
        answer = client.request("POST", "/events/filter", json={"filter": {"id": {"id": [event]}}, "limit": 1})
        if answer.json()["events"]:
            return
        time.sleep(0.2)
    raise UnavailableError(
        f"the server has not written down the event within {EVENT_LIMIT_S:.0f} s",
        hint="send it again, or leave out `--event`: the same checkpoint starts one export only",
    )


@flow(name="checkpoint", persist_result=False, result_serializer="json")
def checkpoint_created(
    recipe: str, checkpoint: str, sha256: str | None = None, workspace: str | None = None
) -> State[Any]:
    """Start an export of a checkpoint that an event has told of, unless there is one.

    Args:
        recipe: name of a folder below `recipes/`.
        checkpoint: `sha256:DIGEST/FILE` in the exchange, a file that this worker can read, or its URL.
        sha256: what a file's digest must be.
        workspace: a folder in the workspace; by default the working directory.
    """
    stages.listen()
    try:
        told = start(_found(entered(workspace), recipe, checkpoint, sha256 or None))
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    if told.fresh:
        return Completed(message=f"started {told.url}")
    return Completed(name="Duplicate", message=f"known already: {told.url} ({told.state})")


def _found(workspace: Workspace, recipe: str, checkpoint: str, sha256: str | None) -> Found:
    """What the event tells of, in the exchange."""
    handed = IN_EXCHANGE.fullmatch(checkpoint)
    if handed is not None:
        workspace.recipe(recipe)
        found = Found(recipe, handed["digest"], handed["name"])
    elif "://" not in checkpoint:
        found = offer(workspace, recipe, Path(checkpoint))
    else:
        with TemporaryDirectory() as folder:
            found = offer(workspace, recipe, _downloaded(checkpoint, Path(folder)))
    if sha256 not in (None, found.sha256):
        raise CheckpointError(
            f"`{checkpoint}` is another file than the event tells of: its sha256 is {found.sha256}",
            hint="was it replaced since? `exportyard notify` keeps a copy for the export",
        )
    return found


def _downloaded(url: str, folder: Path) -> Path:
    from fsspec.core import url_to_fs

    path = folder / os.path.basename(url)  # noqa: PTH119  a URL is no path
    try:
        files, place = url_to_fs(url)
        files.get_file(place, str(path))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"can't read `{url}`: {first_line(error)}", hint="give a file, or `s3://bucket/name`"
        ) from error
    except Exception as error:  # every file system has failures of its own
        raise UnavailableError(
            f"can't read `{url}`: {type(error).__name__}: {first_line(error)}", hint="may this worker read it?"
        ) from error
    return path

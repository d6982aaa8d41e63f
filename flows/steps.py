"""How a worker's process finds the workspace: the one that its operator has cloned, wherever that is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ExportyardError, WorkspaceError
from pipeline.workspace import Workspace, find

VARIABLE = "EXPORTYARD_WORKSPACE"
"""Names the workspace of a worker; `exportyard worker` sets it."""

REFUSED = "EXPORTYARD_REFUSED"
"""Why `enter_workspace` found none: message and hint, for the flow that starts next in this process."""

SETTINGS: Mapping[str, str] = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the least that Prefect allows; see `deploy.SILENT_S`
    "PREFECT_WORKER_QUERY_SECONDS": "3",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline",  # what stages log is shown with the run
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never pickle, which runs code where it is read
    "DO_NOT_TRACK": "1",
}
"""What a worker of ours sets, for itself and the runs that it starts, where its operator hasn't."""


def prepare_worker(workspace: Workspace) -> None:
    """Set the environment of this process for a worker that serves `workspace`; before Prefect is imported."""
    os.environ[VARIABLE] = str(workspace.root)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def enter_workspace(recorded: str) -> dict[str, str]:
    """A pull step: make the worker's clone of the workspace the working directory of the run.

    That is the folder in `EXPORTYARD_WORKSPACE`, else `recorded`, the folder that was deployed from, if it is a
    workspace on this machine, too.

    It never raises: Prefect would report the run as crashed with exit code 1 and nothing else. What it has to say is
    said by `entered`, in the flow.
    """
    os.environ.pop(REFUSED, None)
    try:
        root = _workspace(recorded).root
    except ExportyardError as error:
        os.environ[REFUSED] = f"{error.message}\n{error.hint}"
        return {}
    os.chdir(root)
    return {"directory": str(root)}


def entered(folder: str | None = None) -> Workspace:
    """The workspace of this run: that of `folder`, or of the working directory.

    Raises:
        WorkspaceError: there is none; for a deployment's run, with what to set where.
    """
    refused = os.environ.get(REFUSED)
    if folder is None and refused is not None:
        message, _, hint = refused.partition("\n")
        raise WorkspaceError(message, hint=hint)
    return find(Path(folder or "."))


def _workspace(recorded: str) -> Workspace:
    named = os.environ.get(VARIABLE)
    try:
        return find(Path(named or recorded))
    except WorkspaceError as error:
        if named is not None:
            message = f"`{VARIABLE}` of this worker is not a workspace: {error.message}"
        else:
            message = f"this worker knows no workspace: `{VARIABLE}` is not set, and `{recorded}` is none here"
        hint = "clone the workspace on the worker's machine, and start `exportyard worker POOL` in it"
        raise WorkspaceError(message, hint=hint) from None

"""What `prefect.yaml` asks for, checked: deployments as the server's API takes them, and the triggers of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from prefect.events import DeploymentTriggerTypes
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from pipeline import errors
from pipeline.errors import ExportyardError, UsageError, WorkspaceError, first_line
from pipeline.workspace import Workspace

FILE = "prefect.yaml"
TAG = "exportyard"
"""Every run of ours has it."""

STEP = "flows.steps.enter_workspace"
BUILD = "flows.build.build"
LEAD = "lead"
"""Pool of the runs that wait for others."""

KEYS = ("name", "description", "entrypoint", "parameters", "tags", "work_pool", "concurrency_limit", "triggers")
POOL_KEYS = ("name", "job_variables")
LIMIT_KEYS = ("limit", "collision_strategy", "grace_period_seconds")
STRATEGIES = ("ENQUEUE", "CANCEL_NEW")
IGNORED = ("prefect-version", "name", "definitions", "build", "push")


@dataclass(frozen=True)
class Wanted:
    """A deployment as it shall be.

    Attributes:
        flow: name of the flow.
        name: that of the deployment.
        pool: its work pool.
        body: everything else, under the names of the API.
        triggers: what starts it; each becomes an automation.
    """

    flow: str
    name: str
    pool: str
    body: Mapping[str, Any]
    triggers: Sequence[DeploymentTriggerTypes] = field(default=())

    @property
    def title(self) -> str:
        """``flow/name``, as Prefect's commands take it."""
        return f"{self.flow}/{self.name}"


def wanted(workspace: Workspace) -> list[Wanted]:
    """The deployments of `prefect.yaml`, and ``build/POOL`` for each pool of a target that the file lacks.

    Raises:
        WorkspaceError: the file can't be read.
        UsageError: a key, flow or parameter that doesn't exist, with the nearest name.
    """
    path = workspace.root / FILE
    content = _read(path)
    _check("key", content, ("deployments", "pull", *IGNORED), f"`{path}`")
    pull = [_recorded(step, workspace.root) for step in content.get("pull") or []]
    found = [_deployment(entry, pull) for entry in content.get("deployments") or []]
    there = {one.title for one in found}
    return found + [
        _deployment({"name": pool, "entrypoint": BUILD, "work_pool": {"name": pool}}, pull)
        for pool in pools(workspace)
        if f"build/{pool}" not in there
    ]


def pools(workspace: Workspace) -> list[str]:
    """Work pools that the target rows name."""
    return sorted({row.pool for row in workspace.rows().values()})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        hint = "`exportyard init DIR` makes a workspace with one to copy"
        raise WorkspaceError(f"there is no `{path}`", hint=hint) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:300]
        raise WorkspaceError(f"can't read `{path}`: {said}", hint="correct it; docs/flows.md has an example") from None
    if not isinstance(content, dict):
        raise WorkspaceError(f"`{path}` has no `deployments:`", hint="docs/flows.md says what belongs there")
    return content


def _recorded(step: dict[str, Any], root: Path) -> dict[str, Any]:
    """A pull step; ours is told the folder that is deployed from."""
    return {STEP: {"recorded": str(root)}} if STEP in step else step


def _deployment(entry: Mapping[str, Any], pull: Sequence[Mapping[str, Any]]) -> Wanted:
    name = str(entry.get("name"))
    where = f"deployment `{name}` of `{FILE}`"
    pool, limit = entry.get("work_pool") or {}, entry.get("concurrency_limit")
    options = limit if isinstance(limit, Mapping) else {"limit": limit}
    _check("key", entry, KEYS, where)
    _check("key of `work_pool`", pool, POOL_KEYS, where)
    _check("key of `concurrency_limit`", options, LIMIT_KEYS, where)
    strategy = str(options.get("collision_strategy", STRATEGIES[0]))
    _check("`collision_strategy`", [strategy], STRATEGIES, where)
    flow = _flow(entry.get("entrypoint"), where)
    schema = parameter_schema(flow).model_dump_for_openapi()
    # the server then refuses names that it doesn't know, whoever starts the run; by default it takes them
    schema["propertyNames"] = {"enum": list(schema["properties"])}
    parameters = entry.get("parameters") or {}
    _check(f"parameter of flow `{flow.name}`", parameters, schema["properties"], where)
    triggers = [_trigger(given, flow.name, name, schema, where) for given in entry.get("triggers") or []]
    body = {
        "entrypoint": entry["entrypoint"],
        "description": entry.get("description") or (flow.description or "").partition("\n\nArgs:")[0],
        "parameters": parameters,
        "tags": sorted({TAG, *entry.get("tags", ())}),
        "job_variables": pool.get("job_variables") or {},
        "pull_steps": list(pull),
        "parameter_openapi_schema": schema,
        "enforce_parameter_schema": True,
        "concurrency_limit": options["limit"],
        "concurrency_options": {key: value for key, value in options.items() if key != "limit"} or None,
    }
    return Wanted(flow.name, name, str(pool.get("name") or LEAD), body, triggers)


def _flow(entrypoint: str | None, where: str) -> Flow[..., Any]:
    try:
        return load_flow_from_entrypoint(str(entrypoint))
    except Exception as error:  # whatever a module's code may raise as it is imported
        if isinstance(error, ExportyardError):
            raise
        message = f"{where}: no flow at `{entrypoint}`: {type(error).__name__} {first_line(error)}"
        raise UsageError(message, hint="write `entrypoint: package.module.function`") from error


def _trigger(
    given: Mapping[str, Any], flow: str, name: str, schema: Mapping[str, Any], where: str
) -> DeploymentTriggerTypes:
    parameters = given.get("parameters") or {}
    _check(f"parameter of flow `{flow}`", parameters, schema["properties"], f"a trigger of {where}")
    lacking = [one for one in schema.get("required", ()) if one not in parameters]
    if lacking:
        hint = f'add `{lacking[0]}: "{{{{ event.payload.{lacking[0]} }}}}"` to its `parameters:`'
        raise UsageError(f"a trigger of {where} gives no `{lacking[0]}`", hint=hint)
    try:
        found: DeploymentTriggerTypes = TypeAdapter(DeploymentTriggerTypes).validate_python(
            {"name": f"{flow}/{name}", "type": "event", **given}
        )
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise UsageError(f"a trigger of {where}: {told}", hint="correct it; docs/flows.md has one") from None
    return found


def _check(what: str, given: Iterable[str], known: Iterable[str], where: str) -> None:
    choices = list(known)
    for name in given:
        if name not in choices:
            raise errors.unknown(what, name, choices, where=where)

"""Make a server what `prefect.yaml` and the target rows ask for; what is so already is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification

from flows import deployments
from flows.api import connected
from flows.deployments import TAG, Wanted
from pipeline.errors import UsageError
from pipeline.workspace import Workspace

HEARTBEAT = "prefect.flow-run.heartbeat"
SILENT_S = 90  # three heartbeats of a worker of ours; fewer would take a busy run for a dead one
ENDINGS = ("Completed", "Failed", "Cancelled", "Crashed")


@dataclass(frozen=True)
class Change:
    """What became of one thing on the server.

    Attributes:
        kind: work pool, deployment, or automation.
        what: for one that was updated, what of it.
    """

    kind: str
    name: str
    state: Literal["created", "updated", "unchanged", "removed"]
    what: str = ""


def deploy(workspace: Workspace, *, dry: bool = False) -> list[Change]:
    """Create or update work pools, deployments and automations; with `dry`, only say what would be done.

    Raises:
        WorkspaceError, UsageError: `prefect.yaml` asks for what doesn't exist. Nothing was changed then.
        UnavailableError: the server can't be reached.
    """
    wanted = deployments.wanted(workspace)
    pools = sorted({*deployments.pools(workspace), *(one.pool for one in wanted)})
    with connected() as client:
        changes = _pools(client, pools, dry=dry)
        for one in wanted:
            changes += _deployment(client, one, dry=dry)
        changes.append(_automation(client, _silent_runs(), dry=dry))
    return changes


def _pools(client: SyncPrefectClient, names: list[str], *, dry: bool) -> list[Change]:
    there = {pool.name: pool.type for pool in client.read_work_pools()}
    found = []
    for name in names:
        if there.get(name, "process") != "process":
            raise UsageError(
                f"work pool `{name}` on the server is of type `{there[name]}`, and our workers start processes",
                hint="rename the `pool` of the rows in targets/targets.toml, or delete it: `prefect work-pool delete`",
            )
        if name not in there and not dry:
            description = f"`exportyard worker {name}` starts a worker"
            client.create_work_pool(WorkPoolCreate(name=name, type="process", description=description))
        found.append(Change("work pool", name, "unchanged" if name in there else "created"))
    return found


def _deployment(client: SyncPrefectClient, one: Wanted, *, dry: bool) -> list[Change]:
    there = _read(client, one)
    body = {**one.body, "work_pool_name": one.pool}
    if there is None:
        if dry:
            return [Change("deployment", one.title, "created"), *_new(one)]
        flow = client.create_flow_from_name(one.flow)
        answer = client.request("POST", "/deployments/", json={"name": one.name, "flow_id": str(flow), **body})
        change, key = Change("deployment", one.title, "created"), answer.json()["id"]
    else:
        now = {**there, "concurrency_limit": (there["global_concurrency_limit"] or {}).get("limit")}
        # what others have set and the file is silent about, such as a schedule, stays as it is
        differs = {key: value for key, value in body.items() if _plain(now[key]) != _plain(value)}
        if differs and not dry:
            client.request("PATCH", "/deployments/{id}", path_params={"id": there["id"]}, json=differs)
        state: Literal["updated", "unchanged"] = "updated" if differs else "unchanged"
        change, key = Change("deployment", one.title, state, ", ".join(differs)), there["id"]
    return [change, *_triggers(client, one, key, dry=dry)]


def _read(client: SyncPrefectClient, one: Wanted) -> dict[str, Any] | None:
    # not `client.read_deployment_by_name`, whose schema of parameters forgets `propertyNames`
    only = {"flows": {"name": {"any_": [one.flow]}}, "deployments": {"name": {"any_": [one.name]}}}
    found: list[dict[str, Any]] = client.request("POST", "/deployments/filter", json=only).json()
    return found[0] if found else None


def _plain(value: object) -> object:
    """`value` without what the server fills in by itself."""
    if isinstance(value, Mapping):
        return {key: found for key, one in value.items() if (found := _plain(one)) not in (None, {}, [])} or None
    if isinstance(value, list):
        return [_plain(one) for one in value] or None
    return value


def _new(one: Wanted) -> list[Change]:
    return [Change("automation", str(trigger.name), "created") for trigger in one.triggers]


def _triggers(client: SyncPrefectClient, one: Wanted, deployment: str, *, dry: bool) -> list[Change]:
    """The automations that start a deployment; those of ours that its entry no longer has are removed."""
    found = []
    for trigger in one.triggers:
        trigger.set_deployment_id(UUID(deployment))
        ours = trigger.as_automation().model_copy(update={"tags": [TAG, one.title]})
        found.append(_automation(client, ours, dry=dry))
    names = {change.name for change in found}
    for automation in client.read_automations():
        # known by its tags, since the server doesn't tell whose it is
        if {TAG, one.title} <= set(automation.tags) and automation.name not in names:
            if not dry:
                client.delete_automation(automation.id)
            found.append(Change("automation", automation.name, "removed"))
    return found


def _automation(client: SyncPrefectClient, automation: AutomationCore, *, dry: bool) -> Change:
    there = client.read_automations_by_name(automation.name)
    if not there:
        if not dry:
            client.create_automation(automation)
        return Change("automation", automation.name, "created")
    only_new = {"owner_resource"}
    # not as JSON, in which a set is a list in any order
    new, old = automation.model_dump(exclude=only_new), there[0].model_dump(exclude=only_new)
    differs = [key for key in new if _plain(new[key]) != _plain(old[key])]
    if differs and not dry:
        body = automation.model_dump(mode="json", exclude=only_new)
        client.request("PUT", "/automations/{id}", path_params={"id": there[0].id}, json=body)
    return Change("automation", automation.name, "updated" if differs else "unchanged", ", ".join(differs))


def _silent_runs() -> AutomationCore:
    """Runs of ours whose process is gone, and their worker with it, are crashed: nobody else would ever say so."""
    return AutomationCore(
        name="exportyard: a run without heartbeats has crashed",
        tags=[TAG],
        description=f"Its process and its worker are gone: nothing was heard of it for {SILENT_S} s.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{ending}" for ending in ENDINGS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.id": [f"prefect.tag.{TAG}"], "prefect.resource.role": ["tag"]}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENT_S,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"not heard of for {SILENT_S} s: its process, or its machine, is gone"
            )
        ],
    )

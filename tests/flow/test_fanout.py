"""Targets built by workers that share no disk with the process that leads the export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from flows.export import export
from flows.release import release
from pipeline import git, manifest
from tests import releases
from tests.flow import fleet as fleets
from tests.flow.fleet import Fleet
from tests.flow.test_export_flow import artifacts, task_states


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, home: Path, api_url: str) -> Iterator[Fleet]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.server import environment

    with temporary_settings({PREFECT_API_URL: api_url}):
        yield fleets.make(tmp_path_factory.mktemp("fleet"), environment(home, api_url), "fan", ("near", "far", "empty"))


def lead(fleet: Fleet, **parameters: Any) -> State[Any]:
    return export("tiny", workspace=str(fleet.leader), where="pools", return_state=True, **parameters)


@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_targets_are_built_by_the_workers_of_their_pools_and_joined_into_one_release(fleet: Fleet) -> None:
    # `far` needs what only its worker has, so the leader can't have built it
    fleet.rows(one=("near", ""), two=("far", 'needs = "FAR"'), three=("empty", ""), four=("near", 'fail = "load"'))
    with fleet.worker("near", 2) as near, fleet.worker("far", FAR="1") as far:
        state = lead(fleet, publish=True, wait_for_pool_s=4)
        assert state.is_failed()
        assert "1 of 4 targets failed, and nothing is published" in state.message
        assert "four: " in state.message
        assert fleet.tags() == []
        shown = artifacts(state.state_details.flow_run_id)
        rows = {row["target"]: row for row in json.loads(shown["tiny-targets"]["data"])}
        assert {name: row["state"] for name, row in rows.items()} == {
            "one": "passed", "two": "passed", "three": "not built here", "four": "failed"
        }  # fmt: skip
        assert rows["three"]["reason"].startswith("the pool `fan-empty` had no worker for 4 s")

        fleet.rows(one=("near", ""), two=("far", 'needs = "FAR"'), three=("empty", ""))
        state = lead(fleet, wait_for_pool_s=2)
        assert state.is_completed(), state.message
        assert state.message.startswith("published tiny@v1.0.0; 2 of 3 targets passed")
        released = manifest.load(fleet.leader / "artifacts/tiny/release")
        assert sorted(released.engines) == ["one", "two"]
        assert released.skipped["three"].startswith("not built here: the pool `fan-empty`")
        told = json.loads((fleet.leader / "artifacts/tiny/report/report.json").read_text())
        times = {one["step"]: one for one in told["timeline"]["steps"]}
        assert {"program", "engine/one/fp32", "engine/two/fp32", "latency/two"} <= set(times)
        assert told["timeline"]["unknown"] == []
        found = task_states(state, "publish")
        assert found["engine one"][0] == "Cached"
        assert "onnx fp32" in found
    assert "tiny@v1.0.0" in fleet.tags()
    for log in (near, far):
        assert "Traceback" not in log.read_text()
    assert [*fleet.home.glob("worker-*/artifacts/tiny/engine"), *fleet.home.glob("worker-*/.scratch/runs/*")] == []
    assert "up to date" in releases.dvc(fleet.leader, "status")

    # all workers are gone, and nothing has to be built
    again = lead(fleet, wait_for_pool_s=1)
    assert again.message.startswith("unchanged since tiny@v1.0.0"), again.message
    assert {state for name, (state, _) in task_states(again, "publish").items() if name.startswith("engine")} == {
        "Cached"
    }
    # nor does a release without an export leave out what only a worker could build
    found = release("tiny", workspace=str(fleet.leader), targets=["one", "two"], return_state=True)
    assert found.message.startswith("unchanged since tiny@v1.0.0"), found.message


@pytest.mark.usefixtures("on_server")
def test_what_is_not_committed_or_pushed_is_not_sent_to_workers(fleet: Fleet) -> None:
    fleet.rows(one=("near", ""))
    model = fleet.leader / "recipes/tiny/model.py"
    text = model.read_text()
    try:
        model.write_text(text + "\n")
        state = lead(fleet, publish=False)
        assert "`recipes/tiny/model.py` is not committed" in state.message
        git.run(fleet.leader, "commit", "--quiet", "-am", "unpushed")
        state = lead(fleet, publish=False)
        assert "is not at the remote `origin`" in state.message
    finally:
        model.write_text(text)
        fleet.commit()


@pytest.mark.usefixtures("on_server")
def test_a_pool_without_a_deployment_is_told_at_once(fleet: Fleet) -> None:
    fleet.rows(one=("nobody", ""))
    state = lead(fleet, publish=False)
    assert state.is_completed(), state.message
    assert "not in it: one (not built here)" in state.message

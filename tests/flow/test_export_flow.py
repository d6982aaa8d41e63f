"""The flow `export` on a real Prefect server: what it makes, what it says, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State

from flows.export import Outcome, export
from flows.server import deliver
from pipeline import manifest
from pipeline.errors import BuildError, UsageError

if TYPE_CHECKING:
    from tests.flow.conftest import Bench

TASKS = ["checkpoint", "data", "program", "onnx fp32"]


def run_flow(bench: Bench, **parameters: Any) -> State[Any]:
    return export("tiny", workspace=str(bench.root), return_state=True, **parameters)


def task_states(state: State[Any], last: str = "report") -> dict[str, tuple[str, str]]:
    """Name and message of the state of each task run of a flow run, once the server has recorded the run `last`."""
    deliver()
    only = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    limit = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while time.monotonic() < limit:
            runs = client.read_task_runs(flow_run_filter=only)
            if all(run.state and run.state.is_final() for run in runs) and last in {run.name for run in runs}:
                return {run.name: (run.state.name, run.state.message or "") for run in runs if run.state}
            time.sleep(0.1)
    raise AssertionError(f"`{last}` was not recorded: {runs}")


def has_no_task(state: State[Any]) -> bool:
    only = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    deliver()
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=only) == []


def artifacts(flow_run: Any) -> dict[str, Any]:
    """The newest artifact of each key that a flow run made."""
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"flow_runs": {"id": {"any_": [str(flow_run)]}}})
    return {one["key"]: one for one in sorted(found.json(), key=lambda one: one["created"])}


@pytest.mark.usefixtures("on_server")
def test_a_recipe_becomes_a_release_and_the_second_time_nothing_is_done(new_bench: Bench) -> None:
    bench = new_bench
    state = run_flow(bench)
    assert state.is_completed(), state.message
    assert state.message.startswith("published tiny@v1.0.0; 2 of 2 targets passed")
    expected = [*TASKS, *(f"{stage} {name}" for name in ("good", "other") for stage in ("engine", "parity", "latency"))]
    found = task_states(state, "publish")
    assert sorted(found) == sorted([*expected, "report", "publish"])
    assert {name for name, _ in found.values()} == {"Completed"}
    outcome = state.result()
    assert isinstance(outcome, Outcome)
    assert [verdict.scheme for verdict in outcome.verdicts] == ["fp32", "fp32"]
    assert bench.tags() == ["tiny@v1.0.0"]
    tried = manifest.load(bench.root / "artifacts/tiny/release").tried
    assert {name: [(one.scheme, one.outcome) for one in forms] for name, forms in tried.items()} == {
        name: [("fp32", "chosen")] for name in ("good", "other")
    }
    assert all(one.speeds and one.sqnr_db and one.size_bytes for forms in tried.values() for one in forms)
    shown = artifacts(state.state_details.flow_run_id)
    assert shown["tiny-summary"]["type"] == "table"
    assert "good" in shown["tiny-summary"]["data"]
    assert "| good | fp32 |" in shown["tiny-report"]["data"]

    again = run_flow(bench)
    assert again.message.startswith("unchanged since tiny@v1.0.0")
    found = task_states(again, "publish")
    assert {name for name, (state, _) in found.items() if state != "Cached"} == {"report"}
    assert found["engine good"] == ("Cached", "inputs unchanged")
    assert bench.tags() == ["tiny@v1.0.0"]


@pytest.mark.usefixtures("on_server")
def test_a_failing_target_leaves_the_others_standing_and_nothing_is_published(bench: Bench) -> None:
    bench.rows(good="", bad='fail = "build"')
    state = run_flow(bench)
    assert state.is_failed()
    assert "1 of 2 targets failed, and nothing is published:\n  bad: " in state.message
    error = state.result(raise_on_failure=False)
    assert error.exit_code == BuildError.exit_code
    assert [verdict.status for verdict in error.verdicts] == ["passed", "failed"]
    found = task_states(state)
    assert found["engine bad"][0] == "Failed"
    assert found["latency good"][0] == "Cached"
    assert not {"parity bad", "latency bad", "publish"} & set(found)
    assert bench.tags() == []

    bench.rows(good="", bad="")
    state = run_flow(bench)
    assert state.is_completed(), state.message
    found = task_states(state)
    assert found["engine good"][0] == "Cached"
    assert found["engine bad"][0] == "Completed"
    assert bench.tags() == ["tiny@v1.0.0"]


@pytest.mark.usefixtures("on_server")
def test_damaged_files_are_rebuilt_and_said_so(bench: Bench) -> None:
    folder = bench.root / "artifacts/tiny/engine/good/fp32"
    next(path for path in sorted(folder.iterdir()) if path.name != "artifact.json").write_bytes(b"damage")
    state = run_flow(bench, publish=False, targets=["good"])
    assert state.message.startswith("tiny is not published; 1 of 1 targets passed")
    found = task_states(state)
    assert found["engine good"][0] == "Rebuilt"
    assert "damaged" in found["engine good"][1]
    assert found["onnx fp32"][0] == "Cached"
    assert bench.tags() == []


@pytest.mark.usefixtures("on_server")
def test_a_target_that_cannot_be_built_here_is_skipped_with_its_reason(bench: Bench) -> None:
    bench.rows(good="", elsewhere='fail = "missing"')
    state = run_flow(bench, publish=False)
    assert state.is_completed(), state.message
    assert "not in it: elsewhere (not built here)" in state.message
    name, message = task_states(state)["engine elsewhere"]
    assert name == "Skipped"
    assert "the row says so" in message


@pytest.mark.usefixtures("on_server")
@pytest.mark.parametrize(
    ("recipe", "parameters", "told"),
    [
        ("tinny", {}, r"unknown recipe `tinny`.*\n\nhint: did you mean `tiny`"),
        ("tiny", {"targets": ["god"]}, r"unknown target `god`.*\n\nhint: did you mean `good`"),
        ("tiny", {"checkpoint": "nowhere.pt"}, r"there is no checkpoint `.*nowhere.pt`"),
    ],
    ids=["recipe", "target", "checkpoint"],
)
def test_a_wrong_name_fails_before_anything_runs(
    new_bench: Bench, recipe: str, parameters: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = export(recipe, workspace=str(new_bench.root), return_state=True, **parameters)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, UsageError) or "checkpoint" in parameters
    with pytest.raises(type(error), match=told):
        raise error
    assert has_no_task(state)
    assert not (new_bench.root / "artifacts" / "tiny").exists()
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err


def test_importing_the_flow_does_not_load_torch() -> None:
    code = "import sys, flows.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Faults on the way from a checkpoint to a release: nothing is half or lost, and a retry ends as if there was none.

Each test breaks something at a certain moment of an export whose target is built by a worker, and looks at all that
others could see then: tags, releases, engines, the exchange. The engines of the release that a retry makes have the
bytes of an export that nothing has disturbed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import server
from tests import extras
from tests.flow import yard as yards
from tests.flow.yard import Yard, builds, processes, runs, wait_for


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, home: Path, api_url: str) -> Iterator[Yard]:
    with temporary_settings({PREFECT_API_URL: api_url}):
        yield yards.made(tmp_path_factory.mktemp("yard"), server.environment(home, api_url))


# --- the leader is killed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_a_leader_that_is_killed_at_any_moment(yard: Yard) -> None:
    yard.rows(led="sleep_ms = 1000")
    with yard.worker():
        for point in (
            "after:pipeline.stages.capture.capture",
            "before:flows.fanout.built",
            "",
            "before:pipeline.release.publish",
            "after:pipeline.record._track",
            "before:pipeline.record._push",
            "before:pipeline.journal.move_names",
        ):
            with yard.leading(*filter(None, [point])) as process:
                if point:
                    yard.wait_at(point)
                else:
                    wait_for("a build", builds(yard, "led"))
                process.kill()
                process.join()
            yard.check()
            assert yard.fleet.tags() == []
        state = yard.export()
    assert state.is_completed(), state.message
    yard.check_released("led")


# --- a build is killed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_a_build_that_is_killed_is_started_again_by_the_leader(yard: Yard) -> None:
    yard.rows(shot="sleep_ms = 1500")
    with yard.worker(), yard.leading():
        wait_for("a build", builds(yard, "shot"))
        for process in processes(runs("shot")[0].id):
            os.kill(process, signal.SIGKILL)
        assert yard.end().startswith("COMPLETED: published ")
    assert [run.state.type.value for run in runs("shot") if run.state] == ["CRASHED", "COMPLETED"]
    assert [*yard.clone.glob(".scratch/runs/*")] == []
    yard.check_released("shot")


# --- what travels is damaged ----------------------------------------------------------------------------------------


@extras.thorough
@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_damaged_bytes_are_noticed_by_who_reads_them_and_made_again(yard: Yard) -> None:
    yard.rows(hurt="sleep_ms = 1")
    with yard.worker():
        with yard.leading("before:flows.fanout.built"):
            yard.wait_at("before:flows.fanout.built")
            yard.damage("onnx/fp32")
            yard.go_on()
            assert yard.end().startswith("FAILED")
            assert "was damaged, and is removed" in yard.end()
        yard.check(damaged=True)
        with yard.leading("before:pipeline.handover.accept"):
            yard.wait_at("before:pipeline.handover.accept")
            yard.damage("latency/hurt")
            yard.go_on()
            assert yard.end().startswith("COMPLETED: published ")
    yard.check_released("hurt")


# --- the remote is away ---------------------------------------------------------------------------------------------


@extras.thorough
@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_a_remote_that_is_away_for_a_while_is_waited_for(yard: Yard) -> None:
    model = yard.root / "recipes/tiny/model.py"
    model.write_text(model.read_text() + "# changed\n")  # so that there is something to capture
    yard.rows(waited="sleep_ms = 1500")
    leaders = yard.fleet.home / "leader.log"
    points = ("before:flows.fanout.built", "before:pipeline.handover.accept", "before:pipeline.release.publish")
    with yard.worker():
        with yard.leading("after:pipeline.stages.capture.capture", *points):
            yard.wait_at("after:pipeline.stages.capture.capture")
            with yard.without_remote(leaders):  # as the leader hands over what it has made
                yard.go_on()
            yard.wait_at(points[0])
            with yard.without_remote(yard.log):  # before the build gets its inputs
                yard.go_on()
            wait_for("a build", builds(yard, "waited"))
            with yard.without_remote(yard.log):  # as it hands over the engine
                pass
            yard.wait_at(points[1])
            with yard.without_remote(leaders):  # as the leader gets it
                yard.go_on()
            yard.wait_at(points[2])
            with yard.without_remote():
                yard.go_on()
                assert "FAILED: DVC could not record or push the release; nothing was changed" in yard.end()
        yard.check()
        state = yard.export()
    assert state.is_completed(), state.message
    yard.check_released("waited")


# --- a target fails -------------------------------------------------------------------------------------------------


@extras.thorough
@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_targets_that_fail_are_published_when_they_are_corrected(yard: Yard) -> None:
    faults = ("build", "load", "run")
    yard.rows(**{f"bad_{fault}": f'fail = "{fault}"' for fault in faults})
    before = yard.fleet.tags()
    with yard.worker():
        state = yard.export()
        assert state.is_failed()
        for fault in faults:
            assert f"target `bad_{fault}` fails in {fault}, as its row says" in state.message
        yard.check()
        assert yard.fleet.tags() == before
        yard.rows(**{f"bad_{fault}": "" for fault in faults})
        state = yard.export()
    assert state.is_completed(), state.message
    yard.check_released(*(f"bad_{fault}" for fault in faults))

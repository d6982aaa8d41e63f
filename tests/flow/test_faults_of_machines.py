"""Workers, servers, disks and remotes that die or go away for good; on a server of their own, for `make test-all`."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings

from flows import deploy, server
from pipeline.exchange import PATIENCE_S
from pipeline.workspace import Workspace
from tests import extras
from tests.flow import yard as yards
from tests.flow.yard import Yard, builds, processes, runs, wait_for

pytestmark = [pytest.mark.slow, extras.thorough]


class Served:
    """A server that can be killed, and comes back with what it knew."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.running = contextlib.ExitStack()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--analytics-off"]
        log = self.home / "server.log"
        self.process = self.running.enter_context(
            server.child(command, server.environment(self.home), log, cwd=self.home)
        )
        wait_for("the server", self.is_healthy)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/api/health")
            return connection.getresponse().status == http.client.OK
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served"))
    with found.running:
        yield found


@pytest.fixture(scope="module")
def yard(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    settings = {PREFECT_API_URL: served.url, PREFECT_HOME: served.home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "SILENT_S", 45)  # heartbeats come every 30 s
        found = yards.made(tmp_path_factory.mktemp("yard"), server.environment(served.home, served.url))
        deploy.deploy(Workspace(found.root))
        yield found


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_worker_that_ends_while_it_builds(yard: Yard, number: signal.Signals) -> None:
    name = f"left_{number.name.lower()}"
    yard.rows(**{name: f"sleep_ms = {4000 + number}"})  # equal rows would share what the first of them has built
    with yard.worker() as worker, yard.leading():
        wait_for("a build", builds(yard, name))
        os.kill(worker.pid, number)
        worker.wait()
        with yard.worker("another.log"):
            assert yard.end().startswith("COMPLETED: published "), yard.end()
    assert all(run.state and run.state.is_final() for run in runs(name))
    yard.check_released(name)


def test_a_worker_that_is_killed_with_its_build_is_missed(yard: Yard) -> None:
    yard.rows(silent="sleep_ms = 3000")
    with yard.worker() as worker, yard.leading():
        wait_for("a build", builds(yard, "silent"))
        kill(worker.pid, *processes(runs("silent")[0].id))
        with yard.worker("another.log"):
            assert yard.end().startswith("COMPLETED: published "), yard.end()
    assert [run.state.type.value for run in runs("silent") if run.state] == ["CRASHED", "COMPLETED"]
    assert [*yard.clone.glob(".scratch/runs/*")] == []
    yard.check_released("silent")


def test_a_server_that_is_killed_and_comes_back(served: Served, yard: Yard) -> None:
    yard.rows(known="sleep_ms = 3100")
    asking, publishing = "before:flows.fanout.built", "before:pipeline.release.publish"

    def restart() -> None:
        time.sleep(4)
        served.start()

    with yard.worker(), yard.leading(asking, publishing):
        yard.wait_at(asking)
        served.kill()
        yard.go_on()
        restart()
        wait_for("a build", builds(yard, "known"))
        served.kill()  # while one process works, and another waits for it
        restart()
        yard.wait_at(publishing)
        served.kill()
        yard.go_on()
        restart()
        assert yard.end().startswith("COMPLETED: published "), yard.end()
    yard.check_released("known")


def test_a_leader_that_was_killed_is_retried_by_prefect_and_finds_its_builds(yard: Yard) -> None:
    yard.rows(found="sleep_ms = 4200")
    with yard.worker(), yard.worker("lead.log", pool="lead", clone=yard.root):
        asked: Any = run_deployment("export/all", parameters={"recipe": "tiny"}, timeout=0)
        wait_for("a build", builds(yard, "found"))
        kill(*processes(asked.id))
        wait_for("the crash", lambda: state(asked.id) == "CRASHED")
        yard.check()
        command = ["prefect", "flow-run", "retry", str(asked.id)]
        subprocess.run(
            [str(server.script(command[0])), *command[1:]], env=yard.fleet.env, check=True, capture_output=True
        )
        wait_for("the end", lambda: state(asked.id) == "COMPLETED")
    assert len(runs("found")) == 1
    yard.check_released("found")


def state(run: Any) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run).state
    return "" if found is None else found.type.value


def test_a_remote_that_is_away_for_good(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    model = yard.root / "recipes/tiny/model.py"
    model.write_text(model.read_text() + "# changed\n")  # so that there is something to capture
    yard.rows(parted="sleep_ms = 1500")
    point = "after:pipeline.stages.capture.capture"
    monkeypatch.setitem(yard.fleet.env, PATIENCE_S, "1")
    with yard.worker():
        with yard.leading(point):
            yard.wait_at(point)
            with yard.without_remote():
                yard.go_on()
                assert "` can't be used: FileNotFoundError: there is no folder `" in yard.end()
        yard.check()
        with yard.leading():
            wait_for("a build", builds(yard, "parted"))
            with yard.without_remote():
                wait_for("its failure", lambda: state(runs("parted")[0].id) == "FAILED")
                assert "` can't be used: FileNotFoundError: there is no folder `" in yard.end()
        yard.check()
        monkeypatch.delitem(yard.fleet.env, PATIENCE_S)
        with yard.leading():
            assert yard.end().startswith("COMPLETED: published "), yard.end()
    yard.check_released("parted")


def test_a_worker_whose_disk_is_full(yard: Yard) -> None:
    yard.rows(roomy="")
    place = yard.clone / ".scratch/runs"
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    try:
        (place / "filler").write_bytes(bytes(200_000))
        with yard.worker():
            with yard.leading():
                assert yard.end().startswith("FAILED"), yard.end()
                assert "no space left on the disk" in yard.end()
            yard.check()
            (place / "filler").unlink()
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            with yard.leading():
                assert yard.end().startswith("COMPLETED: published "), yard.end()
    finally:
        subprocess.run(["umount", str(place)], check=True)
    yard.check_released("roomy")

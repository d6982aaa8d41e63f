"""A new checkpoint starts an export by itself, once, on a real server: told of, dropped, or announced by an event."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.numpy import save_file

from flows import deployments, notify, server
from flows.watch import watch
from pipeline import cli, digest
from pipeline.workspace import Workspace
from tests import buckets, workspaces

if TYPE_CHECKING:
    from tests.flow.conftest import Bench

POOL = "triggers"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Runs:
    """The deployments that checkpoints start, on the session's server."""

    export: UUID

    def of(self, path: Path) -> list[FlowRun]:
        """The exports of the content of a file."""
        sha256 = digest.of_file(path)
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs()
        return [
            run
            for run in found
            if run.deployment_id == self.export and str(run.parameters["checkpoint"]).startswith(f"sha256:{sha256}/")
        ]


def deployed(name: str, flow: str, entrypoint: str, root: Path) -> UUID:
    """The id of a deployment in our pool."""
    with get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        return client.create_deployment(
            flow_id=client.create_flow_from_name(flow),
            name=name,
            entrypoint=entrypoint,
            work_pool_name=POOL,
            pull_steps=[{"flows.steps.enter_workspace": {"recorded": str(root)}}],
            job_variables={"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline"}},
        )


@pytest.fixture(scope="module", autouse=True)
def _clean(api_url: str) -> None:
    """Nothing on the session's server that other tests have made and that listens to ours."""
    with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            if deployment.name in ("all", "created"):
                client.delete_deployment(deployment.id)
        for found in client.read_automations():
            if notify.EVENT in (getattr(found.trigger, "expect", None) or ()):
                client.delete_automation(found.id)


@pytest.fixture
def runs(bench: Bench, on_server: None) -> Iterator[Runs]:
    found = deployed("all", "export", "flows.export.export", bench.root)
    yield Runs(found)
    with get_client(sync_client=True) as client:
        client.delete_deployment(found)  # and its runs that nobody has begun


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming" / "tiny").mkdir(parents=True)
    return tmp_path / "incoming"


def trained(path: Path, seed: int) -> Path:
    save_file(workspaces.weights(seed), path)
    return path


def wait_for(what: str, holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < limit, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.1)
    return found


def exportyard(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints, run in this process."""
    capsys.readouterr()
    found = cli.invoke(list(arguments))
    shown = capsys.readouterr()
    assert found == code, shown.err
    return shown.err if code else shown.out


def test_a_checkpoint_starts_one_export_however_often_it_is_told_of(
    bench: Bench, runs: Runs, incoming: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained(incoming / "best.safetensors", 21)
    tell = ["notify", str(path), "--recipe", "tiny", "-C", str(bench.root)]
    assert exportyard(capsys, *tell).startswith("started http://")
    path.rename(path.with_name("final.safetensors"))
    tell[1] = str(path.with_name("final.safetensors"))
    assert exportyard(capsys, *tell).startswith("known already: http://")
    (run,) = runs.of(Path(tell[1]))
    assert run.parameters["recipe"] == "tiny"
    told = json.loads(exportyard(capsys, *tell, "--json"))
    assert (told["run"], told["fresh"], told["state"]) == (str(run.id), False, "Scheduled")
    assert exportyard(capsys, *tell, "--again").startswith("started ")
    assert len(runs.of(Path(tell[1]))) == 2
    state = watch(str(incoming), recipe="tiny", workspace=str(bench.root), return_state=True)
    assert (state.is_completed(), state.message) == (True, "nothing new")


def test_what_cannot_be_exported_is_refused_and_nothing_is_started(
    bench: Bench, incoming: Path, capsys: pytest.CaptureFixture[str], on_server: None
) -> None:
    path = trained(incoming / "best.safetensors", 22)
    tell = ["notify", str(path), "--recipe", "tiny", "-C", str(bench.root)]
    assert "no deployment `export/all`" in exportyard(capsys, *tell, code=10)
    assert "no automation of the server waits" in exportyard(capsys, *tell, "--event", code=10)
    assert "did you mean `tiny`" in exportyard(capsys, *tell[:3], "tinny", *tell[4:], code=2)
    path.write_bytes(path.read_bytes()[:-10])
    assert "truncated" in exportyard(capsys, *tell, code=5)


def test_a_server_that_is_away_is_said_to_be(bench: Bench, incoming: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained(incoming / "best.safetensors", 22)
    tell = ["notify", str(path), "--recipe", "tiny", "-C", str(bench.root)]
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        assert "can't be reached" in exportyard(capsys, *tell, code=10)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as locked:
        threading.Thread(target=locked.serve_forever, args=(0.1,), daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{locked.server_port}/api"}):
            assert "set `PREFECT_API_AUTH_STRING`" in exportyard(capsys, *tell, code=10)
        locked.shutdown()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert "no Prefect server is set" in exportyard(capsys, *tell, code=10)
        assert "no Prefect server is set" in exportyard(capsys, "watch", str(incoming), "-C", str(bench.root), code=10)


def test_the_flow_looks_once(bench: Bench, runs: Runs, incoming: Path) -> None:
    path = trained(incoming / "tiny/best.safetensors", 23)
    (incoming / "tiny/half.safetensors").write_bytes(path.read_bytes()[:-10])
    state = watch(str(incoming), workspace=str(bench.root), return_state=True)
    assert (state.is_completed(), state.message) == (True, "1 started; 1 refused")
    assert len(runs.of(path)) == 1
    shutil.rmtree(bench.root / ".scratch/watch")  # the server remembers, too
    assert watch(str(incoming), workspace=str(bench.root), return_state=True).message == "1 refused"
    assert len(runs.of(path)) == 1
    state = watch(str(incoming / "nowhere"), workspace=str(bench.root), return_state=True)
    assert state.is_failed()
    assert "there is no folder" in state.message


def test_an_event_names_a_file_a_url_or_what_is_in_the_exchange(bench: Bench, runs: Runs, incoming: Path) -> None:
    path = trained(incoming / "best.safetensors", 24)
    sha256 = digest.of_file(path)

    def created(checkpoint: str, **more: str) -> State[Any]:
        return notify.checkpoint_created("tiny", checkpoint, workspace=str(bench.root), return_state=True, **more)

    state = created(str(path), sha256="0" * 64)
    assert state.is_failed()
    assert f"its sha256 is {sha256}" in state.message
    assert created(f"sha256:{sha256[:20]}/best.safetensors").message.startswith("there is no checkpoint `sha256:")
    assert "there is no checkpoint" in created(str(incoming / "nowhere.safetensors")).message
    assert "can't read `file:///nowhere" in created("file:///nowhere.safetensors").message
    assert runs.of(path) == []
    assert created(path.as_uri(), sha256=sha256).message.startswith("started http://")
    for known in (str(path), f"sha256:{sha256}/best.safetensors"):
        state = created(known, sha256="")
        assert (state.is_completed(), state.name) == (True, "Duplicate")
    assert len(runs.of(path)) == 1


class _Locked(http.server.BaseHTTPRequestHandler):
    """A server with a password that we don't have."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        pass


class Forwarder(socketserver.ThreadingTCPServer):
    """A port of loopback that leads to a server."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, to: int) -> None:
        self.to = to
        super().__init__(("127.0.0.1", port), _Forward)


class _Forward(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.to)) as there:
            back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
            back.start()
            pump(self.request, there)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def watcher(bench: Bench, place: str, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`exportyard watch` in a process of its own, in which nothing is left running."""
    command = ["exportyard", "watch", place, "--poll", "0.3", "-C", str(bench.root)]
    with server.child(command, env, log, cwd=bench.root) as process:
        yield process


def test_a_watcher_keeps_what_it_has_to_tell_until_the_server_is_there(
    bench: Bench, runs: Runs, incoming: Path, api_url: str, prefect_env: dict[str, str], tmp_path: Path
) -> None:
    there, port, log = trained(incoming / "tiny/1.safetensors", 31), free_port(), tmp_path / "watch.log"
    env = prefect_env | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    with watcher(bench, str(incoming), env, log) as process:
        wait_for("the first try", lambda: "waiting" in log.read_text())
        later = trained(incoming / "tiny/2.safetensors", 32)
        wait_for("the second file", lambda: "whole    tiny/2" in log.read_text())
        process.send_signal(signal.SIGKILL)
    later.unlink()
    with watcher(bench, str(incoming), env, log) as process:
        wait_for("the first try", lambda: "waiting" in log.read_text())
        with Forwarder(port, int(api_url.split(":")[2].split("/")[0])) as forwarder:
            threading.Thread(target=forwarder.serve_forever, args=(0.1,), daemon=True).start()
            wait_for("both runs", lambda: log.read_text().count("started  tiny") == 2)
            forwarder.shutdown()
        process.terminate()
        assert process.wait(60) == 0
    text = log.read_text()
    assert text.index("started  tiny 1.safetensors") < text.index("started  tiny 2.safetensors")
    assert "ended; the same command goes on from there" in text
    assert "Traceback" not in text
    assert len(runs.of(there)) == 1


@contextlib.contextmanager
def automation(deployment: UUID) -> Iterator[None]:
    """What `prefect.yaml` lets start the deployment `checkpoint/created`."""
    (entry,) = [one for one in deployments.wanted(Workspace(REPOSITORY)) if one.title == "checkpoint/created"]
    (trigger,) = entry.triggers
    trigger.set_deployment_id(deployment)
    with get_client(sync_client=True) as client:
        found = client.create_automation(trigger.as_automation())
        yield
        client.delete_automation(found)


def last_state(deployment: UUID) -> State[Any] | None:
    """How the newest run of a deployment has ended."""
    with get_client(sync_client=True) as client:
        only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        (run,) = client.read_flow_runs(deployment_filter=only, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1) or [
            None
        ]
    return run.state if run is not None and run.state is not None and run.state.is_final() else None


@pytest.mark.slow
def test_a_dropped_file_becomes_a_release_and_an_event_starts_what_is_new(
    bench: Bench, runs: Runs, incoming: Path, prefect_env: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = trained(tmp_path / "trained.safetensors", 41).read_bytes()
    dropped = incoming / "tiny/best.safetensors"
    dropped.write_bytes(whole[:100])  # it is there before the watcher is, and isn't whole
    log, work = tmp_path / "watch.log", tmp_path / "worker.log"
    env = prefect_env | {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
    created = deployed("created", "checkpoint", "flows.notify.checkpoint_created", bench.root)
    command = ["prefect", "worker", "start", "--pool", POOL, "--limit", "1"]
    with server.child(command, env, work, cwd=tmp_path), watcher(bench, str(incoming), env, log), automation(created):
        wait_for("the half file", lambda: "refused  tiny/best" in log.read_text())
        with dropped.open("ab") as stream:
            for start in range(100, len(whole), 2000):
                stream.write(whole[start : start + 2000])
                stream.flush()
                time.sleep(0.3)
        state = wait_for("the end of the export", lambda: last_state(runs.export), 240)
        assert state.is_completed(), state.message
        assert bench.tags() == ["tiny@v1.0.0"]
        assert len(runs.of(dropped)) == 1

        tell = ["notify", str(dropped), "--recipe", "tiny", "--event", "-C", str(bench.root)]
        assert exportyard(capsys, *tell).startswith("sent event ")
        state = wait_for("the run of the event", lambda: last_state(created))
        assert (state.name, state.message[:14]) == ("Duplicate", "known already:")
        tell[1] = str(trained(tmp_path / "other.safetensors", 42))
        exportyard(capsys, *tell)
        wait_for("the export of the other", lambda: runs.of(Path(tell[1])))
    assert [len(runs.of(Path(path))) for path in (dropped, tell[1])] == [1, 1]
    assert "Traceback" not in log.read_text() + work.read_text()


def test_a_bucket_is_watched(bench: Bench, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with buckets.bucket(monkeypatch) as name:
        import fsspec

        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        path = trained(tmp_path / "best.safetensors", 51)
        bucket.put_file(str(path), f"{name}/models/tiny/best.safetensors")
        bucket.pipe(f"{name}/models/tiny/half.safetensors", path.read_bytes()[:-1])
        ask = {"place": f"s3://{name}/models", "workspace": str(bench.root), "return_state": True}
        assert watch(**ask).message == "1 started; 1 refused"
        assert watch(**ask).message == "1 refused"
        assert len(runs.of(path)) == 1

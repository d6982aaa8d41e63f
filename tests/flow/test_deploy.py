"""`exportyard deploy` and `exportyard worker` on real servers: what they make, refuse, say, and leave behind."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import deployments, exposure, server, steps
from flows.deploy import Change, deploy
from flows.export import export
from flows.release import release
from pipeline.errors import UnavailableError, UsageError, WorkspaceError
from pipeline.workspace import Workspace
from tests.flow.yard import processes

if TYPE_CHECKING:
    from tests.flow.conftest import Bench

SHIPPED = Path(__file__).parents[2] / "prefect.yaml"
OURS = """
pull:
  - flows.steps.enter_workspace: {recorded: here}
deployments:
  - name: tried
    entrypoint: flows.release.release
    parameters: {bump: minor}
    work_pool: {name: tried}
    concurrency_limit: {limit: 2, collision_strategy: CANCEL_NEW}
    triggers:
      - name: tried-by-event
        match: {prefect.resource.id: "tried.*"}
        expect: ["tried.made"]
        parameters: {recipe: "{{ event.payload.recipe }}"}
"""


def write(bench: Bench, text: str) -> Workspace:
    (bench.root / "prefect.yaml").write_text(text)
    return Workspace(bench.root)


def states(changes: list[Change]) -> dict[str, str]:
    return {f"{one.kind} {one.name}": one.state for one in changes if "tried" in one.name}


def read(title: str) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        flow, _, name = title.partition("/")
        path = {"flow_name": flow, "deployment_name": name}
        found: dict[str, Any] = client.request(
            "GET", "/deployments/name/{flow_name}/{deployment_name}", path_params=path
        ).json()
        return found


def wait_for(what: str, holds: Callable[[], object], seconds: float = 40) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"{what} did not come within {seconds} s"
        time.sleep(0.1)


@pytest.mark.usefixtures("on_server")
def test_a_second_deploy_changes_nothing_and_a_third_what_differs(bench: Bench) -> None:
    rows = bench.root / "targets/targets.toml"
    first, pool, last = rows.read_text().rpartition('pool = "cpu"')
    rows.write_text(first + pool.replace("cpu", "tried-gpu") + last)
    workspace = write(bench, OURS)
    all_of_it = {
        "work pool tried",
        "work pool tried-gpu",
        "deployment release/tried",
        "deployment build/tried-gpu",
        "automation tried-by-event",
    }
    planned = states(deploy(workspace, dry=True))
    assert planned == dict.fromkeys(all_of_it, "created")
    assert states(deploy(workspace)) == planned
    assert {change.state for change in deploy(workspace)} == {"unchanged"}
    found = read("release/tried")
    assert found["pull_steps"] == [{"flows.steps.enter_workspace": {"recorded": str(bench.root)}}]
    assert found["global_concurrency_limit"]["limit"] == 2

    with get_client(sync_client=True) as client:
        schedule = {"schedule": {"interval": 3600}, "active": False}
        client.request("POST", "/deployments/{id}/schedules", path_params={"id": found["id"]}, json=[schedule])
    write(bench, OURS.partition("    triggers:")[0].replace("minor", "major").replace("limit: 2", "limit: 3"))
    changes = {change.name: change for change in deploy(workspace) if change.state != "unchanged"}
    assert changes.keys() == {"release/tried", "tried-by-event"}
    assert changes["release/tried"].what == "parameters, concurrency_limit"
    assert changes["tried-by-event"].state == "removed"
    found = read("release/tried")
    assert found["parameters"] == {"bump": "major"}
    assert found["global_concurrency_limit"]["limit"] == 3
    assert len(found["schedules"]) == 1  # not ours
    with get_client(sync_client=True) as client:
        assert client.read_automations_by_name("tried-by-event") == []


@pytest.mark.usefixtures("on_server")
def test_a_misspelt_parameter_is_refused_before_anything_runs(bench: Bench, prefect_env: dict[str, str]) -> None:
    deploy(write(bench, OURS.partition("    triggers:")[0]))

    def ask(**parameters: str) -> FlowRun:
        found: Any = run_deployment("release/tried", parameters=parameters, timeout=0)
        return found  # type: ignore[no-any-return]

    with pytest.raises(PrefectHTTPStatusError, match=r"'recpie' is not one of \['recipe', 'checkpoint'"):
        ask(recpie="tiny")
    with pytest.raises(PrefectHTTPStatusError, match=r"'recipe' is a required property"):
        ask(bump="major")
    with pytest.raises(PrefectHTTPStatusError, match=r"'huge' is not one of \['patch', 'minor', 'major'\]"):
        ask(recipe="tiny", bump="huge")
    told = command(prefect_env, bench.root, "prefect", "deployment", "run", "release/tried", "-p", "recpie=x", code=1)
    assert "not found on the deployment: \n'recpie'" in told
    assert "'recipe'" in told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "bump: minor",
            "bmup: minor",
            r"unknown parameter of flow `release` `bmup` in deployment `tried` .*\n\n.*mean `bump`",
        ),
        ("{recipe: ", "{recpie: ", r"`recpie` in a trigger of deployment `tried` .*\n\nhint: did you mean `recipe`"),
        ("parameters: {recipe", "enabled: true #", r"a trigger of deployment `tried` of .* gives no `recipe`"),
        ("entrypoint", "entrypiont", r"unknown key `entrypiont` .*\n\nhint: did you mean `entrypoint`"),
        ("CANCEL_NEW", "CANCEL", r"unknown `collision_strategy` `CANCEL` in .*\n\n.*mean `CANCEL_NEW`"),
        ("release.release", "release.relaese", r"no flow at `flows.release.relaese`"),
        ("pull:", "pool:", r"unknown key `pool` in `.*prefect.yaml`\n\nhint: did you mean `pull`"),
        ("deployments:", "[", r"can't read `.*prefect.yaml`"),
        ("expect: [", "posture: Sometimes #[", r"a trigger of deployment `tried`.*: .*posture"),
    ],
)
def test_a_mistake_in_the_file_is_named(bench: Bench, old: str, new: str, told: str) -> None:
    assert old in OURS
    with pytest.raises((UsageError, WorkspaceError), match=told):
        deployments.wanted(write(bench, OURS.replace(old, new)))


def test_the_shipped_file_has_all_pools_of_the_shipped_rows() -> None:
    root = Workspace(SHIPPED.parent)
    builds = [one for one in deployments.wanted(root) if one.flow == "build"]
    listed = SHIPPED.read_text()
    assert {one.pool for one in builds} >= set(deployments.pools(root))
    assert all(f"name: {pool}," in listed for pool in deployments.pools(root))


@pytest.mark.usefixtures("on_server")
def test_a_run_enters_the_workspace_of_its_worker(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(steps.VARIABLE, str(bench.root / "recipes"))
    monkeypatch.delenv(steps.REFUSED, raising=False)
    assert steps.enter_workspace("/nowhere") == {"directory": str(bench.root)}
    assert Path.cwd() == bench.root
    monkeypatch.delenv(steps.VARIABLE)
    monkeypatch.chdir(tmp_path)
    assert steps.enter_workspace(str(bench.root)) == {"directory": str(bench.root)}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(steps.REFUSED, "")  # restored to its absence at the end
    assert steps.enter_workspace("/nowhere") == {}
    state = export("tiny", return_state=True)
    assert state.is_failed()
    assert state.message.startswith("this worker knows no workspace: `EXPORTYARD_WORKSPACE` is not set, and `/nowhere`")
    assert "hint: clone the workspace" in state.message


def command(env: dict[str, str], cwd: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(server.script(words[0])), *words[1:]],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def in_background(env: dict[str, str], cwd: Path, log: Path, *words: str) -> Iterator[int]:
    """A command started by a script with `&`, which makes it ignore Ctrl-C; the value is its process."""
    line = shlex.join([str(server.script(words[0])), *words[1:]])
    script = f"{line} > {shlex.quote(str(log))} 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], env=env, cwd=cwd, capture_output=True, check=True).stdout)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.usefixtures("on_server")
def test_a_worker_that_is_stopped_ends_its_run_and_says_so(
    bench: Bench, prefect_env: dict[str, str], tmp_path: Path
) -> None:
    bench.rows(good="", slow="sleep_ms = 60000")
    text = OURS.partition("    triggers:")[0].replace("release.release", "export.export").replace("bump: minor", "")
    deploy(write(bench, text))
    log = tmp_path / "worker.log"
    env = prefect_env | {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
    with in_background(env, bench.root, log, "exportyard", "worker", "tried") as worker:
        asked: Any = run_deployment("export/tried", parameters={"recipe": "tiny", "publish": False}, timeout=0)
        wait_for("the run", lambda: "Beginning flow run" in log.read_text())
        wait_for("the process", lambda: processes(asked.id))
        process = processes(asked.id)[0]
        os.kill(worker, signal.SIGTERM)
        wait_for("the end", lambda: not running(worker), 15)
    assert not running(process)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(asked.id)
    assert run.state is not None
    assert run.state.is_crashed()
    assert (run.state.message or "").endswith(
        "was stopped; what was finished is kept, and another run goes on from there"
    )
    assert "has stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.usefixtures("on_server")
def test_a_worker_that_a_script_has_started_hears_ctrl_c(
    bench: Bench, prefect_env: dict[str, str], tmp_path: Path
) -> None:
    deploy(write(bench, OURS.partition("    triggers:")[0]))
    log = tmp_path / "worker.log"
    with in_background(prefect_env, bench.root, log, "exportyard", "worker", "tried") as worker:
        wait_for("the worker", lambda: "started!" in log.read_text())
        os.kill(worker, signal.SIGINT)
        wait_for("the end", lambda: not running(worker), 15)
    assert "has stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.usefixtures("on_server")
def test_a_worker_of_a_pool_that_does_not_exist_names_the_nearest(bench: Bench, prefect_env: dict[str, str]) -> None:
    deploy(write(bench, OURS))
    told = command(prefect_env, bench.root, "exportyard", "worker", "tired", code=2)
    assert "unknown work pool `tired`" in told
    assert "did you mean `tried`?" in told


@pytest.mark.slow
def test_the_documented_commands_do_the_whole_job_behind_a_password(bench: Bench, tmp_path: Path) -> None:
    """From an empty PREFECT_HOME; and the password stays between the environment and the server."""
    secret = secrets.token_hex(16)
    write(bench, SHIPPED.read_text())
    bench.rows(good="")
    with server.local_server(tmp_path / "home", f"yard:{secret}") as url:
        home = tmp_path / "home"
        env = server.environment(home, url) | {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
        told = command(env, bench.root, "exportyard", "deploy", code=UnavailableError.exit_code)
        assert "set `PREFECT_API_AUTH_STRING`" in told
        env["PREFECT_API_AUTH_STRING"] = f"yard:{secret}"
        said = [command(env, bench.root, "exportyard", "deploy")]
        logs = [tmp_path / "lead.log", tmp_path / "cpu.log"]
        with (
            in_background(env, bench.root, logs[0], "exportyard", "worker", "lead"),
            in_background(env, bench.root, logs[1], "exportyard", "worker", "cpu"),
        ):
            start = ("prefect", "deployment", "run", "export/all", "-p", "recipe=tiny", "--watch")
            said.append(command(env, bench.root, *start))
        assert bench.tags() == ["tiny@v1.0.0"]
        for log in logs:
            assert "Traceback" not in log.read_text()
    traces = [secret.encode(), base64.b64encode(f"yard:{secret}".encode())]
    assert not [text for text in said if secret in text]
    # the server's database has all parameters, states, logs and artifacts
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "prefect.db" for path in files)
    assert not [path for path in files if any(trace in path.read_bytes() for trace in traces)]


@pytest.mark.parametrize("password", [None, "yard:secret"], ids=["open", "password"])
def test_doctor_knows_who_else_can_use_the_server(password: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if password else 200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        port = listening.server_port
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_API_AUTH_STRING: password}):
            assert exposure.warning() is None
            # as if it were the address of another machine
            monkeypatch.setattr(exposure, "_is_loopback", lambda host: False)
            told = exposure.warning() or ""
            assert ("crosses the network unencrypted" if password else "open to everybody") in told
        listening.shutdown()


@pytest.mark.usefixtures("on_server")
def test_the_flow_release_publishes_what_has_passed_and_builds_nothing(bench: Bench) -> None:
    shutil.rmtree(bench.root / "artifacts/tiny/engine/other")
    state = release("tiny", workspace=str(bench.root), return_state=True)
    assert state.is_failed()
    assert "other: fp32 `other/fp32` is not up to date" in state.message
    assert not (bench.root / "artifacts/tiny/engine/other/fp32/artifact.json").exists()
    state = release("tiny", targets=["good"], workspace=str(bench.root), return_state=True)
    assert state.message == "published tiny@v1.0.0"
    state = release("tiny", targets=["good"], bump="major", workspace=str(bench.root), return_state=True)
    assert state.message == "unchanged since tiny@v1.0.0"
    assert bench.tags() == ["tiny@v1.0.0"]

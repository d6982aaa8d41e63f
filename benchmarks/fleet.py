"""A fleet on one machine, measured: what a server, leaders and workers cost, and where that bends.

``python benchmarks/fleet.py --recipes 5 --workers 4 --database postgresql`` makes a workspace of that many recipes
(weights of their own, each) and eight target rows of the backend `echo`, a Prefect server, a worker that leads and
workers that build, each with a clone of its own; asks for an export of each recipe, all at once; and prints what it
took. The engines are copies and the rows are alike, so that nearly all of it is the cost of being a fleet.

``--costs`` exports one recipe by the command line, by the flow in one process and by the flow over the workers instead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import server
from flows.deploy import deploy
from pipeline import git, initial
from pipeline.workspace import Workspace
from tests import postgresql, workspaces

REQUEST = re.compile(r'"([A-Z]+) (/api[^ ?"]*)')
STAGES = frozenset(
    {"checkpoint", "data", "program", "onnx", "inputs", "engine", "parity", "latency", "report", "publish"}
)
OURS = "POST /api/flow_runs/count"  # only this benchmark asks that
SAMPLE_S = 1.0
IDLE_S = 20.0
TRACES = "PREFECT_SERVER_LOGGING_LEVEL"
FLOW = """
import logging, sys
from flows.export import export
state = export(sys.argv[1], workspace=sys.argv[2], where=sys.argv[3], publish=False, return_state=True)
from flows.server import deliver
deliver()
sys.exit(not state.is_completed() and str(state.message))
"""


@dataclass
class Meter:
    """CPU and memory of this process's children and what they start, by what they do.

    Attributes:
        memory_mb: the most that each used at once, in RAM; what processes share is counted once.
        largest_mb: the largest process that each started.
    """

    postgres: int | None
    memory_mb: dict[str, float] = field(default_factory=dict)
    largest_mb: dict[str, float] = field(default_factory=dict)

    def roles(self) -> dict[str, list[psutil.Process]]:
        """The processes of each role."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                role = self._role(process)
                if role is not None:
                    found.setdefault(role, []).append(process)
        return found

    def _role(self, process: psutil.Process) -> str | None:
        if process.pid == self.postgres:
            return "postgresql"
        command = " ".join(process.cmdline())
        known = {"server start": "server", "worker lead": "leaders", "worker cpu": "workers"}
        return next((role for words, role in known.items() if words in command), None)

    def cpu_s(self) -> dict[str, float]:
        """Seconds so far, of each role; a run counts when it has ended."""
        return {role: sum(_cpu_s(one) for one in found) for role, found in self.roles().items()}

    def look(self) -> None:
        """Remember what is used now, if it is more than before."""
        for role, found in self.roles().items():
            sizes = []
            with contextlib.suppress(psutil.Error):
                everyone = [*found, *(child for one in found for child in one.children(recursive=True))]
                sizes = [one.memory_full_info().pss / 1e6 for one in everyone]
            self.memory_mb[role] = max(self.memory_mb.get(role, 0), sum(sizes))
            self.largest_mb[role] = max(self.largest_mb.get(role, 0), *sizes, 0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look all the time."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_S):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    running = 0.0
    with contextlib.suppress(psutil.Error):
        # PostgreSQL's and a worker's children that have not ended
        running = sum(sum(child.cpu_times()[:4]) for child in process.children(recursive=True))
    return float(sum(times[:4])) + running


@dataclass(frozen=True)
class Yard:
    """The fleet, up and running.

    Attributes:
        database: the server's, if it is PostgreSQL.
    """

    home: Path
    leader: Path
    recipes: list[str]
    env: dict[str, str]
    meter: Meter
    database: str | None

    def requests(self) -> Counter[str]:
        """What the server has been asked so far, by route."""
        text = (self.home / "prefect/server.log").read_text(errors="replace")
        routes = (f"{verb} {re.sub(r'[0-9a-f-]{36}', 'ID', path)}" for verb, path in REQUEST.findall(text))
        return Counter(route for route in routes if route != OURS)

    def database_mb(self) -> float:
        """How large the server's database is."""
        if self.database is None:
            return sum(path.stat().st_size for path in (self.home / "prefect").glob("prefect.db*")) / 1e6

        async def size() -> int:
            import asyncpg

            found = await asyncpg.connect(str(self.database).replace("+asyncpg", ""))
            try:
                return int(await found.fetchval("select pg_database_size(current_database())"))
            finally:
                await found.close()

        return asyncio.run(size()) / 1e6


@contextlib.contextmanager
def yard(options: argparse.Namespace) -> Iterator[Yard]:
    """Everything that is needed, and nothing that stays."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True)))
        recipes = [f"r{number:02d}" for number in range(options.recipes)]
        leader = workspace(home, recipes, options.targets)
        settings, url, pid = {TRACES: "INFO"}, None, None
        if options.database == "postgresql":
            url, pid = stack.enter_context(postgresql.database())
            settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
        api = stack.enter_context(server.local_server(home / "prefect", settings=settings))
        env = server.environment(home / "prefect", api)
        env |= {"OMP_NUM_THREADS": "1"}
        stack.enter_context(temporary_settings({PREFECT_API_URL: api, PREFECT_HOME: home / "prefect"}))
        deploy(Workspace(leader))
        pools = [("lead", leader, options.leaders)] if options.leaders else []
        for number in range(options.workers):
            clone = home / f"clone{number}"
            git.run(home, "clone", "--quiet", str(home / "origin.git"), str(clone))
            pools.append(("cpu", clone, 1))
        for pool, folder, limit in pools:
            command = ["exportyard", "worker", pool, "-C", str(folder), "--limit", str(limit)]
            stack.enter_context(server.child(command, env, home / f"{pool}-{folder.name}.log", cwd=home))
        until("the workers", lambda: _online() == len(pools))
        yield Yard(home, leader, recipes, env, Meter(pid), url)


def workspace(home: Path, recipes: Sequence[str], targets: int) -> Path:
    """A workspace under git and DVC, with a remote of each."""
    rows = "".join(workspaces.echo_row(f"t{number}") for number in range(targets))
    leader = workspaces.tiny(home / "leader", rows=rows)
    for number, name in enumerate(recipes):
        folder = leader / "recipes" / name
        shutil.copytree(leader / "recipes/tiny", folder)
        settings = folder / "recipe.toml"
        settings.write_text(settings.read_text().replace('name = "tiny"', f'name = "{name}"'))
        save_file(workspaces.weights(number), folder / "weights.safetensors")
    shutil.rmtree(leader / "recipes/tiny")
    workspaces.under_git(leader)
    initial.init(leader, home / "remote")
    git.run(leader, "add", "--all", ".")
    git.run(leader, "commit", "--quiet", "--allow-empty", "-m", "workspace")
    git.run(home, "clone", "--quiet", "--bare", str(leader), str(home / "origin.git"))
    git.run(leader, "remote", "add", "origin", str(home / "origin.git"))
    git.run(leader, "fetch", "--quiet", "origin")
    return leader


def _online() -> int:
    with get_client(sync_client=True) as client:
        return sum(len(client.read_workers_for_work_pool(pool)) for pool in ("lead", "cpu"))


def until(what: str, holds: Callable[[], object], seconds: float = 300.0) -> None:
    """Return as soon as `holds` does."""
    limit = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > limit:
            sys.exit(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.2)


# --- many recipes, all at once --------------------------------------------------------------------------------------


def simulate(options: argparse.Namespace) -> None:
    """Ask for all exports and print what they took."""
    with yard(options) as found:
        load = os.getloadavg()[0]
        cpu, requests, begun = found.meter.cpu_s(), found.requests(), time.monotonic()
        time.sleep(IDLE_S)
        idle = (found.meter.cpu_s()["server"] - cpu["server"]) / (time.monotonic() - begun)
        asked = sum((found.requests() - requests).values()) / (time.monotonic() - begun)
        print(
            f"nothing to do, {options.workers + 1} workers: server {idle:.1%} of a core, {asked:.1f} requests a second"
        )
        cpu, requests, database, begun = found.meter.cpu_s(), found.requests(), found.database_mb(), time.monotonic()
        with found.meter.watching():
            for name in found.recipes:
                run_deployment("export/all", parameters={"recipe": name}, timeout=0)
            _wait(found, options, begun)
        wall = time.monotonic() - begun
        spent = {role: seconds - cpu.get(role, 0.0) for role, seconds in found.meter.cpu_s().items()}
        asked = found.requests() - requests
        grown = found.database_mb() - database
        exports, (builds, steps) = _runs("export"), _timeline()
        count = options.recipes * options.targets
        releases = len(git.run(found.leader, "tag", "--list").split())
        print(
            f"\n{options.recipes} recipes x {options.targets} targets, {options.workers} workers, {options.leaders} "
            f"leaders at once, {options.database}: {wall:.0f} s, {wall / count:.1f} s a build; {releases} releases; "
            f"load before {load:.1f}, our share of the cores {sum(spent.values()) / wall / (os.cpu_count() or 1):.0%}"
        )
        for message in sorted({str(run.state.message) for run in exports if not run.state.is_completed()}):
            print(f"  NOT COMPLETED: {message[:500]}")
        print("  wall of a build, s, median (worst): " + "; ".join(f"{k} {_two(v)}" for k, v in builds.items()))
        print(
            "  wall of an export's tasks, s, median (worst): " + "; ".join(f"{k} {_two(v)}" for k, v in steps.items())
        )
        print("  publish in the order of releases, s: " + " ".join(f"{one:.1f}" for one in steps.get("publish", [])))
        print("  CPU, s a build: " + "; ".join(f"{role} {seconds / count:.2f}" for role, seconds in spent.items()))
        print(
            f"  server: {spent['server'] / wall:.0%} of a core; {sum(asked.values())} requests, "
            f"{sum(asked.values()) / count:.0f} a build, {sum(asked.values()) / wall:.1f} a second; database "
            f"+{grown:.1f} MB, {grown / count * 1000:.0f} kB a build; errors in its log: {_errors(found)}"
        )
        print("  most asked: " + "; ".join(f"{route} {number}" for route, number in asked.most_common(7)))
        print("  memory, MB: " + "; ".join(f"{role} {size:.0f}" for role, size in found.meter.memory_mb.items()))
        print(
            "  largest process, MB: " + "; ".join(f"{role} {size:.0f}" for role, size in found.meter.largest_mb.items())
        )
        held = [path.stat().st_size for path in (found.home / "remote/exportyard").rglob("*") if path.is_file()]
        print(f"  exchange: {len(held)} files, {sum(held) / 1e6:.1f} MB", flush=True)


def _two(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "none"


def _errors(found: Yard) -> dict[str, int]:
    text = (found.home / "prefect/server.log").read_text(errors="replace")
    return dict(Counter(re.findall(r"database is locked|TimeoutError|OperationalError|\| ERROR|\" 5\d\d", text)))


def _wait(found: Yard, options: argparse.Namespace, begun: float) -> None:
    """Until all exports have ended."""
    told = begun
    while time.monotonic() - begun < options.limit_s:
        exports = _ended("export")
        if time.monotonic() - told > 30 or exports == len(found.recipes):
            told = time.monotonic()
            print(
                f"  {told - begun:.0f} s: {_ended('build')} of {options.recipes * options.targets} builds, "
                f"{exports} of {options.recipes} exports",
                file=sys.stderr,
            )
        if exports == len(found.recipes):
            return
        time.sleep(2)
    print(f"  stopped after {options.limit_s} s")


def _ended(flow: str) -> int:
    ends = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
    body = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"state": ends}}
    with get_client(sync_client=True) as client:
        return int(client.request("POST", "/flow_runs/count", json=body).json())


def _runs(flow: str) -> list[Any]:
    found: list[Any] = []
    with get_client(sync_client=True) as client:
        while len(found) % 200 == 0:
            body = {"flows": {"name": {"any_": [flow]}}, "limit": 200, "offset": len(found), "sort": "ID_DESC"}
            page = client.request("POST", "/flow_runs/filter", json=body).json()
            found += page
            if not page:
                break
    return [client_run(one) for one in found]


def client_run(body: dict[str, Any]) -> Any:
    """A flow run as Prefect's client has it."""
    from prefect.client.schemas.objects import FlowRun

    return FlowRun.model_validate(body)


def _timeline() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the parts of all builds, and of the tasks of all exports."""
    builds: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    with get_client(sync_client=True) as client:
        joined = {}
        for lead in sorted(_runs("export"), key=lambda run: run.end_time):
            steps.setdefault("all of it", []).append((lead.end_time - lead.start_time).total_seconds())
            for name, seconds in _tasks(client, lead.id):
                steps.setdefault(name, []).append(seconds)
            for log in client.request("POST", "/logs/filter", json=_of(lead.id, "logs")).json():
                told = re.match(r"(t\d+) passed", log["message"])
                if told:
                    joined[f"{lead.parameters['recipe']} {told[1]}"] = log["timestamp"]
        for run in _runs("build"):
            marks = {state.type.value: state.timestamp for state in client.read_flow_run_states(run.id)}
            if "COMPLETED" not in marks:
                continue
            parts = {
                "asked until taken": marks["PENDING"] - marks["SCHEDULED"],
                "taken until its flow runs": marks["RUNNING"] - marks["PENDING"],
                "flow": marks["COMPLETED"] - marks["RUNNING"],
            }
            found = {name: part.total_seconds() for name, part in parts.items()}
            found |= {f"task {name}": seconds for name, seconds in _tasks(client, run.id)}
            if run.name in joined:
                when = json.dumps(joined[run.name]).strip('"').replace("Z", "+00:00")
                found["ended until joined"] = (_time(when) - marks["COMPLETED"]).total_seconds()
            for name, seconds in found.items():
                builds.setdefault(name, []).append(seconds)
    return builds, steps


def _time(text: str) -> Any:
    from datetime import datetime

    return datetime.fromisoformat(text)


def _of(run: object, what: str) -> dict[str, Any]:
    return {what: {"flow_run_id": {"any_": [str(run)]}}, "limit": 200}


def _tasks(client: Any, run: object) -> list[tuple[str, float]]:
    body = {"flow_runs": {"id": {"any_": [str(run)]}}, "limit": 200}
    found = client.request("POST", "/task_runs/filter", json=body).json()
    named = [(one["name"].split()[0], one["total_run_time"]) for one in found]
    return [
        (name, seconds) for name, seconds in named if name in STAGES
    ]  # others stand for the runs that are waited for


# --- one recipe, three ways -----------------------------------------------------------------------------------------


def costs(options: argparse.Namespace) -> None:
    """Print what an export costs, by the command line and by the flow."""
    options.recipes, options.leaders = 1, 0
    with yard(options) as found:
        name, root = found.recipes[0], str(found.leader)
        ways = {
            "exportyard export": [str(server.script("exportyard")), "export", name, "-C", root],
            "flow, where=here": [sys.executable, "-c", FLOW, name, root, "here"],
            "flow, where=pools": [sys.executable, "-c", FLOW, name, root, "pools"],
        }
        print(f"1 recipe x {options.targets} targets, {options.workers} workers, {options.database}: seconds")
        print(f"{'':<36}{'wall':>8}{'CPU':>8}{'workers':>9}{'server':>8}{'tasks':>7}{'requests':>10}")
        for _ in range(options.rounds):
            for way, command in ways.items():
                _forget(found)
                for what in ("everything to do", "nothing to do"):
                    print(f"{way + ', ' + what:<36}" + _cost(found, command), flush=True)


def _forget(found: Yard) -> None:
    for folder in (found.leader, *found.home.glob("clone*")):
        shutil.rmtree(folder / "artifacts" / found.recipes[0], ignore_errors=True)
        shutil.rmtree(folder / ".scratch", ignore_errors=True)
    shutil.rmtree(found.home / "remote/exportyard", ignore_errors=True)


def _cost(found: Yard, command: Sequence[str]) -> str:
    before, asked, tasks, begun = found.meter.cpu_s(), found.requests(), _count("task_runs"), time.monotonic()
    process = psutil.Popen(command, env=found.env, cwd=found.home, stdout=-3, stderr=-3)
    spent = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            spent = sum(process.cpu_times()[:4])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    wall = time.monotonic() - begun
    time.sleep(3)  # runs that have said that they are done, and the server, which writes things down later
    more = {role: seconds - before[role] for role, seconds in found.meter.cpu_s().items()}
    count = sum((found.requests() - asked).values())
    return (
        f"{wall:>8.1f}{spent:>8.1f}{more['workers']:>9.1f}{more['server']:>8.1f}"
        f"{_count('task_runs') - tasks:>7}{count:>10}"
    )


def _count(what: str) -> int:
    with get_client(sync_client=True) as client:
        return int(client.request("POST", f"/{what}/count", json={}).json())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipes", type=int, default=2)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--leaders", type=int, default=4, help="how many exports are led at once (`worker lead --limit`)"
    )
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="give up after so many seconds")
    parser.add_argument("--costs", action="store_true", help="one recipe by the command line and by the flow")
    parser.add_argument("--rounds", type=int, default=1, help="of --costs")
    options = parser.parse_args()
    (costs if options.costs else simulate)(options)


if __name__ == "__main__":
    main()

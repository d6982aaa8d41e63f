"""A fleet on one machine: a leader and workers with clones of their own, which share a git remote and a DVC remote."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows import server
from pipeline import git, initial
from pipeline.workspace import ROWS
from tests import workspaces


@dataclass(frozen=True)
class Fleet:
    """See the module.

    Attributes:
        leader: the workspace in which exports are led.
        env: of processes that talk to the server.
        prefix: of the names of this fleet's pools, since all tests share a server.
    """

    home: Path
    leader: Path
    env: dict[str, str]
    prefix: str

    def pool(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def rows(self, **rows: tuple[str, str]) -> None:
        """Replace the rows, each given by the pool and more options; commit and push."""
        text = "".join(workspaces.echo_row(name, more, self.pool(pool)) for name, (pool, more) in rows.items())
        (self.leader / ROWS).write_text(text)
        self.commit()

    def commit(self) -> None:
        git.run(self.leader, "add", "--all", ".")
        git.run(self.leader, "commit", "--quiet", "--allow-empty", "-m", "change")
        git.run(self.leader, "push", "--quiet", "origin", "main")

    def clone(self, name: str) -> Path:
        """The workspace of a worker."""
        place = self.home / name
        if not place.exists():
            git.run(self.home, "clone", "--quiet", str(self.home / "origin.git"), str(place))
        return place

    def tags(self) -> list[str]:
        return git.run(self.leader, "tag", "--list").split()

    @contextlib.contextmanager
    def worker(self, pool: str, limit: int = 1, **env: str) -> Iterator[Path]:
        """A worker of a pool; the value is its log."""
        clone = self.clone(f"worker-{pool}")
        log = self.home / f"{pool}.log"
        command = ["prefect", "worker", "start", "--pool", self.pool(pool), "--limit", str(limit)]
        settings = {"EXPORTYARD_WORKSPACE": str(clone), "PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
        with server.child(command, self.env | settings | env, log, cwd=self.home):
            wait_for("a worker", lambda: "started!" in log.read_text())
            yield log


def wait_for(what: str, holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as `holds` does."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.1)


def make(home: Path, env: dict[str, str], prefix: str, pools: tuple[str, ...]) -> Fleet:
    """A fleet whose pools and deployments are on the server that the current settings name."""
    leader = workspaces.under_git(workspaces.tiny(home / "leader"))
    initial.init(leader, home / "remote")
    git.run(home, "clone", "--quiet", "--bare", str(leader), str(home / "origin.git"))
    git.run(leader, "remote", "add", "origin", str(home / "origin.git"))
    git.run(leader, "fetch", "--quiet", "origin")
    found = Fleet(home, leader, env, prefix)
    for pool in pools:
        deploy(found.pool(pool))
    return found


def deploy(pool: str) -> None:
    """A process pool, and the deployment ``build/<pool>`` in it."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        flow = client.create_flow_from_name("build")
        client.create_deployment(
            flow_id=flow,
            name=pool,
            entrypoint="flows.build.build",
            work_pool_name=pool,
            pull_steps=[{"flows.steps.enter_workspace": {"recorded": "/nowhere"}}],
            job_variables={"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline"}},
        )


def forget(fleet: Fleet) -> None:
    """Remove what the leader has made and remembers."""
    shutil.rmtree(fleet.leader / "artifacts" / "tiny", ignore_errors=True)

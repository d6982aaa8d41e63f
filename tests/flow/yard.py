"""A fleet to break things in, and what everybody may rely on whatever is broken."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun, State

from flows import server
from flows.export import export
from pipeline import digest, git, manifest, pull, run, store
from pipeline.types import Artifact
from pipeline.workspace import Workspace
from tests import releases
from tests.flow import fleet as fleets
from tests.flow import leader
from tests.flow.fleet import Fleet

AWAY = "the remote is away (there is no folder"


@dataclass
class Yard:
    """A fleet with one pool, and what is known of it.

    Attributes:
        good: digests of the files of an engine that was built undisturbed.
        seen: tags of which all has been looked at.
    """

    fleet: Fleet
    good: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        return self.fleet.leader

    @property
    def remote(self) -> Path:
        return self.fleet.home / "remote"

    @property
    def clone(self) -> Path:
        return self.fleet.clone("worker-near")

    def rows(self, **rows: str) -> None:
        """Replace the rows, each given by more options."""
        self.fleet.rows(**{name: ("near", options) for name, options in rows.items()})

    def export(self, **parameters: Any) -> State[Any]:
        """In this process."""
        return export("tiny", workspace=str(self.root), where="pools", return_state=True, **parameters)

    def leading(self, *points: str, **parameters: Any) -> contextlib.AbstractContextManager[Any]:
        """In a process of its own, see `leader.leading`."""
        return leader.leading(self.root, self.fleet.env, *points, **parameters)

    def wait_at(self, point: str) -> None:
        """Until the leader is held there."""
        held = self.root / leader.HELD
        wait_for(point, lambda: held.exists() and held.read_text() == point)

    def go_on(self) -> None:
        (self.root / leader.HELD).unlink()

    def end(self, seconds: float = 240) -> str:
        """What the leader has ended in."""
        wait_for("the end", lambda: leader.said(self.root), seconds)
        return leader.said(self.root)

    @property
    def log(self) -> Path:
        """Of the worker."""
        return self.fleet.home / "worker.log"

    @contextlib.contextmanager
    def without_remote(self, log: Path | None = None) -> Iterator[None]:
        """The remote is away; with `log`, until that tells of it once more."""
        told = 0 if log is None else log.read_text().count(AWAY)
        away = self.remote.rename(self.remote.with_name("away"))
        try:
            yield
            if log is not None:
                wait_for("a warning", lambda: log.read_text().count(AWAY) > told)
        finally:
            assert not self.remote.exists(), "somebody has made another one"
            away.rename(self.remote)

    @contextlib.contextmanager
    def worker(
        self, log: str = "worker.log", pool: str | None = None, clone: Path | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of ours, for the fleet's pool unless another one is named."""
        place, output = clone or self.clone, self.fleet.home / log
        command = ["exportyard", "worker", pool or self.fleet.pool("near"), "--limit", "2", "-C", str(place)]
        settings = {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
        with server.child(command, self.fleet.env | settings, output, cwd=self.fleet.home) as process:
            wait_for("a worker", lambda: "started!" in output.read_text())
            yield process

    def damage(self, step: str) -> None:
        """Change a byte of the files of an artifact in the exchange, which nobody has at hand."""
        made = self.root / "artifacts/tiny" / step / store.MANIFEST
        if made.exists():
            reference = digest.of_file(made)
        else:
            note = max((self.remote / "exportyard/notes").glob("*"), key=lambda path: path.stat().st_mtime)
            reference = json.loads(note.read_text())["steps"][step]
        artifact = Artifact.model_validate_json(self.handed(reference).read_text())
        for fact in artifact.files.values():
            path = self.handed(fact.sha256)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            for place in (self.root, self.clone):
                (place / ".scratch/exchange" / fact.sha256).unlink(missing_ok=True)

    # --- what everybody may rely on, at any time -------------------------------------------------------------------

    def check(self, *, damaged: bool = False) -> None:
        """Nothing that others see is half; where something was `damaged`, it is gone from the exchange."""
        for folder in (self.root / "artifacts/tiny").glob("engine/*/[!.]*"):
            assert store.damage(folder, store.load(folder).artifact) is None
        for path in (self.remote / "exportyard/files").glob("*/*"):
            if "." not in path.name:  # what a killed process was writing
                assert digest.of_file(path) == path.name
        for path in (self.remote / "exportyard/keys").glob("*"):
            if "." not in path.name and not damaged:
                self.check_described(path.read_text())
        self.check_tags(self.root)
        self.check_tags(self.fleet.home / "origin.git")

    def check_described(self, reference: str) -> None:
        artifact = Artifact.model_validate_json(self.handed(reference).read_text())
        for fact in artifact.files.values():
            assert self.handed(fact.sha256).stat().st_size == fact.size_bytes

    def handed(self, sha256: str) -> Path:
        return self.remote / "exportyard/files" / sha256[:2] / sha256

    def check_tags(self, repository: Path) -> None:
        for tag in git.run(repository, "tag", "--list").split():
            if f"{repository} {tag}" not in self.seen:
                to = self.fleet.home / "pulled" / str(len(self.seen))
                pulled = pull.fetch(repository, "tiny", tag.partition("@")[2], None, to)
                assert pulled.targets
                self.seen.add(f"{repository} {tag}")

    def check_released(self, *targets: str) -> None:
        """The last release has these targets, with good engines; nothing of it is only here, or not as it was."""
        self.check()
        found = manifest.load(self.root / "artifacts/tiny/release")
        assert sorted(found.engines) == sorted(targets)
        for name, engine in found.engines.items():
            files = {file.path.removeprefix(f"engines/{name}/"): file.sha256 for file in engine.files}
            assert files == self.good
        tag = f"tiny@v{found.version}"
        for repository in (self.root, self.fleet.home / "origin.git"):
            assert f"{repository} {tag}" in self.seen
        assert git.run(self.root, "status", "--porcelain") == ""
        assert "up to date" in releases.dvc(self.root, "status")


def wait_for(what: str, holds: Callable[[], object], seconds: float = 180) -> None:
    """As that of fleets, for machines that have much else to do."""
    fleets.wait_for(what, holds, seconds)


def made(home: Path, env: dict[str, str]) -> Yard:
    """A yard, in which one target was built by the command line's functions, and nothing is remembered of it."""
    # a machine of its own, as it were: measuring waits for no one but its own builds
    found = Yard(fleets.make(home, env | {"TMPDIR": str(home)}, "fault", ("near",)))
    found.rows(undisturbed="")
    verdict = run.export(run.prepare(Workspace(found.root), "tiny"))[0]
    assert verdict.engine is not None
    found.good = {name: fact.sha256 for name, fact in verdict.engine.artifact.files.items()}
    fleets.forget(found.fleet)
    return found


def runs(target: str) -> list[FlowRun]:
    """Runs that build `target`, the oldest first."""
    with get_client(sync_client=True) as client:
        only = FlowRunFilter(name=FlowRunFilterName(any_=[f"tiny {target}"]))
        found = client.read_flow_runs(flow_run_filter=only)
    return sorted(found, key=lambda run: str(run.created))


def processes(run: UUID) -> list[int]:
    """Of a flow run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"PREFECT__FLOW_RUN_ID={run}".encode() in place.read_bytes():
                found.append(int(place.parent.name))
    return found


def builds(yard: Yard, target: str) -> Callable[[], bool]:
    """Whether a worker is in the midst of building `target`."""
    return lambda: any(yard.clone.glob(f".scratch/runs/*/artifacts/tiny/engine/{target}/.fp32.*.tmp"))

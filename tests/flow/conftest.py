"""One real Prefect server for the whole session, and a workspace whose recipe is built in a second."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_LOGGING_EXTRA_LOGGERS,
    temporary_settings,
)

from flows.server import deliver, environment, local_server
from pipeline import git, initial, run
from pipeline.workspace import ROWS, Workspace
from tests import workspaces


class Bench:
    """A workspace with the recipe `tiny` and rows of the backend `echo`, under git and DVC, with a remote."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def rows(self, **options: str) -> None:
        """Replace the target rows, given by their names and options, and commit."""
        text = "".join(workspaces.echo_row(name, more) for name, more in options.items())
        (self.root / ROWS).write_text(text)
        self.commit()

    def commit(self) -> None:
        git.run(self.root, "add", "--all", ".")
        if not git.succeeds(self.root, "diff", "--cached", "--quiet"):
            git.run(self.root, "commit", "--quiet", "-m", "change")

    def tags(self) -> list[str]:
        """Releases, by their git tags."""
        return git.run(self.root, "tag", "--list").split()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench whose targets `good` and `other` were exported by the command line's functions; not to be changed."""
    root = tmp_path_factory.mktemp("exported") / "bench"
    workspaces.under_git(workspaces.tiny(root))
    initial.init(root, root.parent / "remote")
    Bench(root).rows(good="", other="")
    run.export(run.prepare(Workspace(root), "tiny"))
    return root


@pytest.fixture
def bench(exported: Path, tmp_path: Path) -> Bench:
    """A workspace where all is up to date, and nothing is published."""
    shutil.copytree(exported, tmp_path / "bench", symlinks=True)
    return Bench(tmp_path / "bench")


@pytest.fixture
def new_bench(bench: Bench) -> Bench:
    """A workspace where nothing has been made yet."""
    shutil.rmtree(bench.root / "artifacts" / "tiny")
    return bench


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def api_url(home: Path) -> Iterator[str]:
    with local_server(home) as url:
        yield url
        deliver()


@pytest.fixture
def prefect_env(home: Path, api_url: str) -> dict[str, str]:
    """For processes that talk to the session's server."""
    return environment(home, api_url)


@pytest.fixture
def on_server(home: Path, api_url: str) -> Iterator[None]:
    """Flows of this process run on the session's server; without the heartbeat, whose end takes a second a run."""
    settings = {
        PREFECT_API_URL: api_url,
        PREFECT_HOME: home,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_LOGGING_EXTRA_LOGGERS: "pipeline",
    }
    with temporary_settings(settings):
        yield
        deliver()

"""A Prefect server that keeps everything in PostgreSQL, as docs/scale.md sets it up: from a deploy to a release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_LOGGING_EXTRA_LOGGERS,
    temporary_settings,
)

from flows import server
from flows.deploy import deploy
from flows.export import export
from pipeline.workspace import Workspace
from tests import postgresql

if TYPE_CHECKING:
    from tests.flow.conftest import Bench


@pytest.mark.slow
@pytest.mark.skipif(postgresql.missing() is not None, reason=str(postgresql.missing()))
def test_from_a_deploy_to_a_release(new_bench: Bench, tmp_path: Path) -> None:
    new_bench.rows(one="")
    home, log = tmp_path / "prefect", tmp_path / "worker.log"
    with (
        # what is lost when the machine loses power is lost
        postgresql.database("fsync=off") as (database, _),
        server.local_server(home, settings={"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}) as api_url,
        temporary_settings(
            {
                PREFECT_API_URL: api_url,
                PREFECT_HOME: home,
                PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its end takes a second a run
                PREFECT_LOGGING_EXTRA_LOGGERS: "pipeline",
            }
        ),
    ):
        workspace = Workspace(new_bench.root)
        assert {change.state for change in deploy(workspace)} == {"created"}
        assert {change.state for change in deploy(workspace)} == {"unchanged"}
        env = server.environment(home, api_url) | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
        command = ["exportyard", "worker", "cpu", "-C", str(new_bench.root)]
        with server.child(command, env, log, cwd=tmp_path):
            state = export("tiny", workspace=str(new_bench.root), where="pools", wait_for_pool_s=60, return_state=True)
            server.deliver()
        assert state.is_completed(), f"{state.message}\n{log.read_text()}"
        assert state.message == "published tiny@v1.0.0; 1 of 1 targets passed"
    assert list(home.glob("*.db*")) == []  # nothing went to SQLite
    assert database not in (home / "server.log").read_text()

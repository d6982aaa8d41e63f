"""An export that is led in a process of its own, which can be killed, or held at a point of its work."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HELD = ".scratch/held"
SAID = ".scratch/said"
_FORKS = multiprocessing.get_context("forkserver")
# imported once, by the process from which all leaders are forked
_FORKS.set_forkserver_preload(["flows.export", "pipeline.stages.capture", "pipeline.stages.to_onnx", "dvc.repo"])


@contextlib.contextmanager
def leading(root: Path, env: dict[str, str], *points: str, **parameters: Any) -> Iterator[BaseProcess]:
    """A leader of an export of `tiny` in the workspace `root`.

    Args:
        env: names the server, see `server.environment`.
        points: where it waits, once at each, as long as there is a file `HELD`, which says at which:
            ``before:package.module.name``, or ``after:...``.
    """
    for name in (HELD, SAID):
        (root / name).unlink(missing_ok=True)
    process = _FORKS.Process(target=_lead, args=(root, env, points, parameters), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def said(root: Path) -> str:
    """The state that the leader has ended in: its type and message; empty if it has not."""
    place = root / SAID
    return place.read_text() if place.exists() else ""


def _lead(root: Path, env: dict[str, str], points: tuple[str, ...], parameters: dict[str, Any]) -> None:
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        PREFECT_LOGGING_EXTRA_LOGGERS,
        temporary_settings,
    )

    from flows.export import export
    from flows.server import deliver

    output = os.open(root.parent / "leader.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    for point in points:
        _hold(point, root / HELD)
    settings = {
        PREFECT_API_URL: env["PREFECT_API_URL"],
        PREFECT_HOME: env["PREFECT_HOME"],
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its end takes a second a run
        PREFECT_LOGGING_EXTRA_LOGGERS: "pipeline",
    }
    os.environ.update(env)
    with temporary_settings(settings):
        state = export("tiny", workspace=str(root), where="pools", return_state=True, **parameters)
        deliver()
    (root / SAID).parent.mkdir(parents=True, exist_ok=True)
    fresh = root / f"{SAID}.tmp"
    fresh.write_text(f"{state.type.value}: {state.message}")
    fresh.replace(root / SAID)


def _hold(point: str, held: Path) -> None:
    when, _, where = point.partition(":")
    module, _, name = where.rpartition(".")
    place = importlib.import_module(module)
    original = getattr(place, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        setattr(place, name, original)
        if when == "before":
            _wait(held, point)
        found = original(*arguments, **options)
        if when == "after":
            _wait(held, point)
        return found

    setattr(place, name, slow)


def _wait(held: Path, point: str) -> None:
    held.parent.mkdir(parents=True, exist_ok=True)
    held.write_text(point)
    while held.exists():
        time.sleep(0.02)

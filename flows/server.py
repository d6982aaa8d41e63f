"""A Prefect server of our own on loopback, that is gone when it is no longer needed.

``python -m flows.server COMMAND ...`` becomes COMMAND as a child process should be: it hears Ctrl-C even where
its parent doesn't, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline.errors import UnavailableError

START_LIMIT_S = 90.0
STOP_LIMIT_S = 10.0
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def local_server(
    home: Path, password: str | None = None, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """A Prefect server with all its files below `home`, on a free port of 127.0.0.1; the value is its API's URL.

    It is stopped when the context ends, however that happens, Ctrl-C included. The user's own Prefect settings
    and servers are neither used nor changed.

    Args:
        password: ``name:secret``, which clients then need as their `PREFECT_API_AUTH_STRING`.
        settings: more for the server only, by the names of their environment variables.

    Raises:
        UnavailableError: it didn't answer in time; the message has the last lines of its log.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log = home / "server.log"
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
    secret = {} if password is None else {"PREFECT_SERVER_API_AUTH_STRING": password}
    env = {**environment(home), **secret, **settings}
    with child(command, env, log, cwd=home) as process:
        _wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}/api"


def environment(home: Path, api_url: str | None = None) -> dict[str, str]:
    """Environment variables for a Prefect process that uses `home` (and the server at `api_url`) and nothing else.

    Nothing is sent to Prefect's makers, and a proxy isn't asked for loopback.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    found |= {
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline",
        "DO_NOT_TRACK": "1",
    }
    direct = [name for name in found.get("NO_PROXY", found.get("no_proxy", "")).split(",") if name]
    found["NO_PROXY"] = found["no_proxy"] = ",".join(dict.fromkeys([*direct, "127.0.0.1", "localhost"]))
    if api_url is not None:
        found["PREFECT_API_URL"] = api_url
    return found


def script(name: str) -> Path:
    """A console script of this environment."""
    return Path(sys.executable).parent / name


@contextlib.contextmanager
def child(command: list[str], env: Mapping[str, str], log: Path, *, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`command` (a console script of this environment and its arguments) in a process group of its own.

    Its output goes to `log`. When the context ends, the whole group is asked to stop, and killed after
    `STOP_LIMIT_S`.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(script(command[0])), *command[1:]],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group of `process`: SIGTERM, then SIGKILL after `STOP_LIMIT_S`. Ctrl-C doesn't interrupt it."""
    heard = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
        # the leader may have left children behind
        _signal(process, signal.SIGKILL)
        process.wait()
    finally:
        if main:
            signal.signal(signal.SIGINT, heard)


def deliver() -> None:
    """Send what this process has told Prefect so far, logs and events; call it before the server stops."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=STOP_LIMIT_S)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise _not_started(f"ended with exit code {process.returncode}", log)
        if _is_healthy(port):
            return
        time.sleep(0.1)
    raise _not_started(f"did not answer within {START_LIMIT_S:.0f} s", log)


def _is_healthy(port: int) -> bool:
    # http.client and not urllib: it never asks a proxy
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _not_started(what: str, log: Path) -> UnavailableError:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    tail = "\n".join(f"  {line[:160]}" for line in lines[-4:]) or "  (it wrote nothing)"
    return UnavailableError(
        f"the local Prefect server {what}; its last words:\n{tail}",
        hint=f"the whole log is `{log}`; `exportyard export` does the same work without a server",
    )


def _become(command: list[str]) -> None:
    """Replace this process by `command`: SIGINT restored, and ended by the kernel when its parent dies (Linux).

    Strictly, when the parent's thread that started it ends: start children from the main thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(command[0], command)  # noqa: S606  # there is no shell to be careful with


if __name__ == "__main__":
    _become(sys.argv[1:])

"""A PostgreSQL of our own on loopback, in a folder that is gone afterwards; for tests and benchmarks.

It needs Debian's package ``postgresql``, nothing running, and no rights.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACES = Path("/usr/lib/postgresql")
START_LIMIT_S = 30.0


def missing() -> str | None:
    """Why there can be none here, or None."""
    return None if _folder() else "PostgreSQL is not installed (`apt-get install --no-install-recommends postgresql`)"


@contextlib.contextmanager
def database(*options: str) -> Iterator[tuple[str, int]]:
    """A database for a Prefect server, owned by an ordinary role with a password: its URL, and the server's process.

    Args:
        options: settings of PostgreSQL, such as ``fsync=off``.
    """
    with contextlib.ExitStack() as stack:
        # not below a folder of ours that only we may enter
        home = Path(tempfile.mkdtemp(prefix="postgresql-", dir="/tmp"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        as_user = _nobody(home)
        _run("initdb", "-D", str(home / "data"), "-U", "postgres", "-A", "scram-sha-256", "--no-sync",
             f"--pwfile={_password(home, as_user)}", "-E", "UTF8", "--locale=C.UTF-8", **as_user)  # fmt: skip
        port = _free_port()
        settings = [part for option in options for part in ("-c", option)]
        command = [_program("postgres"), "-D", str(home / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", str(home)]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen([*command, *settings], stdout=log, stderr=log, process_group=0, **as_user)
        stack.callback(_stop, process)
        yield _made(home, port, process), process.pid


def _made(home: Path, port: int, process: subprocess.Popen[bytes]) -> str:
    """The URL of a new database, when the server answers."""
    limit = time.monotonic() + START_LIMIT_S
    while subprocess.run([_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode:
        assert process.poll() is None, (home / "log").read_text()
        assert time.monotonic() < limit, (home / "log").read_text()
        time.sleep(0.05)
    password = secrets.token_urlsafe(16)
    said = f"CREATE ROLE prefect LOGIN PASSWORD '{password}';\nCREATE DATABASE prefect OWNER prefect;\n"
    env = {**os.environ, "PGPASSWORD": (home / "password").read_text()}
    place = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
    subprocess.run([_program("psql"), "-q", *place], input=said, text=True, env=env, check=True)
    return f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/prefect"


def _password(home: Path, as_user: dict[str, Any]) -> Path:
    path = home / "password"
    path.write_text(secrets.token_urlsafe(16))
    path.chmod(0o600)
    if as_user:
        shutil.chown(path, as_user["user"])
    return path


def _nobody(home: Path) -> dict[str, Any]:
    """As whom to start it: PostgreSQL refuses to be started by root."""
    if os.geteuid() != 0:
        return {}
    shutil.chown(home, "nobody")
    return {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": home}


def _folder() -> Path | None:
    found = shutil.which("postgres")
    if found is not None:
        return Path(found).resolve().parent
    places = sorted(PLACES.glob("*/bin/postgres"), key=lambda place: int(place.parts[-3]))
    return places[-1].parent if places else None


def _program(name: str) -> str:
    folder = _folder()
    assert folder is not None, missing()
    return str(folder / name)


def _run(name: str, *arguments: str, **options: Any) -> None:
    subprocess.run([_program(name), *arguments], check=True, capture_output=True, **options)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # its clients are sent away; at SIGTERM it would wait for them
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

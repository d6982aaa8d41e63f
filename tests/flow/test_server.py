"""The local server: it answers while it is needed, and leaves nothing behind, however the context ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import server
from pipeline.errors import UnavailableError


def alive(pid: int) -> bool:
    """Whether the process exists and hasn't ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int, limit_s: float = 10) -> bool:
    """Whether the process ends within `limit_s`."""
    limit = time.monotonic() + limit_s
    while alive(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not alive(pid)


def fake_server(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let `local_server` start a script of ours instead of Prefect's server."""
    script = folder / "prefect"
    script.write_text(f"#!{sys.executable}\n{text}")
    script.chmod(0o755)
    monkeypatch.setattr(server, "script", lambda name: folder / name)


ANSWERS = """
import http.server, sys, os, subprocess
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
child = subprocess.Popen(["sleep", "30"])
open("pids", "w").write(f"{os.getpid()} {child.pid}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def raise_in_a_server(home: Path) -> None:
    with server.local_server(home) as url:
        raise LookupError(url)


def test_the_server_and_its_children_end_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path, monkeypatch, ANSWERS)
    with pytest.raises(LookupError, match=r"http://127\.0\.0\.1:\d+/api") as caught:
        raise_in_a_server(tmp_path / "home")
    assert all(gone(int(pid)) for pid in (tmp_path / "home/pids").read_text().split())
    port = int(str(caught.value).rsplit(":", 1)[1].removesuffix("/api"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_deaf_server_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    fake_server(tmp_path, monkeypatch, deaf + ANSWERS)
    monkeypatch.setattr(server, "STOP_LIMIT_S", 0.5)
    with server.local_server(tmp_path / "home"):
        pids = [int(pid) for pid in (tmp_path / "home/pids").read_text().split()]
    assert all(gone(pid) for pid in pids)


def test_a_server_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path, monkeypatch, "import sys; sys.exit('the database is on fire')")
    with (
        pytest.raises(UnavailableError, match=r"ended with exit code 1.*\n.*database is on fire") as caught,
        server.local_server(tmp_path / "home"),
    ):
        pass
    assert "server.log" in str(caught.value.hint)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(tmp_path, monkeypatch, "import os, time; open('pids', 'w').write(str(os.getpid())); time.sleep(300)")
    monkeypatch.setattr(server, "START_LIMIT_S", 1.0)
    with pytest.raises(UnavailableError, match="did not answer within 1 s"), server.local_server(tmp_path / "home"):
        pass
    assert gone(int((tmp_path / "home/pids").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent only on Linux")
def test_the_server_ends_with_its_owner(tmp_path: Path, number: signal.Signals) -> None:
    fake = tmp_path / "prefect"
    fake.write_text(f"#!{sys.executable}\n{ANSWERS}")
    fake.chmod(0o755)
    owner_code = (
        "import sys, time; from pathlib import Path; from flows import server\n"
        f"folder = Path({str(tmp_path)!r}); server.script = lambda name: folder / name\n"
        "with server.local_server(folder / 'home'):\n"
        "    print('up', flush=True); time.sleep(300)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    server_pid = int((tmp_path / "home/pids").read_text().split()[0])
    os.kill(owner.pid, number)
    owner.communicate(timeout=20)
    assert gone(server_pid)


def test_the_environment_holds_no_setting_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite:////elsewhere")
    monkeypatch.setenv("NO_PROXY", "intranet")
    found = server.environment(tmp_path, "http://127.0.0.1:1/api")
    assert "PREFECT_API_KEY" not in found
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in found
    assert found["PREFECT_HOME"] == str(tmp_path)
    assert found["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert found["DO_NOT_TRACK"] == "1"

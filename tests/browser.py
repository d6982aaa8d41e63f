"""Chromium without a window, driven by its own protocol; and npm packages, installed once for all test runs."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from pipeline import digest, host
from tests import extras

PATIENCE_S = 60
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def npm_modules(example: Path) -> Path:
    """The folder node_modules of `example`, as its package-lock.json says; skips the test where npm can't get it."""
    place = host.cache_folder() / "npm" / digest.of_file(example / "package-lock.json")
    if not (place / "node_modules").exists():
        if shutil.which("npm") is None:
            extras.skip("npm is not installed")
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(example / name, fresh)
        # their scripts would load what no test needs, from places that a firewall may close
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            with contextlib.suppress(OSError):  # another test run was faster
                fresh.rename(place)
        shutil.rmtree(fresh, ignore_errors=True)
        if done.returncode != 0:
            extras.skip(f"npm can't get the packages: {done.stderr.strip()[-200:]}")
    return place / "node_modules"


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a static server for `folder`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class Page:
    """One page of a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.serial = socket, 0

    def tell(self, method: str, **parameters: object) -> dict[str, Any]:
        """One call of the DevTools protocol."""
        self.serial += 1
        self.socket.send(json.dumps({"id": self.serial, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=PATIENCE_S))
            if answer.get("id") == self.serial:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """What a JavaScript expression is as soon as it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {found}: {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def open(self, url: str) -> None:
        """Go to `url`."""
        self.tell("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def draw(self, points: list[tuple[float, float]], selector: str) -> None:
        """Press, move and release the mouse over an element; points from 0 to 1 of its width and height."""
        box = self.value(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        for place, (x, y) in enumerate([*points, points[-1]]):
            kind = {0: "mousePressed", len(points): "mouseReleased"}.get(place, "mouseMoved")
            where = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            self.tell("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **where)

    def picture(self, path: Path) -> None:
        """Write a screenshot of the whole page."""
        found = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(folder: Path, width: int = 780, height: int = 980) -> Iterator[Page]:
    """A page in a fresh Chromium, whose own files go to `folder`."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        extras.skip("chromium is not installed")
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*command, "about:blank"], stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        note, deadline = folder / "DevToolsActivePort", time.monotonic() + PATIENCE_S
        while not (note.exists() and "\n" in note.read_text()):
            assert process.poll() is None, "chromium doesn't start"
            assert time.monotonic() < deadline, "chromium doesn't answer"
            time.sleep(0.05)
        port, path = note.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as whole:
            made = Page(whole).tell("Target.createTarget", url="about:blank")["targetId"]
            where = f"ws://127.0.0.1:{port}/devtools/page/{made}"
            with connect(where, max_size=None, proxy=None) as socket:
                page = Page(socket)
                page.tell(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                yield page
            Page(whole).tell("Browser.close")
        process.wait(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()

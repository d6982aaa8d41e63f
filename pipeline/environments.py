"""Environments of their own, for converters whose pins don't fit beside ours: below the user's cache, made once."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import JsonValue

from pipeline import digest, host, store
from pipeline.errors import UnavailableError, unknown

MANIFEST = "environment.json"
NAMES = ("litert",)
PATIENCE_S = 3600  # for a download of 2 GB


def lock(name: str) -> Path:
    """The file with the exact versions of everything in the environment."""
    return Path(__file__).parent / "environments" / f"{name}.lock"


def folder(name: str) -> Path:
    """Where the environment is."""
    return host.cache_folder() / f"environment-{name}"


def python(name: str) -> Path:
    """Its interpreter."""
    return folder(name) / "bin" / "python"


def absent(name: str) -> str | None:
    """Why the environment isn't ready, and how to get it; None if it is. Cheap, and never raises."""
    try:
        found = (folder(name) / MANIFEST).read_text()
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: this user has no home
        return f"its converter is not installed (`exportyard setup {name}`)"
    if found != store.json_text(_wanted(name)):
        return f"its converter is of another version (`exportyard setup {name}` gets the right one)"
    return None


@functools.cache
def versions(name: str) -> dict[str, str]:
    """What decides the bytes of what a converter writes."""
    return {"environment": digest.of_file(lock(name)), "python": platform.python_version()}


def _wanted(name: str) -> dict[str, JsonValue]:
    return dict(versions(name))


def make(name: str, say: Callable[[str], None]) -> Path:
    """Install the environment if it isn't there; returns `folder`.

    Raises:
        UsageError: there is no such environment.
        UnavailableError: a package can't be had here.
    """
    if name not in NAMES:
        raise unknown("environment", name, NAMES)
    place = folder(name)
    if absent(name) is None:
        return place
    with store.explaining(place):
        shutil.rmtree(place, ignore_errors=True)  # without its manifest, it is half of one
        place.parent.mkdir(parents=True, exist_ok=True)
        say("a Python environment")
        _run([sys.executable, "-m", "venv", str(place)])
        say("its packages (2 GB; minutes)")
        _run([str(python(name)), "-m", "pip", "install", "--quiet", "--requirement", str(lock(name))])
        store.write_json(place / MANIFEST, _wanted(name))
    return place


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"`{' '.join(command[:4])} ...` took longer than {PATIENCE_S} s", hint="see whether the index answers"
        ) from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UnavailableError(
            f"`{' '.join(command[:4])} ...` failed: {(lines or ['no message'])[-1][:200]}",
            hint="see whether pip's index has the versions in " + str(Path(command[-1]).name),
        )

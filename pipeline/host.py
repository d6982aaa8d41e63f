"""What this machine is and has, and what its environment asks for. Probes are cheap, cached and never raise."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UsageError

MEASURE_S = "EXPORTYARD_MEASURE_S"
# import names whose distribution is called otherwise; others are looked up in the slow, complete table
_ALIASES = {"sklearn": "scikit-learn", "PIL": "pillow", "cv2": "opencv-python", "yaml": "pyyaml", "onnx_ir": "onnx-ir"}


@functools.cache
def machine() -> str:
    """Architecture by the name that target rows use: x86_64, aarch64, armv7l, riscv64 ..."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@functools.cache
def system() -> str:
    """Operating system by the name that target rows use: linux, macos, windows."""
    return {"darwin": "macos"}.get(platform.system().lower(), platform.system().lower())


@functools.cache
def cpu_features() -> frozenset[str]:
    """CPU features by Linux's names (``avx512_vnni``, ``asimddp``); empty where the kernel doesn't tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def lacking(requires: Iterable[str]) -> list[str]:
    """Those of `requires` that this CPU doesn't have; ``avx512_vnni|avx_vnni`` means one or the other."""
    return [feature for feature in requires if not cpu_features().intersection(feature.split("|"))]


@functools.cache
def cpu_name() -> str:
    """The processor's name as the kernel gives it, or the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else machine()


# read before any library can pin the main thread to one core, as TVM's thread pool does
_CORES = tuple(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def cpu_count() -> int:
    """How many cores this process may use."""
    return len(_CORES)


def cores() -> tuple[int, ...]:
    """The numbers of the cores that this process may use."""
    return _CORES


def cache_folder() -> Path:
    """Where what `exportyard setup` gets is kept, for all workspaces of this user.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exportyard"


@functools.cache
def version(distribution: str) -> str | None:
    """Installed version of a distribution, without a local part (``2.13.0+cpu`` is ``2.13.0``); None if absent."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of `distributions` that are installed."""
    return {name: found for name in distributions if (found := version(name)) is not None}


@functools.cache
def has_module(name: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def measure_s() -> float:
    """Seconds of timing, for each combination of sizes and threads: 1, or what `EXPORTYARD_MEASURE_S` says.

    Raises:
        UsageError: it says something else than a number above 0.
    """
    text = os.environ.get(MEASURE_S, "1")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{MEASURE_S} is `{text}`", hint="expected a number of seconds above 0, or leave it out")
    return seconds


def absent(module: str, distribution: str, extra: str) -> str | None:
    """Why a backend lacks a package, and which extra brings it; None where it is installed."""
    if has_module(module):
        return None
    return f"the package `{distribution}` is not installed (`pip install 'exportyard[{extra}]'`)"


@functools.cache
def distribution_of(module: str) -> str | None:
    """The installed distribution that a top-level module comes from."""
    guess = _ALIASES.get(module, module)
    if version(guess) is not None:
        return guess
    owners = _owners().get(module)
    return owners[0] if owners else None


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()

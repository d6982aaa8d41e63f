"""The NVIDIA GPU of this machine, asked of the driver's own library: neither CUDA's toolkit nor torch is needed."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline import targets
from pipeline.types import Target

DRIVER = "libcuda.so.1"
VERSION = Path("/proc/driver/nvidia/version")

# of the driver API: CUdevice_attribute
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256
NATIVE = "native"
ARCH = re.compile(r"sm(\d+)(\d)$")


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use.

    Attributes:
        capability: compute capability, as (9, 0).
        cuda: newest version of CUDA that the driver serves.
        driver: version of the driver; empty where the kernel doesn't tell, as on Jetson.
    """

    name: str
    capability: tuple[int, int]
    cuda: str
    driver: str

    @property
    def arch(self) -> str:
        """As target rows spell it: ``sm90``."""
        return "sm{}{}".format(*self.capability)


def found() -> Gpu | None:
    """The GPU, or None."""
    answer = _asked()
    return answer if isinstance(answer, Gpu) else None


def absent() -> str | None:
    """Why no GPU can be used here, or None if one can. Cheap, and never raises."""
    answer = _asked()
    return answer if isinstance(answer, str) else None


def unfit(target: Target, at_least: bool = False) -> str | None:
    """Why the GPU of this host is not that of `target`, or None if it is.

    Args:
        target: its ``arch`` is ``sm90`` and the like, or ``native`` for any; machine and platform count, too.
        at_least: a newer GPU will do.
    """
    reason = targets.unfit(target) or absent()
    if reason is not None:
        return reason
    here = found()
    assert here is not None
    if target.arch == NATIVE:
        return None
    wanted = capability_of(target.arch)
    if wanted is None:
        return f'`arch = "{target.arch}"` is no compute capability, which is written as "sm90"'
    if here.capability == wanted or (at_least and here.capability > wanted):
        return None
    return f"it is for compute capability {_spell(wanted)}, this {here.name} has {_spell(here.capability)}"


def capability_of(arch: str) -> tuple[int, int] | None:
    """(9, 0) for ``sm90``; None for any other text."""
    match = ARCH.match(arch)
    return (int(match.group(1)), int(match.group(2))) if match else None


def _spell(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


@functools.cache
def _asked() -> Gpu | str:
    return ask(DRIVER)


def ask(library: str) -> Gpu | str:
    """What the driver's library says: a GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"this host has no NVIDIA driver (`{library}`)"
    error = driver.cuInit(0)
    if error != 0:
        return f"the NVIDIA driver finds no GPU (`cuInit` gives error {error})"
    device, version = ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    errors = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    )
    if any(errors):
        return f"the NVIDIA driver does not describe its GPU (error {max(errors)})"
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), (major.value, minor.value), cuda, _driver_version())


def _driver_version() -> str:
    try:
        text = VERSION.read_text()
    except OSError:
        return ""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return match.group(1) if match else ""

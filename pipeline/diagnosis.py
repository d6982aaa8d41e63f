"""What `doctor` says: this host, its tools, and for each target what is missing and how to get it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from pipeline import backends, emulator, environments, gpu, host
from pipeline.types import Target

TOOLS: tuple[tuple[str, str], ...] = (
    ("torch", "capture and eager reference"),
    ("onnx", "the graph format"),
    ("onnxscript", "the ONNX exporter"),
    ("onnxruntime", "backend onnxruntime; calibration"),
    ("apache-tvm", "backend tvm: `pip install 'exportyard[tvm]'`"),
    ("ziglang", "linking tvm engines for other machines: `pip install ziglang`"),
    ("executorch", "backend executorch: `pip install 'exportyard[executorch]'`"),
    ("ai-edge-litert", "running litert engines: `pip install 'exportyard[litert]'`"),
    ("coremltools", "backend coreml: `pip install 'exportyard[coreml]'`"),
    ("dvc", "releases"),
    ("gto", "release tags"),
    ("prefect", "flows: `pip install 'exportyard[flows]'`"),
)
INT8_UNITS: Mapping[str, tuple[str, ...]] = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8",),
    "dot product": ("asimddp",),
    "I8MM": ("i8mm",),
}
TELLING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")


def host_rows() -> list[list[str]]:
    """What this machine is."""
    telling = [name for name in TELLING if name in host.cpu_features()]
    return [
        ["python", platform.python_version()],
        ["system", f"{host.system()} {host.machine()}"],
        ["cpu", f"{host.cpu_name()}, {host.cpu_count()} cores"],
        ["gpu", _gpu()],
        ["features", ", ".join(telling) or "none that matter here"],
        ["int8", ", ".join(_int8_units()) or "no instructions for 8-bit products, so INT8 may be slower than fp32"],
    ]


def _gpu() -> str:
    """NVIDIA's GPU, or why there is none."""
    here = gpu.found()
    if here is None:
        return f"{gpu.absent()}"
    return f"{here.name} ({here.arch}), CUDA {here.cuda}" + (f", driver {here.driver}" if here.driver else "")


def _int8_units() -> list[str]:
    """What this CPU has for products of 8-bit integers, by the names that vendors use."""
    return [name for name, features in INT8_UNITS.items() if host.cpu_features().intersection(features)]


def tool_rows() -> list[list[str]]:
    """Versions of what exportyard works with."""
    found = [[name, host.version(name) or "[yellow]missing[/]", escape(use)] for name, use in TOOLS]
    git = shutil.which("git")
    arm = "missing" if emulator.absent() else "found"
    converter = "[yellow]missing[/]" if environments.absent("litert") else "found"
    return [
        *found,
        ["litert-torch", converter, "backend litert: `exportyard setup litert`"],
        ["git", "found" if git else "[red]missing[/]", "releases; Debian package `git`"],
        [
            "emulator",
            arm if arm == "found" else f"[yellow]{arm}[/]",
            f"running tvm engines for Linux on aarch64: `{emulator.COMMAND}`",
        ],
    ]


def target_rows(rows: Mapping[str, Target]) -> list[list[str]]:
    """For each target, whether it builds and runs here, and the reason if not."""
    lines = []
    for name, target in rows.items():
        backend = backends.find(target.backend)
        missing, stopped = backend.missing(target), backend.not_runnable(target)
        state = (
            "[yellow]not here[/]" if missing else "[yellow]builds here, not run[/]" if stopped else "[green]ready[/]"
        )
        lines.append([name, state, escape(missing or stopped or "")])
    return lines


def plain(rows: Mapping[str, Target]) -> dict[str, Any]:
    """The same as JSON data."""
    return {
        "host": {line[0]: line[1] for line in host_rows()},
        "features": sorted(host.cpu_features()),
        "tools": {name: host.version(name) for name, _ in TOOLS},
        "emulator": emulator.absent() is None,
        "targets": {
            name: {
                "missing": backends.find(target.backend).missing(target),
                "not_runnable": backends.find(target.backend).not_runnable(target),
            }
            for name, target in rows.items()
        },
    }

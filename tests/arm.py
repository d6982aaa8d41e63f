"""What tests of engines for other machines share."""

import struct
from pathlib import Path

import pytest

from pipeline import emulator
from pipeline.types import Target, Tolerance

MACHINES = {62: "x86_64", 183: "aarch64", 40: "armv7l", 243: "riscv64"}  # e_machine of ELF

needs_emulator = pytest.mark.skipif(emulator.absent() is not None, reason=str(emulator.absent()))


def machine_of(library: Path) -> str:
    """The machine that an ELF file is for."""
    head = library.read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    return MACHINES[struct.unpack_from("<H", head, 18)[0]]


def row(machine: str = "aarch64", arch: str = "cortex-a72", platform: str = "linux", **changes: object) -> Target:
    """A row of the backend `tvm`."""
    table = {
        "name": f"{platform}-{machine}-tvm",
        "backend": "tvm",
        "platform": platform,
        "machine": machine,
        "arch": arch,
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_over_peak=1e-4)},
    }
    return Target.model_validate(table | changes)

"""What tests of engines for other machines share."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
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


@contextlib.contextmanager
def board() -> Iterator[int]:
    """TVM's own RPC server, as a board would run it; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port)]
    log = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--port-end", str(port + 1)], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its worker would outlive it
        process.wait()

"""Processors as LLVM names them: which one this host has, and what registers each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline import host
from pipeline.types import Target

if TYPE_CHECKING:
    from pipeline.tvm.nests import Registers

# LLVM processors that `native` may mean, best first, with the features that make a CPU one of them.
NATIVE: Mapping[str, Sequence[tuple[str, frozenset[str]]]] = {
    "x86_64": (
        ("sapphirerapids", frozenset({"amx_int8", "avx512_fp16", "avx512_bf16", "avx512_vnni"})),
        ("icelake-server", frozenset({"avx512_vnni", "avx512_vbmi2", "avx512_bitalg", "gfni", "vaes"})),
        ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
        ("x86-64-v3", frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})),
        ("x86-64-v2", frozenset({"sse4_2", "popcnt"})),
        ("x86-64", frozenset()),
    ),
    "aarch64": (("neoverse-n1", frozenset({"asimddp", "asimdhp", "atomics"})), ("cortex-a53", frozenset())),
}

ARMV7 = ("5", "7", "8", "9", "12", "15", "17")  # of Cortex-A: 32 bits, 16 registers of four lanes
DOT_PRODUCT_CORTEX = tuple(f"cortex-{name}" for name in ("a55", "a75", "a76", "a77", "a78", "x1", "x2", "x3"))


def cpu_of(target: Target) -> str:
    """The processor that a row's `arch` means."""
    return native_cpu() if target.arch == "native" else target.arch


def native_cpu() -> str:
    """LLVM's name for this host's CPU, or for the nearest older one."""
    known = NATIVE.get(host.machine(), (("generic", frozenset()),))
    return next(name for name, features in known if features <= host.cpu_features())


def registers_of(cpu: str) -> Registers:
    """The vector registers of an LLVM processor, as far as its name tells; four lanes where it doesn't."""
    from pipeline.tvm.dots import SDOT, VNNI_512
    from pipeline.tvm.nests import Registers

    if cpu in ("sapphirerapids", "icelake-server", "cascadelake", "znver4", "znver5"):
        return Registers(lanes=16, accumulators=14, dot=VNNI_512)
    if cpu in ("skylake-avx512", "x86-64-v4"):
        return Registers(lanes=16, accumulators=14)
    if cpu in ("x86-64-v3", "haswell", "broadwell", "skylake", "znver2", "znver3", "alderlake"):
        return Registers(lanes=8, accumulators=12)
    if cpu.startswith("x86-64"):
        return Registers(lanes=4, accumulators=12)
    if cpu.startswith("cortex-a") and cpu.removeprefix("cortex-a") in ARMV7:
        return Registers(lanes=4, accumulators=12)
    if "rv64" in cpu:  # without vectors: four of its 32 registers for each of these
        return Registers(lanes=4, accumulators=6, columns=1)
    dot = SDOT if cpu.startswith(("neoverse-", *DOT_PRODUCT_CORTEX)) else None
    return Registers(lanes=4, accumulators=24, columns=4, dot=dot)

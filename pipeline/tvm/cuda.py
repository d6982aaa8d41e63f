"""TVM's code for NVIDIA GPUs: CUDA source made anywhere, machine code made by NVRTC where that is installed.

NVRTC and its headers are ordinary packages, and need no GPU. TVM's own way to them asks for inexact arithmetic
(``--use_fast_math``), which would be a change of the numbers that nobody asked for: so they are called here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import host
from pipeline.errors import BuildError, UnavailableError, first_line
from pipeline.tvm import link as tvm_link
from pipeline.types import Target

CALLBACK = "tvm_callback_cuda_compile"
# limits of every GPU since Maxwell, by which schedules are chosen
LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
# what code generators for C++ expect of a compiler, and NVRTC has under other names
_INTEGERS = "\n".join(f"using cuda::std::{sign}int{bits}_t;" for sign in ("", "u") for bits in (8, 16, 32, 64))
PREAMBLE = f"""#include <cuda/std/cstdint>
#include <cuda/std/limits>
{_INTEGERS}
#define __asm__ asm
#define __volatile__ volatile
#ifndef INFINITY
#define INFINITY (::cuda::std::numeric_limits<float>::infinity())
#endif
"""
HOST_HEADERS = frozenset({"#include <cuda.h>"})


def lacks_nvrtc() -> str | None:
    """Why CUDA source can't be compiled here, or None if it can. Cheap, and never raises."""
    reason = host.absent("cuda.bindings", "cuda-bindings", "tvm-cuda")
    if reason is None and not headers():
        return "CUDA's headers are not here (`pip install 'exportyard[tvm-cuda]'`, or set CUDA_PATH)"
    return reason


def headers() -> list[Path]:
    """Folders with CUDA's headers and those of its C++ library, of the packages or of a toolkit."""
    roots = [Path(os.environ["CUDA_PATH"])] if "CUDA_PATH" in os.environ else []
    spec = importlib.util.find_spec("nvidia")
    roots += [Path(place) / "cu13" for place in (spec.submodule_search_locations or [])] if spec else []
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        if (root / "include" / "cuda_runtime.h").is_file():
            return [root / "include", root / "include" / "cccl"]
    return []


def compiles_for(target: Target, cpu: str) -> Any:
    """TVM's name for the row's GPU, with the processor `cpu` beside it."""
    import tvm

    return tvm.target.Target(
        {"kind": "cuda", "arch": target.arch.replace("sm", "sm_"), **LIMITS}, host=tvm_link.compiles_for(target, cpu)
    )


def machine_code(source: str, arch: str) -> bytes:
    """CUDA source as a cubin.

    Args:
        source: as TVM writes it.
        arch: ``sm_90``.

    Raises:
        UnavailableError: NVRTC or the headers aren't here.
        BuildError: NVRTC refuses the source.
    """
    reason = lacks_nvrtc()
    if reason is not None:
        raise UnavailableError(f"CUDA code can't be compiled: {reason}")
    from cuda.bindings import nvrtc

    text = PREAMBLE + "\n".join(line for line in source.splitlines() if line.strip() not in HOST_HEADERS)
    options = [f"--gpu-architecture={arch}", "-default-device", "--device-int128", *(f"-I{path}" for path in headers())]
    program = _ok(nvrtc.nvrtcCreateProgram(text.encode(), b"model.cu", 0, None, None))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BuildError(f"NVRTC can't compile TVM's code for {arch}: {_first_error(log.decode())}")
        code: bytes = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
        nvrtc.nvrtcGetCUBIN(program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _ok(answer: tuple[Any, Any]) -> Any:
    status, value = answer
    if status.value != 0:
        raise BuildError(f"NVRTC fails: {status.name}")
    return value


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line]
    return first_line(RuntimeError(lines[0] if lines else log.strip()))


@contextlib.contextmanager
def exact(arch: str) -> Iterator[None]:
    """TVM compiles CUDA source with `machine_code`, in this process."""
    import tvm_ffi

    before = tvm_ffi.get_global_func(CALLBACK, allow_missing=True)

    def compile_source(source: str) -> bytes:
        return machine_code(source, arch)

    tvm_ffi.register_global_func(CALLBACK, compile_source, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(CALLBACK, before, override=True)


def source_of(executable: Any) -> str:
    """The CUDA source in a compiled executable; empty where nothing is left for the GPU."""
    waiting = [executable.mod]
    while waiting:
        module = waiting.pop()
        if module.kind == "cuda":
            return str(module.inspect_source("cuda"))
        waiting += list(module.imports)
    return ""

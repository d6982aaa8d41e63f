"""From compiled code to a library that a device can load: which machines, which linker, which runtime.

Each machine is one entry of `PLATFORMS`. For this host's own kind the system's compiler links; for others the package
``ziglang``, which has the headers and libraries of all of them, or else Debian's cross compiler.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline import host
from pipeline.errors import BuildError, unknown
from pipeline.store import write_json
from pipeline.types import Target

LIBRARY = "model.so"
OBJECTS = "model.tar"
RUNTIME = "runtime.json"

# `-s` and no build id: names of temporary object files stay out, so that equal models have equal bytes
LINK = ("-shared", "-fPIC", "-s", "-Wl,--build-id=none")
# Android's loader looks for a symbol only in what a library says that it needs
ANDROID_NEEDS = ("libc.so", "libm.so", "libtvm_ffi.so")
HOST_COMPILERS = ("g++", "c++", "clang++", "gcc", "cc")


@dataclass(frozen=True)
class Runtime:
    """What an engine needs on its device: two libraries of TVM, and where they come from.

    Attributes:
        sizes: about how many bytes each file has, of TVM 0.27; empty where nobody has built it.
        source: where to get them.
    """

    source: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def _wheel(system: str, ffi: int, runtime: int) -> Runtime:
    source = f"the wheels of apache-tvm-ffi and apache-tvm for {system} (tvm_ffi/lib, tvm/lib)"
    return Runtime(source, {"libtvm_ffi.so": ffi, "libtvm_runtime.so": runtime})


_FROM_SOURCE = Runtime("no wheel has it for this machine: build the targets tvm_ffi and tvm_runtime of TVM's source")


@dataclass(frozen=True)
class Platform:
    """How code for one kind of machine is made.

    Attributes:
        llvm: settings of the LLVM target besides its processor.
        zig: ziglang's name of it, with the oldest glibc that shall do; None if it can't link for it.
        debian: prefix of Debian's cross compiler, whose package is ``g++-`` and that; None if there is none.
    """

    llvm: Mapping[str, Any]
    runtime: Runtime
    zig: str | None = None
    debian: str | None = None


PLATFORMS: Mapping[tuple[str, str], Platform] = {
    ("linux", "x86_64"): Platform(
        {"mtriple": "x86_64-linux-gnu"},
        _wheel("manylinux_2_28_x86_64", 2_600_000, 3_400_000),
        "x86_64-linux-gnu.2.28",
        "x86_64-linux-gnu",
    ),
    ("linux", "aarch64"): Platform(
        {"mtriple": "aarch64-linux-gnu"},
        _wheel("manylinux_2_28_aarch64", 2_400_000, 3_000_000),
        "aarch64-linux-gnu.2.28",
        "aarch64-linux-gnu",
    ),
    ("linux", "armv7l"): Platform(
        {"mtriple": "armv7l-linux-gnueabihf", "mattr": ["+neon"], "mfloat-abi": "hard"},
        _FROM_SOURCE,
        "arm-linux-gnueabihf.2.28",
        "arm-linux-gnueabihf",
    ),
    ("linux", "riscv64"): Platform(
        {"mtriple": "riscv64-linux-gnu", "mattr": ["+m", "+a", "+f", "+d", "+c"], "mabi": "lp64d"},
        _FROM_SOURCE,
        "riscv64-linux-gnu.2.31",
        "riscv64-linux-gnu",
    ),
    ("android", "aarch64"): Platform({"mtriple": "aarch64-linux-android"}, _FROM_SOURCE, "aarch64-linux-android"),
    ("web", "wasm32"): Platform(
        {"mtriple": "wasm32-unknown-unknown-wasm"},
        Runtime("build `web/` of TVM's source with emscripten; `emcc` links this engine's objects into it"),
    ),
}


@dataclass(frozen=True)
class Linker:
    """A command that links, and the version that becomes part of an engine's key."""

    command: tuple[str, ...]
    version: str


def platform_of(target: Target) -> Platform | None:
    """How code for `target` is made; None if it can't be."""
    return PLATFORMS.get((target.platform, target.machine))


def missing(target: Target) -> str | None:
    """What this host lacks to make a library for `target`, or None. Cheap, and never raises."""
    platform = platform_of(target)
    if platform is None:
        known = ", ".join(f"{system} on {machine}" for system, machine in PLATFORMS)
        return f"it makes engines for {known}; not for {target.platform} on {target.machine}"
    if packs_objects(target) or linker(target) is not None:
        return None
    if _is_here(target):
        return f"there is no C++ compiler that links for {target.machine} (Debian package `g++`)"
    ways = ["`pip install ziglang`"]
    if platform.debian is not None:
        ways.append(f"Debian package `g++-{platform.debian}`".replace("_", "-"))
    return f"there is no linker for {target.platform} on {target.machine} ({' or '.join(ways)})"


def packs_objects(target: Target) -> bool:
    """Whether engines of `target` are object files that the application links: nothing else can be loaded there."""
    return target.machine == "wasm32"


def linker(target: Target) -> Linker | None:
    """What links for `target` here."""
    platform = platform_of(target)
    if platform is None or packs_objects(target):
        return None
    if _is_here(target):
        found = _compiler(HOST_COMPILERS)
        if found is not None:
            return found
    if platform.zig is not None and host.has_module("ziglang"):
        command = (sys.executable, "-m", "ziglang", "cc", "-target", platform.zig)
        return Linker(command, f"zig {host.version('ziglang')} {platform.zig}")
    return _compiler((f"{platform.debian}-g++", f"{platform.debian}-gcc")) if platform.debian else None


def _is_here(target: Target) -> bool:
    return (target.platform, target.machine) == (host.system(), host.machine())


@functools.cache
def _compiler(names: Sequence[str]) -> Linker | None:
    """The first of `names` that is installed; its version counts, since its start and end files become part of it."""
    name = next((name for name in names if shutil.which(name)), None)
    if name is None:
        return None
    done = subprocess.run([name, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return Linker((name,), f"{name} {done.stdout.strip()}")


def compiles_for(target: Target, cpu: str) -> Any:
    """TVM's name for the hardware of `target` with the LLVM processor `cpu`.

    Raises:
        UsageError: LLVM has no such processor for that machine.
    """
    import tvm

    platform = platform_of(target)
    assert platform is not None, "asked for a machine that `missing` refuses"
    plain = tvm.target.Target({"kind": "llvm", **platform.llvm})
    known = [str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(plain)]
    if known and cpu not in known:
        raise unknown("LLVM processor", cpu, known, where=f"`arch` of target `{target.name}`")
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, **platform.llvm})


def write(executable: Any, target: Target, out: Path) -> dict[str, JsonValue]:
    """Write the library of `executable` and ``runtime.json``, which says what it needs on its device; returns that.

    Raises:
        BuildError: the linker fails.
    """
    found = linker(target)
    if packs_objects(target):
        executable.export_library(str(out / OBJECTS), fcompile=_pack)
    else:
        assert found is not None, "asked for a machine that `missing` refuses"
        executable.export_library(str(out / LIBRARY), fcompile=functools.partial(_link, found.command, target.platform))
    needs = needs_of(target)
    write_json(out / RUNTIME, needs)
    return {"runtime": needs}


def needs_of(target: Target) -> dict[str, JsonValue]:
    """The runtime that an engine of `target` needs: version, files, bytes, and where to get it."""
    platform = platform_of(target)
    assert platform is not None, "asked for a machine that `missing` refuses"
    sizes = dict(platform.runtime.sizes)
    return {
        "name": "Apache TVM runtime",
        "versions": dict(host.versions(["apache-tvm", "apache-tvm-ffi"])),
        "source": platform.runtime.source,
        "files": {**sizes},
        "about_bytes": sum(sizes.values()) or None,
    }


def _link(
    command: Sequence[str], platform: str, output: str, objects: Iterable[str], options: Iterable[str] | None = None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        more = _android_stubs(command, Path(folder)) if platform == "android" else []
        run([*command, *LINK, "-o", output, *objects, *(options or ()), *more])


def _android_stubs(command: Sequence[str], folder: Path) -> list[str]:
    """Empty libraries with the names of those that a library needs there: nobody ships Android's own."""
    empty = folder / "empty.c"
    empty.write_text("")
    for name in ANDROID_NEEDS:
        run([*command, *LINK, "-nostdlib", f"-Wl,-soname,{name}", "-o", str(folder / name), str(empty)])
    return ["-nostdlib", "-Wl,--no-as-needed", *(str(folder / name) for name in ANDROID_NEEDS)]


def run(command: Sequence[str]) -> None:
    """Run a compiler or linker.

    Raises:
        BuildError: it fails; has the last line of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        name = "zig" if "ziglang" in command else command[0]
        raise BuildError(
            f"`{name}` can't link the engine: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
            hint=f"see whether `{name}` can link any program here",
        )


def _pack(output: str, objects: Iterable[str], options: Iterable[str] | None = None) -> None:
    """Object files as a tar archive without names, times or owners: equal models have equal bytes."""
    del options
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(Path(name) for name in objects):
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            with path.open("rb") as stream:
                archive.addfile(entry, stream)

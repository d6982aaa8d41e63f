"""Backend `aotinductor`: the program compiled by TorchInductor into one package that Python and C++ load as it is.

``arch`` of a row is ``native``, ``x86-64-v3`` (any x86-64 with AVX2), or a CUDA architecture (``sm90``).

Options of a row:
    freezing: weights are constants, folded and laid out for the processor (default true).
    max_autotune: kernels for matrix products are chosen by timing them (default false). What wins may differ from
        build to build, and so may the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import gpu, host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, last_line, unknown
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.store import Stored

FILE = "model.pt2"
COMPILERS = ("g++", "c++", "clang++")
FEATURES = "EXPORTYARD_CPU_FEATURES"  # in the package's metadata: what its code needs of a CPU
PORTABLE = {"x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")}
# what a compiler may use of the CPU that it runs on
_USABLE = re.compile(r"(sse|ssse|avx|fma|f16c|bmi|amx|gfni|vaes|vpclmul|movbe|popcnt|asimd|sve|i8mm|bf16|fphp)")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first day that a zip file can tell


class AotInductor:
    """See `pipeline.types.Backend`. Its engine is ``model.pt2``: a library with the weights, and its metadata."""

    name = "aotinductor"
    option_names = frozenset({"freezing", "max_autotune"})
    quantizer = "inductor"
    schemes: frozenset[Scheme] = frozenset({"fp32", "int8-u8s8", "int8-dynamic"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:
        """The package, a C++ compiler, or the row's own kind of machine: nothing is compiled for another one."""
        if not host.has_module("torch"):
            return "the package `torch` is not installed"
        if host.system() != "linux":
            return "AOTInductor's packages are made on Linux"
        elsewhere = targets.unfit(target if target.arch == "native" else target.model_copy(update={"requires": ()}))
        if elsewhere is not None:
            return f"{elsewhere} (AOTInductor compiles for the machine that builds)"
        if _compiler() is None:
            return "there is no C++ compiler (Debian package `g++`)"
        return _no_gpu(target) if is_cuda(target) else None

    def not_runnable(self, target: Target) -> str | None:
        """The package, or the row's own hardware."""
        if not host.has_module("torch"):
            return "the package `torch` is not installed"
        return _no_gpu(target) if is_cuda(target) else targets.unfit(target)

    def tools(self, target: Target) -> Mapping[str, str]:
        """Versions of torch and of the compiler; for ``arch = "native"`` the features of this CPU."""
        found = host.versions(["torch"])
        compiler = _compiler()
        if compiler is not None:
            found["compiler"] = compiler[1]
        if target.arch == "native":
            found["cpu"] = " ".join([host.machine(), *features_for(target)])
        return found

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Compile the program, and pack the library.

        Raises:
            UsageError: an option has a value that doesn't exist.
            UnavailableError: there is no compiler.
            BuildError: an operator can't be compiled.
        """
        from pipeline import program as programs
        from pipeline.origin import of_program_error

        _check(target)
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        loaded = programs.load(model.file(programs.FILE))
        try:
            package = _compiled(loaded, model, target)
        except Exception as error:  # TorchInductor's passes and the C++ compiler, each with exceptions of their own
            raise BuildError(
                f"aotinductor can't build `{target.name}`: {last_line(error)}{of_program_error(loaded, str(error))}",
                hint="change that part of the model, or leave out the target in the recipe's `targets`",
            ) from error
        metadata = write(package, out / FILE)
        return {"isa": metadata.get("AOTI_CPU_ISA", ""), "cpu_features": metadata[FEATURES]}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """The library in this process.

        Raises:
            BuildError: the file is broken.
            UnavailableError: its code needs features that this CPU lacks. (torch's loader would only warn.)
        """
        from pipeline import program as programs

        path, signature = engine.file(FILE), engine.signature()
        try:
            lacking = host.lacking(metadata_of(path)[FEATURES].split())
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise _unreadable(path, error) from error
        if lacking:
            raise UnavailableError(
                f"`{path}` is compiled for a CPU with {', '.join(lacking)}, which this one lacks",
                hint='build it here, or for every CPU with AVX2: `arch = "x86-64-v3"` in the row',
            )
        try:
            package = _loaded(path)
        except Exception as error:  # RuntimeError as a rule, and what its JSON files and the linker raise
            raise _unreadable(path, error) from error
        device = "cuda" if is_cuda(target) else "cpu"
        with programs.threads(threads):
            yield checked(programs.runner(package, signature, device), signature)


def is_cuda(target: Target) -> bool:
    """Whether the row is for a GPU of NVIDIA."""
    return gpu.capability_of(target.arch) is not None


def features_for(target: Target) -> list[str]:
    """CPU features that code for `target` may use."""
    if target.arch in PORTABLE:
        return [*PORTABLE[target.arch]]
    return sorted(name for name in host.cpu_features() if _USABLE.match(name))


def _check(target: Target) -> None:
    if target.arch != "native" and target.arch not in PORTABLE and not is_cuda(target):
        raise unknown("arch", target.arch, ["native", *PORTABLE, "sm90"], where=f"target `{target.name}`")
    for option in ("freezing", "max_autotune"):
        value = target.options.get(option, False)
        if not isinstance(value, bool):
            raise UsageError(f"target `{target.name}`: {option} = {value!r}", hint="expected true or false")


@functools.cache
def _compiler() -> tuple[str, str] | None:
    """The C++ compiler and its version, or None."""
    name = next((name for name in COMPILERS if shutil.which(name)), None)
    if name is None:
        return None
    done = subprocess.run([name, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return name, f"{name} {done.stdout.strip()}"


def _no_gpu(target: Target) -> str | None:
    """Why nothing can be compiled for the row's GPU here, or None."""
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        return f"this torch ({version}) is built without CUDA"
    return gpu.unfit(target)


def _unreadable(path: Path, error: Exception) -> BuildError:
    return BuildError(
        f"aotinductor can't load the engine `{path}`: {last_line(error)}", hint="`exportyard export` builds it again"
    )


# --- from the program to a package ---------------------------------------------------------------------------------


def _compiled(program: ExportedProgram, model: Stored, target: Target) -> bytes:
    """The package as TorchInductor writes it."""
    import torch

    from pipeline import program as programs

    package = io.BytesIO()
    # while gradients may be asked for, torch freezes nothing, and doesn't say so
    with programs.quiet(), _workshop() as folder, torch.random.fork_rng(), torch.no_grad():
        from torch._inductor.utils import clear_caches  # what it remembers names files of an earlier folder
        from torch.export.passes import move_to_device_pass

        program.example_inputs = (programs.examples(model.signature()), {})
        if is_cuda(target):
            program = move_to_device_pass(program, "cuda")
        torch.manual_seed(0)  # it draws a number that marks where large weights begin
        clear_caches()
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs=_settings(target, folder)
        )
    return package.getvalue()


def _settings(target: Target, folder: Path) -> dict[str, Any]:
    """TorchInductor's settings for `target`, with its files in `folder`."""
    compiler = _compiler()
    assert compiler is not None, "`missing` has asked for it"
    site = Path(sys.modules["torch"].__file__ or "").parents[1]
    # names of source files are in its messages; they must not say where this machine keeps them
    short = f"-ffile-prefix-map={folder}=. -ffile-prefix-map={site}=."
    portable = target.arch in PORTABLE
    return {
        "freezing": target.options.get("freezing", True),
        "max_autotune": target.options.get("max_autotune", False),
        "cpp.cxx": (None, compiler[0]),
        "cpp.march": f"{target.arch if portable else 'native'} {short}",
        "cpp.simdlen": 256 if portable else None,
        "cpp.vec_isa_ok": True,  # else it compiles and runs a program for each kind of vectors, for 7 s
        "cpp.dynamic_threads": True,  # the number is the caller's, not that of the machine that builds
        "aot_inductor.enable_line_tables": False,
        "size_asserts": False,  # which run for debugging only, and whose texts hold addresses of this process
        "aot_inductor.model_name_for_generated_files": "model",
        "aot_inductor.metadata": {FEATURES: " ".join(features_for(target))},
    }


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """An empty folder for generated code, for one build at a time.

    Its name is always the same: it is among the compiler's flags, by which torch finds its precompiled headers again.
    """
    import fcntl  # not on every system; but there nothing is built

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exportyard" / "aotinductor"
    cache.mkdir(parents=True, exist_ok=True)
    folder, setting = cache / "work", "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(setting)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir()
        os.environ[setting] = str(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.environ.pop(setting)
            if before is not None:
                os.environ[setting] = before


def write(package: bytes, path: Path) -> dict[str, str]:
    """Write `package` with the same bytes each time, without its C++ sources; returns its metadata."""
    with zipfile.ZipFile(io.BytesIO(package)) as given, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as kept:
        for name in sorted(given.namelist()):
            if name.endswith((".cpp", "serialization_id")):  # the sources name this machine's folders
                continue
            below = name.partition("/")[2]
            kept.writestr(zipfile.ZipInfo(f"model/{below}", _EPOCH), given.read(name))
    return metadata_of(path)


def metadata_of(path: Path) -> dict[str, str]:
    """What a package says about itself.

    Raises:
        BadZipFile, KeyError, ValueError: it isn't one.
    """
    with zipfile.ZipFile(path) as package:
        spoilt = package.testzip()  # a library that is cut off would end the process that loads it
        if spoilt is not None:
            raise zipfile.BadZipFile(f"`{spoilt}` is damaged")
        name = next((name for name in package.namelist() if name.endswith("wrapper_metadata.json")), "metadata")
        found: dict[str, str] = json.loads(package.read(name))
    return found


def _loaded(path: Path) -> Any:
    import torch

    from pipeline import program as programs

    with programs.quiet():
        return torch._inductor.aoti_load_package(str(path))


BACKEND = AotInductor()

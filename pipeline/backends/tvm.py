"""Backend `tvm`: one shared library per model, made by Relax and LLVM with schedules by rule.

``arch`` of a row is an LLVM processor name (``x86-64-v3``, ``cortex-a72``) or ``native``.

Options of a row:
    import: ``onnx`` (default) or ``program``: which artifact it reads.
    threads: threads that run one operator; 0 (default) takes every core.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, StoreError, UnavailableError, UsageError, unknown
from pipeline.types import Runner, Scheme, Signature, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.tvm_schedules import Registers
    from pipeline.types import Tensors

FILE = "model.so"
SOURCES = ("onnx", "program")

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
TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
PACKAGES = {"x86_64": "g++-x86-64-linux-gnu", "aarch64": "g++-aarch64-linux-gnu"}

# `-s` and no build id: names of temporary object files stay out, so that equal models have equal bytes
LINK = ("-shared", "-fPIC", "-s", "-Wl,--build-id=none")

_importing = threading.RLock()


class Tvm:
    """See `pipeline.types.Backend`. Its engine is ``model.so``, which holds code and weights."""

    name = "tvm"
    option_names = frozenset({"import", "threads"})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:
        """As the option `import` says."""
        return "program" if target.options.get("import") == "program" else "onnx"

    def missing(self, target: Target) -> str | None:
        """The package, a linker for the row's machine, or for ``arch = "native"`` the row's own hardware."""
        if not host.has_module("tvm"):
            return "the package `apache-tvm` is not installed"
        if target.platform != "linux" or target.machine not in TRIPLES:
            return f"it makes libraries for linux on x86_64 and aarch64, not for {target.platform} on {target.machine}"
        if target.arch == "native":
            reason = targets.unfit(target)
            if reason is not None:
                return f'{reason} (arch = "native" is for the CPU that builds it)'
        if _linker(target.machine) is None:
            package = "g++" if target.machine == host.machine() else PACKAGES[target.machine]
            return f"there is no C++ compiler that links for {target.machine} (Debian package `{package}`)"
        return None

    def not_runnable(self, target: Target) -> str | None:
        """The package, or the row's own hardware."""
        return targets.unfit(target) or (
            None if host.has_module("tvm") else "the package `apache-tvm` is not installed"
        )

    def tools(self, target: Target) -> Mapping[str, str]:
        """Versions of TVM and of the linker; for ``arch = "native"`` the LLVM name of this CPU."""
        found = host.versions(["apache-tvm"])
        linker = _linker(target.machine)
        if linker is not None:
            found["linker"] = _version_of(linker)
        if target.arch == "native":
            found["cpu"] = native_cpu()
        return found

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Import, schedule, compile, link.

        Raises:
            UsageError: LLVM has no such processor, or an option has a value that doesn't exist.
            UnavailableError: there is no linker.
            BuildError: an operator can't be imported or compiled.
        """
        _check(target)
        linker = _linker(target.machine)
        if linker is None:
            raise UnavailableError(f"`{target.name}`: {self.missing(target)}")
        cpu = native_cpu() if target.arch == "native" else target.arch
        where = _tvm_target(target, cpu)
        module = _imported(model, target)
        try:
            executable = _compiled(module, where, registers_of(cpu))
        except Exception as error:  # TVM's passes raise everything from TypeError to their own
            raise BuildError(
                f"tvm can't compile the model for `{target.name}`: {_plain(error)}",
                hint='the other way in (option `import = "program"` or `"onnx"`) may do better',
            ) from error
        _link(executable, linker, out / FILE)
        return {"cpu": cpu}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """Relax's virtual machine over the library.

        Raises:
            BuildError: the file is broken, or was built by another version of TVM.
        """
        _check(target)
        # before its thread pool starts: it would pin this process's main thread to one core, for good
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        import tvm
        from tvm import relax

        path, signature = engine.file(FILE), engine.signature()
        try:
            machine: Any = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
            main = machine["main"]
        except Exception as error:  # the loader's own, an AttributeError for a library that isn't TVM's ...
            raise BuildError(
                f"tvm can't load the engine `{path}`: {_plain(error)}", hint="`exportyard export` builds it again"
            ) from error
        own = int(target.options.get("threads", 0))
        any_core = 1
        tvm.get_global_func("runtime.config_threadpool")(any_core, threads or own or host.cpu_count())

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = main(*(tvm.runtime.tensor(feeds[spec.name]) for spec in signature.inputs))
            arrays = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
            return {spec.name: array.numpy() for spec, array in zip(signature.outputs, arrays, strict=True)}

        yield checked(run, signature)


def _check(target: Target) -> None:
    source, threads = target.options.get("import", "onnx"), target.options.get("threads", 0)
    if source not in SOURCES:
        raise unknown("value of `import`", str(source), SOURCES, where=f"target `{target.name}`")
    if not isinstance(threads, int) or threads < 0:
        raise UsageError(f"target `{target.name}`: threads = {threads!r}", hint="expected a whole number; 0 is all")


# --- hardware ------------------------------------------------------------------------------------------------------


def native_cpu() -> str:
    """LLVM's name for this host's CPU, or for the nearest older one."""
    known = NATIVE.get(host.machine(), (("generic", frozenset()),))
    return next(name for name, features in known if features <= host.cpu_features())


def registers_of(cpu: str) -> Registers:
    """The vector registers of an LLVM processor, as far as its name tells; four lanes where it doesn't."""
    from pipeline.tvm_schedules import Registers

    if cpu in ("sapphirerapids", "icelake-server", "cascadelake", "skylake-avx512", "x86-64-v4", "znver4", "znver5"):
        return Registers(lanes=16, accumulators=14)
    if cpu in ("x86-64-v3", "haswell", "broadwell", "skylake", "znver2", "znver3", "alderlake"):
        return Registers(lanes=8, accumulators=12)
    if cpu.startswith("x86-64"):
        return Registers(lanes=4, accumulators=12)
    return Registers(lanes=4, accumulators=24, columns=4)


def _tvm_target(target: Target, cpu: str) -> Any:
    import tvm

    triple = TRIPLES[target.machine]
    known = [str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(tvm.target.Target("llvm"))]
    if target.machine == host.machine() and cpu not in known:
        raise unknown("LLVM processor", cpu, known, where=f"`arch` of target `{target.name}`")
    return tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu})


@functools.cache
def _linker(machine: str) -> str | None:
    """A C++ compiler that links for `machine`."""
    if machine == host.machine():
        names: Sequence[str] = ("g++", "c++", "clang++", "gcc", "cc")
    else:
        names = (f"{TRIPLES.get(machine, machine)}-g++", f"{TRIPLES.get(machine, machine)}-gcc")
    return next((name for name in names if shutil.which(name)), None)


@functools.cache
def _version_of(linker: str) -> str:
    """``g++ 12``: its start and end files become part of the library."""
    done = subprocess.run([linker, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return f"{linker} {done.stdout.strip()}"


# --- from the model to a library -----------------------------------------------------------------------------------


def _imported(model: Stored, target: Target) -> Any:
    """The model as a Relax module, its inputs in the signature's order."""
    module = _from_program(model, target) if BACKEND.source(target) == "program" else _from_onnx(model, target)
    _check_inputs(module, model.signature(), target)
    return module


def _from_onnx(model: Stored, target: Target) -> Any:
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    from pipeline.origin import of_error

    path = model.file("model.onnx")
    said = io.StringIO()
    try:
        with _import_of_a_model(said):
            return from_onnx(onnx.load(path), keep_params_in_input=False)
    except Exception as error:  # converters raise whatever they meet
        # for an operator that it has but can't convert, only what it prints has the operator's name
        place = of_error(path, f"{error} {said.getvalue()}")
        raise BuildError(
            f"tvm can't import the model for `{target.name}`: {_plain(error)}{place}",
            hint='change that part of the model, or try `import = "program"` in the row',
        ) from error


def _from_program(model: Stored, target: Target) -> Any:
    from tvm.relax.frontend.torch import from_exported_program

    from pipeline import program

    try:
        loaded = program.load(model.file("program.pt2"))
        with _import_of_a_model(io.StringIO()):
            return from_exported_program(loaded, keep_params_as_input=False)
    except StoreError:
        raise
    except Exception as error:  # as above
        raise BuildError(
            f"tvm can't import the program for `{target.name}`: {_plain(error)}",
            hint='change that part of the model, or try `import = "onnx"` in the row',
        ) from error


@contextlib.contextmanager
def _import_of_a_model(said: io.StringIO) -> Iterator[None]:
    """Importers print, warn, and take a slice that ends at an axis for one that may end before it.

    The last makes shapes like ``min(seq, 512)``, which no later pass can work with. A captured model slices inside
    its bounds (torch has proved it for the whole range of the axis), so the importer is told that every slice with
    such an end does.
    """
    from tvm import relax, tirx

    original = relax.op.strided_slice

    def inside(x: Any, axes: Any, begin: Any, end: Any, strides: Any = None, assume_inbound: bool = False) -> Any:
        with contextlib.suppress(TypeError):  # an end that is a tensor can't be looked into
            assume_inbound |= any(not isinstance(one, int | tirx.IntImm) for one in end)
        return original(x, axes, begin, end, strides, assume_inbound=assume_inbound)

    with _importing, warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        relax.op.strided_slice = inside
        try:
            yield
        finally:
            relax.op.strided_slice = original


def _check_inputs(module: Any, signature: Signature, target: Target) -> None:
    found = [str(parameter) for parameter in module["main"].params]
    if len(found) != len(signature.inputs):
        raise BuildError(
            f"tvm imported the model for `{target.name}` with inputs {found}, "
            f"its signature has {[spec.name for spec in signature.inputs]}"
        )


def _channels_last(module: Any) -> bool:
    """Whether convolutions gain from another layout, and TVM can give it.

    The pass fails on some models without a convolution, and there is no code for a transposed one in that layout.
    """
    from tvm import ir, relax

    found: set[str] = set()

    def note(expression: Any) -> None:
        if isinstance(expression, relax.Call) and isinstance(expression.op, ir.Op):
            found.add(expression.op.name)

    relax.analysis.post_order_visit(module["main"], note)
    return "relax.nn.conv2d" in found and "relax.nn.conv2d_transpose" not in found


def _compiled(module: Any, where: Any, registers: Registers) -> Any:
    import tvm
    from tvm import relax

    from pipeline.tvm_passes import clipped_lookups, counted_from_the_front, sorted_shape_functions
    from pipeline.tvm_schedules import scheduled

    transform = relax.transform
    # channels last: the columns of a convolution's tile are then neighbours in memory
    layout = [transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]})] if _channels_last(module) else []
    passes = [
        transform.DecomposeOpsForInference(),
        transform.FoldConstant(),
        transform.CanonicalizeBindings(),
        *layout,
        transform.Normalize(),
        transform.FoldConstant(),
        relax.get_pipeline("zero"),
        transform.AttachAttrLayoutFreeBuffers(),
        scheduled(registers),
        # constants that the schedules want in another layout get it now, not at every call
        transform.SplitLayoutRewritePreproc(),
        transform.FoldConstant(),
        transform.DeadCodeElimination(["main"]),
    ]
    with where, tvm.transform.PassContext(opt_level=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = tvm.transform.Sequential(passes)(counted_from_the_front(clipped_lookups(module)))
        lowering = tvm.transform.Sequential([relax.get_default_pipeline(where), sorted_shape_functions()])
        return tvm.compile(module, target=where, relax_pipeline=lowering)


def _link(executable: Any, linker: str, path: Path) -> None:
    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        done = subprocess.run(
            [linker, *LINK, "-o", output, *objects, *(options or ())], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BuildError(
                f"`{linker}` can't link the engine: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
                hint=f"see whether `{linker}` can link any program here",
            )

    executable.export_library(str(path), fcompile=link)


def _plain(error: BaseException) -> str:
    """The first line of TVM's message: the rest is its own trace, or the code that it could not handle."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


BACKEND = Tvm()

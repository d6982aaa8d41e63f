"""Backend `tvm`: one shared library per model, made by Relax and LLVM with schedules by rule.

``arch`` of a row is an LLVM processor name (``x86-64-v3``, ``cortex-a72``) or ``native``.

Options of a row:
    import: ``onnx`` (default) or ``program``: which artifact it reads.
    weights: ``inside`` the library, ``beside`` it, or ``auto`` (default): beside it when it would be too large.
    threads: threads that run one operator; 0 (default) takes every core.
    tune: ``off`` (default), ``cached``: take records of earlier tuning, or ``minutes:N``: and measure what has none,
        for at most N minutes an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, unknown
from pipeline.tvm import cpu as tvm_cpu
from pipeline.tvm import importer as tvm_import
from pipeline.tvm import link as tvm_link
from pipeline.tvm import records as tvm_records
from pipeline.tvm import remote as tvm_remote
from pipeline.tvm import weights as tvm_weights
from pipeline.types import Reporter, Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.tvm.nests import Registers
    from pipeline.types import Tensors

SOURCES = ("onnx", "program")
PLACES = ("auto", "inside", "beside")
TUNING = ("off", "cached")  # or minutes:N


class Tvm:
    """See `pipeline.types.Backend`. Its engine is ``model.so``, which holds code and weights (see `tvm_link`)."""

    name = "tvm"
    option_names = frozenset({"import", "threads", "weights", "tune", "device.rpc"})
    schemes: frozenset[Scheme] = frozenset({"fp32", "int8-u8s8", "int8-s8s8"})

    def source(self, target: Target) -> Literal["onnx", "program"]:
        """As the option `import` says."""
        return "program" if target.options.get("import") == "program" else "onnx"

    def missing(self, target: Target) -> str | None:
        """The package, a linker for the row's machine, or for ``arch = "native"`` the row's own hardware."""
        reason = host.absent("tvm", "apache-tvm", "tvm")
        if reason is not None:
            return reason
        if target.arch == "native":
            reason = targets.unfit(target)
            if reason is not None:
                return f'{reason} (arch = "native" is for the CPU that builds it)'
        return tvm_link.missing(target)

    def not_runnable(self, target: Target) -> str | None:
        """The package, or the row's own hardware, its device, or an emulator."""
        return host.absent("tvm", "apache-tvm", "tvm") or tvm_remote.unreachable(target)

    def tools(self, target: Target) -> Mapping[str, str]:
        """Versions of TVM and of the linker; for ``arch = "native"`` the LLVM name of this CPU."""
        found = host.versions(["apache-tvm"])
        linker = tvm_link.linker(target)
        if linker is not None:
            found["linker"] = linker.version
        if target.arch == "native":
            found["cpu"] = tvm_cpu.native_cpu()
        return found

    def records(self, target: Target) -> str | None:
        """Records are those of a processor, whatever model they were made with."""
        if target.options.get("tune", "off") == "off":
            return None
        return f"{tvm_cpu.cpu_of(target)}.json"

    def tune(self, model: Stored, target: Target, shared: Path, out: Path, report: Reporter) -> Mapping[str, JsonValue]:
        """At the opt size of each axis, on one thread, in this process; see `tvm_tuning`.

        Raises:
            UsageError: `shared` isn't a file of records, or an option has a value that doesn't exist.
            UnavailableError: ``minutes:N``, and this host can't run code for the row's processor.
            BuildError: an operator can't be imported.
        """
        _check(target)
        return _tuned(model, target, shared, out, report)

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Import, schedule, compile, link.

        Raises:
            UsageError: LLVM has no such processor, or an option has a value that doesn't exist.
            UnavailableError: there is no linker.
            BuildError: an operator can't be imported or compiled.
        """
        return self._build(model, target, None, out)

    def build_tuned(self, model: Stored, target: Target, tuning: Path, out: Path) -> Mapping[str, JsonValue]:
        """As `build`, with the schedules that `tune` found."""
        return self._build(model, target, tuning / tvm_records.CHOICES, out)

    def _build(self, model: Stored, target: Target, choices: Path | None, out: Path) -> Mapping[str, JsonValue]:
        _check(target)
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        return _built(model, target, choices, out)

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """Relax's virtual machine over the library: here, on the row's device, or in an emulator.

        Raises:
            BuildError: the file is broken, or was built by another version of TVM.
            UnavailableError: the device doesn't answer.
        """
        _check(target)
        own = int(target.options.get("threads", 0))
        if tvm_remote.is_remote(target):
            with tvm_remote.loaded(engine, target, threads or own) as there:
                yield dataclasses.replace(there, run=checked(there.run, engine.signature()))
            return
        _before_threads()
        import tvm
        from tvm import relax

        path, signature = engine.file(tvm_link.LIBRARY), engine.signature()
        try:
            machine: Any = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
            main, weights = machine["main"], tvm_weights.read(engine.path)
        except Exception as error:  # the loader's own, an AttributeError for a library that isn't TVM's ...
            raise BuildError(
                f"tvm can't load the engine `{path}`: {tvm_import.plain(error)}",
                hint="`exportyard export` builds it again",
            ) from error
        _take_threads(threads or own or host.cpu_count())

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = main(*(tvm.runtime.tensor(feeds[spec.name]) for spec in signature.inputs), *weights)
            arrays = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
            return {spec.name: array.numpy() for spec, array in zip(signature.outputs, arrays, strict=True)}

        yield checked(run, signature)


def _check(target: Target) -> None:
    source, threads = target.options.get("import", "onnx"), target.options.get("threads", 0)
    if source not in SOURCES:
        raise unknown("value of `import`", str(source), SOURCES, where=f"target `{target.name}`")
    if source == "program" and any(scheme != "fp32" for scheme in target.schemes):
        raise UsageError(
            f'target `{target.name}`: import = "program" carries fp32 only, the row also has '
            f"{', '.join(f'`{scheme}`' for scheme in target.schemes if scheme != 'fp32')}",
            hint='remove those schemes, or `import = "program"`',
        )
    place = target.options.get("weights", "auto")
    if place not in PLACES:
        raise unknown("value of `weights`", str(place), PLACES, where=f"target `{target.name}`")
    if not isinstance(threads, int) or threads < 0:
        raise UsageError(f"target `{target.name}`: threads = {threads!r}", hint="expected a whole number; 0 is all")
    tune = target.options.get("tune", "off")
    if tune not in TUNING and not _minutes(target):
        raise unknown("value of `tune`", str(tune), (*TUNING, "minutes:10"), where=f"target `{target.name}`")


def _before_threads() -> None:
    """What TVM must know before its pool of threads starts."""
    # it would pin this process's main thread to one core, for good
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # and would have half as many threads as there are cores, or as many as another library was told to have
    os.environ.setdefault("TVM_NUM_THREADS", str(host.cpu_count()))


def _take_threads(count: int) -> None:
    import tvm

    any_core = 1
    tvm.get_global_func("runtime.config_threadpool")(any_core, count)


def _tuned(model: Stored, target: Target, shared: Path, out: Path, report: Reporter) -> Mapping[str, JsonValue]:
    """Look up, and measure if the row says so; returns the facts."""
    _before_threads()
    from pipeline.tvm import compile as tvm_compile
    from pipeline.tvm import tuning as tvm_tuning

    minutes = _minutes(target)
    reason = targets.unfit(target)
    if minutes and (reason is not None or target.device is not None):
        why = reason or "it is another machine"
        raise UnavailableError(
            f"`{target.name}`: tuning runs code on the row's processor, and this host can't: {why}",
            hint='`tune = "cached"` takes records that were made elsewhere',
        )
    cpu = tvm_cpu.cpu_of(target)
    where, registers = tvm_link.compiles_for(target, cpu), tvm_cpu.registers_of(cpu)
    known = tvm_records.read(shared)
    module = tvm_import.at_sizes(tvm_import.imported(model, target, BACKEND.source(target)), _opt(model))
    module = tvm_compile.lowered(module, where, registers)
    if minutes:
        _take_threads(1)
        until = time.monotonic() + 60 * minutes
        tvm_tuning.tune(module, where, registers, known, until, functools.partial(tvm_records.add, shared), report)
    found = tvm_tuning.known(module, registers, tvm_records.read(shared))
    tvm_records.write_choices(out / tvm_records.CHOICES, {name: found.choices[name] for name in found.used})
    lacking: list[JsonValue] = [*sorted(found.lacking)]
    return {"workloads": len(found.used), "not_tuned": lacking}


def _opt(model: Stored) -> dict[str, int]:
    return {name: axis.opt for name, axis in model.signature().axes.items()}


def _minutes(target: Target) -> int:
    """How long the row lets nests be measured; 0 where it doesn't."""
    found = re.fullmatch(r"minutes:([1-9]\d{0,3})", str(target.options.get("tune", "off")))
    return int(found[1]) if found else 0


def _built(model: Stored, target: Target, choices: Path | None, out: Path) -> Mapping[str, JsonValue]:
    """Import, schedule, compile and link in this process; returns the facts."""
    from pipeline.tvm import compile as tvm_compile
    from pipeline.tvm import tuning as tvm_tuning

    cpu = tvm_cpu.cpu_of(target)
    where = tvm_link.compiles_for(target, cpu)
    module = tvm_import.imported(model, target, BACKEND.source(target))
    registers = tvm_cpu.registers_of(cpu)
    _check_integers(model, target, cpu, registers)
    chooser = tvm_tuning.Known(tvm_records.read_choices(choices) if choices is not None else {}, _opt(model))
    try:
        module = tvm_compile.lowered(module, where, registers)
        module = tvm_compile.scheduled(module, where, registers, chooser)
        integers = tvm_compile.integer_contractions_of(module)
        module, weights = _divided(module, target)
        executable = tvm_compile.compiled(module, where)
    except Exception as error:  # TVM's passes raise everything from TypeError to their own
        raise BuildError(
            f"tvm can't compile the model for `{target.name}`: {tvm_import.plain(error)}",
            hint='the other way in (option `import = "program"` or `"onnx"`) may do better',
        ) from error
    if weights:
        tvm_weights.write(weights, out)
    tuned = {} if choices is None else {"tuned": len(chooser.used), "not_tuned": len(chooser.lacking)}
    return {"cpu": cpu, "int8": integers, **tuned, **tvm_link.write(executable, target, out)}


def _check_integers(model: Stored, target: Target, cpu: str, registers: Registers) -> None:
    """A quantised graph needs an instruction for it: without one its engine would be slower than fp32."""
    wanted = tvm_import.activations(model) if BACKEND.source(target) == "onnx" else None
    if wanted is None or (registers.dot is not None and registers.dot.left == wanted):
        return
    has = "none" if registers.dot is None else f"only one for {registers.dot.left}"
    raise BuildError(
        f"`{target.name}`: no dot products of {wanted} with int8 on `{cpu}` (it has {has}, as far as is known)",
        hint="remove that INT8 scheme from the row, or give it the `arch` of a processor that has them",
    )


# --- from the model to a library -----------------------------------------------------------------------------------


def _divided(module: Any, target: Target) -> tuple[Any, dict[str, Any]]:
    """The module, and the weights that go into a file of their own."""
    place = target.options.get("weights", "auto")
    if place == "inside" or (place == "auto" and tvm_weights.size_of(module) <= tvm_weights.LARGEST_INSIDE):
        return module, {}
    return tvm_weights.detached(module)


BACKEND = Tvm()

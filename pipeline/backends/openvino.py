"""Backend `openvino`: OpenVINO's IR, ``model.xml`` with the graph and ``model.bin`` with the weights.

The IR is the same for every processor; OpenVINO compiles it where it is loaded. ``arch`` of a row says for which of
its devices: ``cpu`` (or ``native``), ``gpu`` or ``npu``. Floats are multiplied in float32 unless the graph is of the
scheme ``bf16``, or the row says otherwise: left to itself, OpenVINO takes bfloat16 where the CPU has it. INT8 is what
the graph asks for with Q/DQ pairs. ``runtime.json`` keeps the settings with which the IR must be compiled.

Options of a row:
    import: ``onnx`` (default) or ``program``: which artifact it reads; the program carries fp32 only.
    precision: of floats: ``f32`` (default), ``bf16``, or ``auto``, which leaves it to OpenVINO.
    hint: ``latency`` (default), or ``throughput``, which shares the cores among calls made at once.
    threads: of one engine; 0 (default) takes every core.
    streams: calls that run at once; 0 (default) leaves it to `hint`.
    compress_to_fp16: true keeps float weights in 16 bits, which halves them; default false.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import digest, host, openvino_import, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UsageError, unknown
from pipeline.store import write_json
from pipeline.types import ProfiledRunner, Runner, Scheme, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Signature, Tensors

GRAPH, WEIGHTS, SETTINGS = "model.xml", "model.bin", "runtime.json"
DEVICES = {"cpu": "CPU", "native": "CPU", "gpu": "GPU", "npu": "NPU"}
NODES = {"gpu": "dri/renderD*", "npu": "accel/accel*"}
"""Where Linux shows these devices, below ``/dev``."""

# OpenVINO 2026.4 keeps compiled kernels by size, and after an attention over a single element it takes a wrong one for
# one over 17 or more: all numbers are wrong. Without them, a call of other sizes than the last may take twice as long.
NO_CACHE: Mapping[str, JsonValue] = {"CPU_RUNTIME_CACHE_CAPACITY": 0}

CHOICES = {
    "import": ("onnx", "program"),
    "precision": ("f32", "bf16", "auto"),
    "hint": ("latency", "throughput"),
}

# what decides which kernels OpenVINO's CPU plug-in takes, and so what `facts` say that an engine runs in
DECIDING_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)


class OpenVino:
    """See `pipeline.types.Backend`. What `int8-u8u8` and `int8-dynamic` ask for it would multiply in floats."""

    name = "openvino"
    option_names = frozenset({*CHOICES, "threads", "streams", "compress_to_fp16"})
    schemes: frozenset[Scheme] = frozenset({"fp32", "fp16", "bf16", "int8-u8s8", "int8-s8s8"})

    def source(self, target: Target) -> Literal["onnx", "program"]:
        """As the option `import` says."""
        return "program" if target.options.get("import") == "program" else "onnx"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """Only the package can be: an IR is built anywhere."""
        return host.absent("openvino", "openvino", "openvino")

    def not_runnable(self, target: Target) -> str | None:
        """The package, the row's own hardware, or the device of its `arch`."""
        reason = targets.unfit(target) or self.missing(target)
        if reason is None and target.arch in NODES and not any(Path("/dev").glob(NODES[target.arch])):
            return f"this host has no Intel {target.arch.upper()} (no /dev/{NODES[target.arch]})"
        return reason

    def tools(self, target: Target) -> Mapping[str, str]:
        """The version; where an engine is compiled as a check, also the features of this CPU."""
        found = host.versions(["openvino"])
        if _compiles_here(target):
            features = [feature for feature in DECIDING_FEATURES if feature in host.cpu_features()]
            found["cpu"] = " ".join([host.machine(), *features])
        return found

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Convert, write the IR, and compile it where this host is what it is for.

        Raises:
            UsageError: an option has a value that doesn't exist.
            BuildError: an operator can't be converted or compiled.
        """
        _check(target)
        imported = openvino_import.imported(model, target, self.source(target))
        settings = _settings(target, bfloat=imported.bfloat)
        if DEVICES[target.arch] == "CPU" and imported.attends_to_one:
            settings |= NO_CACHE
        compress = bool(target.options.get("compress_to_fp16", False))
        openvino_import.runtime().save_model(imported.model, out / GRAPH, compress_to_fp16=compress)
        write_json(
            out / SETTINGS,
            {
                "needs": f"openvino {host.version('openvino')}",
                "device": DEVICES[target.arch],
                "settings": settings,
                "weights": digest.of_file(out / WEIGHTS),
            },
        )
        if not _compiles_here(target):
            return {}
        core = openvino_import.runtime().Core()
        try:
            compiled = core.compile_model(core.read_model(out / GRAPH), DEVICES[target.arch], settings)
        except Exception as error:  # everything is a RuntimeError
            raise openvino_import.refused(imported, target, "compile", error) from error
        if imported.source.suffix != ".onnx":
            return {}
        from pipeline import openvino_layers

        return {"runs_in": openvino_layers.runs_in(compiled, imported.source)}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """An inference request on the row's device.

        Raises:
            BuildError: a file is broken, or this version of OpenVINO can't read it.
        """
        compiled = _opened(engine, target, threads)
        yield checked(_runner(compiled.create_infer_request(), engine.signature()), engine.signature())

    @contextlib.contextmanager
    def load_profiled(self, engine: Stored, target: Target, threads: int) -> Iterator[ProfiledRunner]:
        """As `load`, with OpenVINO's counters on.

        Raises:
            BuildError: as `load`.
        """
        from pipeline.openvino_profile import Recorder

        compiled = _opened(engine, target, threads, {"PERF_COUNT": True})
        request = compiled.create_infer_request()
        yield Recorder(compiled, request, checked(_runner(request, engine.signature()), engine.signature()))


def _opened(engine: Stored, target: Target, threads: int | None, more: Mapping[str, JsonValue] | None = None) -> Any:
    """The compiled model.

    Raises:
        BuildError: a file is broken, or this version of OpenVINO can't read it.
    """
    _check(target)
    lacking = [name for name in (GRAPH, WEIGHTS, SETTINGS) if name not in engine.artifact.files]
    if lacking:
        raise BuildError(
            f"`{engine.path}` is no engine of openvino: of {GRAPH}, {WEIGHTS} and {SETTINGS} it lacks {lacking[0]}",
            hint="`exportyard export` builds it again",
        )
    try:
        made_for = json.loads(engine.file(SETTINGS).read_text())
        if digest.of_file(engine.file(WEIGHTS)) != made_for["weights"]:
            raise ValueError(f"{WEIGHTS} is not as it was written")  # OpenVINO would take any bytes for numbers
        settings = dict(made_for["settings"]) | dict(more or {})
        if made_for["device"] == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads or int(target.options.get("threads", 0)) or host.cpu_count()
        core = openvino_import.runtime().Core()
        model = core.read_model(engine.file(GRAPH), engine.file(WEIGHTS))
        return core.compile_model(model, made_for["device"], settings)
    except Exception as error:  # a RuntimeError of OpenVINO's, or settings that aren't any
        raise BuildError(
            f"openvino can't load the engine `{engine.file(GRAPH)}` with {WEIGHTS}: {openvino_import.plain(error)}",
            hint="`exportyard export` builds it again",
        ) from error


def _runner(request: Any, signature: Signature) -> Runner:
    def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
        # not `request.infer`, which looks for half as long again at what it was given
        for place, spec in enumerate(signature.inputs):
            given, tensor = feeds[spec.name], request.get_input_tensor(place)
            tensor.shape = given.shape
            tensor.data[...] = given
        request.start_async()
        request.wait()
        return {spec.name: request.get_output_tensor(place).data.copy() for place, spec in enumerate(signature.outputs)}

    return run


def _compiles_here(target: Target) -> bool:
    return DEVICES.get(target.arch) == "CPU" and targets.unfit(target) is None


def _settings(target: Target, *, bfloat: bool) -> dict[str, JsonValue]:
    """OpenVINO's own names and values; see its list of properties."""
    precision = "bf16" if bfloat else str(target.options.get("precision", "f32"))
    settings: dict[str, JsonValue] = {"PERFORMANCE_HINT": str(target.options.get("hint", "latency")).upper()}
    if precision != "auto":
        settings["INFERENCE_PRECISION_HINT"] = precision
    if target.options.get("streams"):
        settings["NUM_STREAMS"] = target.options["streams"]
    return settings


def _check(target: Target) -> None:
    where = f"target `{target.name}`"
    if target.arch not in DEVICES:
        raise unknown("`arch` for openvino", target.arch, DEVICES, where=where)
    for option, values in CHOICES.items():
        value = target.options.get(option, values[0])
        if value not in values:
            raise unknown(f"value of `{option}`", str(value), values, where=where)
    for option in ("threads", "streams"):
        value = target.options.get(option, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UsageError(f"{where}: {option} = {value!r}", hint="expected a whole number; 0 is the default")
    if not isinstance(target.options.get("compress_to_fp16", False), bool):
        raise UsageError(f"{where}: compress_to_fp16 is {target.options['compress_to_fp16']!r}", hint="true or false")
    if target.options.get("import") == "program" and any(scheme != "fp32" for scheme in target.schemes):
        raise UsageError(
            f'{where}: import = "program" carries fp32 only, the row also has other schemes',
            hint='remove those schemes, or `import = "program"`',
        )


BACKEND = OpenVino()

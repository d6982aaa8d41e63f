"""Backend `onnxruntime`: a graph that ONNX Runtime has optimised ahead of time.

Options of a row:
    optimization: ``basic``, ``extended`` (default; serves any CPU) or ``all``, which lays convolutions out for
        the vectors of the CPU that builds it, and so needs the hardware of the row.
    format: ``onnx`` (default), or ``ort``, the flatbuffer that small mobile runtimes read.
    threads: threads that run one operator; 0 (default) takes every core.
    provider: ``cpu`` (default), ``cuda`` or ``tensorrt``; the last two have options of their own (`pipeline.ort_gpu`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, ort_gpu, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, NotApplicable, UnavailableError, UsageError, unknown
from pipeline.types import ProfiledRunner, Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

LEVELS = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
FORMATS = {"onnx": "model.onnx", "ort": "model.ort"}
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
ERRORS_ONLY = 3

# While an engine is built: see `pipeline.ort_floats`, which sees to it that a device can leave it on.
OVERZEALOUS = ["WeightBiasQuantization"]

# Above this, weights go into a file beside the graph: a protobuf message ends at 2 GiB.
INLINE_BYTES = 1_900_000_000

# What decides which kernels and layouts ONNX Runtime chooses on a CPU.
DECIDING_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")


class OnnxRuntime:
    """See `pipeline.types.Backend`. Its engine is ``model.onnx`` (with ``model.onnx.data``) or ``model.ort``.

    Beside ``model.ort`` is what its runtime must have, and where that comes from (`pipeline.ort_mobile`).
    """

    name = "onnxruntime"
    option_names = frozenset({"provider"}) | ort_gpu.CPU_OPTIONS | ort_gpu.GPU_OPTIONS
    schemes: frozenset[Scheme] = frozenset({"fp32", "fp16", "int8-dynamic", "int8-u8s8", "int8-s8s8", "int8-u8u8"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the ONNX graph."""
        return "onnx"

    def missing(self, target: Target) -> str | None:
        """The package, or for ``optimization = "all"`` the row's own hardware."""
        if not host.has_module("onnxruntime"):
            return "the package `onnxruntime` is not installed"
        reason = targets.unfit(target)
        if target.options.get("optimization") == "all" and reason is not None:
            return f'{reason} (optimization = "all" is for the CPU that builds it; "extended" builds anywhere)'
        return None

    def not_runnable(self, target: Target) -> str | None:
        """The package, or the row's own hardware."""
        if not host.has_module("onnxruntime"):
            return "the package `onnxruntime` is not installed"
        return ort_gpu.not_runnable(target) if ort_gpu.is_for_gpu(target) else targets.unfit(target)

    def tools(self, target: Target) -> Mapping[str, str]:
        """The runtime's version; at level ``all`` also the features of this CPU."""
        found = host.versions(PACKAGES)
        if target.options.get("optimization") == "all":
            features = [feature for feature in DECIDING_FEATURES if feature in host.cpu_features()]
            found["cpu"] = " ".join([host.machine(), *features])
        return found

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Optimise the graph and save it.

        Raises:
            UsageError: an option has a value that doesn't exist.
            BuildError: an operator has no kernel, or the graph is wrong.
        """
        import onnxruntime

        from pipeline import ort_format, ort_mobile
        from pipeline.origin import of_error

        if ort_gpu.check(target) != "cpu":
            return ort_gpu.build(model, target, out)
        level, file = _choice(target, "optimization", "extended", LEVELS), _choice(target, "format", "onnx", FORMATS)
        options = _options(target)
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(out / "model.onnx")
        # packed weights are for running; they'd cost a copy of every weight here and aren't saved
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Arm kernels take signed 8-bit Q/DQ as it is; on x86 it is turned into unsigned, which is faster there
        arm = target.machine in ("aarch64", "armv7l")
        options.add_session_config_entry("session.qdqisint8allowed", "1" if arm else "0")
        if model.size_bytes > INLINE_BYTES:
            _keep_weights_beside(options, model, file)
        source = model.file("model.onnx")
        try:
            _session(source, options, without=OVERZEALOUS)
        except Exception as error:  # its own exceptions share no class but Exception
            raise BuildError(
                f"onnxruntime can't build `{target.name}`: {_plain(error)}{of_error(source, str(error))}",
                hint="change that part of the model, or leave out the target in the recipe's `targets`",
            ) from error
        _finish(out / "model.onnx", source)
        if file == "model.ort":
            _convert(out / "model.onnx", out / file, options)
            ort_format.make_canonical(out / file)
            ort_mobile.write(out / file, target)
        return {"optimization": level.removeprefix("ORT_ENABLE_").lower()}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """A session on the row's provider.

        Raises:
            BuildError: the file is broken, or this version of ONNX Runtime can't read it.
            UnavailableError: the provider is for a GPU that this host hasn't got.
        """
        options = _options(target, threads)
        if ort_gpu.check(target) != "cpu":
            reason = self.not_runnable(target)
            if reason is not None:
                raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
            yield checked(ort_gpu.runner(engine, target, options), engine.signature())
            return
        yield _runner(_opened(engine, target, options), engine)

    @contextlib.contextmanager
    def load_profiled(self, engine: Stored, target: Target, threads: int) -> Iterator[ProfiledRunner]:
        """As `load`, with ONNX Runtime's profiler on.

        Raises:
            NotApplicable: the provider is for a GPU, whose kernels have ended when nobody has looked at the clock.
            BuildError: as `load`.
        """
        from pipeline import ort_profile

        if ort_gpu.check(target) != "cpu":
            raise NotApplicable("ONNX Runtime's profiler sees the launch of a GPU's kernel, and not how long it runs")
        options = _options(target, threads)
        # from the mobile format no graph can be written back
        keeps_graph = _choice(target, "format", "onnx", FORMATS) == "model.onnx"
        with ort_profile.Recorder(options, keeps_graph=keeps_graph) as recorder:
            session = _opened(engine, target, options)
            recorder.watch(session, _runner(session, engine))
            yield recorder


def _opened(engine: Stored, target: Target, options: Any) -> Any:
    """A session on the CPU.

    Raises:
        BuildError: the file is broken, or this version of ONNX Runtime can't read it.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    # a graph laid out for this CPU is finished; a portable one gets its layout here
    done = target.options.get("optimization") == "all"
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if done else levels.ORT_ENABLE_ALL
    path = engine.file(_choice(target, "format", "onnx", FORMATS))
    try:
        return _session(path, options)
    except Exception as error:  # its own exceptions share no class but Exception
        raise BuildError(
            f"onnxruntime can't load the engine `{path}`: {_plain(error)}",
            hint="`exportyard export` builds it again",
        ) from error


def _runner(session: Any, engine: Stored) -> Runner:
    signature = engine.signature()
    outputs = [spec.name for spec in signature.outputs]

    def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
        return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))

    return checked(run, signature)


def _choice(target: Target, option: str, default: str, choices: Mapping[str, str]) -> str:
    value = str(target.options.get(option, default))
    if value not in choices:
        raise unknown(f"value of `{option}`", value, choices, where=f"target `{target.name}`")
    return choices[value]


def _options(target: Target, threads: int | None = None) -> Any:
    import onnxruntime

    own = target.options.get("threads", 0)
    if not isinstance(own, int) or own < 0:
        raise UsageError(f"target `{target.name}`: threads = {own!r}", hint="expected a whole number; 0 is all")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or own or host.cpu_count()
    return options


def _session(path: Path, options: Any, without: Sequence[str] = ()) -> Any:
    import onnxruntime

    # `disable_fallback`: a failed session isn't tried again by other means, which would only blur the error
    return onnxruntime.InferenceSession(
        str(path),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        disable_fallback=True,
        disabled_optimizers=list(without),
    )


def _finish(optimised: Path, source: Path) -> None:
    """Rewrite the file that ONNX Runtime has made of `source`: floats stay floats, equal graphs get equal bytes."""
    import onnx

    from pipeline import ort_floats, ort_names

    model = onnx.load(optimised, load_external_data=False)  # weights beside it stay where they are
    ort_floats.keep(model)
    ort_names.make_canonical(model, source)
    optimised.write_bytes(model.SerializeToString(deterministic=True))


def _convert(optimised: Path, path: Path, options: Any) -> None:
    """Write the optimised graph as a flatbuffer, and remove it."""
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    _session(optimised, options)
    optimised.unlink()


def _keep_weights_beside(options: Any, model: Stored, file: str) -> None:
    if file == "model.ort":
        raise BuildError(
            f"{model.size_bytes:,} bytes are too many for one `.ort` file (2 GiB at most)",
            hint='use `format = "onnx"`, which keeps large weights in a file of their own',
        )
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{file}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


def _plain(error: Exception) -> str:
    """The runtime's message on one line, without its ``[ONNXRuntimeError] : 9 :``."""
    text = " ".join(str(error).split())
    return text.rpartition("[ONNXRuntimeError] : ")[2].partition(" : ")[2][:400] or text[:400]


BACKEND = OnnxRuntime()

"""ONNX Runtime on an NVIDIA GPU: its CUDA and TensorRT providers, which compile a graph as they load it.

So an engine for them is the ONNX graph itself, and can be made on any machine. The names of their options are checked
against those in the libraries of onnxruntime-gpu (tests/apis/onnxruntime-gpu.txt).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from pipeline import dims, gpu, host
from pipeline import tensorrt_plan as plan
from pipeline.errors import BuildError, UsageError, last_line, unknown
from pipeline.types import Runner, Signature, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
PROVIDERS = ("cpu", "cuda", "tensorrt")
PACKAGE = "onnxruntime-gpu"
GPU_OPTIONS = frozenset({"cuda_graph", "tf32", "workspace_mb", "timing_cache", "level"})
CPU_OPTIONS = frozenset({"optimization", "format", "threads"})
MIB = 1 << 20

Providers = Sequence[tuple[str, Mapping[str, str]]]


def is_for_gpu(target: Target) -> bool:
    """Whether the row names a provider for GPUs, or one that doesn't exist. Never raises."""
    return target.options.get("provider", "cpu") != "cpu"


def not_runnable(target: Target) -> str | None:
    """The row's GPU, or the package with its providers. Cheap, and never raises."""
    reason = gpu.unfit(target)
    if reason is not None or host.version(PACKAGE) is not None:
        return reason
    return f"the package `{PACKAGE}`, which takes the place of `onnxruntime`, is not installed (docs/gpu.md)"


def check(target: Target) -> str:
    """The row's provider.

    Raises:
        UsageError: there is no such provider, or an option is one that it doesn't have.
    """
    provider, where = str(target.options.get("provider", "cpu")), f"target `{target.name}`"
    if provider not in PROVIDERS:
        raise unknown("value of `provider`", provider, PROVIDERS, where=where)
    foreign = set(target.options) & (GPU_OPTIONS if provider == "cpu" else CPU_OPTIONS)
    if provider == "tensorrt":
        foreign |= set(target.options) & {"cuda_graph", "tf32"}
    if provider == "cuda":
        foreign |= set(target.options) & {"timing_cache", "level"}
    if foreign:
        raise UsageError(
            f'{where}: `{min(foreign)}` is no option of provider = "{provider}"',
            hint="docs/gpu.md lists the options of each provider",
        )
    plan.settings_of(target)
    return provider


def build(model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
    """Copy the graph, in the form that the provider reads.

    Raises:
        UsageError: an option doesn't exist, or has a value that doesn't.
        BuildError: the graph isn't one.
    """
    import onnx

    from pipeline import tensorrt_graph

    provider, source = check(target), model.file("model.onnx")
    try:
        onnx.checker.check_model(source)
    except Exception as error:  # of protobuf, of the checker, of the file system
        raise BuildError(f"onnxruntime can't build `{target.name}`: {last_line(error)}") from error
    if provider != "tensorrt" or tensorrt_graph.readable(source, out) == source:
        for path in sorted(source.parent.glob("model.onnx*")):
            shutil.copyfile(path, out / path.name)
    return {"provider": provider}


def providers(target: Target, signature: Signature, numbers: frozenset[str], cache: Path) -> Providers:
    """The providers of a session, best first, each with its options.

    Args:
        target: a row that `check` has taken.
        signature: of the engine; TensorRT builds for the ranges of its axes.
        numbers: what the graph computes in besides fp32: ``fp16``, ``int8``.
        cache: where TensorRT's engines and timings are kept.
    """
    settings = plan.settings_of(target)
    limit = settings.workspace_mb * MIB
    cuda = {"use_tf32": _spell(settings.tf32)}
    if target.options["provider"] == "cuda":
        cuda["enable_cuda_graph"] = _spell(settings.cuda_graph)
        if limit:
            cuda["gpu_mem_limit"] = str(limit)
        return [(CUDA, cuda), (CPU, {})]
    tensorrt = {
        "trt_builder_optimization_level": str(settings.level),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": _spell(settings.timing_cache),
        "trt_timing_cache_path": str(cache),
        # without these it would take fp32 for what the graph has in other numbers
        "trt_fp16_enable": _spell("fp16" in numbers),
        "trt_int8_enable": _spell("int8" in numbers),
    }
    if limit:
        tensorrt["trt_max_workspace_size"] = str(limit)
    for ranges in plan.profiles(signature):
        for end in ("min", "opt", "max"):
            shapes = {name: getattr(one, end) for name, one in ranges.items()}
            text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            tensorrt[f"trt_profile_{end}_shapes"] = text
    return [(TENSORRT, tensorrt), (CUDA, cuda), (CPU, {})]


def _spell(value: bool) -> str:
    return "1" if value else "0"


def numbers_of(path: Path) -> frozenset[str]:
    """What a graph computes in besides fp32."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = {"fp16"} if any(one.data_type == onnx.TensorProto.FLOAT16 for one in graph.initializer) else set()
    return frozenset(found | ({"int8"} if any(node.op_type == "QuantizeLinear" for node in graph.node) else set()))


def cache_of(engine: Stored) -> Path:
    """Where TensorRT's own engines for `engine` are kept on this machine: below the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    here = gpu.found()
    arch = "none" if here is None else here.arch
    return Path(root) / "exportyard" / PACKAGE / f"{engine.digest[:16]}-{arch}-{host.version(PACKAGE)}"


def runner(engine: Stored, target: Target, options: Any) -> Runner:
    """The engine on the GPU.

    Args:
        engine: what `build` made.
        target: its row.
        options: of the session.

    Raises:
        BuildError: it can't be loaded, or the GPU's provider can't.
    """
    import onnxruntime

    path, signature = engine.file("model.onnx"), engine.signature()
    wanted = check(target)
    onnxruntime.preload_dlls()
    try:
        found = providers(target, signature, numbers_of(path), cache_of(engine))
        if wanted == "tensorrt":
            cache_of(engine).mkdir(parents=True, exist_ok=True)
            import tensorrt  # noqa: F401  its libraries are then found
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=[(name, dict(more)) for name, more in found]
        )
    except Exception as error:  # its own exceptions share no class but Exception
        raise BuildError(
            f"onnxruntime can't load the engine `{path}`: {last_line(error)}",
            hint="`exportyard export` builds it again",
        ) from error
    # a provider whose libraries are not there is left out without an error
    if found[0][0] not in session.get_providers():
        raise BuildError(
            f"onnxruntime has no {found[0][0]} here, only {', '.join(session.get_providers())}",
            hint="docs/gpu.md lists the libraries that it needs",
        )
    if plan.settings_of(target).cuda_graph:
        return Recorded(session, signature, "cuda").run
    outputs = [spec.name for spec in signature.outputs]

    def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
        return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))

    return run


class Recorded:
    """A session whose calls are recorded as CUDA graphs, one for each combination of sizes, and played back.

    A graph reads and writes where it did when it was recorded: so each has tensors of its own on the device.

    Args:
        session: with ``enable_cuda_graph``.
        signature: says how large outputs are.
        device: ``cuda``.
    """

    def __init__(self, session: Any, signature: Signature, device: str) -> None:
        self._session, self._signature, self._device = session, signature, device
        self._calls: dict[tuple[int, ...], tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {}

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """One call."""
        import numpy as np

        from pipeline import padding

        sizes = padding.sizes_of(feeds, self._signature)
        key = tuple(sizes.values())
        if key not in self._calls:
            self._calls[key] = self._bound(sizes)
        binding, options, inputs, outputs = self._calls[key]
        for name, tensor in inputs.items():
            tensor.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(binding, options)
        return {name: np.array(tensor.numpy()) for name, tensor in outputs.items()}

    def _bound(self, sizes: Mapping[str, int]) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        import numpy as np
        import onnxruntime

        def tensor(spec: Any) -> Any:
            zeros = np.zeros([dims.size_of(dim, sizes) for dim in spec.shape], spec.dtype)
            return onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self._device, 0)

        inputs = {spec.name: tensor(spec) for spec in self._signature.inputs}
        outputs = {spec.name: tensor(spec) for spec in self._signature.outputs}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(len(self._calls) + 1))
        return binding, options, inputs, outputs

"""From an ONNX graph to a TensorRT engine: calls of TensorRT's builder, and nothing else.

What is asked for is decided in `pipeline.tensorrt_plan`. Names and keywords of every call are checked against
TensorRT 10 and 11 (tests/apis), since most machines that work on this file have no TensorRT.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tensorrt as trt

from pipeline import tensorrt_plan as plan
from pipeline.errors import BuildError
from pipeline.tensorrt_plan import Fault, Profile, Settings

if TYPE_CHECKING:
    from pipeline.types import Target

MIB = 1 << 20


class Log(trt.ILogger):  # type: ignore[misc,unused-ignore]
    """Keeps what went wrong, and prints nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.lines.append(msg)


def build(source: Path, target: Target, settings: Settings, profiles: Sequence[Profile], cache: Path | None) -> bytes:
    """The engine of the graph in `source`, whose weights may lie beside it.

    Args:
        source: the ONNX graph; its numeric form is that of the engine.
        target: for messages.
        settings: options of its row.
        profiles: ranges of sizes.
        cache: timings of kernels, read and written; None leaves them out.

    Raises:
        BuildError: TensorRT can't import or build it.
    """
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise plan.parse_error(_faults(parser), source, target)
    _check_inputs(network, target)
    config = builder.create_builder_config()
    _configure(config, settings)
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile))
    timings = None if cache is None else _timings(config, cache)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise plan.build_error(log.lines, source, target)
    if cache is not None and timings is not None:
        _keep(timings, cache)
    return bytes(made)


def _faults(parser: trt.OnnxParser) -> list[Fault]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [Fault(node=error.node_name(), operator=error.node_operator(), text=error.desc()) for error in errors]


def _check_inputs(network: trt.INetworkDefinition, target: Target) -> None:
    """An input whose values decide shapes lies in the host's memory and has ranges of values, which no axis gives."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BuildError(
                f"tensorrt can't build `{target.name}`: the values of input `{tensor.name}` decide the shape of others",
                hint="derive those sizes from the shape of an input",
            )


def _configure(config: trt.IBuilderConfig, settings: Settings) -> None:
    config.builder_optimization_level = settings.level
    if settings.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb * MIB)
    if not settings.tf32:  # on unless told otherwise: products of fp32 with 10 bits of mantissa
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif settings.hardware == "same_compute_capability":
        config.hardware_compatibility_level = _same_capability()


def _same_capability() -> trt.HardwareCompatibilityLevel:
    """A level that TensorRT 10.3, as on Jetson, has not."""
    found: trt.HardwareCompatibilityLevel | None = getattr(
        trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None
    )
    if found is None:
        raise BuildError(
            f'tensorrt {trt.__version__} has no `hardware = "same_compute_capability"`',
            hint="leave `hardware` out of the row",
        )
    return found


def _profile(builder: trt.Builder, ranges: Profile) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for name, one in ranges.items():
        profile.set_shape(name, min=trt.Dims(one.min), opt=trt.Dims(one.opt), max=trt.Dims(one.max))
    return profile


def _timings(config: trt.IBuilderConfig, cache: Path) -> trt.ITimingCache:
    known = cache.read_bytes() if cache.is_file() else b""
    timings = config.create_timing_cache(known)
    config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _keep(timings: trt.ITimingCache, cache: Path) -> None:
    """Replace the file in one step: others may read it at the same time."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as stream:
        stream.write(bytes(timings.serialize()))
    os.replace(stream.name, cache)  # noqa: PTH105

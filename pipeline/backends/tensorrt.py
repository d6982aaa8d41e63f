"""Backend `tensorrt`: one engine file, built by TensorRT 10 or 11 on the GPU that it is for.

``arch`` of a row is a compute capability: ``sm90``. The graph decides what numbers an engine computes in (the network
is strongly typed): fp32, fp16, or INT8 where it has Q/DQ pairs.

Options of a row: see `pipeline.tensorrt_plan.Settings` and docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import gpu, host
from pipeline import tensorrt_plan as plan
from pipeline.backends import checked
from pipeline.errors import UnavailableError
from pipeline.store import write_json
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pipeline.gpu import Gpu
    from pipeline.store import Stored

ENGINE, FACTS = "model.engine", "build.json"
PACKAGES = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")


class TensorRt:
    """See `pipeline.types.Backend`. Its engine is ``model.engine``; ``build.json`` says what it was built with."""

    name = "tensorrt"
    option_names = plan.OPTIONS
    schemes: frozenset[Scheme] = frozenset({"fp32", "fp16", "int8-s8s8"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the ONNX graph."""
        return "onnx"

    def missing(self, target: Target) -> str | None:
        """The row's GPU, or the package."""
        return lacking(target, "tensorrt", "tensorrt")

    def not_runnable(self, target: Target) -> str | None:
        """As `missing`: it runs where it can be built."""
        return self.missing(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """Versions of TensorRT, and the GPU whose timings choose its kernels."""
        found = host.versions(PACKAGES)
        here = gpu.found()
        return found if here is None else found | {"gpu": f"{here.name} {here.arch}"}

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Import the graph, time kernels, write the engine.

        Raises:
            UsageError: an option has a value that doesn't exist.
            UnavailableError: this host lacks the GPU or the package.
            BuildError: an operator, or a type of an input, is not supported.
        """
        settings, signature = plan.settings_of(target), model.signature()
        profiles = plan.profiles(signature, settings.opt_profile)
        plan.check_dtypes(signature, target)
        reason, here = self.missing(target), gpu.found()
        if reason is not None or here is None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        import tensorrt as trt

        from pipeline import tensorrt_build, tensorrt_graph

        cache = plan.timing_cache(here, trt.__version__) if settings.timing_cache else None
        with tempfile.TemporaryDirectory() as folder:
            source = tensorrt_graph.readable(model.file("model.onnx"), Path(folder))
            (out / ENGINE).write_bytes(tensorrt_build.build(source, target, settings, profiles, cache))
        facts = facts_of(here, trt.__version__, len(profiles))
        write_json(out / FACTS, facts)
        return facts

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The engine on this host's GPU; feeds and outputs are copied there and back at each call.

        Raises:
            BuildError: the file is broken, or of another version or GPU.
            UnavailableError: this host lacks the GPU or the package.
        """
        settings, reason = plan.settings_of(target), self.not_runnable(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
        from pipeline.tensorrt_run import Engine

        signature = engine.signature()
        yield checked(Engine(engine.file(ENGINE), signature, settings).run, signature)


def lacking(target: Target, module: str, package: str) -> str | None:
    """The row's GPU or the package that this host lacks, or None; `package` is the name of its extra, too.

    What is for all GPUs from Ampere on is built and run on any that is at least the row's.
    """
    newer = target.options.get("hardware") == "ampere_plus"
    return gpu.unfit(target, at_least=newer) or host.absent(module, package, package)


def facts_of(here: Gpu, version: str, profiles: int) -> dict[str, JsonValue]:
    """What an engine was built with, and where it will run."""
    return {
        "gpu": here.name,
        "compute_capability": "{}.{}".format(*here.capability),
        "tensorrt": version,
        "cuda": here.cuda,
        "driver": here.driver,
        "profiles": profiles,
    }


BACKEND = TensorRt()

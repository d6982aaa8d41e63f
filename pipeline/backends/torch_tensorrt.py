"""Backend `torch_tensorrt`: the program with its TensorRT parts compiled, and the rest left to PyTorch.

Nothing is lost where TensorRT lacks an operator: that part runs in PyTorch, and the engine's facts list it. ``arch`` of
a row is a compute capability: ``sm90``. Options of a row: see `Settings` and docs/gpu.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import gpu, host, origin
from pipeline import tensorrt_plan as plan
from pipeline.backends import checked
from pipeline.backends.tensorrt import facts_of, lacking
from pipeline.errors import BuildError, UnavailableError, UsageError, last_line, unknown
from pipeline.store import write_json
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store import Stored

FILES = {"program": "model.pt2", "aoti": "model.pt2", "engine": "model.engine"}
FACTS = "build.json"
PACKAGES = ("torch-tensorrt", "torch", "tensorrt", "tensorrt-cu12", "tensorrt-cu13")
SHARED = ("level", "workspace_mb", "tf32", "version_compatible", "hardware", "cuda_graph")


@dataclass(frozen=True)
class Settings:
    """Options of a row besides those that it shares with `tensorrt`.

    Attributes:
        format: ``program``, for Python; ``aoti``, a package for libtorch, too; ``engine``, TensorRT's own file.
        min_block: fewest operators in a row that are worth an engine.
        whole: an operator that TensorRT lacks is an error.
    """

    format: str = "program"
    min_block: int = 5
    whole: bool = False


class TorchTensorRt:
    """See `pipeline.types.Backend`. Its engine is ``model.pt2`` or ``model.engine``, as the row's `format` says."""

    name = "torch_tensorrt"
    option_names = frozenset({"format", "min_block", "whole", *SHARED})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:
        """The row's GPU, or the package."""
        return lacking(target, "torch_tensorrt", "torch-tensorrt")

    def not_runnable(self, target: Target) -> str | None:
        """As `missing`: it runs where it can be built."""
        return self.missing(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """Versions, and the GPU whose timings choose the kernels."""
        found, here = host.versions(PACKAGES), gpu.found()
        return found if here is None else found | {"gpu": f"{here.name} {here.arch}"}

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Compile, save, and list what PyTorch still runs.

        Raises:
            UsageError: an option has a value that doesn't exist.
            UnavailableError: this host lacks the GPU or the package.
            BuildError: the program can't be compiled, or only in part where the row wants all of it.
        """
        own, shared, signature = settings_of(target), plan.settings_of(target), model.signature()
        plan.check_dtypes(signature, target)
        ranges = plan.profiles(signature)
        reason, here = self.missing(target), gpu.found()
        if reason is not None or here is None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        import tensorrt as trt

        from pipeline import program, torch_tensorrt_build

        loaded = program.load(model.file("program.pt2"))
        path = out / FILES[own.format]
        try:
            with program.quiet():
                fell_back = torch_tensorrt_build.build(loaded, signature, ranges, own, shared, path)
        except Exception as error:  # converters raise whatever they like
            raise BuildError(
                f"torch_tensorrt can't build `{target.name}`: {last_line(error)}"
                f"{origin.of_program_error(loaded, str(error))}",
                hint="`whole = false` leaves to PyTorch what TensorRT can't do" if own.whole else None,
            ) from error
        left: list[JsonValue] = [*fell_back]
        facts = facts_of(here, trt.__version__, len(ranges)) | {"fell_back": left}
        write_json(out / FACTS, facts)
        return facts

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The engine on this host's GPU; feeds and outputs are copied there and back at each call.

        Raises:
            BuildError: the file is broken, or of other versions.
            UnavailableError: this host lacks the GPU or the package.
        """
        own, shared, reason = settings_of(target), plan.settings_of(target), self.not_runnable(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
        path, signature = engine.file(FILES[own.format]), engine.signature()
        if own.format == "engine":
            from pipeline.tensorrt_run import Engine

            yield checked(Engine(path, signature, shared).run, signature)
            return
        from pipeline import program, torch_tensorrt_build

        try:
            module = torch_tensorrt_build.loaded(path, own)
        except Exception as error:
            raise BuildError(
                f"torch_tensorrt can't load the engine `{path}`: {last_line(error)}",
                hint="`exportyard export` builds it again",
            ) from error
        with torch_tensorrt_build.graphs(module, shared.cuda_graph and own.format == "program") as fast:
            call = torch_tensorrt_build.as_tuple(fast)
            yield checked(program.runner(call, signature, "cuda"), signature)


def settings_of(target: Target) -> Settings:
    """The options of `target` that are this backend's own.

    Raises:
        UsageError: one has a value that doesn't exist.
    """
    kind = str(target.options.get("format", Settings.format))
    if kind not in FILES:
        raise unknown("value of `format`", kind, FILES, where=f"target `{target.name}`")
    block = target.options.get("min_block", Settings.min_block)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise UsageError(
            f"target `{target.name}`: min_block = {block!r}", hint="expected a number of operators, from 1"
        )
    return Settings(format=kind, min_block=block, whole=plan.flag(target, "whole"))


BACKEND = TorchTensorRt()

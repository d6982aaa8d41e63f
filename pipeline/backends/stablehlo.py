"""Backend `stablehlo`: the program as an artifact of `jax.export`, which XLA compiles on a TPU, a GPU or a CPU.

What runs it needs JAX only, not torch. Whole numbers and floats of 64 bits are narrowed to 32 bits inside.

Options of a row:
    platforms: what it may be compiled for, with commas between: ``cpu``, ``tpu``, ``cuda`` (default: all three).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import buckets, host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, first_line, unknown
from pipeline.types import Runner, Scheme, Signature, Target, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

FILE = "model.stablehlo"
PLATFORMS = ("cpu", "tpu", "cuda")
NARROWER = {"int64": "int32", "float64": "float32"}  # TPUs have no hardware for 64 bits


class StableHlo:
    """See `pipeline.types.Backend`. Its engine is ``model.stablehlo``, serialised by `jax.export`, weights inside."""

    name = "stablehlo"
    option_names = frozenset({"platforms"})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """JAX, or torchax, which knows torch's operators in terms of JAX."""
        return host.absent("jax", "jax", "stablehlo") or host.absent("torchax", "torchax", "stablehlo")

    def not_runnable(self, target: Target) -> str | None:
        """JAX, the row's own hardware, or a platform that XLA has here: the CPU."""
        if "cpu" not in platforms_of(target):
            return f"it is compiled for {', '.join(platforms_of(target))}, and XLA has the CPU here"
        return host.absent("jax", "jax", "stablehlo") or targets.unfit(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """The versions that decide what is written."""
        return host.versions(["jax", "jaxlib", "torch", "torchax"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Lower the program for the row's platforms.

        Raises:
            UsageError: there is no such platform.
            UnavailableError: a package is missing.
            BuildError: an operator has no form in JAX, or its shape can't be told for every size of the axes.
        """
        for platform in platforms_of(target):
            if platform not in PLATFORMS:
                raise unknown("platform", platform, PLATFORMS, where=f"`platforms` of target `{target.name}`")
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        from pipeline import jax_lowering
        from pipeline import program as programs
        from pipeline.origin import of_program_error

        loaded, signature = programs.load(model.file(programs.FILE)), model.signature()
        try:
            blob = jax_lowering.exported(loaded, signature, platforms_of(target), NARROWER)
        except Exception as error:  # JAX's and torchax's, of many types
            place = of_program_error(loaded, str(error))
            if jax_lowering.is_about_sizes(error) and buckets.dynamic(signature):
                raise buckets.needed(target, f"can't tell a size for every size of the axes{place}") from error
            raise BuildError(
                f"stablehlo can't build `{target.name}`: {type(error).__name__}: {first_line(error)}{place}",
                hint="change that part of the model, or leave out the target in the recipe's `targets`",
            ) from error
        (out / FILE).write_bytes(blob)
        return {"platforms": [*platforms_of(target)], "narrowed": list(narrowed(signature))}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The model, compiled by XLA at each shape that it meets; XLA decides how many threads it takes.

        Raises:
            BuildError: the file is broken.
        """
        import jax
        import numpy as np
        from jax import export

        path, signature = engine.file(FILE), engine.signature()
        try:
            call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
        except Exception as error:  # flatbuffers', MLIR's, JAX's
            raise BuildError(
                f"stablehlo can't load the engine `{path}`: {type(error).__name__}: {first_line(error)}",
                hint="`exportyard export` builds it again",
            ) from error

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = call(*(_narrow(spec, feeds[spec.name]) for spec in signature.inputs))
            outputs = zip(signature.outputs, found, strict=True)
            return {spec.name: np.array(value, dtype=spec.dtype) for spec, value in outputs}

        yield checked(run, signature)


def platforms_of(target: Target) -> list[str]:
    """The row's platforms, in the order of the file."""
    return [name.strip() for name in str(target.options.get("platforms", ",".join(PLATFORMS))).split(",")]


def narrowed(signature: Signature) -> Iterator[str]:
    """Names of the inputs and outputs that have 64 bits outside and 32 inside."""
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype in NARROWER:
            yield spec.name


def _narrow(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    if spec.dtype not in NARROWER:
        return array
    kind = NARROWER[spec.dtype]
    if kind == "int32" and array.size and max(abs(int(array.min())), abs(int(array.max()))) > np.iinfo(kind).max:
        raise UsageError(f"input `{spec.name}` has a value that 32 bits don't hold", hint="this engine has no 64 bits")
    return array.astype(kind)


BACKEND = StableHlo()

"""Backend `executorch`: one ``.pte`` file for ExecuTorch's small C++ runtime, with XNNPACK for the heavy operators.

Options of a row:
    memory_mb: refuse an engine that sets aside more memory than this for activations; it is planned ahead, for the
        largest sizes of all axes at once (default 512).
    threads: threads that run one operator, for all engines in the process; 0 (default) takes every core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, processes, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, last_line, root_line
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

FILE = "model.pte"
MEMORY_MB = 512


class ExecuTorch:
    """See `pipeline.types.Backend`. Its engine is ``model.pte``, which holds weights and the plan of its memory."""

    name = "executorch"
    option_names = frozenset({"memory_mb", "threads"})
    schemes: frozenset[Scheme] = frozenset({"fp32", "int8-s8s8", "int8-dynamic"})
    quantizer = "xnnpack"

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """Only the package can be; the file is the same for every machine."""
        return host.absent("executorch", "executorch", "executorch")

    def not_runnable(self, target: Target) -> str | None:
        """The package, or the row's own hardware."""
        return targets.unfit(target) or self.missing(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """Versions of ExecuTorch and of torch."""
        return host.versions(["executorch", "torch"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Give XNNPACK what it can take, and plan the memory for the rest.

        Raises:
            UsageError: an option has a value that it can't have.
            UnavailableError: the package is missing.
            BuildError: an operator can't be converted, or the engine needs too much memory.
        """
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        limit, _ = _whole(target, "memory_mb", MEMORY_MB), _whole(target, "threads", 0)
        from pipeline import executorch_lower
        from pipeline import program as programs
        from pipeline.origin import of_program_error

        program = programs.load(model.file(programs.FILE))
        try:
            made = executorch_lower.lowered(program, model.signature())
        except BuildError:
            raise
        except Exception as error:  # its passes raise everything from AssertionError to their own
            told = root_line(error).replace("torch._ops.", "")
            known = of_program_error(programs.load(model.file(programs.FILE)), told)
            raise BuildError(
                f"executorch can't build `{target.name}`: {told}{known}",
                hint="change that part of the model, or leave out the target in the recipe's `targets`",
            ) from error
        planned = executorch_lower.planned_bytes(made)
        if planned > limit * 2**20:
            raise BuildError(
                f"the engine of `{target.name}` would set aside {planned / 2**20:,.0f} MiB for activations at the"
                f" largest sizes of all axes, the row allows {limit:,}",
                hint="lower the `max` of an axis in recipe.toml, give the row `buckets`, or raise its `memory_mb`",
            )
        (out / FILE).write_bytes(made.buffer)
        return {
            "planned_bytes": planned,
            "delegates": executorch_lower.delegates(made),
            "kernels": executorch_lower.kernels(made),
        }

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """The method ``forward`` in ExecuTorch's own runtime.

        Raises:
            BuildError: the file is broken, or has a delegate or a kernel that this runtime lacks.
        """
        import torch

        from pipeline import program as programs

        path, signature = engine.file(FILE), engine.signature()
        own = threads or _whole(target, "threads", 0) or host.cpu_count()
        try:
            # the runtime logs each look at the CPU, and each fault of a file
            with programs.quiet(), processes.native_silence():
                method = _method(path, own)
        except Exception as error:  # RuntimeError with the runtime's error code
            raise BuildError(
                f"executorch can't load the engine `{path}`: {last_line(error)}",
                hint="`exportyard export` builds it again",
            ) from error

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = method.execute([_tensor(feeds[spec.name]) for spec in signature.inputs])
            # copies: the next call writes its outputs into the same memory
            return {
                spec.name: torch.as_tensor(value).numpy().copy()
                for spec, value in zip(signature.outputs, found, strict=True)
            }

        yield checked(run, signature)


def _whole(target: Target, option: str, default: int) -> int:
    value = target.options.get(option, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"target `{target.name}`: {option} = {value!r}", hint="expected a whole number, 0 or more")
    return value


def _tensor(array: NDArray[Any]) -> Any:
    """A tensor of its own with the strides of C; where a dimension is 1, others would say the same, and be refused."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array, order="C")).clone(memory_format=torch.contiguous_format)


def _method(path: Path, threads: int) -> Any:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime, Verification

    portable_lib._unsafe_reset_threadpool(threads)
    return Runtime.get().load_program(path, verification=Verification.InternalConsistency).load_method("forward")


BACKEND = ExecuTorch()

"""Backend `torch_compile`: the captured program, compiled by ``torch.compile`` in the process that runs it. A baseline.

Its engine is the program itself, as that of `eager` is: there is nothing compiled in it that could be deployed.

Options of a row:
    mode: of ``torch.compile``: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``.
"""

from __future__ import annotations

import contextlib
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, StoreError, first_line, unknown
from pipeline.types import Runner, Scheme, Signature, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from pipeline.store import Stored

FILE = "program.pt2"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class TorchCompile:
    """See `pipeline.types.Backend`. Its engine is a copy of ``program.pt2``."""

    name = "torch_compile"
    option_names = frozenset({"mode"})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:
        """As `not_runnable`: what is built is only told from what runs by running it."""
        return self.not_runnable(target)

    def not_runnable(self, target: Target) -> str | None:
        """The package, a C++ compiler, or the row's own hardware."""
        if not host.has_module("torch"):
            return "the package `torch` is not installed"
        if shutil.which("g++") is None:
            return "there is no C++ compiler (Debian package `g++`)"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():  # what it compiles are modules of Python
            return "Python's headers are not installed (Debian package `python3-dev`)"
        return targets.unfit(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """The compiler that counts graphs."""
        return host.versions(["torch"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Copy the program; the facts say in how many graphs it is compiled, and how often again for other sizes.

        Raises:
            UsageError: there is no such mode.
            BuildError: torch can't follow the program.
        """
        from pipeline import program as programs

        _mode(target)
        loaded = programs.load(model.file(FILE))
        try:
            with programs.quiet():
                facts = counted(loaded, model.signature())
        except Exception as error:  # whatever tracing raises
            raise BuildError(
                f"torch_compile can't build `{target.name}`: {first_line(error)}",
                hint="leave out the target in the recipe's `targets`",
            ) from error
        shutil.copyfile(model.file(FILE), out / FILE)
        return facts

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """The program, compiled when it meets sizes that need it: such a call takes seconds.

        Raises:
            BuildError: the file is broken.
        """
        import torch

        from pipeline import program as programs

        signature = engine.signature()
        try:
            module = programs.runnable(programs.load(engine.file(FILE)))
        except StoreError as error:
            raise BuildError(error.message, hint=error.hint) from error
        with programs.threads(threads):
            with programs.quiet():
                options = torch._inductor.list_mode_options(_mode(target)) | {"cpp.threads": torch.get_num_threads()}
                call = torch.compile(module, dynamic=True, options=options)
            yield checked(programs.runner(_quiet_at_first(call), signature), signature)


def _mode(target: Target) -> str:
    mode = str(target.options.get("mode", "default"))
    if mode not in MODES:
        raise unknown("value of `mode`", mode, MODES, where=f"target `{target.name}`")
    return mode


def _quiet_at_first(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with what the compiler says kept quiet; it is at work only where shapes are new."""
    from pipeline import program as programs

    met: set[tuple[tuple[int, ...], ...]] = set()

    def run(*tensors: Any) -> Any:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes in met:
            return call(*tensors)
        with programs.quiet():
            found = call(*tensors)
        met.add(shapes)
        return found

    return run


def counted(program: ExportedProgram, signature: Signature) -> dict[str, JsonValue]:
    """Graphs, graph breaks and recompilations of `program` over the min, opt and max of its axes.

    Raises:
        Exception: whatever torch raises where it can't follow the program at all.
    """
    import torch
    from torch._dynamo.testing import CompileCounter

    from pipeline import program as programs

    torch._dynamo.reset()
    counter = CompileCounter()  # runs each graph as it is: what a compiler would make of it costs nothing here
    call = torch.compile(programs.runnable(program), backend=counter, dynamic=True)
    graphs: list[int] = []
    reasons: dict[str, None] = {}
    for which in ("min", "opt", "max"):
        sizes = {name: getattr(axis, which) for name, axis in signature.axes.items()}
        with torch.inference_mode():
            call(*programs.examples(signature, sizes))
        graphs.append(counter.frame_count)
        reasons |= {first_line(Exception(reason)): None for reason in torch._dynamo.utils.counters["graph_break"]}
    breaks = max(graphs[0] - 1, 0)
    facts: dict[str, JsonValue] = {"graphs": graphs[0], "graph_breaks": breaks}
    facts["recompilations"] = graphs[-1] - graphs[0]
    if breaks:
        facts["warnings"] = [f"torch.compile breaks the program into {graphs[0]} graphs: {'; '.join(reasons)}"]
    return facts


BACKEND = TorchCompile()

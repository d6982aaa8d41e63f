"""What users would run without us: the baselines that engines are timed against.

- ``eager``: the captured program, operator by operator, as everywhere else in this package.
- ``compile``: the user's own model under ``torch.compile``, with the axes of the recipe marked as dynamic.
- ``max-autotune``: likewise, with ``mode="max-autotune"``, which times kernels for matrix products.
- ``max-autotune-freezing``: likewise, and weights are constants, which lets it lay them out for the processor.
- ``aotinductor``: the captured program compiled ahead of time, by the backend of that name.

All but the first compile when they are asked for, into caches of their own, so that the seconds told are real ones.
"""

from __future__ import annotations

import contextlib
import platform
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import backends, host, reference, samples, store
from pipeline import program as programs
from pipeline.errors import ExportyardError, UnavailableError, first_line, unknown
from pipeline.explain import following
from pipeline.store import Key, Stored
from pipeline.types import Recipe, Runner, Sizes, Target, Tolerance, WarmUp

EAGER, COMPILE, AOT = "eager", "compile", "aotinductor"
MODES: Mapping[str, Mapping[str, object]] = {
    COMPILE: {"mode": "default"},
    "max-autotune": {"mode": "max-autotune"},
    "max-autotune-freezing": {"mode": "max-autotune", "freezing": True},
}
NAMES = (EAGER, *MODES, AOT)
NONE = "none"


@dataclass(frozen=True)
class Started:
    """A baseline that is ready: `run` is what is timed, `warm_up` what it took until then."""

    run: Runner
    warm_up: WarmUp


def chosen(text: str | None) -> tuple[str, ...]:
    """The baselines that ``eager,compile`` names, in our order; all for None, and none for ``none``.

    Raises:
        UsageError: one doesn't exist.
    """
    if text is None:
        return NAMES
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for name in wanted:
        if name not in (*NAMES, NONE):
            raise unknown("baseline", name, [*NAMES, NONE])
    return tuple(name for name in NAMES if name in wanted)


def missing(name: str) -> str | None:
    """Why this host can't have a baseline, or None if it can."""
    if name == EAGER:
        return None
    return backends.find("aotinductor" if name == AOT else "torch_compile").missing(_row(name))


@contextlib.contextmanager
def started(
    name: str,
    recipe: Recipe,
    model: torch.nn.Module | None,
    program: Stored,
    sizes_of: Sequence[Sizes],
    threads: int,
    folder: Path,
) -> Iterator[Started]:
    """The baseline called `name`, compiled for `threads` threads and called once at each size.

    Args:
        name: one of `NAMES`.
        recipe: gives axes and inputs.
        model: the user's, which returns a tuple; None if the baseline doesn't need it.
        program: captured from it.
        sizes_of: that will be timed; the first one is what compilers see first.
        threads: to run an operator with.
        folder: for packages that are compiled ahead of time; what is there already isn't compiled again.

    Raises:
        UnavailableError: this host lacks what it needs.
        Exception: whatever a compiler raises.
    """
    reason = missing(name)
    if reason is not None:
        raise UnavailableError(reason)
    feeds = [samples.feeds(recipe, sizes, seed=1) for sizes in sizes_of]
    with contextlib.ExitStack() as stack:
        begun = time.perf_counter()
        if name in MODES:
            assert model is not None
            yield stack.enter_context(_compiled(name, recipe, model, program, feeds, threads, folder))
            return
        if name == EAGER:
            run = stack.enter_context(reference.eager(program, threads))
        else:
            package = _ahead_of_time(program, folder)
            run = stack.enter_context(backends.loaded(package, _row(AOT), threads))
        built = time.perf_counter()
        for one in feeds:
            run(one)
        took = WarmUp(runner=name, threads=threads, build_s=built - begun, first_s=time.perf_counter() - built)
        yield Started(run, took)


@contextlib.contextmanager
def _compiled(
    name: str,
    recipe: Recipe,
    model: torch.nn.Module,
    program: Stored,
    feeds: Sequence[Any],
    threads: int,
    folder: Path,
) -> Iterator[Started]:
    with programs.quiet():  # also while it is imported
        from torch._inductor.utils import fresh_cache

    settings = dict(MODES[name])
    signature = program.signature()
    with programs.threads(threads), fresh_cache(dir=str(folder)):
        with programs.quiet():
            options = torch._inductor.list_mode_options(str(settings.pop("mode"))) | settings | {"cpp.threads": threads}
            call = torch.compile(_own(model, name), options=options)

        def marked(*tensors: torch.Tensor) -> Any:
            following.mark(recipe, tensors)
            return call(*tensors)

        graphs = _graphs()
        begun = time.perf_counter()
        failure: Exception | None = None
        # dynamo asks the setting itself whether weights are constants, not the options
        freezing = torch._inductor.config.patch(freezing=bool(settings.get("freezing", False)))
        with programs.quiet(), freezing, following.listening() as trail:
            try:
                for one in feeds:
                    programs.runner(marked, signature)(one)
            except Exception as error:  # raised below: where one ends `fresh_cache`, that logs a warning
                failure = error
        if failure is None:
            took = WarmUp(
                runner=name,
                threads=threads,
                build_s=0,
                first_s=time.perf_counter() - begun,
                graphs=_graphs() - graphs,
                graph_breaks=len(trail.breaks),
                recompilations=len(trail.again),
            )
            yield Started(programs.runner(call, signature), took)
    if failure is not None:
        raise failure


def _graphs() -> int:
    """Graphs that dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _own(model: torch.nn.Module, name: str) -> Callable[..., Any]:
    """A call of `model` as a function with code of its own: dynamo keeps what it compiles by code, and counts it so."""

    def call(*inputs: torch.Tensor) -> Any:
        return model(*inputs)

    code = call.__code__.replace(co_name=f"call_{name.replace('-', '_')}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def _ahead_of_time(program: Stored, folder: Path) -> Stored:
    """The engine that the backend `aotinductor` builds with its default options."""

    def work(out: Path) -> dict[str, Any]:
        (out / "signature.json").write_bytes(program.file("signature.json").read_bytes())
        return dict(backends.find("aotinductor").build(program, _row(AOT), out))

    return store.make(folder / AOT, Key("engine", {"program": program.digest}), work).stored


def _row(name: str) -> Target:
    """A row for this very machine."""
    backend = "aotinductor" if name == AOT else "torch_compile"
    return Target.model_validate(
        {
            "name": f"bench-{name}",
            "backend": backend,
            "platform": host.system(),
            "machine": host.machine(),
            "arch": "native",
            "schemes": ["fp32"],
            "vs_onnx": {"fp32": Tolerance(sqnr_db=0)},
        }
    )


def reason_of(error: Exception) -> str:
    """Why a baseline could not be had, in one line."""
    return error.message if isinstance(error, ExportyardError) else f"{type(error).__name__}: {first_line(error)}"


def tools() -> dict[str, str]:
    """Versions of what baselines are made with."""
    compiler = backends.find("aotinductor").tools(_row(AOT)).get("compiler")
    return {"python": platform.python_version(), **host.versions(["torch"])} | (
        {"compiler": compiler} if compiler else {}
    )

"""What torch.compile makes of a model: where it breaks the graph, and what makes it compile again.

Dynamo, its tracer, is asked alone: each graph that it finds is run as it is, so that nothing is compiled. It is
listened to while it works, as its own logs do; a torch that works otherwise gives counts without reasons.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import convert_frame
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics, set_compilation_metrics_limit

from pipeline import breaks, ranges
from pipeline import program as programs
from pipeline.errors import first_line
from pipeline.types import Compilation, Place, Recipe, Sizes

ORDER = ("opt", "min", "max")
"""Ends of the axes that a model is called at: first as one would try it out, then as it is met in use."""

_RESUME = re.compile(r"torch_dynamo_resume_in_.*_at_(\d+)$")
_SIZE = re.compile(r"inputs\[(\d+)\]\.size\(\)\[(\d+)\]")
_MISMATCH = re.compile(
    r"tensor '(?:L\['inputs'\]|inputs)\[(\d+)\]' size mismatch at index (\d+)\. expected (\d+), actual (\d+)"
)
_NOTE = re.compile(r"# (?P<where>[^\s#]+:\d+) in [^(]*(?P<first>\(user code shown is first use)?")
_WARM_UP = "call it once at this size before it serves, or the first caller waits for the compiler"
_MOST_EVENTS = 4096


@dataclass
class Trail:
    """What dynamo did while it was listened to.

    Attributes:
        graphs: that it handed to a compiler.
        breaks: frames (file, line) after which it began another graph, with the reason where one was told.
        again: why it compiled something again: (file of that frame, reasons).
    """

    graphs: int = 0
    breaks: dict[tuple[str, int], str] = field(default_factory=dict)
    stacks: list[tuple[str, list[traceback.FrameSummary]]] = field(default_factory=list)
    again: list[tuple[str, list[str]]] = field(default_factory=list)


def mark(recipe: Recipe, tensors: Sequence[torch.Tensor]) -> None:
    """Tell torch.compile which dimensions of the inputs vary; one for which it can't have that, it takes as fixed."""
    for spec, tensor in zip(recipe.inputs, tensors, strict=True):
        for place, dim in enumerate(spec.shape):
            if isinstance(dim, str) and ranges.is_dynamic(recipe.axes[dim]):
                torch._dynamo.maybe_mark_dynamic(tensor, place)


def sizes_in_order(recipe: Recipe) -> list[dict[str, int]]:
    """All axes at opt, then at min, then at max; each once."""
    found: list[dict[str, int]] = []
    for end in ORDER:
        sizes = {name: getattr(axis, end) for name, axis in recipe.axes.items()}
        if sizes not in found:
            found.append(sizes)
    return found


def followed(recipe: Recipe, model: torch.nn.Module, tensors: Callable[[Sizes], Sequence[torch.Tensor]]) -> Compilation:
    """What torch.compile would make of `model`, called at the sizes of `sizes_in_order`.

    Args:
        recipe: gives axes and inputs.
        model: takes the recipe's inputs by position, as ``*inputs``.
        tensors: inputs of some sizes.
    """
    sizes_of = sizes_in_order(recipe)
    graphs: list[int] = []
    recompilations: list[Place] = []
    torch._dynamo.reset()
    with programs.quiet(), listening() as trail:
        call = torch.compile(model, backend=_noting(trail))
        for sizes in sizes_of:
            inputs = tensors(sizes)
            mark(recipe, inputs)
            known = len(trail.again)
            try:
                with torch.inference_mode():
                    call(*inputs)
            except Exception as error:  # whatever tracing, or the model itself, raises
                reason = f"at {_text(sizes)}: {type(error).__name__}: {first_line(error)}"
                return Compilation(recipe=recipe.name, sizes=tuple(sizes_of), not_followed=reason)
            graphs.append(trail.graphs)
            recompilations += [_recompilation(recipe, reasons, sizes) for _, reasons in trail.again[known:]]
    torch._dynamo.reset()
    return Compilation(
        recipe=recipe.name,
        sizes=tuple(sizes_of),
        graphs=graphs[0],
        graph_breaks=tuple(_places(trail, recipe.root)),
        recompilations=tuple(recompilations),
    )


@contextlib.contextmanager
def listening() -> Iterator[Trail]:
    """Notes what dynamo does inside. One thread at a time, as dynamo itself."""
    trail = Trail()
    name = "get_and_maybe_log_recompilation_reasons"
    kept = getattr(convert_frame, name, None)

    def listen(entries: Any, frame: Any, *arguments: Any, **options: Any) -> Any:
        reasons = kept(entries, frame, *arguments, **options)  # type: ignore[misc]  # only set if there is one
        trail.again.append((str(frame.f_code.co_filename), [str(reason) for reason in reasons]))
        return reasons

    clear_compilation_metrics()
    set_compilation_metrics_limit(_MOST_EVENTS)
    if kept is not None:
        setattr(convert_frame, name, listen)
    try:
        yield trail
    finally:
        if kept is not None:
            setattr(convert_frame, name, kept)
        for event in get_compilation_metrics():
            resumed = _RESUME.search(event.co_name or "")
            if resumed is not None:
                trail.breaks.setdefault((str(event.co_filename), int(resumed.group(1))), "")
        clear_compilation_metrics()


def _noting(trail: Trail) -> Callable[..., Any]:
    """A compiler that compiles nothing, and notes the graphs that it is given."""

    def compiler(graph: Any, _: Any) -> Any:
        trail.graphs += 1
        why = getattr(graph, "compile_subgraph_reason", None)
        if why is not None and why.graph_break:
            trail.stacks.append((str(why.reason), list(why.user_stack or [])))
        return graph.forward

    return compiler


def _places(trail: Trail, root: Path) -> list[Place]:
    """Each graph break once: those whose reason was told first, then those of which only the line is known."""
    found: dict[str, Place] = {}
    lines: set[tuple[str, int]] = set()
    for reason, stack in trail.stacks:
        lines |= {(frame.filename, frame.lineno or 0) for frame in stack}
        where = ranges.user_line(stack, root) or (f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")
        found.setdefault(where or reason, breaks.place(where, reason, root))
    for file, line in trail.breaks:
        if (file, line) not in lines:
            found.setdefault(f"{file}:{line}", breaks.place_of_line(file, line, root))
    return list(found.values())


def _recompilation(recipe: Recipe, reasons: Sequence[str], sizes: Sizes) -> Place:
    """Why a graph that was there could not be taken; of several reasons the first graph's, which serves most sizes."""
    ranked = sorted(reasons, key=lambda reason: _MISMATCH.search(reason) is not None)
    text = ranked[0] if ranked else ""
    condition = text.partition(": ")[2].partition("  #")[0].strip() or text.strip()
    mismatch = _MISMATCH.search(text)
    if mismatch is not None:
        axis = _axis(recipe, int(mismatch.group(1)), int(mismatch.group(2)))
        told = f"a graph is there for {axis} = {mismatch.group(3)} alone"
    else:
        told = "the graph holds only for " + _SIZE.sub(
            lambda found: _axis(recipe, int(found.group(1)), int(found.group(2))), condition
        )
    notes = [note for note in _NOTE.finditer(text) if note.group("first") is None]
    where = notes[-1].group("where") if notes else ""
    return Place(line=where, reason=told, advice=_WARM_UP, sizes=sizes)


def _axis(recipe: Recipe, place: int, dimension: int) -> str:
    """How the recipe calls a dimension of an input."""
    spec = recipe.inputs[place]
    dim = spec.shape[dimension]
    return dim if isinstance(dim, str) else f"{spec.name}[{dimension}]"


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items()) or "its only size"

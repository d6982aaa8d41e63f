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
from torch._dynamo.symbolic_convert import InstructionTranslatorBase

from pipeline import breaks, ranges
from pipeline import program as programs
from pipeline.errors import first_line
from pipeline.types import Compilation, Place, Recipe, Sizes

ORDER = ("opt", "min", "max")
"""Ends of the axes that a model is called at: first as one would try it out, then as it is met in use."""

# functions of dynamo through which every recompilation and every graph break goes, since they log it
_AGAIN, _BREAK = "get_and_maybe_log_recompilation_reasons", "log_graph_break"
_OTHER = "BACKEND_MATCH"
_SIZE = re.compile(r"inputs\[(\d+)\]\.size\(\)\[(\d+)\]")
_MISMATCH = re.compile(r"tensor '(.+)' size mismatch at index (\d+)\. expected (\d+), actual \d+")
_INPUT = re.compile(r"(?:L\['inputs'\]|inputs)\[(\d+)\]$")
_NOTE = re.compile(r"# (?P<where>[^\s#]+:\d+) in [^(]*(?P<first>\(user code shown is first use)?")
_WARM_UP = "call it once at this size before it serves, or the first caller waits for the compiler"


@dataclass
class Trail:
    """What dynamo did while it was listened to.

    Attributes:
        breaks: where it went back to Python, by ``file:line`` of the innermost frame: the reason, and the frames.
        again: why it compiled something again, an entry each time: what kept it from each graph that was there.
    """

    breaks: dict[str, tuple[str, list[traceback.FrameSummary]]] = field(default_factory=dict)
    again: list[list[str]] = field(default_factory=list)


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
    met: list[None] = []
    torch._dynamo.reset()
    with programs.quiet(), listening() as trail:
        call = torch.compile(model, backend=_counting(met))
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
            graphs.append(len(met))
            recompilations += [_recompilation(recipe, reasons, sizes) for reasons in trail.again[known:]]
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

    why: Any = getattr(convert_frame, _AGAIN, None)
    told: Any = getattr(InstructionTranslatorBase, _BREAK, None)

    def compiles_again(*arguments: Any, **options: Any) -> Any:
        reasons = why(*arguments, **options)
        # another compiler for the same model is no recompilation
        found = [text for text in map(str, reasons) if _OTHER not in text]
        if found:
            trail.again.append(found)
        return reasons

    def broke(*arguments: Any, **options: Any) -> Any:
        given = (*arguments, *options.values())
        reason = next((one for one in given if isinstance(one, str)), "torch.compile goes back to Python here")
        error = next((one for one in given if isinstance(one, BaseException)), None)
        stack = list(getattr(error, "real_stack", None) or torch._guards.TracingContext.extract_stack())
        if stack:
            trail.breaks.setdefault(f"{stack[-1].filename}:{stack[-1].lineno}", (reason, stack))
        return told(*arguments, **options)

    if why is not None:
        setattr(convert_frame, _AGAIN, compiles_again)
    if told is not None:
        setattr(InstructionTranslatorBase, _BREAK, broke)
    try:
        yield trail
    finally:
        if why is not None:
            setattr(convert_frame, _AGAIN, why)
        if told is not None:
            setattr(InstructionTranslatorBase, _BREAK, told)


def _counting(met: list[None]) -> Callable[..., Any]:
    """A compiler that compiles nothing, and adds an entry to `met` for each graph that it is given."""

    def compiler(graph: Any, _: Any) -> Any:
        met.append(None)
        return graph.forward

    return compiler


def _places(trail: Trail, root: Path) -> list[Place]:
    """Each graph break, in the order in which they were met first."""
    return [
        breaks.place(ranges.user_line(stack, root) or where, reason, root)
        for where, (reason, stack) in trail.breaks.items()
    ]


def _recompilation(recipe: Recipe, reasons: Sequence[str], sizes: Sizes) -> Place:
    """Why a graph that was there could not be taken; of several reasons the first graph's, which serves most sizes."""
    ranked = sorted(reasons, key=lambda reason: _MISMATCH.search(reason) is not None)
    text = ranked[0] if ranked else ""
    condition = text.partition(": ")[2].partition("  #")[0].strip() or text.strip()
    mismatch = _MISMATCH.search(text)
    if mismatch is not None:
        name, dimension, size = mismatch.groups()
        place = _INPUT.match(name)
        what = f"{name}[{dimension}]" if place is None else _axis(recipe, int(place.group(1)), int(dimension))
        told = f"the graph holds only for {what} = {size}"
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

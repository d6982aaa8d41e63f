"""Axis ranges: what torch.export left of them, and the sizes at which it followed only one way through the code."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from pipeline import program as programs
from pipeline import recipes
from pipeline.errors import CaptureError
from pipeline.types import Axis, Recipe

_ROUNDS = 400  # evaluations of one guard at most; each takes about 0.1 ms


@dataclass(frozen=True)
class Doubt:
    """Sizes at which the program may be wrong, since the trace says something that isn't so there.

    Attributes:
        reason: what the trace says, in a few words.
        where: the user's line that it comes from, if known.
        hint: what to change if the program is wrong there.
    """

    sizes: dict[str, int]
    reason: str
    where: str
    hint: str


def is_dynamic(axis: Axis) -> bool:
    """Whether engines must serve more than one size of `axis`."""
    return axis.min < axis.max


def trace_sizes(recipe: Recipe) -> dict[str, int]:
    """Sizes to trace with: near opt, at least 2 where that is in the range, and all different if they can be.

    torch treats sizes 0 and 1 as constants, and equal sizes as perhaps the same axis.
    """
    chosen: dict[str, int] = {}
    for name, axis in recipe.axes.items():
        least = max(axis.min, min(2, axis.max))
        wanted = max(axis.opt, least)
        steps = [step for away in range(len(recipe.axes) + 1) for step in (away, -away)]
        near = [wanted + step for step in steps if least <= wanted + step <= axis.max]
        chosen[name] = next((size for size in near if size not in chosen.values()), wanted)
    return chosen


def check_sizes(recipe: Recipe, traced: Mapping[str, int]) -> list[dict[str, int]]:
    """Small sizes, other than the traced ones, at which program and model are compared: all at min, and one above."""
    least = {name: axis.min for name, axis in recipe.axes.items()}
    above = {
        name: next(
            (size for size in (axis.min + 1, axis.min + 2) if size <= axis.max and size != traced[name]), axis.min
        )
        for name, axis in recipe.axes.items()
    }
    return [least] if above == least else [least, above]


def check_axes(program: ExportedProgram, recipe: Recipe, lines: Mapping[str, str]) -> None:
    """Refuse a program in which an axis of the recipe is a constant or tied to another one.

    Raises:
        CaptureError: names the axis, what the recipe asks, and what the program has.
    """
    owner: dict[str, str] = {}
    for value, spec in zip(programs.user_inputs(program), recipe.inputs, strict=True):
        for place, (size, dim) in enumerate(zip(programs.shape_of(value), spec.shape, strict=True)):
            if not isinstance(dim, str) or not is_dynamic(recipe.axes[dim]):
                continue
            axis = recipe.axes[dim]
            where = f"axis `{dim}` (dimension {place} of input `{spec.name}`)"
            if isinstance(size, int):
                raise _refused(
                    f"{where}: capture fixes it at {size}, the recipe asks {axis.min} to {axis.max}",
                    lines.get(f"= {size}"),
                    f"write the code with sizes from `x.shape` (loops over steps and torch's recurrent layers fix"
                    f" their length), or set `{dim}` to min = opt = max = {size}",
                )
            tied = owner.setdefault(str(size), dim) if size.is_Symbol else programs.in_axes(size, owner)
            if tied != dim:
                raise _refused(
                    f"{where}: the model needs it to be `{tied}`, the recipe asks {axis.min} to {axis.max}",
                    lines.get(str(size)),
                    "give both dimensions the same axis in recipe.toml, or free the model of that condition",
                )


def _refused(message: str, line: str | None, hint: str) -> CaptureError:
    return CaptureError(message + (f"\n  at {line}" if line else ""), hint=hint)


def narrowed(program: ExportedProgram, recipe: Recipe, lines: Mapping[str, str]) -> list[Doubt]:
    """The ends of ranges that the trace has cut off.

    torch cuts off too much (size 1, mostly), so that these are questions, not answers.
    """
    found = []
    for symbol, name in programs.axis_symbols(program, recipe).items():
        axis = recipe.axes[name]
        low, high = bounds(program, symbol, axis)
        text = f"axis `{name}` works only at sizes {low} to {high}, the recipe asks {axis.min} to {axis.max}"
        hint = f"set min = {low} and max = {high} for `{name}` in recipe.toml, or change the code there"
        out_of_range = [
            *((axis.min, low - 1) if low > axis.min else ()),
            *((high + 1, axis.max) if high < axis.max else ()),
        ]
        for size in dict.fromkeys(out_of_range):
            sizes = {other: one.min for other, one in recipe.axes.items()} | {name: size}
            found.append(Doubt(sizes, text, lines.get(symbol, ""), hint))
    return found


def bounds(program: ExportedProgram, symbol: str, axis: Axis) -> tuple[int, int]:
    """Lowest and highest size of an axis's symbol in the program; the axis's own where it is unbounded."""
    for one, span in program.range_constraints.items():
        if str(one) == symbol:
            low, high = (int(end) if end.is_Integer else None for end in (span.lower, span.upper))
            return max(low or 0, axis.min), min(axis.max if high is None else high, axis.max)
    return axis.min, axis.max


def widen(program: ExportedProgram, recipe: Recipe) -> None:
    """Write the recipe's ranges into the program, after it was found to be right over all of them."""
    symbols = programs.axis_symbols(program, recipe)
    for one in list(program.range_constraints):
        if str(one) in symbols:
            axis = recipe.axes[symbols[str(one)]]
            program.range_constraints[one] = ValueRanges(axis.min, axis.max)


def assumed(program: ExportedProgram, recipe: Recipe, lines: Mapping[str, str]) -> list[Doubt]:
    """For each guard that doesn't hold over the whole ranges, the smallest sizes at which it is false."""
    symbols = programs.axis_symbols(program, recipe)
    found: dict[tuple[int, ...], Doubt] = {}
    for guard in _guards(program):
        free = {str(symbol) for symbol in guard.expr.free_symbols}
        if not free or not free <= set(symbols):
            continue
        for sizes in _candidates(recipe, sorted({symbols[name] for name in free})):
            values = {symbol: sizes[symbols[str(symbol)]] for symbol in guard.expr.free_symbols}
            if guard.expr.subs(values) == sympy.false:
                full = {name: axis.min for name, axis in recipe.axes.items()} | sizes
                reason = f"the trace took for granted that {programs.in_axes(guard.expr, symbols)}"
                hint = "write the code so that one way serves all sizes, or narrow [axes] in recipe.toml"
                found.setdefault(tuple(full.values()), Doubt(full, reason, lines.get(str(guard.expr), ""), hint))
                break
    return list(found.values())


def _guards(program: ExportedProgram) -> list[Any]:
    """The conditions on sizes that tracing took for granted, as torch's shape environment has them."""
    for value in programs.user_inputs(program):
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return list(mode.shape_env.guards)
    return []


def _candidates(recipe: Recipe, names: list[str]) -> Iterator[dict[str, int]]:
    """Sizes to try, small ones first: many for one axis, corners and neighbours for several."""
    near = 40 if len(names) == 1 else 3
    options = []
    for name in names:
        axis = recipe.axes[name]
        around = (axis.opt - 1, axis.opt, axis.opt + 1, axis.max - 1, axis.max, *(1 << power for power in range(20)))
        tried = {*range(axis.min, min(axis.min + near, axis.max) + 1), *around}
        options.append(sorted(size for size in tried if axis.min <= size <= axis.max))
    for values in itertools.islice(itertools.product(*options), _ROUNDS):
        yield dict(zip(names, values, strict=True))


class Lines:
    """The user's source lines at which a trace narrowed sizes; torch itself keeps only a line of its own code.

    Used as a context around a trace. It listens to torch's shape environment, which costs next to nothing; a torch
    without that method gives no lines, and messages that end one line earlier.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: Any = None
        self.found: dict[str, str] = {}

    def __enter__(self) -> Lines:
        self._kept = kept = getattr(ShapeEnv, "evaluate_expr", None)

        def listen(env: Any, expression: Any, *arguments: Any, **options: Any) -> Any:
            before, bounds = len(env.guards), dict(env.var_to_range)
            answer = kept(env, expression, *arguments, **options)  # type: ignore[misc]  # only set if there is one
            if len(env.guards) > before or bounds != env.var_to_range:
                self._note(env, before, bounds)
            return answer

        if kept is not None:
            setattr(ShapeEnv, "evaluate_expr", listen)  # noqa: B010  # a plain assignment doesn't pass the type checker
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept is not None:
            setattr(ShapeEnv, "evaluate_expr", self._kept)  # noqa: B010

    def _note(self, env: Any, before: int, bounds: Mapping[Any, Any]) -> None:
        line = user_line(list(traceback.extract_stack()), self._root)
        if line is None:
            return
        for guard in env.guards[before:]:
            self.found.setdefault(str(guard.expr), line)
        for symbol, now in env.var_to_range.items():
            if bounds.get(symbol) != now:
                self.found.setdefault(str(symbol), line)
                if now.lower == now.upper:
                    self.found.setdefault(f"= {now.lower}", line)


def user_line(frames: list[traceback.FrameSummary], root: Path) -> str | None:
    """``file:line: code`` of the innermost frame in the workspace, else of the innermost one outside torch and us."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    inside = [frame for frame in frames if recipes.is_users(frame.filename, root)]
    outside = [frame for frame in frames if not frame.filename.startswith((*ours, "<")) and "forward" in frame.name]
    for frame in (*inside[::-1], *outside[::-1]):
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None

"""Loop nests as the rules see them: which block sums, over which loops, and the primitives that every rule uses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import s_tir, tirx

from pipeline.tvm.dots import Dot

CURVES = re.compile(r"\bT\.(exp|erf|tanh|sigmoid)\(")  # what `tvm_math` writes as polynomials
LARGEST_VECTORISED = 64  # a loop of constant length up to this becomes vector code as a whole


@dataclass(frozen=True)
class Registers:
    """The vector registers of a CPU.

    Attributes:
        lanes: float32 values in one.
        accumulators: how many may hold results, while others hold operands.
        columns: vectors side by side in one tile.
        dot: its dot-product instruction for 8-bit integers, if it has one.
    """

    lanes: int
    accumulators: int
    columns: int = 2
    dot: Dot | None = None


Choice = tuple[int, ...]  # what a rule may choose; for a contraction: height and width of a tile, order of tiles


class Chooser(Protocol):
    """Decides between the schedules that a rule allows; see `tvm_tuning` for one that has measured them."""

    def __call__(self, schedule: Any, block: Any, choices: Sequence[Choice], rule: Choice, /) -> Choice:
        """One of `choices` for the nest around `block`; `rule` is what the rule itself would take."""
        ...


def as_the_rule(_schedule: Any, _block: Any, _choices: Sequence[Choice], rule: Choice, /) -> Choice:
    """The `Chooser` that has measured nothing."""
    return rule


class DoesNotFit(Exception):  # noqa: N818  not an error: the next rule is tried
    """The rule is not for this loop nest."""


def blocks(schedule: Any) -> list[Any]:
    """Every block of the nest, in the order in which they run."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def reduces(schedule: Any, block: Any) -> bool:
    """Whether a block sums (or takes a maximum, ...) over a loop of its own."""
    return any(axis.iter_type != tirx.IterVar.DataPar for axis in schedule.get(block).iter_vars)


def extent_of(schedule: Any, loop: Any) -> int | None:
    """Length of a loop; None where it depends on a dynamic axis."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def reducing(schedule: Any) -> Any:
    """The one block that reduces."""
    found = [block for block in blocks(schedule) if reduces(schedule, block)]
    if len(found) != 1:
        raise DoesNotFit
    return found[0]


def split_axes(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The block's loops: those over its result, and those over what it sums."""
    loops, axes = schedule.get_loops(block), schedule.get(block).iter_vars
    if len(loops) != len(axes):
        raise DoesNotFit
    kinds = [axis.iter_type == tirx.IterVar.DataPar for axis in axes]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind]
    return spatial, [loop for loop, kind in zip(loops, kinds, strict=True) if not kind]


def inline(schedule: Any, keep: frozenset[str] = frozenset()) -> None:
    """Fold elementwise blocks into their readers, then into their makers, as far as that goes; not those in `keep`."""

    def fold(how: Callable[[Any], None], candidates: Callable[[], Iterator[Any]]) -> None:
        progress = True
        while progress:
            progress = False
            for block in candidates():
                with contextlib.suppress(s_tir.ScheduleError):
                    how(block)
                    progress = True
                    break

    def elementwise() -> Iterator[Any]:
        for block in blocks(schedule):
            if schedule.get(block).name_hint not in keep and not reduces(schedule, block):
                yield block

    def behind_one_elementwise() -> Iterator[Any]:
        for block in elementwise():
            makers = schedule.get_producers(block)
            if len(makers) != 1 or reduces(schedule, makers[0]):
                continue
            if schedule.get(makers[0]).name_hint not in keep:
                yield block

    fold(schedule.compute_inline, elementwise)
    fold(schedule.reverse_compute_inline, behind_one_elementwise)


def costly(schedule: Any) -> frozenset[str]:
    """Blocks with an `exp` or the like that would be done several times if they were folded into their readers.

    A chain of such is worse: each is a polynomial that reads its argument a hundred times, and TVM writes out the
    product of that before it simplifies it.
    """
    every = {schedule.get(block).name_hint: block for block in blocks(schedule) if not reduces(schedule, block)}
    curves = {name for name, block in every.items() if CURVES.search(str(schedule.get(block).body))}
    before: set[str] = set()  # a curve
    found: set[str] = set()
    for name, block in reversed(every.items()):
        readers = [schedule.get(one).name_hint for one in schedule.get_consumers(block)]
        if any(one in curves or one in before for one in readers):
            before.add(name)
        if name in curves and (name in before or len(readers) > 1):
            found.add(name)
    return frozenset(found)


def row_axis(schedule: Any, spatial: list[Any]) -> int | None:
    """Which axis gives the rows of a tile: the innermost before the columns that isn't 1."""
    for place in range(len(spatial) - 2, -1, -1):
        if extent_of(schedule, spatial[place]) != 1:
            return place
    return None


# Orders of the loops over tiles. With panels first, a panel of weights is read once and stays in the cache while all
# rows pass by; with panels last, the rows stay, and the panels pass by.
PANELS_FIRST, PANELS_LAST, PANELS_SECOND = 0, 1, 2


def in_order(schedule: Any, columns: Any, outer: list[Any], order: int = PANELS_FIRST) -> list[Any]:
    """The loops over tiles, before they are fused into one that runs in parallel.

    A dynamic axis before the rows is always further out: where an index of the fused loop is split again, its length
    is then no divisor.
    """
    dynamic = [loop for loop in outer[:-1] if extent_of(schedule, loop) is None]
    rest = [loop for loop in outer if loop not in dynamic]
    place = {PANELS_FIRST: 0, PANELS_LAST: len(rest), PANELS_SECOND: min(1, len(rest))}[order]
    return [*dynamic, *rest[:place], columns, *rest[place:]]


def fusible(schedule: Any, loops: list[Any]) -> list[Any]:
    """The outer loops that can become one: all lengths but the first divide its index, and TVM knows too little about
    a product of two dynamic ones.
    """
    dynamic = [place for place, loop in enumerate(loops) if place and extent_of(schedule, loop) is None]
    return loops[: dynamic[1]] if len(dynamic) > 1 else loops


def spread(schedule: Any, makers: list[Any], registers: Registers) -> None:
    """What is made before a contraction runs in parallel and in vectors."""
    for maker in makers:
        loops = schedule.get_loops(maker)
        if len(loops) >= 3:
            schedule.parallel(schedule.fuse(*loops[:-1]))
            vectorise(schedule, loops[-1], registers)


def vectorise(schedule: Any, loop: Any, registers: Registers) -> Any | None:
    """Turn an inner loop into vector code; the loop over its vectors, where there is one."""
    extent = extent_of(schedule, loop)
    if extent is None or extent == 1:
        return None
    if extent % registers.lanes == 0 and extent > registers.lanes:
        rest, vector = schedule.split(loop, [None, registers.lanes])
        schedule.vectorize(vector)
        return rest
    if extent <= LARGEST_VECTORISED:
        schedule.vectorize(loop)
    return None

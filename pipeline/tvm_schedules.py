"""Schedules for TVM on a CPU, by rule and without tuning.

Relax lowers a model to loop nests that run as they are written: one element at a time, on one core, seconds for a
ResNet-50. Two rules cure that:

- *contraction*: a matrix product or a convolution (channels last) is cut into tiles whose results stay in vector
  registers. The column axis is vectorised, rows are unrolled, tiles run in parallel, the operations behind it are
  done tile by tile, and constant weights are laid out in the order in which the tiles read them.
- *plain*: everything else is inlined where it can be, runs its outer loops in parallel and vectorises the inner one.

A nest that fits neither rule stays as it is: slow, and right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import meta_schedule

from pipeline.tvm_dots import DEPTH, ROWS, Dot, intrinsic

SCHEDULED = "tirx.is_scheduled"
RULE = "exportyard.rule"  # attribute of a loop nest: the rule that scheduled it
LARGEST_VECTORISED = 64  # a loop of constant length up to this becomes vector code as a whole
LONG = 4096  # a single loop of this length is worth several cores


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


class _DoesNotFit(Exception):  # noqa: N818  not an error: the next rule is tried
    """The rule is not for this loop nest."""


def scheduled(registers: Registers, choose: Chooser = as_the_rule) -> Any:
    """A pass over an IRModule that schedules every loop nest that no one has scheduled before."""

    def run(module: tvm.IRModule, _context: object) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            if isinstance(function, tirx.PrimFunc) and not (function.attrs and SCHEDULED in function.attrs):
                found = schedule_of(function, registers, choose)
                if found is not None:
                    module.update_func(variable, found)
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="ScheduleForCpu")


def schedule_of(function: tirx.PrimFunc, registers: Registers, choose: Chooser = as_the_rule) -> tirx.PrimFunc | None:
    """One loop nest as the first rule that fits it schedules it; None where none does."""
    for rule in (_integer_contraction, _contraction, _plain):
        schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
        # a rule may find halfway that a primitive refuses this nest; its half-made schedule is thrown away
        with contextlib.suppress(_DoesNotFit, s_tir.ScheduleError, tvm.error.InternalError):
            rule(schedule, registers, choose)
            return schedule.mod["main"].with_attr({SCHEDULED: True, RULE: rule.__name__.lstrip("_")})
    return None


# --- what a nest looks like ----------------------------------------------------------------------------------------


def _blocks(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _reduces(schedule: Any, block: Any) -> bool:
    return any(axis.iter_type != tirx.IterVar.DataPar for axis in schedule.get(block).iter_vars)


def _extent(schedule: Any, loop: Any) -> int | None:
    """Length of a loop; None where it depends on a dynamic axis."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _reducing(schedule: Any) -> Any:
    """The one block that reduces."""
    found = [block for block in _blocks(schedule) if _reduces(schedule, block)]
    if len(found) != 1:
        raise _DoesNotFit
    return found[0]


def _split_axes(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The block's loops: those over its result, and those over what it sums."""
    loops, axes = schedule.get_loops(block), schedule.get(block).iter_vars
    if len(loops) != len(axes):
        raise _DoesNotFit
    kinds = [axis.iter_type == tirx.IterVar.DataPar for axis in axes]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind]
    return spatial, [loop for loop, kind in zip(loops, kinds, strict=True) if not kind]


def _inline(schedule: Any, keep: frozenset[str] = frozenset()) -> None:
    """Fold elementwise blocks into their readers, then into their makers, as far as that goes."""

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
        for block in _blocks(schedule):
            if schedule.get(block).name_hint not in keep and not _reduces(schedule, block):
                yield block

    def behind_one_elementwise() -> Iterator[Any]:
        for block in elementwise():
            makers = schedule.get_producers(block)
            if len(makers) == 1 and not _reduces(schedule, makers[0]):
                yield block

    fold(schedule.compute_inline, elementwise)
    fold(schedule.reverse_compute_inline, behind_one_elementwise)


# --- contractions --------------------------------------------------------------------------------------------------


def _contraction(schedule: Any, registers: Registers, choose: Chooser) -> None:
    block = _reducing(schedule)
    if len(schedule.get(block).reads) != 2:
        raise _DoesNotFit
    # padding stays a block of its own: inlined, it would test the border at every multiplication
    padding = frozenset(
        schedule.get(maker).name_hint
        for maker in schedule.get_producers(block)
        if "if_then_else" in str(schedule.get(maker).body)
    )
    _inline(schedule, padding)
    block = _reducing(schedule)
    _require_unit_stride(schedule, block)
    spatial, _ = _split_axes(schedule, block)
    width = _tile_width(_extent(schedule, spatial[-1]), registers)
    row = _row_axis(schedule, spatial)
    height = _tile_height(schedule, spatial, row, width, registers)
    choices = _tiles(schedule, spatial, row, registers)
    height, width, order = choose(schedule, block, choices, (height, width, PANELS_FIRST))
    unknown_rows = row is not None and _extent(schedule, spatial[row]) is None
    if unknown_rows or _extent(schedule, spatial[-1]) is None:
        block = _pad(schedule, block, row, height, width)
    _tile(schedule, block, row, (height, width, order), registers)
    if schedule.mod["main"].attrs and "layout_free_buffers" in schedule.mod["main"].attrs:
        meta_schedule.postproc.RewriteLayout().apply(schedule)


def _require_unit_stride(schedule: Any, block: Any) -> None:
    """The result's last axis must run along the last dimension of the second operand."""
    found = schedule.get(block)
    if len(found.reads) != 2 or len(schedule.get_consumers(block)) > 1:
        raise _DoesNotFit
    spatial = [axis for axis in found.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    last = found.reads[1].region[-1].min
    if not spatial or len(spatial) == len(found.iter_vars):
        raise _DoesNotFit
    if not (isinstance(last, tirx.Var) and last.same_as(spatial[-1].var)):
        raise _DoesNotFit


def _tile_width(extent: int | None, registers: Registers) -> int:
    """Columns of a tile: whole vectors if the result has them, else the widest divisor."""
    widest = registers.lanes * registers.columns
    if extent is None:
        return widest
    for width in (widest, registers.lanes, registers.lanes // 2):
        if extent % width == 0:
            return width
    if extent <= widest:
        return extent
    return next((width for width in range(widest, 7, -1) if extent % width == 0), widest)


def _row_axis(schedule: Any, spatial: list[Any]) -> int | None:
    """Which axis gives the rows of a tile: the innermost before the columns that isn't 1."""
    for place in range(len(spatial) - 2, -1, -1):
        if _extent(schedule, spatial[place]) != 1:
            return place
    return None


def _tile_height(schedule: Any, spatial: list[Any], row: int | None, width: int, registers: Registers) -> int:
    """Rows of a tile: as many as the registers hold, and a divisor of the axis where that is known."""
    vectors = -(-width // registers.lanes)
    most = max(1, min(16, registers.accumulators // vectors))
    if row is None:
        return 1
    extent = _extent(schedule, spatial[row])
    return most if extent is None else max(height for height in range(1, most + 1) if extent % height == 0)


def _tiles(schedule: Any, spatial: list[Any], row: int | None, registers: Registers) -> list[Choice]:
    """Every tile that the registers can hold, with each order of the tiles."""
    columns = _extent(schedule, spatial[-1])
    rows = 1 if row is None else _extent(schedule, spatial[row])
    room = registers.accumulators + registers.accumulators // 2  # more than the rule takes: LLVM may find a place
    orders = (PANELS_FIRST, PANELS_LAST, PANELS_SECOND)[: min(3, len(spatial))]
    return [
        (height, vectors * registers.lanes, order)
        for vectors in range(1, 5)
        if columns is None or columns % (vectors * registers.lanes) == 0
        for height in range(1, 17)
        if (rows is None or rows % height == 0) and height * vectors <= room
        for order in orders
    ]


def _pad(schedule: Any, block: Any, row: int | None, height: int, width: int) -> Any:
    """Round dynamic axes up to whole tiles; what is too much is cut off again behind the product."""
    spatial, _ = _split_axes(schedule, block)
    amounts = [1] * len(schedule.get(block).iter_vars)
    if row is not None and _extent(schedule, spatial[row]) is None:
        amounts[row] = height
    if _extent(schedule, spatial[-1]) is None:
        amounts[len(spatial) - 1] = width
    schedule.pad_einsum(block, amounts)
    block = _reducing(schedule)
    cut = schedule.get_consumers(block)
    if len(cut) == 1 and schedule.get_consumers(cut[0]):
        schedule.compute_inline(cut[0])
    return block


def _tile(schedule: Any, block: Any, row: int | None, tile: Choice, registers: Registers) -> None:
    height, width, order = tile
    spatial, summed = _split_axes(schedule, block)
    makers = schedule.get_producers(block)
    columns, column = schedule.split(spatial[-1], [None, width])
    outer, rows = [loop for place, loop in enumerate(spatial[:-1]) if place != row], []
    if row is not None:
        tiles, one = schedule.split(spatial[row], [None, height])
        outer.append(tiles)
        rows.append(one)
    tiles_in_order = _in_order(schedule, columns, outer, order)
    schedule.reorder(*tiles_in_order, *summed, *rows, column)

    after = schedule.get_consumers(block)
    finish = after[0] if after else schedule.cache_write(block, 0, "global")
    schedule.reverse_compute_at(finish, tiles_in_order[-1], preserve_unit_loops=True)

    if width > registers.lanes and width % registers.lanes == 0:
        vectors, column = schedule.split(column, [None, registers.lanes])
        schedule.unroll(vectors)
    schedule.vectorize(column)
    for loop in rows:
        schedule.unroll(loop)
    _vectorise(schedule, schedule.get_loops(finish)[-1], registers)
    _spread(schedule, makers, registers)
    schedule.parallel(schedule.fuse(*tiles_in_order) if len(tiles_in_order) > 1 else tiles_in_order[0])
    schedule.decompose_reduction(block, summed[0])


# Orders of the loops over tiles. With panels first, a panel of weights is read once and stays in the cache while all
# rows pass by; with panels last, the rows stay, and the panels pass by.
PANELS_FIRST, PANELS_LAST, PANELS_SECOND = 0, 1, 2


def _in_order(schedule: Any, columns: Any, outer: list[Any], order: int = PANELS_FIRST) -> list[Any]:
    """The loops over tiles, before they are fused into one that runs in parallel.

    A dynamic axis before the rows is always further out: where an index of the fused loop is split again, its length
    is then no divisor.
    """
    dynamic = [loop for loop in outer[:-1] if _extent(schedule, loop) is None]
    rest = [loop for loop in outer if loop not in dynamic]
    place = {PANELS_FIRST: 0, PANELS_LAST: len(rest), PANELS_SECOND: min(1, len(rest))}[order]
    return [*dynamic, *rest[:place], columns, *rest[place:]]


# --- contractions of 8-bit integers --------------------------------------------------------------------------------

# By lanes: registers for sums, beside those for weights and a broadcast; and less than 1024 bytes, since TVM puts no
# more on the stack, and LLVM keeps in registers only what is there.
INTEGER_ACCUMULATORS = {16: 15, 8: 10, 4: 24}


def _integer_contraction(schedule: Any, registers: Registers, choose: Chooser) -> None:  # noqa: ARG001
    """As `tvm_integer` writes them: weights packed, sums of four products in one instruction."""
    dot = registers.dot
    if dot is None or not any(schedule.get(block).name_hint == "dot" for block in _blocks(schedule)):
        raise _DoesNotFit
    _inline(schedule, frozenset({"padded"}))
    block = schedule.get_sblock("dot")
    spatial, summed = _split_axes(schedule, block)
    row = _row_axis(schedule, spatial)
    height, width = _integer_tile(schedule, spatial, row, dot)
    makers, after = schedule.get_producers(block), schedule.get_consumers(block)
    finish = after[0] if after else schedule.cache_write(block, 0, "global")

    columns, vectors, column = schedule.split(spatial[-1], [None, width, dot.lanes])
    outer, rows = [loop for place, loop in enumerate(spatial[:-1]) if place != row], []
    if row is not None:
        tiles, one = schedule.split(spatial[row], [None, height])
        outer.append(tiles)
        rows.append(one)
    groups, four = schedule.split(summed[-1], [None, DEPTH])
    tiles_in_order = _in_order(schedule, columns, outer)
    schedule.reorder(*tiles_in_order, *summed[:-1], groups, *rows, vectors, column, four)
    schedule.reverse_compute_at(finish, tiles_in_order[-1], preserve_unit_loops=True)
    _vectorise(schedule, schedule.get_loops(finish)[-1], registers)
    _spread(schedule, makers, registers)
    schedule.parallel(schedule.fuse(*tiles_in_order) if len(tiles_in_order) > 1 else tiles_in_order[0])
    # last: afterwards the block no longer counts as a reduction, and nothing more can be done around it
    begin = schedule.decompose_reduction(block, summed[0] if len(summed) > 1 else groups)
    schedule.tensorize(column, intrinsic(dot))
    start = schedule.get_loops(begin)
    schedule.vectorize(start[-1])
    for loop in (*rows, vectors, *start[1:-1]):
        schedule.unroll(loop)


def _integer_tile(schedule: Any, spatial: list[Any], row: int | None, dot: Dot) -> tuple[int, int]:
    """Rows, and vectors of columns: those that multiply most for each value that is loaded."""
    wide = (_extent(schedule, spatial[-1]) or dot.lanes) // dot.lanes
    # a dynamic number of rows has been rounded up to whole tiles, and is a multiple of this
    tall = 1 if row is None else (_extent(schedule, spatial[row]) or ROWS)
    room = INTEGER_ACCUMULATORS[dot.lanes]
    found = [
        (height, width)
        for height in range(1, 17)
        for width in range(1, 7)
        if tall % height == 0 and wide % width == 0 and height * width <= room
    ]
    return max(found, key=lambda tile: (tile[0] * tile[1] / (tile[0] + tile[1]), tile))


def _spread(schedule: Any, makers: list[Any], registers: Registers) -> None:
    """What is made before a contraction runs in parallel and in vectors."""
    for maker in makers:
        loops = schedule.get_loops(maker)
        if len(loops) >= 3:
            schedule.parallel(schedule.fuse(*loops[:-1]))
            _vectorise(schedule, loops[-1], registers)


# --- everything else -----------------------------------------------------------------------------------------------


def _plain(schedule: Any, registers: Registers, _choose: Chooser) -> None:
    _inline(schedule)
    for block in _blocks(schedule):
        if not schedule.get_loops(block):
            continue
        if _reduces(schedule, block):
            _plain_reduction(schedule, block)
        else:
            _plain_map(schedule, block, registers)


def _plain_map(schedule: Any, block: Any, registers: Registers) -> None:
    loops = schedule.get_loops(block)
    extent = _extent(schedule, loops[-1])
    if len(loops) > 1:
        outer = schedule.fuse(*loops[:-1])
        if _extent(schedule, outer) != 1:
            schedule.parallel(outer)
    rest = _vectorise(schedule, loops[-1], registers)
    if len(loops) == 1 and rest is not None and extent is not None and extent >= LONG:
        schedule.parallel(rest)


def _plain_reduction(schedule: Any, block: Any) -> None:
    spatial, summed = _split_axes(schedule, block)
    if not spatial:
        return
    outer, along = spatial, _reads_along(schedule, block)
    if along:
        inner, outer = spatial[-1], spatial[:-1]
        extent = _extent(schedule, inner)
        width = next((width for width in (64, 32, 16, 8, 4) if extent and extent % width == 0), None)
        if width is not None:
            tiles, inner = schedule.split(inner, [None, width])
            outer = [*outer, tiles]
        schedule.reorder(*outer, *summed, inner)
        if width is not None:
            schedule.vectorize(inner)
    if outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    if along:  # last: afterwards the block no longer counts as a reduction, and nothing more can be done to it
        schedule.decompose_reduction(block, summed[0])


def _reads_along(schedule: Any, block: Any) -> bool:
    """Whether the first operand is contiguous along an axis of the result, so that results fill a vector."""
    found = schedule.get(block)
    if not found.reads or not found.reads[0].region:
        return False
    last = found.reads[0].region[-1].min
    spatial = [axis.var for axis in found.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    return isinstance(last, tirx.Var) and any(last.same_as(variable) for variable in spatial)


def _vectorise(schedule: Any, loop: Any, registers: Registers) -> Any | None:
    """Turn an inner loop into vector code; the loop over its vectors, where there is one."""
    extent = _extent(schedule, loop)
    if extent is None or extent == 1:
        return None
    if extent % registers.lanes == 0 and extent > registers.lanes:
        rest, vector = schedule.split(loop, [None, registers.lanes])
        schedule.vectorize(vector)
        return rest
    if extent <= LARGEST_VECTORISED:
        schedule.vectorize(loop)
    return None

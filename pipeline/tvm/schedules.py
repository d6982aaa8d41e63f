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
import re
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import meta_schedule

from pipeline.tvm.integer_schedules import integer_contraction
from pipeline.tvm.nests import (
    PANELS_FIRST,
    PANELS_LAST,
    PANELS_SECOND,
    Choice,
    Chooser,
    DoesNotFit,
    Registers,
    as_the_rule,
    blocks,
    costly,
    extent_of,
    fusible,
    in_order,
    inline,
    reduces,
    reducing,
    row_axis,
    split_axes,
    spread,
    vectorise,
)

LINES = 16  # of an image, whose border is added at once in a depthwise convolution
SCHEDULED = "tirx.is_scheduled"
RULE = "exportyard.rule"  # attribute of a loop nest: the rule that scheduled it
LONG = 4096  # a single loop of this length is worth several cores


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
    for rule in (integer_contraction, _contraction, _plain):
        schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
        # a rule may find halfway that a primitive refuses this nest; its half-made schedule is thrown away
        with contextlib.suppress(DoesNotFit, s_tir.ScheduleError, tvm.error.InternalError):
            rule(schedule, registers, choose)
            return schedule.mod["main"].with_attr({SCHEDULED: True, RULE: rule.__name__.lstrip("_")})
    return None


# --- contractions --------------------------------------------------------------------------------------------------


def _contraction(schedule: Any, registers: Registers, choose: Chooser) -> None:
    block = reducing(schedule)
    if len(schedule.get(block).reads) != 2:
        raise DoesNotFit
    # padding stays a block of its own: inlined, it would test the border at every multiplication
    padding = frozenset(
        schedule.get(maker).name_hint
        for maker in schedule.get_producers(block)
        if "if_then_else" in str(schedule.get(maker).body)
    )
    inline(schedule, padding)
    block = reducing(schedule)
    _require_unit_stride(schedule, block)
    spatial, _ = split_axes(schedule, block)
    row = row_axis(schedule, spatial)
    choices = _tiles(schedule, spatial, row, registers)
    rule = (*_tile_by_rule(schedule, spatial, row, choices, registers), PANELS_FIRST)
    # columns of unknown number are copied into whole panels, which decides more than what was measured without that
    known_columns = extent_of(schedule, spatial[-1]) is not None
    height, width, order = choose(schedule, block, choices, rule) if known_columns else rule
    unknown_rows = row is not None and extent_of(schedule, spatial[row]) is None
    if unknown_rows or extent_of(schedule, spatial[-1]) is None:
        block = _pad(schedule, block, row, height, width)
    _tile(schedule, block, row, (height, width, order), registers)
    if schedule.mod["main"].attrs and "layout_free_buffers" in schedule.mod["main"].attrs:
        meta_schedule.postproc.RewriteLayout().apply(schedule)


def _require_unit_stride(schedule: Any, block: Any) -> None:
    """The result's last axis must run along the last dimension of the second operand."""
    found = schedule.get(block)
    if len(found.reads) != 2 or len(schedule.get_consumers(block)) > 1:
        raise DoesNotFit
    spatial = [axis for axis in found.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    last = found.reads[1].region[-1].min
    if not spatial or len(spatial) == len(found.iter_vars):
        raise DoesNotFit
    if not (isinstance(last, tirx.Var) and last.same_as(spatial[-1].var)):
        raise DoesNotFit


def _tile_by_rule(
    schedule: Any, spatial: list[Any], row: int | None, choices: list[Choice], registers: Registers
) -> tuple[int, int]:
    """Height and width of the tile that multiplies most for each value that it loads."""
    columns = extent_of(schedule, spatial[-1])
    if columns is None or not choices:
        width = _tile_width(columns, registers)
        return _tile_height(schedule, spatial, row, width, registers), width

    def worth(tile: Choice) -> tuple[float, int]:
        height, vectors = tile[0], tile[1] // registers.lanes
        return height * vectors / (height + vectors), -vectors

    held = [tile for tile in choices if tile[0] * tile[1] <= registers.accumulators * registers.lanes]
    height, width, _ = max(held, key=worth)
    return height, width


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


def _tile_height(schedule: Any, spatial: list[Any], row: int | None, width: int, registers: Registers) -> int:
    """Rows of a tile: as many as the registers hold, and a divisor of the axis where that is known."""
    vectors = -(-width // registers.lanes)
    most = max(1, min(16, registers.accumulators // vectors))
    if row is None:
        return 1
    extent = extent_of(schedule, spatial[row])
    return most if extent is None else max(height for height in range(1, most + 1) if extent % height == 0)


def _tiles(schedule: Any, spatial: list[Any], row: int | None, registers: Registers) -> list[Choice]:
    """Every tile that the registers can hold, with each order of the tiles."""
    columns = extent_of(schedule, spatial[-1])
    rows = 1 if row is None else extent_of(schedule, spatial[row])
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
    spatial, _ = split_axes(schedule, block)
    amounts = [1] * len(schedule.get(block).iter_vars)
    if row is not None and extent_of(schedule, spatial[row]) is None:
        amounts[row] = height
    if extent_of(schedule, spatial[-1]) is None:
        amounts[len(spatial) - 1] = width
    schedule.pad_einsum(block, amounts)
    block = reducing(schedule)
    cut = schedule.get_consumers(block)
    if len(cut) == 1 and schedule.get_consumers(cut[0]):
        schedule.compute_inline(cut[0])
    return block


def _tile(schedule: Any, block: Any, row: int | None, tile: Choice, registers: Registers) -> None:
    height, width, order = tile
    spatial, summed = split_axes(schedule, block)
    makers = schedule.get_producers(block)
    columns, column = schedule.split(spatial[-1], [None, width])
    outer, rows = [loop for place, loop in enumerate(spatial[:-1]) if place != row], []
    if row is not None:
        tiles, one = schedule.split(spatial[row], [None, height])
        outer.append(tiles)
        rows.append(one)
    if makers and len(outer) == 3 and _by_channel(schedule, block):
        band, line = schedule.split(outer[1], [None, _band(extent_of(schedule, outer[1]))])
        apart, together = [outer[0], columns, band], [line, outer[2]]
    else:
        apart, together = in_order(schedule, columns, outer, order), []
    tiles_in_order = [*apart, *together]
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
    vectorise(schedule, schedule.get_loops(finish)[-1], registers)
    if together:
        for maker in makers:
            schedule.compute_at(maker, apart[-1])
            vectorise(schedule, schedule.get_loops(maker)[-1], registers)
    else:
        spread(schedule, makers, registers)
    schedule.parallel(schedule.fuse(*apart) if len(apart) > 1 else apart[0])
    schedule.decompose_reduction(block, summed[0])


def _by_channel(schedule: Any, block: Any) -> bool:
    """Whether each column reads a column of its own of the first operand, as in a depthwise convolution.

    Then the border is added to one band of one panel at a time, which stays in the cache: there is so little to do with
    each value that a copy of the whole image would cost as much as the convolution.
    """
    found = schedule.get(block)
    last = [axis.var for axis in found.iter_vars if axis.iter_type == tirx.IterVar.DataPar][-1]
    return last.name in re.findall(r"\w+", str(found.reads[0].region[-1].min))


def _band(lines: int | None) -> int:
    return max(count for count in range(1, LINES + 1) if lines is None or lines % count == 0)


# --- everything else -----------------------------------------------------------------------------------------------


def _plain(schedule: Any, registers: Registers, _choose: Chooser) -> None:
    inline(schedule, costly(schedule))
    for block in blocks(schedule):
        if not schedule.get_loops(block):
            continue
        if reduces(schedule, block):
            _plain_reduction(schedule, block)
        else:
            _plain_map(schedule, block, registers)


def _plain_map(schedule: Any, block: Any, registers: Registers) -> None:
    loops = schedule.get_loops(block)
    extent = extent_of(schedule, loops[-1])
    if len(loops) > 1:
        outer = schedule.fuse(*loops[:-1])
        if extent_of(schedule, outer) != 1:
            schedule.parallel(outer)
    rest = vectorise(schedule, loops[-1], registers)
    if len(loops) == 1 and rest is not None and extent is not None and extent >= LONG:
        schedule.parallel(rest)


def _plain_reduction(schedule: Any, block: Any) -> None:
    spatial, summed = split_axes(schedule, block)
    if not spatial:
        return
    outer, along = spatial, _reads_along(schedule, block)
    if along:
        inner, outer = spatial[-1], spatial[:-1]
        extent = extent_of(schedule, inner)
        width = next((width for width in (64, 32, 16, 8, 4) if extent and extent % width == 0), None)
        if width is not None:
            tiles, inner = schedule.split(inner, [None, width])
            outer = [*outer, tiles]
        schedule.reorder(*outer, *summed, inner)
        if width is not None:
            schedule.vectorize(inner)
    if outer:
        together = fusible(schedule, outer)
        schedule.parallel(schedule.fuse(*together) if len(together) > 1 else together[0])
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

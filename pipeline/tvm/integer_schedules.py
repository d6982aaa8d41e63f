"""Schedules for contractions of 8-bit integers, as `tvm_integer` writes them: see `tvm_schedules`."""

from __future__ import annotations

from typing import Any

from pipeline.tvm.dots import DEPTH, ROWS, Dot, intrinsic, lanes_intrinsic
from pipeline.tvm.nests import (
    Chooser,
    DoesNotFit,
    Registers,
    blocks,
    extent_of,
    in_order,
    inline,
    row_axis,
    split_axes,
    spread,
    vectorise,
)

# By lanes: registers for sums, beside those for weights and a broadcast; and less than 1024 bytes, since TVM puts no
# more on the stack, and LLVM keeps in registers only what is there.
INTEGER_ACCUMULATORS = {16: 15, 8: 10, 4: 24}


def integer_contraction(schedule: Any, registers: Registers, choose: Chooser) -> None:  # noqa: ARG001
    """As `tvm_integer` writes them: weights packed, sums of four products in one instruction."""
    dot = registers.dot
    if dot is None or not any(schedule.get(block).name_hint == "dot" for block in blocks(schedule)):
        raise DoesNotFit
    block = schedule.get_sblock("dot")
    inline(schedule, frozenset({"padded", "words"}) | _read_twice(schedule, block))
    makers = schedule.get_producers(block)
    if any(schedule.get(maker).name_hint == "words" for maker in makers):
        _depthwise(schedule, block, registers, dot)
        return
    spatial, summed = split_axes(schedule, block)
    row = row_axis(schedule, spatial)
    height, width = _integer_tile(schedule, spatial, row, dot)
    columns, vectors, column = schedule.split(spatial[-1], [None, width, dot.lanes])
    outer, rows = [loop for place, loop in enumerate(spatial[:-1]) if place != row], []
    if row is not None:
        tiles, one = schedule.split(spatial[row], [None, height])
        outer.append(tiles)
        rows.append(one)
    groups, four = schedule.split(summed[-1], [None, DEPTH])
    tiles_in_order = in_order(schedule, columns, outer)
    schedule.reorder(*tiles_in_order, *summed[:-1], groups, *rows, vectors, column, four)
    _finish(schedule, block, tiles_in_order[-1], registers)
    spread(schedule, makers, registers)
    schedule.parallel(schedule.fuse(*tiles_in_order) if len(tiles_in_order) > 1 else tiles_in_order[0])
    # last: afterwards the block no longer counts as a reduction, and nothing more can be done around it
    begin = schedule.decompose_reduction(block, summed[0] if len(summed) > 1 else groups)
    schedule.tensorize(column, intrinsic(dot))
    start = schedule.get_loops(begin)
    schedule.vectorize(start[-1])
    for loop in (*rows, vectors, *start[1:-1]):
        schedule.unroll(loop)


def _read_twice(schedule: Any, block: Any) -> frozenset[str]:
    """The first block behind `block` that several others read: folded into each, it would be done as many times.

    And an `erf` or `exp` would be of all that stands before it, down to the index into the sums. Where that has dynamic
    divisors, TVM takes ten seconds to simplify it.
    """
    after = schedule.get_consumers(block)
    while len(after) == 1:
        (block,) = after
        after = schedule.get_consumers(block)
    return frozenset({schedule.get(block).name_hint}) if after else frozenset()


def _finish(schedule: Any, block: Any, tile: Any, registers: Registers) -> None:
    """Do what follows the sums for each tile of them, in vectors."""
    after = schedule.get_consumers(block) or [schedule.cache_write(block, 0, "global")]
    while after:
        (finish,) = after
        schedule.reverse_compute_at(finish, tile, preserve_unit_loops=True)
        vectorise(schedule, schedule.get_loops(finish)[-1], registers)
        after = schedule.get_consumers(finish)


def _integer_tile(schedule: Any, spatial: list[Any], row: int | None, dot: Dot) -> tuple[int, int]:
    """Rows, and vectors of columns: those that multiply most for each value that is loaded."""
    wide = (extent_of(schedule, spatial[-1]) or dot.lanes) // dot.lanes
    # a dynamic number of rows has been rounded up to whole tiles, and is a multiple of this
    tall = 1 if row is None else (extent_of(schedule, spatial[row]) or ROWS)
    room = INTEGER_ACCUMULATORS[dot.lanes]
    found = [
        (height, width)
        for height in range(1, 17)
        for width in range(1, 7)
        if tall % height == 0 and wide % width == 0 and height * width <= room
    ]
    return max(found, key=lambda tile: (tile[0] * tile[1] / (tile[0] + tile[1]), tile))


def _depthwise(schedule: Any, block: Any, registers: Registers, dot: Dot) -> None:
    """For each row of the result first all words, while what they are made of is in the cache, then the sums."""
    (words,) = schedule.get_producers(block)
    (batch, y, x, columns), (kx, group, four) = split_axes(schedule, block)
    across = extent_of(schedule, x) or 1
    room = INTEGER_ACCUMULATORS[dot.lanes]
    columns, column = schedule.split(columns, [None, dot.lanes])
    tiles, one = schedule.split(x, [None, max(height for height in range(1, room + 1) if across % height == 0)])
    schedule.reorder(batch, y, columns, tiles, kx, group, one, column, four)
    _finish(schedule, block, tiles, registers)
    schedule.compute_at(words, y, preserve_unit_loops=True)
    vectorise(schedule, schedule.get_loops(words)[-1], registers)
    schedule.parallel(schedule.fuse(batch, y))
    begin = schedule.decompose_reduction(block, kx)
    schedule.tensorize(column, lanes_intrinsic(dot))
    start = schedule.get_loops(begin)
    schedule.vectorize(start[-1])
    for loop in (kx, one, *start[3:-1]):
        schedule.unroll(loop)

"""Dot-product instructions: four products of 8-bit integers, added to each lane of an int32 vector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEPTH = 4
ROWS = 8  # a dynamic number of rows is rounded up to whole tiles of this


@dataclass(frozen=True)
class Dot:
    """One such instruction.

    Attributes:
        name: LLVM's of it.
        lanes: int32 values in its result.
        left: type of the operand that is one group of four for all lanes; the other, with a group for each, is int8.
    """

    name: str
    lanes: int
    left: str


VNNI_512 = Dot("llvm.x86.avx512.vpdpbusd.512", 16, "uint8")
VNNI_256 = Dot("llvm.x86.avx512.vpdpbusd.256", 8, "uint8")
SDOT = Dot("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, "int8")


def byte(word: Any, place: Any, dtype: str) -> Any:
    """The byte of an int32 at `place`, the lowest first, as int32; an expression in loop nests."""
    from tvm.tirx import op

    if dtype == "uint8":
        return op.bitwise_and(op.shift_right(word, place * 8), 255)
    return op.shift_right(op.shift_left(word, 24 - place * 8), 24)


def word(parts: Sequence[Any]) -> Any:
    """Up to four integers of 8 bits as one of 32, the first lowest; an expression in loop nests."""
    from tvm.tirx import op

    found = [op.shift_left(one.astype("uint8").astype("int32"), 8 * place) for place, one in enumerate(parts)]
    return functools.reduce(op.bitwise_or, found)


@functools.cache
def intrinsic(dot: Dot) -> str:
    """Tell TVM what the instruction does and how it is called; returns the name that it then has."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T  # noqa: N812  the script language knows it by this name

    lanes, left = dot.lanes, dot.left
    group, groups = f"{left}x{DEPTH}", f"{left}x{DEPTH * lanes}"
    weights, sums = f"int8x{DEPTH * lanes}", f"int32x{lanes}"
    llvm = dot.name

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def meaning(a: T.handle, b: T.handle, c: T.handle) -> None:
        data = T.match_buffer(a, (DEPTH,), dtype=left, offset_factor=1)
        weight = T.match_buffer(b, (lanes, DEPTH), dtype="int8", offset_factor=1)
        total = T.match_buffer(c, (lanes,), dtype="int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(total[0:lanes], data[0:DEPTH], weight[0:lanes, 0:DEPTH])
            T.writes(total[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, DEPTH):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        total[vi] = total[vi] + T.cast(data[vk], "int32") * T.cast(weight[vi, vk], "int32")

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(a: T.handle, b: T.handle, c: T.handle) -> None:
        data = T.match_buffer(a, (DEPTH,), dtype=left, offset_factor=1)
        weight = T.match_buffer(b, (lanes, DEPTH), dtype="int8", offset_factor=1)
        total = T.match_buffer(c, (lanes,), dtype="int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(total[0:lanes], data[0:DEPTH], weight[0:lanes, 0:DEPTH])
            T.writes(total[0:lanes])
            # one expression: a name in between would be a buffer, and LLVM can't tell that it is apart from the sums
            total[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(llvm),
                total.vload([0], dtype=sums),
                T.reinterpret(T.broadcast(T.reinterpret(data.vload([0], group), dtype="int32"), lanes), dtype=groups),
                weight.vload([0, 0], dtype=weights),
                dtype=sums,
            )

    name = f"exportyard.{dot.name}"
    TensorIntrin.register(name, meaning, call, override=True)
    return name


@functools.cache
def lanes_intrinsic(dot: Dot) -> str:
    """As `intrinsic`, where each lane has a group of four of its own, which is one int32: see `word`."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T  # noqa: N812

    lanes, groups = dot.lanes, f"{dot.left}x{DEPTH * dot.lanes}"
    weights, sums = f"int8x{DEPTH * lanes}", f"int32x{lanes}"
    left, llvm = dot.left, dot.name

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def meaning(a: T.handle, b: T.handle, c: T.handle) -> None:
        data = T.match_buffer(a, (lanes,), dtype="int32", offset_factor=1)
        weight = T.match_buffer(b, (lanes, DEPTH), dtype="int8", offset_factor=1)
        total = T.match_buffer(c, (lanes,), dtype="int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(total[0:lanes], data[0:lanes], weight[0:lanes, 0:DEPTH])
            T.writes(total[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(T.int64(0), T.int64(DEPTH)):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        total[vi] = total[vi] + byte(data[vi], T.cast(vk, "int32"), left) * T.cast(
                            weight[vi, vk], "int32"
                        )

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(a: T.handle, b: T.handle, c: T.handle) -> None:
        data = T.match_buffer(a, (lanes,), dtype="int32", offset_factor=1)
        weight = T.match_buffer(b, (lanes, DEPTH), dtype="int8", offset_factor=1)
        total = T.match_buffer(c, (lanes,), dtype="int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(total[0:lanes], data[0:lanes], weight[0:lanes, 0:DEPTH])
            T.writes(total[0:lanes])
            total[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(llvm),
                total.vload([0], dtype=sums),
                T.reinterpret(data.vload([0], dtype=sums), dtype=groups),
                weight.vload([0, 0], dtype=weights),
                dtype=sums,
            )

    name = f"exportyard.lanes.{dot.name}"
    TensorIntrin.register(name, meaning, call, override=True)
    return name

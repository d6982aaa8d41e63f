"""One tensor that two graphs have, how far it is from what it should be, and how that is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline import compare
from pipeline.explain import pairs
from pipeline.explain.pairs import View

Array = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One tensor that both graphs have, and the operators of each that make it out of such tensors before.

    Attributes:
        view: which tensor of the reference it is.
        runs: the engine's operators; empty for a constant that the engine was built with.
        nodes: the reference's nodes.
        unread: tensors that the reference's nodes read and the engine's operators don't.
        before: worst SQNR (dB) of what is read, in the free run.
        after: SQNR of the tensor, likewise.
        own: SQNR of the tensor, given the reference's inputs.
        allowed: the least `own` that rounding explains.
        edges: how many integers may fall on either side; None for floats.
        summands: most numbers that one of `nodes` adds up.
        made: the tensor as the engine makes it of the reference's inputs, in the reference's layout.
        wanted: the reference's.
        inputs: of `nodes`, what the reference has, constants left out; for the feed that is judged.
        blind: the engine's numbers can't hold what is read, so that nothing can be said of what is made of it.
    """

    view: View
    runs: tuple[onnx.NodeProto, ...]
    nodes: tuple[onnx.NodeProto, ...]
    unread: tuple[str, ...]
    before: float
    after: float
    own: float
    allowed: float
    edges: int | None
    summands: int
    made: Array | None
    wanted: Array
    inputs: Mapping[str, Array]
    blind: bool = False

    @property
    def departs(self) -> bool:
        """Whether more is wrong than rounding explains."""
        return not self.blind and not self.own >= self.allowed


class Numbers(Protocol):
    """Names and precision of a form whose reference is in other numbers."""

    def view(self, name: str) -> View | None:
        """The tensor of the reference that `name` is; None if it is none."""
        ...

    def wide(self, runs: Sequence[onnx.NodeProto], values: Mapping[str, Array]) -> dict[str, Array]:
        """How far off each tensor and constant of the reference may be that the form's operators `runs` read.

        Args:
            runs: operators of the form.
            values: of the reference.
        """
        ...


def margin(own: float, allowed: float) -> float:
    """How far inside of what is allowed (dB); minus infinity where one of them says nothing."""
    if own == math.inf:
        return math.inf
    return own - allowed if math.isfinite(own - allowed) else -math.inf


def without_fill(wanted: Array, made: Array | None) -> tuple[Array, Array | None]:
    """Both without the numbers that stand for minus infinity in masks, where they agree; beside them nothing counts.

    These are of at least half the largest magnitude that a dtype holds.
    """
    if made is None or kind(wanted) != "float" or kind(made) != "float":
        return wanted, made
    ends = [float(np.finfo(one.dtype).max) / 2 for one in (wanted, made)]
    fill = (np.abs(wanted) >= ends[0]) & (np.abs(made) >= ends[1]) & (np.sign(wanted) == np.sign(made))
    return (np.where(fill, 0, wanted), np.where(fill, 0, made)) if fill.any() else (wanted, made)


def distance(view: View, wanted: Array, made: Array | None) -> float:
    """The SQNR (dB) of a tensor of the engine; minus infinity for none, or for one of another shape."""
    back = None if made is None else view.back(made, wanted)
    wanted, back = without_fill(wanted, back)
    return -math.inf if back is None else compare.distance(view.name, wanted, back).sqnr_db


def kind(value: Array) -> str:
    """``float``, or ``whole`` for all else."""
    return "float" if np.issubdtype(value.dtype, np.floating) else "whole"


def beyond(value: Array, made: Sequence[Array | None]) -> bool:
    """Whether `value` of the reference is too large for the numbers of what was `made` for it."""
    kinds = {one.dtype for one in made if one is not None and kind(one) == "float"}
    if kind(value) != "float" or not kinds:
        return False
    known = np.abs(value[np.isfinite(value)])
    largest = known[known < float(np.finfo(value.dtype).max) / 2].max(initial=0)
    return any(largest > np.finfo(kind).max for kind in kinds)


def held(value: Array, like: Array | None) -> Array:
    """`value` of the reference in the numbers of the engine's `like`, at their ends where it lies beyond."""
    if like is None or like.dtype == value.dtype:
        return value
    if kind(like) == "float" and kind(value) == "float":
        end = float(np.finfo(like.dtype).max)
        value = np.where(np.isfinite(value), np.clip(value, -end, end), value)
    return pairs.resigned(value, like.dtype).astype(like.dtype)

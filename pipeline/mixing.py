"""Which parts stay in float: a search for the least that holds, with as few questions as it takes. Pure logic.

A question ("does this set hold?") costs a run over evaluation data, so questions are what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

SHRINKS = 6
"""How many questions may go into making a set smaller that is known to hold."""


def least(ranked: Sequence[Item], holds: Callable[[tuple[Item, ...]], bool]) -> tuple[Item, ...] | None:
    """A small set of `ranked` for which `holds` is true, or None when even all of them don't.

    Takes the worst 1, 2, 4, 8 ... first, then halves the gap between what failed and what held; where the ranking is
    right, that finds the shortest prefix in about ``2 log2(its length)`` questions. What the prefix holds without is
    given back after that. The empty set isn't tried.

    Args:
        ranked: the likeliest culprit first.
        holds: whether the budget holds with these in float; more of them should never make it worse.
    """
    shortest = _prefix(ranked, holds)
    return None if shortest is None else _smaller(tuple(ranked[:shortest]), holds)


def _prefix(ranked: Sequence[Item], holds: Callable[[tuple[Item, ...]], bool]) -> int | None:
    failed, size = 0, min(1, len(ranked))
    while size and not holds(tuple(ranked[:size])):
        if size == len(ranked):
            return None
        failed, size = size, min(2 * size, len(ranked))
    if not size:
        return None
    while size - failed > 1:
        middle = (failed + size) // 2
        if holds(tuple(ranked[:middle])):
            size = middle
        else:
            failed = middle
    return size


def _smaller(kept: tuple[Item, ...], holds: Callable[[tuple[Item, ...]], bool]) -> tuple[Item, ...]:
    """`kept` without what isn't needed; its last item is, or a shorter prefix would have held."""
    questions, width = 0, max((len(kept) - 1) // 2, 1)
    while width and len(kept) > 1:
        # the least suspicious first: they are the likeliest to have done nothing wrong
        end = len(kept) - 1
        while end > 0 and questions < SHRINKS:
            start = max(end - width, 0)
            without = kept[:start] + kept[end:]
            questions += 1
            if holds(without):
                kept = without
            end = start
        width //= 2
    return kept


def blocks(ranked: Sequence[str], module: Callable[[str], str]) -> list[tuple[str, ...]]:
    """The items of `ranked` in groups of one module each, in the order of each group's first item.

    The module of an item is the one around its own: neighbours there hand each other floats without a conversion.
    """
    found: dict[str, list[str]] = {}
    for item in ranked:
        found.setdefault(module(item).rpartition(".")[0], []).append(item)
    return [tuple(items) for items in found.values()]

"""The search for the fewest operators in float: what it finds, and how many questions that takes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import mixing


class Asked:
    """Holds when all `culprits` are in float; counts the questions, and refuses to answer one twice."""

    def __init__(self, *culprits: int) -> None:
        self.culprits = set(culprits)
        self.questions: list[tuple[int, ...]] = []

    def __call__(self, items: tuple[int, ...]) -> bool:
        self.questions.append(items)
        return self.culprits <= set(items)


def test_one_culprit_at_the_top_takes_one_question():
    asked = Asked(0)
    assert mixing.least(range(50), asked) == (0,)
    assert asked.questions == [(0,)]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13, 30])
def test_a_right_ranking_takes_about_twice_the_logarithm(length):
    asked = Asked(*range(length))
    assert mixing.least(range(100), asked) == tuple(range(length))
    growing = math.ceil(math.log2(length)) + 1
    assert len(asked.questions) <= 2 * growing + mixing.SHRINKS


def test_what_the_budget_holds_without_is_given_back():
    asked = Asked(0, 6)
    assert mixing.least(range(40), asked) == (0, 6)
    assert len(asked.questions) <= 13


def test_a_single_culprit_that_is_ranked_low_is_found_alone():
    assert mixing.least(range(40), Asked(5)) == (5,)


def test_nothing_is_found_where_nothing_holds():
    asked = Asked(99)
    assert mixing.least(range(10), asked) is None
    assert [len(items) for items in asked.questions] == [1, 2, 4, 8, 10]


def test_an_empty_ranking_takes_no_question():
    asked = Asked()
    assert mixing.least([], asked) is None
    assert asked.questions == []


@given(st.integers(1, 40), st.sets(st.integers(0, 39), min_size=1, max_size=6))
def test_what_is_found_holds_and_questions_are_few(count, culprits):
    asked = Asked(*culprits)
    found = mixing.least(range(count), asked)
    if max(culprits) >= count:
        assert found is None
    else:
        assert found is not None
        assert culprits <= set(found)
        assert found == tuple(sorted(set(found)))
    assert len(asked.questions) <= 2 * math.ceil(math.log2(count) + 1) + mixing.SHRINKS


def test_blocks_are_modules_around_the_operators_own_in_the_order_of_their_worst():
    modules = {
        "q": "layer.1.attention.query",
        "up": "layer.0.mlp.up",
        "k": "layer.1.attention.key",
        "down": "layer.0.mlp.down",
        "head": "head",
    }
    found = mixing.blocks(["q", "up", "k", "head", "down"], modules.__getitem__)
    assert found == [("q", "k"), ("up", "down"), ("head",)]

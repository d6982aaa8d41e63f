"""Which steps belong to a part of a form, what it reads and makes, and where a form is best cut."""

from dataclasses import dataclass

from pipeline.explain.parts import Plan, Step


@dataclass
class Steps:
    """A form that is only planned with."""

    steps: tuple[Step, ...]
    inputs: tuple[str, ...] = ("x",)
    ends: tuple[str, ...] = ("out",)


def step(name, reads, makes=None, role="core"):
    return Step(name, name, tuple(reads.split()), (makes or name,), role)


# x -> a -> (quantised) b, where b also reads the size of x; out = b + a
NET = Steps(
    (
        step("size", "x", role="carried"),
        step("a", "x"),
        step("a_int", "a", role="quantize"),
        step("a_float", "a_int", role="dequantize"),
        step("b", "a_float size"),
        step("out", "b a"),
    )
)


def names(part):
    return [NET.steps[place].name for place in part.steps]


def test_a_quantised_tensor_is_so_on_both_sides_of_a_cut():
    plan = Plan(NET)

    first, second = plan.part([1]), plan.part([4])

    assert names(first) == ["a", "a_int", "a_float"]
    assert sorted(first.makes) == ["a", "a_float"]
    assert names(second) == ["size", "a_int", "a_float", "b"]
    assert second.reads == {"a": "a_float", "x": "x"}  # what was quantised once is not again


def test_a_tensor_that_is_also_read_as_it_was_is_given_as_it_was():
    assert Plan(NET).part([4, 5]).reads == {"a": "a", "x": "x"}


def test_all_steps_make_the_whole():
    part = Plan(NET).part(Plan(NET).core)

    assert names(part) == ["size", "a", "a_int", "a_float", "b", "out"]
    assert (part.reads, part.makes) == ({"x": "x"}, ("out",))


def test_a_part_makes_what_is_asked_for_besides():
    assert Plan(NET).part([1, 4], ["a_float"]).makes == ("a", "b", "a_float")


def chain(length):
    """`length` steps one behind the other; the one in the middle also reads the one before its neighbour."""
    steps = [step(f"s{place}", f"s{place - 1}" if place else "x") for place in range(length)]
    middle = length // 2
    steps[middle] = step(f"s{middle}", f"s{middle - 1} s{middle - 2}")
    return Steps(tuple(steps), ends=(f"s{length - 1}",))


def test_a_cut_is_where_one_tensor_crosses():
    plan = Plan(chain(8))

    assert plan.cuts(plan.core)[0] in (3, 5)  # not 4, where two do
    assert plan.cuts(plan.core)[-1] != plan.cuts(plan.core)[0]


def test_a_pair_is_cut_in_the_middle():
    assert Plan(chain(4)).cuts([0, 1]) == [1]

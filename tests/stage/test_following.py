"""What torch.compile makes of models that break its graph, or make it compile again, by construction."""

import sys
from pathlib import Path

import torch
from torch import nn

from pipeline.explain import following
from pipeline.stages.compilation import compilation
from pipeline.store import Key, make
from pipeline.trial import tensors
from pipeline.types import Compilation
from tests import small
from tests.models import Entry

AXES = {"batch": {"min": 2, "opt": 4, "max": 9}}
HERE = Path(__file__)


class Whole(nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2


class Branches(nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 0:  # this line
            y = y + 1
        return torch.relu(y)


class Speaks(nn.Module):
    def forward(self, x):
        y = x * 2
        sys.stdout.write("hello")  # this line
        z = torch.relu(y)
        torch._dynamo.graph_break()
        return z + 1


class Grows(nn.Module):
    def forward(self, x):
        if x.shape[0] > 5:
            return x * 3
        return x * 2


class Fails(nn.Module):
    def forward(self, x):
        return x.reshape(7, -1)


def follow(model, axes=AXES):
    entry = Entry(model.__name__, model, [("x", "float32", ["batch", 3], [-2.0, 2.0])], ["out"], axes)
    recipe = small.recipe_of(entry)
    module = model().eval()

    class Flat(nn.Module):
        def forward(self, *inputs):
            return (module(*inputs),)

    return following.followed(recipe, Flat(), lambda sizes: tensors(recipe, sizes))


def line_of(text):
    """``file:line`` of the line in this file that holds `text`."""
    number = next(number for number, line in enumerate(HERE.read_text().splitlines(), 1) if text in line)
    return f"tests/stage/{HERE.name}:{number}"


def test_a_model_of_one_graph_for_all_sizes():
    found = follow(Whole)
    assert (found.graphs, found.graph_breaks, found.recompilations, found.not_followed) == (1, (), (), None)
    assert [dict(sizes) for sizes in found.sizes] == [{"batch": 4}, {"batch": 2}, {"batch": 9}]


def test_a_branch_on_values_is_a_graph_break_at_its_line():
    found = follow(Branches)
    assert found.graphs == 2
    (place,) = found.graph_breaks
    assert place.line.startswith(line_of("if y.sum() > 0:"))
    assert "depends on a tensor's values" in place.reason
    assert "torch.where" in place.advice
    # what comes after a break has forgotten which dimensions vary
    (again,) = found.recompilations
    assert again.reason == "the graph holds only for y[0] = 4"


def test_each_break_is_counted_once():
    found = follow(Speaks)
    assert found.graphs == 3
    assert len(found.graph_breaks) == 2
    assert found.graph_breaks[0].line.startswith(line_of('sys.stdout.write("hello")'))
    assert "graph_break()" in found.graph_breaks[1].line


def test_a_condition_on_sizes_makes_it_compile_again_where_it_turns():
    found = follow(Grows)
    assert (found.graphs, found.graph_breaks) == (1, ())
    (place,) = found.recompilations
    assert dict(place.sizes) == {"batch": 9}
    assert "batch <= 5" in place.reason


def test_size_one_has_a_graph_of_its_own():
    found = follow(Whole, {"batch": {"min": 1, "opt": 4, "max": 9}})
    (place,) = found.recompilations
    assert dict(place.sizes) == {"batch": 1}
    assert place.reason == "the graph holds only for 2 <= batch"
    assert place.line == ""  # torch names a line, and says that it isn't due to it


def test_a_static_axis_is_not_marked():
    found = follow(Grows, {"batch": {"min": 4, "opt": 4, "max": 4}})
    assert (len(found.sizes), found.graphs, found.recompilations) == (1, 1, ())


def test_a_model_that_fails_is_a_reason_and_no_crash():
    found = follow(Fails)
    assert found.not_followed is not None
    assert "batch = 4" in found.not_followed
    assert found.graphs == 0


def test_the_artifact_holds_what_the_capture_took_for_granted(tmp_path):
    entry = small.by_name("InPlaceViews")
    recipe = small.recipe_of(entry)
    weights = small.checkpoint(tmp_path / "checkpoint", entry)
    program = small.captured(tmp_path / "program", recipe, weights)
    guards = program.artifact.facts["guards"]
    made = make(tmp_path / "made", Key("compilation"), lambda out: compilation(recipe, weights, program, out)).stored
    found = Compilation.model_validate_json(made.file("compilation.json").read_text())
    assert [guard.plain() for guard in found.guards] == guards
    (guard,) = found.guards
    assert guard.line.startswith("tests/models.py:")
    assert dict(guard.sizes) == {"batch": 1}
    assert made.artifact.facts["graphs"] == found.graphs == 1

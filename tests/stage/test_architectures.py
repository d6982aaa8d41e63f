"""Two architectures of benchmarks/architectures.py, made smaller still: what ships is within its budget."""

import contextlib
import dataclasses

import pytest

from benchmarks import architectures
from benchmarks import side_by_side as sides
from pipeline import targets, types
from pipeline.workspace import Workspace

ROW = Workspace(sides.ROOT).rows()[sides.TARGET]
# few layers, since it is conversion that takes time
SMALLER = {
    "resnet18": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "albert": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256},
}


@pytest.mark.slow
@pytest.mark.skipif(targets.unfit(ROW) is not None, reason=f"{sides.TARGET}: {targets.unfit(ROW)}")
@pytest.mark.parametrize("name", SMALLER)
def test_what_ships_is_within_its_budget(name, tmp_path):
    whole = next(entry for entry in architectures.ARCHITECTURES if entry.name == name)
    one = dataclasses.replace(whole, settings={**whole.settings, **SMALLER[name]})
    job, verdict = architectures.exported(tmp_path, one)
    assert verdict.status == "passed", verdict.reason
    assert verdict.scheme in ROW.schemes
    assert "fp32" in verdict.candidates
    assert verdict.parity.passed
    assert all(scheme in verdict.reason for scheme in ROW.schemes if scheme != verdict.scheme)
    with contextlib.closing(job):
        found = sides.quality(job, lambda threads: architectures._engine(verdict.engine, ROW, threads))
    assert found.broken == ()
    assert found.cosine >= 0.99


def test_every_architecture_is_a_recipe_that_can_be_read(tmp_path):
    for one in architectures.ARCHITECTURES:
        architectures.write_recipe(tmp_path, one)
    workspace = Workspace(tmp_path)
    assert len(workspace.recipe_names()) == 12
    assert all(
        workspace.recipe(name).budget.vs_eager == types.Tolerance(cosine=0.99) for name in workspace.recipe_names()
    )


def test_a_slower_form_and_a_broken_budget_are_named():
    slow = sides.Ratio(ms=1, median=0.9, low=0.8, high=0.95, rounds=9)
    fine = sides.Ratio(ms=1, median=2, low=1.9, high=2.1, rounds=9)
    far = sides.Quality(sqnr_db=3, cosine=0.5, drop=0.4, broken=("too far",))
    every = [
        architectures.Found("one", scheme="int8-u8s8", ratios={"1 thread, batch 1": slow, "2 threads, batch 1": fine}),
        architectures.Found("two", scheme="int8-dynamic", quality=far),
        architectures.Found("three", error="CaptureError: no"),
    ]
    assert architectures.missed(every) == [
        "one int8-u8s8, 1 thread, batch 1: 0.90 (0.80-0.95)",
        "two int8-dynamic: too far",
        "three: CaptureError: no",
    ]

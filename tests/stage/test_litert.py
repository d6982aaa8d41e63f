"""LiteRT: 64-bit integers, INT8 from end to end, and what is refused."""

import numpy as np
import pytest

from pipeline import backends, environments, run, store
from pipeline.errors import BuildError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Target, Tolerance
from pipeline.workspace import Workspace
from tests import extras, small, workspaces

extras.need("ai_edge_litert", "litert")
if environments.absent("litert") is not None:
    extras.skip(environments.absent("litert"))

ROWS = """
    [targets.any-litert]
    backend = "litert"
    platform = "any"
    machine = "any"
    arch = "xnnpack"
    schemes = ["int8-s8s8", "fp32"]
    buckets = { batch = [4] }
    vs_onnx = { fp32 = { sqnr_db = 80 }, int8-s8s8 = { sqnr_db = 20 } }
"""


def row(**changes):
    table = {"name": "here", "backend": "litert", "platform": "any", "machine": "any", "arch": "xnnpack"}
    rest = {"schemes": ["fp32"], "vs_onnx": {"fp32": Tolerance(max_abs=0)}, "buckets": {"batch": [4]}}
    return Target.model_validate(table | rest | changes)


def captured(root, name):
    entry = small.by_name(name)
    recipe = small.recipe_of(entry)
    return small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))


@pytest.mark.slow
def test_long_integers_are_short_inside_and_long_outside(tmp_path):
    program, target = captured(tmp_path, "TopK"), row()
    engine = store.make(tmp_path / "engine", Key("engine"), lambda out: build(program, target, "fp32", out)).stored
    recipe = small.recipe_of(small.by_name("TopK"))
    feeds = small.feeds(recipe, {"batch": 3})

    with backends.loaded(engine, target) as run_it, backends.loaded(program, row(backend="eager")) as reference:
        found = run_it(feeds)
        for name, want in reference(feeds).items():
            small.assert_near(want, found[name], name)


def test_row_without_buckets_is_told_to_have_some(tmp_path):
    with pytest.raises(BuildError, match=r"(?s)fixed sizes only.*buckets"):
        build(captured(tmp_path, "TopK"), row(buckets=None), "fp32", tmp_path)


def test_operator_that_it_does_not_know_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"litert can't build.*operator `catalogue::twice_plus`"):
        build(captured(tmp_path, "CustomOperator"), row(), "fp32", tmp_path)


@pytest.mark.slow
def test_int8_form_is_built_compared_and_measured(tmp_path):
    job = run.prepare(Workspace(workspaces.tiny(tmp_path, rows=ROWS)), "tiny")

    (verdict,) = run.export(job)

    assert verdict.status == "passed"
    assert verdict.candidates["int8-s8s8"].passed
    engine = job.engine(job.targets[0], "int8-s8s8").stored
    assert engine.size_bytes < job.engine(job.targets[0], "fp32").stored.size_bytes
    with backends.loaded(engine, job.targets[0]) as run_it:
        found = run_it({"images": workspaces.images(3, 5)})["logits"]
    assert found.dtype == np.float32
    assert found.shape == (3, 4)


def test_numbers_beyond_32_bits_are_refused():
    from pipeline.backends.litert import _to

    with pytest.raises(UsageError, match="need 64 bits"):
        _to(np.array([2**40]), {"dtype": np.int32, "name": "ids", "quantization": (0.0, 0)})

"""Every tiny model of the catalogue that exports, through TVM: the numbers of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("tvm")

from pipeline.backends import find
from pipeline.stages.build import build
from pipeline.store import Key, make
from pipeline.types import Target
from tests import small
from tests.models import CATALOGUE
from tests.stage.test_catalogue import sizes_of

WORKS = [entry for entry in CATALOGUE if entry.fails is None]
TARGET = Target(
    name="linux-x86_64-tvm",
    backend="tvm",
    platform="linux",
    machine="x86_64",
    arch="x86-64-v3",
    schemes=("fp32",),
    vs_onnx={"fp32": {"max_over_peak": 1e-4}},
)


@pytest.mark.parametrize("entry", WORKS, ids=lambda entry: entry.name)
def test_same_numbers(entry, tmp_path):
    recipe = small.recipe_of(entry)
    program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", entry))
    model = small.converted(tmp_path / "onnx", recipe, program)

    def work(out):
        return build(model, TARGET, "fp32", out)

    engine = make(tmp_path / "engine", Key("engine"), work).stored

    session = onnxruntime.InferenceSession(model.file("model.onnx"), providers=["CPUExecutionProvider"])
    with find("tvm").load(engine, TARGET, 1) as run:
        for sizes in sizes_of(entry):
            feeds = small.feeds(recipe, sizes)
            found, want = run(feeds), session.run(entry.outputs, feeds)
            for name, one in zip(entry.outputs, want, strict=True):
                small.assert_near(np.asarray(one), found[name], f"output {name} at {sizes}")

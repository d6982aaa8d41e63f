"""ExecuTorch: what narrows sizes, what is refused, and INT8 from end to end."""

import pytest

from pipeline import backends, run, samples, store
from pipeline.errors import BuildError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Axis, Target, Tolerance
from pipeline.workspace import Workspace
from tests import extras, small, workspaces

extras.need("executorch", "executorch")

ROWS = """
    [targets.any-executorch]
    backend = "executorch"
    platform = "any"
    machine = "any"
    arch = "xnnpack"
    schemes = ["int8-s8s8", "int8-dynamic", "fp32"]
    vs_onnx = { fp32 = { sqnr_db = 80 }, int8-s8s8 = { sqnr_db = 20 }, int8-dynamic = { sqnr_db = 20 } }
"""


def row(options=None):
    table = {"name": "here", "backend": "executorch", "platform": "any", "machine": "any", "arch": "xnnpack"}
    rest = {"schemes": ["fp32"], "vs_onnx": {"fp32": Tolerance(max_abs=0)}, "options": options or {}}
    return Target.model_validate(table | rest)


def captured(root, name, **changes):
    entry = small.by_name(name)
    recipe = small.recipe_of(entry, **changes)
    return small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("ConvBatchNorm", 20),  # torch asks whether the batch is 16 or more when it traces a convolution
        ("ConvOneDimension", 19),  # two dynamic axes, and XNNPACK's reshape takes one
        pytest.param("MaskedAttention", 19, marks=pytest.mark.slow),  # a size at the trace equals a constant
    ],
)
def test_every_size_is_served(tmp_path, name, largest):
    axes = {axis: (Axis(**span) if isinstance(span, dict) else span) for axis, span in small.by_name(name).axes.items()}
    axes["batch"] = Axis(min=1, opt=3, max=largest)
    program, target = captured(tmp_path, name, axes=axes), row()
    recipe = small.recipe_of(small.by_name(name), axes=axes)
    engine = store.make(tmp_path / "engine", Key("engine"), lambda out: build(program, target, "fp32", out)).stored

    with backends.loaded(engine, target) as run_it, backends.loaded(program, eager()) as reference:
        for sizes in samples.combinations(program.signature().axes):
            feeds = small.feeds(recipe, sizes)
            found = run_it(feeds)
            for output, want in reference(feeds).items():
                small.assert_near(want, found[output], f"{output} at {sizes}")


def eager():
    return row().model_copy(update={"backend": "eager"})


def test_memory_is_planned_ahead_and_limited(tmp_path):
    program = captured(tmp_path, "ConvBatchNorm")

    with pytest.raises(BuildError, match=r"(?s)set aside .* MiB.*the row allows 0.*buckets"):
        build(program, row({"memory_mb": 0}), "fp32", tmp_path)


def test_operator_without_kernel_is_named(tmp_path):
    program = captured(tmp_path, "CustomOperator")

    with pytest.raises(BuildError, match=r"Missing out variants.*operator `catalogue::twice_plus`.*models\.py"):
        build(program, row(), "fp32", tmp_path)


@pytest.mark.slow
def test_int8_forms_are_built_compared_and_measured(tmp_path):
    root = workspaces.tiny(tmp_path, rows=ROWS)
    job = run.prepare(Workspace(root), "tiny")

    (verdict,) = run.export(job)

    assert verdict.status == "passed"
    assert {scheme for scheme, report in verdict.candidates.items() if report.passed} == set(job.targets[0].schemes)
    sizes = {scheme: job.engine(job.targets[0], scheme).stored.size_bytes for scheme in ("int8-s8s8", "fp32")}
    assert sizes["int8-s8s8"] < sizes["fp32"]
    assert (root / "artifacts" / "tiny" / "programs" / "int8-s8s8-xnnpack" / "program.pt2").exists()

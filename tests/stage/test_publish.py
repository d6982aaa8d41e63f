"""What a release holds: engines, golden vectors that they reproduce, and a manifest that describes it all."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import backends, compare, manifest, workspace
from pipeline.errors import ReleaseError, StoreError
from pipeline.job import Job
from pipeline.stages.publish import bounds, golden_sizes, lay_out, worst
from pipeline.types import (
    Axis,
    Chosen,
    Distance,
    LatencyReport,
    LatencyRow,
    MetricResult,
    ParityReport,
    Ratio,
    SizeParity,
    Speed,
    Timing,
    Tried,
)
from tests import workspaces

TRIED = {
    "any-echo": (
        Tried(scheme="fp32", outcome="chosen", chosen=True, sqnr_db=120.0, size_bytes=2_000),
        Tried(
            scheme="int8-u8s8",
            outcome="0.80x of fp32",
            speeds=(Speed(sizes={"batch": 1}, threads=1, median_ms=2.0, versus_fp32=0.8),),
        ),
    )
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = workspaces.tiny(tmp_path_factory.mktemp("publish") / "workspace")
    space = workspace.Workspace(root)
    return Job(space, space.recipe("tiny"), [space.rows()["any-echo"]])


@pytest.fixture(scope="module")
def chosen(job):
    near = Distance(output="logits", kind="logits", max_abs=1e-6, max_over_peak=1e-6, rmse=1e-7, sqnr_db=120, cosine=1)
    far = near.model_copy(update={"max_abs": 1e-5, "sqnr_db": 100})
    metric = MetricResult(name="agreement", eager=1, engine=1, drop=0, budget=0.05, samples=32)
    timing = Timing(median_ms=1, p25_ms=1, p75_ms=1, repeats=5)
    row = LatencyRow(
        sizes={"batch": 2},
        threads=1,
        eager=timing,
        engines={"fp32": timing},
        versus_eager={"fp32": Ratio(median=1.5, p25=1.4, p75=1.6)},
    )
    target = job.targets[0]
    return Chosen(
        target=target,
        scheme="fp32",
        engine=job.engine(target, "fp32").stored,
        parity=ParityReport(
            recipe="tiny",
            target=target.name,
            scheme="fp32",
            sizes=(
                SizeParity(sizes={"batch": 1}, vs_onnx=(near,), vs_eager=(far,)),
                SizeParity(sizes={"batch": 2}, vs_onnx=(far,), vs_eager=(near,)),
            ),
            metric=metric,
            passed=True,
        ),
        latency=LatencyReport(recipe="tiny", target=target.name, cpu="a cpu", rows=(row,)),
        reason="the row's only form",
    )


def written(job, chosen, out):
    out.mkdir()
    stored = job.program().stored, job.checkpoint().stored, job.data().stored
    return lay_out(job.recipe, [chosen], {"web": "not built here"}, TRIED, *stored, "1.2.0", "c" * 40, False, out)


@pytest.fixture(scope="module")
def release(job, chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "release"
    assert written(job, chosen, out)["targets"] == ["any-echo"]
    return out


def test_every_file_is_described_and_nothing_else_is_there(release, job, chosen):
    found = manifest.load(release)
    assert (found.recipe, found.version, found.source.commit, found.source.dirty) == ("tiny", "1.2.0", "c" * 40, False)
    assert found.skipped == {"web": "not built here"}
    assert found.tried == TRIED
    assert found.signature == job.program().stored.signature()
    assert found.data == job.data().stored.digest
    assert list(found.checkpoint) == ["model.safetensors"]
    names = {file.path for file in found.engines["any-echo"].files}
    assert names == {f"engines/any-echo/{name}" for name in chosen.engine.artifact.files}


def test_the_summary_has_the_worst_of_each_number(release):
    engine = manifest.load(release).engines["any-echo"]
    assert engine.parity.sizes == 2
    for found in (engine.parity.vs_onnx, engine.parity.vs_eager):
        assert (found[0].max_abs, found[0].sqnr_db) == (1e-5, 100)
    assert engine.latency.rows[0].versus_eager == 1.5


def test_an_engine_reproduces_the_golden_vectors_within_its_tolerance(release, chosen):
    found = manifest.load(release)
    assert found.golden.cases == {"min": {"batch": 1}, "odd": {"batch": 3}, "opt": {"batch": 2}}
    tensors = load_file(release / found.golden.file.path)
    assert tensors["odd/in/images"].shape == (3, 1, 8, 8)
    tolerance = found.engines["any-echo"].golden["logits"]
    assert tolerance.max_abs is not None
    assert 2e-5 <= tolerance.max_abs < 1e-3
    with backends.find("echo").load(chosen.engine, chosen.target) as run:
        for case in found.golden.cases:
            outputs = run({"images": tensors[f"{case}/in/images"]})
            distance = compare.distance("logits", tensors[f"{case}/out/logits"], outputs["logits"], "logits")
            assert distance.max_abs <= tolerance.max_abs


def test_the_same_inputs_make_the_same_bytes(release, job, chosen, tmp_path):
    written(job, chosen, tmp_path / "again")
    for name in (manifest.FILE, manifest.GOLDEN):
        assert (release / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_release_shares_no_file_with_the_store(release, chosen):
    for name in chosen.engine.artifact.files:
        assert not (release / "engines/any-echo" / name).samefile(chosen.engine.file(name))


def test_an_engine_that_failed_parity_is_not_published(job, chosen, tmp_path):
    failed = chosen.parity.model_copy(update={"passed": False, "reasons": ("fell by 3 %",)})
    with pytest.raises(ReleaseError, match=r"`any-echo` \(fp32\) of `tiny` failed parity[^$]*fell by 3 %"):
        written(job, dataclasses.replace(chosen, parity=failed), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_release_needs_an_engine(job, tmp_path):
    stored = job.program().stored, job.checkpoint().stored, job.data().stored
    with pytest.raises(ReleaseError, match="no engine of `tiny` to publish"):
        lay_out(job.recipe, [], {}, {}, *stored, "1.0.0", "c" * 40, False, tmp_path)


def test_an_engine_that_changed_since_it_was_verified_is_refused(job, chosen, tmp_path):
    facts = {name: fact.model_copy(update={"sha256": "0" * 64}) for name, fact in chosen.engine.artifact.files.items()}
    artifact = chosen.engine.artifact.model_copy(update={"files": facts})
    engine = dataclasses.replace(chosen.engine, artifact=artifact)
    with pytest.raises(StoreError, match="has other bytes than were built"):
        written(job, dataclasses.replace(chosen, engine=engine), tmp_path / "out")


def test_golden_sizes_of_a_model_without_axes_and_of_a_fixed_one(job):
    fixed = job.recipe.model_copy(update={"axes": {}})
    assert golden_sizes(fixed) == {"min": {}}
    one = job.recipe.model_copy(update={"axes": {"batch": Axis(min=1, opt=1, max=1)}})
    assert golden_sizes(one) == {"min": {"batch": 1}}


def test_indices_are_bounded_by_the_share_that_is_equal():
    one = Distance(
        output="top", kind="indices", max_abs=7, max_over_peak=1, rmse=1, sqnr_db=3, cosine=1, argmax_agreement=0.9
    )
    (found,) = worst([one, one.model_copy(update={"argmax_agreement": 0.8})])
    tolerance = bounds([found], [{"top": np.arange(3)}])["top"]
    assert tolerance.argmax_agreement == pytest.approx(0.6)
    assert tolerance.max_abs is None

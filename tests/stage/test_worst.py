"""The search for the worst input: what it finds, that it finds it again, and what becomes of it."""

import json
import math
import tomllib

import numpy as np
import pytest

from pipeline import cli, release, run, vectors
from pipeline.stress import subject as stress_subject
from pipeline.stress import worst
from pipeline.types import no_report
from pipeline.workspace import Workspace
from tests import workspaces


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose program and graph are made."""
    root = workspaces.tiny(tmp_path_factory.mktemp("worst"))
    job = run.prepare(Workspace(root), "tiny", targets=["any-echo"])
    job.engine(job.targets[0], "fp32")
    yield job
    job.close()


def subject(job, fault):
    """The graph itself as an engine, but for the share `fault(feeds)` of its answers, which it adds to them."""
    target, model = job.targets[0], job.onnx("fp32").stored
    right = job.answers().form(model)

    def engine(feeds):
        return {"logits": right(feeds)["logits"] * np.float32(1 + fault(feeds))}

    parts = job.engine(target, "fp32").stored, model, job.answers()
    return stress_subject.of(job.recipe, engine, *parts, target, "fp32")


def grows_with_light(feeds):
    return float(feeds["images"].mean())


def fails_in_the_dark(feeds):
    if feeds["images"].max() < 0.1:
        raise RuntimeError("nothing to see")
    return 0.0


def test_the_search_climbs_to_what_is_worst(job):
    found = worst.search(subject(job, grows_with_light), 60, no_report, most=200)
    images = found.feeds["images"]
    assert images.mean() > 0.9  # evenly drawn ones have 0.5
    assert found.tried == 200
    assert 0 < found.share < math.inf


def test_what_is_found_is_made_as_small_as_it_can_be(job):
    found = worst.search(
        subject(job, lambda feeds: 1.0 if feeds["images"].max() > 0.9 else 0.0), 60, no_report, most=50
    )
    assert (found.case.sizes, found.case.number) == ({"batch": 1}, 0)
    assert found.case.draws["images"].way == "usual"


def test_an_engine_that_fails_is_the_worst_there_is(job):
    found = worst.search(subject(job, fails_in_the_dark), 60, no_report)
    assert (found.share, found.found) == (math.inf, ())
    assert found.error == "RuntimeError: nothing to see"
    assert found.feeds["images"].max() < 0.1


def test_the_same_case_is_the_same_input_within_its_range(job):
    right = subject(job, lambda feeds: 0.0)
    for way in ("usual", "even", "ends", "peaks"):
        case = worst.Case({"batch": 3}, 7, {"images": worst.Draw(way, 0.2, 0.9, 0.3)})
        one, two = worst.make(right, case)["images"], worst.make(right, case)["images"]
        np.testing.assert_array_equal(one, two)
        assert (one.dtype, one.shape) == (np.float32, (3, 1, 8, 8))
        assert one.min() >= 0
        assert one.max() <= 1
        assert len(np.unique(one)) == 2 if way in ("ends", "peaks") else len(np.unique(one)) > 100


@pytest.fixture
def yard(tmp_path):
    return workspaces.tiny(tmp_path)


def invoke(capsys, *words):
    code = cli.invoke([str(word) for word in words])
    return code, capsys.readouterr()


def test_what_is_found_is_kept_and_looked_at_ever_after(yard, capsys):
    words = ("stress", "tiny", "--target", "any-onnxruntime", "--scheme", "fp32", "--seconds", 1, "-C", yard, "--json")
    code, said = invoke(capsys, *words, "--keep")
    found = json.loads(said.out)
    assert code == 0
    assert found["kept"] == f"recipes/tiny/vectors/{found['kept'][-24:]}"
    assert (yard / found["kept"]).is_file()
    job = run.prepare(Workspace(yard), "tiny", targets=["any-onnxruntime"])
    report = job.parity_report(job.targets[0], "fp32")
    kept = {one.name: one.verdict for one in report.stress if one.name.startswith("vector")}
    assert kept == {f"vector:{found['kept'].rpartition('/')[2]}": "passed"}
    stages = {step.name: step.deps for step in release.steps(job, [])}
    assert found["kept"] in next(deps for name, deps in stages.items() if "parity" in name)
    # the same search finds nothing that is worse than what it has kept, unless it gets further
    code, said = invoke(capsys, *words, "--no-keep")
    again = json.loads(said.out)
    assert (code, again["kept"]) == (0, None)
    assert again["before"] >= found["beyond"]
    vectors.keep(job.recipe, {"images": workspaces.images(3, seed=9)})
    (yard / found["kept"]).write_bytes(b"")
    code, said = invoke(capsys, *words)
    assert code == 6
    assert "is damaged" in said.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--target", "any-eco"], 2, "did you mean `any-echo`?"),
        (["--target", "any-echo", "--scheme", "int8-u8s8"], 2, "unknown scheme `int8-u8s8` in `any-echo`"),
        (["--target", "any-echo", "--seconds", "0"], 2, "--seconds"),
    ],
)
def test_a_wrong_option_is_named(yard, capsys, options, code, said):
    found, told = invoke(capsys, "stress", "tiny", "-C", yard, *options)
    assert found == code
    assert said in told.err


def test_tolerances_are_proposed_that_the_engines_hold(yard, capsys):
    code, said = invoke(capsys, "tolerance", "tiny", "--target", "any-onnxruntime", "-C", yard)
    assert code == 0
    assert "no input is kept" in said.err  # with which INT8 would be worse
    table = said.out[said.out.index("# 4 times") :]
    found = tomllib.loads(table)["tolerance"]["outputs"]["logits"]
    assert found.keys() == {"fp32", "int8-u8u8"}
    assert found["fp32"]["max_over_peak"] < 1e-5
    recipe = yard / "recipes/tiny/recipe.toml"
    recipe.write_text(recipe.read_text() + "\n" + table)
    code, said = invoke(capsys, "tolerance", "tiny", "--target", "any-onnxruntime", "-C", yard, "--json")
    told = {(one["scheme"], one["measure"]): one for one in json.loads(said.out)["bounds"]}
    assert code == 0
    fp32 = told["fp32", "max_over_peak"]
    assert fp32["source"] == "[tolerance.outputs.logits]"
    assert fp32["in_force"] == {"any-onnxruntime": found["fp32"]["max_over_peak"]}
    assert fp32["proposed"] == found["fp32"]["max_over_peak"]


def test_an_engine_that_fails_proposes_nothing(yard, capsys):
    rows = yard / "targets/targets.toml"
    rows.write_text(rows.read_text().replace("reference = true", "reference = false"))
    code, said = invoke(capsys, "tolerance", "tiny", "--target", "any-echo", "-C", yard)
    assert code == 10
    assert "any-echo fp32 fails" in said.err

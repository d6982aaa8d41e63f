"""From what engines showed to tolerances: every proposal holds what was measured, by the margin that is said."""

import math
import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import compare, proposal
from pipeline.types import MetricResult, ParityReport, SizeParity, StressCheck, Target, Tolerance, Tolerances
from pipeline.workspace import Workspace
from tests import workspaces

METRIC = MetricResult(name="agreement", eager=1, engine=1, drop=0, budget=0, samples=1)


@pytest.fixture
def recipe(tmp_path):
    return Workspace(workspaces.tiny(tmp_path)).recipe("tiny")


def row(name):
    fields = {"name": name, "backend": "echo", "platform": "any", "machine": "any", "arch": "any", "schemes": ["fp32"]}
    bounds = {"fp32": {"max_over_peak": 1e-4}, "int8-u8s8": {"sqnr_db": 12}}
    return Target.model_validate({**fields, "vs_onnx": bounds})


def apart(noise, kind="logits"):
    right = np.array([[1.0, 2.0, 4.0]])
    return compare.distance("logits", right, right + np.array([[noise, -noise, noise]]), kind)


def report(target, scheme, *noises):
    sizes = tuple(SizeParity(sizes={"batch": at}, vs_onnx=(apart(noise),)) for at, noise in enumerate(noises, start=1))
    return ParityReport(recipe="tiny", target=target, scheme=scheme, sizes=sizes, metric=METRIC, passed=True)


def test_the_worst_of_all_engines_decides_with_the_margin(recipe):
    found = [*proposal.seen(report("a", "fp32", 4e-7, 4e-6)), *proposal.seen(report("b", "fp32", 4e-5))]
    (bound,) = proposal.bounds(recipe, [row("a"), row("b")], found, 4)
    assert (bound.measure, bound.target, bound.where, bound.engines) == ("max_over_peak", "b", "batch=1", 2)
    assert bound.worst == pytest.approx(1e-5)
    assert 4e-5 <= bound.proposed <= 4.1e-5
    assert (bound.in_force, bound.source) == ({"a": 1e-4, "b": 1e-4}, "vs_onnx of b")


def test_what_the_form_itself_does_is_no_measure_of_engines(recipe):
    checks = [
        StressCheck(name="rows", found=(apart(1.0),), own=(apart(1.0),), verdict="noted"),
        StressCheck(name="zeros", sizes={"batch": 2}, found=(apart(0.01),), verdict="passed"),
    ]
    whole = report("a", "int8-u8s8", 0.001).model_copy(update={"stress": tuple(checks)})
    worst = {one.measure: one for one in proposal.bounds(recipe, [row("a")], proposal.seen(whole), 2)}
    assert worst["sqnr_db"].where == "zeros, batch=2"
    assert worst["argmax_agreement"].where == "batch=1"  # equal values make ties
    assert worst["argmax_agreement"].proposed is None


def test_the_proposal_is_a_table_that_a_recipe_takes(recipe):
    found = [*proposal.seen(report("a", "fp32", 1e-6)), *proposal.seen(report("a", "int8-u8s8", 0.01))]
    text = proposal.toml(proposal.bounds(recipe, [row("a")], found, 4), 4)
    assert text.startswith("# 4 times the noise that 2 engines showed")
    stated = Tolerances.model_validate(tomllib.loads(text)["tolerance"])
    assert set(stated.outputs["logits"]) == {"fp32", "int8-u8s8"}


@pytest.mark.parametrize(
    ("measure", "worst", "proposed"),
    [
        ("max_abs", 0.0, None),
        ("max_abs", 0.0123, 0.05),
        ("max_over_peak", 0.0, 4.8e-7),  # four steps of float32
        ("max_over_peak", 3e-7, 1.2e-6),
        ("sqnr_db", math.inf, 126.0),
        ("sqnr_db", 31.2, 19.0),
        ("cosine", 0.9990234375, 0.984),
        ("argmax_agreement", 1.0, 1.0),
        ("argmax_agreement", 0.9921875, 0.968),
        ("argmax_agreement", 0.5, 0.0),
    ],
)
def test_the_margin_of_each_measure(measure, worst, proposed):
    assert proposal.with_margin(measure, worst, 4) == proposed


@given(noise=st.floats(1e-12, 1.0), margin=st.floats(1, 100), scheme=st.sampled_from(["fp32", "int8-u8s8"]))
def test_what_was_measured_never_breaks_what_is_proposed(noise, margin, scheme):
    for kind in ("logits", "probabilities", "embedding", "boxes", "other"):
        found = apart(noise, kind)
        for measure in proposal.measures(scheme, kind):
            value = proposal.with_margin(measure, getattr(found, measure) or 0.0, margin)
            if value is not None and measure != "argmax_agreement":
                assert compare.violations(found, Tolerance(**{measure: value})) == []


@given(noise=st.floats(0, 10), bound=st.floats(1e-6, 10))
def test_a_share_above_one_is_a_violation(noise, bound):
    found = apart(noise)
    for tolerance in (
        Tolerance(max_abs=bound),
        Tolerance(sqnr_db=-20 * math.log10(bound)),
        Tolerance(max_over_peak=bound),
    ):
        share = compare.share(found, tolerance)
        if abs(share - 1) > 1e-9:
            assert (share > 1) == bool(compare.violations(found, tolerance))

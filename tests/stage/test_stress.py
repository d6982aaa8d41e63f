"""Engines under stress: each planted fault is found, and a right engine has none."""

import contextlib

import numpy as np
import pytest

from pipeline import backends, run, samples
from pipeline.stages.parity import parity
from pipeline.stress import checks as stress
from pipeline.stress.subject import Subject
from pipeline.types import OutputSpec, ParityReport, Signature, TensorSpec, Tolerance, no_report
from pipeline.workspace import Workspace
from tests import workspaces

MODEL = """
    import torch
    from torch import nn

    class Pooled(nn.Module):
        '''Signals [batch, seq, 4] and a mask [batch, seq] -> vector [batch, 6].'''

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.head = nn.Linear(8, 6)

        def forward(self, signals, mask):
            real = mask.to(torch.float32)[:, :, None]
            tokens = torch.tanh(self.first(signals)) * real
            return self.head(tokens.sum(dim=1) / real.sum(dim=1).clamp(min=1.0))

    def build():
        return Pooled()
"""
RECIPE = """
    name = "tiny"
    checkpoint = "weights.safetensors"
    factory = "model:build"

    [axes]
    batch = { min = 1, opt = 4, max = 8 }
    seq = { min = 2, opt = 6, max = 12 }

    [[inputs]]
    name = "signals"
    dtype = "float32"
    shape = ["batch", "seq", 4]
    range = [-100.0, 100.0]

    [[inputs]]
    name = "mask"
    dtype = "int64"
    shape = ["batch", "seq"]
    range = [0, 1]

    [[outputs]]
    name = "vector"
    kind = "embedding"

    [evaluation]
    data = "evaluation.npz"
    metric = "cosine"

    [budget]
    drop = 0.05

    [stress]
    mask = { mask = "seq" }
    nan = "fail"
    denormals = "fail"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose graph and engine are made; the engine is ONNX's own evaluator of the graph."""
    root = workspaces.tiny(tmp_path_factory.mktemp("stress"), recipe=RECIPE, model=MODEL)
    rng = np.random.default_rng(0)
    shapes = {"first.weight": (8, 4), "first.bias": (8,), "head.weight": (6, 8), "head.bias": (6,)}
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    workspaces.save_file(weights, root / "recipes/tiny/weights.safetensors")
    signals = rng.uniform(-100, 100, (8, 6, 4)).astype(np.float32)
    np.savez(root / "recipes/tiny/evaluation.npz", signals=signals, mask=rng.integers(0, 2, (8, 6)))
    job = run.prepare(Workspace(root), "tiny", targets=["any-echo"])
    with contextlib.closing(job):
        job.engine(job.targets[0], "fp32")
        yield job


def stressed(job, out, monkeypatch, fault, **changes):
    """The report on the engine of `job` as `fault(run, feeds)` answers for it."""
    loaded = backends.loaded

    @contextlib.contextmanager
    def broken(engine, target):
        with loaded(engine, target) as right:
            yield lambda feeds: fault(right, feeds)

    monkeypatch.setattr(backends, "loaded", broken)
    target = job.targets[0]
    recipe = job.recipe.model_copy(update=changes)
    parts = job.engine(target, "fp32").stored, job.onnx("fp32").stored, job.answers()
    parity(recipe, *parts, target, "fp32", out, no_report)
    return ParityReport.model_validate_json((out / "parity.json").read_text())


def verdicts(report, wanted):
    return {one.name for one in report.stress if one.verdict == wanted}


def right(engine, feeds):
    return engine(feeds)


class Leaks:
    """A buffer that isn't cleared: a row alone gets something of the call before it, if that was one row, too."""

    __name__ = "leaks_between_rows"

    def __init__(self):
        self.before = None

    def __call__(self, engine, feeds):
        found = engine(feeds)["vector"]
        left, self.before = self.before, found if len(found) == 1 else None
        return {"vector": found if left is None or len(found) > 1 else found + 0.05 * left}


def looks_behind_the_mask(engine, feeds):
    hidden = feeds["signals"] * (1 - feeds["mask"])[:, :, None].astype(np.float32)
    # a kernel for one shape, which no usual input has
    return {"vector": engine(feeds)["vector"] + (0.001 * hidden.sum() if hidden.shape[:2] == (4, 9) else 0)}


def makes_numbers_of_nan(engine, feeds):
    return {"vector": np.nan_to_num(engine(feeds)["vector"], nan=0.0)}


def spreads_nan(engine, feeds):
    found = engine(feeds)["vector"]
    return {"vector": found * np.nan if np.isnan(found).any() else found}


def overflows(engine, feeds):
    found = engine(feeds)["vector"]
    return {"vector": found + (np.inf if np.abs(feeds["signals"]).mean() > 99 else 0)}


def minds_zeros(engine, feeds):
    return {"vector": engine(feeds)["vector"] + (0.1 if not feeds["signals"].any() else 0)}


def divides_by_what_is_flushed(engine, feeds):
    gone = np.abs(feeds["signals"]).max() < np.finfo(np.float32).tiny and feeds["signals"].any()
    return {"vector": engine(feeds)["vector"] + (0.1 if gone else 0)}


def whole_vectors_only(engine, feeds):
    found = engine(feeds)["vector"]
    both_odd = feeds["mask"].shape[0] % 2 and feeds["mask"].shape[1] % 2
    return {"vector": found * (0.9 if both_odd else 1)}


def raises_at_the_ends(engine, feeds):
    if np.abs(feeds["signals"]).min() > 99:
        raise RuntimeError("saturated")
    return engine(feeds)


def test_a_right_engine_passes_whatever_it_is_asked(job, tmp_path, monkeypatch):
    report = stressed(job, tmp_path, monkeypatch, right)
    assert (report.passed, report.reasons) == (True, ())
    names = {"sizes", "rows", "padding", "zeros", "ends", "denormals", "nan", "nan_rows"}
    assert verdicts(report, "passed") == names
    assert verdicts(report, "not applicable") == {"vectors"}
    assert all(one.own for one in report.stress if one.name in ("rows", "padding", "nan_rows"))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (Leaks(), "rows"),
        (looks_behind_the_mask, "padding"),
        (makes_numbers_of_nan, "nan"),
        (spreads_nan, "nan_rows"),
        (overflows, "ends"),
        (raises_at_the_ends, "ends"),
        (minds_zeros, "zeros"),
        (divides_by_what_is_flushed, "denormals"),
        (whole_vectors_only, "sizes"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_each_planted_fault_is_found_by_its_check_and_by_no_other(job, tmp_path, monkeypatch, fault, name):
    report = stressed(job, tmp_path, monkeypatch, fault)
    assert verdicts(report, "failed") == {name}, report.reasons
    assert not report.passed
    assert f"`{name}`" in report.reasons[0]


# --- forms that aren't invariant, ties ------------------------------------------------------------------------------


class Answering:
    """`Answers` whose program and form are functions of the inputs."""

    def __init__(self, eager, form):
        self.eager, self.graph = eager, form

    def form(self, model):
        return self.eager if model is None else self.graph

    def ask(self, feeds, model=None):
        return self.form(model)(feeds)

    def feeds(self, sizes):
        return samples.feeds(self.recipe, sizes, 0)


def halves(feeds):
    """Scores of each image: how bright its halves are."""
    found = feeds["images"].reshape(len(feeds["images"]), 2, -1).mean(axis=-1)
    return {"logits": np.concatenate([found, found], axis=1)}


def over_the_brightest(feeds):
    return {"logits": halves(feeds)["logits"] / feeds["images"].max()}


def wrong_alone(feeds):
    return {"logits": over_the_brightest(feeds)["logits"] * (1 if len(feeds["images"]) > 1 else 2)}


@pytest.fixture
def ask(tmp_path):
    """The verdict and reason of one check on an engine, its form and the program."""
    recipe = Workspace(workspaces.tiny(tmp_path)).recipe("tiny")
    shapes = {"images": ("batch", 1, 8, 8), "logits": ("batch", 4)}
    inputs, outputs = ((TensorSpec(name=name, dtype="float32", shape=shapes[name]),) for name in shapes)

    def asked(name, engine, form, eager, *, in_fp32=False, kind="logits"):
        changes = {"outputs": (OutputSpec(name="logits", kind=kind),)}
        answers = Answering(eager, form)
        answers.recipe = recipe.model_copy(update=changes)
        subject = Subject(
            recipe=answers.recipe,
            run=engine,
            model=object(),
            signature=Signature(inputs=inputs, outputs=outputs, axes=recipe.axes),
            answers=answers,
            bounds={"logits": Tolerance(max_over_peak=1e-4)},
            in_fp32=in_fp32,
        )
        return [(one.verdict, one.why) for one in stress.checks(subject, []) if one.name == name]

    return asked


def test_what_the_form_does_itself_is_noted(ask):
    ((verdict, why),) = ask("rows", over_the_brightest, over_the_brightest, halves)
    assert verdict == "noted"
    assert why.startswith("the form itself changes its answer: `logits` max_over_peak")


def test_an_engine_that_strays_from_such_a_form_fails(ask):
    ((verdict, why),) = ask("rows", wrong_alone, over_the_brightest, halves)
    assert verdict == "failed"
    assert "and the engine isn't as its form" in why


def test_a_form_in_fp32_must_be_invariant_where_eager_is(ask):
    ((verdict, why),) = ask("rows", over_the_brightest, over_the_brightest, halves, in_fp32=True)
    assert (verdict, why.endswith("and eager fp32 doesn't")) == ("failed", True)
    ((verdict, why),) = ask("rows", over_the_brightest, over_the_brightest, over_the_brightest, in_fp32=True)
    assert (verdict, why.startswith("eager fp32 itself changes its answer")) == ("noted", True)


def test_a_number_for_nan_is_the_forms_own_where_the_form_has_one(ask):
    def numbers(feeds):
        return {"logits": np.nan_to_num(halves(feeds)["logits"])}

    assert ask("nan", numbers, numbers, halves) == [("noted", "`logits` has 4 numbers for NaN; so has its form")]
    assert ask("nan", halves, numbers, halves) == [("passed", "")]


def test_the_order_of_equal_values_is_not_asked(ask):
    def first(feeds):
        return {"logits": np.argsort(-halves(feeds)["logits"], axis=-1, kind="stable")}

    def last(feeds):
        flipped = -halves(feeds)["logits"][:, ::-1]
        return {"logits": 3 - np.argsort(flipped, axis=-1, kind="stable")}

    assert ask("zeros", last, first, first, kind="indices") == [("passed", "")]
    assert [verdict for verdict, _ in ask("ends", last, first, first, kind="indices")] == ["passed", "passed", "failed"]


def test_what_the_form_cannot_take_is_not_asked_of_the_engine(ask):
    def no_zeros(feeds):
        if not feeds["images"].any():
            raise ZeroDivisionError("all dark")
        return halves(feeds)

    assert ask("zeros", halves, no_zeros, halves) == [("not applicable", "its form fails: ZeroDivisionError: all dark")]


@pytest.mark.parametrize(("times", "verdict"), [(1.8, "noted"), (2.2, "failed")])
def test_rounding_that_the_model_magnifies_is_no_fault_of_the_engine(ask, times, verdict):
    def off_by(share):
        return lambda feeds: {"logits": halves(feeds)["logits"] * np.float32(1 + share * 1e-4)}

    found = ask("ends", off_by(times), halves, off_by(0.95), in_fp32=True)
    assert {one for one, _ in found} == {"passed", verdict}  # passed where all is dark
    assert ("eager fp32 is 0.95 of what is allowed away, too" in found[-1][1]) == (verdict == "noted")
    assert {one for one, _ in ask("ends", off_by(times), halves, off_by(0.95))} == {"passed", "failed"}

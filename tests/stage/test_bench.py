"""Profiles beside latencies, and the bench against PyTorch's own compilers."""

import contextlib
import dataclasses
import json
from textwrap import dedent

import pytest

from pipeline import baselines, cli, profiles, run, shares, store, timing
from pipeline import samples as feeds_of
from pipeline.stages import bench as stage
from pipeline.types import Bench, ProfileReport, Tolerance
from pipeline.workspace import Workspace
from tests import workspaces
from tests.extras import thorough

WIDE = """
    [targets.any-onnxruntime]
    backend = "onnxruntime"
    platform = "any"
    machine = "any"
    arch = "generic"
    schemes = ["fp32"]
    vs_onnx = { fp32 = { sqnr_db = 80 } }
"""
WIDE_MODEL = """
    from torch import nn

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 4))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with a finished export."""
    found = workspaces.tiny(tmp_path_factory.mktemp("benched"))
    run.export(run.prepare(Workspace(found), "tiny"))
    return found


@pytest.fixture
def asked(root):
    """All that a bench of the workspace's engine needs, without a baseline."""
    job = run.prepare(Workspace(root), "tiny", targets=["any-onnxruntime"])
    (target,) = job.targets
    return stage.Asked(
        recipe=job.recipe,
        checkpoint=job.checkpoint().stored,
        program=job.program().stored,
        engines={"ours": (job.engine(target, "fp32").stored, target)},
        names=(),
        threads=[1],
        seconds=0.01,
    )


def benched(asked, folder, **changes):
    return stage.bench(stage.Asked(**vars(asked) | changes), folder, lambda *_: None)


# --- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_of_each_candidate_lies_beside_the_latency(root):
    found = ProfileReport.model_validate_json(
        (root / "artifacts/tiny/latency/any-onnxruntime/profile.json").read_text()
    )
    assert {one.scheme for one in found.profiles} == {"int8-u8u8", "fp32"}
    assert not (root / "artifacts/tiny/latency/any-echo/profile.json").exists()
    for one in found.profiles:
        assert dict(one.sizes) == {"batch": 2}
        # the same calls, seen from inside and from outside
        assert 0 < one.operators_ms <= one.call_ms
        assert {"conv", "head"} <= {share.name for share in shares.by_module(one)}
    fp32 = next(one for one in found.profiles if one.scheme == "fp32")
    assert all(row.line.startswith("recipes/tiny/model.py:") for row in fp32.rows if row.node)


def test_operators_add_up_to_about_a_call(tmp_path):
    """Where operators are long, nearly all of a call is theirs, and the profiler costs next to nothing."""
    made = workspaces.tiny(tmp_path, rows=WIDE, model=WIDE_MODEL)
    folder = made / "recipes" / "tiny"
    recipe = dedent(workspaces.RECIPE).replace(
        'checkpoint = "weights.safetensors"', 'train = "model:train"\ntrain_suffix = ".pt"'
    )
    (folder / "recipe.toml").write_text(recipe.replace("opt = 2, max = 4", "opt = 64, max = 64"))
    with (folder / "model.py").open("a") as file:
        file.write("\n\ndef train(path):\n    import torch\n    torch.save(build().state_dict(), path)\n")
    job = run.prepare(Workspace(made), "tiny")
    (target,) = job.targets
    engine, form = job.engine(target, "fp32").stored, job.form(target, "fp32").stored
    found = profiles.profiles(job.recipe, target, {"fp32": engine}, {"fp32": form})
    (profile,) = found.profiles
    assert profile.operators_ms == pytest.approx(profile.call_ms, rel=0.5)
    assert profile.operators_ms == pytest.approx(profile.plain_ms, rel=0.9)
    first, *_ = shares.by_module(profile)
    assert first.name == "2"  # 2048 x 2048, against 64 x 2048 and 2048 x 4
    assert first.share > 0.5


def test_the_command_profile_shows_modules_and_what_torch_compile_does(root, capsys):
    assert cli.invoke(["profile", "tiny", "-t", "any-onnxruntime", "--scheme", "fp32", "-C", str(root)]) == 0
    text = capsys.readouterr().out
    assert "any-onnxruntime fp32 at batch=2, 1 thread" in text
    assert "head" in text
    assert "1 graph, 0 graph breaks, 1 recompilation at batch=2; batch=1; batch=4" in text
    assert cli.invoke(["profile", "tiny", "-t", "any-echo", "-C", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["profiles"] == []
    assert found["compilation"]["graphs"] == 1
    assert cli.invoke(["profile", "tiny", "--scheme", "fp16", "-C", str(root)]) == 2
    assert "did you mean `fp32`" in capsys.readouterr().err


# --- the bench -------------------------------------------------------------------------------------------------------


def test_the_command_bench_writes_what_it_prints(root, capsys):
    command = ["bench", "tiny", "-C", str(root), "--baseline", "eager", "--seconds", "0.01", "--threads", "1"]
    assert cli.invoke([*command, "--all", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((root / "artifacts/tiny/bench/bench.json").read_text())
    assert printed == written
    found = Bench.model_validate(written)
    assert [dict(row.sizes) for row in found.rows] == [{"batch": 1}, {"batch": 2}, {"batch": 4}]
    runners = {"eager", "any-onnxruntime fp32", "any-onnxruntime int8-u8u8", "any-echo fp32"}
    for row in found.rows:
        assert set(row.times) == set(row.versus_eager) == runners
        assert row.versus_compile == {}
        assert row.versus_eager["eager"].median == 1
        assert all(time.repeats >= timing.LEAST_ROUNDS for time in row.times.values())
    assert {one.runner for one in found.warm_ups} == runners
    close = {one.runner: one.sqnr_db for one in found.warm_ups}
    assert close["eager"] == float("inf")
    assert close["any-onnxruntime fp32"] is None
    assert found.machine.cores >= 1
    # and the same as a table
    assert cli.invoke(command) == 0
    text = capsys.readouterr().out
    assert "times as fast as eager" in text
    assert "load average" in text


def test_what_cannot_be_asked_for_is_refused(root, capsys):
    assert cli.invoke(["bench", "tiny", "-C", str(root), "--baseline", "eagre"]) == 2
    assert "did you mean `eager`" in capsys.readouterr().err
    assert cli.invoke(["bench", "tiny", "-C", str(root), "--threads", "4096"]) == 2
    assert "--threads 4096" in capsys.readouterr().err


def test_without_a_compiler_a_baseline_is_a_reason(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.backends.torch_compile.shutil.which", lambda _: None)
    found = benched(asked, tmp_path, names=("eager", "compile"))
    assert found.left_out == {"compile": "there is no C++ compiler (Debian package `g++`)"}
    assert set(found.rows[0].times) == {"eager", "ours"}


def test_an_engine_that_fails_is_a_reason(asked, tmp_path):
    engine, target = asked.engines["ours"]
    files = {"signature.json": engine.artifact.files["signature.json"]}
    broken = store.Stored(engine.path, engine.artifact.model_copy(update={"files": files}))
    found = benched(asked, tmp_path, engines=asked.engines | {"broken": (broken, target)})
    assert "has no file" in found.left_out["broken"]
    assert set(found.rows[0].times) == {"ours"}


def test_a_baseline_that_answers_otherwise_is_a_warning(asked, tmp_path, monkeypatch):
    started = baselines.started

    @contextlib.contextmanager
    def spoilt(*arguments):
        with started(*arguments) as begun:
            wrong = dataclasses.replace(begun, run=lambda feeds: {"logits": begun.run(feeds)["logits"] + 1})
            yield wrong

    bounded = asked.recipe.budget.model_copy(update={"vs_eager": Tolerance(max_abs=0.1)})
    recipe = asked.recipe.model_copy(update={"budget": bounded})
    found = benched(asked, tmp_path, names=("eager",), recipe=recipe)
    assert not any("otherwise" in text for text in found.warnings)
    monkeypatch.setattr(baselines, "started", spoilt)
    found = benched(asked, tmp_path, names=("eager",), recipe=recipe)
    assert [text for text in found.warnings if "otherwise" in text] == [
        "baseline eager answers otherwise than eager PyTorch: `logits` max_abs 1 > 0.1"
    ]


@pytest.mark.slow
def test_torch_compile_is_timed_after_it_has_compiled(asked, tmp_path):
    sizes_of = asked.sizes()
    order = [sizes_of[1], sizes_of[0], sizes_of[2]]
    model = stage._model(stage.Asked(**vars(asked) | {"names": ("compile",)}), stage._Found())
    with baselines.started("compile", asked.recipe, model, asked.program, order, 1, tmp_path) as begun:
        took = begun.warm_up
        # a graph for batch 2 and more, and one for batch 1
        assert (took.graphs, took.graph_breaks, took.recompilations) == (2, 0, 1)
        assert took.first_s > 0.5
        graphs = baselines._graphs()
        with baselines.reference.eager(asked.program, 1) as eager:
            for sizes in sizes_of:
                feeds = feeds_of.feeds(asked.recipe, sizes, seed=3)
                near = pytest.approx(eager(feeds)["logits"], rel=1e-3, abs=1e-4)
                assert begun.run(feeds)["logits"] == near
        assert baselines._graphs() == graphs


@thorough
def test_every_baseline(asked, tmp_path):
    found = benched(asked, tmp_path, names=baselines.NAMES)
    assert found.left_out == {}
    for row in found.rows:
        assert set(row.times) == set(row.versus_compile) == {*baselines.NAMES, "ours"}
    compiled = {one.runner: one.recompilations for one in found.warm_ups}
    assert compiled["compile"] == compiled["max-autotune"] == 1
    assert compiled["aotinductor"] is None


@thorough
@pytest.mark.parametrize(("name", "follows"), [("compile", True), ("max-autotune-freezing", False)])
def test_only_freezing_makes_weights_constants(asked, tmp_path, name, follows):
    sizes = asked.sizes()[1]
    feeds = feeds_of.feeds(asked.recipe, sizes, seed=3)
    model = stage._model(stage.Asked(**vars(asked) | {"names": (name,)}), stage._Found())
    with baselines.started(name, asked.recipe, model, asked.program, [sizes], 1, tmp_path) as begun:
        before = begun.run(feeds)["logits"]
        model.get_parameter("model.head.bias").data.add_(1)
        assert (abs(begun.run(feeds)["logits"] - before).max() > 0.5) == follows

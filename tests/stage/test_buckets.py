"""Rows with buckets: engines of fixed sizes that together are the model, from the build to the release."""

import subprocess
from pathlib import Path

import pytest

from pipeline import backends, buckets, host, run, samples, store
from pipeline.errors import BuildError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Target, Tolerance
from pipeline.workspace import Workspace
from tests import small, workspaces
from tests.arm import board, needs_emulator

ROOT = Path(__file__).parents[2]
CASES = [("echo", {"reference": True}), ("onnxruntime", {}), ("eager", {}), ("tvm", {}), ("tvm", {"import": "program"})]


def row(backend, options, sizes, **changes):
    table = {
        "name": f"here-{backend}",
        "backend": backend,
        "platform": host.system(),
        "machine": host.machine(),
        "arch": "native",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_over_peak=1e-4)},
        "options": options,
        "buckets": sizes,
    }
    return Target.model_validate(table | changes)


def buildable(target):
    reason = backends.find(target.backend).missing(target)
    if reason is not None:
        pytest.skip(reason)


def captured(root, name):
    entry = small.by_name(name)
    recipe = small.recipe_of(entry)
    program = small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))
    return recipe, program, small.converted(root / "onnx", recipe, program)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """x [batch, seq, 8] and a mask [batch, seq]; batch 1 to 19, seq 1 to 17."""
    return captured(tmp_path_factory.mktemp("attention"), "MaskedAttention")


def made(folder, model, target):
    source = model[1] if backends.find(target.backend).source(target) == "program" else model[2]
    key = Key("engine", {"model": source.digest, "row": target.name})
    return store.make(folder, key, lambda out: build(source, target, "fp32", out)).stored


@pytest.mark.parametrize(("backend", "options"), CASES, ids=lambda value: str(value))
def test_engines_of_fixed_sizes_are_the_model_together(tmp_path, attention, backend, options):
    target = row(backend, options, {"batch": [3], "seq": [6, 9]})
    buildable(target)
    recipe, program, _ = attention
    first, second = (made(tmp_path / name, attention, target) for name in ("first", "second"))

    assert first.artifact.files == second.artifact.files
    assert [one.folder for one in buckets.of(first)] == ["batch3-seq6", "batch3-seq9"]
    part = buckets.part(first, buckets.of(first)[-1])
    assert [spec.shape for spec in part.signature().inputs] == [(3, 9, 8), (3, 9)]
    with backends.loaded(first, target) as call, backends.find("eager").load(program, target) as reference:
        for batch, seq in ((1, 1), (1, 6), (2, 7), (3, 9)):
            feeds = samples.feeds(recipe, {"batch": batch, "seq": seq}, seed=1)
            for name, want in reference(feeds).items():
                small.assert_near(want, call(feeds)[name], f"{name} at {batch}, {seq}")
        for sizes in ({"batch": 4, "seq": 1}, {"batch": 1, "seq": 10}):
            with pytest.raises(Exception, match=r"axis `\w+` is \d+, outside 1 to \d"):
                call(samples.feeds(recipe, sizes, seed=1))


def test_a_broken_bucket_is_refused_at_load(tmp_path, attention):
    target = row("onnxruntime", {}, {"batch": [1, 3], "seq": [9]})
    engine = made(tmp_path / "engine", attention, target)
    engine.file("batch3-seq9/model.onnx").write_bytes(b"no graph")

    with pytest.raises(BuildError, match="batch3-seq9"), backends.loaded(engine, target):
        pytest.fail("a broken engine was loaded")


def test_a_backend_for_fixed_sizes_needs_buckets(tmp_path, attention, monkeypatch):
    monkeypatch.setattr(type(backends.find("echo")), "static_only", True, raising=False)
    match = r"(?s)`echo` builds models of fixed sizes only, and `batch`, `seq` may vary.*no `buckets`.*add `buckets ="

    with pytest.raises(BuildError, match=match):
        made(tmp_path / "dynamic", attention, row("echo", {}, None))
    assert made(tmp_path / "buckets", attention, row("echo", {}, "auto")).artifact.files


def test_sizes_that_only_the_data_decides_are_refused(tmp_path):
    model = captured(tmp_path, "NonZero")

    with pytest.raises(BuildError, match=r"(?s)no buckets for output `.*isn't decided by the axes"):
        made(tmp_path / "engine", model, row("onnxruntime", {}, "auto"))


# --- the whole chain -----------------------------------------------------------------------------------------------

TEXT = """
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from torch import nn

    class Text(nn.Module):
        '''Token ids and a mask [batch, seq] -> a vector a text [batch, 8], two numbers a token [batch, 2*seq].'''

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.qkv = nn.Linear(8, 24)

        def forward(self, ids, mask):
            x = self.table(ids)
            q, k, v = self.qkv(x).chunk(3, -1)
            bias = (1.0 - mask[:, None, :].float()) * -1e9
            x = x + torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v
            some = mask[:, :, None].float()
            mean = (x * some).sum(1) / some.sum(1).clamp(min=1)
            return mean, x[:, :, :2].flatten(1)

    class Careless(Text):
        '''The same without a look at the mask.'''

        def forward(self, ids, mask):
            mean, pairs = super().forward(ids, torch.ones_like(mask))
            return mean, pairs + 0 * mask[:, :1]

    def build():
        return Text()

    def careless():
        return Careless()

    def train(path):
        torch.manual_seed(0)
        save_file(Text().state_dict(), path)

    def feeds(sizes, seed):
        rng = np.random.default_rng(seed)
        shape = sizes["batch"], sizes["seq"]
        lengths = rng.integers(1, shape[1], (shape[0], 1), endpoint=True)
        return {
            "ids": rng.integers(0, 20, shape),
            "mask": (np.arange(shape[1]) < lengths).astype(np.int64),
        }

    def evaluation():
        for batch, seq in ((1, 2), (2, 5), (7, 6), (8, 3), (2, 11)):
            yield feeds({"batch": batch, "seq": seq}, seq)
"""

RECIPE = """
    name = "tiny"
    train = "model:train"
    factory = "model:build"
    feeds = "model:feeds"

    [axes]
    batch = { min = 1, opt = 2, max = 8 }
    seq = { min = 2, opt = 4, max = 12 }

    [[inputs]]
    name = "ids"
    dtype = "int64"
    shape = ["batch", "seq"]
    range = [0, 19]

    [[inputs]]
    name = "mask"
    dtype = "int64"
    shape = ["batch", "seq"]
    range = [0, 1]

    [[outputs]]
    name = "mean"
    kind = "embedding"

    [[outputs]]
    name = "pairs"

    [evaluation]
    data = "model:evaluation"
    metric = "cosine"

    [budget]
    drop = 0.001
"""

ROWS = """
    [targets.any-onnxruntime]
    backend = "onnxruntime"
    platform = "any"
    machine = "any"
    arch = "generic"
    schemes = ["fp32"]
    vs_onnx = { fp32 = { max_over_peak = 1e-4 } }

    [targets.any-onnxruntime.buckets]
    batch = [1, 4]
    seq = [4, 6]

    [targets.here-tvm]
    backend = "tvm"
    platform = "linux"
    machine = "x86_64"
    arch = "native"
    schemes = ["fp32"]
    buckets = "auto"
    vs_onnx = { fp32 = { max_over_peak = 1e-4 } }
"""


def exported(root, target, recipe="tiny", **watch):
    return run.export(run.prepare(Workspace(root), recipe, targets=[target]), **watch)[0]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return workspaces.tiny(tmp_path_factory.mktemp("texts"), rows=ROWS, recipe=RECIPE, model=TEXT)


@pytest.fixture(scope="module")
def verdict(texts):
    return exported(texts, "any-onnxruntime")


def test_parity_goes_to_all_that_is_served(verdict):
    assert verdict.status == "passed", verdict.reason
    sizes = {(one.sizes["batch"], one.sizes["seq"]) for one in verdict.parity.sizes}

    assert {(1, 2), (2, 4), (4, 6), (2, 5), (1, 4), (4, 4), (2, 2), (2, 6)} <= sizes
    assert max(sizes) == (4, 6)
    assert all(one.error is None for one in verdict.parity.sizes)


def test_the_metric_is_of_what_is_served_in_parts_if_need_be(texts, verdict):
    assert verdict.parity.metric.samples == 4
    assert abs(verdict.parity.metric.drop) < 1e-6
    warnings = store.load(texts / "artifacts/tiny/parity/any-onnxruntime/fp32").artifact.facts["warnings"]
    assert warnings == ["`any-onnxruntime`: 1 of 5 evaluation samples are larger than its buckets"]


def test_latency_is_of_sizes_that_are_served(verdict):
    assert {tuple(one.sizes.values()) for one in verdict.latency.rows} == {(1, 4), (2, 4)}


def test_a_second_export_makes_nothing(texts, verdict):
    states = {}
    again = exported(texts, "any-onnxruntime", watch=lambda step, state, _: states.update({step: state}))

    assert again.engine.digest == verdict.engine.digest
    assert set(states.values()) == {"cached"}


def test_other_buckets_make_another_engine(texts, verdict, tmp_path):
    subprocess.run(["cp", "-a", f"{texts}/.", tmp_path], check=True)
    rows = tmp_path / "targets/targets.toml"
    rows.write_text(rows.read_text().replace("seq = [4, 6]", "seq = [6]"))
    job = run.prepare(Workspace(tmp_path), "tiny", targets=["any-onnxruntime"])
    made = job.engine(job.targets[0], "fp32")

    assert (made.state, made.reason) == ("built", "setting buckets changed")
    assert [one.folder for one in buckets.of(made.stored)] == ["batch1-seq6", "batch4-seq6"]


def test_buckets_for_no_evaluation_sample_are_no_good(texts, verdict, tmp_path):
    subprocess.run(["cp", "-a", f"{texts}/.", tmp_path], check=True)
    model = tmp_path / "recipes/tiny/model.py"
    model.write_text(model.read_text().replace("((1, 2), (2, 5), (7, 6), (8, 3), (2, 11))", "((2, 11),)"))
    refused = exported(tmp_path, "any-onnxruntime")

    assert refused.status == "failed"
    assert refused.reason == "fp32 fails on the evaluation data: input `ids`: axis `seq` is 11, outside 2 to 6"


def test_a_model_that_minds_padding_is_refused(texts, verdict, tmp_path):
    subprocess.run(["cp", "-a", f"{texts}/.", tmp_path], check=True)
    recipe = tmp_path / "recipes/tiny/recipe.toml"
    recipe.write_text(recipe.read_text().replace("model:build", "model:careless"))
    refused = exported(tmp_path, "any-onnxruntime")

    assert refused.status == "failed"
    assert refused.reason.startswith("fp32 padding `seq` from 2 to 4 changes the answer, of eager fp32 already: `mean`")
    reasons = refused.candidates["fp32"].reasons
    assert not any("not its ONNX graph" in reason for reason in reasons)
    assert len([one for one in reasons if "changes the answer" in one]) >= 4


@pytest.mark.slow
def test_tvm_serves_buckets(texts):
    verdict = exported(texts, "here-tvm")

    assert verdict.status == "passed", verdict.reason
    assert [one.folder for one in buckets.of(verdict.engine)] == [
        f"batch{batch}-seq{seq}" for batch in (2, 8) for seq in (4, 12)
    ]
    assert verdict.audits["fp32"].int8_share == 0
    assert verdict.audits["fp32"].sizes == {"batch": 2, "seq": 4}


BOARD = """
    [targets.board-tvm]
    backend = "tvm"
    platform = "linux"
    machine = "{machine}"
    arch = "{arch}"
    schemes = ["fp32"]
    buckets = {{ batch = [1, 3] }}
    vs_onnx = {{ fp32 = {{ max_over_peak = 1e-4 }} }}
"""


@pytest.mark.slow
def test_a_board_runs_one_bucket_at_a_time(tmp_path):
    buildable(row("tvm", {}, None))
    with board() as port:
        rows = BOARD.format(machine="x86_64", arch="x86-64-v3") + f'    device.rpc = "127.0.0.1:{port}"\n'
        found = exported(workspaces.tiny(tmp_path, rows=rows), "board-tvm")

    assert found.status == "passed", found.reason
    assert {one.sizes["batch"] for one in found.parity.sizes} == {1, 2, 3}
    assert {one.sizes["batch"] for one in found.latency.rows} == {1, 2}
    assert all(0 < one.engines["fp32"].median_ms < 1000 for one in found.latency.rows)


@needs_emulator
@pytest.mark.slow
def test_an_emulator_runs_buckets(tmp_path):
    found = exported(workspaces.tiny(tmp_path, rows=BOARD.format(machine="aarch64", arch="cortex-a72")), "board-tvm")

    assert found.status == "passed", found.reason
    assert {one.sizes["batch"] for one in found.parity.sizes} == {1, 2, 3}

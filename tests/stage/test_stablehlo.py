"""StableHLO by way of JAX: axes as symbols, 64 bits made 32, and a consumer that has no torch."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline import backends, host, samples, store
from pipeline.errors import BuildError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key
from tests import extras, small
from tests.contract.test_backends import row

extras.need("jax", "stablehlo")
extras.need("torchax", "stablehlo")


@pytest.fixture
def built(tmp_path):
    """A recipe, its program, its engine, and the engine's row."""

    def of(name, options=None, **changes):
        model = small.by_name(name)
        recipe = small.recipe_of(model)
        program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", model))
        target = row("stablehlo", options or {}, **changes)
        engine = store.make(tmp_path / "engine", Key("engine"), lambda out: build(program, target, "fp32", out)).stored
        return recipe, program, engine, target

    return of


def assert_is_the_program(recipe, program, engine, target):
    eager = row("eager", {})
    with backends.find("eager").load(program, eager) as reference, backends.loaded(engine, target) as run:
        for sizes in samples.combinations(recipe.axes):
            feeds = samples.feeds(recipe, sizes, seed=3)
            want, got = reference(feeds), run(feeds)
            for name, array in want.items():
                small.assert_near(array, got[name], f"{name} at {sizes}")


@pytest.mark.parametrize("name", ["Cond", "ConvKinds", "IntAndBool", "MaskedAttention", "WeightAsOutput"])
def test_engine_is_the_program_at_every_size(built, name):
    assert_is_the_program(*built(name))


def test_sizes_that_no_symbol_tells_ask_for_buckets(built):
    with pytest.raises(BuildError, match=r"can't tell a size.*`aten::max_pool2d`.*models\.py:\d+.*no `buckets`"):
        built("Pools")


def test_buckets_build_what_symbols_can_not(built):
    recipe, program, engine, target = built("Pools", buckets={"batch": [2], "side": [8]})
    eager = row("eager", {})
    feeds = samples.feeds(recipe, {"batch": 2, "side": 8}, seed=3)

    with backends.find("eager").load(program, eager) as reference, backends.loaded(engine, target) as run:
        small.assert_near(reference(feeds)["out"], run(feeds)["out"], "out")


@pytest.mark.parametrize(
    ("name", "told"),
    [("NonZero", r"`aten::nonzero`, at tests/models\.py:\d+"), ("CustomOperator", r"`catalogue::twice_plus`, at")],
)
def test_operator_without_a_form_is_named_with_its_place(built, name, told):
    with pytest.raises(BuildError, match=rf"stablehlo can't build `here-stablehlo`[\s\S]*{told}"):
        built(name)


def test_64_bits_are_narrowed_and_said(built):
    recipe, _, engine, target = built("IntAndBool")
    feeds = samples.feeds(recipe, {"batch": 2}, seed=3)

    assert engine.artifact.facts["narrowed"] == ["ids", "kept"]
    with backends.loaded(engine, target) as run:
        assert run(feeds)["kept"].dtype == np.int64
        with pytest.raises(UsageError, match="`ids` has a value that 32 bits don't hold"):
            run(feeds | {"ids": feeds["ids"] + 2**40})


def test_consumer_needs_no_torch(built, tmp_path):
    recipe, _, engine, target = built("ConvBatchNorm")
    feeds = samples.feeds(recipe, {"batch": 2}, seed=3)
    np.save(tmp_path / "x.npy", feeds["x"])
    script = f"""
import sys, numpy
import jax
from jax import export
model = export.deserialize(bytearray(open({str(engine.file("model.stablehlo"))!r}, "rb").read()))
numpy.save({str(tmp_path / "out.npy")!r}, jax.jit(model.call)(numpy.load({str(tmp_path / "x.npy")!r}))[0])
assert "torch" not in sys.modules
assert model.platforms == ("cpu", "tpu", "cuda")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    with backends.loaded(engine, target) as run:
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), run(feeds)["out"])


def test_platforms_are_checked(built):
    with pytest.raises(UsageError, match=r"(?s)unknown platform `cdua`.*did you mean `cuda`"):
        built("ConvBatchNorm", {"platforms": "cpu, cdua"})


def test_engine_for_tpu_alone_is_built_but_not_run(built):
    *_, engine, target = built("ConvBatchNorm", {"platforms": "tpu"})

    assert engine.artifact.facts["platforms"] == ["tpu"]
    assert "compiled for tpu" in backends.find("stablehlo").not_runnable(target)


def test_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(host, "has_module", lambda name: name != "torchax")

    assert "`pip install 'exportyard[stablehlo]'`" in backends.find("stablehlo").missing(row("stablehlo", {}))

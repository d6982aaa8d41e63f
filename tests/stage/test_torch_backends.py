"""The backends that are PyTorch itself: AOTInductor, TorchScript, torch.compile."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline import backends, host, samples, store
from pipeline.backends import aotinductor
from pipeline.errors import BuildError, UnavailableError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key
from tests import small
from tests.contract.test_backends import row
from tests.models import BATCH, Entry, entry, x  # noqa: F401

SOURCE = Path(__file__).parents[2] / "examples" / "consumers" / "aotinductor_cpp" / "aoti_run.cc"


class Loops(torch.nn.Module):
    def forward(self, x):
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(lambda step, _: step < 3, lambda step, value: (step + 1, value * 2), (torch.tensor(0), x))[1]


LOOPS = Entry("Loops", Loops, [x("batch", 3)], ["out"])


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The recipe and the program of an entry of the catalogue."""
    root = tmp_path_factory.mktemp("programs")

    def of(name):
        model = small.by_name(name)
        recipe = small.recipe_of(model)
        weights = small.checkpoint(root / name / "checkpoint", model)
        return recipe, small.captured(root / name / "program", recipe, weights)

    return of


@pytest.fixture
def built(tmp_path, captured):
    """A recipe, its engine, and the engine's row."""

    def of(backend, name, options=None, **changes):
        recipe, program = captured(name)
        target = row(backend, options or {}, **changes)
        folder = tmp_path / f"{backend}-{name}"
        engine = store.make(folder, Key("engine"), lambda out: build(program, target, "fp32", out)).stored
        return recipe, engine, target

    return of


def assert_is_the_program(recipe, program, engine, target):
    eager = row("eager", {})
    with backends.find("eager").load(program, eager) as reference, backends.loaded(engine, target) as run:
        for sizes in samples.combinations(recipe.axes):
            feeds = samples.feeds(recipe, sizes, seed=3)
            want, got = reference(feeds), run(feeds)
            for name, array in want.items():
                small.assert_near(array, got[name], f"{name} at {sizes}")


# --- TorchScript ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Lstm", "DerivedSizes", "MaskedAttention", "NonZero"])
def test_script_keeps_sizes(captured, built, name):
    """A trace would write the sizes of its example down; with a wrong size, an LSTM writes outside its memory."""
    recipe, engine, target = built("torchscript", name)

    assert_is_the_program(recipe, captured(name)[1], engine, target)


def test_script_keeps_both_sides_of_a_branch(built):
    _recipe, engine, target = built("torchscript", "Cond")
    high, low = (np.full((2, 3), value, np.float32) for value in (3, -3))

    with backends.loaded(engine, target) as run:
        np.testing.assert_array_equal(run({"x": high})["out"], high * 2)
        np.testing.assert_array_equal(run({"x": low})["out"], low - 1)


def test_script_says_which_operator_it_has_no_form_for(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.models.Loops", Loops, raising=False)
    recipe = small.recipe_of(LOOPS)
    program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", LOOPS))
    (tmp_path / "out").mkdir()

    with pytest.raises(BuildError, match=r"`while_loop` has no form in TorchScript.*test_torch_backends\.py:\d+"):
        build(program, row("torchscript", {}), "fp32", tmp_path / "out")


def test_script_has_no_path_of_this_machine(built):
    _, engine, _ = built("torchscript", "EncoderLayer")

    with zipfile.ZipFile(engine.file("model.torchscript")) as archive:
        assert not [name for name in archive.namelist() if b".py\x00" in archive.read(name) or "debug" in name]
        assert not [name for name in archive.namelist() if str(Path.cwd()).encode() in archive.read(name)]


# --- torch.compile -------------------------------------------------------------------------------------------------


def test_compiler_counts_graphs_breaks_and_recompilations(built):
    whole = built("torch_compile", "ConvBatchNorm")[1].artifact.facts
    broken = built("torch_compile", "NonZero")[1].artifact.facts

    assert (whole["graphs"], whole["graph_breaks"]) == (1, 0)
    assert whole["recompilations"] >= 1  # for batch 1, which torch takes for a constant
    assert "warnings" not in whole
    assert broken["graph_breaks"] >= 1
    # what a compiler ahead of time makes of the same program is one graph
    assert built("eager", "NonZero")[1].artifact.facts["graph_breaks"] == 0
    assert "into 2 graphs: Dynamic shape operator" in broken["warnings"][0]


def test_misspelt_mode_of_the_compiler_suggests_the_nearest(built):
    with pytest.raises(UsageError, match=r"(?s)`max-autotun`.*did you mean `max-autotune`"):
        built("torch_compile", "ConvBatchNorm", {"mode": "max-autotun"})


# --- AOTInductor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portable(tmp_path_factory, captured):
    """A package for any CPU with AVX2, and what it was made of."""
    recipe, program = captured("ConvBatchNorm")
    target = row("aotinductor", {}, arch="x86-64-v3")
    folder = tmp_path_factory.mktemp("portable") / "engine"
    if backends.find("aotinductor").missing(target) is not None or host.machine() != "x86_64":
        pytest.skip("for x86-64")
    engine = store.make(folder, Key("engine"), lambda out: build(program, target, "fp32", out)).stored
    return recipe, program, engine, target


def test_package_for_avx2_has_no_wider_vectors(portable, tmp_path):
    recipe, program, engine, target = portable
    assert engine.artifact.facts["isa"] == "AVX2"
    with zipfile.ZipFile(engine.file("model.pt2")) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".so")]
        (tmp_path / "model.so").write_bytes(package.read(name))
    assert b"mkldnn__convolution_pointwise" in (tmp_path / "model.so").read_bytes()  # frozen, for oneDNN
    code = subprocess.run(["objdump", "-d", tmp_path / "model.so"], capture_output=True, text=True, check=True).stdout

    assert "%ymm" in code
    assert "%zmm" not in code
    assert_is_the_program(recipe, program, engine, target)


def test_package_has_no_path_of_this_machine_and_no_address_of_this_process(portable):
    with zipfile.ZipFile(portable[2].file("model.pt2")) as package:
        content = b"".join(package.read(name) for name in package.namelist())

    for path in (Path.home(), Path.cwd(), Path(torch.__file__).parents[1]):
        assert str(path).encode() + b"/" not in content
    assert re.search(rb" at 0x[0-9a-f]{6,}", content) is None


def test_package_for_another_cpu_is_refused_in_words(portable, monkeypatch):
    _, _, engine, target = portable
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"sse2", "avx"}))

    told = r"CPU with avx2, bmi1, .*this one lacks[\s\S]*x86-64-v3"
    with pytest.raises(UnavailableError, match=told), backends.loaded(engine, target):
        pytest.fail("it was loaded")


def test_package_with_a_broken_library_is_refused(portable, tmp_path):
    _, _, engine, target = portable

    def spoil(out):
        content = bytearray(engine.file("model.pt2").read_bytes())
        content[len(content) // 2] ^= 1
        (out / "model.pt2").write_bytes(content)
        (out / "signature.json").write_bytes(engine.file("signature.json").read_bytes())
        return {}

    spoilt = store.make(tmp_path / "spoilt", Key("engine"), spoil).stored
    with (
        pytest.raises(BuildError, match=r"can't load the engine `.*model\.pt2`.*\.so"),
        backends.loaded(spoilt, target),
    ):
        pytest.fail("it was loaded")


@pytest.mark.parametrize(
    ("options", "changes", "match"),
    [
        ({}, {"arch": "x86-64-v5"}, r"(?s)unknown arch `x86-64-v5`.*did you mean `x86-64-v3`"),
        ({"freezing": "yes"}, {}, "freezing = 'yes'"),
        ({"max_autotune": 1}, {}, "max_autotune = 1"),
        ({"frezing": True}, {}, "(?s)unknown option `frezing`.*`freezing`"),
    ],
)
def test_package_options_are_checked(built, options, changes, match):
    with pytest.raises(UsageError, match=match):
        built("aotinductor", "ConvBatchNorm", options, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"machine": "aarch64"}, r"this host is .* \(AOTInductor compiles for the machine that builds\)"),
        ({"platform": "android"}, "it is for android"),
        ({"requires": ["warp_drive"]}, "this CPU lacks warp_drive"),
        ({"arch": "sm90"}, "CUDA|NVIDIA|compute capability"),
    ],
)
def test_package_for_other_hardware_is_refused(changes, match):
    backend, target = backends.find("aotinductor"), row("aotinductor", {}, **changes)

    assert re.search(match, backend.missing(target) or "nothing")


def test_package_for_every_cpu_needs_not_this_one():
    elsewhere = row("aotinductor", {}, arch="x86-64-v3", requires=["warp_drive"])

    assert backends.find("aotinductor").missing(elsewhere) is None
    assert "warp_drive" in backends.find("aotinductor").not_runnable(elsewhere)


@pytest.mark.slow
def test_package_runs_without_python(portable, tmp_path):
    recipe, _, engine, target = portable
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    program = tmp_path / "aoti_run"
    subprocess.run(["g++", "-std=c++20", "-O0", *includes, SOURCE, "-o", program, *links], check=True)
    feeds = samples.feeds(recipe, {"batch": 3}, seed=5)
    feeds["x"].tofile(tmp_path / "x.raw")

    def run(model, shape):
        words = [program, model, tmp_path, f"{tmp_path / 'x.raw'}:float32:{shape}"]
        env = {"LD_LIBRARY_PATH": str(libraries)}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)

    done = run(engine.file("model.pt2"), "3x3x8x8")
    assert done.returncode == 0, done.stderr
    with backends.loaded(engine, target) as here:
        want = here(feeds)["out"]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "output_0.raw", np.float32).reshape(want.shape), want)

    assert golden(program, libraries, portable, want, tmp_path / "right") == 0
    assert golden(program, libraries, portable, want + 1e-3, tmp_path / "wrong") == 1
    assert "has 2304 bytes, expected 768" in run(engine.file("model.pt2"), "1x3x8x8").stderr
    assert "aoti_run: Failed to initialize zip archive" in run("missing.pt2", "3x3x8x8").stderr
    better = tmp_path / "better.pt2"
    _with_metadata(engine.file("model.pt2"), better, "avx2 warp_drive")
    assert "this CPU lacks `warp_drive`" in run(better, "3x3x8x8").stderr


def golden(program, libraries, portable, want, folder):
    """How the program ends on a release with this engine, whose golden answer is `want`."""
    recipe, _, engine, _ = portable
    (folder / "engines/any").mkdir(parents=True)
    shutil.copy(engine.file("model.pt2"), folder / "engines/any")
    save_file({"min/in/x": samples.feeds(recipe, {"batch": 3}, seed=5)["x"], "min/out/out": want}, folder / "golden")
    made = {
        "scheme": "fp32",
        "target": {"backend": "aotinductor"},
        "files": [{"path": "engines/any/model.pt2"}],
        "golden": {"out": {"max_abs": 1e-6}},
    }
    manifest = {
        "recipe": "toy",
        "version": "1.0.0",
        "signature": {"inputs": [{"name": "x"}], "outputs": [{"name": "out"}]},
        "engines": {"any": made},
        "golden": {"file": {"path": "golden"}, "cases": {"min": {"batch": 3}}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    env = {"LD_LIBRARY_PATH": str(libraries)}
    return subprocess.run([program, folder, "any"], env=env, capture_output=True, check=False).returncode


def _with_metadata(path, other, features):
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(other, "w") as changed:
        for name in given.namelist():
            content = given.read(name)
            if name.endswith("_metadata.json"):
                content = json.dumps(json.loads(content) | {aotinductor.FEATURES: features}).encode()
            changed.writestr(name, content)

"""Whatever a user gets wrong: exit code, at most ten lines, the value at fault, a hint, and nothing lost."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline import cli, samples, store
from pipeline.errors import RecipeError, StoreError
from pipeline.workspace import Workspace
from tests import workspaces

FOLDER = Path("recipes/tiny")


@pytest.fixture
def root(tmp_path):
    return workspaces.tiny(tmp_path)


@pytest.fixture
def failing(root, capsys):
    """Runs a command that must fail; returns what it printed on stderr."""

    def run(code, *arguments):
        before = sorted(root.rglob("artifact.json"))
        found = cli.invoke([*arguments, "-C", str(root)])
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in out + err
        assert "a bug in exportyard" not in err
        talk = err[err.index("error:") :].strip().splitlines() if "error:" in err else err.strip().splitlines()
        assert len(talk) <= 10, err
        assert re.search(r"^hint: ", err, re.MULTILINE), err
        assert set(before) <= set(root.rglob("artifact.json"))
        for made in root.rglob("artifact.json"):
            store.load(made.parent)
        return err

    return run


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- names and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["export", "tinny"], "unknown recipe `tinny`", "did you mean `tiny`?"),
        (["export", "tiny", "--target", "any-onnxruntme"], "unknown target `any-onnxruntme`", "`any-onnxruntime`"),
        (["export", "tiny", "--tragets", "x"], "--tragets", "--target"),
        (["exprot", "tiny"], "exprot", "export"),
        (["export"], "RECIPE", "exportyard --help"),
        (["export", "tiny", "--jobs", "0"], "--jobs", "exportyard --help"),
        (["export", "tiny", "--checkpoint", "nowhere.pt"], "no checkpoint `nowhere.pt`", "--checkpoint"),
        (["make", "tiny", "progam"], "unknown step `progam`", "did you mean `program`?"),
    ],
)
def test_misspelt_names(failing, arguments, said, hint):
    code = 5 if "--checkpoint" in arguments else 2
    err = failing(code, *arguments)
    assert said in err
    assert hint in err


def test_a_misspelt_key_in_the_recipe(root, failing):
    edit(root / FOLDER / "recipe.toml", "[budget]", "[bugdet]")
    err = failing(4, "export", "tiny")
    assert "recipe.toml" in err
    assert "`bugdet`" in err or "`budget` is missing" in err


def test_a_misspelt_option_of_a_target(root, failing):
    edit(root / "targets/targets.toml", "optimization =", "optimisation =")
    err = failing(2, "export", "tiny")
    assert "unknown option `optimisation` in target `any-onnxruntime`" in err
    assert "did you mean `optimization`?" in err


def test_a_misspelt_backend(root, failing):
    edit(root / "targets/targets.toml", 'backend = "onnxruntime"', 'backend = "onnxruntine"')
    assert "did you mean `onnxruntime`?" in failing(2, "export", "tiny")


def test_toml_that_is_not(root, failing):
    (root / FOLDER / "recipe.toml").write_text("name = tiny\n")
    assert "line 1" in failing(3, "export", "tiny")


def test_no_workspace(tmp_path, capsys):
    assert cli.invoke(["export", "tiny", "-C", str(tmp_path)]) == 3
    assert "hint: `exportyard init DIR`" in capsys.readouterr().err


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint(root, failing):
    (root / FOLDER / "weights.safetensors").rename(root / FOLDER / "weigths.safetensors")
    err = failing(5, "export", "tiny")
    assert "no checkpoint" in err
    assert "weigths.safetensors" in err


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_a_truncated_checkpoint(root, failing, keep):
    path = root / FOLDER / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    err = failing(5, "export", "tiny")
    assert "safetensors" in err


def test_a_truncated_pt_checkpoint(root, failing):
    path = root / "weights.pt"
    torch.save({name: torch.from_numpy(value) for name, value in workspaces.weights().items()}, path)
    path.write_bytes(path.read_bytes()[:1500])
    failing(5, "export", "tiny", "--checkpoint", str(path))


def test_a_checkpoint_with_nan_in_it(root, failing):
    state = workspaces.weights()
    state["head.weight"].flat[0] = np.nan
    save_file(state, root / FOLDER / "weights.safetensors")
    err = failing(5, "export", "tiny")
    assert "has NaN among the numbers of `head.weight`" in err
    assert "recipes/tiny/weights.safetensors" in err


def test_a_checkpoint_that_is_refused_takes_no_other_ones_place(root, failing):
    assert cli.invoke(["make", "tiny", "program", "-C", str(root)]) == 0
    before = store.load(root / "artifacts/tiny/checkpoint").digest
    (root / "half.pt").write_bytes(b"PK\x03\x04 half of a file")
    assert "half.pt` is truncated" in failing(5, "export", "tiny", "--checkpoint", str(root / "half.pt"))
    assert store.load(root / "artifacts/tiny/checkpoint").digest == before


def test_a_checkpoint_of_another_model(root, failing):
    state = workspaces.weights()
    state["head.wieght"] = state.pop("head.weight")
    save_file(state, root / FOLDER / "weights.safetensors")
    err = failing(5, "export", "tiny")
    assert "head.weight" in err
    assert "head.wieght" in err


def test_a_checkpoint_of_another_size(root, failing):
    save_file(workspaces.weights() | {"head.bias": np.zeros(7, np.float32)}, root / FOLDER / "weights.safetensors")
    err = failing(5, "export", "tiny")
    assert "head.bias" in err
    assert "7" in err


class Evil:
    def __reduce__(self):
        return (print, ("code in a pickle was run",))


def test_a_pickle_with_code_is_refused_and_not_run(root, failing, capsys):
    torch.save({"head.bias": Evil()}, root / "evil.pt")
    err = failing(5, "export", "tiny", "--checkpoint", str(root / "evil.pt"))
    assert "print" in err
    assert "code in a pickle was run" not in capsys.readouterr().out


# --- the recipe's code ----------------------------------------------------------------------------------------------


def model(root, body):
    (root / FOLDER / "model.py").write_text(dedent(workspaces.MODEL) + dedent(body))


def test_a_factory_that_raises(root, failing):
    model(root, "def build():\n    return {}['width']\n")
    err = failing(4, "export", "tiny")
    assert "KeyError" in err
    assert "model.py:" in err


def test_a_factory_that_is_not_there(root, failing):
    edit(root / FOLDER / "recipe.toml", "model:build", "model:built")
    assert "did you mean `build`?" in failing(4, "export", "tiny")


def test_a_module_with_a_syntax_error(root, failing):
    (root / FOLDER / "model.py").write_text("def build(:\n")
    err = failing(4, "export", "tiny")
    assert "model.py:1" in err


def test_a_factory_that_returns_no_module(root, failing):
    model(root, "def build():\n    return 3\n")
    assert "int" in failing(4, "export", "tiny")


def test_a_data_dependent_branch(root, failing):
    model(
        root,
        """
        class Branch(Tiny):
            def forward(self, images):
                if images.sum() > 0:
                    return super().forward(images)
                return super().forward(-images)

        def build():
            return Branch()
        """,
    )
    err = failing(7, "export", "tiny")
    assert "if images.sum() > 0" in err
    assert re.search(r"model\.py:\d+", err)


def test_an_axis_that_the_model_specialises(root, failing):
    model(
        root,
        """
        class Fixed(Tiny):
            def forward(self, images):
                return self.head(torch.relu(self.conv(images)).reshape(3, -1))

        def build():
            return Fixed()
        """,
    )
    err = failing(7, "export", "tiny")
    assert "batch" in err


def test_an_input_of_another_shape(root, failing):
    edit(root / FOLDER / "recipe.toml", '["batch", 1, 8, 8]', '["batch", 3, 8, 8]')
    np.savez(root / FOLDER / "calibration.npz", images=np.random.default_rng(0).random((8, 3, 8, 8), dtype=np.float32))
    np.savez(root / FOLDER / "evaluation.npz", images=np.random.default_rng(0).random((8, 3, 8, 8), dtype=np.float32))
    err = failing(7, "export", "tiny")
    assert "model.py" in err


def test_more_outputs_than_named(root, failing):
    model(
        root,
        """
        class Two(Tiny):
            def forward(self, images):
                logits = super().forward(images)
                return logits, logits.softmax(-1)

        def build():
            return Two()
        """,
    )
    assert "2" in failing(7, "export", "tiny")


def test_an_operator_that_onnx_does_not_have(root, failing):
    model(
        root,
        """
        class Odd(Tiny):
            def forward(self, images):
                return super().forward(images) + torch.special.zeta(images.mean() + 2, torch.tensor(2.0))

        def build():
            return Odd()
        """,
    )
    err = failing(8, "export", "tiny")
    assert "zeta" in err
    assert "model.py" in err


def test_a_metric_that_raises(root, failing):
    (root / FOLDER / "score.py").write_text("def score(outputs, labels):\n    return outputs[0]['logit']\n")
    edit(root / FOLDER / "recipe.toml", '"agreement"', '"score:score"')
    err = failing(4, "export", "tiny")
    assert "KeyError" in err
    assert "score.py:2" in err


# --- data -----------------------------------------------------------------------------------------------------------

DATA = {
    "missing": (None, "no file"),
    "empty": ({"images": np.zeros((0, 1, 8, 8), np.float32)}, "no sample"),
    "of a wrong rank": ({"images": np.zeros((4, 8), np.float32)}, "rank"),
    "of a wrong size": ({"images": np.ones((4, 1, 8, 9), np.float32)}, "[2, 1, 8, 9]"),
    "of a wrong dtype": ({"images": np.ones((4, 1, 8, 8))}, "float64"),
    "of a wrong name": ({"pictures": np.ones((4, 1, 8, 8), np.float32)}, "pictures"),
    "NaN": ({"images": np.full((4, 1, 8, 8), np.nan, np.float32)}, "NaN"),
    "constant": ({"images": np.full((4, 1, 8, 8), 0.5, np.float32)}, "0.5 everywhere"),
}


@pytest.mark.parametrize("case", DATA)
def test_calibration_data_that_is(root, failing, case):
    arrays, said = DATA[case]
    (root / FOLDER / "calibration.npz").unlink()
    if arrays is not None:
        np.savez(root / FOLDER / "calibration.npz", **arrays)
    err = failing(6, "export", "tiny")
    assert "[calibration]" in err
    assert said in err


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_truncated_calibration_data(root, failing, keep):
    path = root / FOLDER / "calibration.npz"
    path.write_bytes(path.read_bytes()[:keep])
    assert "calibration.npz" in failing(6, "export", "tiny")


def test_data_code_that_raises_half_way(root, failing):
    (root / FOLDER / "data.py").write_text(
        "import numpy as np\n\ndef some():\n    yield {'images': np.ones((2, 1, 8, 8), np.float32)}\n    1 / 0\n"
    )
    edit(root / FOLDER / "recipe.toml", '"calibration.npz"', '"data:some"')
    err = failing(4, "export", "tiny")
    assert "ZeroDivisionError" in err
    assert "data.py:5" in err


# --- what no recipe can mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max = 4", "max = 99999999999", "axes.batch.max"),
        ('["batch", 1, 8, 8]', '["batch", -1, 8, 8]', "-1 is no size"),
        ("[0.0, 1.0]", "[1.0, 0.0]", "range [1, 0]"),
        ("[0.0, 1.0]", "[nan, nan]", "range [nan, nan]"),
        ("[0.0, 1.0]", "[-inf, inf]", "range [-inf, inf]"),
        ("[0.0, 1.0]", "[0.0, 1e300]", "within float32"),
        ("drop = 0.05", "drop = inf", "budget.drop"),
        ("drop = 0.05", "drop = 0.05\nvs_eager = { max_abs = inf }", "must be finite"),
        ("drop = 0.05", "drop = 0.05\nvs_eager = { sqnr_db = nan }", "bounds nothing"),
        ('"calibration.npz"', '"calibration.npz"\nsamples = 9223372036854775808', "calibration.samples"),
        ("[axes]", "targets = []\n[axes]", "`targets`"),
        ("[axes]", 'folder = "/"\n[axes]', "unknown key `folder`"),
        ("model:build", ":", "is not `module:name`"),
        ("model:build", "...:build", "is not `module:name`"),
        ("model:build", "model.build", "is not `module:name`"),
    ],
)
def test_a_value_that_means_nothing(root, failing, old, new, said):
    edit(root / FOLDER / "recipe.toml", old, new)
    assert said in failing(4, "recipes")


def test_inputs_that_no_memory_can_hold(root):
    edit(root / FOLDER / "recipe.toml", "max = 4", "max = 2147483647")
    edit(root / FOLDER / "recipe.toml", '["batch", 1, 8, 8]', '["batch", 1, 80000, 80000]')
    with pytest.raises(RecipeError, match="don't fit into memory"):
        samples.feeds(Workspace(root).recipe("tiny"), {"batch": 2147483647}, 0)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "\ufeffname = 1"])
def test_a_recipe_that_no_parser_reads(root, failing, text):
    (root / FOLDER / "recipe.toml").write_text(text)
    assert "recipe.toml" in failing(3, "export", "tiny")


def test_a_recipe_that_is_a_pipe(root, failing):
    (root / FOLDER / "recipe.toml").unlink()
    os.mkfifo(root / FOLDER / "recipe.toml")
    assert "is not a file" in failing(3, "export", "tiny")


@pytest.mark.parametrize("name", ["loop.pt", "a" * 300 + ".pt"])
def test_a_checkpoint_that_no_file_can_be(root, failing, name):
    if name == "loop.pt":
        (root / name).symlink_to(root / name)
    assert "there is no checkpoint" in failing(5, "export", "tiny", "--checkpoint", str(root / name))


@pytest.mark.parametrize("name", ["loop", "a" * 300])
def test_a_workspace_that_no_folder_can_be(tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert cli.invoke(["export", "tiny", "-C", str(tmp_path / name)]) == 3
    assert "is not a folder" in capsys.readouterr().err


ODD = {
    "a sparse": torch.Tensor.to_sparse,
    "an empty (meta)": lambda value: value.to("meta"),
    "complex numbers": lambda value: value.to(torch.complex64),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_of_odd_tensors(root, failing, kind):
    state = {name: torch.from_numpy(value) for name, value in workspaces.weights().items()}
    torch.save(state | {"head.weight": ODD[kind](state["head.weight"])}, root / "odd.pt")
    err = failing(5, "export", "tiny", "--checkpoint", str(root / "odd.pt"))
    assert kind in err
    assert "head.weight" in err


# --- code that does what it should not ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["import sys\nsys.exit(0)", "import sys\n\ndef build():\n    sys.exit(0)\n"])
def test_code_that_ends_the_program(root, failing, where):
    model(root, where)
    err = failing(4, "export", "tiny")
    assert "SystemExit" in err
    assert "model.py" in err


def test_data_that_ends_the_program(root, failing):
    (root / FOLDER / "data.py").write_text("import sys\n\ndef some():\n    sys.exit(0)\n    yield {}\n")
    edit(root / FOLDER / "recipe.toml", '"calibration.npz"', '"data:some"')
    assert "SystemExit" in failing(4, "export", "tiny")


def test_a_forward_that_ends_the_program(root, failing):
    model(
        root,
        """
        import sys

        class Leaves(Tiny):
            def forward(self, images):
                sys.exit(0)

        def build():
            return Leaves()
        """,
    )
    assert "SystemExit" in failing(7, "export", "tiny")


@pytest.mark.parametrize(
    "body",
    [
        "def eval(self):\n        raise RuntimeError('mine')",
        "def state_dict(self, *args, **kwargs):\n        raise RuntimeError('mine')",
    ],
)
def test_a_model_whose_own_methods_fail(root, failing, body):
    model(root, f"class Odd(Tiny):\n    {body}\n\ndef build():\n    return Odd()\n")
    assert "mine" in failing(4, "export", "tiny")


def test_an_exception_that_can_not_be_told(root, failing):
    code = "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n\n"
    model(root, code + "def build():\n    raise Mute\n")
    assert "Mute" in failing(4, "export", "tiny")


def test_a_message_without_end(root, failing):
    model(root, "def build():\n    raise ValueError('x' * 50_000)\n")
    assert len(failing(4, "export", "tiny")) < 2000


@pytest.mark.parametrize("value", ["1j", "None", "'good'", "10**400", "float('nan')"])
def test_a_metric_that_is_no_number(root, failing, value):
    (root / FOLDER / "score.py").write_text(f"def score(outputs, labels):\n    return {value}\n")
    edit(root / FOLDER / "recipe.toml", '"agreement"', '"score:score"')
    assert "metric `score:score`" in failing(4, "export", "tiny", "--target", "any-echo")


LABELLED = {
    "nothing": "return None",
    "ragged lists": "yield {'images': [[1, 2], [3]]}",
    "words": "yield {'images': np.ones((2, 1, 8, 8), np.float32), 'labels': np.array(['a', 'b'])}",
}


@pytest.mark.parametrize("case", LABELLED)
def test_data_code_that_yields(root, failing, case):
    (root / FOLDER / "data.py").write_text(f"import numpy as np\n\ndef some():\n    {LABELLED[case]}\n")
    edit(root / FOLDER / "recipe.toml", '"evaluation.npz"', '"data:some"')
    assert "[evaluation]" in failing(6, "export", "tiny")


@pytest.mark.parametrize("labels", [np.int64(3), np.arange(3), np.array(["a"] * 16)])
def test_labels_that_do_not_fit_the_samples(root, failing, labels):
    np.savez(root / FOLDER / "evaluation.npz", images=workspaces.images(16, 2), labels=labels)
    assert "`labels`" in failing(6, "export", "tiny")


@pytest.mark.parametrize("name", ["a\\u0000b.npz", "a" * 300 + ".npz", "pipe.npz"])
def test_data_that_no_file_can_be(root, failing, name):
    os.mkfifo(root / FOLDER / "pipe.npz")
    edit(root / FOLDER / "recipe.toml", "calibration.npz", name)
    assert "there is no file" in failing(6, "export", "tiny")


def test_evaluation_data_that_the_model_fails_on(root, failing):
    model(
        root,
        """
        class Lookup(Tiny):
            def forward(self, images):
                rows = torch.arange(0, 4, dtype=images.dtype).reshape(4, 1)
                return super().forward(images) + rows[images.mean((1, 2, 3)).to(torch.int64)]

        def build():
            return Lookup()
        """,
    )
    np.savez(root / FOLDER / "evaluation.npz", images=workspaces.images(8, 2) + 50)
    err = failing(6, "export", "tiny", "--target", "any-echo")
    assert "[evaluation] sample 0" in err
    assert "IndexError" in err


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk on a folder; returns what changes its options (``ro``, ``size=...``)."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)

    done = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    if done.returncode != 0:
        pytest.skip(f"a disk of a few MB can't be mounted here: {done.stderr.strip()}")
    yield place, lambda option: mount("-o", f"remount,{option}")
    subprocess.run(["umount", str(place)], check=True)


STAGES = ["checkpoint", "data", "program", "onnx/fp32", "engine/any-onnxruntime/fp32", "latency/any-onnxruntime"]


def test_a_full_disk_at_each_stage(tmp_path, disk, capfd):
    place, _ = disk
    export = ["export", "tiny", "--target", "any-onnxruntime", "-C", str(place)]
    workspaces.tiny(place, rows=workspaces.ROWS.replace('"int8-u8u8", ', ""))
    assert cli.invoke(export) == 0
    shutil.copytree(place / "artifacts", tmp_path / "whole")
    for stage in STAGES:
        shutil.rmtree(place / "artifacts/tiny" / stage)
        shutil.rmtree(place / "artifacts/tiny/report")
        before = set(place.rglob("artifact.json"))
        with (place / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        capfd.readouterr()
        assert cli.invoke(export) == StoreError.exit_code, stage
        err = capfd.readouterr().err
        assert "no space left on the disk that holds" in err, stage
        assert "hint: " in err
        assert len(err.splitlines()) <= 10, err
        assert set(place.rglob("artifact.json")) == before, stage
        assert not list(place.rglob("*.tmp"))
        (place / "ballast").unlink()
        shutil.rmtree(place / "artifacts")
        shutil.copytree(tmp_path / "whole", place / "artifacts")


def test_a_read_only_disk(disk, capsys):
    place, remount = disk
    workspaces.tiny(place)
    assert remount("ro").returncode == 0
    assert cli.invoke(["export", "tiny", "-C", str(place)]) == StoreError.exit_code
    err = capsys.readouterr().err
    assert "Read-only file system" in err
    assert "hint: make it writable" in err
    assert cli.invoke(["status", "tiny", "-C", str(place)]) == 0

"""Whatever a user gets wrong: exit code, at most ten lines, the value at fault, a hint, and nothing lost."""

import re
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline import cli, store
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
        found = cli._run([*arguments, "-C", str(root)])
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
    assert cli._run(["export", "tiny", "-C", str(tmp_path)]) == 3
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

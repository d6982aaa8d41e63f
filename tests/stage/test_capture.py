"""Capture: what it reads, what it refuses and in which words, what it writes."""

import io
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from pipeline import program as programs
from pipeline import ranges
from pipeline.errors import CaptureError, CheckpointError, ExportyardError, RecipeError
from pipeline.types import Axis
from tests import small

ENTRY = small.by_name("SharedWeights")
LINEAR = small.by_name("NamesCollide")


@pytest.fixture
def capture(tmp_path):
    """Captures `entry` from a checkpoint file with this content; returns the program artifact."""

    def run(entry, state, name="model.pt", **changes):
        weights = small.stored_file(tmp_path / "checkpoint", state, name)
        return small.captured(tmp_path / "program", small.recipe_of(entry, **changes), weights)

    return run


def state_of(entry):
    return small.seeded(entry).state_dict()


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class RunsCode:
    def __reduce__(self):
        return (print, ("this must never be seen",))


class WholeModel(nn.Linear):
    pass


# checkpoints


def test_safetensors_and_pickles_give_the_same_program(tmp_path, capture):
    from_pickle = capture(LINEAR, state_of(LINEAR))
    weights = small.stored_file(tmp_path / "other", safetensors_bytes(state_of(LINEAR)), "model.safetensors")
    again = small.captured(tmp_path / "again", small.recipe_of(LINEAR), weights)
    assert again.digest == from_pickle.digest
    assert again.artifact.facts["source"] == "safetensors"


def test_a_shared_weight_may_be_saved_once(capture):
    state = state_of(ENTRY)
    del state["head.weight"]
    assert capture(ENTRY, state).artifact.facts["parameters"] == 60


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_wrapped_state_dict_is_found_and_said(capture, key):
    assert capture(LINEAR, {key: state_of(LINEAR), "epoch": 3}).artifact.facts["unwrapped"] == key


def test_a_half_precision_checkpoint_is_widened_and_said(capture):
    state = {name: value.half() for name, value in state_of(LINEAR).items()}
    assert capture(LINEAR, state).artifact.facts["cast_from"] == ["float16"]


def without(name):
    state = state_of(LINEAR)
    return {key: value for key, value in state.items() if key != name}


BAD = {
    "empty": (lambda: b"", "is empty"),
    "truncated": (lambda: saved(state_of(LINEAR))[:600], "truncated, or not a file that torch.save wrote"),
    "text": (lambda: b"hello world", "truncated, or not a file that torch.save wrote"),
    "zeros": (lambda: bytes(500), "truncated, or not a file that torch.save wrote"),
    "code": (lambda: saved({"a": RunsCode()}), r"pickle that wants to run `(builtins\.)?print`; refused"),
    "plain pickle with code": (lambda: pickle.dumps({"a": RunsCode()}), r"wants to run `builtins\.print`; refused"),
    "whole model": (lambda: saved(WholeModel(2, 2)), r"wants to run `[\w.]*WholeModel`; refused"),
    "list": (lambda: [torch.zeros(1)], "holds a list, expected a dict of tensors"),
    "numbers": (lambda: {"one.weight": 3}, "has a int at `one.weight`"),
    "missing": (lambda: without("one.bias"), r"missing \(1\): `one.bias`"),
    "unexpected": (lambda: state_of(LINEAR) | {"three.bias": torch.zeros(1)}, r"unexpected \(1\): `three.bias`"),
    "shape": (
        lambda: state_of(LINEAR) | {"one.bias": torch.zeros(9)},
        r"another shape \(1\): one.bias \[9\], expected \[4\]",
    ),
    "wrapper": (
        lambda: {f"module.{name}": value for name, value in state_of(LINEAR).items()},
        r"missing \(4\): `one.weight`, `one.bias`, `two.weight` and 1 more[\s\S]*hint: the names begin with `module.`",
    ),
    "misspelt": (
        lambda: without("one.bias") | {"one.bais": torch.zeros(4)},
        r"hint: is `one.bais` what the factory calls `one.bias`\?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused(case, capture, capsys):
    state, match = BAD[case]
    with pytest.raises(CheckpointError) as raised:
        capture(LINEAR, state())
    assert_clear(raised.value, match)
    assert "never be seen" not in capsys.readouterr().out


def assert_clear(error: ExportyardError, match: str) -> None:
    """The message says `match`, has a hint, and is at most ten lines long."""
    assert error.hint
    assert len(str(error).splitlines()) <= 10
    with pytest.raises(type(error), match=match):
        raise error


def test_a_truncated_safetensors_file_is_refused(capture):
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        capture(LINEAR, safetensors_bytes(state_of(LINEAR))[:-5], "model.safetensors")


# factories


def test_weights_need_a_factory(capture):
    with pytest.raises(RecipeError, match="no `factory`"):
        capture(LINEAR, state_of(LINEAR), factory=None)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("factories:raises", r"raised: ValueError: no such size[\s\S]*factories\.py:\d+: raise ValueError"),
        ("factories:number", r"returned a int"),
        ("factories:absent", r"`factories`.*`absent`|no .*absent"),
        ("nowhere:make", r"can't import `nowhere`"),
    ],
)
def test_a_wrong_factory_is_named(source, match, capture, tmp_path):
    (tmp_path / "factories.py").write_text(
        "def raises():\n    raise ValueError('no such size')\n\nnumber = lambda: 3\n"
    )
    with pytest.raises(RecipeError) as raised:
        capture(LINEAR, state_of(LINEAR), factory=source, folder=tmp_path, root=tmp_path)
    assert_clear(raised.value, match)


# saved programs


def exported(high: int = 19) -> bytes:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=high)
    program = torch.export.export(small.seeded(LINEAR), (torch.zeros(4, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(program, buffer)
    return buffer.getvalue()


def test_a_saved_program_needs_no_factory(capture):
    program = capture(LINEAR, exported(), "model.pt2", factory=None)
    assert program.artifact.facts["source"] == "pt2"
    assert [list(one.shape) for one in program.signature().outputs] == [["batch", 3], ["batch", 4], ["batch", 4]]
    rows = torch.randn(7, 3)
    found = programs.runnable(programs.load(program.file(programs.FILE)))(rows)
    for one, two in zip(small.seeded(LINEAR)(rows), found, strict=True):
        torch.testing.assert_close(one, two)


def test_a_saved_program_must_serve_the_ranges(capture):
    with pytest.raises(CaptureError, match=r"axis `batch` works only at sizes 1 to 8, the recipe asks 1 to 19"):
        capture(LINEAR, exported(high=8), "model.pt2", factory=None)


def test_a_saved_program_must_have_the_inputs(capture):
    inputs = [{"name": name, "dtype": "float32", "shape": ["batch", 3]} for name in ("one", "two")]
    with pytest.raises(CheckpointError, match=r"takes 1 inputs \(float32.*the recipe describes 2"):
        capture(LINEAR, exported(), "model.pt2", factory=None, inputs=inputs)


def test_a_saved_program_must_have_the_dtypes(capture):
    inputs = [{"name": "ids", "dtype": "int64", "shape": ["batch", 3]}]
    with pytest.raises(CheckpointError, match=r"takes float32 of rank 2 where the recipe's input `ids` is int64"):
        capture(LINEAR, exported(), "model.pt2", factory=None, inputs=inputs)


def test_a_damaged_program_is_refused(capture):
    with pytest.raises(CheckpointError, match="truncated, or not a program"):
        capture(LINEAR, exported()[:3000], "model.pt2", factory=None)


# what is captured


def test_a_wrong_input_shape_shows_the_users_line(capture):
    inputs = [{"name": "rows", "dtype": "float32", "shape": ["batch", 5]}]
    with pytest.raises(CaptureError, match=r"fails at batch = 1: RuntimeError: mat1[\s\S]*models\.py:\d+: relu = "):
        capture(LINEAR, state_of(LINEAR), inputs=inputs)


def test_an_axis_of_one_size_is_static(capture):
    one = {"batch": {"min": 4, "opt": 4, "max": 4}}
    program = capture(small.by_name("SpecializedAxis"), {}, axes=one)
    assert program.signature().inputs[0].shape == (4, 3)


@pytest.mark.slow
def test_the_program_is_the_same_on_every_machine(tmp_path, capture):
    program = capture(ENTRY, state_of(ENTRY))
    script = (
        "import sys; from pathlib import Path; from tests import small\n"
        "entry = small.by_name('SharedWeights'); folder = Path(sys.argv[1])\n"
        "weights = small.checkpoint(folder / 'checkpoint', entry)\n"
        "print(small.captured(folder / 'program', small.recipe_of(entry), weights).digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "other")],
        env={"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == program.digest
    data = program.file(programs.FILE).read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


def test_nothing_is_printed(capture, capfd):
    capture(ENTRY, state_of(ENTRY))
    with pytest.raises(CaptureError, match="can't follow"):
        capture(small.by_name("BranchOnData"), {})
    assert capfd.readouterr() == ("", "")


# sizes


def recipe_with(**axes):
    return SimpleNamespace(axes={name: Axis(min=low, opt=opt, max=high) for name, (low, opt, high) in axes.items()})


def test_traced_sizes_are_in_range_at_least_two_and_different():
    recipe = recipe_with(batch=(1, 1, 8), seq=(1, 2, 2), width=(2, 2, 9), one=(1, 1, 1))
    found = ranges.trace_sizes(recipe)
    assert found == {"batch": 2, "seq": 2, "width": 3, "one": 1}
    assert ranges.trace_sizes(recipe_with(a=(1, 4, 9), b=(1, 4, 9), c=(1, 4, 4))) == {"a": 4, "b": 5, "c": 3}


def test_checked_sizes_are_not_the_traced_ones():
    recipe = recipe_with(batch=(1, 2, 8), seq=(4, 4, 4))
    assert ranges.check_sizes(recipe, {"batch": 2, "seq": 4}) == [{"batch": 1, "seq": 4}, {"batch": 3, "seq": 4}]

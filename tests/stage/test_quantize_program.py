"""Programs in INT8 forms: what PT2E makes of them, for backends that read programs."""

import numpy as np
import pytest
import torch

from pipeline import backends, program, quantizers, release, retrace, run
from pipeline.errors import UsageError
from pipeline.types import Axis, Signature, Target, TensorSpec
from pipeline.workspace import Workspace
from tests import extras, workspaces

extras.need("torchao", "pt2e")

# sums with large numbers: fine in float, and nothing is left of the rest when they share a scale with it
SHIFT = 'self.register_buffer("shift", torch.full((1, 4), 1000.0), persistent=False)'
FRAGILE = (
    workspaces.MODEL.replace("            self.head =", f"            {SHIFT}\n            self.head =")
    .replace("return self.head(", "return -self.shift + (self.shift + self.head(")
    .replace("flatten(1))", "flatten(1)))")
)
PLAIN = """
    import torch
    from safetensors.torch import save_file
    from torch import nn

    class Tiny(nn.Module):
        def forward(self, images):
            return images.sum((1, 2)).sigmoid()

    def build():
        return Tiny()

    def train(path):
        save_file({}, path)
"""


def job(root, **changes):
    return run.prepare(Workspace(workspaces.tiny(root, **changes)), "tiny", targets=["any-onnxruntime"])


def answers(made, images):
    with torch.inference_mode():
        (found,) = program.runnable(program.load(made.stored.file("program.pt2")))(torch.from_numpy(images))
    return found.numpy()


@pytest.mark.parametrize(
    ("quantizer", "scheme"), [("inductor", "int8-u8s8"), ("inductor", "int8-dynamic"), ("litert", "int8-s8s8")]
)
def test_quantised_program_is_still_the_model_at_every_size(tmp_path, quantizer, scheme):
    work = job(tmp_path)
    made = work.quantized_program(scheme, quantizer)

    assert made.stored.signature() == work.program().stored.signature()
    assert "aten.linear.default" in made.stored.artifact.facts["quantized"]
    for batch in (1, 2, 4):
        images = workspaces.images(batch, seed=batch)
        want, found = answers(work.program(), images), answers(made, images)
        noise = np.abs(want - found).max() / np.abs(want).max()
        assert 0 < noise < 0.05


def test_equal_inputs_make_equal_programs(tmp_path):
    first, second = (job(tmp_path / name).quantized_program("int8-u8s8", "inductor") for name in ("one", "two"))

    assert first.stored.artifact.files == second.stored.artifact.files


@pytest.mark.parametrize(("model", "reach"), [(workspaces.MODEL, "everything"), (FRAGILE, "products")])
def test_a_form_reaches_as_far_as_the_budget_lets_it(tmp_path, model, reach):
    made = job(tmp_path, model=model).quantized_program("int8-s8s8", "litert")

    assert made.stored.artifact.facts.get("reach") == reach, made.stored.artifact.facts


def test_model_without_products_has_no_int8_form(tmp_path):
    recipe = workspaces.RECIPE.replace('checkpoint = "weights.safetensors"', 'train = "model:train"')

    made = job(tmp_path, model=PLAIN, recipe=recipe).quantized_program("int8-u8s8", "inductor")

    assert "finds no operator that it takes" in made.stored.artifact.facts["reason"]


def test_dvc_makes_the_same_program(tmp_path):
    work = job(tmp_path)
    made = work.quantized_program("int8-dynamic", "inductor")
    work.engine(work.targets[0], "fp32")

    (step,) = (one for one in release.steps(work, []) if one.cmd.endswith("programs/int8-dynamic-inductor"))

    assert step.outs == ("artifacts/tiny/programs/int8-dynamic-inductor",)
    assert {"artifacts/tiny/program", "artifacts/tiny/data"} <= set(step.deps)
    assert run.make_step(work, step.cmd.split()[-1]) == made.stored.path


def test_quantizers_are_known_by_name_and_scheme():
    with pytest.raises(UsageError, match=r"(?s)unknown quantizer `xnpack`.*`xnnpack`"):
        quantizers.make("xnpack", "int8-s8s8", "products")
    with pytest.raises(UsageError, match=r"(?s)`litert` has no `int8-dynamic`.*`int8-s8s8`"):
        quantizers.make("litert", "int8-dynamic", "products")


def test_backend_without_quantizer_refuses_int8_programs():
    row = Target.model_validate(
        {
            "name": "here",
            "backend": "eager",
            "platform": "any",
            "machine": "any",
            "arch": "none",
            "schemes": ["int8-u8s8"],
            "vs_onnx": {"int8-u8s8": {"sqnr_db": 12}},
        }
    )
    with pytest.raises(UsageError, match="`eager` reads programs, which it can't have in `int8-u8s8`"):
        backends.quantizer(row, "int8-u8s8")


def test_retraced_program_keeps_its_axes():
    class Rows(torch.nn.Module):
        def forward(self, x):
            return (x.softmax(-1) * x.shape[0],)

    spec = TensorSpec(name="x", dtype="float32", shape=("rows", 3))
    signature = Signature(inputs=(spec,), outputs=(spec,), axes={"rows": Axis(min=1, opt=4, max=9)})

    made = retrace.retraced(Rows(), signature, {"rows": 9})

    for rows in (1, 2, 9):
        (found,) = program.runnable(made)(torch.ones(rows, 3))
        np.testing.assert_allclose(found.numpy(), np.full((rows, 3), rows / 3), rtol=1e-6)

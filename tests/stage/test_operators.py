"""A recipe with an operator of its own: where it is translated, where it is called, and who says that it can't be."""

import subprocess
import sys
from textwrap import dedent

import pytest

from pipeline import backends, cli, host, run
from pipeline.errors import NotApplicable
from pipeline.workspace import Workspace
from tests import workspaces

MODEL = """
    import torch
    from torch import Tensor, nn

    @torch.library.custom_op("NAME::swish", mutates_args=())
    def swish(x: Tensor, beta: float) -> Tensor:
        return x * torch.sigmoid(beta * x)

    @swish.register_fake
    def _(x, beta):
        return torch.empty_like(x)

    class Gate(nn.Module):
        def forward(self, x):
            return swish(x, 1.5)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.gate = Gate()
            self.head = nn.Linear(4 * 8 * 8, 4)

        def forward(self, images):
            return self.head(self.gate(self.conv(images)).flatten(1))

    def build():
        return Tiny()

    def translations():
        from onnxscript import opset20 as op

        def swish(x, beta: float):
            return op.Mul(x, op.Sigmoid(op.Mul(x, op.CastLike(op.Constant(value_float=beta), x))))

        return {"NAME::swish": swish}
"""
TRITON = MODEL.replace(
    """
    @torch.library.custom_op("NAME::swish", mutates_args=())
    def swish(x: Tensor, beta: float) -> Tensor:
        return x * torch.sigmoid(beta * x)
""",
    """
    @torch.library.triton_op("NAME::swish", mutates_args=())
    def swish(x: Tensor, beta: float) -> Tensor:
        raise RuntimeError("a GPU's kernel would be launched here, by torch.library.wrap_triton")

    @swish.register_kernel("cpu")
    def _(x, beta):
        return x * torch.sigmoid(beta * x)
""",
)
ONNX = {"here-onnxruntime": {}, "here-tvm": {}, "here-echo": {"reference": "true"}}
PROGRAMS = {"here-eager": {}, "here-torchscript": {}, "here-aotinductor": {}}


def rows(names):
    text = []
    for name, options in names.items():
        listed = ", ".join(f"{key} = {value}" for key, value in options.items())
        text.append(f"""
            [targets.{name}]
            backend = "{name.removeprefix("here-")}"
            platform = "{host.system()}"
            machine = "{host.machine()}"
            arch = "native"
            schemes = ["fp32"]
            options = {{ {listed} }}
            vs_onnx = {{ fp32 = {{ sqnr_db = 80 }} }}
        """)
    return "".join(dedent(one) for one in text)


def workspace(root, name, names, *, translated, model=MODEL):
    """A workspace whose model calls ``<name>::swish``."""
    names = {one: options for one, options in names.items() if one.removeprefix("here-") in backends.names()}
    key = '\nfactory = "model:build"\ntranslations = "model:translations"'
    recipe = dedent(workspaces.RECIPE)
    if translated:
        recipe = recipe.replace('\nfactory = "model:build"', key)
    return workspaces.tiny(root, rows=rows(names), recipe=recipe, model=model.replace("NAME", name))


def export(root, **options):
    job = run.prepare(Workspace(root), "tiny", **options)
    return job, {verdict.target.name: verdict for verdict in run.export(job)}


@pytest.mark.slow
def test_translated_operator_goes_through_every_backend(tmp_path):
    _, verdicts = export(workspace(tmp_path, "everywhere", ONNX | PROGRAMS, translated=True))

    assert list(verdicts) == [*ONNX, *PROGRAMS]
    assert {name: one.reason for name, one in verdicts.items() if one.status != "passed"} == {}


def test_triton_operator_with_a_kernel_for_the_cpu(tmp_path):
    assert "triton_op" in TRITON
    names = {"here-onnxruntime": {}, "here-eager": {}, "here-torchscript": {}}
    _, verdicts = export(workspace(tmp_path, "launched", names, translated=True, model=TRITON))

    assert {name: one.reason for name, one in verdicts.items() if one.status != "passed"} == {}


@pytest.fixture(scope="module")
def untranslated(tmp_path_factory):
    """A workspace, exported, whose operator has no ONNX form; its job and verdicts."""
    names = {"here-onnxruntime": {}, "here-tvm": {}, "here-eager": {}, "here-torchscript": {}, "here-stablehlo": {}}
    root = workspace(tmp_path_factory.mktemp("untranslated"), "nowhere", names, translated=False)
    return root, *export(root)


@pytest.mark.parametrize("name", ["here-onnxruntime", "here-tvm"])
def test_untranslated_operator_is_named_by_backends_that_read_onnx(untranslated, name):
    verdict = untranslated[2][name]

    assert verdict.status == "failed"
    assert "operator `nowhere::swish` has no ONNX form" in verdict.reason
    assert "model.py" in verdict.reason


@pytest.mark.parametrize("name", ["here-eager", "here-torchscript"])
def test_untranslated_operator_runs_where_the_program_does(untranslated, name):
    _, job, verdicts = untranslated

    assert verdicts[name].status == "passed", verdicts[name].reason
    assert any("no ONNX graph, so engines are compared with the program" in told for told in job.warnings())


def test_lowering_that_lacks_the_operator_names_it_and_the_module(untranslated):
    verdict = untranslated[2]["here-stablehlo"]
    if verdict.status == "not built here":
        pytest.skip(verdict.reason)

    assert verdict.status == "failed"
    assert "operator `nowhere::swish`, in module `gate`" in verdict.reason


def test_status_knows_that_there_is_no_graph(untranslated):
    states = run.status(run.prepare(Workspace(untranslated[0]), "tiny", targets=["here-eager", "here-torchscript"]))

    assert [state.step for state in states if not state.fresh] == []


def test_without_a_backend_that_reads_programs_there_is_nothing_to_build(untranslated):
    job = run.prepare(Workspace(untranslated[0]), "tiny", targets=["here-onnxruntime"])

    with pytest.raises(NotApplicable, match=r"(?s)`nowhere::swish` has no ONNX form.*translations"):
        run.export(job)


def test_a_process_that_finds_the_program_made_defines_its_operators(untranslated):
    root = untranslated[0]
    command = [sys.executable, "-m", "pipeline", "export", "tiny", "-C", str(root), "--target", "here-late"]
    with (root / "targets" / "targets.toml").open("a") as file:
        file.write(rows({"here-late": {}}).replace('"late"', '"torchscript"'))
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_untranslated_operator_ends_the_command_with_its_code(tmp_path, capsys):
    root = workspace(tmp_path, "coded", {"here-onnxruntime": {}}, translated=False)

    assert cli.invoke(["export", "tiny", "-C", str(root)]) == NotApplicable.exit_code
    assert "operator `coded::swish` has no ONNX form" in capsys.readouterr().err

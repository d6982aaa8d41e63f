"""What can be tested of NVIDIA's targets without a GPU: what is built for them, and that nothing is run by mistake."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline import backends, gpu, host, ort_gpu, samples, tensorrt_graph, tensorrt_plan
from pipeline.errors import BuildError, UnavailableError, UsageError
from pipeline.gpu import Gpu
from pipeline.stages.audit import audit
from pipeline.stages.build import build
from pipeline.store import Key, make
from pipeline.tvm import cuda as tvm_cuda
from pipeline.tvm import importer as tvm_import
from pipeline.types import Target
from tests import extras, small
from tests.stage import test_quantize as quantised
from tests.stage.test_audit import signed

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "12.8", "570.86.15")
NAMES = Path(__file__).parents[1] / "apis" / "onnxruntime-gpu.txt"


def row(backend="onnxruntime", arch="sm90", platform="linux", machine="x86_64", **options):
    return Target.model_validate(
        {
            "name": "gpu",
            "backend": backend,
            "platform": platform,
            "machine": machine,
            "arch": arch,
            "schemes": ["fp32"],
            "vs_onnx": {"fp32": {"cosine": 0}},
            "options": options,
        }
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return quantised.Case(tmp_path_factory.mktemp("convnet"), "convnet", quantised.convnet())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network with a dynamic batch: its recipe, program and ONNX graph."""
    root, entry = tmp_path_factory.mktemp("model"), small.by_name("ConvBatchNorm")
    recipe = small.recipe_of(entry)
    program = small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))
    return recipe, program, small.converted(root / "onnx", recipe, program)


def built(folder, source, target, scheme="fp32"):
    return make(folder, Key("engine"), lambda out: build(source, target, scheme, out)).stored


# --- TensorRT's way of reading a graph -----------------------------------------------------------------------------


def test_our_int8_form_is_one_that_tensorrt_reads(case, tmp_path):
    """Its parser knows no 32-bit integers, and wants every zero point to be zero."""
    source = case.quantize("int8-s8s8").file("model.onnx")
    feeds = samples.feeds(case.recipe, {"batch": 3}, 5)

    made = tensorrt_graph.readable(source, tmp_path)

    graph = onnx.load(made).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert not constants[node.input[2]].any()
        assert constants[node.input[2]].dtype == np.int8
    np.testing.assert_allclose(quantised.run(made, feeds), quantised.run(source, feeds), rtol=1e-5)


# --- Torch-TensorRT's way of dividing a program ---------------------------------------------------------------------


class Part(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) + torch.sort(x).values


class Divided(torch.nn.Module):
    """Parts by the names that Torch-TensorRT gives them."""

    def __init__(self):
        super().__init__()
        self.encoder = Part()

    def forward(self, x):
        return self.encoder(x)


def test_what_is_left_to_pytorch_is_listed():
    whole = torch.nn.Module()
    for name in ("_run_on_acc_0", "_run_on_gpu_1"):
        whole.add_module(name, torch.export.export(Divided(), (torch.zeros(3),)).graph_module)

    found = tensorrt_plan.fallen_back(whole)

    assert found == [f"aten.{name} (in `encoder`)" for name in ("add.Tensor", "relu.default", "sort.default")]
    delattr(whole, "_run_on_gpu_1")
    assert tensorrt_plan.fallen_back(whole) == []


# --- ONNX Runtime's providers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_provider_rows_are_built_anywhere_and_run_on_a_gpu(case, tmp_path, monkeypatch, provider):
    monkeypatch.setattr(gpu, "_asked", lambda: "this host has no NVIDIA driver")
    target, source = row(provider=provider), signed(case, tmp_path, case.quantize("int8-s8s8"))
    backend = backends.find("onnxruntime")

    engine = built(tmp_path / "engine", source, target)

    assert backend.missing(target) is None
    assert engine.artifact.facts == {"provider": provider}
    assert "no NVIDIA driver" in backend.not_runnable(target)
    with pytest.raises(UnavailableError, match="no NVIDIA driver"), backend.load(engine, target):
        pytest.fail("an engine was loaded")
    found = make(tmp_path / "audit", Key("audit"), lambda out: audit(engine, source, target, "int8-s8s8", out)).stored
    assert found.artifact.facts["not_audited"] == (
        f"ONNX Runtime's provider `{provider}` compiles the graph as it loads it"
    )


def test_provider_rows_want_the_package_for_gpus(monkeypatch):
    monkeypatch.setattr(gpu, "_asked", lambda: H100)
    monkeypatch.setattr(host, "version", lambda name: None)

    assert "`onnxruntime-gpu`" in backends.find("onnxruntime").not_runnable(row(provider="cuda"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"provider": "cdua"}, r"(?s)unknown value of `provider` `cdua`.*`cuda`"),
        ({"provider": "cuda", "optimization": "all"}, '`optimization` is no option of provider = "cuda"'),
        ({"provider": "tensorrt", "cuda_graph": True}, '`cuda_graph` is no option of provider = "tensorrt"'),
        ({"provider": "cuda", "level": 3}, '`level` is no option of provider = "cuda"'),
        ({"tf32": True}, '`tf32` is no option of provider = "cpu"'),
        ({"provider": "cuda", "workspace_mb": "much"}, "workspace_mb = 'much'"),
    ],
)
def test_options_that_do_not_go_together_are_named(model, tmp_path, options, match):
    with pytest.raises(UsageError, match=match):
        built(tmp_path / "engine", model[2], row(**options))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_provider_options_exist(model, tmp_path, provider):
    known = set(NAMES.read_text().split())
    target = row(provider=provider, workspace_mb=64)
    signature = model[2].signature()

    found = ort_gpu.providers(target, signature, frozenset({"fp16"}), tmp_path)

    assert found[0][0] == {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    assert found[-1] == ("CPUExecutionProvider", {})
    assert {option for _, options in found for option in options} <= known
    assert all(isinstance(value, str) for _, options in found for value in options.values())


def test_tensorrt_provider_gets_ranges_numbers_and_caches(model, tmp_path):
    name = model[0].inputs[0].name
    axis = model[0].axes["batch"]

    options = dict(ort_gpu.providers(row(provider="tensorrt"), model[2].signature(), frozenset({"int8"}), tmp_path))
    found = options["TensorrtExecutionProvider"]

    for end in ("min", "opt", "max"):
        assert re.fullmatch(rf"{name}:{getattr(axis, end)}(x\d+)+", found[f"trt_profile_{end}_shapes"])
    assert (found["trt_int8_enable"], found["trt_fp16_enable"]) == ("1", "0")
    assert found["trt_engine_cache_path"] == str(tmp_path)


def test_numbers_are_read_from_the_graph(case):
    assert ort_gpu.numbers_of(case.fp32.file("model.onnx")) == frozenset()
    assert ort_gpu.numbers_of(case.quantize("fp16").file("model.onnx")) == {"fp16"}
    assert ort_gpu.numbers_of(case.quantize("int8-s8s8").file("model.onnx")) == {"int8"}


def test_recorded_calls_give_the_answers_of_their_own_sizes(model):
    """On the CPU, where nothing is recorded: what is tested is that buffers and sizes don't mix."""
    recipe, _, graph = model
    session = onnxruntime.InferenceSession(str(graph.file("model.onnx")), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in graph.signature().outputs]
    recorded = ort_gpu.Recorded(session, graph.signature(), "cpu")
    calls = [samples.feeds(recipe, {"batch": batch}, seed=batch) for batch in (1, 3, 1, 2, 3)]

    found = [recorded.run(feeds) for feeds in calls]

    for feeds, outputs in zip(calls, found, strict=True):
        for name, want in zip(names, session.run(names, feeds), strict=True):
            np.testing.assert_allclose(outputs[name], want, rtol=1e-6)


# --- TVM -----------------------------------------------------------------------------------------------------------


def test_tvm_builds_for_a_gpu_that_is_not_here(model, tmp_path, monkeypatch):
    extras.need("tvm", "tvm")
    monkeypatch.setattr(gpu, "_asked", lambda: "this host has no NVIDIA driver")
    target, backend = row("tvm_cuda", machine=host.machine()), backends.find("tvm_cuda")

    engines = [built(tmp_path / str(index), model[2], target) for index in range(2)]

    facts = engines[0].artifact.facts
    assert facts["code"] == "source"
    assert facts["kernels"] > 0
    assert "NVRTC" in json.loads(engines[0].file("runtime.json").read_text())["gpu"]
    assert engines[0].artifact.files == engines[1].artifact.files
    assert "no NVIDIA driver" in backend.not_runnable(target)
    with pytest.raises(UnavailableError, match="no NVIDIA driver"), backend.load(engines[0], target):
        pytest.fail("an engine was loaded")


def test_tvm_cross_compiles_for_jetson(model, tmp_path):
    extras.need("tvm", "tvm")
    extras.need("ziglang", "tvm")

    engine = built(tmp_path / "engine", model[2], row("tvm_cuda", arch="sm87", machine="aarch64"))

    machine = engine.file("model.so").read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # AArch64, in the header of an ELF file


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"arch": "hopper"}, "`hopper` is no compute capability"), ({"cpu": "x87"}, "LLVM processor")],
)
def test_tvm_names_what_it_does_not_know(model, tmp_path, changes, match):
    extras.need("tvm", "tvm")
    with pytest.raises(UsageError, match=match):
        built(tmp_path / "engine", model[2], row("tvm_cuda", **changes))


@pytest.fixture
def nvrtc():
    reason = tvm_cuda.lacks_nvrtc()
    if reason is not None:
        extras.skip(reason)


@pytest.mark.parametrize("arch", ["sm87", "sm90"])
def test_nvrtc_compiles_what_tvm_writes(nvrtc, model, arch):
    """Machine code is made without a GPU, so that at least the compiler has read every kernel."""
    import tvm

    target = row("tvm_cuda", arch=arch)
    where = tvm_cuda.compiles_for(target, "x86-64-v3")
    with where:
        executable = tvm.compile(tvm_import.imported(model[2], target, "onnx"), target=where)

    source = tvm_cuda.source_of(executable)
    code = tvm_cuda.machine_code(source, str(where.arch))

    assert code.startswith(b"\x7fELF")
    for kernel in re.findall(r"(\w+_kernel\w*)\(", source):
        assert kernel.encode() in code


def test_nvrtc_errors_are_ours(nvrtc):
    with pytest.raises(BuildError, match=r"NVRTC can't compile TVM's code for sm_90: .*\"y\" is undefined"):
        tvm_cuda.machine_code("__global__ void kernel() { y = 1; }", "sm_90")
    with pytest.raises(BuildError, match="sm_1"):
        tvm_cuda.machine_code("__global__ void kernel() {}", "sm_1")


def test_tvm_takes_our_compiler_and_gives_it_back(nvrtc):
    import tvm_ffi

    def compiled():
        return bytes(tvm_ffi.get_global_func(tvm_cuda.CALLBACK)('extern "C" __global__ void kernel() {}'))

    with tvm_cuda.exact("sm_89"):
        assert b"sm_89" in compiled()
    before = tvm_ffi.get_global_func(tvm_cuda.CALLBACK)
    with tvm_cuda.exact("sm_90"):
        assert b"sm_90" in compiled()
    assert tvm_ffi.get_global_func(tvm_cuda.CALLBACK).same_as(before)

"""What TensorRT would be asked for, and what is said where it can't be asked; nothing here has a GPU."""

import shutil
import subprocess

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pipeline import backends, gpu, origin, store, tensorrt_graph
from pipeline import tensorrt_plan as plan
from pipeline.backends import torch_tensorrt
from pipeline.backends.tensorrt import facts_of
from pipeline.errors import BuildError, UnavailableError, UsageError
from pipeline.gpu import Gpu
from pipeline.store import Key
from pipeline.tensorrt_plan import Fault, Range
from pipeline.types import Signature, Target, Tolerance

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "12.8", "570.86.15")
AXES = {"batch": {"min": 1, "opt": 8, "max": 64}, "seq": {"min": 8, "opt": 128, "max": 512}}


def row(backend="tensorrt", **changes):
    table = {
        "name": "gpu",
        "backend": backend,
        "platform": "any",
        "machine": "any",
        "arch": "sm90",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_over_peak=1e-3)},
    }
    return Target.model_validate(table | changes)


def signature(*shapes, dtype="float32"):
    inputs = [{"name": f"x{index}", "dtype": dtype, "shape": shape} for index, shape in enumerate(shapes)]
    used = {dim for shape in shapes for dim in shape}
    axes = {name: axis for name, axis in AXES.items() if name in used}
    return Signature.model_validate(
        {"inputs": inputs, "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 10]}], "axes": axes}
    )


# --- the GPU -------------------------------------------------------------------------------------------------------


def driver(tmp_path, name="NVIDIA H100 80GB HBM3", major=9, minor=0, init=0):
    """A library that answers as the driver's would."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no `gcc`")
    source = tmp_path / "cuda.c"
    source.write_text(f"""
#include <string.h>
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGet(int *device, int ordinal) {{ *device = 40 + ordinal; return 0; }}
int cuDeviceGetName(char *name, int bytes, int device) {{
    strncpy(name, "{name}", bytes); return device == 40 ? 0 : 101;
}}
int cuDeviceGetAttribute(int *value, int what, int device) {{
    *value = what == 75 ? {major} : what == 76 ? {minor} : -1; return device == 40 ? 0 : 101;
}}
int cuDriverGetVersion(int *version) {{ *version = 12080; return 0; }}
""")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def test_gpu_is_what_the_driver_says(tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12\n"
    )
    monkeypatch.setattr(gpu, "VERSION", version)

    assert gpu.ask(driver(tmp_path)) == H100
    assert H100.arch == "sm90"


def test_jetson_has_no_driver_version(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "VERSION", tmp_path / "nothing")

    assert gpu.ask(driver(tmp_path, "Orin", 8, 7)) == Gpu("Orin", (8, 7), "12.8", "")


def test_a_driver_without_a_gpu_says_so(tmp_path):
    assert gpu.ask(driver(tmp_path, init=100)) == "the NVIDIA driver finds no GPU (`cuInit` gives error 100)"


def test_no_driver_is_a_reason(tmp_path):
    assert "this host has no NVIDIA driver" in gpu.ask(str(tmp_path / "libcuda.so.1"))


@pytest.mark.parametrize(
    ("arch", "at_least", "reason"),
    [
        ("sm90", False, None),
        ("native", False, None),
        ("sm89", False, "it is for compute capability 8.9, this NVIDIA H100 80GB HBM3 has 9.0"),
        ("sm80", True, None),
        ("sm120", True, "it is for compute capability 12.0, this NVIDIA H100"),
        ("hopper", False, 'written as "sm90"'),
    ],
)
def test_a_row_wants_its_own_gpu(monkeypatch, arch, at_least, reason):
    monkeypatch.setattr(gpu, "_asked", lambda: H100)

    found = gpu.unfit(row(arch=arch), at_least)

    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("backend", "extra"), [("tensorrt", "tensorrt"), ("torch_tensorrt", "torch-tensorrt")])
def test_a_missing_package_names_its_extra(monkeypatch, backend, extra):
    monkeypatch.setattr(gpu, "_asked", lambda: H100)
    monkeypatch.setattr("pipeline.host.has_module", lambda name: False)

    assert f"exportyard[{extra}]" in backends.find(backend).missing(row(backend))
    assert backends.find(backend).not_runnable(row(backend)) == backends.find(backend).missing(row(backend))


@pytest.mark.parametrize("backend", ["tensorrt", "torch_tensorrt"])
def test_without_a_gpu_nothing_is_built_or_run(monkeypatch, tmp_path, backend):
    monkeypatch.setattr(gpu, "_asked", lambda: "this host has no NVIDIA driver")

    def work(out):
        store.write_json(out / "signature.json", signature(["batch", 4]).plain())
        return {}

    stored = store.make(tmp_path / "model", Key("onnx"), work).stored

    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        backends.find(backend).build(stored, row(backend), tmp_path)
    with pytest.raises(UnavailableError, match="no NVIDIA driver"), backends.find(backend).load(stored, row(backend)):
        pytest.fail("an engine was loaded")


def test_build_facts_say_where_an_engine_runs():
    assert facts_of(H100, "10.16.1", 2) == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "tensorrt": "10.16.1",
        "cuda": "12.8",
        "driver": "570.86.15",
        "profiles": 2,
    }


def test_key_has_the_gpu_whose_timings_decide(monkeypatch):
    monkeypatch.setattr(gpu, "_asked", lambda: H100)

    assert backends.find("tensorrt").tools(row())["gpu"] == "NVIDIA H100 80GB HBM3 sm90"


# --- options -------------------------------------------------------------------------------------------------------


def test_options_are_read():
    options = {"level": 5, "workspace_mb": 512, "tf32": True, "hardware": "ampere_plus", "timing_cache": False}

    assert plan.settings_of(row(options=options)) == plan.Settings(
        level=5, workspace_mb=512, tf32=True, hardware="ampere_plus", timing_cache=False
    )
    assert plan.settings_of(row()) == plan.Settings()


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("level", 6, r"level = 6(?s:.*)0 \(quick to build\) to 5"),
        ("level", True, "level = True"),
        ("workspace_mb", -1, "workspace_mb = -1"),
        ("tf32", "yes", "tf32 = 'yes'(?s:.*)true or false"),
        ("hardware", "amper_plus", "(?s)unknown value of `hardware` `amper_plus`.*`ampere_plus`"),
    ],
)
def test_wrong_options_are_named(option, value, match):
    with pytest.raises(UsageError, match=match):
        plan.settings_of(row(options={option: value}))


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("format", "torchscript", "unknown value of `format`"),
        ("min_block", 0, "min_block = 0"),
        ("whole", 1, "whole = 1"),
    ],
)
def test_wrong_options_of_torch_tensorrt_are_named(option, value, match):
    with pytest.raises(UsageError, match=match):
        torch_tensorrt.settings_of(row("torch_tensorrt", options={option: value}))


# --- profiles ------------------------------------------------------------------------------------------------------


def test_profile_has_the_range_of_every_axis():
    found = plan.profiles(signature(["batch", "seq"], ["batch", 3, 224], [5]))

    assert found == [
        {"x0": Range((1, 8), (8, 128), (64, 512)), "x1": Range((1, 3, 224), (8, 3, 224), (64, 3, 224))},
    ]


def test_static_model_has_no_profile():
    assert plan.profiles(signature([4, 3])) == []
    assert plan.choose([], {"x0": (4, 3)}) == 0


def test_opt_sizes_have_a_profile_of_their_own():
    built = plan.profiles(signature(["batch", 3]), opt_profile=True)

    assert built[1] == {"x0": Range((8, 3), (8, 3), (8, 3))}
    assert plan.choose(built, {"x0": (8, 3)}) == 1
    assert plan.choose(built, {"x0": (9, 3)}) == 0
    with pytest.raises(BuildError, match=r"no profile of the engine serves the shapes \{'x0': \(65, 3\)\}"):
        plan.choose(built, {"x0": (65, 3)})


def test_a_dimension_that_is_no_axis_is_refused():
    with pytest.raises(BuildError, match="input `x0`: `2\\*batch` is no axis"):
        plan.profiles(signature(["batch", "2*batch"]))


def test_types_that_tensorrt_lacks_are_refused():
    plan.check_dtypes(signature([2], dtype="int64"), row())
    with pytest.raises(BuildError, match=r"(?s)`x0` is float64.*it has bool, float16"):
        plan.check_dtypes(signature([2], dtype="float64"), row())


# --- caches and errors ---------------------------------------------------------------------------------------------


def test_timings_are_kept_per_gpu_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pcie = Gpu("NVIDIA H100 PCIe", (9, 0), "12.8", "570.86.15")
    files = [plan.timing_cache(H100, "10.16.1"), plan.timing_cache(H100, "11.4.0"), plan.timing_cache(pcie, "10.16.1")]

    assert len(set(files)) == 3
    assert all(tmp_path in file.parents and "sm90" in file.name for file in files)


def graph(tmp_path):
    node = helper.make_node("Mystery", ["x"], ["y"], name="node_mystery_3")
    node.metadata_props.add(key=origin.SCOPES, value="['', 'encoder.layer.2', 'mystery']")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", info[:1], info[1:])), path)
    return path


def test_parser_errors_name_the_users_module(tmp_path):
    faults = [Fault("node_mystery_3", "Mystery", "no importer\nfor it"), Fault("", "", "and so on")]

    assert plan.parse_error(faults, graph(tmp_path), row()).message == (
        "tensorrt can't import the model for `gpu`: no importer for it "
        "(operator `Mystery`, node `node_mystery_3`, in module `encoder.layer.2`), and 1 more"
    )


def test_builder_errors_name_the_users_module_where_the_log_does(tmp_path):
    log = ["Could not find any implementation for node node_mystery_3.", "Error Code 10: Internal Error"]

    found = plan.build_error(log, graph(tmp_path), row()).message

    assert found.startswith("tensorrt can't build `gpu`: Error Code 10: Internal Error (operator `Mystery`")
    assert "encoder.layer.2" in found


def test_errors_without_words_are_errors(tmp_path):
    assert "no reason given" in plan.parse_error([], graph(tmp_path), row()).message
    assert "it gives no reason" in plan.build_error([], graph(tmp_path), row()).message
    assert "it is broken" in plan.load_error([], tmp_path).message


# --- the graph -----------------------------------------------------------------------------------------------------


def quantised(tmp_path, axis, kind=np.int32):
    """A DequantizeLinear of a constant, added to the input."""
    value = np.array([[100, -7, 3], [1, 2, -20]], kind)
    scale = (
        np.array([0.5, 0.25, 2.0] if axis in (1, -1) else [0.5, 0.25], np.float32)
        if axis is not None
        else np.float32(0.5)
    )
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["bias", "scale"], ["bias_f"], **attributes),
        helper.make_node("Add", ["x", "bias_f"], ["y"]),
    ]
    constants = [numpy_helper.from_array(value, "bias"), numpy_helper.from_array(scale, "scale")]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    path = tmp_path / "source.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_biases_become_the_same_floats(tmp_path, axis):
    source = quantised(tmp_path, axis)
    x = np.zeros((2, 3), np.float32)

    made = tensorrt_graph.readable(source, tmp_path)

    assert made != source
    assert [node.op_type for node in onnx.load(made).graph.node] == ["Add"]
    assert [tensor.name for tensor in onnx.load(made).graph.initializer] == ["bias_f"]
    want, got = (ReferenceEvaluator(str(path)).run(None, {"x": x})[0] for path in (source, made))
    np.testing.assert_array_equal(got, want)


def test_graphs_that_it_can_read_are_left_alone(tmp_path):
    source = quantised(tmp_path, None, np.int8)

    assert tensorrt_graph.readable(source, tmp_path / "elsewhere") == source

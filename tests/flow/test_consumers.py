"""The consumers in examples/: each runs a release by what is in it, and reproduces its golden vectors."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from onnxruntime import InferenceSession
from safetensors.numpy import load_file, save_file

from pipeline import manifest
from tests import consumers
from tests.consumers import BUCKETS, EXAMPLES, ORT, TVM, ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release folder with all its engines; not to be changed."""
    return consumers.released(tmp_path_factory.mktemp("consumers") / "yard", rows=consumers.ROWS)


@pytest.fixture
def spoiled(folder, tmp_path) -> Path:
    """A release whose golden vectors no engine reproduces."""
    shutil.copytree(folder, tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "golden.safetensors"
    tensors = load_file(path)
    tensors["odd/out/logits"][0, 0] += 0.01
    tensors["min/out/label"][0] += 1
    save_file(tensors, path)
    return tmp_path / "spoiled"


def python(release, *words):
    return ran(sys.executable, "-I", EXAMPLES / "python_onnxruntime" / "release.py", release, *words)


@pytest.mark.parametrize("target", [ORT, BUCKETS])
def test_python_with_onnxruntime_alone(folder, target):
    code, told = python(folder, "--target", target)

    assert code == 0, told
    assert told.count("ok ") == 2 * 3


def test_python_finds_wrong_numbers(spoiled):
    code, told = python(spoiled, "--target", ORT)

    assert code == 1
    assert "WRONG odd  logits: differs by 1.0e-02" in told
    assert "WRONG min  label: 0.0000 equal" in told
    assert told.count("WRONG") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("no-such-folder",), "no-such-folder"),
        (("RELEASE", "--target", "no-such-target"), "no engine of ONNX Runtime for `no-such-target`"),
        (("RELEASE", "--target", TVM), f"no engine of ONNX Runtime for `{TVM}`"),
        (("RELEASE",), f"name a target: {ORT}, {BUCKETS} would do"),
    ],
)
def test_python_says_what_is_missing(folder, words, told):
    code, output = python(*(folder if word == "RELEASE" else word for word in words))

    assert code == 2
    assert output.startswith("release.py: ")
    assert told in output
    assert output.count("\n") == 1


@pytest.fixture(scope="module")
def ort_run(tmp_path_factory):
    """The C++ program for ONNX Runtime, with the library of the Python package."""
    program = consumers.ort_run(["g++"], tmp_path_factory.mktemp("ort") / "ort_run")
    library = next((consumers.package("onnxruntime") / "capi").glob("libonnxruntime.so.*"))
    return lambda *words: ran(program, *words, env=os.environ | {"ONNXRUNTIME": str(library)})


def test_cpp_with_onnxruntime(ort_run, folder):
    code, told = ort_run(folder, ORT)

    assert code == 0, told
    assert told.startswith(f"tiny v1.0.0, {ORT} (fp32)\n")
    assert told.count("ok ") == 2 * 3


def test_cpp_finds_wrong_numbers(ort_run, spoiled):
    code, told = ort_run(spoiled, ORT)

    assert code == 1
    assert "WRONG odd  logits: differs by 1.0e-02" in told
    assert "WRONG min  label: 0.0000 equal" in told
    assert told.count("WRONG") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "usage: ort_run RELEASE_FOLDER [TARGET]"),
        (("no-such-folder",), "can't read `no-such-folder/manifest.json`"),
        (("RELEASE", "no-such-target"), "the release has no engine for `no-such-target`"),
        (("RELEASE", BUCKETS), f"`{BUCKETS}` has buckets"),
        (("RELEASE",), "name a target: 2 would do"),
    ],
)
def test_cpp_says_what_is_missing(ort_run, folder, words, told):
    code, output = ort_run(*(folder if word == "RELEASE" else word for word in words))

    assert code == 2
    assert told in output


def test_cpp_with_tvm(tmp_path, folder, spoiled):
    places = consumers.tvm_libraries()
    program = consumers.tvm_run(["g++"], places, tmp_path / "tvm_run")
    env = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, places))}
    code, told = ran(program, folder, TVM, env=env)
    wrong = ran(program, spoiled, TVM, env=env)

    assert code == 0, told
    assert told.count("ok ") == 2 * 3
    assert wrong[0] == 1
    assert wrong[1].count("WRONG") == 2


# --- Triton --------------------------------------------------------------------------------------------------------


def triton(release, to, *words):
    program = EXAMPLES / "triton" / "triton_repository.py"
    return ran(sys.executable, "-I", "-S", program, release, "--to", to, *words)


def config_of(folder):
    """`config.pbtxt`, read by the schema that Triton's own client has."""
    # loaded by itself, since the package around it needs grpc
    place = consumers.package("tritonclient") / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    schema = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(schema)
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def test_triton_gets_a_model_that_its_config_describes(folder, tmp_path):
    code, told = triton(folder, tmp_path, "--target", ORT)
    config = config_of(tmp_path / "tiny")
    session = InferenceSession(tmp_path / "tiny" / "1000000" / config.default_model_filename)

    assert (code, told) == (0, f"{tmp_path}/tiny/1000000\n")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 4)
    for described, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(one.name, shape_of(one)) for one in described] == [(one.name, one.shape[1:]) for one in nodes]
        assert [TRITON_TYPES[one.data_type] for one in described] == [one.type for one in nodes]


TRITON_TYPES = {11: "tensor(float)", 9: "tensor(int64)"}


def shape_of(tensor):
    """Without the batch, as the model has it."""
    return [*(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)]


def test_tritons_first_requests_are_golden(folder, tmp_path):
    triton(folder, tmp_path, "--target", ORT)
    (warmup,) = config_of(tmp_path / "tiny").model_warmup
    golden = load_file(folder / "golden.safetensors")
    feeds = {}
    for name, one in warmup.inputs.items():
        want = golden[f"min/in/{name}"]
        shape = (warmup.batch_size, *(one.dims if want.ndim > 1 else ()))
        feeds[name] = np.fromfile(tmp_path / "tiny" / "warmup" / one.input_data_file, want.dtype).reshape(shape)
        np.testing.assert_array_equal(feeds[name], want)
    logits, label = InferenceSession(tmp_path / "tiny/1000000/model.onnx").run(["logits", "label"], feeds)

    bound = manifest.load(folder).engines[ORT].golden["logits"].max_abs
    assert np.abs(logits - golden["min/out/logits"]).max() <= bound
    np.testing.assert_array_equal(label, golden["min/out/label"])


def test_triton_puts_requests_together_unless_they_would_change_each_other(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "release")
    path = tmp_path / "release" / manifest.FILE
    made = json.loads(path.read_text())
    made["engines"][ORT]["scheme"] = "int8-dynamic"
    path.write_text(json.dumps(made))
    for release, name in ((folder, "fp32"), (tmp_path / "release", "dynamic")):
        triton(release, tmp_path / name, "--target", ORT)

    assert [*config_of(tmp_path / "fp32" / "tiny").dynamic_batching.preferred_batch_size] == [2]
    assert not config_of(tmp_path / "dynamic" / "tiny").HasField("dynamic_batching")


def test_triton_gets_a_model_for_each_bucket(folder, tmp_path):
    code, _ = triton(folder, tmp_path, "--target", BUCKETS)
    configs = [config_of(tmp_path / name) for name in ("tiny-batch1", "tiny-batch3")]

    assert code == 0
    assert [config.max_batch_size for config in configs] == [0, 0]
    assert [[*config.input[0].dims] for config in configs] == [[1, 1, 8, 8], [3, 1, 8, 8]]
    assert [[*config.input[1].dims] for config in configs] == [[1], [3]]
    assert all((tmp_path / config.name / "1000000" / "model.onnx").is_file() for config in configs)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target", TVM), f"Triton has no backend for `{TVM}`"),
        (("--target", "no-such"), "the release has no engine for `no-such`"),
        ((), f"name a target: {ORT}, {BUCKETS} would do"),
    ],
)
def test_what_triton_can_not_have_is_said(folder, tmp_path, words, told):
    code, output = triton(folder, tmp_path, *words)

    assert code == 2
    assert told in output
    assert [*tmp_path.iterdir()] == []


def test_triton_gets_no_file_that_was_not_published(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "release")
    with (tmp_path / "release" / "engines" / ORT / "model.onnx").open("ab") as stream:
        stream.write(b"!")
    code, told = triton(tmp_path / "release", tmp_path / "models", "--target", ORT)

    assert code == 2
    assert "has other bytes than were published (sha256 differs)" in told
    assert [*(tmp_path / "models" / "tiny").iterdir()] == []

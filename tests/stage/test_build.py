"""The stage build: what it refuses, and what becomes of a backend's failure."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import backends, host, store, targets
from pipeline.backends import onnxruntime as ort
from pipeline.errors import BuildError, UnavailableError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key, write_json
from pipeline.types import Axis, Signature, Target, TensorSpec, Tolerance

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
    axes={"batch": Axis(min=1, opt=2, max=4)},
)


def row(backend, options=None, **changes):
    table = {
        "name": "here",
        "backend": backend,
        "platform": host.system(),
        "machine": host.machine(),
        "arch": "native",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_abs=0)},
        "options": options or {},
    }
    return Target.model_validate(table | changes)


def graph(folder, nodes, constants=(), outputs=("y",)):
    """An ONNX artifact: x [batch, 4] -> y [batch, 4]."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", *outputs)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], list(constants)), opset_imports=opsets, ir_version=10
    )

    def work(out):
        onnx.save(model, out / "model.onnx")
        write_json(out / "signature.json", SIGNATURE.plain())
        return {}

    return store.make(folder, Key("onnx"), work).stored


@pytest.fixture
def relu(tmp_path):
    return graph(tmp_path / "onnx", [helper.make_node("Relu", ["x"], ["y"], name="node_relu")])


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def engine(folder, model, target):
    return store.make(folder, Key("engine"), lambda out: build(model, target, "fp32", out)).stored


def test_engine_has_the_models_signature(relu, out):
    build(relu, row("onnxruntime"), "fp32", out)

    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "signature.json"]
    assert (out / "signature.json").read_bytes() == relu.file("signature.json").read_bytes()


@pytest.mark.parametrize(
    ("target", "scheme", "error", "match"),
    [
        (row("onxruntime"), "fp32", UsageError, "(?s)unknown backend `onxruntime`.*`onnxruntime`"),
        (row("onnxruntime", {"optimisation": "all"}), "fp32", UsageError, "(?s)`optimisation`.*`optimization`"),
        (row("onnxruntime", {"optimization": "al"}), "fp32", UsageError, "(?s)value of `optimization` `al`.*`all`"),
        (row("onnxruntime", {"format": "ortt"}), "fp32", UsageError, "(?s)value of `format` `ortt`.*`ort`"),
        (row("onnxruntime", {"threads": -1}), "fp32", UsageError, "threads = -1"),
        (row("tvm", {"import": "onxx"}), "fp32", UsageError, "(?s)value of `import` `onxx`.*`onnx`"),
        (row("tvm", arch="cortex-z80"), "fp32", UsageError, "unknown LLVM processor `cortex-z80`"),
        (row("tvm"), "int8-u8u8", UsageError, "(?s)can't carry scheme `int8-u8u8`.*`fp32`"),
        (
            row("tvm", {"import": "program"}, schemes=["int8-u8s8"], vs_onnx={"int8-u8s8": Tolerance(sqnr_db=12)}),
            "int8-u8s8",
            UsageError,
            '(?s)import = "program" carries fp32 only.*`int8-u8s8`',
        ),
        (row("echo", {"fail": "missing"}), "fp32", UnavailableError, "can't be built on this host: the row says so"),
        (row("echo", {"fail": "build"}), "fp32", BuildError, r"backend `echo` failed on `here` \(fp32\): RuntimeError"),
        (
            row("onnxruntime", {"optimization": "all"}, requires=["warp_drive"]),
            "fp32",
            UnavailableError,
            "this CPU lacks warp_drive",
        ),
    ],
)
def test_what_is_wrong_is_named(relu, out, target, scheme, error, match):
    if target.backend == "tvm" and backends.find("tvm").missing(target) is not None:
        pytest.skip("TVM can't build here")
    with pytest.raises(error, match=match) as caught:
        build(relu, target, scheme, out)
    assert len(str(caught.value).splitlines()) <= 10


def test_backend_that_writes_nothing_is_at_fault(relu, out, monkeypatch):
    monkeypatch.setattr(type(backends.find("echo")), "build", lambda *_: {})

    with pytest.raises(BuildError, match="`echo` wrote nothing"):
        build(relu, row("echo"), "fp32", out)


@pytest.mark.parametrize("moment", ["load", "run"])
def test_echo_fails_where_it_is_told_to(relu, tmp_path, moment):
    target = row("echo", {"fail": moment})
    stored = engine(tmp_path / "engine", relu, target)

    with pytest.raises(RuntimeError, match=f"fails in {moment}"), backends.find("echo").load(stored, target) as run:
        run({"x": np.zeros((1, 4), "float32")})


def test_echo_answers_zeros(relu, tmp_path):
    target = row("echo")
    with backends.find("echo").load(engine(tmp_path / "engine", relu, target), target) as run:
        found = run({"x": np.ones((3, 4), "float32")})

    np.testing.assert_array_equal(found["y"], np.zeros((3, 4), "float32"))


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_unknown_operator_is_named_with_its_module(tmp_path, out, backend):
    if backends.find(backend).missing(row(backend)) is not None:
        pytest.skip(f"{backend} can't build here")
    node = helper.make_node("Mystery", ["x"], ["y"], name="node_7", domain="acme")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'encoder.layer.2', 'mystery']")
    model = graph(tmp_path / "onnx", [node])

    with pytest.raises(BuildError, match=r"operator `Mystery`, node `node_7`, in module `encoder\.layer\.2`"):
        build(model, row(backend), "fp32", out)


def test_a_constant_output_is_the_callers(tmp_path):
    weight = numpy_helper.from_array(np.full((1, 4), 3, "float32"), "w")
    model = graph(tmp_path / "onnx", [helper.make_node("Identity", ["w"], ["y"])], [weight])
    target = row("onnxruntime")
    with backends.find("onnxruntime").load(engine(tmp_path / "engine", model, target), target) as run:
        feeds = {"x": np.zeros((1, 4), "float32")}
        run(feeds)["y"][...] = 7

        assert (run(feeds)["y"] == 3).all()


def test_large_weights_are_kept_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "INLINE_BYTES", 1000)
    weight = numpy_helper.from_array(np.eye(4, dtype="float32").repeat(200, axis=1), "w")
    back = numpy_helper.from_array(np.eye(4, dtype="float32").repeat(200, axis=0) / 200, "v")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    model = graph(tmp_path / "onnx", nodes, [weight, back])
    target = row("onnxruntime")

    stored = engine(tmp_path / "engine", model, target)

    assert stored.artifact.files["model.onnx.data"].size_bytes > stored.artifact.files["model.onnx"].size_bytes
    with backends.find("onnxruntime").load(stored, target) as run:
        feeds = {"x": np.arange(8, dtype="float32").reshape(2, 4)}
        np.testing.assert_allclose(run(feeds)["y"], feeds["x"], rtol=1e-5)
    with pytest.raises(BuildError, match=r"(?s)too many for one `\.ort` file.*format"):
        engine(tmp_path / "small", model, row("onnxruntime", {"format": "ort"}))


def test_engines_for_other_machines_are_built_where_it_is_possible(relu, tmp_path):
    target = row("onnxruntime", {"format": "ort"}, platform="android", machine="aarch64", arch="armv8-a")
    backend = backends.find("onnxruntime")

    built = engine(tmp_path / "engine", relu, target)
    assert "model.ort" in built.artifact.files
    assert built.file("required_operators.config").read_text() == 'ai.onnx;14;Relu{"inputs": {"0": ["float"]}}\n'
    assert "onnxruntime-android" in built.file("runtime.json").read_text()
    assert "it is for android" in backend.not_runnable(target)
    assert '"extended" builds anywhere' in backend.missing(
        target.model_copy(update={"options": {"optimization": "all"}})
    )


def test_the_plug_in_in_the_documentation_works(relu, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Plain" in one)
    scope = {}
    exec(code, scope)
    backend, target = scope["BACKEND"], row("plain")
    (tmp_path / "engine").mkdir()
    backend.build(relu, target, tmp_path / "engine")
    assert backend.missing(target) is None
    with backend.load(relu, target) as run:
        found = run({"x": np.array([[-1, 0, 1, 2]], "float32")})

    np.testing.assert_array_equal(found["y"], [[0, 0, 1, 2]])


def test_rows_in_the_documentation_are_rows(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    (tmp_path / "targets.toml").write_text(re.search(r"```toml\n(\[targets.*?)```", text, re.DOTALL).group(1))

    assert list(targets.read(tmp_path / "targets.toml")) == ["linux-x86_64-vnni-onnxruntime"]

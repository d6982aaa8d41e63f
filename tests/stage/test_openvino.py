"""OpenVINO: the whole catalogue, INT8 and bfloat16 as the graph asks for them, and refusals in words."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline import host, store
from pipeline.backends import find
from pipeline.errors import BuildError, UsageError
from pipeline.reference import written
from pipeline.stages.audit import audit
from pipeline.stages.build import build
from pipeline.store import Key, make
from pipeline.types import Audit, Signature, Target
from tests import extras, small
from tests.models import CATALOGUE
from tests.stage.test_catalogue import sizes_of
from tests.stage.test_quantize import Case, convnet

extras.need("openvino", "openvino")

WORKS = [entry for entry in CATALOGUE if entry.fails is None]
REFUSED: dict[str, str] = {}
X86 = pytest.mark.skipif(host.machine() != "x86_64", reason="which kernels there are is known for x86 only")


def row(schemes=("fp32",), **changes):
    table = {
        "name": "linux-x86_64-openvino",
        "backend": "openvino",
        "platform": host.system(),
        "machine": host.machine(),
        "arch": "native",
        "schemes": schemes,
        "vs_onnx": {scheme: {"sqnr_db": 10} for scheme in schemes},
    }
    return Target.model_validate(table | changes)


def graph_of(folder, proto):
    """The ONNX artifact of a graph with inputs and outputs of float32; ``batch`` is an axis from 1 to 8."""

    def specs(values):
        dims = [(value, value.type.tensor_type.shape.dim) for value in values]
        return [
            {"name": value.name, "dtype": "float32", "shape": [dim.dim_param or dim.dim_value for dim in shape]}
            for value, shape in dims
        ]

    signature = Signature.model_validate(
        {
            "inputs": specs(proto.graph.input),
            "outputs": specs(proto.graph.output),
            "axes": {"batch": {"min": 1, "opt": 2, "max": 8}},
        }
    )

    def work(out):
        onnx.save(proto, out / "model.onnx")
        store.write_json(out / "signature.json", signature.plain())
        return {}

    return make(folder, Key("onnx"), work).stored


def engine_of(folder, model, target, scheme):
    return make(folder, Key("engine"), lambda out: build(model, target, scheme, out)).stored


def audited(folder, engine, model, target, scheme):
    found = make(folder, Key("audit"), lambda out: audit(engine, model, target, scheme, out)).stored
    return Audit.model_validate_json(found.file("audit.json").read_text())


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """By scheme, the artifacts of a small network with four convolutions and a product."""
    case = Case(tmp_path_factory.mktemp("convnet"), "convnet", convnet())
    found = {"fp32": case.fp32} | {scheme: case.quantize(scheme) for scheme in ("bf16", "int8-u8s8", "int8-s8s8")}
    return {
        scheme: graph_of(case.folder / f"{scheme}-signed", onnx.load(one.file("model.onnx")))
        for scheme, one in found.items()
    }


def distance(one, other):
    """Largest difference over the largest value."""
    feeds = {"image": np.random.default_rng(9).normal(size=(3, 3, 16, 16)).astype(np.float32)}
    (want,), (got,) = (run(feeds).values() for run in (one, other))
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("entry", WORKS, ids=lambda entry: entry.name)
def test_same_numbers_as_onnxruntime_or_a_reason(entry, tmp_path):
    recipe = small.recipe_of(entry)
    program = small.captured(tmp_path / "program", recipe, small.checkpoint(tmp_path / "checkpoint", entry))
    model, target = small.converted(tmp_path / "onnx", recipe, program), row()
    if entry.name in REFUSED:
        with pytest.raises(BuildError, match=REFUSED[entry.name]):
            engine_of(tmp_path / "engine", model, target, "fp32")
        return
    engine = engine_of(tmp_path / "engine", model, target, "fp32")

    ask = written(model.file("model.onnx"))
    with find("openvino").load(engine, target, 1) as run:
        for sizes in sizes_of(entry):
            feeds = small.feeds(recipe, sizes)
            found, want = run(feeds), ask(feeds)
            for name, one in want.items():
                small.assert_near(np.asarray(one), found[name], f"output {name} at {sizes}")


@X86
@pytest.mark.parametrize("scheme", ["int8-u8s8", "int8-s8s8"])
def test_what_the_graph_asks_for_in_int8_runs_in_int8(net, tmp_path, scheme):
    model, target = net[scheme], row((scheme,))
    engine = engine_of(tmp_path / "engine", model, target, scheme)

    found = audited(tmp_path / "audit", engine, model, target, scheme)

    assert {row.node: row.operator for row in found.rows} == {
        **dict.fromkeys(("stem", "block_1", "block_2", "depthwise"), "Convolution"),
        "head": "FullyConnected",
    }
    assert found.int8_share == 1
    with find("openvino").load(engine, target, 1) as run:
        assert distance(written(model.file("model.onnx")), run) < 2e-2


def test_a_bfloat16_graph_is_multiplied_in_bfloat16_and_a_float_one_is_not(net, tmp_path):
    off, bytes_of, ask = {}, {}, written(net["fp32"].file("model.onnx"))
    for scheme, model in (("fp32", net["fp32"]), ("bf16", net["bf16"])):
        engine = engine_of(tmp_path / scheme, model, row((scheme,)), scheme)
        bytes_of[scheme] = engine.artifact.files["model.bin"].size_bytes
        with find("openvino").load(engine, row((scheme,)), 1) as run:
            off[scheme] = distance(ask, run)
        found = audited(tmp_path / f"audit-{scheme}", engine, model, row((scheme,)), scheme)
        assert {one.runs_in for one in found.rows} == {scheme}

    assert off["fp32"] < 1e-5 < 1e-4 < off["bf16"] < 3e-2
    assert bytes_of["bf16"] < 0.6 * bytes_of["fp32"]


def test_equal_values_come_in_order(tmp_path):
    node = helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=-1)
    cast = helper.make_node("Cast", ["indices"], ["places"], to=TensorProto.FLOAT)
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", ["batch", 64]), ("places", ["batch", 8]))
    ]
    k = helper.make_tensor("k", TensorProto.INT64, [1], [8])
    graph = helper.make_graph([node, cast], "g", info[:1], info[1:], [k])
    model = graph_of(tmp_path / "onnx", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    engine = engine_of(tmp_path / "engine", model, row(), "fp32")
    values = np.random.default_rng(0).integers(0, 4, (2, 64)).astype(np.float32)

    with find("openvino").load(engine, row(), 1) as run:
        np.testing.assert_array_equal(run({"x": values})["places"], np.argsort(-values, kind="stable")[:, :8])


def mystery(tmp_path):
    node = helper.make_node("Mystery", ["x"], ["y"], name="node_mystery", domain="acme")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'encoder.layer.2', 'mystery']")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    return graph_of(
        tmp_path / "onnx", helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]), opset_imports=opsets)
    )


def test_an_unknown_operator_is_named_with_its_module(tmp_path):
    with pytest.raises(BuildError, match=r"can't import .*operator `Mystery`.*in module `encoder.layer.2`"):
        engine_of(tmp_path / "engine", mystery(tmp_path), row(), "fp32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arch": "gpus"}, "(?s)unknown `arch` for openvino `gpus`.*did you mean `gpu`"),
        ({"options": {"precision": "fp16"}}, "(?s)unknown value of `precision` `fp16`.*did you mean `bf16`"),
        ({"options": {"hint": "latencyy"}}, "(?s)unknown value of `hint` `latencyy`.*did you mean `latency`"),
        ({"options": {"threads": -1}}, "threads = -1"),
        ({"options": {"streams": "many"}}, "streams = 'many'"),
        ({"options": {"compress_to_fp16": "yes"}}, "compress_to_fp16 is 'yes'"),
        ({"options": {"import": "program"}, "schemes": ("bf16",)}, "carries fp32 only"),
    ],
)
def test_wrong_rows_are_refused(net, tmp_path, changes, match):
    target = row(changes.get("schemes", ("fp32",)), **{k: v for k, v in changes.items() if k != "schemes"})
    with pytest.raises(UsageError, match=match):
        engine_of(tmp_path / "engine", net["fp32"], target, target.schemes[0])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.bin", lambda content: content[: len(content) // 2]),
        ("model.xml", lambda content: content[: len(content) // 2]),
        ("model.xml", lambda content: content.replace(b"Convolution", b"Convulsion")),
        ("runtime.json", lambda content: b"{}"),
    ],
)
def test_a_broken_file_is_refused(net, tmp_path, name, spoil):
    engine = engine_of(tmp_path / "engine", net["fp32"], row(), "fp32")

    def work(out):
        for file in engine.artifact.files:
            content = engine.file(file).read_bytes()
            (out / file).write_bytes(spoil(content) if file == name else content)
        return {}

    broken = make(tmp_path / "broken", Key("engine"), work).stored
    with pytest.raises(BuildError, match="can't load the engine"), find("openvino").load(broken, row()):
        pytest.fail("a broken engine was loaded")


def test_options_get_into_the_settings(net, tmp_path):
    options = {"precision": "auto", "hint": "throughput", "streams": 2, "compress_to_fp16": True}
    engines = [
        engine_of(tmp_path / name, net["fp32"], row(options=chosen), "fp32")
        for name, chosen in (("as-is", {}), ("told", options))
    ]

    assert json.loads(engines[1].file("runtime.json").read_text())["settings"] == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": 2,
    }
    assert engines[1].artifact.files["model.bin"].size_bytes < engines[0].artifact.files["model.bin"].size_bytes


def test_other_devices_are_built_for_and_not_run():
    backend = find("openvino")
    for arch in ("gpu", "npu"):
        target = row(arch=arch)
        assert backend.missing(target) is None
        reason = backend.not_runnable(target)
        assert reason is None or f"this host has no Intel {arch.upper()}" in reason


def test_nothing_is_told_to_anybody():
    script = (
        "import sys; from pipeline import openvino_import; openvino_import.runtime();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.stdout.strip() == "[]", done.stderr

"""How backends are found, and the helpers that they share; no torch, no runtime."""

import sys

import onnx
import pytest
from onnx import TensorProto, helper

from pipeline import backends, host, origin
from pipeline.errors import BuildError
from pipeline.tvm import cpu as tvm_cpu
from pipeline.types import Target


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plug-in distribution whose module has the given text."""

    def install(text):
        (tmp_path / "their_backend.py").write_text(text)
        info = tmp_path / "acme_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-backend\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[exportyard.backends]\nacme = their_backend:BACKEND\n")
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    def forget():
        backends._entries.cache_clear()
        backends.find.cache_clear()
        sys.modules.pop("their_backend", None)

    yield install
    monkeypatch.undo()
    forget()


def test_plugin_is_found_by_entry_point(plugin):
    plugin("class Acme:\n    name = 'acme'\nBACKEND = Acme()\n")

    assert "acme" in backends.names()
    assert backends.find("acme").name == "acme"


def test_plugin_that_can_not_be_imported_is_named(plugin):
    plugin("import a_package_that_is_not_there\n")

    with pytest.raises(BuildError, match=r"(?s)`acme` of the package `acme-backend`.*a_package_that_is_not_there"):
        backends.find("acme")


@pytest.mark.parametrize("name", ["coreml", "executorch", "litert", "openvino", "stablehlo", "tvm"])
def test_a_missing_package_says_the_extra(monkeypatch, name):
    backend = backends.find(name)
    row = Target.model_validate(
        {
            "name": "here",
            "backend": name,
            "platform": host.system(),
            "machine": host.machine(),
            "arch": "native",
            "schemes": ["fp32"],
            "vs_onnx": {"fp32": {"max_abs": 0}},
        }
    )
    monkeypatch.setattr(host, "has_module", lambda _: False)

    told = f"{backend.missing(row)} {backend.not_runnable(row)}"
    assert f"is not installed (`pip install 'exportyard[{name}]'`)" in told


@pytest.mark.parametrize(
    ("features", "cpu"),
    [
        ({"sse4_2", "popcnt"}, "x86-64-v2"),
        ({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}, "x86-64-v3"),
        (set(), "x86-64"),
    ],
)
def test_native_is_the_best_processor_whose_features_are_all_there(monkeypatch, features, cpu):
    monkeypatch.setattr(tvm_cpu.host, "machine", lambda: "x86_64")
    monkeypatch.setattr(tvm_cpu.host, "cpu_features", lambda: frozenset(features))

    assert tvm_cpu.native_cpu() == cpu


def graph(tmp_path):
    node = helper.make_node("Mystery", ["x"], ["y"], name="node_mystery_3")
    for key, value in (
        (origin.SCOPES, "['', 'encoder.layer.2', 'mystery']"),
        (origin.TRACE, 'File "m.py", line 7, in f'),
    ):
        node.metadata_props.add(key=key, value=value)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", info[:1], info[1:])), path)
    return path


@pytest.mark.parametrize("message", ["no kernel for node 'node_mystery_3'.", "not supported: Mystery"])
def test_origin_of_a_node_that_an_error_names(tmp_path, message):
    found = origin.of_error(graph(tmp_path), message)

    assert found == " (operator `Mystery`, node `node_mystery_3`, in module `encoder.layer.2`, at m.py:7)"


def test_origin_is_silent_where_nothing_is_known(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff\xff")

    assert origin.of_error(graph(tmp_path), "out of memory") == ""
    assert origin.of_error(broken, "Mystery") == ""

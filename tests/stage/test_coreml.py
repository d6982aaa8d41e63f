"""Core ML: what the package says, which is all that can be checked without a Mac."""

import pytest

from pipeline import host, store
from pipeline.backends.coreml import BACKEND
from pipeline.errors import BuildError, UnavailableError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Axis, Target, Tolerance
from tests import extras, small

extras.need("coremltools", "coreml")

from pipeline import coreml_package as package  # noqa: E402  it needs torch, not coremltools


def row(**options):
    table = {"name": "here", "backend": "coreml", "platform": "ios", "machine": "aarch64", "arch": "any"}
    rest = {"schemes": ["fp32"], "vs_onnx": {"fp32": Tolerance(max_abs=0)}, "options": options}
    return Target.model_validate(table | rest)


def captured(root, name):
    entry = small.by_name(name)
    recipe = small.recipe_of(entry)
    return small.captured(root / "program", recipe, small.checkpoint(root / "checkpoint", entry))


def engine(folder, program, target):
    return store.make(folder, Key("engine"), lambda out: build(program, target, "fp32", out)).stored


def test_package_has_our_names_and_ranges_and_the_same_bytes_each_time(tmp_path):
    program = captured(tmp_path, "ConvBatchNorm")

    first, second = (engine(tmp_path / name, program, row()) for name in ("first", "second"))

    assert first.artifact.files == second.artifact.files
    spec, signature = package.read(first.path / package.PACKAGE), program.signature()
    assert [one.name for one in spec.description.input] == [one.name for one in signature.inputs]
    assert package.fault(spec, signature) is None


def test_package_that_is_called_otherwise_is_found_out(tmp_path):
    program = captured(tmp_path, "ConvBatchNorm")
    spec, signature = (
        package.read(engine(tmp_path / "engine", program, row()).path / package.PACKAGE),
        program.signature(),
    )
    wider = signature.model_copy(update={"axes": {"batch": Axis(min=1, opt=2, max=1000)}})
    first = signature.inputs[0].model_copy(update={"dtype": "int64"})

    assert "sizes are" in (package.fault(spec, wider) or "")
    assert "numbers are FLOAT32" in (package.fault(spec, signature.model_copy(update={"inputs": (first,)})) or "")
    renamed = signature.outputs[0].model_copy(update={"name": "other"})
    assert "not ['other']" in (package.fault(spec, signature.model_copy(update={"outputs": (renamed,)})) or "")


def test_half_precision_gives_half_precision(tmp_path):
    program = captured(tmp_path, "ConvBatchNorm")
    spec = package.read(engine(tmp_path / "half", program, row(precision="float16")).path / package.PACKAGE)

    assert package.fault(spec, program.signature(), half=True) is None
    assert "numbers are FLOAT16" in (package.fault(spec, program.signature()) or "")


def test_what_it_can_not_convert_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"coreml can't build.*operator `catalogue::twice_plus`.*models\.py"):
        build(captured(tmp_path, "CustomOperator"), row(), "fp32", tmp_path)
    with pytest.raises(UsageError, match=r"(?s)value of `deployment_target` `iOS71`.*did you mean `iOS1"):
        build(captured(tmp_path, "CustomOperator"), row(deployment_target="iOS71"), "fp32", tmp_path)


@pytest.mark.skipif(host.system() == "macos", reason="Core ML runs here")
def test_it_is_not_run_here_and_broken_packages_are_refused_all_the_same(tmp_path):
    built = engine(tmp_path / "engine", captured(tmp_path, "ConvBatchNorm"), row())
    anywhere = row().model_copy(update={"platform": "any", "machine": "any"})

    assert "it is for ios" in (BACKEND.not_runnable(row()) or "")
    assert "Core ML runs on macOS" in (BACKEND.not_runnable(anywhere) or "")
    with pytest.raises(UnavailableError, match="can't be run on this host"), BACKEND.load(built, row()):
        pytest.fail("it was loaded")
    (built.path / package.PACKAGE / package.MODEL).write_bytes(b"not a model")
    with pytest.raises(BuildError, match="is no Core ML model"), BACKEND.load(built, row()):
        pytest.fail("it was loaded")

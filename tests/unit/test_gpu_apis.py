"""Our calls of TensorRT and Torch-TensorRT, against names and signatures from their own wheels (tests/apis).

mypy does the comparing: it knows what each call returns, so that a method is looked for in the right class.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import host, tensorrt_plan
from tests.apis import extract
from tests.apis.wheels import WHEELS

ROOT = Path(__file__).parents[2]
APIS = ROOT / "tests" / "apis"
TENSORRT = ["tensorrt-10.3", "tensorrt-10.16", "tensorrt-11.4"]
CHECKED = ["tensorrt_build.py", "tensorrt_run.py", "torch_tensorrt_build.py"]


def faults(version, *files, cache):
    """What mypy has to say of `files`, with the stubs of that version."""
    stubs = os.pathsep.join(str(APIS / name) for name in (version, "torch_tensorrt-2.13"))
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--ignore-missing-imports"]
    more = ["--python-version=3.12", "--implicit-optional", "--no-error-summary", f"--cache-dir={cache}"]
    environment = os.environ | {"MYPYPATH": stubs}
    done = subprocess.run([*command, *more, *files], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("version", TENSORRT)
def test_every_call_is_in_the_api(version, cache):
    files = [str(ROOT / "pipeline" / name) for name in CHECKED]

    assert faults(version, *files, cache=cache) == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        ("tensorrt_build.py", "builder_optimization_level", "builder_level", 'has no attribute "builder_level"'),
        ("tensorrt_build.py", "ignore_mismatch=", "ignore=", 'Unexpected keyword argument "ignore"'),
        ("tensorrt_build.py", "BuilderFlag.TF32", "BuilderFlag.TF31", 'has no attribute "TF31"'),
        ("tensorrt_build.py", "error.node_operator()", "error.operator()", 'has no attribute "operator"'),
        ("tensorrt_run.py", "execute_async_v3(stream", "execute_async_v2(stream", 'no attribute "execute_async_v2"'),
        ("tensorrt_run.py", "set_tensor_address(name, ", "set_tensor_address(", "Missing positional argument"),
        ("torch_tensorrt_build.py", "workspace_size=", "workspace=", 'Unexpected keyword argument "workspace"'),
        ("torch_tensorrt_build.py", "shared_dims=", "shared=", 'Unexpected keyword argument "shared"'),
        ("torch_tensorrt_build.py", "enable_cudagraphs", "cudagraphs", 'has no attribute "cudagraphs"'),
    ],
)
def test_an_api_that_moved_would_be_seen(tmp_path, cache, file, old, new, match):
    text = (ROOT / "pipeline" / file).read_text()
    assert old in text
    spoilt = tmp_path / file
    spoilt.write_text(text.replace(old, new))

    assert match in faults("tensorrt-11.4", str(spoilt), cache=cache)


def test_hardware_levels_are_those_of_tensorrt():
    """One of them is looked up by name, since TensorRT 10.3 lacks it."""
    levels = {name.upper() for name in tensorrt_plan.HARDWARE}

    for version, lacking in (("tensorrt-10.3", {"SAME_COMPUTE_CAPABILITY"}), ("tensorrt-11.4", set())):
        text = (APIS / version / "tensorrt.pyi").read_text().partition("class HardwareCompatibilityLevel:")[2]
        known = text.partition("\nclass ")[0]

        assert {name for name in levels if f"{name}: Hardware" not in known} == lacking


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.folder)
def test_stubs_are_what_the_wheels_say(wheel):
    if sys.version_info[:2] != (3, 11) or host.machine() != "x86_64":
        pytest.skip("the pinned wheels are for Python 3.11 on x86_64")
    lacking = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if lacking:
        pytest.skip(f"there is no `{lacking[0]}`")
    try:
        wheel.path()
    except OSError as error:
        pytest.skip(f"{error}")

    for name, text in extract.stubs(wheel).items():
        assert (APIS / wheel.folder / name).read_text() == text

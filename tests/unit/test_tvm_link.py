"""Engines for other machines: what is missing, what they need there, and what is said about it. Nothing is built."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline import choice, emulator, host, summary, targets
from pipeline.backends import tvm
from pipeline.errors import UnavailableError, UsageError
from pipeline.tvm import link as tvm_link
from pipeline.tvm import remote as tvm_remote
from pipeline.types import LatencyReport, ParityReport, Target
from tests.arm import row

CROSS = [("armv7l", "linux"), ("riscv64", "linux"), ("aarch64", "android")]


@pytest.fixture
def x86(monkeypatch):
    monkeypatch.setattr(host, "machine", lambda: "x86_64")
    monkeypatch.setattr(host, "system", lambda: "linux")
    monkeypatch.setattr(tvm.host, "has_module", lambda name: True)


@pytest.fixture
def bare(monkeypatch, x86):
    """A host without any compiler."""
    monkeypatch.setattr(host, "has_module", lambda name: name != "ziglang")
    monkeypatch.setattr(tvm_link.shutil, "which", lambda name: None)
    tvm_link._compiler.cache_clear()
    yield
    tvm_link._compiler.cache_clear()


@pytest.mark.parametrize(
    ("target", "way"),
    [
        (row("x86_64", "native"), "(Debian package `g++`)"),
        (row(), "(`pip install ziglang` or Debian package `g++-aarch64-linux-gnu`)"),
        (row("armv7l", "cortex-a7"), "`g++-arm-linux-gnueabihf`"),
        (row(platform="android"), "(`pip install ziglang`)"),
        (row("x86_64", "znver3", "windows"), "it makes engines for linux on x86_64, linux on aarch64"),
    ],
)
def test_what_is_missing_comes_with_the_way_to_get_it(bare, target, way):
    assert way in tvm.BACKEND.missing(target)


def test_object_files_need_no_linker(bare):
    assert tvm.BACKEND.missing(row("wasm32", "generic", "web")) is None


@pytest.mark.parametrize(("machine", "platform"), CROSS)
def test_ziglang_links_for_other_machines(x86, machine, platform):
    linker = tvm_link.linker(row(machine, "generic", platform))

    assert linker is not None
    assert linker.version.startswith("zig ")


def test_runtime_is_named_with_its_size(x86):
    needs = tvm_link.needs_of(row("x86_64", "native"))
    library = Path(find_spec("tvm_ffi").submodule_search_locations[0]) / "lib" / "libtvm_ffi.so"

    assert needs["files"]["libtvm_ffi.so"] == pytest.approx(library.stat().st_size, rel=0.1)
    assert needs["about_bytes"] == sum(needs["files"].values())
    assert "manylinux_2_28_aarch64" in tvm_link.needs_of(row())["source"]
    assert tvm_link.needs_of(row("riscv64", "generic-rv64"))["about_bytes"] is None


def test_without_an_emulator_doctor_knows_how_to_get_one(x86, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert tvm.BACKEND.not_runnable(row()) == (
        "it is for aarch64, this host is x86_64, and there is no emulator (`exportyard setup emulator` gets it)"
    )
    assert "no wheel has TVM's runtime for it" in tvm.BACKEND.not_runnable(row("riscv64", "generic-rv64"))
    assert "emscripten must link it" in tvm.BACKEND.not_runnable(row("wasm32", "generic", "web"))


def test_emulator_of_another_version_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    emulator.folder().mkdir(parents=True)
    (emulator.folder() / emulator.MANIFEST).write_text(json.dumps({"versions": {"apache-tvm": "0.1"}}))

    assert "of other versions" in emulator.absent()
    with pytest.raises(UnavailableError, match="exportyard setup emulator"), emulator.serving("cortex-a72"):
        pass


def test_fetching_where_there_are_no_packages_is_explained(x86, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)

    with pytest.raises(UnavailableError, match=r"(?s)no `apt-get` here.*hint:"):
        emulator.fetch(lambda part: None)
    assert not list(emulator.folder().parent.glob("*")), "nothing half made stays"


# --- devices -------------------------------------------------------------------------------------------------------


def test_silent_board_is_a_reason_not_to_run(x86):
    target = row(device={"rpc": "127.0.0.1:1"})

    assert tvm_remote.unreachable(target) == (
        "no RPC server answers at 127.0.0.1:1 (`python -m tvm.exec.rpc_server` on the device starts one)"
    )


@pytest.mark.parametrize("address", ["board", "board:", ":9090", "board:port", "a b:1"])
def test_address_has_host_and_port(address):
    with pytest.raises(ValueError, match="rpc"):
        row(device={"rpc": address})


def test_device_of_a_backend_that_has_none_is_refused():
    target = row(backend="echo", device={"rpc": "board:9090"})

    with pytest.raises(UsageError, match="backend `echo` can't run engines on a device"):
        targets.check_options(target, ["sleep_ms"])


# --- times that nobody measured ------------------------------------------------------------------------------------


def test_only_emulated_engines_are_not_timed(x86):
    assert targets.not_measured(row()) == "not measured on the device: it is for aarch64, this host is x86_64"
    assert targets.not_measured(row("x86_64", "native")) is None
    assert targets.not_measured(row(device={"rpc": "board:9090"})) is None


def report(scheme, passed):
    metric = {"name": "m", "eager": 1, "engine": 1, "drop": 0, "budget": 0, "samples": 1}
    return ParityReport.model_validate(
        {"recipe": "r", "target": "t", "scheme": scheme, "sizes": [], "metric": metric, "passed": passed}
        | ({} if passed else {"reasons": ["is bad"]})
    )


def test_without_times_the_row_decides():
    target = Target.model_validate(
        row().model_dump() | {"schemes": ["int8-s8s8", "fp32"], "vs_onnx": {n: {"max_abs": 1} for n in SCHEMES}}
    )
    latency = LatencyReport(recipe="r", target="t", cpu="c", rows=(), not_measured="not measured on the device")
    parities = {scheme: report(scheme, True) for scheme in SCHEMES}

    assert choice.choose(target, parities, latency, {}) == (
        "int8-s8s8",
        "the row's first form that passed (not measured on the device)",
    )
    assert summary._speed(latency, "fp32") == ["not measured", ""]


SCHEMES = ("int8-s8s8", "fp32")

"""A release for the programs in examples/consumers: several engines, and outputs of two kinds."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline import attest, depots, layout, manifest, run, trust
from pipeline.stages.publish import lay_out
from pipeline.workspace import Workspace
from tests import workspaces

EXAMPLES = Path(__file__).parents[1] / "examples" / "consumers"
ORT, BUCKETS, TVM, ARM_TVM = "any-onnxruntime", "buckets-onnxruntime", "linux-x86_64-tvm", "linux-aarch64-tvm"

MODEL = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        '''Images [batch, 1, 8, 8] and shift int64 [batch] -> logits [batch, 4] and label int64 [batch].'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(4 * 8 * 8, 4)

        def forward(self, images, shift):
            logits = self.head(torch.relu(self.conv(images)).flatten(1))
            return logits, logits.argmax(1) + shift

    def build():
        return Tiny()
"""

RECIPE = """
    name = "tiny"
    summary = "four made-up classes, with a shift"
    checkpoint = "weights.safetensors"
    factory = "model:build"

    [axes]
    batch = { min = 1, opt = 2, max = 4 }

    [[inputs]]
    name = "images"
    dtype = "float32"
    shape = ["batch", 1, 8, 8]
    range = [0.0, 1.0]

    [[inputs]]
    name = "shift"
    dtype = "int64"
    shape = ["batch"]
    range = [0, 9]

    [[outputs]]
    name = "logits"
    kind = "logits"

    [[outputs]]
    name = "label"
    kind = "indices"

    [evaluation]
    data = "evaluation.npz"
    metric = "agreement"

    [budget]
    drop = 0.05
"""

ORT_ROW = """
    [targets.{name}]
    backend = "onnxruntime"
    platform = "any"
    machine = "any"
    arch = "generic"
    schemes = ["fp32"]
    vs_onnx = {{ fp32 = {{ sqnr_db = 80 }} }}
"""

TVM_ROW = """
    [targets.linux-{machine}-tvm]
    backend = "tvm"
    platform = "linux"
    machine = "{machine}"
    arch = "{arch}"
    schemes = ["fp32"]
    vs_onnx = {{ fp32 = {{ sqnr_db = 80 }} }}
"""


ROWS = (
    ORT_ROW.format(name=ORT)
    + (ORT_ROW.format(name=BUCKETS) + "    buckets = { batch = [1, 3] }\n")
    + TVM_ROW.format(machine="x86_64", arch="x86-64-v3")
)
ARM_ROWS = ORT_ROW.format(name=ORT) + TVM_ROW.format(machine="aarch64", arch="cortex-a72")


def released(root: Path, *, rows: str, recipe: str = RECIPE, model: str = MODEL, key: Path | None = None) -> Path:
    """The folder of release 1.0.0 of `tiny`, made in the workspace `root`; signed with `key`, not tagged or pushed."""
    workspaces.tiny(root, rows=rows, recipe=recipe, model=model)
    shift = np.arange(32) % 10
    np.savez(root / "recipes" / "tiny" / "evaluation.npz", images=workspaces.images(32, 2), shift=shift)
    job = run.prepare(Workspace(root), "tiny")
    verdicts = run.export(job)
    assert [found.status for found in verdicts] == ["passed"] * len(verdicts), [found.reason for found in verdicts]
    sources = job.program().stored, job.checkpoint().stored, job.data().stored
    out = root.parent / "release"
    out.mkdir()
    chosen, beside = [found.chosen() for found in verdicts], attest.names(key)
    lay_out(job.recipe, chosen, {}, {}, *sources, "1.0.0", "0" * 40, False, out, beside=beside)
    attest.write(out, None, key)
    return out


def ran(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code of a program, and all that it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=120)
    return done.returncode, done.stdout + done.stderr


def shelved(release: Path, registry: Path, channel: str, serial: int, key: Path) -> None:
    """Put a release into a registry, as its version and as `channel`, whose assignment is signed with `key`."""
    registry.mkdir(parents=True, exist_ok=True)
    depot = depots.at(registry)
    made = manifest.parse((release / manifest.FILE).read_text(), str(release))
    top = layout.lay_out(release, depot).digest
    said = {
        "_type": trust.STATEMENT,
        "subject": [{"name": made.recipe, "digest": {"sha256": top.removeprefix("sha256:")}}],
        "predicateType": "urn:exportyard:channel:v1",
        "predicate": {"recipe": made.recipe, "channel": channel, "version": made.version, "serial": serial},
    }
    more = {
        layout.NAME: channel,
        layout.OF_CHANNEL: channel,
        "dev.exportyard.serial": str(serial),
        "dev.exportyard.statement": layout.put_blob(depot, made.recipe, trust.sign_statement(said, key)),
    }

    def assigned(index: layout.Index) -> layout.Index:
        entry = index.releases()[made.version]
        before = [one for one in index.entries if layout.notes(one).get(layout.OF_CHANNEL) == channel]
        fresh = entry | {"annotations": layout.notes(entry) | more}
        return layout.Index(made.recipe, (*index.without(before).entries, fresh))

    layout.change(depot, made.recipe, assigned)


def package(name: str) -> Path:
    """The folder of an installed package."""
    found = find_spec(name)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


ZIG = (sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.28", "-s")
"""Compiles for 64-bit Arm; TVM's libraries need some of a C library that is there on the device only."""


def ort_run(compiler: Sequence[str], out: Path) -> Path:
    """The C++ consumer for ONNX Runtime, compiled."""
    source = EXAMPLES / "cpp_onnxruntime" / "ort_run.cc"
    subprocess.run([*compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", source, "-o", out, "-ldl"], check=True)
    return out


def tvm_run(compiler: Sequence[str], libraries: Sequence[Path], out: Path) -> Path:
    """The C++ consumer for TVM, compiled and linked with the libraries in these folders."""
    source = EXAMPLES / "tvm_cpp" / "tvm_run.cc"
    command = [*compiler, "-std=c++17", "-O1", f"-I{package('tvm_ffi') / 'include'}", source, "-o", out]
    places = [f"-L{folder}" for folder in libraries]
    subprocess.run([*command, *places, "-Wl,--no-as-needed", "-ltvm_ffi", "-ltvm_runtime"], check=True)
    return out


def tvm_libraries() -> list[Path]:
    """The folders with TVM's libraries for this host."""
    return [package("tvm_ffi") / "lib", package("tvm") / "lib"]

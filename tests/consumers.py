"""A release for the programs in examples/consumers, published for real: several engines, and outputs of two kinds."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np

from pipeline import emulator, initial, release, run
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


def rows() -> str:
    """Rows in TOML; one for Arm, if it can be emulated here."""
    found = [ORT_ROW.format(name=ORT), ORT_ROW.format(name=BUCKETS) + "    buckets = { batch = [1, 3] }\n"]
    found.append(TVM_ROW.format(machine="x86_64", arch="x86-64-v3"))
    if emulator.absent() is None:
        found.append(TVM_ROW.format(machine="aarch64", arch="cortex-a72"))
    return "".join(found)


def published(root: Path, *, rows: str, recipe: str = RECIPE, model: str = MODEL) -> Path:
    """The workspace `root` with v1.0.0 of `tiny`; its release is in artifacts/tiny/release."""
    workspaces.tiny(root, rows=rows, recipe=recipe, model=model)
    shift = np.arange(32) % 10
    np.savez(root / "recipes" / "tiny" / "evaluation.npz", images=workspaces.images(32, 2), shift=shift)
    workspaces.under_git(root)
    initial.init(root, root.parent / "remote")
    job = run.prepare(Workspace(root), "tiny")
    verdicts = run.export(job)
    assert [found.status for found in verdicts] == ["passed"] * len(verdicts), [found.reason for found in verdicts]
    release.publish(job, verdicts, allow_dirty=True)
    return root


def ran(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code of a program, and all that it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=120)
    return done.returncode, done.stdout + done.stderr


def shelved(release: Path, registry: Path, channel: str) -> None:
    """Put one release folder into a fresh registry, as its version and as `channel`."""
    manifest = json.loads((release / "manifest.json").read_text())
    home = registry / manifest["recipe"]
    (home / "blobs" / "sha256").mkdir(parents=True)

    def blob(content: bytes, media: str, **more: object) -> dict[str, object]:
        name = hashlib.sha256(content).hexdigest()
        (home / "blobs" / "sha256" / name).write_bytes(content)
        return {"mediaType": media, "digest": f"sha256:{name}", "size": len(content), **more}

    def part(names: list[str], kind: str, annotations: dict[str, str]) -> dict[str, object]:
        layers = [
            blob(
                (release / name).read_bytes(),
                "application/octet-stream",
                annotations={"org.opencontainers.image.title": name},
            )
            for name in names
        ]
        text = json.dumps({"schemaVersion": 2, "artifactType": kind, "layers": layers})
        return blob(text.encode(), "application/vnd.oci.image.manifest.v1+json", annotations=annotations)

    common = ["manifest.json", "golden.safetensors"]
    parts = [part(common, "application/vnd.exportyard.release.v1", {"dev.exportyard.part": "release"})]
    for target, engine in manifest["engines"].items():
        files = [file["path"] for file in engine["files"]]
        parts.append(part(common + files, "application/vnd.exportyard.engine.v1", {"dev.exportyard.target": target}))
    whole = json.dumps({"schemaVersion": 2, "manifests": parts}).encode()
    kind = {"artifactType": "application/vnd.exportyard.release.v1"}
    version = {"dev.exportyard.version": manifest["version"]}
    notes = [
        {"org.opencontainers.image.ref.name": f"v{manifest['version']}", **version},
        {"org.opencontainers.image.ref.name": channel, "dev.exportyard.channel": channel, **version},
    ]
    entries = [blob(whole, "application/vnd.oci.image.index.v1+json", annotations=note, **kind) for note in notes]
    (home / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))

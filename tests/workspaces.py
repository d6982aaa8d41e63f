"""Workspaces for tests: small, real, and quick to export."""

import subprocess
from pathlib import Path
from textwrap import dedent

import numpy as np
from safetensors.numpy import save_file

MODEL = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        '''Images [batch, 1, 8, 8] -> logits [batch, 4].'''

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(4 * 8 * 8, 4)

        def forward(self, images):
            return self.head(torch.relu(self.conv(images)).flatten(1))

    def build():
        return Tiny()
"""

RECIPE = """
    name = "tiny"
    summary = "four made-up classes"
    checkpoint = "weights.safetensors"
    factory = "model:build"

    [axes]
    batch = { min = 1, opt = 2, max = 4 }

    [[inputs]]
    name = "images"
    dtype = "float32"
    shape = ["batch", 1, 8, 8]
    range = [0.0, 1.0]

    [[outputs]]
    name = "logits"
    kind = "logits"

    [calibration]
    data = "calibration.npz"

    [evaluation]
    data = "evaluation.npz"
    metric = "agreement"

    [budget]
    drop = 0.05
"""

ROWS = """
    [targets.any-onnxruntime]
    backend = "onnxruntime"
    platform = "any"
    machine = "any"
    arch = "generic"
    schemes = ["int8-u8u8", "fp32"]
    options = { optimization = "extended" }
    vs_onnx = { fp32 = { sqnr_db = 80 }, int8-u8u8 = { sqnr_db = 25 } }

    [targets.any-echo]
    backend = "echo"
    platform = "any"
    machine = "any"
    arch = "none"
    schemes = ["fp32"]
    options = { reference = true }
    vs_onnx = { fp32 = { sqnr_db = 80 } }
"""


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict for `MODEL`."""
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "head.weight": (4, 256), "head.bias": (4,)}
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def images(count: int, seed: int) -> np.ndarray:
    """Images float32 [count, 1, 8, 8] in 0 to 1."""
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def tiny(root: Path, *, rows: str = ROWS, recipe: str = RECIPE, model: str = MODEL) -> Path:
    """A workspace with the recipe `tiny`; returns `root`."""
    folder = root / "recipes" / "tiny"
    folder.mkdir(parents=True)
    (root / "targets").mkdir()
    (root / "targets" / "targets.toml").write_text(dedent(rows))
    (folder / "recipe.toml").write_text(dedent(recipe))
    (folder / "model.py").write_text(dedent(model))
    save_file(weights(), folder / "weights.safetensors")
    np.savez(folder / "calibration.npz", images=images(16, 1))
    np.savez(folder / "evaluation.npz", images=images(32, 2))
    return root


def under_git(root: Path) -> Path:
    """`root` as a git repository whose content is committed, with an identity of its own."""
    for arguments in (
        ["init", "-q", "-b", "main"],
        ["config", "user.name", "test"],
        ["config", "user.email", "test@example.com"],
        ["add", "-A"],
        ["commit", "-q", "-m", "workspace"],
    ):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    return root


def echo_row(name: str, options: str = "", pool: str = "cpu") -> str:
    """A row whose engines are right, in TOML; `options` are more of its backend's."""
    return dedent(f"""
        [targets.{name}]
        backend = "echo"
        platform = "any"
        machine = "any"
        arch = "any"
        schemes = ["fp32"]
        vs_onnx = {{ fp32 = {{ sqnr_db = 80 }} }}
        pool = "{pool}"
        options = {{ reference = true{f", {options}" if options else ""} }}
    """)

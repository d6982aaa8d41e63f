"""What the tool costs on top of the libraries: CPU seconds of a build against a bare script of the same calls.

Run it with ``python benchmarks/overhead.py [RECIPE ...]``. Both sides run in processes of their own, in turn, and do
the same work with the same libraries: load the checkpoint, export, convert to ONNX, quantise dynamically, and build
the engines of one target. (Static INT8 is left out: its search measures what a script would
not.) The ratio is of user plus system CPU seconds, the median over the rounds. It prints too what
``exportyard --help`` and an export with nothing to do cost.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TARGET = "any-onnxruntime"
ROW = """
[targets.any-onnxruntime]
backend = "onnxruntime"
platform = "any"
machine = "any"
arch = "generic"
schemes = ["int8-dynamic", "fp32"]
options = { optimization = "extended" }
vs_onnx = { int8-dynamic = { sqnr_db = 25 }, fp32 = { max_over_peak = 1e-4 } }
"""
CLI = [sys.executable, "-m", "pipeline"]


def cpu_s(command: list[str]) -> float:
    """CPU seconds, user and system, of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def workspace(root: Path, recipe: str) -> Path:
    """A workspace with one recipe, whose checkpoint is made already: training is no part of a build."""
    shutil.copytree(ROOT / "recipes" / recipe, root / "recipes" / recipe)
    (root / "targets").mkdir()
    (root / "targets/targets.toml").write_text(ROW)
    settings = root / "recipes" / recipe / "recipe.toml"
    settings.write_text(re.sub(r"^targets = \[[^]]*\]\n", "", settings.read_text(), flags=re.MULTILINE))
    subprocess.run([*CLI, "make", recipe, "checkpoint", "-C", str(root)], check=True, cwd=ROOT, capture_output=True)
    subprocess.run([*CLI, "make", recipe, "data", "-C", str(root)], check=True, cwd=ROOT, capture_output=True)
    return root


def forget(root: Path, recipe: str) -> None:
    """Back to where only checkpoint and data are made."""
    for name in ("program", "onnx", "statistics", "engine"):
        shutil.rmtree(root / "artifacts" / recipe / name, ignore_errors=True)


def compare(recipe: str, rounds: int) -> None:
    """Print the ratio for one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        root = workspace(Path(folder), recipe)
        ours, bare = [], []
        for _ in range(rounds):
            forget(root, recipe)
            ours.append(cpu_s([*CLI, "make", recipe, f"engine/{TARGET}", "-C", str(root)]))
            bare.append(cpu_s([sys.executable, str(HERE / "bare_build.py"), str(root), recipe, TARGET]))
        ratio = statistics.median(one / two for one, two in zip(ours, bare, strict=True))
        print(
            f"{recipe:<10} exportyard {statistics.median(ours):7.2f} s  bare {statistics.median(bare):7.2f} s   "
            f"ratio {ratio:.3f}   ({rounds} rounds)",
            flush=True,
        )


def idle(rounds: int) -> None:
    """Print what it costs to ask for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        root = workspace(Path(folder), "digits")
        subprocess.run([*CLI, "export", "digits", "-C", str(root)], cwd=ROOT, capture_output=True, check=False)
        for name, command in (
            ("exportyard --help", ["--help"]),
            ("exportyard export digits, nothing to do", ["export", "digits", "-C", str(root)]),
        ):
            found = [cpu_s([*CLI, *command]) for _ in range(rounds)]
            print(f"{name:<42} {statistics.median(found):.2f} s of CPU (least {min(found):.2f})", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="*", default=["digits", "minilm", "resnet50"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    idle(5)
    for recipe in options.recipes:
        compare(recipe, options.rounds)


if __name__ == "__main__":
    main()

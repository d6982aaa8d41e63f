"""Peak memory and time of calibration: ours against ONNX Runtime's entropy calibrator, on ResNet-50.

Each measurement is a process of its own. Ours collects everything that minmax, entropy, percentile and mse need.
ONNX Runtime's is left out above `--theirs-up-to` images, since it keeps every activation of every image.

    python benchmarks/calibration.py --images 8 32 256
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

SIDE = 224
WIDTH = "{:>8}  {:<22}  {:>10}  {:>10}  {:>10}"


def export(path: Path) -> None:
    """ResNet-50 of transformers with seeded random weights, one image at a time."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    with torch.no_grad():  # some statistics in the batch norms, so that activations keep their scale
        model.train()
        for _ in range(3):
            model(torch.randn(4, 3, SIDE, SIDE))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), (torch.randn(1, 3, SIDE, SIDE),), dynamo=True, input_names=["image"], output_names=["logits"]
        )
    assert program is not None
    program.save(str(path))


def images(count: int) -> Iterator[dict[str, object]]:
    """`count` seeded images, made one by one."""
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"image": rng.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)}


def ours(model: Path, count: int) -> None:
    """Statistics, and the entropy ranges from them."""
    from pipeline import calibrate

    calibrate.ranges(calibrate.collect(model, images(count)), "entropy")


def theirs(model: Path, count: int) -> None:
    """The same tensors through onnxruntime.quantization, with its default settings."""
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    class Reader:
        """What their calibrator reads from."""

        feeds = images(count)

        def get_next(self) -> dict[str, object] | None:
            """The next image, None at the end."""
            return next(self.feeds, None)

    kinds = sorted({node.op_type for node in onnx.load(model).graph.node} & {"Conv", "Relu", "Add", "MaxPool", "Gemm"})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(model, kinds, f"{folder}/augmented.onnx", CalibrationMethod.Entropy)
        calibrator.collect_data(Reader())
        calibrator.compute_data()


RUNS = {"ours": ours, "onnxruntime entropy": theirs}


def measure(model: Path, which: str, count: int) -> dict[str, float]:
    """Run one of `RUNS` in a process of its own."""
    command = [sys.executable, __file__, "--run", which, "--model", str(model), "--images", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table, or do one run for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--theirs-up-to", type=int, default=32)
    parser.add_argument("--model", type=Path, help="an ONNX file with the input `image`; made if not given")
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options.run:
        start, used = time.perf_counter(), time.process_time()
        RUNS[options.run](options.model, options.images[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - used, "peak_bytes": peak}
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "resnet50.onnx"
        if options.model is None:
            export(model)
        print(WIDTH.format("images", "calibrator", "peak", "wall", "cpu"))
        for count in options.images:
            for which in RUNS:
                if which != "ours" and count > options.theirs_up_to:
                    continue
                found = measure(model, which, count)
                size, wall, cpu = found["peak_bytes"] / 1e9, found["wall_s"], found["cpu_s"]
                print(WIDTH.format(count, which, f"{size:.2f} GB", f"{wall:.1f} s", f"{cpu:.1f} s"), flush=True)


if __name__ == "__main__":
    main()

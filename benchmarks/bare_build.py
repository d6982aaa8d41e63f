"""The other side of ``overhead.py``: what a careful engineer's script does with the same libraries, and nothing else.

``python bare_build.py WORKSPACE RECIPE TARGET``: load the checkpoint, torch.export, torch.onnx.export, check,
calibrate and quantise by onnxruntime.quantization in the row's INT8 form, and let ONNX Runtime optimise each graph.
No parity, no digests, no error messages.
"""

from __future__ import annotations

import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime import quantization as quant
from safetensors import safe_open
from safetensors.torch import load_file

warnings.filterwarnings("ignore")
FORMS = {"u8": quant.QuantType.QUInt8, "s8": quant.QuantType.QInt8}


class Reader(quant.CalibrationDataReader):
    """Calibration samples from the shards that the tool wrote."""

    def __init__(self, folder: Path) -> None:
        self._samples = self._read(folder)

    @staticmethod
    def _read(folder: Path):
        for shard in sorted(folder.glob("calibration-*.safetensors")):
            with safe_open(shard, framework="numpy") as file:
                samples: dict[str, dict[str, np.ndarray]] = {}
                for key in sorted(file.keys()):
                    index, _, name = key.partition("/")
                    samples.setdefault(index, {})[name] = file.get_tensor(key)
                yield from samples.values()

    def get_next(self):
        """The next feeds; None at the end."""
        return next(self._samples, None)


def main() -> None:
    """Entry point."""
    root, name, target = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    recipe = tomllib.loads((root / "recipes" / name / "recipe.toml").read_text())
    row = tomllib.loads((root / "targets/targets.toml").read_text())["targets"][target]
    sys.path.insert(0, str(root / "recipes" / name))
    module, _, factory = recipe["factory"].partition(":")
    model = getattr(__import__(module), factory)().eval()
    model.load_state_dict(load_file(root / "artifacts" / name / "checkpoint/model.safetensors"))
    sizes = {axis: max(bounds["opt"], 2) + place for place, (axis, bounds) in enumerate(recipe["axes"].items())}
    dims = {axis: torch.export.Dim(axis, min=b["min"], max=b["max"]) for axis, b in recipe["axes"].items()}
    arguments = tuple(_example(spec, sizes) for spec in recipe["inputs"])
    shapes = tuple(
        {place: dims[dim] for place, dim in enumerate(spec["shape"]) if isinstance(dim, str)}
        for spec in recipe["inputs"]
    )
    out = root / "bare"
    out.mkdir(exist_ok=True)
    program = torch.export.export(model, arguments, dynamic_shapes=shapes)
    torch.export.save(program, out / "program.pt2")
    names = [spec["name"] for spec in recipe["inputs"]]
    graph = torch.onnx.export(program, (), dynamo=True, input_names=names, opset_version=20, verbose=False)
    graph.save(out / "fp32.onnx")
    onnx.checker.check_model(str(out / "fp32.onnx"), full_check=True)
    for scheme in row["schemes"]:
        if scheme == "int8-dynamic":
            # its shape inference trips over its own rewrites where the exporter has noted the shapes of values
            plain = onnx.load(out / "fp32.onnx")
            del plain.graph.value_info[:]
            quant.quantize_dynamic(plain, out / f"{scheme}.onnx", op_types_to_quantize=["MatMul", "Gemm"])
        elif scheme.startswith("int8"):
            ready = out / "ready.onnx"
            quant.quant_pre_process(out / "fp32.onnx", ready, skip_symbolic_shape=True)
            activations, weights = FORMS[scheme[5:7]], FORMS[scheme[7:9]]
            quant.quantize_static(
                ready,
                out / f"{scheme}.onnx",
                Reader(root / "artifacts" / name / "data"),
                activation_type=activations,
                weight_type=weights,
                per_channel=True,
            )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out / f"{scheme}.engine.onnx")
        ort.InferenceSession(out / f"{scheme}.onnx", options, providers=["CPUExecutionProvider"])


def _example(spec, sizes):
    shape = [sizes.get(dim, dim) for dim in spec["shape"]]
    if spec["dtype"].startswith("int"):
        return torch.ones(shape, dtype=getattr(torch, spec["dtype"]))
    return torch.rand(shape)


if __name__ == "__main__":
    main()

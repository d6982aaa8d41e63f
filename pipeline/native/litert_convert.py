"""Run by the environment of `exportyard setup litert`: PROGRAM.pt2 -> MODEL.tflite, called by the names in a JSON text.

It imports nothing of exportyard, which is not installed there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of quantised programs


class Named(torch.nn.Module):
    """A program that takes its inputs, and returns its outputs, by name."""

    def __init__(self, program: Any, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.program, self.inputs, self.outputs = program, inputs, outputs

    def forward(self, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        return dict(zip(self.outputs, self.program(*(feeds[name] for name in self.inputs)), strict=True))


def quantised(program: torch.export.ExportedProgram) -> bool:
    """Whether PT2E has been at it."""
    return any(str(node.target).startswith("quantized_decomposed") for node in program.graph.nodes)


def settings(program: torch.export.ExportedProgram) -> Any:
    """The converter must be told that a program is quantised, and how."""
    if not quantised(program):
        return None
    from litert_torch.quantize import pt2e_quantizer, quant_config

    weights = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    return quant_config.QuantConfig(pt2e_quantizer=pt2e_quantizer.PT2EQuantizer().set_global(weights))


def main() -> None:
    """Arguments: the program, the model to write, and ``{"inputs": {name: [shape, dtype]}, "outputs": [name]}``."""
    import litert_torch

    source, path, text = sys.argv[1:]
    wanted = json.loads(text)
    program = torch.export.load(source)
    examples = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in wanted["inputs"].items()
    }
    model = Named(program.module(check_guards=False), list(wanted["inputs"]), wanted["outputs"])
    litert_torch.convert(model, sample_kwargs=examples, quant_config=settings(program)).export(path)


if __name__ == "__main__":
    main()

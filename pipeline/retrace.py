"""Programs traced again: after they were quantised, or because another trace suits a compiler better."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic  # torch has no public switch for it

from pipeline import program as programs
from pipeline.types import Signature, Sizes


def retraced(module: torch.nn.Module, signature: Signature, sizes: Sizes) -> ExportedProgram:
    """The module of a program as a program again, with the same axes.

    Args:
        module: takes the signature's inputs by position.
        signature: what it serves.
        sizes: of the axes while it is traced; a compiler that compares a size with a constant sees these.

    Raises:
        Exception: whatever torch's tracer meets.
    """
    dynamic = tuple(
        {
            place: Dim.AUTO(min=signature.axes[dim].min, max=signature.axes[dim].max)
            for place, dim in enumerate(spec.shape)
            if isinstance(dim, str) and signature.axes[dim].min < signature.axes[dim].max
        }
        for spec in signature.inputs
    )
    examples: tuple[Any, ...] = programs.examples(signature, sizes)
    # as at capture: without it, an axis whose min is 1 comes back as 2 and more
    with programs.quiet(), symbolic.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)

"""What is doubtful about calibration data, though it can be used: too little of it, or other values than in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import InputSpec

LEAST_ROWS = 8
LEAST_COVER = 0.5
MOST_WIDTH = 10.0


@dataclass
class Spread:
    """What was seen of some data: its rows, and the least and greatest value of each floating-point input."""

    inputs: Iterable[InputSpec]
    rows: int = 0
    ends: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Count one call of the model; its rows are those of the input that has most along an axis in front."""
        self.rows += max(
            (len(arrays[s.name]) for s in self.inputs if s.shape and isinstance(s.shape[0], str)), default=1
        )
        for spec in self.inputs:
            array = arrays[spec.name]
            if spec.dtype.startswith("float") and array.size:
                low, high = self.ends.get(spec.name, (np.inf, -np.inf))
                self.ends[spec.name] = min(low, float(array.min())), max(high, float(array.max()))

    def constant(self) -> tuple[str, float] | None:
        """An input that has one value everywhere, and that value."""
        return next(((name, low) for name, (low, high) in self.ends.items() if low == high), None)


def warnings(calibration: Spread, evaluation: Spread) -> list[str]:
    """What to tell the user about calibration data, beside evaluation data that shows what the model meets."""
    found = []
    if calibration.rows < LEAST_ROWS:
        found.append(
            f"[calibration] has {calibration.rows} rows; ranges read from fewer than {LEAST_ROWS} are chance, "
            "100 to 500 are usual"
        )
    for name, known in calibration.ends.items():
        far = _far(known, evaluation.ends.get(name, (0.0, 0.0)))
        if far is not None:
            found.append(f"[calibration] input `{name}` {far}")
    return found


def _far(known: tuple[float, float], met: tuple[float, float]) -> str | None:
    """How the range `known` from calibration misses the range `met` in evaluation, or None if it doesn't."""
    width = met[1] - met[0]
    if width <= 0:
        return None
    spans = f"goes from {known[0]:.4g} to {known[1]:.4g}, in [evaluation] from {met[0]:.4g} to {met[1]:.4g}"
    cover = max(0.0, min(known[1], met[1]) - max(known[0], met[0])) / width
    if cover < LEAST_COVER:
        return f"{spans}: INT8 will cut off what calibration has not seen"
    if known[1] - known[0] > MOST_WIDTH * width:
        return f"{spans}: INT8 will spend its steps on values that don't occur"
    return None

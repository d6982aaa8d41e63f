"""What an allocation is worth: how much of what the query asks for it has found."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Call = Mapping[str, NDArray[np.generic]]


def recall(outputs: Sequence[Call], labels: Sequence[Call]) -> float:
    """Share of the wanted patches that are among the eight allocated ones, 0 to 1."""
    found = total = 0
    for output, label in zip(outputs, labels, strict=True):
        hits = np.take_along_axis(label["wanted"], output["allocation"], axis=1)  # [batch, 8]
        found += int(hits.sum())
        total += int(label["wanted"].sum())
    return found / total

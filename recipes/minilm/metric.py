"""What a sentence encoder is for: texts that say the same must lie close together, and apart from all others."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Call = Mapping[str, NDArray[np.generic]]


def paraphrase_margin(outputs: Sequence[Call], labels: Sequence[Call]) -> float:
    """Cosine to a text's own paraphrase less cosine to the nearest other text of that length; the mean over texts.

    It falls smoothly as vectors get noisy or crowd together, long before a search finds wrong texts.
    """
    vectors = np.concatenate([call["embedding"] for call in outputs])
    pairs = np.concatenate([call["pair"] for call in labels])
    lengths = np.concatenate([call["sentences"] for call in labels])
    likeness = vectors @ vectors.T
    same_length = lengths[:, None] == lengths[None, :]
    same_pair = same_length & (pairs[:, None] == pairs[None, :])
    other = np.where(same_length & ~same_pair, likeness, -np.inf).max(axis=1)
    np.fill_diagonal(same_pair, val=False)
    return float(np.mean(likeness[same_pair] - other))

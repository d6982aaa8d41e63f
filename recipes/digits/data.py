"""The 1,797 digits that come with scikit-learn: three quarters to train on, the rest held out."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Array = NDArray[np.generic]
HELD_OUT = 450


def training() -> tuple[Array, Array]:
    """Images float32 [1347, 1, 8, 8] in 0 to 1, and labels int64 [1347]."""
    images, labels = _shuffled()
    return images[HELD_OUT:], labels[HELD_OUT:]


def held_out() -> tuple[Array, Array]:
    """Images and labels that the training never sees."""
    images, labels = _shuffled()
    return images[:HELD_OUT], labels[:HELD_OUT]


def calibration() -> Iterator[dict[str, Array]]:
    """Ranges are read from training images, so that the held-out ones stay a fair test."""
    images, _ = training()
    for start in range(0, 256, 8):
        yield {"images": images[start : start + 8]}


def evaluation() -> Iterator[dict[str, Array]]:
    images, labels = held_out()
    for start in range(0, HELD_OUT, 32):
        yield {"images": images[start : start + 32], "label": labels[start : start + 32]}


def _shuffled() -> tuple[Array, Array]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return images[order], labels[order].astype(np.int64)

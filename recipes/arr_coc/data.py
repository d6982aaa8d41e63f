"""Scenes: twelve of scikit-learn's digits in random cells of a grey, grainy image, and queries that ask for some."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Array = NDArray[np.generic]
CELLS, SHOWN, QUERY = 64, 12, 16
HELD_OUT = 450


class Scenes:
    """Draws scenes from the digits that the training sees, or from those held out."""

    def __init__(self, *, held_out: bool, seed: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        order = order[:HELD_OUT] if held_out else order[HELD_OUT:]
        self._pixels = (pixels[order] / 16).astype(np.float32).reshape(-1, 8, 8)
        self._labels = labels[order]
        self._codes = np.random.default_rng(1).normal(size=(10, QUERY)).clip(-2.5, 2.5)  # what a text encoder would say
        self._rng = np.random.default_rng(seed)

    def draw(self, batch: int, tokens: int) -> tuple[Array, Array, Array]:
        """Images float32 [batch, 3, 64, 64], queries float32 [batch, tokens, 16], wanted bool [batch, 64]."""
        scenes = [self._scene(tokens) for _ in range(batch)]
        images, queries, wanted = (np.stack(part) for part in zip(*scenes, strict=True))
        return images, queries, wanted

    def _scene(self, tokens: int) -> tuple[Array, Array, Array]:
        rng = self._rng
        chosen = rng.integers(0, len(self._labels), SHOWN)
        cells = rng.choice(CELLS, SHOWN, replace=False)
        grid = np.zeros((CELLS, 8, 8), np.float32)
        grid[cells] = self._pixels[chosen] * rng.uniform(0.5, 0.9, (SHOWN, 1, 1))
        grey = grid.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)  # rows of cells -> rows of pixels
        image = grey * rng.uniform(0.7, 1.0, (3, 1, 1)) + rng.uniform(0, 0.1, (3, 64, 64))
        # one or two kinds of digit that are there, each named by one or more noisy tokens
        asked = rng.choice(np.unique(self._labels[chosen]), min(2, tokens), replace=False)
        named = np.resize(asked, tokens)
        query = (self._codes[named] + rng.normal(0, 0.1, (tokens, QUERY))).clip(-3, 3)
        wanted = np.zeros(CELLS, bool)
        wanted[cells[np.isin(self._labels[chosen], asked)]] = True
        return image.clip(0, 1).astype(np.float32), query.astype(np.float32), wanted


def calibration() -> Iterator[dict[str, Array]]:
    scenes = Scenes(held_out=False, seed=2)
    for call in range(32):
        images, queries, _ = scenes.draw(batch=4, tokens=call % 8 + 1)
        yield {"images": images, "queries": queries}


def evaluation() -> Iterator[dict[str, Array]]:
    scenes = Scenes(held_out=True, seed=3)
    for call in range(32):
        images, queries, wanted = scenes.draw(batch=8, tokens=call % 8 + 1)
        yield {"images": images, "queries": queries, "wanted": wanted}

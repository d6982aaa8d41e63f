"""Seeded pictures: a few plane waves a channel and some grain, with the mean and spread of normalised photographs."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SIDE = 224


def pictures(count: int, seed: int) -> Array:
    """`count` pictures, float32 [count, 3, 224, 224], within -2.5 to 2.5."""
    rng = np.random.default_rng(seed)
    return np.stack([_picture(rng) for _ in range(count)])


def calibration() -> Iterator[dict[str, Array]]:
    for seed in range(100, 132):
        yield {"images": pictures(2, seed)}


def evaluation() -> Iterator[dict[str, Array]]:
    for seed in range(200, 208):
        yield {"images": pictures(4, seed)}


def _picture(rng: np.random.Generator) -> Array:
    across = np.linspace(0, 1, SIDE)
    phase_x, phase_y = (rng.uniform(-12, 12, (6, 1)) * across for _ in range(2))
    shift = rng.uniform(0, 2 * np.pi, (6, 1, 1))
    waves = np.sin(2 * np.pi * (phase_y[:, :, None] + phase_x[:, None, :]) + shift)  # [wave, y, x]
    picture = np.einsum("cw,wyx->cyx", rng.normal(0, 0.5, (3, 6)), waves) + rng.normal(0, 0.5, (3, 1, 1))
    picture += rng.normal(0, 0.1, picture.shape)
    return np.clip(picture, -2.5, 2.5).astype(np.float32)

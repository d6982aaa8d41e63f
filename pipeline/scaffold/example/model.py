"""A model of two layers, its training and its data. Put your own in place of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def build() -> torch.nn.Module:
    """Points [batch, 2] -> logits [batch, 2]."""
    return torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))


def points(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [count, 2] in -1 to 1, and labels int64 [count]: 1 inside the ring."""
    found = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    radius = np.hypot(found[:, 0], found[:, 1])
    return found, ((radius > 0.35) & (radius < 0.8)).astype(np.int64)


def train(path: Path) -> None:
    """Write the weights to `path`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        inputs, labels = (torch.from_numpy(array) for array in points(1000, seed=0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(600):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_file(model.state_dict(), path)


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Feeds by input name."""
    inputs, _ = points(256, seed=1)
    for start in range(0, 256, 8):
        yield {"points": inputs[start : start + 8]}


def evaluation() -> Iterator[dict[str, np.ndarray]]:
    """Feeds, and the labels that the metric compares with; points that the training never saw."""
    inputs, labels = points(512, seed=2)
    for start in range(0, 512, 64):
        yield {"points": inputs[start : start + 64], "label": labels[start : start + 64]}

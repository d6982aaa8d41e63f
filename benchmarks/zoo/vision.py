"""A small vision network as transformers builds it from a configuration; seeded weights, nothing is downloaded.

`architectures.py` copies this file into a recipe's folder, beside an ``architecture.py`` that says which network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from architecture import CONFIG, LAST_NORMS, MODEL, SETTINGS, SIDE
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

Array = NDArray[np.float32]
CALLS = 12
LABELS = 100


class Network(nn.Module):
    """Normalised images [batch, 3, side, side] -> logits [batch, 100]."""

    def __init__(self) -> None:
        super().__init__()
        config = getattr(transformers, CONFIG)(num_labels=LABELS, **SETTINGS)
        self.network = getattr(transformers, MODEL)(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits alone: the library's own output class means nothing to a device."""
        return self.network(images).logits


def checkpoint(path: Path) -> None:
    """Write seeded weights to `path`, with batch norm statistics measured on pictures, so that activations are sane."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Network().eval()
            _spread(model)
        _measure(model)
        # a copy of each, since networks may share tensors
        save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    finally:
        torch.set_num_threads(threads)


def _spread(model: nn.Module) -> None:
    """Weights for networks with batch norm that keep the scale; their own are so small that signals vanish.

    Each block adds a little to its input, as in trained networks; full steps of random weights are chaos.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        nn.init.constant_(norm.weight, 0.2 if name.endswith(LAST_NORMS) else 1.0)
    for module in model.modules() if norms else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


@torch.no_grad()
def _measure(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics become the plain mean over all passes
            module.train()
    for seed in range(2):
        model(torch.from_numpy(pictures(8, seed)))
    model.eval()


def pictures(count: int, seed: int) -> Array:
    """`count` smooth pictures with some grain, float32 [count, 3, side, side], within -2.5 to 2.5."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(0, 1.2, (count, 3, 6, 6)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True).numpy()
    grain = rng.normal(0, 0.1, smooth.shape).astype(np.float32)
    return np.clip(smooth + grain, -2.5, 2.5)


def feeds(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Pictures for engines to be compared on; noise is nothing that the network knows."""
    return {"images": pictures(sizes["batch"], 300 + seed)}


def calibration() -> Iterator[dict[str, Array]]:
    """Pictures by fours."""
    for seed in range(100, 100 + CALLS):
        yield {"images": pictures(4, seed)}


def evaluation() -> Iterator[dict[str, Array]]:
    """Other pictures by fours."""
    for seed in range(200, 200 + CALLS):
        yield {"images": pictures(4, seed)}

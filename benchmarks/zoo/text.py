"""A small text encoder as transformers builds it from a configuration; seeded weights, nothing is downloaded.

`architectures.py` copies this file into a recipe's folder, beside an ``architecture.py`` that says which network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from architecture import CONFIG, MODEL, SETTINGS
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

Array = NDArray[np.int64]
LENGTHS = (8, 12, 16, 24, 32, 48, 64)
FIRST_WORD, VOCABULARY = 5, 8000


class Encoder(nn.Module):
    """Token ids and mask, both int64 [batch, seq] -> the mean token, [batch, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        config = getattr(transformers, CONFIG)(vocab_size=VOCABULARY, **SETTINGS)
        self.encoder = getattr(transformers, MODEL)(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The mean over tokens that aren't padding."""
        tokens = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state  # [batch, seq, hidden]
        weights = attention_mask.to(torch.float32)[:, :, None]
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def checkpoint(path: Path) -> None:
    """Write seeded weights to `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)


def feeds(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Random words in texts of random length; the first text is as long as can be."""
    batch, seq = sizes["batch"], sizes["seq"]
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, seq, batch, endpoint=True)
    lengths[0] = seq
    mask = (np.arange(seq)[None, :] < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(FIRST_WORD, VOCABULARY, (batch, seq)) * mask, "attention_mask": mask}


def calibration() -> Iterator[dict[str, Array]]:
    """Texts of all lengths by fours."""
    for seed, seq in enumerate(LENGTHS * 2):
        yield feeds({"batch": 4, "seq": seq}, 100 + seed)


def evaluation() -> Iterator[dict[str, Array]]:
    """Other texts of all lengths by fours."""
    for seed, seq in enumerate(LENGTHS * 2):
        yield feeds({"batch": 4, "seq": seq}, 200 + seed)

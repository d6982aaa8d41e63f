"""Training: seeded and on one thread, so that the same machine always writes the same bytes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import Scenes
from model import arr_coc
from safetensors.torch import save_file

STEPS = 400
BATCH = 32


def checkpoint(path: Path) -> None:
    """Train the scorer and write its weights to `path`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(_trained().state_dict(), path)
    finally:
        torch.set_num_threads(threads)


def _trained() -> torch.nn.Module:
    model = arr_coc()
    scenes = Scenes(held_out=False, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=STEPS)
    for step in range(STEPS):
        images, queries, wanted = (torch.from_numpy(array) for array in scenes.draw(BATCH, tokens=step % 8 + 1))
        _, _, relevance, score, _ = model(images, queries)
        loss = F.binary_cross_entropy_with_logits(score, wanted.float()) + _astray(relevance, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _astray(relevance: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far attention is from the wanted patches; without it, the balance soon ignores the query."""
    share = wanted / wanted.sum(dim=1, keepdim=True)
    return -(share * (relevance + 1e-6).log()).sum(dim=1).mean()

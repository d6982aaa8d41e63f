"""Training: seeded and on one thread, so that the same machine always writes the same bytes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import training
from model import digits
from safetensors.torch import save_file

EPOCHS = 25
BATCH = 64


def checkpoint(path: Path) -> None:
    """Train the network and write its weights to `path`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(_trained().state_dict(), path)
    finally:
        torch.set_num_threads(threads)


def _trained() -> torch.nn.Module:
    images, labels = (torch.from_numpy(array) for array in training())
    model = digits()
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model

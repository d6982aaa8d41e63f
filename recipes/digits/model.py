"""The network: three convolutions and a linear layer."""

from torch import nn


def digits() -> nn.Module:
    """Images [batch, 1, 8, 8] in 0 to 1 -> logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),  # [batch, 16, 8, 8]
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, 32, 4, 4]
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [batch, 64, 2, 2]
        nn.Flatten(),
        nn.Linear(256, 10),
    )

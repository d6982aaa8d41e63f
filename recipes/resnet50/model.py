"""ResNet-50 as transformers builds it from its default configuration; nothing is downloaded."""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


class ResNet50(nn.Module):
    """Normalised images [batch, 3, 224, 224] -> logits [batch, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNetForImageClassification(ResNetConfig(num_labels=1000))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # a plain tensor: the library's own output class would mean more to trace and nothing to a device
        return self.network(images).logits


def resnet50() -> nn.Module:
    return ResNet50()

"""Three scorers that look at each patch of an image, a balance between them, and an allocation to the best patches."""

import math

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 8  # pixels; 8 x 8 patches in an image of 64 x 64
PATCHES = 64
FEATURES = 64
QUERY = 16
BUDGET = 8  # patches that are looked at closely

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Information(nn.Module):
    """How undecided the features of a patch are: entropy of their softmax, over its largest possible value."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # [batch, patches, features] -> [batch, patches]
        logs = F.log_softmax(features, dim=-1)
        return -(logs.exp() * logs).sum(dim=-1) / math.log(FEATURES)


class Salience(nn.Module):
    """How strong the edges in a patch are: mean Sobel magnitude of the grey image."""

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        self.register_buffer("kernels", torch.stack([across, across.T])[:, None], persistent=False)  # [2, 1, 3, 3]

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [batch, 3, 64, 64] -> [batch, patches]
        slopes = F.conv2d(images.mean(dim=1, keepdim=True), self.kernels, padding=1)
        magnitude = (slopes.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
        return F.avg_pool2d(magnitude, PATCH).flatten(1)


class Relevance(nn.Module):
    """How much a patch answers the query: scaled dot-product attention over patches, averaged over query tokens.

    A patch that gets its even share of attention scores 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(QUERY, FEATURES)
        self.key = nn.Linear(FEATURES, FEATURES)

    def forward(self, features: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        products = self.query(queries) @ self.key(features).transpose(1, 2)  # [batch, tokens, patches]
        return F.softmax(products / math.sqrt(FEATURES), dim=-1).mean(dim=1) * PATCHES


class RelevanceScorer(nn.Module):
    """Images [batch, 3, 64, 64] and queries [batch, tokens, 16] -> four scores [batch, 64] and the 8 best patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, FEATURES, PATCH, stride=PATCH)
        self.features = nn.Linear(FEATURES, FEATURES)
        self.information = Information()
        self.salience = Salience()
        self.relevance = Relevance()
        self.balance = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, images: torch.Tensor, queries: torch.Tensor) -> Scores:
        patches = F.gelu(self.patches(images)).flatten(2).transpose(1, 2)  # [batch, patches, features]
        features = self.features(patches)
        information = self.information(features)
        salience = self.salience(images)
        relevance = self.relevance(features, queries)
        score = self.balance(torch.stack([information, salience, relevance], dim=-1)).squeeze(-1)
        allocation = score.topk(BUDGET, dim=-1).indices  # [batch, 8], best first
        return information, salience, relevance, score, allocation


def arr_coc() -> nn.Module:
    return RelevanceScorer()

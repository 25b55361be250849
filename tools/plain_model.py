"""The reference of bench_learning.py: a plain full-precision causal transformer with a vision prefix.

GPT-2's shape with today's parts (pre-norm RMSNorm, rotary positions, GELU), the image vector mapped to a prefix
of tokens that every text position sees. Nothing of bitmar is used, so that the comparison is with another model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainModel(nn.Module):
    """logits [B, T, V] of tokens [B, T] and image vectors [B, 768]."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, prefix: int = 8) -> None:
        super().__init__()
        self.prefix, self.head_width = prefix, width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.vision = nn.Linear(768, prefix * width, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            if name.endswith(("output.weight", "down.weight")):
                p.data.mul_(1 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        image = self.vision(F.layer_norm(vectors, vectors.shape[-1:])).unflatten(-1, (self.prefix, -1))
        x = torch.cat([image, self.embedding(tokens)], dim=1)
        frequency = 10_000 ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angle = torch.arange(x.shape[1])[:, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return F.linear(self.norm(x[:, self.prefix :]), self.embedding.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

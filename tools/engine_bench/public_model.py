"""How the public BitMar feeds its model, re-created: padded captions, one image token, logits of every position.

Written anew from its description, for its cost alone: a bidirectional encoder and a causal decoder of linear layers
that are rounded to three values and eight bits by separate operations, cross-attention to the one image vector, a
softmax read of the memory, GPT-2's vocabulary. Widths and layers are those of the recipe it is compared with. The
public code computes more than this does (it keeps attention weights and statistics of every layer), so that the
comparison favours it; it did 1.15 and 1.98 captions a second where this was measured first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitmar.config import ModelConfig

VOCABULARY = 50_257


class RoundedLinear(nn.Linear):
    """Straight-through rounding as operations that autograd records one by one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        rounded = (x / step).round().clamp(-128, 127) * step
        return F.linear(x + (rounded - x).detach(), self.weight + (weight - self.weight).detach())


class PublicBlock(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, self.heads = model.width, model.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = RoundedLinear(width, 3 * width), RoundedLinear(width, width)
        self.gate_up, self.down = RoundedLinear(width, 2 * model.ffn_width), RoundedLinear(model.ffn_width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.gelu(gate) * up)


class PublicModel(nn.Module):
    """logits [B, T, V] of tokens [B, T], their mask and image vectors [B, 768]; T is what captions are padded to."""

    def __init__(self, model: ModelConfig, padded: int) -> None:
        super().__init__()
        width = model.width
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(padded, width)
        self.vision = nn.Sequential(
            RoundedLinear(model.vision_encoder_dim, model.vision_hidden_size),
            nn.GELU(),
            RoundedLinear(model.vision_hidden_size, width),
        )
        self.encoder = nn.ModuleList(PublicBlock(model) for _ in range(model.encoder_layers))
        self.decoder = nn.ModuleList(PublicBlock(model) for _ in range(model.decoder_layers))
        self.fusion = nn.ModuleList(RoundedLinear(width, width) for _ in range(2 * model.fusion_layers))
        self.slots = nn.Parameter(0.02 * torch.randn(model.memory_size, model.episode_dim))
        self.query, self.recalled = RoundedLinear(width, model.episode_dim), RoundedLinear(model.episode_dim, width)
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, real: Tensor, vectors: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.place.weight[:length]
        seen = real[:, None, None, :].expand(-1, 1, length, length)
        for block in self.encoder:
            x = block(x, seen)
        image = self.vision(vectors)[:, None]
        for value, output in zip(self.fusion[::2], self.fusion[1::2], strict=True):
            x = x + output(value(image)).expand_as(x)  # attention over one key is its value
        weights = (self.query(x) @ self.slots.T).softmax(-1)
        x = x + self.recalled(weights @ self.slots)
        causal = seen & torch.ones(length, length, dtype=torch.bool).tril()
        for block in self.decoder:
            x = block(x, causal)
        return F.linear(self.norm(x), self.embedding.weight)

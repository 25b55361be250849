"""Attention: rotary positions, causal self-attention, cross-attention, with a sub-norm before the output.

Shapes: B rows, T text positions, S source positions, D width, H heads, E = D / H.
Sub-norm and missing biases as in BitNet b1.58 2B4T (2025), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bitmar.model.quantize import BitLinear, RMSNorm


@dataclass(frozen=True)
class Positions:
    """What self-attention needs to know of a batch: rotary angles, and who may look at whom."""

    cos: Float[Tensor, "R 1 T E"]  # R = B, or 1 where all rows count from 0
    sin: Float[Tensor, "R 1 T E"]
    mask: Bool[Tensor, "B 1 T T"] | None  # None: plain causal


def text_positions(
    positions: Int[Tensor, "B T"], segments: Int[Tensor, "B T"], packed: bool, head_width: int, base: float
) -> Positions:
    """Angles from `positions`; on packed rows a causal mask that keeps each record to itself.

    Padding needs no mask: it stands behind the tokens, where causal attention never looks.
    """
    rows = positions if packed else torch.arange(positions.shape[1], device=positions.device)[None]
    frequency = base ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angle = rows[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    mask = None
    if packed:
        length = positions.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
    return Positions(angle.cos(), angle.sin(), mask)


def rotate(x: Float[Tensor, "B H T E"], positions: Positions) -> Float[Tensor, "B H T E"]:
    """Rotary embedding (Su et al. 2021), halves convention."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * positions.cos + turned * positions.sin).to(x.dtype)


def _split_heads(x: Float[Tensor, "B S D"], heads: int) -> Float[Tensor, "B H S E"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Causal over text when given Positions, over all tokens of a row when given None."""

    def __init__(self, width: int, heads: int, quantized: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = BitLinear(width, (width, width, width), quantized)
        self.sub_norm = RMSNorm(width)
        self.output = BitLinear(width, width, quantized)

    def forward(self, x: Float[Tensor, "B T D"], positions: Positions | None) -> Float[Tensor, "B T D"]:
        query, key, value = (_split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        mask = None
        if positions is not None:
            query, key, mask = rotate(query, positions), rotate(key, positions), positions.mask
        causal = positions is not None and mask is None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.output(self.sub_norm(mixed.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Text positions attend to the tokens of their own row's image; no positions, no mask."""

    def __init__(self, width: int, heads: int, quantized: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = BitLinear(width, width, quantized)
        self.key_value = BitLinear(width, (width, width), quantized)
        self.sub_norm = RMSNorm(width)
        self.output = BitLinear(width, width, quantized)

    def forward(self, x: Float[Tensor, "B T D"], source: Float[Tensor, "B S D"]) -> Float[Tensor, "B T D"]:
        query = _split_heads(self.query(x), self.heads)
        key, value = (_split_heads(part, self.heads) for part in self.key_value(source).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(self.sub_norm(mixed.transpose(1, 2).flatten(2)))

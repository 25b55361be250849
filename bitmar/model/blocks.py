"""Transformer blocks: gated squared-ReLU feed-forward, the pre-norm residual block, seeded dropout.

Shapes: B rows, T positions, D width, N feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitmar.model.attention import LayerHeads, Positions, SelfAttention, Shown
from bitmar.model.quantize import BitLinear, RMSNorm, needs_gradient


@dataclass(frozen=True)
class Dropout:
    """Masks drawn from (seed, global row position, site, element): the same on any world and split."""

    rate: float
    seed: int
    rows: Int[Tensor, "B"]

    def __call__(self, x: Float[Tensor, "B T D"], site: int) -> Float[Tensor, "B T D"]:
        if self.rate == 0:
            return x
        element = torch.arange(x[0].numel(), device=x.device, dtype=torch.int64).view(x.shape[1:])
        seed = _mix(torch.tensor(self.seed, dtype=torch.int64, device=x.device))
        row = _mix(_mix(self.rows ^ seed) ^ site)
        uniform = (_mix(row[:, None, None] ^ (element * 0x9E3779B97F4A7C1)) & 0xFFFFFF).float() / float(1 << 24)
        return x * (uniform >= self.rate).to(x.dtype) / (1 - self.rate)


def _mix(x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """A 64-bit finaliser after Stafford's Mix13 (as in SplitMix64), on wrapping int64 arithmetic."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "*N"], bits: int) -> Int[Tensor, "*N"]:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def squared_relu_gate(gate_up: Float[Tensor, "*B M"]) -> Float[Tensor, "*B N"]:
    """relu(gate)^2 * up of [gate, up] side by side (M = 2 N)."""
    gate, up = gate_up.chunk(2, dim=-1)
    positive = gate.relu()
    return positive.mul_(positive).mul_(up)


class _SquaredReLUGate(torch.autograd.Function):
    """`squared_relu_gate` with few passes over memory and one gradient for both."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return squared_relu_gate(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        positive = gate.relu()
        once = positive * grads[0]
        if torch.compiler.is_compiling():  # which takes no part of a tensor to write to, and needs none
            return torch.cat([2 * once * up, once * positive], dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(once, positive, out=grad_up)
        torch.mul(once.mul_(2), up, out=grad_gate)
        return grad


class FeedForward(nn.Module):
    """down(norm(relu(gate(x))^2 * up(x))): the squared ReLU of BitNet b1.58 2B4T (2025), section 3."""

    def __init__(self, width: int, hidden: int, quantized: bool) -> None:
        super().__init__()
        self.gate_up = BitLinear(width, (hidden, hidden), quantized)
        self.sub_norm = RMSNorm(hidden)
        self.down = BitLinear(hidden, width, quantized)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate_up = self.gate_up(x)
        hidden = _SquaredReLUGate.apply(gate_up) if needs_gradient(gate_up) else squared_relu_gate(gate_up)
        return self.down(self.sub_norm(hidden))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: LayerHeads, hidden: int, quantized: bool, site: int) -> None:
        super().__init__()
        self.site = site  # numbers the dropout masks of this block
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads, quantized)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = FeedForward(width, hidden, quantized)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        positions: Positions | None,
        dropout: Dropout | None,
        shown: Shown | None = None,
    ) -> Float[Tensor, "B T D"]:
        mixed = self.attention(self.attention_norm(x), positions, shown)
        x = x + (dropout(mixed, 2 * self.site) if dropout else mixed)
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + (dropout(fed, 2 * self.site + 1) if dropout else fed)


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "B T D"],
    positions: Positions | None,
    dropout: Dropout | None,
    recompute: bool,
    shown: Shown | None = None,
) -> Float[Tensor, "B T D"]:
    """Apply the blocks in turn; `recompute` keeps only their inputs for the backward pass."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, positions, dropout, use_reentrant=False)  # type: ignore[assignment]
        else:
            x = block(x, positions, dropout, shown)
    return x

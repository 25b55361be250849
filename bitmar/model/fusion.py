"""Fusion: text positions attend to the vision tokens of their caption; gated residual.

Shapes: B rows, T text positions, N captions, P vision tokens, D width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bitmar.batch import Packing
from bitmar.config import ModelConfig
from bitmar.model.attention import CrossAttention, LayerHeads, Shown
from bitmar.model.quantize import RMSNorm

LOG_100 = 4.6052  # Radford et al. 2021, section 2.5, bound the factor at 100
GATE_START = 0.5  # tanh(0.5) = 0.46: open enough for a gradient to reach the vision encoder at once


class FusionLayer(nn.Module):
    """x + tanh(gate) * cross_attention(norm(x), vision); rows without an image have their gate at 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.attention = CrossAttention(config.width, LayerHeads.of(config, "cross_modal", layer), config.quantization)
        self.gate = nn.Parameter(torch.full((1,), GATE_START))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        vision: Float[Tensor, "N P D"],
        has_vision: Bool[Tensor, "N"],
        packing: Packing | None,
        shown: Shown | None = None,
    ) -> Float[Tensor, "B T D"]:
        gate = torch.tanh(self.gate)
        if packing is None:  # every packed caption has an image
            gate = gate * has_vision.to(x.dtype)[:, None, None]
        return x + gate * self.attention(self.norm(x), vision, packing, shown)


class Fusion(nn.Module):
    """The fusion layers, and the temperature with which text and vision latents are compared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, layer) for layer in range(config.fusion_layers))
        # exp(log_temperature) multiplies the cosine; starts at 1 / 0.07 (Radford et al. 2021, section 2.5)
        self.log_temperature = nn.Parameter(torch.tensor([2.6593]))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        vision: Float[Tensor, "N P D"],
        has_vision: Bool[Tensor, "N"],
        packing: Packing | None = None,
        shown: Shown | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "1"]]:
        """(hidden states, log temperature bounded at ln 100; its gradient passes the bound, or it would stay there)."""
        for layer in self.layers:
            x = layer(x, vision, has_vision, packing, shown)
        free = self.log_temperature
        return x, free + (free.clamp(max=LOG_100) - free).detach()

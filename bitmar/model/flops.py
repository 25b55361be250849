"""Floating point operations of a training step, from the widths of a model and what a batch really holds.

Only matrix products count, only of real tokens (no padding, no rows that are masked), each multiplication and each
addition as one. The backward pass has two products where the forward pass has one, so a step is three times its
forward pass; what activation checkpointing computes again is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitmar.config import ModelConfig

FORMULA = (
    "3 x [tokens x (L (8 D^2 + 6 D F) + fusion (4 D^2 + 4 P D) + 4 D C + 4 K C + 2 V D) + L 4 D attended"
    " + captions x (2 D Z + 4 Z C + 2 C^2)], vision: 3 x captions x (2 I H + 2 H P D + vision_layers"
    " (P (8 D^2 + 6 D F) + 4 D P^2) + 2 D Z + fusion 4 D^2 P); L encoder and decoder layers, attended: query-key pairs"
    " under the causal mask, n (n + 1) / 2 for a record of n tokens; where heads are pruned, their share of a layer's"
    " D^2 and D in attention is left out"
)


@dataclass(frozen=True)
class Work:
    """What a batch holds: real text positions, query-key pairs (n (n + 1) / 2 a record), captions with an image."""

    tokens: int | float = 0
    attended: int | float = 0
    captions: int | float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.attended + other.attended, self.captions + other.captions)

    def times(self, factor: int | float) -> Work:
        return Work(self.tokens * factor, self.attended * factor, self.captions * factor)


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward: `text` of text positions and latents, `vision` of the vision tokens."""

    text: int | float
    vision: int | float

    @property
    def total(self) -> int | float:
        return self.text + self.vision


def training_flops(model: ModelConfig, work: Work) -> Flops:
    """Operations of training on `work` (FORMULA; losses and optimiser have next to no matrix products)."""
    d, c, z, p = model.width, model.episode_dim, model.text_latent_size, model.vision_tokens
    layers = model.encoder_layers + model.decoder_layers
    text_heads, fusion_heads = _widths(model, "encoder", "decoder"), _widths(model, "cross_modal")
    token = 8 * d * text_heads + layers * 6 * d * model.ffn_width
    token += (4 * d + 4 * p) * fusion_heads
    token += 4 * d * c + 4 * model.memory_size * c
    token += 2 * model.vocab_size * d
    latents = 2 * d * z + 4 * z * c + 2 * c * c
    vision = 2 * model.vision_encoder_dim * model.vision_hidden_size + 2 * model.vision_hidden_size * p * d
    vision += model.vision_layers * (p * (8 * d * d + 6 * d * model.ffn_width) + 4 * d * p * p)
    vision += 2 * d * z + 4 * d * fusion_heads * p
    text = work.tokens * token + 4 * text_heads * work.attended + work.captions * latents
    return Flops(3 * text, 3 * work.captions * vision)


def _widths(model: ModelConfig, *kinds: str) -> int:
    """The numbers that the heads of all layers of some kinds of attention give a token."""
    heads = sum(math.prod(model.attention_shape(kind)) for kind in kinds)
    heads -= sum(head.kind in kinds for layer in model.pruned_heads for head in layer.names)
    return heads * (model.width // model.heads)

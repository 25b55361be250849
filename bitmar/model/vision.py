"""Vision: the image vector becomes P tokens, transformer layers mix them, pooling gives the latent.

Shapes: N captions (rows, where not packed), V width of the image vector, P vision tokens, D width, Z latent width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bitmar.config import ModelConfig
from bitmar.model.attention import LayerHeads
from bitmar.model.blocks import Block, run_blocks
from bitmar.model.quantize import BitLinear, RMSNorm, drawn


class VisionEncoder(nn.Module):
    """A row without an image takes a learned null vector, so that every rank runs the same modules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        quantized = config.quantization and config.vision_quantization
        self.tokens = config.vision_tokens
        self.null_vector = nn.Parameter(torch.zeros(config.vision_encoder_dim))
        self.input_norm = RMSNorm(config.vision_encoder_dim)
        self.compress = BitLinear(config.vision_encoder_dim, config.vision_hidden_size, quantized)
        self.expand_norm = RMSNorm(config.vision_hidden_size)
        self.expand = BitLinear(config.vision_hidden_size, config.vision_tokens * config.width, quantized)
        self.token_embedding = drawn(config.vision_tokens, config.width, std=0.5)
        self.blocks = nn.ModuleList(
            Block(config.width, LayerHeads(config.heads), config.ffn_width, quantized, 1000 + site)
            for site in range(config.vision_layers)
        )
        self.norm = RMSNorm(config.width)
        self.latent = BitLinear(config.width, config.vision_latent_size, quantized)

    def forward(
        self, vectors: Float[Tensor, "N V"], has_vision: Bool[Tensor, "N"], recompute: bool
    ) -> tuple[Float[Tensor, "N P D"], Float[Tensor, "N Z"]]:
        """(vision tokens, vision_latent)."""
        vectors = torch.where(has_vision[:, None], vectors.to(self.null_vector.dtype), self.null_vector)
        hidden = self.compress(self.input_norm(vectors))
        tokens = self.expand(self.expand_norm(hidden)).unflatten(-1, (self.tokens, -1)) + self.token_embedding
        tokens = self.norm(run_blocks(self.blocks, tokens, None, None, recompute))
        return tokens, self.latent(tokens.mean(1))

"""Text: the tied token embedding, the causal encoder, the causal decoder.

Shapes: B rows, T positions, N captions (rows, where not packed), D width, V vocabulary, Z latent width.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bitmar.batch import Packing
from bitmar.config import ModelConfig
from bitmar.model.attention import LayerHeads, Positions, Shown
from bitmar.model.blocks import Block, Dropout, run_blocks
from bitmar.model.head import TokenLosses, token_losses
from bitmar.model.quantize import BitLinear, RMSNorm, drawn

TABLE_STD = 0.02
OUTPUT_GAIN = 7.0  # larger learns faster up to 10 (real captions, width 256), but starts more than 5 % above ln V


def masked_mean(x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Mean over the marked positions; zero for a row without any."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def pooled(x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"], packing: Packing | None) -> Float[Tensor, "N D"]:
    """The mean of each caption's (or row's) positions."""
    if packing is None:
        return masked_mean(x, mask)
    return packing.total(x) / packing.lengths.clamp(min=1)[:, None]


class TokenEmbedding(nn.Module):
    """One full-precision table for input and output: token ids give vectors, vectors give logits.

    The table starts with standard deviation s = 0.02 at any width. Input vectors are divided by s (unit RMS, as
    the blocks' outputs). Logits are multiplied by OUTPUT_GAIN / (s D), so that a hidden state that points along
    a token's vector gives it a logit of OUTPUT_GAIN at any width. A tied table without such a factor gives the
    current token a logit of s D at the start (31 at width 1536), and the first loss is far from ln V.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = drawn(vocabulary, width, std=TABLE_STD)
        self.output_scale = OUTPUT_GAIN / (TABLE_STD * width)

    def forward(
        self,
        x: Int[Tensor, "*B"] | Float[Tensor, "*B D"],
        targets: Int[Tensor, "*B"] | None = None,
        entropy: bool = False,
    ) -> Float[Tensor, "*B W"] | TokenLosses:
        """Vectors of tokens; of vectors their logits, or, given `targets`, the losses of those."""
        if not x.is_floating_point():
            return F.embedding(x, self.weight) * (1 / TABLE_STD)
        if targets is None:
            return F.linear(x * self.output_scale, self.weight)
        return token_losses(x * self.output_scale, self.weight, targets, entropy)


class TextEncoder(nn.Module):
    """Causal, because the decoder predicts the same tokens: looking ahead here would hand out the label."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config.width, LayerHeads.of(config, "encoder", site), config.ffn_width, config.quantization, site)
            for site in range(config.encoder_layers)
        )
        self.latent_norm = RMSNorm(config.width)
        self.latent = BitLinear(config.width, config.text_latent_size, config.quantization)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        positions: Positions,
        mask: Bool[Tensor, "B T"],
        dropout: Dropout | None,
        recompute: bool,
        shown: Shown | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N Z"]]:
        """(hidden states, text_latent: the pooled caption or row)."""
        hidden = run_blocks(self.blocks, x, positions, dropout, recompute, shown)
        return hidden, self.latent(pooled(self.latent_norm(hidden), mask, positions.packing))


class TextDecoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                LayerHeads.of(config, "decoder", site),
                config.ffn_width,
                config.quantization,
                config.encoder_layers + site,
            )
            for site in range(config.decoder_layers)
        )
        self.norm = RMSNorm(config.width)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        positions: Positions,
        dropout: Dropout | None,
        recompute: bool,
        shown: Shown | None = None,
    ) -> Float[Tensor, "B T D"]:
        return self.norm(run_blocks(self.blocks, x, positions, dropout, recompute, shown))

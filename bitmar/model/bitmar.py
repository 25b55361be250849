"""BitMar: text encoder -> fusion with vision -> memory read -> decoder, and the latents of a caption.

Shapes: B rows, T text positions, N captions (rows, where not packed), P vision tokens, D width, K slots,
C episode width, V vocabulary, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bitmar.batch import Batch
from bitmar.config import COMPONENTS, ModelConfig
from bitmar.head_names import KINDS
from bitmar.model.attention import HeadEdit, Heads, Shown, text_positions
from bitmar.model.blocks import Block, Dropout
from bitmar.model.fusion import Fusion
from bitmar.model.memory import EpisodeWriter, MemoryReader, MemoryState, RecallInput
from bitmar.model.quantize import BitLinear
from bitmar.model.text import TextDecoder, TextEncoder, TokenEmbedding, pooled
from bitmar.model.vision import VisionEncoder


@dataclass(frozen=True)
class Outputs:
    loss: Float[Tensor, ""]  # cross-entropy in nats (fp32), summed over the positions with a target
    token_losses: Float[Tensor, "B T"]  # of each position, 0 without a target; no gradient
    hits: Bool[Tensor, "B T"]  # no logit is larger than the target's
    logits: Float[Tensor, "B T V"] | None  # where asked for
    text_latent: Float[Tensor, "N Z"]
    vision_latent: Float[Tensor, "N Z"]
    log_temperature: Float[Tensor, "1"]
    keys: Float[Tensor, "N C"]  # of the captions' episodes
    episodes: Float[Tensor, "N C"]
    read_mass: Float[Tensor, "K"]  # fp64
    memory_gate: Float[Tensor, "1"]  # what the memory's value is multiplied by, detached
    recalled: Float[Tensor, "N 2 C"] | None  # by the image alone, by the text alone
    entropy: Float[Tensor, ""]  # of the predictions, summed over the positions with a target; 0 where not asked for
    heads: dict[str, list[Heads]]  # layer by layer of each kind of attention, where asked for

    def side_sum(self) -> Float[Tensor, ""]:
        """A sum that depends on every parameter that a phase's losses may leave out."""
        sides = (self.text_latent, self.vision_latent, self.keys, self.episodes, self.log_temperature)
        return torch.stack([side.float().sum() for side in sides]).sum()


class BitMar(nn.Module):
    """Parameters are fp32; `compute_dtype` bf16 runs the matrix products in bf16 (torch.autocast)."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        activation_checkpointing: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = activation_checkpointing
        self.embedding = TokenEmbedding(config.vocab_size, config.width)
        self.encoder = TextEncoder(config)
        self.vision = VisionEncoder(config)
        self.fusion = Fusion(config)
        self.memory = nn.ModuleDict({"writer": EpisodeWriter(config), "reader": MemoryReader(config)})
        self.decoder = TextDecoder(config)
        self._scale_residual_branches()

    def _scale_residual_branches(self) -> None:
        """Residual outputs start 1 / sqrt(2 L) smaller, so that the sum over L layers keeps its size."""
        for stack in (self.encoder.blocks, self.vision.blocks, self.decoder.blocks):
            for block in stack:
                assert isinstance(block, Block)
                for branch in (block.attention.output, block.feed_forward.down):
                    branch.weight.data.mul_(1 / math.sqrt(2 * len(stack)))

    def forward(
        self,
        batch: Batch,
        memory: MemoryState,
        recall: bool = False,
        logits: bool = False,
        entropy: bool = False,
        heads: bool = False,
        edits: Mapping[str, Sequence[HeadEdit]] | None = None,
    ) -> Outputs:
        """Run every module on every batch (rows without an image are masked), so that ranks keep step.

        `memory` is read and never changed; `recall` also writes the captions' episodes to copies of it and reads
        them back from one modality alone. `logits` keeps those of all positions, which the losses do without. `entropy`
        takes that of the predictions; `heads` shows what each head does, and `edits` change what they hand on: kind of
        attention -> an edit for each of its layers.
        """
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=bf16):
            shown = {kind: Shown((edits or {}).get(kind, ())) for kind in KINDS} if heads or edits else {}
            return self._forward(batch, memory, recall, logits, entropy, shown)

    def _forward(
        self, batch: Batch, memory: MemoryState, recall: bool, logits: bool, entropy: bool, shown: dict[str, Shown]
    ) -> Outputs:
        config, recompute = self.config, self.activation_checkpointing and self.training
        dropout = Dropout(config.dropout, self.seed, batch.rows) if self.training and config.dropout > 0 else None
        head_width, packing = config.width // config.heads, batch.packing
        positions = text_positions(
            batch.positions, batch.segments, batch.packed, head_width, config.rotary_base, packing
        )
        mask = batch.token_mask
        of = shown.get
        embedded = self.embedding(batch.tokens)
        hidden, text_latent = self.encoder(embedded, positions, mask, dropout, recompute, of("encoder"))
        text_cue = pooled(hidden, mask, packing)
        tokens, vision_latent = self.vision(batch.vision, batch.has_vision, recompute)
        hidden, log_temperature = self.fusion(hidden, tokens, batch.has_vision, packing, of("cross_modal"))
        keys, episodes = self.memory["writer"](text_latent, vision_latent)
        recall_input = None
        if recall:
            cues = (tokens.mean(1), text_cue)
            groups = batch.groups(config.recall_group)
            recall_input = RecallInput(keys, episodes, batch.image_ids, batch.pair_mask, *cues, groups)
        reading = self.memory["reader"](hidden, memory, batch.image_ids, mask, recall_input, packing, of("memory"))
        hidden, read_mass, memory_gate, recalled = reading
        hidden = self.decoder(hidden, positions, dropout, recompute, of("decoder"))
        asked, targets = hidden.flatten(0, 1), batch.targets.flatten()
        if batch.trained is not None:  # padding needs no logits
            asked, targets = asked.index_select(0, batch.trained), targets[batch.trained]
        loss, each, hits, entropies = self.embedding(asked, targets, entropy)
        if batch.trained is not None:
            each, hits = (x.new_zeros(batch.targets.numel()).index_copy(0, batch.trained, x) for x in (each, hits))
        return Outputs(
            loss,
            each.view(batch.targets.shape),
            hits.view(batch.targets.shape),
            self.embedding(hidden) if logits else None,
            text_latent,
            vision_latent,
            log_temperature,
            keys,
            episodes,
            read_mass,
            memory_gate,
            recalled,
            entropies,
            {kind: taken.layers for kind, taken in shown.items()},
        )


def component_parameters(model: BitMar) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The parameters of each component (bitmar.config.COMPONENTS), by full name."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in COMPONENTS}
    for name, parameter in model.named_parameters():
        groups[name.split(".")[0]].append((name, parameter))
    return groups


def rounded_layers(model: BitMar) -> list[tuple[str, BitLinear]]:
    """The layers of a model whose weights are ternary, by name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, BitLinear) and m.quantized]


def parameter_counts(model: BitMar) -> dict[str, int]:
    """Parameters by component; under ZeRO-3 call before the engine takes them apart."""
    return {name: _count(p for _, p in group) for name, group in component_parameters(model).items()}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model. Packed: ternary weights in 2 bits with an fp32 scale a matrix, all others in bf16."""

    full: int  # all in fp32
    packed: int
    ternary_full: int
    ternary_packed: int


def parameter_sizes(model: BitMar) -> Sizes:
    """Under ZeRO-3 call before the engine takes the parameters apart."""
    ternary = matrices = 0
    for _, module in rounded_layers(model):
        ternary, matrices = ternary + module.weight.numel(), matrices + len(module.sections)
    total = _count(model.parameters())
    packed = ternary // 4 + 4 * matrices
    return Sizes(4 * total, packed + 2 * (total - ternary), 4 * ternary, packed)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)

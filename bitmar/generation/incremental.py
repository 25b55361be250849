"""A trained model that reads a text piece by piece, and keeps what later tokens need of those before.

Shapes: B rows, n positions of a piece, S positions so far, H heads, E numbers a head, P vision tokens, K slots,
C episode width, D width, V vocabulary.

Attention and the memory's read are in fp64. In fp32 they round by the shape of the piece, and a difference of 1e-7
before an activation is rounded to 8 bits can become one of 1/127 behind it; in fp64 a text gives the same logits
whatever pieces it is read in, beside whatever rows, padded on whatever side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.model.attention import CrossAttention, Positions, SelfAttention, angles, masked, rotate, split_heads
from bitmar.model.bitmar import BitMar
from bitmar.model.blocks import Block
from bitmar.model.fusion import FusionLayer
from bitmar.model.kernel import kernel
from bitmar.model.memory import MemoryReader, MemoryState, read
from bitmar.model.packed import for_kernel


@dataclass(frozen=True)
class Seen:
    """What the model makes of a piece."""

    logits: Float[Tensor, "B V"]  # behind each row's last token so far
    cross_modal: list[Float[Tensor, "B H n P"]]  # attention to the vision tokens, layer by layer
    memory: Float[Tensor, "B n K"]  # weights of the slots


@dataclass(frozen=True)
class _Piece:
    """Where the tokens of a piece stand."""

    begin: int  # first column
    turn: Positions  # their rotary angles
    allowed: Bool[Tensor, "B 1 n S"]  # who may look at whom


class IncrementalReader:
    """Reads rows of tokens, each with its image's vector or without, piece after piece."""

    def __init__(
        self,
        model: BitMar,
        memory: MemoryState,
        vectors: Float[Tensor, "B V"] | None,
        rows: int,
        capacity: int,
        by_image: bool = False,
    ) -> None:
        """`capacity`: columns that will be read in all. `by_image`: the memory is asked by the image alone, whose
        vector fusion then does not see: what is read of it was recalled."""
        config, self.model = model.config, model
        self.memory = replace(memory, keys=memory.keys.double(), values=memory.values.double())
        device = model.embedding.weight.device
        has_vision = torch.full((rows,), vectors is not None, device=device)
        if vectors is None:
            vectors = torch.zeros(rows, config.vision_encoder_dim, device=device)
        self._has_vision = has_vision & (not by_image)
        with torch.no_grad():
            tokens, _ = model.vision(vectors, has_vision, False)
            self._sees = [_key_value(layer, tokens) for layer in _fusion_layers(model)]
            self._cue = memory_reader(model).query_norm(tokens.mean(1)) if by_image else None
        head_width = config.width // config.heads
        self._blocks = _text_blocks(model)
        self.compiled = [for_kernel(block) for block in self._blocks]
        sizes = [(rows, block.attention.heads, capacity, head_width) for block in self._blocks]
        self._kept = [(torch.zeros(size, device=device), torch.zeros(size, device=device)) for size in sizes]
        self._inside = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._columns = 0

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "B n"], inside: Bool[Tensor, "B n"] | None = None) -> Seen:
        """Read the next columns. `inside`: which of them hold a token; each row needs one in its first piece."""
        inside = torch.ones_like(tokens, dtype=torch.bool) if inside is None else inside
        piece = self._place(inside)
        x = self.model.embedding(tokens)
        encoder = len(self.model.encoder.blocks)
        x = self._through_blocks(range(encoder), x, piece)
        cross_modal = []
        for layer, (key, value) in zip(_fusion_layers(self.model), self._sees, strict=True):
            x, weights = _through_fusion(layer, x, key, value, self._has_vision)
            cross_modal.append(weights)
        x, slots = self._through_memory(x)
        x = self._through_blocks(range(encoder, len(self._blocks)), x, piece)
        last = torch.where(inside, torch.arange(tokens.shape[1], device=x.device), -1).amax(1).clamp(min=0)
        hidden = self.model.decoder.norm(x[torch.arange(len(x), device=x.device), last])
        return Seen(self.model.embedding(hidden), cross_modal, slots)

    def pick(self, rows: Int[Tensor, "M"]) -> None:
        """Go on with `rows` of the rows so far, each as often as it is named."""
        self._kept = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self._kept]
        self._sees = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self._sees]
        self._inside, self._lengths = self._inside[rows], self._lengths[rows]
        self._has_vision = self._has_vision[rows]
        self._cue = None if self._cue is None else self._cue[rows]

    def _through_blocks(self, numbers: range, x: Float[Tensor, "B n D"], piece: _Piece) -> Float[Tensor, "B n D"]:
        for number in numbers:
            compiled, whole, kept = kernel(), self.compiled[number], self._kept[number]
            if compiled is not None and whole is not None:
                x = compiled.block(x, whole, (piece.turn.cos, piece.turn.sin), piece.allowed, kept)
            else:
                x = _through_block(self._blocks[number], x, piece, kept)
        return x

    def _place(self, inside: Bool[Tensor, "B n"]) -> _Piece:
        begin, count = self._columns, inside.shape[1]
        self._columns = end = begin + count
        self._inside[:, begin:end] = inside
        positions = (self._lengths[:, None] + inside.cumsum(1) - 1).clamp(min=0)
        self._lengths = self._lengths + inside.sum(1)
        config = self.model.config
        turn = angles(positions, config.width // config.heads, config.rotary_base)
        columns = torch.arange(end, device=inside.device)
        own = columns[begin:, None] == columns  # padding looks at itself: a softmax over nothing is no number
        allowed = self._inside[:, None, :end] & (columns[begin:, None] >= columns) | own
        return _Piece(begin, Positions(turn.cos(), turn.sin(), None), allowed[:, None])

    def _through_memory(self, x: Float[Tensor, "B n D"]) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B n K"]]:
        reader = memory_reader(self.model)
        asked = reader.query_norm(x) if self._cue is None else self._cue[:, None].expand_as(x)
        value, weights = asked_memory(reader, self.memory, reader.query(asked))
        if reader.is_masked:
            return x, weights
        return x + torch.tanh(reader.gate) * reader.output(reader.output_norm(value.to(x.dtype))), weights


def memory_reader(model: BitMar) -> MemoryReader:
    return model.memory["reader"]  # type: ignore[return-value]


def asked_memory(
    reader: MemoryReader, memory: MemoryState, query: Float[Tensor, "B n C"]
) -> tuple[Float[Tensor, "B n C"], Float[Tensor, "B n K"]]:
    """(value, weights) in fp64, for readers who may see every slot."""
    sharpness = 1.0 if reader.log_sharpness is None else reader.log_sharpness.float().exp()
    nobody = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return read(memory, query.double(), nobody, sharpness, reader.config.memory_addressing)


def _text_blocks(model: BitMar) -> list[Block]:
    return [*model.encoder.blocks, *model.decoder.blocks]  # type: ignore[list-item]


def _fusion_layers(model: BitMar) -> list[FusionLayer]:
    return list(model.fusion.layers)  # type: ignore[arg-type]


def _through_block(
    block: Block, x: Float[Tensor, "B n D"], piece: _Piece, kept: tuple[Tensor, Tensor]
) -> Float[Tensor, "B n D"]:
    x = x + _attention(block.attention, block.attention_norm(x), piece, kept)
    return x + block.feed_forward(block.feed_forward_norm(x))


def _attention(
    layer: SelfAttention, x: Float[Tensor, "B n D"], piece: _Piece, kept: tuple[Tensor, Tensor]
) -> Float[Tensor, "B n D"]:
    query_key, value = split_heads(layer.qkv(x), 3 * layer.heads).split((2 * layer.heads, layer.heads), dim=1)
    query, key = rotate(query_key, piece.turn).chunk(2, dim=1)
    end = piece.begin + x.shape[1]
    for buffer, new in zip(kept, (key, value), strict=True):
        buffer[:, :, piece.begin : end] = new
    mixed, _ = _mix(query, kept[0][:, :, :end], kept[1][:, :, :end], piece.allowed)
    return layer.output(layer.sub_norm(masked(mixed, layer.mask)))


def _through_fusion(
    layer: FusionLayer, x: Float[Tensor, "B n D"], key: Tensor, value: Tensor, has_vision: Bool[Tensor, "B"]
) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B H n P"]]:
    attention = layer.attention
    query = split_heads(attention.query(layer.norm(x)), attention.heads)
    mixed, weights = _mix(query, key, value, None)
    found = attention.output(attention.sub_norm(masked(mixed, attention.mask)))
    return x + torch.tanh(layer.gate) * has_vision.to(x.dtype)[:, None, None] * found, weights


def _key_value(layer: FusionLayer, vision_tokens: Float[Tensor, "B P D"]) -> tuple[Tensor, Tensor]:
    attention: CrossAttention = layer.attention
    key, value = (split_heads(part, attention.heads) for part in attention.key_value(vision_tokens).chunk(2, dim=-1))
    return key, value


def _mix(
    query: Float[Tensor, "B H n E"],
    key: Float[Tensor, "B H S E"],
    value: Float[Tensor, "B H S E"],
    allowed: Bool[Tensor, "B 1 n S"] | None,
) -> tuple[Float[Tensor, "B n W"], Float[Tensor, "B H n S"]]:
    """(what the heads found, side by side, in the query's precision; the weights)."""
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    mixed = (weights @ value.double()).to(query.dtype)
    return mixed.transpose(1, 2).flatten(2), weights

"""Attention: rotary positions, causal self-attention, cross-attention, with a sub-norm before the output.

Shapes: B rows, T text positions, N captions, X positions of what Packing
takes apart, S source positions, D width, H heads,
E = D / H. Rows of packed captions are taken apart for attention, so that each caption is a row of its own there.
Sub-norm and missing biases as in BitNet b1.58 2B4T (2025), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bitmar.batch import Packing
from bitmar.model.quantize import BitLinear, RMSNorm, needs_gradient
from bitmar.model_config import ModelConfig


@dataclass(frozen=True)
class Positions:
    """What self-attention needs to know of a batch: rotary angles, and who may look at whom."""

    cos: Float[Tensor, "R 1 T E"] | Float[Tensor, "X 1 1 E"]  # R = B, or 1 where all rows count from 0
    sin: Float[Tensor, "R 1 T E"] | Float[Tensor, "X 1 1 E"]
    mask: Bool[Tensor, "B 1 T T"] | None  # None: plain causal
    packing: Packing | None = None  # then angles are those of the positions that it takes apart


def text_positions(
    positions: Int[Tensor, "B T"],
    segments: Int[Tensor, "B T"],
    packed: bool,
    head_width: int,
    base: float,
    packing: Packing | None = None,
) -> Positions:
    """Angles from `positions`; on packed rows of text a causal mask that keeps each record to itself.

    Padding needs no mask: it stands behind the tokens, where causal attention never looks. Packed captions need none
    either, as they are taken apart.
    """
    length = positions.shape[1]
    if packing is not None:
        rows = packing.apart(positions)[:, None]
    else:
        rows = positions if packed else torch.arange(length, device=positions.device)[None]
    angle = angles(rows, head_width, base)
    mask = None
    if packed and packing is None:
        causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
    return Positions(angle.cos(), angle.sin(), mask, packing)


def angles(positions: Int[Tensor, "R T"], head_width: int, base: float) -> Float[Tensor, "R 1 T E"]:
    """By what a head's numbers are turned at each position, in radians."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angle = positions[:, None, :, None].float() * frequency
    return torch.cat([angle, angle], dim=-1)


def rotate(x: Float[Tensor, "*B E"], positions: Positions) -> Float[Tensor, "*B E"]:
    """Rotary embedding (Su et al. 2021), halves convention."""
    if not needs_gradient(x):
        return _turn(x, positions.cos, positions.sin, 1)
    return _Rotation.apply(x, positions.cos, positions.sin)  # type: ignore[return-value]


class _Rotation(torch.autograd.Function):
    """[a cos - b sin, b cos + a sin] of the halves a, b, in fp32; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second, turned = x[..., :half], x[..., half:], x * cos
    turned[..., :half].addcmul_(second, sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(first, sin[..., half:], value=sign)
    return turned.to(x.dtype)


@dataclass(frozen=True)
class LayerHeads:
    """The heads of an attention layer."""

    whole: int  # as the layer was made
    pruned: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()  # whose output is 0
    scales: tuple[float, ...] = ()  # BitLinear.factors of query, key, value, output, where any is pruned

    @classmethod
    def of(cls, config: ModelConfig, kind: str, layer: int) -> LayerHeads:
        cut, hidden = config.pruned_from(kind, layer), config.masked_in(kind, layer)
        return cls(config.heads, cut.heads if cut else (), hidden, cut.scales if cut else ())

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(head for head in range(self.whole) if head not in self.pruned)

    @property
    def is_edited(self) -> bool:
        return bool(self.pruned or self.masked)


@dataclass(frozen=True)
class Heads:
    """What an attention layer did in a forward pass that was asked to show it; without packed captions."""

    weights: Float[Tensor, "B H T S"]  # fp32, detached
    outputs: Float[Tensor, "B H T E"]  # before gates and edits, detached
    gates: Float[Tensor, "B H"]  # 1, multiplied on each head's output: the loss's gradient by them is of the heads
    numbers: tuple[int, ...]  # of the H heads, where others were pruned
    whole: int  # heads with those


@dataclass(frozen=True)
class HeadEdit:
    """What is made of the outputs z of a layer's heads: factor * z + offset."""

    factor: Float[Tensor, "H #E"]
    offset: Float[Tensor, "H E"] | None = None

    def __call__(self, z: Float[Tensor, "B H T E"]) -> Float[Tensor, "B H T E"]:
        changed = z * self.factor[:, None]
        return changed if self.offset is None else changed + self.offset[:, None]


def attend(
    query: Float[Tensor, "B H T E"],
    key: Float[Tensor, "B H S E"],
    value: Float[Tensor, "B H S E"],
    attn_mask: Bool[Tensor, "#B 1 T S"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H T E"]:
    """Fused scaled dot-product attention."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


class Shown:
    """Takes what the layers of one kind show, in their order. (ZeRO-3 hands modules a copy of a list.)

    `edits`: of the layers' heads, in the same order; none where it is empty.
    """

    def __init__(self, edits: Sequence[HeadEdit] = ()) -> None:
        self.layers: list[Heads] = []
        self._edits = edits

    def take(self, heads: Heads, z: Float[Tensor, "B H T E"]) -> Float[Tensor, "B H T E"]:
        """Keep what a layer shows of its heads; gives their outputs with the gates and the layer's edit."""
        self.layers.append(heads)
        gated = z * heads.gates[..., None, None]
        return self._edits[len(self.layers) - 1](gated) if self._edits else gated


def show(
    query: Float[Tensor, "B H T E"],
    key: Float[Tensor, "B H S E"],
    mixed: Float[Tensor, "B H T E"],
    allowed: Bool[Tensor, "#B 1 T S"] | None,
    shown: Shown,
    heads: LayerHeads,
) -> Float[Tensor, "B H T E"]:
    """The weights behind `mixed`, what attention gave, and its gates go to `shown`. Weights need no gradient: the
    loss's by the gates goes through `mixed`."""
    gates = head_gates(query)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):  # in which they would be of less precision
        scores = (query.float() @ key.float().mT).div_(query.shape[-1] ** 0.5)
        if allowed is not None:
            scores.masked_fill_(~allowed, float("-inf"))
        weights = scores.softmax(-1)
    return shown.take(Heads(weights, mixed.detach(), gates, heads.kept, heads.whole), mixed)


def head_gates(x: Float[Tensor, "B H *D"]) -> Float[Tensor, "B H"]:
    """A factor of 1 for each head's output in each row, whose gradient is the head's importance."""
    return torch.ones(x.shape[:2], dtype=x.dtype, device=x.device, requires_grad=torch.is_grad_enabled())


def head_mask(heads: LayerHeads, width: int) -> Float[Tensor, "I"] | None:
    """0 for the numbers of masked heads' outputs, 1 for the others'; None where no head is masked."""
    if not heads.masked:
        return None
    works = [float(head not in heads.masked) for head in heads.kept]
    return torch.tensor(works).repeat_interleave(width // heads.whole)


def masked(x: Float[Tensor, "*B I"], mask: Float[Tensor, "I"] | None) -> Float[Tensor, "*B I"]:
    return x if mask is None else x * mask


def split_heads(x: Float[Tensor, "B S D"], heads: int) -> Float[Tensor, "B H S E"]:
    """The numbers of each head, side by side in a layer's."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Causal over text when given Positions, over all tokens of a row when given None."""

    mask: Float[Tensor, "I"] | None

    def __init__(self, width: int, heads: LayerHeads, quantized: bool) -> None:
        super().__init__()
        self.layer, self.heads = heads, len(heads.kept)
        self.attend: Callable[..., Tensor] = attend  # which a compiled block has replaced, see bitmar/engine/zero.py
        inner = self.heads * (width // heads.whole)
        self.qkv = BitLinear(width, (inner, inner, inner), quantized, heads.scales[:3])
        self.sub_norm = RMSNorm(inner, of=width if heads.is_edited else None)
        self.output = BitLinear(inner, width, quantized, heads.scales[3:])
        self.register_buffer("mask", head_mask(heads, width), persistent=False)

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions | None, shown: Shown | None = None
    ) -> Float[Tensor, "B T D"]:
        if positions is not None and positions.packing is not None:
            assert shown is None, "heads are shown of unpacked rows"
            found = self._within_captions(self.qkv(x), positions, positions.packing)
            return self.output(self.sub_norm(masked(found, self.mask)))
        parts = split_heads(self.qkv(x), 3 * self.heads)
        mask, (query_key, value) = None, parts.split((2 * self.heads, self.heads), dim=1)
        if positions is not None:
            query_key, mask = rotate(query_key, positions), positions.mask
        query, key = query_key.chunk(2, dim=1)
        causal = positions is not None and mask is None
        mixed = self.attend(query, key, value, attn_mask=mask, is_causal=causal)
        if shown is not None:
            if causal:
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
            mixed = show(query, key, mixed, mask, shown, self.layer)
        return self.output(self.sub_norm(masked(mixed.transpose(1, 2).flatten(2), self.mask)))

    def _within_captions(
        self, qkv: Float[Tensor, "B T W"], positions: Positions, packing: Packing
    ) -> Float[Tensor, "B T D"]:
        query_key, value = packing.apart(qkv).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=1)
        chunks = zip(packing.split(rotate(query_key, positions)), packing.split(value), strict=True)
        mixed = []
        for turned, plain in chunks:  # n L 2 H E, n L 1 H E
            query, key, values = (part.transpose(1, 2) for part in (turned[:, :, 0], turned[:, :, 1], plain[:, :, 0]))
            found = self.attend(query, key, values, is_causal=True)
            mixed.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        return packing.together(torch.cat(mixed))


class CrossAttention(nn.Module):
    """Text positions attend to the tokens of their own caption's image; no positions, no mask."""

    mask: Float[Tensor, "I"] | None

    def __init__(self, width: int, heads: LayerHeads, quantized: bool) -> None:
        super().__init__()
        self.layer, self.heads = heads, len(heads.kept)
        inner = self.heads * (width // heads.whole)
        self.query = BitLinear(width, inner, quantized, heads.scales[:1])
        self.key_value = BitLinear(width, (inner, inner), quantized, heads.scales[1:3])
        self.sub_norm = RMSNorm(inner, of=width if heads.is_edited else None)
        self.output = BitLinear(inner, width, quantized, heads.scales[3:])
        self.register_buffer("mask", head_mask(heads, width), persistent=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        source: Float[Tensor, "N S D"],
        packing: Packing | None = None,
        shown: Shown | None = None,
    ) -> Float[Tensor, "B T D"]:
        if packing is not None:
            assert shown is None, "heads are shown of unpacked rows"
            found = self._within_captions(self.query(x), self.key_value(source), packing)
            return self.output(self.sub_norm(masked(found, self.mask)))
        query = split_heads(self.query(x), self.heads)
        key, value = (split_heads(part, self.heads) for part in self.key_value(source).chunk(2, dim=-1))
        mixed = attend(query, key, value)
        if shown is not None:
            mixed = show(query, key, mixed, None, shown, self.layer)
        return self.output(self.sub_norm(masked(mixed.transpose(1, 2).flatten(2), self.mask)))

    def _within_captions(
        self, query: Float[Tensor, "B T D"], key_value: Float[Tensor, "N S W"], packing: Packing
    ) -> Float[Tensor, "B T D"]:
        chunks = zip(packing.split(packing.apart(query)), packing.split_captions(key_value), strict=True)
        mixed = []
        for asked, told in chunks:
            key, value = (split_heads(part, self.heads) for part in told.chunk(2, dim=-1))
            found = attend(split_heads(asked, self.heads), key, value)
            mixed.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        return packing.together(torch.cat(mixed))

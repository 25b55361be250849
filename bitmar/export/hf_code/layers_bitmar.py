"""BitMar's layers: BitLinear (BitNet b1.58), norms, attention, blocks, and the reading of the episodic memory.

The same arithmetic as in training. At inference attention, the memory's read, and linear maps that are not rounded are
computed in fp64: an 8-bit activation turns a difference of 1e-7, which the order of a sum makes, into one of 1/127,
and a cached, batched or padded pass would not give what a plain one does. Devices without fp64 (Apple's MPS) compute in
fp32 throughout.

Shapes: B rows, T text positions, S source positions, D width, H heads, E = D / H, K memory slots, C episode width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bitmar import BitMarConfig

EPS = 1e-5
LEVELS = 127.0  # largest 8-bit activation
RIDGE = 1e-3  # of the pseudo-inverse, for keys of unit length
WITHOUT_FP64 = {"mps"}  # types of devices


def finest(x: Tensor) -> torch.dtype:
    """fp64 where the tensor's device has it."""
    return torch.float32 if x.device.type in WITHOUT_FP64 else torch.float64


class Precise(nn.Module):
    """A layer that computes in fp64 at inference, or in what the config's inference_dtype says; in training in fp32."""

    inference_dtype = torch.float64

    def dtype(self, x: Tensor) -> torch.dtype:
        """For what comes of `x`."""
        return torch.float32 if self.training or x.device.type in WITHOUT_FP64 else self.inference_dtype


class _Rounded(torch.autograd.Function):
    """y = x_q w_q^T * gamma * step; its gradient is that of the rounded operands (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sections: tuple[int, ...], factors: tuple[float, ...]) -> Tensor:
        means = [part.abs().mean(dtype=torch.float32) for part in weight.split(sections)]
        if factors:  # in fp64, so that the product is the whole matrix's gamma to the bit
            means = [(mean.to(finest(x)) * factor).float() for mean, factor in zip(means, factors, strict=True)]
        scales = [mean.clamp(min=EPS).expand(size, 1) for mean, size in zip(means, sections, strict=True)]
        scale = torch.cat(scales) if len(scales) > 1 else scales[0]
        w_q = (weight / scale).round_().clamp_(-1, 1)
        step = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_(min=EPS) / LEVELS
        x_q = (x / step).round_()
        y = F.linear(x_q, w_q)  # sums of whole numbers below 2^24: exact, whatever their order
        if len(sections) > 1:
            y.mul_(step).mul_(scale.T)
        else:
            y.mul_(step * scale[0])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_q.mul_(step), w_q.mul_(scale))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x, None, None


class BitLinear(Precise):
    """A linear map without bias, its weight rounded to -1, 0, 1 times gamma = mean|W| in every forward pass.

    `sections`: output widths of the matrices that share the input, each with its gamma. `factors`: by what a section's
    mean|W| is multiplied, where heads were pruned from its matrix. `quantized=False`: no rounding.
    """

    def __init__(
        self, inputs: int, sections: tuple[int, ...], quantized: bool, factors: tuple[float, ...] = ()
    ) -> None:
        super().__init__()
        self.sections, self.quantized, self.factors = sections, quantized, factors
        self.weight = nn.Parameter(torch.empty(sum(sections), inputs))

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            dtype = self.dtype(x)
            return F.linear(x.to(dtype), self.weight.to(dtype)).float()
        flat = x.float().reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y = _Rounded.apply(flat, self.weight.float(), self.sections, self.factors)
        return y.reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """In fp32. `of`: what the sum of squares is divided by where heads are pruned or masked; it is then in fp64."""

    def __init__(self, width: int, of: int | None = None) -> None:
        super().__init__()
        self.of = of
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        dtype = None if self.of is None else finest(x)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square()
        root = squares.div(self.of or x.shape[-1]).add(EPS).rsqrt().float()
        return x * root * self.weight.float()


@dataclass(frozen=True)
class Positions:
    """What causal attention needs: rotary angles of the new positions, and whom each may look at."""

    cos: Tensor  # R 1 T E/2
    sin: Tensor
    allowed: Tensor | None  # bool B 1 T S; None: plain causal

    @classmethod
    def of(cls, numbers: Tensor, allowed: Tensor | None, head_width: int, base: float) -> Positions:
        """`numbers` int [R, T]: positions in their rows."""
        even = torch.arange(0, head_width, 2, device=numbers.device, dtype=torch.float32)
        angle = numbers[:, None, :, None].float() * base ** (-even / head_width)
        return cls(angle.cos(), angle.sin(), allowed)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding, halves convention."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.addcmul(first * self.cos, second, self.sin, value=-1)
        return torch.cat([turned, torch.addcmul(second * self.cos, first, self.sin)], dim=-1)


class Heads:
    """The heads of an attention layer, named as encoder.L2: which are left, which are masked."""

    def __init__(self, config: BitMarConfig, layer: str | None = None) -> None:
        whole = config.bitmar["heads"]
        cut = config.pruned_from(layer) if layer else None
        hidden = config.masked_in(layer) if layer else []
        kept = [head for head in range(whole) if head not in (cut["heads"] if cut else ())]
        self.count, self.width = len(kept), config.hidden_size // whole
        self.inner = self.count * self.width
        self.factors = tuple(cut["scales"]) if cut else ()  # of query, key, value, output
        self.norm_of = config.hidden_size if cut or hidden else None
        self.works = [float(head not in hidden) for head in kept] if hidden else None

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def join(self, mixed: Tensor) -> Tensor:
        """[B H T E] -> [B T HE], masked heads 0."""
        x = mixed.transpose(1, 2).flatten(2)
        return x if self.works is None else x * x.new_tensor(self.works).repeat_interleave(self.width)


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool, dtype: torch.dtype
) -> Tensor:
    """Scaled dot-product attention in `dtype`; fp32 comes out."""
    parts = (part.to(dtype) for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts, attn_mask=allowed, is_causal=causal).float()


class SelfAttention(Precise):
    """Causal over text when given Positions, over all tokens of a row when given None."""

    def __init__(self, config: BitMarConfig, heads: Heads, quantized: bool, cache_layer: int) -> None:
        super().__init__()
        self.heads, self.cache_layer = heads, cache_layer
        inner = heads.inner
        self.qkv = BitLinear(config.hidden_size, (inner, inner, inner), quantized, heads.factors[:3])
        self.sub_norm = RMSNorm(inner, heads.norm_of)
        self.output = BitLinear(inner, (config.hidden_size,), quantized, heads.factors[3:])

    def forward(self, x: Tensor, positions: Positions | None, cache: Any = None) -> Tensor:
        query, key, value = (self.heads.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        allowed, causal = None, False
        if positions is not None:
            query, key = positions.rotate(query), positions.rotate(key)
            if cache is not None:
                key, value = cache.update(key, value, self.cache_layer)
            allowed, causal = positions.allowed, positions.allowed is None
        mixed = attend(query, key, value, allowed, causal, self.dtype(x))
        return self.output(self.sub_norm(self.heads.join(mixed)))


class CrossAttention(Precise):
    """Text positions attend to the tokens of their row's image."""

    def __init__(self, config: BitMarConfig, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        inner, quantized = heads.inner, config.bitmar["quantization"]
        self.query = BitLinear(config.hidden_size, (inner,), quantized, heads.factors[:1])
        self.key_value = BitLinear(config.hidden_size, (inner, inner), quantized, heads.factors[1:3])
        self.sub_norm = RMSNorm(inner, heads.norm_of)
        self.output = BitLinear(inner, (config.hidden_size,), quantized, heads.factors[3:])

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        key, value = (self.heads.split(part) for part in self.key_value(source).chunk(2, dim=-1))
        mixed = attend(self.heads.split(self.query(x)), key, value, None, False, self.dtype(x))
        return self.output(self.sub_norm(self.heads.join(mixed)))


class FeedForward(nn.Module):
    """down(norm(relu(gate(x))^2 * up(x)))"""

    def __init__(self, width: int, hidden: int, quantized: bool) -> None:
        super().__init__()
        self.gate_up = BitLinear(width, (hidden, hidden), quantized)
        self.sub_norm = RMSNorm(hidden)
        self.down = BitLinear(hidden, (width,), quantized)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        positive = gate.relu()
        return self.down(self.sub_norm(positive * positive * up))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BitMarConfig, layer: str | None, quantized: bool, cache_layer: int = 0) -> None:
        super().__init__()
        width = config.hidden_size
        self.dropout = config.bitmar["dropout"] if layer else 0.0
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(config, Heads(config, layer), quantized, cache_layer)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = FeedForward(width, config.intermediate_size, quantized)

    def forward(self, x: Tensor, positions: Positions | None, cache: Any = None) -> Tensor:
        mixed = self.attention(self.attention_norm(x), positions, cache)
        x = x + F.dropout(mixed, self.dropout, self.training)
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(fed, self.dropout, self.training)


class Slots(nn.Module):
    """The episodic memory of the checkpoint: K slots. It is read, never written here."""

    keys: Tensor
    values: Tensor
    written: Tensor

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(slots, width))
        for name in ("age", "image_ids"):  # steps since a use; hash of the episode's image
            self.register_buffer(name, torch.zeros(slots, dtype=torch.int64))
        self.register_buffer("written", torch.zeros(slots, dtype=torch.bool))


class MemoryReader(Precise):
    """x + tanh(gate) * W_out norm(read(query(x)))"""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        width, episode, quantized = config.hidden_size, config.bitmar["episode_dim"], config.bitmar["quantization"]
        self.query_norm = RMSNorm(width)
        self.query = BitLinear(width, (episode,), quantized)
        self.output_norm = RMSNorm(episode)
        self.output = BitLinear(episode, (width,), quantized)
        self.gate = nn.Parameter(torch.zeros(1))
        self.by_softmax = config.bitmar["memory_addressing"] == "attention"
        self.log_sharpness = nn.Parameter(torch.zeros(1)) if self.by_softmax else None

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        dtype = self.dtype(x)
        query = F.normalize(self.query(self.query_norm(x)).to(dtype), dim=-1)
        value = self.address(query, slots) @ slots.values.to(dtype)
        return x + torch.tanh(self.gate.float()) * self.output(self.output_norm(value.float()))

    def address(self, query: Tensor, slots: Slots) -> Tensor:
        """Weights over the slots [B T K], 0 where nothing is written.

        Softmax over the written slots and one that holds nothing; or least squares after Larimar.
        """
        keys = F.normalize(slots.keys.to(query.dtype), dim=-1) * slots.written[:, None]
        products = query @ keys.mT
        if self.log_sharpness is not None:
            logits = products * self.log_sharpness.float().exp().to(query.dtype)
            return F.pad(logits.masked_fill(~slots.written, -math.inf), (0, 1)).softmax(-1)[..., :-1]
        gram = keys @ keys.mT + RIDGE * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        return torch.cholesky_solve(products.flatten(0, -2).mT, torch.linalg.cholesky(gram)).mT.view(products.shape)

"""BitNet b1.58 quantisation: ternary weights, 8-bit activations, straight-through gradients.

Source: Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", section 2, and
the BitNet b1.58 2B4T report (2025), section 3:

    w_q = clamp(round(W / gamma), -1, 1)          gamma = mean|W| over the matrix
    x_q = clamp(round(127 x / max|x|), -128, 127)  max over the features of one token
    y   = (x_q w_q^T) * gamma * max|x| / 127

x_q w_q^T is a sum of whole numbers below 2^24, hence exact in fp32 whatever the order of the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-5
LEVELS = 127.0  # largest 8-bit activation


def ternary_scale(
    weight: Float[Tensor, "O I"], sections: tuple[int, ...], factors: tuple[float, ...] = ()
) -> Float[Tensor, "O 1"]:
    """gamma of each output row: mean|W| over the row's section (one section is one matrix of the paper)."""
    return by_row(section_scales(weight, sections, factors), sections)


def by_row(scales: Iterable[Float[Tensor, ""]], sections: tuple[int, ...]) -> Float[Tensor, "O 1"]:
    """Each output row's gamma."""
    rows = [scale.expand(size, 1) for scale, size in zip(scales, sections, strict=True)]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def section_scales(
    weight: Float[Tensor, "O I"], sections: tuple[int, ...], factors: tuple[float, ...] = ()
) -> list[Float[Tensor, ""]]:
    """gamma of each section. `factors`: of a section whose mean|W| is not that of the matrix it was cut from."""
    # torch.linalg.vector_norm would need no copy of |W|, and takes five times as long on a CPU
    return _mean_sizes(weight.abs(), sections, factors)


def _mean_sizes(
    sizes: Float[Tensor, "O I"], sections: tuple[int, ...], factors: tuple[float, ...]
) -> list[Float[Tensor, ""]]:
    """gamma of each section, of |W|."""
    means = [part.mean(dtype=torch.float32) for part in sizes.split(sections)]
    if factors:  # in fp64, so that the product is the whole matrix's gamma to the bit
        means = [(mean.double() * factor).float() for mean, factor in zip(means, factors, strict=True)]
    return [mean.clamp(min=EPS) for mean in means]


def ternary(
    weight: Float[Tensor, "O I"], scale: Float[Tensor, "O 1"], out: Float[Tensor, "O I"] | None = None
) -> Float[Tensor, "O I"]:
    """w_q, values -1, 0 and 1 in fp32; `out`: where they go, if given."""
    return torch.div(weight, scale, out=out).round_().clamp_(-1, 1)


def quantize_activations(x: Float[Tensor, "N I"]) -> tuple[Float[Tensor, "N I"], Float[Tensor, "N 1"]]:
    """(x_q, step) with x ~ x_q * step, one step a token. |x_q| <= 127 holds by construction, without a clamp."""
    # torch.aminmax would be one pass, and takes ten times as long on a CPU
    step = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float().clamp_(min=EPS) / LEVELS
    return (x / step).round_(), step


def rescaled(
    y: Float[Tensor, "N O"], step: Float[Tensor, "N 1"], scale: Float[Tensor, "O 1"], sections: int
) -> Float[Tensor, "N O"]:
    """x_q w_q^T with both steps multiplied in; `y` is written over where its type allows."""
    if sections > 1:
        return y.mul_(step).mul_(scale.T) if y.dtype == step.dtype else (y * step).mul_(scale.T)
    return y.mul_(step * scale[0]) if y.dtype == step.dtype else y * (step * scale[0])


def drawn(*shape: int, std: float) -> nn.Parameter:
    """A parameter of normal numbers around 0; of none on the meta device, whose random numbers import a compiler."""
    empty = torch.empty(shape)
    return nn.Parameter(empty if empty.is_meta else empty.normal_(std=std))


class Rounded(NamedTuple):
    """A weight as forward passes multiply by it."""

    values: Float[Tensor, "O I"]  # w_q in the type of the product
    scale: Float[Tensor, "O 1"]  # gamma of each output row
    scales: list[Float[Tensor, ""]]  # of each section


def product_type(x: Tensor) -> torch.dtype:
    """In which an input is multiplied."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rounded(weight: Tensor, sections: tuple[int, ...], factors: tuple[float, ...], dtype: torch.dtype) -> Rounded:
    """A weight rounded for products in `dtype`; without a gradient of its own."""
    sizes = weight.abs()  # and then w_q: memory that is new costs a CPU more than what is done there
    scales = _mean_sizes(sizes, sections, factors)
    scale = by_row(scales, sections)
    return Rounded(ternary(weight, scale, sizes if sizes.dtype == scale.dtype else None).to(dtype), scale, scales)


class RoundedInput(NamedTuple):
    """x ~ values * step, as `quantize_activations` gives them."""

    values: Float[Tensor, "N I"]
    step: Float[Tensor, "N 1"]


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to know of what is done with any of them; a call of an autograd.Function takes as long as
    the arithmetic of a small batch."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def product(x: RoundedInput, weight: Rounded) -> Float[Tensor, "N O"]:
    """x_q w_q^T * gamma * step, of values in one type, and in that type."""
    w_q, scale, scales = weight
    return rescaled(F.linear(x.values, w_q), x.step, scale, len(scales)).to(w_q.dtype)


class _Product(torch.autograd.Function):
    """`product`; backward as if nothing had been rounded but with the rounded operands, which are written over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded_x: RoundedInput, rounded_weight: Rounded) -> Tensor:
        y = product(rounded_x, rounded_weight)
        (x_q, step), (w_q, scale, _) = rounded_x, rounded_weight
        ctx.input_dtype, ctx.is_scaled = x.dtype, False
        kept_x = kept = None
        if ctx.needs_input_grad[1]:
            kept_x = x_q.mul_(step)
        if ctx.needs_input_grad[0] and x.device.type != "cpu":
            kept = w_q.to(torch.int8)  # a CPU would convert for longer than it saves memory
        elif ctx.needs_input_grad[0]:
            ctx.is_scaled = ctx.needs_input_grad[1]  # of a training step's tokens the gradient has more numbers
            kept = w_q.mul_(scale) if ctx.is_scaled else w_q
        ctx.save_for_backward(kept_x, kept, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, kept, scale = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = (grad.T @ x).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            if kept.dtype == torch.int8:
                kept = (kept * scale).to(grad.dtype)
            elif not ctx.is_scaled:
                grad = (grad * scale.T).to(kept.dtype)
            grad_x = (grad @ kept).to(ctx.input_dtype)
        return grad_x, grad_w, None, None


class BitLinear(nn.Module):
    """A linear map without bias whose weight is rounded to three values in every forward pass.

    `sections`: output widths of the matrices that share the input (query, key, value; gate, up): each keeps
    its own gamma, the token's activation is quantised once and one matrix product serves all.
    `quantized=False` is the same map without rounding. The input is expected to be normalised (RMSNorm).
    `factors`: by what a section's mean|W| is multiplied, where heads were pruned from its matrix.
    """

    look: Callable[[Tensor, RoundedInput], None] | None = None  # of `looked_at`

    def __init__(
        self,
        inputs: int,
        sections: int | tuple[int, ...],
        quantized: bool = True,
        factors: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        self.sections = (sections,) if isinstance(sections, int) else tuple(sections)
        self.factors = factors
        self.quantized = quantized
        self.keeps_scales = False  # whether a forward pass leaves its gammas behind, for what is told of the weights
        self.scales: list[Float[Tensor, ""]] = []
        self.weight = drawn(sum(self.sections), inputs, std=1 / math.sqrt(inputs))

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        if not self.quantized:
            return F.linear(x, self.weight)
        flat = x.reshape(-1, x.shape[-1])
        dtype = product_type(flat)
        weight = rounded(self.weight.detach(), self.sections, self.factors, dtype)
        inputs = RoundedInput(*quantize_activations(flat.detach()))
        if self.keeps_scales:
            self.scales = weight.scales
        if self.look is not None:
            self.look(x.detach(), inputs)
        inputs = inputs._replace(values=inputs.values.to(dtype))  # whole numbers up to 127 are exact in bf16 too
        if needs_gradient(flat, self.weight):
            y = _Product.apply(flat, self.weight, inputs, weight)
        else:
            y = product(inputs, weight)
        return y.reshape(*x.shape[:-1], -1)  # type: ignore[union-attr]

    def section_scales(self) -> Float[Tensor, "S"]:
        """gamma of each section of the current weight; under ZeRO-3 gather the weight first."""
        return torch.stack(section_scales(self.weight.detach(), self.sections, self.factors))

    def ternary_weight(self) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O 1"]]:
        """(w_q, gamma) of the current weight; under ZeRO-3 gather the weight first."""
        scale = ternary_scale(self.weight.detach(), self.sections, self.factors)
        return ternary(self.weight.detach(), scale), scale


@contextmanager
def looked_at(
    layers: Iterable[tuple[str, BitLinear]], look: Callable[[str, Tensor, RoundedInput], None]
) -> Iterator[None]:
    """In here `look` is called with the name of each layer, its input [*N I] and what that is rounded to. A layer in
    training writes over the latter afterwards."""
    watched = list(layers)
    for name, layer in watched:
        layer.look = functools.partial(look, name)
    try:
        yield
    finally:
        for _, layer in watched:
            layer.look = None


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a gain, in fp32 whatever the input's type; it stands before each BitLinear.

    `of`: what the sum of squares is divided by where some numbers are left out or always 0, as of pruned and masked
    heads; it is then taken in fp64, so that both round alike.
    """

    def __init__(self, width: int, of: int | None = None) -> None:
        super().__init__(width, eps=EPS)
        self.of = of

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N I"]:
        if x.device.type == "cpu" or self.of is not None:  # torch's CPU takes a pass over memory for each operation
            if not needs_gradient(x, self.weight):
                return _normed(x.float(), self.weight, self.of)[0]
            return _RMSNorm.apply(x.float(), self.weight, self.of)  # type: ignore[return-value]
        return super().forward(x.float())


def _normed(x: Tensor, weight: Tensor, of: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the rows of x, r of each)"""
    flat, count = x.reshape(-1, x.shape[-1]), of or x.shape[-1]
    dtype = None if of is None else torch.float64
    squares = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=dtype).square_()
    root = squares.div_(count).add_(EPS).rsqrt_().float()
    return (flat * root).mul_(weight).view(x.shape), flat, root


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + EPS)^-1/2; grad_x = r (g w - x r^2 mean(g w x)), grad_w = sum(g x r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, of: int | None) -> Tensor:
        y, flat, root = _normed(x, weight, of)
        ctx.save_for_backward(flat, root, weight)
        ctx.count = of or x.shape[-1]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, root, weight = ctx.saved_tensors
        grad = grads[0].reshape(x.shape)
        products = grad * x
        grad_weight = products.T.mv(root[:, 0]) if ctx.needs_input_grad[1] else None
        pull = products.mv(weight)[:, None].mul_(root.square())
        grad_x = torch.addcmul(grad * weight, x, pull, value=-1 / ctx.count).mul_(root)
        return grad_x.view(grads[0].shape), grad_weight, None

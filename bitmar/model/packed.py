"""Linear layers and an embedding for inference: weights rounded once, and packed.

Shapes: N tokens, I inputs, O outputs, B bytes of a row, S sections, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor, nn

from bitmar.model.bitmar import BitMar, rounded_layers
from bitmar.model.blocks import Block
from bitmar.model.head import TokenLosses, token_losses
from bitmar.model.kernel import KernelBlock, KernelWeight, kernel
from bitmar.model.quantize import BitLinear, by_row, quantize_activations, rescaled
from bitmar.model.text import TABLE_STD

Bits = Literal["2", "1.6"]
PLACES: dict[Bits, tuple[int, ...]] = {"2": (1, 4, 16, 64), "1.6": (1, 3, 9, 27, 81)}  # of the values in a byte
FEW = 4  # tokens whose logits the kernel computes; for more, matrix products in fp32 are faster
ROWS = 1024  # of the embedding that are turned into fp32 at a time


def pack(values: Float[Tensor, "O I"], bits: Bits) -> UInt8[Tensor, "O B"]:
    """Ternary values as bytes."""
    places = torch.tensor(PLACES[bits], dtype=torch.uint8)
    digits = F.pad((values + 1).to(torch.uint8), (0, -values.shape[1] % len(places)), value=1)
    return (digits.unflatten(1, (-1, len(places))) * places).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "O B"], inputs: int, bits: Bits) -> Float[Tensor, "O I"]:
    """The values of `pack`, in fp32."""
    base = PLACES[bits][1]
    digits = packed[..., None] // torch.tensor(PLACES[bits], dtype=torch.uint8, device=packed.device) % base
    return digits.flatten(1)[:, :inputs].float() - 1


class PackedLinear(nn.Module):
    """A BitLinear whose weight stays packed: the same numbers come out, bit for bit. Not for training.

    Where the kernel is at hand, five values to a byte are packed anew as four when the layer is made.
    """

    packed: UInt8[Tensor, "O B"]
    scale: Float[Tensor, "S"]
    bits: Bits

    def __init__(self, layer: BitLinear, packed: UInt8[Tensor, "O B"], scale: Float[Tensor, "S"], bits: Bits) -> None:
        super().__init__()
        self.sections, self.inputs, self.bits = layer.sections, layer.weight.shape[1], bits
        if kernel() is not None and bits != "2":
            packed, self.bits = pack(unpack(packed, self.inputs, bits), "2"), "2"
        self.register_buffer("packed", packed.contiguous(), persistent=False)
        self.register_buffer("scale", scale.float().contiguous(), persistent=False)

    @property
    def for_kernel(self) -> KernelWeight:
        return KernelWeight(self.packed, self.scale, self.sections, self.inputs)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        flat, compiled = x.reshape(-1, x.shape[-1]), kernel()
        if compiled is not None and flat.device.type == "cpu" and flat.dtype == torch.float32:
            y = compiled.bitlinear(flat, self.for_kernel)
        else:
            y = self.plain(flat)
        return y.reshape(*x.shape[:-1], -1)

    def plain(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """In PyTorch alone."""
        x_q, step = quantize_activations(x)
        w_q = unpack(self.packed, self.inputs, self.bits)
        return rescaled(F.linear(x_q, w_q), step, by_row(self.scale, self.sections), len(self.sections))


class RoundedLinear(nn.Module):
    """A BitLinear whose weight was rounded once, in fp32. Not for training."""

    values: Float[Tensor, "O I"]
    scale: Float[Tensor, "O 1"]

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.sections = layer.sections
        values, scale = layer.ternary_weight()
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale.clone(), persistent=False)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        x_q, step = quantize_activations(x.reshape(-1, x.shape[-1]))
        y = rescaled(F.linear(x_q, self.values), step, self.scale, len(self.sections))
        return y.reshape(*x.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """The TokenEmbedding with its table in bf16; logits in fp32. Not for training."""

    weight: BFloat16[Tensor, "V D"]

    def __init__(self, weight: BFloat16[Tensor, "V D"], output_scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.output_scale = output_scale

    def forward(self, x: Tensor, targets: Tensor | None = None, entropy: bool = False) -> Tensor | TokenLosses:
        """As TokenEmbedding."""
        if not x.is_floating_point():
            return F.embedding(x, self.weight).float() * (1 / TABLE_STD)
        scaled = x * self.output_scale
        if targets is not None:
            return token_losses(scaled, self.weight.float(), targets, entropy)
        flat, compiled = scaled.reshape(-1, x.shape[-1]), kernel()
        if compiled is not None and len(flat) <= FEW and flat.device.type == "cpu":
            logits = compiled.bf16_linear(flat, self.weight)
        else:
            logits = torch.cat([F.linear(flat, part.float()) for part in self.weight.split(ROWS)], dim=1)
        return logits.reshape(*x.shape[:-1], -1)


def for_kernel(block: Block) -> KernelBlock | None:
    """A text block as the kernel takes it; None where its weights are not packed, or not on a CPU."""
    attention, fed = block.attention, block.feed_forward
    layers = (attention.qkv, attention.output, fed.gate_up, fed.down)
    packed = [layer.for_kernel for layer in layers if isinstance(layer, PackedLinear) and layer.bits == "2"]
    if kernel() is None or len(packed) < len(layers) or packed[0].packed.device.type != "cpu":
        return None
    norms = (block.attention_norm, attention.sub_norm, block.feed_forward_norm, fed.sub_norm)
    gains = [norm.weight.detach().float().contiguous() for norm in norms]
    inner = len(gains[1])
    return KernelBlock(
        (packed[0], packed[1], packed[2], packed[3]),
        (gains[0], gains[1], gains[2], gains[3]),
        attention.mask,
        attention.heads,
        inner // attention.heads,
        attention.sub_norm.of or inner,
    )


def freeze(model: BitMar) -> BitMar:
    """The same model, for inference alone: its ternary weights are rounded now instead of in every forward pass."""
    on_cpu = model.embedding.weight.device.type == "cpu"
    for name, layer in rounded_layers(model):
        if on_cpu and kernel() is not None:
            values, _ = layer.ternary_weight()
            model.set_submodule(name, PackedLinear(layer, pack(values, "2"), layer.section_scales(), "2"))
        else:
            model.set_submodule(name, RoundedLinear(layer))
    return model.eval()

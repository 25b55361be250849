"""What the heads of a probe set do: figures of each head as sums over this rank's samples, for `reduce` to join.

Pure functions over what a forward pass has shown (bitmar.model.attention.Heads). Shapes: B rows, T text positions,
S keys, K slots, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.head_names import CAUSAL, TITLES, HeadName
from bitmar.model.attention import Heads
from bitmar.model.quantize import RoundedInput
from bitmar.observability.stats import Statistics

TOP_SHARE = 10  # concentration: the mass on one key in so many


@dataclass(frozen=True)
class Figures:
    """Of one kind of attention, summed over queries ([L H] each) or samples."""

    entropy: Float[Tensor, "L H"]  # nats
    concentration: Float[Tensor, "L H"]
    distance: Float[Tensor, "L H"]
    first: Float[Tensor, "L H"]
    queries: Float[Tensor, ""]
    importance: Float[Tensor, "L H"]
    samples: Float[Tensor, ""]


def gates_of(shown: dict[str, list[Heads]]) -> list[Tensor]:
    """All gates, kind by kind and layer by layer, for torch.autograd.grad."""
    return [heads.gates for layers in shown.values() for heads in layers]


def figures(
    layers: Sequence[Heads],
    gradients: Sequence[Float[Tensor, "B H"]],
    batch: Batch,
    causal: bool,
    keys: Tensor | int | None = None,
) -> Figures:
    """Of the layers of one kind. `gradients`: of the summed token losses by the gates; `keys`: how many a query has,
    where it is not all.

    A query is a real position of the batch; cross-modal and memory attention count those of rows with an image.
    Importance: |gradient| of a sample's mean token loss by its gates (Michel et al. 2019, section 4.1, who take the
    sample's summed loss).
    """
    asked = batch.token_mask if causal else batch.token_mask & batch.has_vision[:, None]
    tokens = asked.sum(1)
    scale = torch.where(tokens > 0, 1 / tokens.clamp(min=1), 0.0)
    importance = (torch.cat(list(gradients), 1).detach().abs().double() * scale[:, None]).sum(0)
    side_by_side = _looks(torch.cat([heads.weights for heads in layers], 1), asked, causal, keys)
    sizes = [len(heads.numbers) for heads in layers]
    entropy, concentration, distance, first, important = (
        torch.stack([_placed(x, heads) for x, heads in zip(values.split(sizes), layers, strict=True)])
        for values in (*side_by_side, importance)
    )
    return Figures(entropy, concentration, distance, first, asked.sum(), important, (tokens > 0).sum())


def _placed(values: Float[Tensor, "K"], heads: Heads) -> Float[Tensor, "H"]:
    """A figure of each head under its number; NaN for those that were pruned."""
    if len(heads.numbers) == heads.whole:
        return values
    whole = values.new_full((heads.whole,), torch.nan)
    return whole.index_copy_(0, torch.tensor(heads.numbers, device=values.device), values)


def _looks(
    weights: Float[Tensor, "B H T S"], asked: Bool[Tensor, "B T"], causal: bool, count: Tensor | int | None
) -> tuple[Tensor, ...]:
    """(entropy, concentration, distance, first-key mass), each [H] summed over the queries that are asked for."""
    w = weights
    if not causal:  # memory leaves the rest to the null slot; least squares gives weights of either sign
        w = torch.cat([weights.abs(), (1 - weights.abs().sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
        w = w / w.sum(-1, keepdim=True)
        weights = w[..., :-1]
    keys = torch.arange(1, w.shape[2] + 1, device=w.device)
    if not causal:
        keys = keys * 0 + (weights.shape[-1] if count is None else count)
    most = (-(-keys // TOP_SHARE) - 1).clamp(min=0)[None, None, :, None].expand(*w.shape[:3], 1)
    largest = weights.topk(max(1, -(-weights.shape[-1] // TOP_SHARE)), -1).values
    concentration = largest.cumsum(-1).gather(-1, most)[..., 0]
    places = torch.arange(weights.shape[-1], device=w.device)
    far = (torch.arange(w.shape[2], device=w.device)[:, None] - places).abs()
    values = (torch.special.entr(w).sum(-1), concentration, (weights * far).sum(-1), weights[..., 0])
    return (torch.stack(values).double() * asked[:, None]).sum((1, 3)).unbind()


def fill_heads(
    statistics: Statistics,
    shown: dict[str, list[Heads]],
    gradients: Sequence[Tensor],
    batch: Batch,
    written: Bool[Tensor, "K"],
) -> None:
    """Add the figures of every kind. `gradients`: of `gates_of(shown)`; `written`: slots that memory attends to."""
    rest = list(gradients)
    for kind, layers in shown.items():
        mine, rest = rest[: len(layers)], rest[len(layers) :]
        name, causal = TITLES[kind], kind in CAUSAL
        f = figures(layers, mine, batch, causal, written.sum() if kind == "memory" else None)
        statistics.add(f"Attention/Heads_{name}_Importance", f.importance, f.samples)
        statistics.add(f"Attention/Heads_{name}_Entropy", f.entropy, f.queries)
        statistics.add(f"Attention/Heads_{name}_Concentration", f.concentration, f.queries)
        if causal:
            statistics.add(f"Attention/Heads_{name}_Distance", f.distance, f.queries)
            statistics.add(f"Attention/Heads_{name}_First_Token", f.first, f.queries)


@dataclass(frozen=True)
class Caption:
    """What every head attends to in one caption, without its padding."""

    tokens: Int[Tensor, "T"]
    weights: dict[HeadName, Float[Tensor, "T S"]]  # fp32; S: T positions, vision tokens, or memory slots


def first_caption(shown: dict[str, list[Heads]], batch: Batch, kinds: Sequence[str]) -> Caption | None:
    """Of the first row that counts and has an image; None where there is none. A copy, which keeps nothing else."""
    rows = batch.pair_mask.nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    inside = batch.token_mask[row]
    weights: dict[HeadName, Tensor] = {}
    for kind in kinds:
        for layer, heads in enumerate(shown[kind]):
            seen = heads.weights[row][:, inside]
            for head, own in zip(heads.numbers, seen[..., inside] if kind in CAUSAL else seen, strict=True):
                weights[HeadName(kind, layer, head)] = own
    return Caption(batch.tokens[row][inside], weights)


def fill_memory(
    statistics: Statistics,
    weights: Float[Tensor, "B T K"],
    values: Float[Tensor, "K C"],
    written: Bool[Tensor, "K"],
    asked: Bool[Tensor, "B T"],
) -> None:
    """Add what the asked positions read: weights, their entropy over the slots, norm of the value."""
    w, count = weights.double(), asked.sum()
    share = w.abs() / w.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    statistics.add("Attention/Memory_Mean", (w * asked[..., None]).sum(), count * written.sum())
    statistics.add("Memory/Read_Entropy", (torch.special.entr(share).sum(-1) * asked).sum(), count)
    statistics.add("Memory/Read_Norm", ((w @ values.double()).norm(dim=-1) * asked).sum(), count)


class RoundingSums:
    """Adds up by component what rounding does to the inputs of quantised layers."""

    def __init__(self, components: Sequence[str], device: torch.device) -> None:
        self._components, self._device = components, device
        self._kept: dict[int, list[tuple[int, int, tuple[Tensor, ...], Tensor]]] = {}  # by tokens

    def add(self, component: str, x: Float[Tensor, "*B I"], rounded: RoundedInput, asked: Bool[Tensor, "*B"]) -> None:
        """Look at an input of a layer, where `asked`."""
        found, row = rounding_figures(x, rounded), self._components.index(component)
        self._kept.setdefault(len(rounded.step), []).append((row, x.shape[-1], found, asked.reshape(-1)))

    def table(self) -> Float[Tensor, "C 4"]:
        """Of all that was added: numbers that round to 0, numbers, squared rounding error, squared numbers; fp64."""
        table = torch.zeros(len(self._components), 4, dtype=torch.float64, device=self._device)
        for parts in self._kept.values():
            rows, widths, found, asked = zip(*parts, strict=True)
            counted = torch.stack(asked).double()
            others, error, size = (torch.stack(column).double() for column in zip(*found, strict=True))
            numbers = counted.sum(1) * torch.tensor(widths, device=self._device)
            zeros = numbers - (others * counted).sum(1)
            squares = [(norms.square() * counted).sum(1) for norms in (error, size)]
            table.index_add_(0, torch.tensor(rows, device=self._device), torch.stack([zeros, numbers, *squares], 1))
        return table


def rounding_figures(x: Float[Tensor, "*B I"], rounded: RoundedInput) -> tuple[Float[Tensor, "N"], ...]:
    """(numbers that do not round to 0, norm of the rounding error, norm of the numbers) of each token of a quantised
    layer's input.

    A token's rounding error is x - x_q * step (bitmar/model/quantize.py).
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    error = torch.addcmul(flat, rounded.values, rounded.step, value=-1)
    norm = torch.linalg.vector_norm
    return rounded.values.abs().clamp_(max=1).sum(1), norm(error, dim=1), norm(flat, dim=1)


@dataclass(frozen=True)
class RealPositions:
    """What of a batch is real, to be asked for the inputs of many layers."""

    tokens: Bool[Tensor, "B T"]
    captions: Bool[Tensor, "N"]

    @classmethod
    def of(cls, batch: Batch) -> RealPositions:
        return cls(batch.token_mask, batch.pair_mask)

    def among(self, name: str, x: Tensor) -> Bool[Tensor, "*B"]:
        """Which positions, captions or vision tokens of the input `x` of a layer called `name`."""
        if x.ndim == 2:
            return self.captions
        if name.startswith("vision.") or name.endswith(".key_value"):
            return self.captions[:, None].expand(x.shape[:2])
        return self.tokens

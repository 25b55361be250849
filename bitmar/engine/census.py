"""What a rank's own fragments tell of gradients, updates and ternary weights: sums that add up over ranks to those of
the whole parameters, which nothing assembles.

Symbols: C components (bitmar.config.COMPONENTS), M ternary matrices. All sums are fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmar.config import COMPONENTS
from bitmar.engine.fragments import KINDS, Fragment
from bitmar.model.bitmar import BitMar, rounded_layers
from bitmar.model.quantize import BitLinear

SAMPLE = 16  # one weight in so many is watched for flips
BITS, A_BYTE = 2, 4  # of a ternary value, values in a byte
_MAGNITUDES = torch.logspace(-10, 2, 49, dtype=torch.float64)  # four bins a decade
# Between which numbers are counted, the same for all parameters; smaller and larger ones go into the last bins
HISTOGRAM_EDGES = torch.cat([-_MAGNITUDES.flip(0), _MAGNITUDES])
# Numbers that are summed in fp32 before their sum goes on in fp64. What is worked out of them stays in a CPU's cache
CHUNK, CHUNK_OF_A_CPU = 2**20, 2**17
# Runs of at most so many, less than a chunk, are copied to be joined. On a GPU a call takes as long as many numbers
SHORT, SHORT_OF_A_CPU = 2**18, 2**12

Key = TypeVar("Key")


@dataclass(frozen=True)
class Matrix:
    """A ternary matrix: numbers start to stop of a flattened parameter."""

    name: str
    component: str
    parameter: str
    start: int
    stop: int


@dataclass(frozen=True)
class Census:
    """Of one optimizer step. `gradients`: true, reduced, before the clip; `scales`: of the weights before the step."""

    gradients: Float[Tensor, "C 4"]  # sum, sum of squares, largest |g|, numbers that are not finite
    sizes: Float[Tensor, "C"]  # numbers of this rank's fragments
    updates: Float[Tensor, "C 2"]  # sums of squares: of the update, of the weights after it
    ternary: Float[Tensor, "M 3"]  # weights of this rank's fragments, of those 0, of those 1
    scales: Float[Tensor, "M"]
    flips: Float[Tensor, "C 2"]  # watched weights whose value has changed since the last census, of how many
    gradient_histograms: Float[Tensor, "C N"] | None = None  # numbers between HISTOGRAM_EDGES, where asked for
    weight_histograms: Float[Tensor, "C N"] | None = None


@dataclass
class Watched:
    """The ternary values of a fixed 1 in 16 of this rank's weights, four in a byte."""

    packed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))

    def changed(self, values: Float[Tensor, "N"]) -> Bool[Tensor, "N"] | None:
        """Which differ from those of the last call, which they replace; None at the first."""
        digits = torch.nn.functional.pad((values + 1).to(torch.uint8), (0, -len(values) % A_BYTE)).view(A_BYTE, -1)
        shifts = range(0, BITS * A_BYTE, BITS)  # a quarter of the values in each pair of bits
        packed = digits[0].clone()
        for quarter, shift in zip(digits[1:], shifts[1:], strict=True):
            packed |= quarter << shift
        before, self.packed = self.packed, packed
        if len(before) != len(packed):
            return None
        differing = before ^ packed
        return torch.cat([(differing >> shift) & 3 for shift in shifts]).bool()[: len(values)]


def matrices_of(model: BitMar) -> list[Matrix]:
    """The ternary matrices of a model, in its order; call it before an engine takes the parameters apart."""
    found = []
    for name, module in rounded_layers(model):
        start, inputs = 0, module.weight.shape[1]
        for section, rows in enumerate(module.sections):
            label = f"{name}.{section}" if len(module.sections) > 1 else name
            stop = start + rows * inputs
            found.append(Matrix(label, name.split(".")[0], f"{name}.weight", start, stop))
            start = stop
    return found


def scales_of(layers: Iterable[BitLinear], device: torch.device) -> Float[Tensor, "M"]:
    """gamma of each matrix: what the last forward pass kept, or of the weights as they are."""
    found = []
    for layer in layers:
        found += layer.scales if layer.keeps_scales else layer.section_scales().unbind()
    return torch.stack(found) if found else torch.zeros(0, device=device)


def gradient_sums(pieces: Iterable[Fragment], device: torch.device) -> tuple[Tensor, Tensor]:
    """(Census.gradients, Census.sizes) of fragments whose tensor is "gradient"."""
    numbers, owners, sizes = list[Tensor](), list[int](), torch.zeros(len(COMPONENTS), dtype=torch.float64)
    for owner, (g,) in _joined((_row_of(piece.name), [piece.tensors["gradient"]]) for piece in pieces):
        sizes[owner] += len(g)
        total = g.sum()
        numbers += [total, torch.dot(g, g), g.amax(), g.amin(), _nonfinite(g, total)]  # aminmax is slower on a CPU
        owners.append(owner)
    out = torch.zeros(len(COMPONENTS), 4, dtype=torch.float64, device=device)
    if owners:
        of = torch.tensor(owners, device=device)
        total, squares, highest, lowest, nonfinite = _table(numbers, 5, device).unbind(1)
        largest = out[:, 2].scatter_reduce(0, of, torch.maximum(highest, -lowest), "amax")  # hands NaN on
        out.index_add_(0, of, torch.stack([total, squares, highest, nonfinite], 1))
        out[:, 2] = largest
    return out, sizes.to(device)


def histograms(pieces: Iterable[Fragment], kind: str, device: torch.device) -> Float[Tensor, "C N"]:
    """How many finite numbers of the fragments' tensors of a kind lie between HISTOGRAM_EDGES."""
    out = torch.zeros(len(COMPONENTS), len(HISTOGRAM_EDGES) - 1, dtype=torch.float64, device=device)
    edges = HISTOGRAM_EDGES.float()
    for piece in pieces:
        for part in _chunks(piece.tensors[kind]):
            known = part[part.isfinite()].clamp(float(edges[0]), float(edges[-1]))
            bins = torch.bucketize(known, edges[1:-1].to(part.device), right=True)
            out[_row_of(piece.name)] += bins.bincount(minlength=out.shape[1]).to(device)
    return out


def _nonfinite(g: Tensor, total: Tensor) -> Tensor:
    """How many numbers are NaN or infinite, as one of g's type. A CPU looks for them where their sum tells of any."""
    if g.device.type == "cpu" and math.isfinite(total):
        return g.new_zeros(())
    return (~g.isfinite()).sum().to(g.dtype)


def update_sums(
    pieces: Iterable[Fragment],
    rates: dict[str, tuple[float, float]],
    betas: tuple[float, float],
    eps: float,
    step: int,
    device: torch.device,
) -> Float[Tensor, "C 2"]:
    """Census.updates, worked out from AdamW's moments after its step (Loshchilov and Hutter 2019, algorithm 2).

    rates: parameter -> (learning rate, weight decay). What a step has changed is rate x (m / (sqrt(v) + eps) + decay x
    weight before), and the weight before is (weight after + rate x m / (sqrt(v) + eps)) / (1 - rate x decay).
    """
    numbers, factors, owners = list[Tensor](), list[tuple[float, ...]](), list[int]()
    scratch = _Scratch()
    mean_factor, root_factor = 1 / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    keyed = (((_row_of(p.name), rates[p.name]), [p.tensors[kind] for kind in KINDS]) for p in pieces)
    for (owner, (rate, decay)), (weight, mean, square) in _joined(keyed):
        pull = rate * decay / (1 - rate * decay)
        of_quotient = rate * mean_factor / root_factor * (1 + pull)
        quotient = torch.sqrt(square, out=scratch.like(square)).add_(eps / root_factor)
        torch.div(mean, quotient, out=quotient)  # the change: of_quotient times this, and pull times the weight
        numbers += [torch.dot(quotient, quotient), torch.dot(quotient, weight), torch.dot(weight, weight)]
        factors.append((of_quotient**2, 2 * of_quotient * pull, pull**2))
        owners.append(owner)
    out = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    if owners:
        table = _table(numbers, 3, device)
        changes = (table * torch.tensor(factors, dtype=torch.float64, device=device)).sum(1)
        found = torch.stack([changes, table[:, 2]], dim=1)
        out.index_add_(0, torch.tensor(owners, device=device), found)
    return out


def ternary_sums(
    pieces: Iterable[Fragment], matrices: list[Matrix], scales: Float[Tensor, "M"], watched: Watched
) -> tuple[Tensor, Tensor]:
    """(Census.ternary, Census.flips) of the weights as they are."""
    device = scales.device
    by_parameter: dict[str, list[int]] = {}
    for at, matrix in enumerate(matrices):
        by_parameter.setdefault(matrix.parameter, []).append(at)
    numbers, owners, sizes = list[Tensor](), list[int](), list[int]()
    seen, of_seen = list[Tensor](), list[int]()
    scratch = _Scratch()
    for piece in pieces:
        for at in by_parameter.get(piece.name, ()):
            first, held = _held(piece, matrices[at])
            if not len(held):
                continue
            scale = scales[at].to(held.device)
            for part in _chunks(held):  # of a multiple of SAMPLE
                values = torch.div(part, scale, out=scratch.like(part)).round_().clamp_(-1, 1)
                numbers += [torch.dot(values, values), values.sum()]  # whole numbers below 2^24: exact
                owners.append(at)
                sizes.append(len(part))
                seen.append(values[-first % SAMPLE :: SAMPLE].clone())
                of_seen.append(_row_of(piece.name))
    ternary = torch.zeros(len(matrices), 3, dtype=torch.float64, device=device)
    flips = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    if not owners:
        return ternary, flips
    filled, total = _table(numbers, 2, device).unbind(1)
    counted = torch.tensor(sizes, dtype=torch.float64, device=device)
    found = torch.stack([counted, counted - filled, (filled + total) / 2], dim=1)
    ternary.index_add_(0, torch.tensor(owners, device=device), found)
    changed = watched.changed(torch.cat(seen))
    if changed is not None:
        begin = 0
        for row, run in itertools.groupby(zip(of_seen, seen, strict=True), key=lambda pair: pair[0]):
            end = begin + sum(len(part) for _, part in run)
            flips[row, 0] += changed[begin:end].sum().to(device)
            flips[row, 1] += end - begin
            begin = end
    return ternary, flips


def _held(piece: Fragment, matrix: Matrix) -> tuple[int, Tensor]:
    """(where it begins in the matrix, numbers) of what a fragment holds of a matrix, which may be nothing."""
    weight = piece.tensors["model"]
    start, stop = max(piece.start, matrix.start), min(piece.start + len(weight), matrix.stop)
    return start - matrix.start, weight[start - piece.start : max(start, stop) - piece.start]


def _joined(runs: Iterable[tuple[Key, Sequence[Tensor]]]) -> Iterator[tuple[Key, Sequence[Tensor]]]:
    """Chunks of runs of numbers (one or several tensors of a length, all of one device and type) that have a key each.

    Short runs of a key that follow each other are copied into one: calls cost more there than arithmetic. A chunk is
    valid until the next one is asked for, and so is a run.
    """
    buffers, filled, of = list[Tensor](), 0, list[Key]()
    for key, run in runs:
        length, (most, short) = len(run[0]), _lengths(run[0])
        if filled and ([key] != of or filled + length > most):
            yield of[0], [buffer[:filled] for buffer in buffers]
            filled = 0
        if length > short:
            for chunk in zip(*map(_chunks, run), strict=True):
                yield key, chunk
            continue
        buffers = buffers or [numbers.new_empty(most) for numbers in run]
        for buffer, numbers in zip(buffers, run, strict=True):
            buffer[filled : filled + length] = numbers
        of, filled = [key], filled + length
    if filled:
        yield of[0], [buffer[:filled] for buffer in buffers]


def _lengths(numbers: Tensor) -> tuple[int, int]:
    """Of a chunk, and of a short run."""
    return (CHUNK_OF_A_CPU, SHORT_OF_A_CPU) if numbers.device.type == "cpu" else (CHUNK, SHORT)


def _chunks(numbers: Tensor) -> tuple[Tensor, ...]:
    return numbers.split(_lengths(numbers)[0])


def _table(numbers: list[Tensor], columns: int, device: torch.device) -> Tensor:
    """0-d tensors as a table, fp64."""
    return torch.stack(numbers).to(device, torch.float64).view(-1, columns)


class _Scratch:
    """Memory that is written over again and again, so that it stays in the cache."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def like(self, part: Tensor) -> Tensor:
        """As long as `part`, a chunk."""
        if self._held is None or len(self._held) < len(part):
            self._held = torch.empty_like(part)
        return self._held[: len(part)]


def component_of(parameter: str) -> str:
    return parameter.split(".")[0]


def _row_of(parameter: str) -> int:
    return COMPONENTS.index(component_of(parameter))

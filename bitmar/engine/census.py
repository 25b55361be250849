"""What a rank's own fragments tell of gradients, updates and ternary weights: sums that add up over ranks to those of
the whole parameters, which nothing assembles.

Symbols: C components (bitmar.config.COMPONENTS), M ternary matrices. All sums are fp64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmar.config import COMPONENTS
from bitmar.engine.fragments import Fragment
from bitmar.model.bitmar import BitMar, rounded_layers

SAMPLE = 16  # one weight in so many is watched for flips
BITS, A_BYTE = 2, 4  # of a ternary value, values in a byte
_MAGNITUDES = torch.logspace(-10, 2, 49, dtype=torch.float64)  # four bins a decade
# Between which numbers are counted, the same for all parameters; smaller and larger ones go into the last bins
HISTOGRAM_EDGES = torch.cat([-_MAGNITUDES.flip(0), _MAGNITUDES])
CHUNK = 2**20  # numbers that are summed in fp32 before their sum goes on in fp64


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
        digits = torch.nn.functional.pad((values + 1).to(torch.uint8), (0, -len(values) % A_BYTE)).view(-1, A_BYTE)
        shifts = torch.arange(0, BITS * A_BYTE, BITS, dtype=torch.uint8, device=values.device)
        packed = (digits << shifts).sum(1, dtype=torch.uint8)
        before, self.packed = self.packed, packed
        if len(before) != len(packed):
            return None
        return (((before ^ packed)[:, None] >> shifts) & 3).bool().view(-1)[: len(values)]


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


def scales_of(model: BitMar, device: torch.device) -> Float[Tensor, "M"]:
    """gamma of each matrix: what the last forward pass kept, or of the weights as they are."""
    found = []
    for _, module in rounded_layers(model):
        kept = module.scale if module.keeps_scale else module.section_scales()
        assert kept is not None, "a forward pass has left its scales behind"
        found.append(kept)
    return torch.cat(found) if found else torch.zeros(0, device=device)


def gradient_sums(pieces: Iterable[Fragment], device: torch.device) -> tuple[Tensor, Tensor]:
    """(Census.gradients, Census.sizes) of fragments whose tensor is "gradient"."""
    rows, owners, sizes = list[Tensor](), list[int](), torch.zeros(len(COMPONENTS), dtype=torch.float64)
    for piece in pieces:
        whole, owner = piece.tensors["gradient"], _row_of(piece.name)
        sizes[owner] += len(whole)
        for g in whole.split(CHUNK):
            least, most = torch.aminmax(g)
            rows.append(torch.stack([g.sum(), torch.dot(g, g), torch.maximum(most, -least), _nonfinite(g)]))
            owners.append(owner)
    out = torch.zeros(len(COMPONENTS), 4, dtype=torch.float64, device=device)
    if rows:
        table, of = torch.stack(rows).to(device, torch.float64), torch.tensor(owners, device=device)
        largest = out[:, 2].scatter_reduce(0, of, table[:, 2], "amax")  # hands NaN on
        out.index_add_(0, of, table)
        out[:, 2] = largest
    return out, sizes.to(device)


def histograms(pieces: Iterable[Fragment], kind: str, device: torch.device) -> Float[Tensor, "C N"]:
    """How many finite numbers of the fragments' tensors of a kind lie between HISTOGRAM_EDGES."""
    out = torch.zeros(len(COMPONENTS), len(HISTOGRAM_EDGES) - 1, dtype=torch.float64, device=device)
    edges = HISTOGRAM_EDGES.float()
    for piece in pieces:
        for part in piece.tensors[kind].split(CHUNK):
            known = part[part.isfinite()].clamp(float(edges[0]), float(edges[-1]))
            bins = torch.bucketize(known, edges[1:-1].to(part.device), right=True)
            out[_row_of(piece.name)] += bins.bincount(minlength=out.shape[1]).to(device)
    return out


def _nonfinite(g: Tensor) -> Tensor:
    """How many numbers are NaN or infinite, as one of g's type. Looked for on a CPU only where a sum tells of any."""
    if g.device.type == "cpu" and g.sum().isfinite():
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
    rows, owners = list[Tensor](), list[int]()
    for piece in pieces:
        rate, decay = rates[piece.name]
        kinds = (piece.tensors[kind].split(CHUNK) for kind in ("model", "exp_avg", "exp_avg_sq"))
        for weight, mean, square in zip(*kinds, strict=True):
            divisor = square.sqrt().mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
            change = torch.div(mean, divisor, out=divisor).mul_(rate / (1 - betas[0] ** step))
            if decay:
                pull = rate * decay / (1 - rate * decay)
                change.mul_(1 + pull).add_(weight, alpha=pull)
            rows.append(torch.stack([torch.dot(change, change), torch.dot(weight, weight)]))
            owners.append(_row_of(piece.name))
    out = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    if rows:
        out.index_add_(0, torch.tensor(owners, device=device), torch.stack(rows).to(device, torch.float64))
    return out


def ternary_sums(
    pieces: Iterable[Fragment], matrices: list[Matrix], scales: Float[Tensor, "M"], watched: Watched
) -> tuple[Tensor, Tensor]:
    """(Census.ternary, Census.flips) of the weights as they are."""
    device = scales.device
    by_parameter: dict[str, list[int]] = {}
    for at, matrix in enumerate(matrices):
        by_parameter.setdefault(matrix.parameter, []).append(at)
    rows, owners = list[Tensor](), list[int]()
    seen, of_seen = list[Tensor](), list[int]()
    for piece in pieces:
        for at in by_parameter.get(piece.name, ()):
            first, values = _ternary(piece, matrices[at], scales[at])
            if not len(values):
                continue
            for part in values.split(CHUNK):  # whole numbers below 2^24: exact
                filled = torch.dot(part, part)
                rows.append(torch.stack([filled.new_tensor(len(part)), len(part) - filled, (filled + part.sum()) / 2]))
                owners.append(at)
            seen.append(values[-first % SAMPLE :: SAMPLE])
            of_seen.append(_row_of(piece.name))
    ternary = torch.zeros(len(matrices), 3, dtype=torch.float64, device=device)
    flips = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    if not rows:
        return ternary, flips
    table, of = torch.stack(rows).to(device, torch.float64), torch.tensor(owners, device=device)
    ternary.index_add_(0, of, table)
    changed = watched.changed(torch.cat(seen))
    if changed is not None:
        sizes = [len(part) for part in seen]
        found = torch.stack([part.sum() for part in changed.split(sizes)])
        counts = torch.stack([found, found.new_tensor(sizes)], dim=1).to(device, torch.float64)
        flips.index_add_(0, torch.tensor(of_seen, device=device), counts)
    return ternary, flips


def _ternary(piece: Fragment, matrix: Matrix, scale: Tensor) -> tuple[int, Tensor]:
    """(where it begins in the matrix, ternary values) of what a fragment holds of a matrix, which may be nothing."""
    weight = piece.tensors["model"]
    start, stop = max(piece.start, matrix.start), min(piece.start + len(weight), matrix.stop)
    held = weight[start - piece.start : max(start, stop) - piece.start]
    return start - matrix.start, (held / scale.to(held.device)).round_().clamp_(-1, 1)


def component_of(parameter: str) -> str:
    return parameter.split(".")[0]


def _row_of(parameter: str) -> int:
    return COMPONENTS.index(component_of(parameter))

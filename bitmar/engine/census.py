"""What a rank's own fragments tell of gradients, updates and ternary weights: sums that add up over ranks to those of
the whole parameters, which nothing assembles.

Symbols: C components (bitmar.config.COMPONENTS), M ternary matrices. All sums are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.config import COMPONENTS
from bitmar.engine.fragments import Fragment
from bitmar.model.bitmar import BitMar
from bitmar.model.quantize import BitLinear

SAMPLE = 16  # one weight in so many is watched for flips
BITS, A_BYTE = 2, 4  # of a ternary value, values in a byte


@dataclass(frozen=True)
class Matrix:
    """A ternary matrix: numbers start to stop of a flattened parameter."""

    name: str
    component: str
    parameter: str
    start: int
    stop: int
    scale: Callable[[], Tensor]  # gamma of the last forward pass, or of the weight as it is


@dataclass(frozen=True)
class Census:
    """Of one optimizer step. `gradients`: true, reduced, before the clip; `scales`: of the weights before the step."""

    gradients: Float[Tensor, "C 4"]  # sum, sum of squares, largest |g|, numbers that are not finite
    sizes: Float[Tensor, "C"]  # numbers of this rank's fragments
    updates: Float[Tensor, "C 2"]  # sums of squares: of the update, of the weights after it
    ternary: Float[Tensor, "M 3"]  # weights of this rank's fragments, of those 0, of those 1
    scales: Float[Tensor, "M"]
    flips: Float[Tensor, "C 2"]  # watched weights whose value has changed since the last census, of how many


@dataclass
class Watched:
    """The ternary values of a fixed 1 in 16 of this rank's weights, four in a byte."""

    packed: dict[str, Tensor] = field(default_factory=dict)

    def flips(self, key: str, values: Float[Tensor, "N"]) -> Tensor | None:
        """How many differ from those of the last call, which they replace; None at the first."""
        digits = (values + 1).to(torch.uint8)
        digits = torch.nn.functional.pad(digits, (0, -len(digits) % A_BYTE)).view(-1, A_BYTE)
        packed = digits[:, 0].clone()
        for place in range(1, A_BYTE):
            packed |= digits[:, place] << (BITS * place)
        before = self.packed.get(key)
        self.packed[key] = packed
        if before is None:
            return None
        changed = before ^ packed
        return sum(((changed >> (BITS * place)) & 3 != 0).sum() for place in range(A_BYTE))  # type: ignore[return-value]


def matrices_of(model: BitMar) -> list[Matrix]:
    """The ternary matrices of a model, in its order; call it before an engine takes the parameters apart."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, BitLinear) or not module.quantized:
            continue
        start, inputs = 0, module.weight.shape[1]
        for section, rows in enumerate(module.sections):
            label = f"{name}.{section}" if len(module.sections) > 1 else name
            stop = start + rows * inputs
            scale = _scale_of(module, section)
            found.append(Matrix(label, name.split(".")[0], f"{name}.weight", start, stop, scale))
            start = stop
    return found


def _scale_of(module: BitLinear, section: int) -> Callable[[], Tensor]:
    def scale() -> Tensor:
        kept = module.scale if module.keeps_scale else module.section_scales()
        assert kept is not None, "a forward pass has left its scales behind"
        return kept[section]

    return scale


def gradient_sums(pieces: Iterable[Fragment], device: torch.device) -> tuple[Tensor, Tensor]:
    """(Census.gradients, Census.sizes) of fragments whose tensor is "gradient"."""
    parts: dict[str, list[Tensor]] = {name: [] for name in COMPONENTS}
    sizes = torch.zeros(len(COMPONENTS), dtype=torch.float64)
    for piece in pieces:
        g = piece.tensors["gradient"]
        square = torch.linalg.vector_norm(g, dtype=torch.float64).square()
        largest, bad = torch.linalg.vector_norm(g, math.inf), (~g.isfinite()).sum()
        sums = [g.sum(dtype=torch.float64), square, largest.double(), bad.double()]
        parts[component_of(piece.name)].append(torch.stack(sums))
        sizes[COMPONENTS.index(component_of(piece.name))] += g.numel()
    out = torch.zeros(len(COMPONENTS), 4, dtype=torch.float64, device=device)
    for row, name in enumerate(COMPONENTS):
        if parts[name]:
            table = torch.stack(parts[name]).to(device)
            out[row] = table.sum(0)
            out[row, 2] = table[:, 2].amax()  # hands NaN on
    return out, sizes.to(device)


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
    out = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    for piece in pieces:
        weight, mean, square = (piece.tensors[kind] for kind in ("model", "exp_avg", "exp_avg_sq"))
        rate, decay = rates[piece.name]
        divisor = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
        moved = (mean / divisor).mul_(rate / (1 - betas[0] ** step))
        change = torch.add(moved, weight + moved, alpha=rate * decay / (1 - rate * decay))
        row = out[COMPONENTS.index(component_of(piece.name))]
        row += torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in (change, weight)]).to(
            device
        )
    return out


def ternary_sums(
    pieces: Iterable[Fragment], matrices: list[Matrix], watched: Watched, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(Census.ternary, scales, flips) of the weights as they are."""
    scales = torch.stack([m.scale() for m in matrices]) if matrices else torch.zeros(0, device=device)
    ternary = torch.zeros(len(matrices), 3, dtype=torch.float64, device=device)
    flips = torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
    by_parameter: dict[str, list[tuple[int, Matrix]]] = {}
    for at, matrix in enumerate(matrices):
        by_parameter.setdefault(matrix.parameter, []).append((at, matrix))
    for piece in pieces:
        for at, matrix in by_parameter.get(piece.name, ()):
            values = _ternary(piece, matrix, scales[at])
            if values is None:
                continue
            first, values = values
            plus, filled = (values > 0).sum(), values.count_nonzero()
            ternary[at] += torch.stack([filled.new_tensor(len(values)), len(values) - filled, plus]).to(device)
            seen = values[-first % SAMPLE :: SAMPLE]
            changed = watched.flips(matrix.name, seen)
            if changed is not None:
                row = flips[COMPONENTS.index(matrix.component)]
                row += torch.stack([changed, changed.new_tensor(len(seen))]).to(device)
    return ternary, scales.double(), flips


def _ternary(piece: Fragment, matrix: Matrix, scale: Tensor) -> tuple[int, Tensor] | None:
    """(where it begins in the matrix, ternary values) of what a fragment holds of a matrix."""
    weight = piece.tensors["model"]
    start, stop = max(piece.start, matrix.start), min(piece.start + len(weight), matrix.stop)
    if start >= stop:
        return None
    held = weight[start - piece.start : stop - piece.start]
    return start - matrix.start, (held / scale.to(held.device)).round_().clamp_(-1, 1)


def component_of(parameter: str) -> str:
    return parameter.split(".")[0]

"""LoFiT (Yin, Ye, Durrett 2024, "LoFiT: Localized Fine-tuning on LLM Representations", section 3) on BitMar's heads.

Step 1, head selection: all weights frozen, a vector A for each head is trained so that the head hands on (1 + A) z,
with an L1 penalty on A; a head's importance is the norm of its A. Step 2, bias tuning: the heads that lead get a vector
v each and hand on z + v; nothing else is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitmar.analysis.heads import Edits, Table, existing_heads
from bitmar.batch import IGNORE, Batch
from bitmar.head_names import KINDS, HeadName
from bitmar.model.attention import HeadEdit
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState

START_STD = 1e-3  # of A and v


@dataclass(frozen=True)
class Fit:
    """How A or v are trained: Adam over the samples, in their order, again and again, with a rate that falls to 0."""

    steps: int = 100
    rate: float = 5e-3
    l1: float = 5e-4  # of sum |A|; v has none
    seed: int = 0


@dataclass(frozen=True)
class Selection:
    """Step 1."""

    scales: dict[HeadName, Tensor]  # A, [E]
    losses: tuple[float, ...]  # nats a token, of each step

    def importance(self, model: BitMar) -> Table:
        """Norm of each head's A; NaN for heads that were pruned."""
        table = {}
        for kind in KINDS:
            table[kind] = np.full(model.config.attention_shape(kind), np.nan)
        for head, scale in self.scales.items():
            table[head.kind][head.layer, head.head] = float(scale.norm())
        return table


@dataclass(frozen=True)
class Biases:
    """Step 2."""

    offsets: dict[HeadName, Tensor]  # v, [E]
    losses: tuple[float, ...]


def select_heads(model: BitMar, memory: MemoryState, batches: Sequence[Batch], fit: Fit) -> Selection:
    """Step 1 over all heads. The model's weights stay as they are."""
    scales = _vectors(model, existing_heads(model.config), fit.seed)
    return Selection(*_train(model, memory, batches, scales, fit, multiplies=True))


def tune_biases(
    model: BitMar, memory: MemoryState, batches: Sequence[Batch], heads: Sequence[HeadName], fit: Fit
) -> Biases:
    """Step 2 on the chosen heads. The model's weights stay as they are."""
    return Biases(*_train(model, memory, batches, _vectors(model, heads, fit.seed), fit, multiplies=False))


def edits_of(model: BitMar, vectors: dict[HeadName, Tensor], multiplies: bool) -> Edits:
    """(1 + A) z of heads that have an A, or z + v."""
    edits = Edits()
    for kind in KINDS:
        edits[kind] = []
        for layer in range(model.config.attention_shape(kind)[0]):
            names = [head for head in existing_heads(model.config, [kind]) if head.layer == layer]
            rows = torch.stack([vectors.get(name, torch.zeros(_width(model, name))) for name in names])
            edit = HeadEdit(1 + rows) if multiplies else HeadEdit(torch.ones(len(names), 1), rows)
            edits[kind].append(edit)
    return edits


def _width(model: BitMar, head: HeadName) -> int:
    """Of what a head hands on: memory attention's one head, all of a position."""
    return model.config.width if head.kind == "memory" else model.config.width // model.config.heads


def _vectors(model: BitMar, heads: Iterable[HeadName], seed: int) -> dict[HeadName, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        head: (START_STD * torch.randn(_width(model, head), generator=generator)).requires_grad_() for head in heads
    }


def _train(
    model: BitMar,
    memory: MemoryState,
    batches: Sequence[Batch],
    vectors: dict[HeadName, Tensor],
    fit: Fit,
    multiplies: bool,
) -> tuple[dict[HeadName, Tensor], tuple[float, ...]]:
    """(trained vectors, loss of each step); weights are asked for no gradient meanwhile."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in asked:
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(vectors.values(), lr=fit.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, fit.steps)  # or A would swing about 0
    losses = []
    try:
        for step in range(fit.steps):
            batch = batches[step % len(batches)]
            loss = model(batch, memory, edits=edits_of(model, vectors, multiplies)).loss
            loss = loss / (batch.targets != IGNORE).sum().clamp(min=1)
            penalty = fit.l1 * torch.stack([v.abs().sum() for v in vectors.values()]).sum() if multiplies else 0.0
            optimizer.zero_grad()
            (loss + penalty).backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        for p, required in asked:
            p.requires_grad_(required)
    return {head: vector.detach() for head, vector in vectors.items()}, tuple(losses)

"""What every head of a model does on some samples: attention, importance, and what the loss is without it.

Shapes: B rows, T text positions, S keys, L layers, H heads (those that were pruned are NaN), E a head's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.config import ConfigError
from bitmar.head_names import KINDS, HeadName
from bitmar.model.attention import HeadEdit
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.model_config import ModelConfig
from bitmar.observability.probes import figures, gates_of
from shards.loader import Loader, LoaderState, ShardSet, ValidationSet
from shards.order import PhaseSpec, Shape
from shards.record import DataError

CAUSAL = ("encoder", "decoder")
MICRO_BATCH = 16
Table = dict[str, Float[np.ndarray, "L H"]]  # by kind of attention
Edits = dict[str, list[HeadEdit]]


@dataclass(frozen=True)
class HeadFigures:
    """Means over the samples, of each kind."""

    importance: Table  # by gate gradient, nats (bitmar/observability/probes.py)
    entropy: Table  # nats
    loss: float  # nats a token


def _open(shards: str | Path) -> ShardSet:
    if not str(shards):
        raise ConfigError("an exported model names no shards: say which with --data")
    return ShardSet.open(str(shards))


def held_out(shards: str | Path, samples: int, row_tokens: int) -> list[Batch]:
    """Captions of the validation split, with their images. Raises DataError where it holds none."""
    chosen = ValidationSet(
        _open(shards),
        modality="pairs",
        micro_batch=MICRO_BATCH,
        row_tokens=row_tokens,
        max_samples=samples,
        rank=0,
        world=1,
    )
    return [Batch.from_rows(rows) for rows in chosen.batches()]


def training_captions(shards: str | Path, samples: int, row_tokens: int, seed: int) -> list[Batch]:
    """Captions of the training split, with their images, in the order that training would take them.

    Raises DataError where it holds none.
    """
    steps = -(-samples // MICRO_BATCH)
    try:
        loader = Loader(
            _open(shards),
            [PhaseSpec("captions", {"pairs": 1.0}, None, None, steps)],
            seed=seed,
            shape=Shape(MICRO_BATCH, row_tokens),
            micro_batch=MICRO_BATCH,
            rank=0,
            world=1,
        )
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{shards}: {error}") from None
    rows = (loader.step_rows(LoaderState(0, step)) for step in range(loader.order.steps(0)))
    return [Batch.from_rows(part) for parts in rows for part in parts]


def existing_heads(config: ModelConfig, kinds: Sequence[str] = KINDS) -> list[HeadName]:
    """The heads of some kinds of attention that were not pruned, in order."""
    gone = {head for layer in config.pruned_heads for head in layer.names}
    shapes = {kind: config.attention_shape(kind) for kind in kinds}
    every = (
        HeadName(kind, i, h) for kind, (layers, heads) in shapes.items() for i in range(layers) for h in range(heads)
    )
    return [head for head in every if head not in gone]


def ranked(table: Mapping[str, np.ndarray]) -> list[HeadName]:
    """Heads with a finite number, the largest first; equal ones by name."""
    found = [
        (-float(values[layer, head]), HeadName(kind, int(layer), int(head)))
        for kind, values in table.items()
        for layer, head in np.argwhere(np.isfinite(values))
    ]
    return [name for _, name in sorted(found)]


def measure_heads(model: BitMar, memory: MemoryState, batches: Iterable[Batch]) -> HeadFigures:
    """Importance by gate gradient and entropy of each head over `batches`, and the loss."""
    sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    nats = tokens = 0.0
    for batch in batches:
        outputs = model(batch, memory, heads=True)
        gradients = list(torch.autograd.grad(outputs.loss, gates_of(outputs.heads)))
        nats, tokens = nats + float(outputs.loss.detach()), tokens + float((batch.targets != IGNORE).sum())
        for kind, layers in outputs.heads.items():
            mine, gradients = gradients[: len(layers)], gradients[len(layers) :]
            keys = memory.written.sum() if kind == "memory" else None
            f = figures(layers, mine, batch, kind in CAUSAL, keys)
            found = {
                "importance": f.importance,
                "samples": f.samples,
                "entropy": f.entropy,
                "queries": f.queries,
            }
            sums[kind] = {name: value + sums[kind].get(name, 0) for name, value in found.items()}
    importance = {kind: (s["importance"] / s["samples"]).numpy() for kind, s in sums.items()}
    entropy = {kind: (s["entropy"] / s["queries"]).numpy() for kind, s in sums.items()}
    return HeadFigures(importance, entropy, nats / tokens)


def ablation(model: BitMar, heads: Iterable[HeadName]) -> Edits:
    """Edits that set the outputs of `heads` to 0."""
    config, edits = model.config, Edits()
    gone = set(heads)
    for kind in KINDS:
        layers, _ = config.attention_shape(kind)
        names = [[h for h in existing_heads(config, [kind]) if h.layer == layer] for layer in range(layers)]
        edits[kind] = [HeadEdit(torch.tensor([[float(name not in gone)] for name in row])) for row in names]
    return edits


@torch.no_grad()
def loss_without(model: BitMar, memory: MemoryState, batches: Iterable[Batch], heads: Iterable[HeadName]) -> float:
    """Mean token loss, in nats, with the outputs of `heads` at 0."""
    edits = ablation(model, heads)
    nats = tokens = 0.0
    for batch in batches:
        nats += float(model(batch, memory, edits=edits).loss)
        tokens += float((batch.targets != IGNORE).sum())
    return nats / tokens


@dataclass(frozen=True)
class AblationCheck:
    """Mean token losses, in nats, of a model without some of its heads."""

    heads: int  # taken out
    whole: float  # with all
    top: dict[str, float]  # way of ranking -> without its first heads
    bottom: dict[str, float]  # without its last
    random: tuple[float, ...]  # without heads drawn by chance


def check_rankings(
    model: BitMar,
    memory: MemoryState,
    batches: Sequence[Batch],
    rankings: Mapping[str, Sequence[HeadName]],
    share: float,
    draws: int,
    seed: int = 0,
) -> AblationCheck:
    """Which ranking to believe: the loss without its first and its last heads, against heads drawn by chance.

    `share`: of the heads that the rankings name, at least one. Raises ValueError where they name different heads.
    """
    pool = sorted({head for ranking in rankings.values() for head in ranking})
    if any(sorted(ranking) != pool for ranking in rankings.values()):
        raise ValueError("the rankings to compare name different heads")
    count = max(1, round(share * len(pool)))
    rng = np.random.default_rng(seed)
    chance = [[pool[i] for i in rng.choice(len(pool), count, replace=False)] for _ in range(draws)]

    def without(heads: Iterable[HeadName]) -> float:
        return loss_without(model, memory, batches, heads)

    return AblationCheck(
        count,
        without([]),
        {name: without(ranking[:count]) for name, ranking in rankings.items()},
        {name: without(ranking[-count:]) for name, ranking in rankings.items()},
        tuple(map(without, chance)),
    )

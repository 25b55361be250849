"""What rounding does to a trained model: shares of the ternary values, sizes, the loss it costs, its error.

Shapes: B rows, N rows of a set, U captions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.engine.world import World
from bitmar.evaluation.perplexity import NATS, TOKENS, Forward, difference
from bitmar.evaluation.scores import Score, fact, joined, scored
from bitmar.model.bitmar import BitMar, parameter_sizes, rounded_layers
from bitmar.model.memory import MemoryState
from bitmar.model.quantize import RoundedInput, looked_at
from bitmar.observability.probes import RealPositions, rounding_figures
from shards.rows import Rows

TASK = "quantization"
VALUES = {"zero": 0, "plus": 1, "minus": -1}
MEGABYTE = 1e6


@contextmanager
def unrounded(model: BitMar) -> Iterator[None]:
    """In here the model computes with its shadow weights and with activations as they come."""
    layers = [layer for _, layer in rounded_layers(model)]
    for layer in layers:
        layer.quantized = False
    try:
        yield
    finally:
        for layer in layers:
            layer.quantized = True


def weight_scores(model: BitMar) -> list[Score]:
    """Shares of the ternary values by component, bits a weight, sizes; of a model without ternary weights the
    sizes alone."""
    counts: dict[str, np.ndarray] = {}
    for name, layer in rounded_layers(model):
        values = layer.ternary_weight()[0]
        found = np.array([int((values == value).sum()) for value in VALUES.values()], np.int64)
        for group in (name.split(".")[0], "all"):
            counts[group] = counts.get(group, np.zeros(len(VALUES), np.int64)) + found
    scores = []
    for group, found in counts.items():
        total = int(found.sum())
        for name, count in zip(VALUES, found.tolist(), strict=True):
            scores.append(
                fact(TASK, f"share of {name}, {group}", count / total, "weight", total, "fraction of weights")
            )
        shares = found[found > 0] / total
        bits = -(shares * np.log2(shares)).sum()
        scores.append(fact(TASK, f"entropy of a weight, {group}", float(bits), "weight", total, "bits"))
    sizes, total = parameter_sizes(model), sum(p.numel() for p in model.parameters())
    return [
        *scores,
        fact(TASK, "size in fp32", sizes.full / MEGABYTE, "weight", total, "MB"),
        fact(TASK, "size packed (2 bits, the rest bf16)", sizes.packed / MEGABYTE, "weight", total, "MB"),
        fact(TASK, "bits a weight, packed", 8 * sizes.packed / total, "weight", total, "bits"),
    ]


def loss_scores(rounded: Float[np.ndarray, "U 3"], plain: Float[np.ndarray, "U 3"]) -> list[Score]:
    """The loss with rounding, without, and the difference; tables of bitmar/evaluation/perplexity.py."""
    columns = [NATS, TOKENS]
    return [
        scored(TASK, "loss, rounded", rounded[:, columns], "caption", measure="nats/token"),
        scored(TASK, "loss, weights and activations unrounded", plain[:, columns], "caption", measure="nats/token"),
        difference("what rounding costs", rounded, plain, "caption", TASK),
    ]


@torch.no_grad()
def rounding_tables(
    forward: Forward, model: BitMar, rows: Iterable[Rows], total: int, memory: MemoryState, world: World
) -> dict[str, Float[Tensor, "N 2"]]:
    """By component: (squared rounding error, squared numbers) of the inputs of its rounded layers, a line a row of the
    set, those of this rank's rows; real positions alone."""
    groups = sorted({name.split(".")[0] for name, _ in rounded_layers(model)})
    tables = {group: torch.zeros(total, 2, dtype=torch.float64, device=world.device) for group in groups}
    for part in rows:
        batch = Batch.from_rows(part, world.device)
        with looked_at(rounded_layers(model), functools.partial(_look, tables, batch, total)):
            forward(batch, memory)
    return tables


def _look(
    tables: Mapping[str, Tensor], batch: Batch, total: int, name: str, x: Float[Tensor, "*B I"], rounded: RoundedInput
) -> None:
    asked = RealPositions.of(batch).among(name, x)
    figures = torch.stack(rounding_figures(x, rounded)[1:]).square() * asked.reshape(-1)  # 2, positions
    sums = figures.reshape(2, len(batch.rows), -1).sum(2, dtype=torch.float64)
    tables[name.split(".")[0]].index_add_(0, batch.rows.clamp(max=total - 1), sums.T.contiguous())


def rounding_scores(tables: Mapping[str, Tensor], units: Int[np.ndarray, "N"], world: World) -> list[Score]:
    """RMS of the activations' rounding error over their RMS, by component; `units`: the caption of each row."""
    scores = []
    for group, table in tables.items():
        sums = joined(world.sum(table).cpu().numpy(), units)
        name = f"rounding error of activations, {group}"
        scores.append(scored(TASK, name, sums, "caption", statistic=root_ratio, measure="RMS over RMS"))
    return scores


def root_ratio(sums: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, "R"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(sums[:, 0] / sums[:, 1])

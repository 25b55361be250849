"""Statistics of all ranks -> one dictionary of numbers that is true of the whole cluster.

Two collectives whatever the number of metrics and ranks: one SUM over everything that is added, one MAX
over everything that is an extreme. Ranks must call `reduce` at the same steps with the same schema.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from bitmar.observability.schema import Reduction
from bitmar.observability.stats import Statistics


class World(Protocol):
    """What the reduction needs to know of the process group."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        ...


def reduce(statistics: Statistics, world: World) -> dict[str, float]:
    """Join the statistics of all ranks, leaving `statistics` as it is.

    Returns name -> number on every rank, in the schema's kinds' order. A metric that no rank filled is
    absent. SAME metrics are this rank's own (rank 0 is the one that logs). A mean whose count is 0 though
    its sum is not is NaN, so that a broken count shows. Two collectives at most, one read-back.
    """
    extremes = statistics.extremes
    is_nan = extremes.isnan()  # a MAX over ranks may lose NaN, so it travels as a count in the SUM
    added = torch.cat([statistics.sums, statistics.counts, statistics.extreme_counts, is_nan.double()])
    highest = extremes.masked_fill(is_nan, -torch.inf)
    if world.size > 1:
        torch.distributed.all_reduce(added, op=torch.distributed.ReduceOp.SUM)
        if len(highest):  # the same on all ranks: they share the schema
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    flat = torch.cat([added, highest, statistics.last, statistics.last_counts])
    return _name(statistics, flat)


def _name(statistics: Statistics, flat: Tensor) -> dict[str, float]:
    numbers: list[float] = flat.tolist()
    lengths = [len(statistics.summed)] * 2 + [len(statistics.peaks)] * 3 + [len(statistics.sames)] * 2
    parts: list[list[float]] = []
    start = 0
    for length in lengths:
        parts.append(numbers[start : start + length])
        start += length
    sums, counts, seen, nans, highest, last, last_counts = parts

    result: dict[str, float] = {}
    for metric, total, count in zip(statistics.summed, sums, counts, strict=True):
        if count != 0 or total != 0:  # NaN != 0
            result[metric.name] = _joined(metric.reduction, total, count)
    for metric, extreme, count, nan_count in zip(statistics.peaks, highest, seen, nans, strict=True):
        if count:
            value = math.nan if nan_count else extreme
            result[metric.name] = -value if metric.reduction is Reduction.MIN else value
    for metric, value, count in zip(statistics.sames, last, last_counts, strict=True):
        if count:
            result[metric.name] = value
    return result


def _joined(reduction: Reduction, total: float, count: float) -> float:
    if reduction is Reduction.SUM:
        return total
    mean = total / count if count else math.nan
    if reduction is Reduction.MEAN:
        return mean
    return math.exp(mean) if not mean > 700.0 else math.inf  # exp(709.8) is the last finite float64

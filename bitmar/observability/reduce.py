"""Statistics of all ranks -> numbers and arrays that are true of the whole cluster.

Two collectives whatever the number of metrics and ranks: one SUM over everything that is added, one MAX
over everything that is an extreme. Ranks must call `reduce` at the same steps with the same schema.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from bitmar.observability.schema import Metric, Reduction
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


class Reduced(NamedTuple):
    """What was measured, by name: numbers that are logged, and arrays that plots and DERIVED metrics are made from."""

    numbers: dict[str, float]
    arrays: dict[str, np.ndarray]  # float64, of the metric's shape


def payload(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """What a rank sends: (numbers to add up, extremes), float64."""
    s, extremes = statistics, statistics.extremes
    is_nan = extremes.isnan()  # a MAX over ranks may lose NaN, so it travels as a count in the SUM
    parts = [s.sums.total(), s.counts.total(), s.squares.total(), s.extreme_counts.total(), is_nan.double()]
    return torch.cat(parts), extremes.masked_fill(is_nan, -torch.inf)


def reduce(statistics: Statistics, world: World) -> Reduced:
    """Join the statistics of all ranks, leaving `statistics` as it is.

    The same on every rank. A metric that no rank filled is absent. SAME metrics are this rank's own (rank 0 is the one
    that logs). A mean whose count is 0 though its sum is not is NaN, so that a broken count shows. Two collectives at
    most, one read-back.
    """
    added, highest = payload(statistics)
    if world.size > 1:
        torch.distributed.all_reduce(added, op=torch.distributed.ReduceOp.SUM)
        if len(highest):  # the same on all ranks: they share the schema
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    s = statistics
    parts = [added, highest, s.last.total(), s.last_counts.total()]
    numbers = torch.cat(parts).cpu().numpy()
    lengths = [s.place[s.summed[-1].name].stop if s.summed else 0, *[len(s.summed)] * 2, *[len(highest)] * 3]
    cuts = np.cumsum([*lengths, len(parts[2])])
    sums, counts, squares, seen, nans, extremes, last, last_counts = np.split(numbers, cuts)
    reduced = Reduced({}, {})
    for metric, count, square in zip(s.summed, counts, squares, strict=True):
        total = sums[s.place[metric.name]]
        if count != 0 or (total != 0).any():  # NaN != 0
            _put(reduced, metric, _joined(metric.reduction, total, count, square))
    for metric, extreme, count, nan_count in zip(s.peaks, extremes, seen, nans, strict=True):
        if count:
            value = math.nan if nan_count else extreme
            reduced.numbers[metric.name] = float(-value if metric.reduction is Reduction.MIN else value)
    for metric, count in zip(s.sames, last_counts, strict=True):
        if count:
            _put(reduced, metric, last[s.place[metric.name]])
    return reduced


def _put(reduced: Reduced, metric: Metric, values: np.ndarray) -> None:
    if metric.shape:
        reduced.arrays[metric.name] = values.reshape(metric.shape)
    else:
        reduced.numbers[metric.name] = float(values[0])


def _joined(reduction: Reduction, total: np.ndarray, count: float, squares: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match reduction:
            case Reduction.SUM:
                return total
            case Reduction.ROOT_SUM:
                return np.sqrt(total)
        mean = total / count if count else np.full_like(total, math.nan)
        match reduction:
            case Reduction.EXP_MEAN:
                return np.exp(mean)
            case Reduction.ROOT_MEAN:
                return np.sqrt(mean)
            case Reduction.STD:
                variance = squares / count - mean**2 if count else mean
                return np.sqrt(np.where(variance < 0, 0.0, variance))  # where rounding left less than nothing
        return mean

"""What the importance of heads over training tells: who is in the top, how stable the order is, who rose and fell.

Pure functions over arrays. N analysis steps, L layers, H heads a layer, P = L H heads side by side. Importance is NaN
where a head was not measured (missing, pruned): it then has no rank and is never in the top. Rank 1 is the most
important head; heads that are equal share the mean of their ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from bitmar.head_names import HeadName
from bitmar.observability.schema import DEAD_SHARE

QUARTERS = 4  # rise and fall compare the first with the last of the analysis steps
MOVERS = 5  # heads that are named, of those that rose and of those that fell


@dataclass(frozen=True)
class KindAnalysis:
    """Of one kind of attention, over the N steps at which its importance was measured."""

    kind: str
    layers: int
    heads: int  # a layer
    top_k: int
    steps: Int[np.ndarray, "N"]
    importance: Float[np.ndarray, "N P"]  # nats
    ranks: Float[np.ndarray, "N P"]
    top: Bool[np.ndarray, "N P"]
    consistency: Float[np.ndarray, "P"]  # 0 to 1
    to_previous: Float[np.ndarray, "N"]  # Spearman's rho with the step before; the first has none
    to_last: Float[np.ndarray, "N"]  # Spearman's rho with the last step, which has none
    layer_share: Float[np.ndarray, "N L"]  # of all importance, 0 to 1
    layer_top: Int[np.ndarray, "N L"]  # heads of the top that lie in the layer
    early_rank: Float[np.ndarray, "P"]  # mean over the first quarter of the steps (`quarter_ranks`)
    late_rank: Float[np.ndarray, "P"]  # and over the last
    dead: Bool[np.ndarray, "N P"]

    def name(self, place: int) -> HeadName:
        """Of the head at a place of P."""
        return HeadName(self.kind, place // self.heads, place % self.heads)

    @property
    def rise(self) -> Float[np.ndarray, "P"]:
        """Ranks that a head has risen by (fallen: below 0)."""
        return self.early_rank - self.late_rank


def analyse(kind: str, steps: Int[np.ndarray, "M"], importance: Float[np.ndarray, "M L H"], top_k: int) -> KindAnalysis:
    """Analyse one kind. Steps at which none of its heads was measured are left out, so N <= M, and may be 0."""
    layers, heads = importance.shape[1:]
    flat = importance.reshape(len(steps), -1)
    measured = np.isfinite(flat).any(1)
    x = np.where(np.isfinite(flat), flat, np.nan)[measured]
    ranks = np.array([average_ranks(row) for row in x]).reshape(x.shape)
    top = in_top(x, top_k)
    early, late = quarter_ranks(x)
    return KindAnalysis(
        kind=kind,
        layers=layers,
        heads=heads,
        top_k=top_k,
        steps=steps[measured],
        importance=x,
        ranks=ranks,
        top=top,
        consistency=consistency(x, top),
        to_previous=np.array([np.nan, *(spearman(a, b) for a, b in itertools.pairwise(x))][: len(x)]),
        to_last=np.array([*(spearman(row, x[-1]) for row in x[:-1]), np.nan][: len(x)]),
        layer_share=layer_share(x, layers),
        layer_top=top.reshape(len(x), layers, heads).sum(2),
        early_rank=early,
        late_rank=late,
        dead=x < DEAD_SHARE * mean(x, 1)[:, None],
    )


def mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Over what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    counts = finite.sum(axis)
    return np.where(finite, values, 0.0).sum(axis) / np.where(counts > 0, counts, np.nan)


def average_ranks(values: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """Rank 1 for the largest; equal ones share the mean of the ranks that they take up; NaN where there is no value."""
    finite = np.isfinite(values)
    _, places, counts = np.unique(-values[finite], return_inverse=True, return_counts=True)
    ranks = np.full(len(values), np.nan)
    ranks[finite] = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def in_top(importance: Float[np.ndarray, "N P"], top_k: int) -> Bool[np.ndarray, "N P"]:
    """Whether fewer than `top_k` heads are more important at the step; of importance 0 none is in the top.

    Heads that are equal at the border are all in it: which of them comes first says nothing of a head.
    """
    known = np.where(np.isfinite(importance), importance, -np.inf)
    border = -np.sort(-known, axis=1)[:, [min(top_k, known.shape[1]) - 1]]
    return (known > 0) & (known >= border)


def consistency(importance: Float[np.ndarray, "N P"], top: Bool[np.ndarray, "N P"]) -> Float[np.ndarray, "P"]:
    """Share of the steps at which a head is in the top, over all N also where it was pruned before the last.

    NaN for a head that was never measured.
    """
    seen = np.isfinite(importance).any(0)
    return np.where(seen, top.sum(0) / max(len(top), 1), np.nan)


def spearman(a: Float[np.ndarray, "P"], b: Float[np.ndarray, "P"]) -> float:
    """Spearman's rank correlation: Pearson's r of the average ranks, of the heads that have a value in both.

    NaN for less than two heads, or where all of one side are equal.
    """
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2:
        return np.nan
    x, y = average_ranks(a[both]), average_ranks(b[both])
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / spread) if spread > 0 else np.nan


def layer_share(importance: Float[np.ndarray, "N P"], layers: int) -> Float[np.ndarray, "N L"]:
    """Each layer's part of the importance of all heads; NaN for a layer without a value, and where all are 0."""
    x = importance.reshape(len(importance), layers, importance.shape[1] // layers)
    sums = np.where(np.isfinite(x).any(2), np.where(np.isfinite(x), x, 0.0).sum(2), np.nan)
    total = np.where(np.isfinite(sums), sums, 0.0).sum(1, keepdims=True)
    return sums / np.where(total > 0, total, np.nan)


def first_and_last(values: Float[np.ndarray, "N P"]) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Means over the first and over the last quarter of the steps (a step at least); NaN for less than two steps."""
    if len(values) < 2:
        missing = np.full(values.shape[1], np.nan)
        return missing, missing
    count = max(len(values) // QUARTERS, 1)
    return mean(values[:count], 0), mean(values[-count:], 0)


def quarter_ranks(importance: Float[np.ndarray, "N P"]) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Mean ranks in the first and in the last quarter, among the heads that are measured at all steps of both.

    Those that are pruned on the way have none: the others would rise merely because they are gone.
    """
    count = max(len(importance) // QUARTERS, 1)
    both = np.isfinite(importance[:count]).all(0) & np.isfinite(importance[-count:]).all(0)
    kept = np.where(both, importance, np.nan)
    return first_and_last(np.array([average_ranks(row) for row in kept]).reshape(kept.shape))


def order_of(importance: Float[np.ndarray, "P"], keys: Float[np.ndarray, "P"]) -> list[int]:
    """Places by falling key, then by falling importance, then as they stand; those whose key is NaN are left out."""
    places = np.flatnonzero(np.isfinite(keys))
    second = np.where(np.isfinite(importance), importance, -np.inf)
    return sorted(places.tolist(), key=lambda place: (-keys[place], -second[place], place))


def movers(a: KindAnalysis) -> tuple[list[int], list[int]]:
    """Places of the heads whose rank rose most and fell most, the largest change first, MOVERS of each at most."""
    rise, last = a.rise, a.importance[-1] if len(a.importance) else a.rise
    rose = [place for place in order_of(last, rise) if rise[place] > 0]
    fell = [place for place in order_of(last, -rise) if rise[place] < 0]
    return rose[:MOVERS], fell[:MOVERS]

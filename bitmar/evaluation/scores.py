"""A score with its confidence interval and chance level; tables of sums that it is made from; the files of scores.

A table float64 [U, C] holds C sums of each of U units (captions, images, items, pairs) that were drawn independently.
A score is a function of the columns' sums, so that its bootstrap resamples whole units: a percentile interval
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3) of RESAMPLES draws of U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
TOGETHER = 2**20  # units that are drawn at a time
FOLDER = "evaluation"  # in a run's

Statistic = Callable[[np.ndarray], np.ndarray]  # sums [R, C] -> values [R]


@dataclass(frozen=True)
class Score:
    """`low`, `high`: the interval, None where nothing is resampled (sizes; shares of distinct words, which fall with
    every repeated caption). `chance`: what guessing reaches, None where nothing is guessed."""

    task: str
    name: str
    value: float
    low: float | None
    high: float | None
    chance: float | None
    unit: str  # what is resampled: caption, image, item, pair
    count: int  # of those
    measure: str = "fraction"  # or nats/token, rank, words, MB, ...


def ratio(sums: Float[np.ndarray, "R C"]) -> Float[np.ndarray, "R"]:
    """The first column over the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def exp_ratio(sums: Float[np.ndarray, "R C"]) -> Float[np.ndarray, "R"]:
    """exp of it: perplexity of nats and tokens."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def resampled(table: Float[np.ndarray, "U C"], draws: int = RESAMPLES, seed: int = SEED) -> Float[np.ndarray, "R C"]:
    """The columns' sums of each draw of U units with replacement; the same seed draws the same units."""
    return np.concatenate([weights @ table for weights in resamples(len(table), draws, seed)])


def resamples(units: int, draws: int = RESAMPLES, seed: int = SEED) -> Iterator[Int[np.ndarray, "_ U"]]:
    """How often each unit was drawn, some draws at a time."""
    generator = np.random.default_rng(seed)
    together = max(1, min(draws, TOGETHER // units))
    for begin in range(0, draws, together):
        count = min(together, draws - begin)
        drawn = generator.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)


def interval(values: Float[np.ndarray, "R"]) -> tuple[float | None, float | None]:
    """The middle LEVEL of resampled values; those that are not numbers (an empty draw) are left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def scored(
    task: str,
    name: str,
    table: Float[np.ndarray, "U C"],
    unit: str,
    chance: float | None = None,
    statistic: Statistic = ratio,
    measure: str = "fraction",
) -> Score:
    """The score of a table, by default its first column over its second. Units of zeros count as drawn too."""
    assert len(table), f"{task}: {name} of nothing"
    value = float(statistic(table.sum(0)[None])[0])
    return Score(task, name, value, *interval(statistic(resampled(table))), chance, unit, len(table), measure)


def fraction(task: str, name: str, right: np.ndarray, unit: str, chance: float | None) -> Score:
    """The mean of numbers, one a unit."""
    table = np.stack([right.astype(np.float64), np.ones(len(right))], axis=1)
    return scored(task, name, table, unit, chance)


def fact(task: str, name: str, value: float, unit: str, count: int, measure: str) -> Score:
    """A number that nothing was drawn for."""
    return Score(task, name, float(value), None, None, None, unit, count, measure)


def joined(rows: Float[np.ndarray, "N C"], units: Int[np.ndarray, "N"]) -> Float[np.ndarray, "U C"]:
    """The sums of each unit's rows; `units`: of each row, numbers from 0 on."""
    table = np.zeros((int(units.max()) + 1 if len(units) else 0, rows.shape[1]))
    np.add.at(table, units, rows)
    return table


def path_of(run_directory: Path, step: int) -> Path:
    """Where the scores of a run's checkpoint lie (score_file.ScoreFile)."""
    return run_directory / FOLDER / f"step_{step}.json"

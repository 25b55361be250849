"""Scores: the bootstrap resamples whole units, always the same, and its intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitmar.evaluation.scores import (
    SEED,
    exp_ratio,
    fact,
    fraction,
    interval,
    joined,
    ratio,
    resampled,
    scored,
)


def test_a_draw_is_the_sum_over_units_drawn_with_replacement() -> None:
    table = np.random.default_rng(1).random((7, 3))
    generator = np.random.default_rng(SEED)
    for sums in resampled(table, draws=20):
        np.testing.assert_allclose(sums, table[generator.integers(0, 7, 7)].sum(0))


def test_intervals_are_the_same_each_time() -> None:
    table = np.random.default_rng(2).random((50, 2))
    assert scored("a", "b", table, "item") == scored("a", "b", table, "item")


def test_95_percent_intervals_cover_95_percent() -> None:
    """Of 200 samples of 60 items: by more than 4 standard errors off would be wrong (a bootstrap of 60 is a little
    narrow)."""
    generator, covered, truth = np.random.default_rng(3), 0, 0.4
    for _ in range(200):
        score = fraction("a", "b", generator.random(60) < truth, "item", None)
        assert score.low is not None
        assert score.high is not None
        covered += score.low <= truth <= score.high
    assert 0.89 <= covered / 200 <= 0.995


def test_units_of_several_rows_are_drawn_together() -> None:
    """Ten captions of each image that are alike tell no more than one of each."""
    right = np.random.default_rng(4).random(40) < 0.5
    alone = fraction("a", "b", right, "image", None)
    rows = np.stack([np.repeat(right, 10).astype(float), np.ones(400)], axis=1)
    together = scored("a", "b", joined(rows, np.repeat(np.arange(40), 10)), "image")
    assert (together.value, together.count) == (alone.value, 40)
    assert together.low == pytest.approx(alone.low)
    assert together.high == pytest.approx(alone.high)


def test_statistics_of_sums() -> None:
    sums = np.array([[6.0, 3.0], [1.0, 0.0]])
    assert ratio(sums)[0] == 2
    assert math.isinf(ratio(sums)[1])
    assert exp_ratio(sums)[0] == pytest.approx(math.e**2)
    assert interval(np.array([math.nan, 1.0])) == (1, 1)
    assert interval(np.array([math.nan])) == (None, None)


def test_rows_of_a_unit_are_added() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_array_equal(joined(rows, np.array([1, 0, 1])), [[3, 4], [6, 8]])


def test_a_fact_has_no_interval() -> None:
    score = fact("t", "size", 3, "weight", 9, "MB")
    assert (score.value, score.low, score.high, score.chance) == (3.0, None, None, None)

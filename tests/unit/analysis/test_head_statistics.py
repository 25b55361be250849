"""Consistency, stability, layers, rise and fall, dead heads: by hand on small arrays, and what permuting heads does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmar.analysis.head_statistics import (
    KindAnalysis,
    analyse,
    average_ranks,
    first_and_last,
    in_top,
    layer_share,
    mean,
    movers,
    spearman,
)

NAN = np.nan
PER_HEAD = ("importance", "ranks", "top", "consistency", "early_rank", "late_rank", "rise", "dead")


def of(*rows: Sequence[float], layers: int = 1, top_k: int = 2) -> KindAnalysis:
    """Of importance [N, P]; steps are 10, 20, ..."""
    x = np.array(rows)
    return analyse("encoder", 10 * np.arange(1, len(x) + 1), x.reshape(len(x), layers, -1), top_k)


def test_ranks_of_equal_heads_are_their_mean() -> None:
    np.testing.assert_array_equal(average_ranks(np.array([10.0, 20.0, 20.0, 5.0])), [3, 1.5, 1.5, 4])
    np.testing.assert_array_equal(average_ranks(np.array([NAN, 1.0, 1.0, 3.0, np.inf])), [NAN, 2.5, 2.5, 1, NAN])
    np.testing.assert_array_equal(average_ranks(np.array([NAN])), [NAN])


def test_equal_heads_at_the_border_are_all_in_the_top_and_none_without_importance() -> None:
    x = np.array([[3.0, 2.0, 2.0, 0.0], [NAN, 2.0, 2.0, 0.0], [NAN, NAN, NAN, NAN]])
    np.testing.assert_array_equal(in_top(x, 1).astype(int), [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(in_top(x, 2).astype(int), [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(in_top(x, 9), in_top(x, 2))


def test_consistency_by_hand() -> None:
    a = of([5, 4, 3, 1, NAN], [1, 4, 3, 5, NAN], [NAN, 4, 4, 1, NAN])
    np.testing.assert_allclose(a.consistency, [1 / 3, 1, 1 / 3, 1 / 3, NAN])
    assert [int(a.steps[column][0]) for column in a.top.T[:4]] == [10, 10, 30, 20]


def test_steps_without_a_measured_head_do_not_count() -> None:
    a = of([NAN, NAN], [3, 1], [NAN, NAN], [1, 3], top_k=1)
    assert a.steps.tolist() == [20, 40]
    np.testing.assert_array_equal(a.consistency, [0.5, 0.5])
    np.testing.assert_array_equal(a.to_previous, [NAN, -1.0])
    np.testing.assert_array_equal(a.to_last, [-1.0, NAN])


def test_rank_correlation_with_ties_by_hand() -> None:
    # ranks 4, 2.5, 2.5, 1 and 4, 2, 3, 1: sum of products 4.5, of squares 4.5 and 5
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 400])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, NAN, 2, 3]), np.array([5.0, 9, NAN, 7])) == pytest.approx(1)  # of heads 0 and 3


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, NAN], [1.0, 2.0]), ([NAN, 1.0], [2.0, NAN])]
)
def test_rank_correlation_that_does_not_exist(a: list[float], b: list[float]) -> None:
    assert np.isnan(spearman(np.array(a), np.array(b)))


def test_stability_is_with_the_step_before_and_with_the_last() -> None:
    a = of([1, 2, 3], [3, 2, 1], [1, 3, 2])
    np.testing.assert_allclose(a.to_previous, [NAN, -1, -0.5])
    np.testing.assert_allclose(a.to_last, [0.5, -0.5, NAN])


def test_one_step_has_no_stability_and_no_rise() -> None:
    a = of([1, 2, 3])
    assert np.isnan([*a.to_previous, *a.to_last, *a.rise]).all()
    assert movers(a) == ([], [])


def test_nothing_measured_is_no_step() -> None:
    a = of([NAN, NAN], [NAN, NAN])
    assert len(a.steps) == len(a.to_previous) == len(a.to_last) == len(a.layer_share) == 0
    assert np.isnan([*a.consistency, *a.rise]).all()
    assert movers(a) == ([], [])


def test_rise_and_fall_by_hand() -> None:
    middle = [[1.0, 9.0, 1.0]] * 4
    a = of([3, 2, 1], [3, 2, 1], *middle, [1, 2, 3], [2, 1, 3])
    np.testing.assert_array_equal(a.early_rank, [1, 2, 3])
    np.testing.assert_array_equal(a.late_rank, [2.5, 2.5, 1])
    np.testing.assert_array_equal(a.rise, [-1.5, -0.5, 2])
    assert movers(a) == ([2], [0, 1])


def test_at_most_five_movers_are_named_the_largest_first() -> None:
    a = of(list(range(20)), list(range(20))[::-1])
    rose, fell = movers(a)
    assert (rose, fell) == ([0, 1, 2, 3, 4], [19, 18, 17, 16, 15])
    assert a.rise[0] == 19


def test_no_head_rises_because_another_is_pruned() -> None:
    a = of([4, 3, 2, 1], [9, 9, 9, 9], [NAN, 3, 1, 2])
    np.testing.assert_array_equal(a.early_rank, [NAN, 1, 2, 3])
    np.testing.assert_array_equal(a.late_rank, [NAN, 1, 3, 2])
    assert movers(a) == ([3], [2])
    np.testing.assert_array_equal(a.ranks[0], [1, 2, 3, 4])


def test_quarters_are_a_step_at_least() -> None:
    for steps, count in ((2, 1), (7, 1), (8, 2), (200, 50)):
        early, late = first_and_last(np.arange(float(steps))[:, None])
        assert (early[0], late[0]) == ((count - 1) / 2, steps - 1 - (count - 1) / 2)


def test_layers_by_hand() -> None:
    a = of([3, 1, 4, NAN], [0, 0, 0, 0], layers=2)
    np.testing.assert_array_equal(a.layer_share, [[0.5, 0.5], [NAN, NAN]])
    np.testing.assert_array_equal(a.layer_top, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(layer_share(np.array([[1.0, 3.0, NAN, NAN]]), 2), [[1, NAN]])
    assert [str(a.name(place)) for place in range(4)] == [f"encoder.L{i}H{j}" for i in (0, 1) for j in (0, 1)]


def test_dead_is_below_a_hundredth_of_the_mean() -> None:
    a = of([1, 1, 1, 0.0076], [1, 1, 1, 0.0074], [1, 1, NAN, 0.0])  # mean 0.752: the bound is 0.00752
    np.testing.assert_array_equal(a.dead.astype(int), [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]])


def test_mean_is_of_what_is_finite() -> None:
    np.testing.assert_array_equal(mean(np.array([[1.0, NAN, 3.0], [NAN, NAN, NAN]]), 1), [2, NAN])


# few values, so that heads are often equal
IMPORTANCE = st.integers(1, 6).flatmap(
    lambda heads: st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN]), min_size=heads, max_size=heads), min_size=1, max_size=9
    )
)


@given(rows=IMPORTANCE, top_k=st.integers(1, 7), draw=st.randoms(use_true_random=False))
def test_permuting_the_heads_permutes_what_is_told_of_them(rows: list[list[float]], top_k: int, draw: object) -> None:
    order = list(range(len(rows[0])))
    draw.shuffle(order)  # type: ignore[attr-defined]
    a, b = of(*rows, top_k=top_k), of(*np.array(rows)[:, order].tolist(), top_k=top_k)
    for name in PER_HEAD:
        np.testing.assert_allclose(getattr(b, name), getattr(a, name)[..., order], err_msg=name)
    np.testing.assert_array_equal(b.steps, a.steps)
    np.testing.assert_allclose(b.to_previous, a.to_previous, atol=1e-12)
    np.testing.assert_allclose(b.to_last, a.to_last, atol=1e-12)


@given(rows=IMPORTANCE, top_k=st.integers(1, 7), scale=st.sampled_from([2.0**-40, 0.5, 2.0**40]))
def test_only_the_order_of_a_step_counts_and_who_is_missing_is_never_in_the_top(
    rows: list[list[float]], top_k: int, scale: float
) -> None:
    scales = np.where(np.arange(len(rows)) % 2, scale, 1.0)[:, None]
    a, b = of(*rows, top_k=top_k), of(*(np.array(rows) * scales).tolist(), top_k=top_k)
    for name in (*PER_HEAD[1:], "to_previous", "to_last", "layer_share", "layer_top"):
        np.testing.assert_array_equal(getattr(b, name), getattr(a, name), err_msg=name)
    assert not a.top[np.isnan(a.importance)].any()
    assert (a.top.sum(1) >= np.minimum((a.importance > 0).sum(1), top_k)).all()
    better = (a.importance[:, None, :] > a.importance[:, :, None]).sum(2)  # brute force: heads above each
    np.testing.assert_array_equal(a.top, (a.importance > 0) & (better < top_k))

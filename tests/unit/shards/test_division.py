"""Blocks of a division: every record once, known from its number alone, mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.division import Division


@given(st.integers(1, 700), st.integers(1, 300), st.integers(0, 2**40), st.sampled_from(["pairs", "text"]))
def test_every_record_lies_in_one_block(records: int, size: int, seed: int, name: str) -> None:
    division = Division(records, size, seed, name)
    blocks = [division.block(number) for number in range(len(division))]
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(records))


@pytest.mark.parametrize("records", [1, 2, 3, 4, 5, 16, 17, 2**40 + 1])
def test_the_ends_of_the_range(records: int) -> None:
    division = Division(records, 1000, 0, "x")
    assert len(division) == -(-records // 1000)
    last = division.block(len(division) - 1)
    assert ((last >= 0) & (last < records)).all()
    assert len(np.unique(last)) == len(last)


def test_seeds_and_names_give_other_orders() -> None:
    orders = [Division(1000, 1000, seed, name).block(0) for seed in (0, 1, 2**33) for name in ("pairs", "text")]
    assert len({order.tobytes() for order in orders}) == len(orders)
    for order in orders:  # about one in a thousand keeps its place
        assert (order == np.arange(1000)).sum() < 10
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15


def test_sources_mix_in_every_block_as_by_chance() -> None:
    """A tenth of the records from one source: counts a block vary as in draws without replacement, and neighbours
    are no more often of one source than chance has it."""
    division = Division(200_000, 2000, 3, "pairs")
    rare = np.stack([division.block(number) < 20_000 for number in range(100)])
    deviations = (rare.sum(axis=1) - 200) / np.sqrt(2000 * 0.1 * 0.9 * (1 - 2000 / 200_000))
    assert np.abs(deviations).max() < 4.5
    assert 0.7 < deviations.std() < 1.3
    runs = (rare[:, 1:] & rare[:, :-1]).mean()
    assert abs(runs - 0.01) < 5 * np.sqrt(0.01 / rare[:, 1:].size)
    together = [(np.diff(division.block(number)) == 1).sum() for number in range(100)]
    assert sum(together) < 10  # records that were neighbours

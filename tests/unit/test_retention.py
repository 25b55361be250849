"""Which checkpoints are kept, and at which steps the words seen pass a milestone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmar.config import CheckpointConfig
from bitmar.engine.retention import Candidate, Keep, WordMilestones, milestones, removable


def candidates(*keeps: Keep) -> list[Candidate]:
    """Checkpoints of steps 10, 20, ..."""
    return [Candidate(Path(str(10 * (i + 1))), 10 * (i + 1), keep) for i, keep in enumerate(keeps)]


def test_the_last_are_kept() -> None:
    assert removable(candidates(*[Keep()] * 5), keep_last=2, keep_best=0) == [Path("10"), Path("20"), Path("30")]
    assert removable(candidates(Keep()), keep_last=2, keep_best=0) == []


def test_the_best_are_kept_besides_the_last() -> None:
    losses = (3.0, 1.0, None, 2.0, 1.5, 4.0)
    found = removable(candidates(*(Keep(validation_loss=loss) for loss in losses)), keep_last=1, keep_best=2)
    assert found == [Path("10"), Path("30"), Path("40")]


def test_milestones_are_kept_for_ever() -> None:
    found = removable(candidates(Keep((1_000_000,)), Keep(), Keep((2_000_000,), 9.0), Keep()), 1, 0)
    assert found == [Path("20")]


def test_babylm_milestones() -> None:
    counts = [count // 1_000_000 for count in milestones(CheckpointConfig(word_milestones=True))]
    assert counts == [*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100)]
    assert milestones(CheckpointConfig(word_milestones=(5, 3))) == (3, 5)
    assert milestones(CheckpointConfig()) == ()


@given(
    words=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    wanted=st.sets(st.integers(1, 4000), max_size=8),
    resume=st.integers(0, 199),
)
def test_each_milestone_is_told_at_the_first_step_that_passes_it(
    words: list[int], wanted: set[int], resume: int
) -> None:
    """At most 40 words a step; also where the run goes on from a checkpoint."""
    resume = min(resume, len(words) - 1)
    seen = sum(words[:resume])
    following = WordMilestones(wanted, seen, words_per_step_max=40)
    for count in words[resume:]:
        before, seen = seen, seen + count
        expected = tuple(sorted(milestone for milestone in wanted if before < milestone <= seen))
        assert following.passed(lambda now=seen: now) == expected


def test_the_count_is_seldom_asked_for() -> None:
    following, asked = WordMilestones([100_000], 0, words_per_step_max=100), []
    for step in range(1, 2001):
        following.passed(lambda now=step * 50: asked.append(now) or now)
    assert asked[-1] == 100_000
    assert len(asked) < 20


@pytest.mark.parametrize("wish", [[0], [-5, 3]])
def test_a_milestone_is_a_number_of_words(wish: list[int]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.word_milestones"):
        CheckpointConfig(word_milestones=tuple(wish))

"""Which checkpoints of a run are kept: the last ones, the best ones, and those at word milestones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bitmar.config import CheckpointConfig

MILLION = 1_000_000
# BabyLM asks for checkpoints at 1M..10M, 20M..100M and 200M..1000M words seen
BABYLM_MILESTONES = tuple(count * MILLION for count in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100)))


@dataclass(frozen=True)
class Keep:
    """Why a checkpoint may be kept beyond its turn; state.json holds it."""

    milestone_words: tuple[int, ...] = ()  # passed at its step: kept for ever
    validation_loss: float | None = None  # measured at its step: competes for being the best


@dataclass(frozen=True)
class Candidate:
    directory: Path
    step: int
    keep: Keep


def removable(checkpoints: Iterable[Candidate], keep_last: int, keep_best: int) -> list[Path]:
    """The checkpoints that are neither among the last, nor the best, nor at a milestone; oldest first."""
    by_step = sorted(checkpoints, key=lambda candidate: candidate.step)
    measured = [candidate for candidate in by_step if candidate.keep.validation_loss is not None]
    best = sorted(measured, key=lambda candidate: candidate.keep.validation_loss or 0.0)[:keep_best]
    kept = {candidate.step for candidate in by_step[-keep_last:] + best}
    return [c.directory for c in by_step if c.step not in kept and not c.keep.milestone_words]


def milestones(config: CheckpointConfig) -> tuple[int, ...]:
    """The word counts at which a checkpoint is made, ascending."""
    wish = config.word_milestones
    if isinstance(wish, bool):
        return BABYLM_MILESTONES if wish else ()
    return tuple(sorted(wish))


class WordMilestones:
    """Tells at which step the words seen pass a milestone, asking for the count only when one can be near.

    Reading the count makes a GPU's queue run empty, so it is left alone for as many steps as it takes at least to
    reach the next milestone: no step trains more words than it has token positions.
    """

    def __init__(self, wanted: Iterable[int], words: int, words_per_step_max: int) -> None:
        """`words`: seen so far; milestones up to there are past."""
        self._ahead = sorted(count for count in wanted if count > words)
        self._words_per_step_max = words_per_step_max
        self._quiet_steps = self._steps_at_least(words)

    def passed(self, count: Callable[[], int]) -> tuple[int, ...]:
        """Milestones that the step just made has passed; to be called once a step. `count`: words of all ranks."""
        if not self._ahead:
            return ()
        if self._quiet_steps > 1:
            self._quiet_steps -= 1
            return ()
        words = count()
        passed = tuple(milestone for milestone in self._ahead if milestone <= words)
        self._ahead = self._ahead[len(passed) :]
        self._quiet_steps = self._steps_at_least(words)
        return passed

    def _steps_at_least(self, words: int) -> int:
        """Steps that it takes at least to reach the next milestone."""
        return -(-(self._ahead[0] - words) // self._words_per_step_max) if self._ahead else 0

"""What becomes of a milestone whose checkpoint could not be written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bitmar.config import CheckpointConfig, WandbConfig
from bitmar.engine.checkpoint import Saved
from bitmar.engine.progress import Progress
from bitmar.engine.retention import WordMilestones
from bitmar.observability.sinks import NullSink
from bitmar.saving import mark_due, tell_saved


def run_at(step: int, words: int, milestones: WordMilestones, due: tuple[int, ...] = ()) -> Any:
    """As much of a Run as saving looks at."""
    return SimpleNamespace(
        config=SimpleNamespace(checkpoint=CheckpointConfig(every_steps=10), wandb=WandbConfig()),
        progress=Progress("id", step=step, words=words),
        counted=torch.zeros(2, dtype=torch.int64),
        milestones=milestones,
        milestones_due=due,
        save_due=False,
        saved_at=step,
        sinks=NullSink(),
    )


def test_a_milestone_waits_for_the_next_save_where_its_own_failed() -> None:
    milestones = WordMilestones([100], 0, words_per_step_max=100)
    run = run_at(3, 120, milestones)
    mark_due(run)
    assert run.save_due
    assert run.milestones_due == (100,)
    run.save_due, run.milestones_due = False, ()  # the save has begun
    tell_saved(run, [Saved(3, Path("step_3"), (100,), "No space left on device", None, 0.0)])
    assert run.saved_at == -1
    assert run.milestones_due == (100,)
    run.progress = Progress("id", step=4, words=150)
    mark_due(run)
    assert not run.save_due  # not at every step: the disk is full
    run.progress = Progress("id", step=10, words=300)
    mark_due(run)
    assert run.save_due
    assert run.milestones_due == (100,)


def test_a_milestone_that_was_saved_is_not_due_again() -> None:
    run = run_at(3, 120, WordMilestones([], 120, words_per_step_max=100))
    tell_saved(run, [Saved(3, Path("step_3"), (100,), None, None, 0.0)])
    assert run.milestones_due == ()
    assert run.saved_at == 3

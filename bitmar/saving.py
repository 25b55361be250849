"""When a run saves, and what its log tells of it."""

from __future__ import annotations

from bitmar.assembly import Run
from bitmar.engine.checkpoint import Saved
from bitmar.engine.retention import Keep


def mark_due(run: Run) -> tuple[int, ...]:
    """After a step: note whether a checkpoint of it is asked for, by its number or by a milestone in words. The
    milestones that it has passed."""
    passed = run.milestones.passed(lambda: run.progress.words + int(run.counted[0]))
    run.milestones_due += passed
    run.save_due |= run.progress.step % run.config.checkpoint.every_steps == 0 or bool(passed)
    return passed


def save(run: Run, wait: bool = False) -> None:
    """Begin a checkpoint of a step just logged, unless the last one is of it; `wait`: until it is on the disk."""
    run.save_due = False
    if run.saved_at != run.progress.step:
        run.guard.beat("saving", run.progress.step)
        loss = run.validation.get("Validation/Loss") if run.validated_at == run.progress.step else None
        keep, run.milestones_due = Keep(run.milestones_due, loss), ()
        run.saved_at = run.progress.step
        tell_saved(run, run.saver.save(run.engine, run.memory, run.progress, run.identity, keep))
        run.guard.beat("saved", run.progress.step)
    if wait:
        tell_saved(run, run.saver.wait())


def tell_saved(run: Run, ended: list[Saved]) -> None:
    """Log how saves ended. One that failed has taken nothing away, and training goes on; the next one stands for the
    milestones that it was to keep."""
    for saved in ended:
        if saved.problem is not None:
            run.sinks.event("checkpoint_failed", step=saved.step, problem=saved.problem)
            run.saved_at = -1 if run.saved_at == saved.step else run.saved_at
            run.milestones_due = saved.milestone_words + run.milestones_due
        else:
            hold = round(saved.hold_seconds, 4)
            run.sinks.event("checkpoint", step=saved.step, path=str(saved.path), hold_seconds=hold)
            if run.config.wandb.log_model_checkpoints:
                run.sinks.artifact("checkpoint", f"{run.config.run.name}-checkpoint", [saved.path])
        if saved.left_over is not None:
            run.sinks.event("warning", problem=saved.left_over)

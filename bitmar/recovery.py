"""What a run does about losses and gradients that are not finite, and about losses that spike.

Going back before a spike and leaving out the batches around it: Chowdhery et al. 2022, "PaLM: Scaling Language
Modeling with Pathways", section 5.1.
"""

from __future__ import annotations

import dataclasses
import statistics

import torch

from bitmar.assembly import Run, await_milestones, open_loader
from bitmar.batch import Batch
from bitmar.engine import checkpoint
from bitmar.engine.faults import TrainingError, is_spike, save_batches
from bitmar.engine.progress import checkpoint_directories
from bitmar.engine.step import StepResult
from bitmar.observability.derived import History
from bitmar.saving import tell_saved
from bitmar.watch import Window


def count_skips(run: Run, batches: list[Batch], result: StepResult) -> None:
    """Count an update that was left out. Raises TrainingError, on all ranks, after too many in a row."""
    if not result.skipped:
        if run.progress.skipped_in_a_row:
            run.progress = dataclasses.replace(run.progress, skipped_in_a_row=0)
        return
    step, in_a_row = run.progress.step + 1, run.progress.skipped_in_a_row + 1
    run.progress = dataclasses.replace(run.progress, skipped=run.progress.skipped + 1, skipped_in_a_row=in_a_row)
    finite = run.world.gather_objects(bool(torch.isfinite(result.objective)))
    cause = f"loss of ranks {[rank for rank, fine in enumerate(finite) if not fine]}" if not all(finite) else "gradient"
    run.sinks.event("skipped_update", step=step, not_finite=cause, in_a_row=in_a_row)
    if in_a_row < run.config.faults.max_skipped_in_a_row:
        return
    folder = run.config.run_directory / "nonfinite"
    problem = None
    try:
        save_batches(folder, batches, step, run.world.rank)
    except OSError as error:
        problem = f"but for a rank's that could not be written ({error.strerror})"
    problems = [told for told in run.world.gather_objects(problem) if told is not None]
    run.sinks.event("not_finite", step=step, updates_left_out=in_a_row, batches=folder)
    raise TrainingError(
        f"the {cause} was not finite by step {step}, {in_a_row} steps in a row, whose updates were left out; the "
        f"batches of the last lie in {folder}{''.join(f', {told}' for told in problems[:1])}; lower "
        "optimizer.peak_rate or training.gradient_clip, and go on from a checkpoint before (--resume FOLDER)"
    )


def undo_spike(run: Run, result: StepResult) -> bool:
    """Where the step's loss spikes, go back to a checkpoint before it. True where it went back.

    The step itself is not counted yet. Raises TrainingError where the run went back too often already.
    """
    config, progress = run.config.faults, run.progress
    if config.spike_factor == 0 or result.skipped:
        return False
    loss = float(run.world.sum(result.objective))  # of all ranks, the same bits on each
    if not is_spike(loss, progress.recent_losses, config):
        recent = [*progress.recent_losses, loss][-config.spike_window :]
        run.progress = dataclasses.replace(progress, recent_losses=recent)
        return False
    step, first = progress.step, max(0, progress.step + 1 - config.spike_skip_steps)  # counted from 0
    usual = statistics.median(progress.recent_losses)
    run.sinks.event("loss_spike", step=step + 1, loss=loss, median=usual)
    if progress.rewinds >= config.spike_max_rewinds:
        raise TrainingError(
            f"the loss spiked at step {step + 1} ({loss:.3g} after a median of {usual:.3g}), after going back "
            f"{progress.rewinds} times (faults.spike_max_rewinds); lower optimizer.peak_rate"
        )
    return go_back(run, list(range(first, step + 1)))


def go_back(run: Run, left_out: list[int]) -> bool:
    """Restore the newest checkpoint that holds none of the steps `left_out` (counted from 0), and leave them out from
    now on. Where all are later, the oldest; where there is none, False and nothing changes."""
    tell_saved(run, run.saver.wait())
    whole = checkpoint_directories(run.config.run_directory)
    before = [path for path in whole if checkpoint.read_state(path)["progress"]["step"] <= left_out[0]]
    chosen = run.world.broadcast_object((before[:1] or whole[-1:] or [None])[0])
    if chosen is None:
        run.sinks.event("warning", message="there is no checkpoint to go back to: the spike stays")
        return False
    had = run.progress
    run.guard.beat("going back", had.step)
    run.memory, progress = checkpoint.load(chosen, run.engine, run.identity, run.world)
    run.progress = dataclasses.replace(
        progress,
        left_out=sorted({*had.left_out, *left_out}),
        rewinds=had.rewinds + 1,
        seconds=had.seconds + run.window.seconds,
        validation_due=False,
    )
    if run.world.is_first:
        checkpoint.set_aside_later(chosen)  # a resumed run must not take them
    run.world.barrier()
    run.loader = open_loader(run.config, run.shards, run.progress, run.world)
    run.watch.statistics.reset()
    run.watch.clock.read()
    run.counted.zero_()
    run.window = Window.of(len(run.window.sources))
    run.saved_at, run.save_due, run.validated_at = run.progress.step, False, -1
    run.milestones, run.milestones_due = await_milestones(run.config, run.progress), ()
    cut = run.sinks.truncate_after(run.progress.step)
    if run.world.is_first:
        run.watch.history = History.read(run.config.run_directory)
    if run.watch.board is not None:
        run.watch.board.go_back(run.progress.step)
    steps = [step + 1 for step in left_out]
    run.sinks.event("went_back", step=run.progress.step, steps_left_out=steps, lines_cut=cut)
    return True

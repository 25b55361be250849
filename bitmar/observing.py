"""What a run tells of itself: statistics of its steps, and the log of them and of its probes (bitmar/probing.py).

Every rank fills the same metrics at the same steps, whatever its batch holds; one reduction a log joins them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from bitmar.assembly import Run
from bitmar.batch import IGNORE
from bitmar.config import COMPONENTS, WandbConfig
from bitmar.engine.census import HISTOGRAM_EDGES, Census
from bitmar.engine.step import Latents, StepResult
from bitmar.model.flops import Work, training_flops
from bitmar.model.memory import MemoryState
from bitmar.observability.board import PICTURE_FOLDERS
from bitmar.observability.derived import derive
from bitmar.observability.head_analysis import without_step
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import LATENTS, LOSS_NAMES, PARTS, TERNARY, title
from bitmar.observability.stats import Statistics
from bitmar.probing import ends_epoch, is_analysis_due
from bitmar.watch import Window
from shards.loader import LoaderState
from shards.rows import Rows


def is_observed(run: Run, state: LoaderState) -> bool:
    """Whether the step that comes next, at `state`, is to be looked at closely: a log follows it."""
    step = run.progress.step + 1
    return is_log_due(run, step, state) or step % run.config.checkpoint.every_steps == 0


def is_log_due(run: Run, step: int, state: LoaderState) -> bool:
    """After `step`, whose rows stood at `state`, whatever else asks for one."""
    config = run.config.wandb
    intervals = [config.log_every_n_steps]
    intervals += [config.attention_log_interval] if run.watch.probes.heads else []
    intervals += [config.pca_log_interval] if run.watch.probes.latents else []
    return (
        step == run.last_step
        or any(step % interval == 0 for interval in intervals)
        or is_analysis_due(run, step, state)
    )


def observe(run: Run, rows: list[Rows], result: StepResult) -> None:
    """Add a step to the statistics; nothing is read back from the device. Losses of an update that was left out would
    make the means of the others NaN."""
    s = run.watch.statistics
    if not result.skipped:
        fill_losses(s, result, run.config.training.gradient_clip, run.world.size)
        if run.config.wandb.log_features:
            fill_latents(s, result.latents)
    if result.census is not None:
        fill_census(s, result.census, run.config.wandb, result.skipped)
    s.add("Data/Wait_Seconds", run.loader.wait_seconds)
    count_rows(run, rows)
    if result.writes.slots:
        run.window.written = result.writes.slots


def fill_losses(s: Statistics, result: StepResult, clip: float, ranks: int) -> None:
    """What a step's losses and writes were."""
    s.add("Training/Loss", result.objective, 1 / ranks)
    for name, total in result.sums.items():
        s.add(f"Training/Loss_{LOSS_NAMES[name]}", total, result.counts[name])
        s.add(f"Training/Loss_Share_{LOSS_NAMES[name]}", result.parts[name], result.objective)
    tokens = result.counts["lm"]
    s.add("Training/Perplexity", result.sums["lm"], tokens)
    s.add("Training/Token_Accuracy", result.hits, tokens)
    norm = torch.as_tensor(result.gradient_norm)
    s.add("Gradients/Total_Norm", norm)
    s.peak("Gradients/Total_Norm_Max", norm)
    s.add("Gradients/Clipped_Fraction", norm > clip)
    s.add("Memory/Writes", len(result.writes.slots))
    s.add("Memory/Blends", result.writes.blends)
    s.add("Memory/Evictions", result.writes.evictions)
    s.add("Memory/Gate_Mean", result.memory_gate)
    if result.latents:  # the step was observed
        s.add("Training/Prediction_Entropy", result.entropy, tokens)
        if "recall" in result.sums:
            for place, cue in enumerate(("Image", "Text")):
                s.add(f"Memory/Recall_Cosine_{cue}", result.recall_cosines[place], result.counts["recall"])


def fill_latents(s: Statistics, latents: Sequence[Latents]) -> None:
    """Numbers of the latents of the rows that count; of vision and episode, those with an image."""
    if not latents:
        return
    text, vision, episode, valid, pairs = (torch.cat(parts) for parts in zip(*latents, strict=True))
    for name, x, counted in zip(LATENTS, (text, vision, episode), (valid, pairs, pairs), strict=True):
        x = x.float()
        rows, hidden = counted.sum(), ~counted
        totals, norms = x.sum(1, dtype=torch.float64), torch.linalg.vector_norm(x, dim=1).double()
        total, numbers = (totals * counted).sum(), rows * x.shape[1]
        s.add(f"Features/{name}_Mean", total, numbers)
        s.add(f"Features/{name}_Std", total, numbers, (norms.square() * counted).sum())
        s.add(f"Features/{name}_Norm", (norms * counted).sum(), rows)
        s.peak(f"Features/{name}_Min", x.amin(1).masked_fill(hidden, torch.inf).amin(), rows)
        s.peak(f"Features/{name}_Max", x.amax(1).masked_fill(hidden, -torch.inf).amax(), rows)


def fill_census(s: Statistics, census: Census, config: WandbConfig, skipped: bool) -> None:
    """Gradients, updates and ternary weights by component; of a step that was left out only what it says of that."""
    total, sizes = census.gradients.sum(0), census.sizes
    s.add("Gradients/NonFinite_Count", total[3])
    if skipped:
        return
    if config.log_gradients:
        names = [title(name) for name in COMPONENTS]
        g, none = census.gradients, torch.zeros_like(sizes)
        s.add_all([f"Gradients/{name}_Norm" for name in names], g[:, 1], none + 1)
        s.add_all([f"Gradients/{name}_Mean" for name in names], g[:, 0], sizes)
        s.add_all([f"Gradients/{name}_Std" for name in names], g[:, 0], sizes, g[:, 1])
        s.add("Gradients/Total_Mean", total[0], sizes.sum())
        s.add("Gradients/Total_Std", total[0], sizes.sum(), total[1])
        largest = torch.cat([g[:, 2], g[:, 2].amax(0, keepdim=True)])
        s.peak_all([f"Gradients/{name}_Max" for name in (*names, "Total")], largest)
        updates = census.updates
        s.add_all([f"Gradients/{name}_Update_To_Weight" for name in names], updates[:, 0], updates[:, 1])
        s.add("Gradients/Update_To_Weight", *updates.sum(0))
    for group, counts in (("Gradients", census.gradient_histograms), ("Model", census.weight_histograms)):
        if counts is not None:
            for row, name in enumerate(COMPONENTS):
                s.add(f"{group}/Histogram_{title(name)}", counts[row])
    if config.log_quantization and len(census.scales):
        s.add("Quantization/Matrix_Size", census.ternary[:, 0])
        s.add("Quantization/Matrix_Zeros", census.ternary[:, 1])
        s.add("Quantization/Matrix_Plus", census.ternary[:, 2])
        s.same("Quantization/Matrix_Scale", census.scales)
        rows = [COMPONENTS.index(name) for name in TERNARY]
        flips = census.flips[rows]
        s.add_all([f"Quantization/Flips_{title(name)}" for name in TERNARY], flips[:, 0], flips[:, 1])


def count_rows(run: Run, rows: list[Rows]) -> None:
    """What the step's rows held."""
    s, w = run.watch.statistics, run.window
    tokens = sum(int((part.targets != IGNORE).sum()) for part in rows)
    slots = sum(part.targets.size for part in rows)
    s.add("Data/Padding_Efficiency", tokens, slots)
    w.steps += 1
    w.tokens += tokens
    w.padded_tokens += slots
    for part in rows:
        w.samples += part.samples
        w.words += int(part.words.sum())
        w.work += work_of(part)
        counted = part.has_vision if part.has_vision.any() else np.repeat(part.valid, part.slots)
        w.sources += np.bincount(part.sources[counted], minlength=len(w.sources))


def work_of(rows: Rows) -> Work:
    """The real tokens, query-key pairs and images of rows."""
    inside = (rows.segments > 0) & rows.valid[:, None]
    attended = float((rows.positions[inside] + 1).sum(dtype=np.float64))
    return Work(float(inside.sum()), attended, float(rows.has_vision.sum()))


def fill_progress(run: Run) -> None:
    """Where the run stands, the same on every rank."""
    s, config = run.watch.statistics, run.config
    assert run.window.last is not None, "there was a step since the last log"
    state, rates = run.window.last
    epoch = (state.position + 1) / run.lengths[state.phase] * run.loader.order.epochs(state.phase)
    s.same("Training/Learning_Rate", rates.learning_rate)
    s.same("Training/Weight_Decay", rates.weight_decay)
    s.same("Training/Epoch", epoch)
    s.same("Training/Step", run.progress.step)
    s.same("Training/Words", run.progress.words)
    s.same("Training/Phase", state.phase)
    s.same("Training/Skipped_Updates", run.progress.skipped)
    s.same("Training/Batch_Size", config.training.global_batch)
    s.same("Data/Damaged_Samples", len(run.damaged))
    s.same("Data/Epoch_Progress", epoch - math.ceil(epoch - 1e-9) + 1)  # 1 at an epoch's last step


def fill_throughput(run: Run) -> None:
    """This rank's rates and where its time went."""
    s, w, rank = run.watch.statistics, run.window, run.world.rank
    seconds = run.watch.clock.read()
    if not w.steps:  # all were left out
        return
    s.add("Throughput/Samples_Per_Second", w.samples / w.seconds)
    s.add("Throughput/Words_Per_Second", w.words / w.seconds)
    s.add("Throughput/Tokens_Per_Second", w.tokens / w.seconds)
    s.add("Throughput/Padded_Tokens_Per_Second", w.padded_tokens / w.seconds)
    s.add("Throughput/Step_Seconds", w.seconds, w.steps)
    for part in PARTS:
        s.add(f"Throughput/{part}_Seconds", seconds.get(part, 0.0), w.steps)
    s.add("Throughput/TFLOPs", training_flops(run.config.model, w.work).total / w.seconds / 1e12)
    own = torch.zeros(run.world.size, dtype=torch.float64)
    own[rank] = (seconds.get("Data", 0.0) + seconds.get("Forward", 0.0)) / w.steps
    s.add("Throughput/Rank_Seconds", own.to(s.device))
    for name, count in zip(run.watch.layout.sources, w.sources.tolist(), strict=True):
        s.add(f"Data/Source_Share_{name}", count, float(w.sources.sum()))


def fill_memory_state(s: Statistics, memory: MemoryState, written_last: Sequence[int]) -> None:
    """What the memory's state tells, the same on every rank."""
    written, usage = memory.written, memory.usage
    s.same("Memory/Active_Slots_Percentage", 100 * written.double().mean())
    s.same("Memory/Age_Mean", (memory.age * written).sum() / written.sum().clamp(min=1))
    s.same("Memory/Age_Max", (memory.age * written).amax())
    share = usage / usage.sum().clamp(min=1e-30)
    s.same("Memory/Usage_Mean", usage.mean())
    s.same("Memory/Usage_Entropy", torch.special.entr(share).sum())
    s.same("Memory/Top_5_Slot_Access", share.topk(min(5, len(share))).values.sum())
    unit = torch.nn.functional.normalize(memory.values.double(), dim=-1) * written[:, None]
    count = written.sum().double()
    pairs = (count * (count - 1)).clamp(min=1)
    s.same("Memory/Analysis_Avg_Similarity", (unit.sum(0).square().sum() - unit.square().sum()) / pairs)
    if written_last:
        s.same("Memory/Write_Norm", memory.values[list(written_last)].double().norm(dim=-1).mean())


def log(run: Run) -> None:
    """Reduce the statistics since the last log over all ranks and hand them to the sinks."""
    s, w, config = run.watch.statistics, run.window, run.config.wandb
    settle(run)
    words, samples = run.counted.tolist()
    run.counted.zero_()
    run.progress = dataclasses.replace(
        run.progress, words=run.progress.words + words, samples=run.progress.samples + samples
    )
    gather_damage(run)
    fill_progress(run)
    fill_throughput(run)
    if config.log_memory:
        fill_memory_state(s, run.memory, w.written)
    run.watch.system.fill(s)
    reduced = reduce(s, run.world)
    s.reset()
    run.progress = dataclasses.replace(run.progress, seconds=run.progress.seconds + w.seconds)
    run.window = Window.of(len(w.sources))
    if run.world.is_first:
        numbers = derive(reduced, run.watch.layout, run.watch.peak_tflops)
        run.sinks.log(run.progress.step, numbers | run.watch.history.add(numbers))
        for name, counts in reduced.arrays.items():
            if "/Histogram_" in name:
                run.sinks.histogram(run.progress.step, name, counts.tolist(), HISTOGRAM_EDGES.tolist())
        assert w.last is not None, "there was a step since the last log"
        hand_over(run, reduced.arrays, w.last[0])
    run.watch.clock.mark("Logging")


def hand_over(run: Run, arrays: dict[str, np.ndarray], state: LoaderState) -> None:
    """Give the board what a log tells beside its numbers. `state`: of the step just done."""
    board, step = run.watch.board, run.progress.step
    if board is None:
        return
    if board.makes_pictures:
        kept = ("usage", "age", "written", "image_ids") if run.config.wandb.log_memory else ()
        memory = {name: run.memory.tensors()[name].cpu().numpy().copy() for name in kept}
        board.take(step, arrays, memory or None)
    caption, run.watch.caption = run.watch.caption, None
    if is_analysis_due(run, step, state):
        board.take_heads(step, arrays, run.config.attention_analysis, caption)


def settle(run: Run) -> None:
    """Wait for what a GPU still has to do of the steps since the last log, which is a part of their time."""
    if run.world.device.type == "cuda":
        started = time.perf_counter()
        torch.cuda.synchronize()
        run.window.seconds += time.perf_counter() - started


def gather_damage(run: Run) -> None:
    """Bring together what damaged samples the ranks have met, and list the new ones."""
    new = set(run.loader.damaged) - run.damaged
    if not run.world.any(bool(new)):
        return
    union = set[tuple[str, str]]().union(*run.world.gather_objects(new))
    for shard, key in sorted(union - run.damaged):
        run.sinks.event("damaged_sample", shard=shard, key=key)
    run.damaged |= union


def draw(run: Run, state: LoaderState) -> None:
    """Have pictures made after the last step of an epoch whose number the recipe names for them, and show those made.

    `state`: of the step just done. Those of the run's last step are made once it is validated, by train.finish.
    """
    if run.watch.board is None:
        return
    cadences = run.config.wandb.plot_every_n_epochs, run.config.attention_analysis.viz_every_n_epochs
    due = [name for name, every in zip(PICTURE_FOLDERS, cadences, strict=True) if ends_epoch(run, state, every)]
    if due and run.progress.step < run.last_step:
        run.watch.board.draw(run.progress.step, due)
    show_pictures(run)


def show_pictures(run: Run) -> None:
    """Hand pictures that have become ready to the sinks."""
    if run.watch.board is None:
        return
    for step, path in run.watch.board.pictures():
        run.sinks.image(step, f"Plots/{without_step(path)}", path)
    for problem in run.watch.board.problems():
        run.sinks.event("warning", message=problem)


def log_start(run: Run) -> None:
    """What does not change: the sizes of the model, once for a run."""
    s, sizes = run.watch.statistics, run.watch.sizes
    for name, count in run.watch.parameters.items():
        s.same(f"Model/Parameters_{title(name)}", count)
    s.same("Model/Parameters_Total", sum(run.watch.parameters.values()))
    s.same("Model/Size_MB_Full", sizes.full / 1e6)
    s.same("Model/Size_MB_Packed", sizes.packed / 1e6)
    s.same("Model/Compression_Ratio", sizes.full / sizes.packed)
    if sizes.ternary_packed:
        s.same("Quantization/Compression_Ratio", sizes.ternary_full / sizes.ternary_packed)
    numbers = reduce(s, run.world).numbers
    s.reset()
    run.sinks.log(run.progress.step, numbers)

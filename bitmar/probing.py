"""Passes of the probe set: what heads, memory, rounded activations and latents do with held-out captions.

The same captions at every pass, spread over the ranks; the figures join the statistics of the log that follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bitmar.assembly import Run
from bitmar.batch import Batch
from bitmar.engine.census import component_of
from bitmar.model.quantize import RoundedInput, looked_at
from bitmar.observability.features import (
    effective_rank,
    principal_plane,
    reconstruction,
    similarity,
    source_consistency,
)
from bitmar.observability.probes import (
    RealPositions,
    RoundingSums,
    fill_heads,
    fill_memory,
    first_caption,
    gates_of,
)
from bitmar.observability.schema import LATENTS, title
from shards.loader import LoaderState

SHOWN_CAPTIONS = 4  # of the probe set, in the picture of cross-modal attention


def ends_epoch(run: Run, state: LoaderState, every: int) -> bool:
    """Whether the step at `state` is the last of an epoch of its phase's sources whose number `every` divides."""
    a_step = run.loader.order.epochs(state.phase) / run.lengths[state.phase]
    before, after = (math.floor(n * a_step + 1e-9) for n in (state.position, state.position + 1))
    return after // every > before // every


def _steps_of_epochs(run: Run, state: LoaderState, every: int) -> int:
    """How many steps a phase has had up to the one at `state`, where an epoch whose number `every` divides ends, since
    the last such end."""
    a_step = run.loader.order.epochs(state.phase) / run.lengths[state.phase]
    ended = math.floor((state.position + 1) * a_step + 1e-9)
    last = (ended // every - 1) * every
    return state.position + 1 - math.ceil((last - 1e-9) / a_step)


def is_analysis_due(run: Run, step: int, state: LoaderState) -> bool:
    """Whether attention_analysis/ is to tell of `step`, whose rows stood at `state`: at its cadence, and at the end of
    an epoch after which its pictures are drawn, where the cadence has not come since the pictures before."""
    config = run.config.attention_analysis
    every, epochs = config.log_every_n_steps, config.viz_every_n_epochs
    due = step % every == 0
    if not due and ends_epoch(run, state, epochs):
        due = step // every == (step - _steps_of_epochs(run, state, epochs)) // every
    return bool(run.watch.probes.heads) and due


def is_analysed(run: Run) -> bool:
    """Whether attention_analysis/ tells of the step just done."""
    assert run.window.last is not None, "there was a step since the last log"
    return is_analysis_due(run, run.progress.step, run.window.last[0])


def probe(run: Run) -> None:
    """Pass the probe set through the model where its cadence asks for it, just before the log that tells of it."""
    step, config = run.progress.step, run.config.wandb
    run.guard.beat("probing", step)
    if config.log_attention and (step % config.attention_log_interval == 0 or is_analysed(run)):
        for number, batch in enumerate(run.watch.probes.heads):
            pass_heads(run, batch, shown=number == 0)
    if config.log_features and step % config.pca_log_interval == 0 and run.watch.probes.latents:
        gather_latents(run)


def pass_heads(run: Run, batch: Batch, shown: bool = False) -> None:
    """What the heads, the memory and the rounded activations of the probe set do; the gates' gradients alone are taken,
    by torch.autograd.grad: a backward pass would reach the engine's own gradients.

    `shown`: its first captions are, in pictures and patterns."""
    s, board, written = run.watch.statistics, run.watch.board, run.memory.written
    with run.engine.frozen(), watched_rounding(run, batch):
        outputs = run.engine.forward(batch, run.memory, heads=True)
        gradients = torch.autograd.grad(outputs.loss, gates_of(outputs.heads))
    fill_heads(s, outputs.heads, gradients, batch, written)
    read = outputs.heads["memory"][0].weights[:, 0]
    if run.config.wandb.log_memory:
        fill_memory(s, read, run.memory.values, written, batch.token_mask & batch.has_vision[:, None])
    if not shown or board is None:
        return
    analysis = run.config.attention_analysis
    if analysis.save_head_patterns and is_analysed(run):
        run.watch.caption = first_caption(outputs.heads, batch, analysis.kinds)
    if board.makes_pictures and run.config.wandb.log_attention_maps:
        seen = outputs.heads["cross_modal"][-1].weights.mean(1)[:SHOWN_CAPTIONS]
        tokens = batch.tokens[:SHOWN_CAPTIONS] * batch.token_mask[:SHOWN_CAPTIONS]
        board.take_captions(run.progress.step, tokens.cpu().numpy(), seen.float().cpu().numpy())


@contextmanager
def watched_rounding(run: Run, batch: Batch) -> Iterator[None]:
    """The inputs of rounded layers in here add to Quantization/Activation_*."""
    layers = run.engine.rounded if run.config.wandb.log_quantization else []
    if not layers:
        yield
        return
    components = list(dict.fromkeys(component_of(name) for name, _ in layers))
    sums, real = RoundingSums(components, run.world.device), RealPositions.of(batch)

    def look(name: str, x: Tensor, rounded: RoundedInput) -> None:
        sums.add(component_of(name), x, rounded, real.among(name, x))

    with looked_at(layers, look):
        yield
    table = sums.table()
    for what, (above, below) in {"Zero": (0, 1), "Error": (2, 3)}.items():
        names = [f"Quantization/Activation_{what}_{title(component)}" for component in components]
        run.watch.statistics.add_all(names, table[:, above], table[:, below])


@torch.no_grad()
def gather_latents(run: Run) -> None:
    """Latents of the second probe set, of all ranks, and what they tell together."""
    parts: list[list[Tensor]] = []
    with run.engine.frozen():
        for rows in run.watch.probes.latents:
            batch = Batch.from_rows(rows, run.world.device)
            out = run.engine.forward(batch, run.memory)
            sources = torch.from_numpy(rows.sources).to(run.world.device)
            shown = (out.text_latent, out.vision_latent, out.episodes, batch.vision)
            parts.append([*(x.float() for x in shown), batch.image_ids, sources, batch.pair_mask])
    joined = [run.world.gather(torch.cat(column)).flatten(0, 1) for column in zip(*parts, strict=True)]
    text, vision, episodes, vectors, ids, sources = (x[joined[-1]] for x in joined[:-1])
    if len(text) < 2:
        return
    s = run.watch.statistics
    for name, latents in zip(LATENTS, (text, vision, episodes), strict=True):
        s.same(f"Features/{name}_Effective_Rank", effective_rank(latents))
    own, other = similarity(text, vision, ids)
    s.same("Features/CrossModal_Similarity", own)
    s.same("Features/CrossModal_Similarity_Unmatched", other)
    s.same("Features/CrossModal_Similarity_Margin", own - other)
    if len(sources.unique()) > 1:
        s.same("Features/Source_Consistency", source_consistency(text, sources))
    mse, l1 = reconstruction(episodes, vectors)
    s.same("Features/Vision_Reconstruction_MSE", mse)
    s.same("Features/Vision_Reconstruction_L1", l1)
    board = run.watch.board
    if board is not None and board.makes_pictures and run.config.wandb.log_feature_pca:
        values = {"sources": sources.cpu().numpy(), "names": np.array(run.watch.layout.sources)}
        for name, latents in (("text", text), ("vision", vision)):
            plane, shares = principal_plane(latents)
            values |= {name: plane.cpu().numpy(), f"{name}_shares": shares.cpu().numpy()}
        board.take_latents(run.progress.step, values)

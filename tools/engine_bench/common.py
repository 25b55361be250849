"""What the groups of rows share: real captions in shards, recipes that train them, verdicts, a bare torch loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bitmar.batch import Batch
from bitmar.config import Config, load_config
from bitmar.engine.schedule import rates_at
from bitmar.engine.world import World
from bitmar.losses import compute_losses, loss_counts
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import Episodes, MemoryState, commit
from shards.loader import Loader, LoaderState, ShardSet
from tools.data_bench.records import ROOT, Records

Row = dict[str, Any]  # name, ours, theirs, ratio or value, unit, bar, ok
ENDLESS = 10**6  # steps, more than any round takes
MEMORY_PHASE = (
    "phases=[{name: memory, steps: %d, mix: {pairs: 1.0}, losses: {lm: 1.0, contrastive: 0.1, recall: 0.1}, "
    "write_memory: true}]"
)


@dataclass(frozen=True)
class Bench:
    """What a group of rows gets: an empty folder of the run, and whether it must be quick."""

    folder: Path
    quick: bool
    validation_fraction: float = 0.0

    @cached_property
    def records(self) -> Records:
        """Real captions, repeated so that length buckets are as full as those of a corpus."""
        place = self.folder / "records"
        place.mkdir()
        return Records(place, 2 if self.quick else 8, self.validation_fraction)

    @cached_property
    def shards(self) -> ShardSet:
        return ShardSet.open(self.records.shards)

    def config(self, recipe: str, name: str, *overrides: str) -> Config:
        """A recipe's memory phase, which has every part and loss, on captions; nothing is saved or validated."""
        path = ROOT / "launch" / "recipes" / f"{recipe}.yaml"
        own = [
            f"data.shards={self.records.shards}",
            f"run.directory={self.folder / 'runs'}",
            f"run.name={name}",
            MEMORY_PHASE % ENDLESS,
            f"training.max_epochs={ENDLESS}",
            f"checkpoint.every_steps={ENDLESS}",
            f"validation.every_steps={ENDLESS}",
            f"engine.ds_config={ROOT / 'ds_configs' / 'zero1.json'}",
        ]
        if self.quick:
            own += [
                "training.global_batch=32",
                "training.micro_batch=32",
                "model.encoder_layers=2",
                "model.decoder_layers=2",
            ]
        return load_config(path, [*own, *overrides])

    def verdict(self, values: Sequence[float], holds: Callable[[float], bool]) -> bool | None:
        """Whether the median holds. A quick run's small model and few rounds refute nothing: None where any fails."""
        if self.quick:
            return all(holds(value) for value in values) or None
        return holds(median(values))


def on_gpus() -> bool:
    """Whether ranks compute on GPUs, as bitmar.engine.world decides it."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def measured_world() -> tuple[int, str]:
    """(ranks, their precision as an override) where ranks are measured: one a GPU in what it is fast in, or two."""
    return (torch.cuda.device_count(), "training.precision=auto") if on_gpus() else (2, "training.precision=fp32")


@dataclass
class Clock:
    """Wall and CPU seconds (all threads of this process) of what runs inside."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._began[0]
        self.cpu = time.process_time() - self._began[1]


def step_batches(loader: Loader, step: int, world: World) -> list[Batch]:
    """The micro-batches of a step, as the trainer gets them."""
    return [Batch.from_rows(rows, world.device) for rows in loader.step_rows(LoaderState(0, step))]


class BareLoop:
    """The same model, optimiser, clip, losses and memory in a plain torch loop: no engine, no log, no statistics."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.taken = config, world, 0
        torch.manual_seed(config.run.seed)
        self.model = BitMar(config.model, config.run.seed)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if (p.ndim > 1) == matrices], "decays": matrices}
            for matrices in (True, False)
        ]
        rates = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(rates.beta1, rates.beta2), eps=rates.eps, fused=True)
        self.memory = MemoryState.empty(config.model.memory_size, config.model.episode_dim)

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over micro-batches."""
        config, phase = self.config, self.config.phases[0]
        rates = rates_at(self.taken, ENDLESS, config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rates.learning_rate
            group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0
        counts = [loss_counts(batch) for batch in batches]
        divisor = {name: sum(c[name] for c in counts).clamp(min=1) for name in phase.losses}  # type: ignore[union-attr]
        offered, mass = [], torch.zeros(config.model.memory_size, dtype=torch.float64)
        for batch in batches:
            outputs = self.model(batch, self.memory, True)
            losses = compute_losses(outputs, batch, self.world, config.model, set(phase.losses))
            parts = [weight * losses.sums[name] / divisor[name] for name, weight in phase.losses.items()]
            torch.stack(parts).sum().backward()
            mass += outputs.read_mass
            found = losses.surprise, batch.captions, batch.image_ids, outputs.keys.detach(), outputs.episodes.detach()
            offered.append(Episodes(*found).best(config.model.writes_per_step))
        nn.utils.clip_grad_norm_(self.model.parameters(), config.training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        written = commit(self.memory, Episodes.join(offered), mass, config.model, config.run.seed, self.taken)
        self.memory = written[0]
        self.taken += 1


def ratio_row(
    name: str, ours: Sequence[float], theirs: Sequence[float], unit: str, digits: int = 3, **more: object
) -> Row:
    """Medians of both sides, and the median of the ratios ours / theirs of each round."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "name": name,
        "ours": round(median(ours), digits),
        "theirs": round(median(theirs), digits),
        "ratio": round(median(ratios), 3),
        "unit": unit,
        **more,
    }

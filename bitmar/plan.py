"""What a run will take, told before it starts: bytes of a rank, steps, words, floating point operations, time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitmar.config import Config, PhaseConfig
from bitmar.engine.memory_plan import (
    StateBytes,
    ZeroSettings,
    activation_bytes,
    memory_module_bytes,
    parameter_groups,
    state_bytes,
)
from bitmar.model.bitmar import BitMar, parameter_counts
from bitmar.model.flops import Flops, Work, training_flops
from shards.corpus import PAIRS, TEXT, Corpus
from shards.order import Order

GIB = 2**30
# What allocators and libraries hold on top. CUDA: context and libraries' workspaces (1.30 GiB of an H100 beside what
# torch 2.11 reserved, three models; NCCL among several ranks not measured). CPU: glibc keeps freed pieces of what comes
# and goes in a step; with 0.4 of it the plan is 0.84 to 1.13 of the growth of a new process (worlds and stages of
# tests/integration/test_memory_plan.py).
FIXED_BYTES = {"cuda": int(1.3 * GIB), "cpu": 0}
FRAGMENTED = {"cuda": 0.1, "cpu": 0.4}  # of activations, gathered weights and buckets
# Of the corpus where there are no shards to count: a caption's words, a text record's words, positions a word
ASSUMED_CAPTION_WORDS, ASSUMED_RECORD_WORDS, ASSUMED_POSITIONS = 14.0, 400.0, 1.4


@dataclass(frozen=True)
class Source:
    """The training split of one modality: words, positions (tokens and one a record), records, query-key pairs."""

    words: float
    positions: float
    records: float
    attended: float

    @classmethod
    def assumed(cls, words: float, record_words: float, row_tokens: int) -> Source:
        """From words alone, by the constants above."""
        positions = words * ASSUMED_POSITIONS
        length = min(record_words * ASSUMED_POSITIONS, row_tokens)
        return cls(words, positions, words / record_words, positions * (length + 1) / 2)


@dataclass(frozen=True)
class PhaseLength:
    name: str
    steps: int
    words: int
    work: Work  # of all its steps


@dataclass(frozen=True)
class Plan:
    """Bytes are those of the fullest rank."""

    config: Config
    settings: ZeroSettings
    world: int
    device: str
    parameters: dict[str, int]  # by component
    state: StateBytes
    activations: int
    memory_module: int
    phases: tuple[PhaseLength, ...]
    counted: bool  # phases are those of shards, not of assumptions

    @property
    def overhead(self) -> int:
        """What allocators and libraries hold on top."""
        passing = self.activations + self.state.gathered + self.state.buckets
        return FIXED_BYTES[self.device] + int(FRAGMENTED[self.device] * passing)

    @property
    def device_bytes(self) -> int:
        """The most that a rank needs on its device: in the backward pass, or in the update.

        While gradients come, activations go; gradients that accumulate are there before the pass begins.
        """
        state = self.state
        fixed = state.parameters + state.optimizer + self.memory_module + self.overhead
        if self.config.accumulation_steps(self.world) > 1 or self.settings.stage == 3:
            backward = self.activations + state.gradients
        else:
            backward = max(self.activations, state.gradients)
        return fixed + max(backward + state.buckets + state.gathered, state.gradients + state.step)

    @property
    def steps(self) -> int:
        total = sum(phase.steps for phase in self.phases)
        return min(total, self.config.training.max_steps or total)

    @property
    def work(self) -> Work:
        """Of the steps that are taken."""
        total = Work()
        left = self.steps
        for phase in self.phases:
            taken = min(left, phase.steps)
            total += phase.work.times(taken / phase.steps if phase.steps else 0.0)
            left -= taken
        return total

    @property
    def words(self) -> int:
        left, words = self.steps, 0.0
        for phase in self.phases:
            taken = min(left, phase.steps)
            words += phase.words * taken / max(phase.steps, 1)
            left -= taken
        return round(words)

    @property
    def flops(self) -> Flops:
        return training_flops(self.config.model, self.work)

    def seconds(self, peak_flops: float, mfu: float) -> float:
        """Wall time where every rank reaches `mfu` of `peak_flops` operations a second."""
        return self.flops.total / (self.world * peak_flops * mfu)


def make_plan(
    config: Config,
    settings: ZeroSettings,
    world: int,
    phases: Sequence[PhaseLength],
    *,
    device: str,
    dtype: torch.dtype,
    counted: bool,
) -> Plan:
    """Raises ConfigError where `world` ranks do not divide the batch."""
    config.check_world(world)
    with torch.device("meta"):
        model = BitMar(config.model)
    return Plan(
        config=config,
        settings=settings,
        world=world,
        device=device,
        parameters=parameter_counts(model),
        state=state_bytes(parameter_groups(model), settings, world),
        activations=activation_bytes(config, dtype, config.micro_batch(world)),
        memory_module=memory_module_bytes(config.model),
        phases=tuple(phases),
        counted=counted,
    )


def counted_sources(corpus: Corpus, row_tokens: int) -> dict[str, Source]:
    """The sources of a corpus by what a mix may call them: a modality, or a name."""
    named = {}
    for name in {PAIRS, TEXT} | {source for source, _ in corpus.sources}:
        entries = np.isin(corpus.source, corpus.chosen(name))
        if not entries.any():
            continue
        lengths = corpus.counts[entries[corpus.counts[:, 0]]].astype(np.float64)
        whole, rest = np.divmod(lengths[:, 1] + 1, row_tokens)
        attended = (whole * row_tokens * (row_tokens + 1) + rest * (rest + 1)) / 2 * lengths[:, 2]
        words, tokens, samples = (int(a[entries].sum()) for a in (corpus.words, corpus.tokens, corpus.samples))
        named[name] = Source(words, tokens + samples, samples, float(attended.sum()))
    return named


def assumed_sources(text_words: float, pair_words: float, row_tokens: int) -> dict[str, Source]:
    """Sources of so many words, where there are no shards."""
    return {
        TEXT: Source.assumed(text_words, ASSUMED_RECORD_WORDS, row_tokens),
        PAIRS: Source.assumed(pair_words, ASSUMED_CAPTION_WORDS, row_tokens),
    }


def counted_phases(config: Config, order: Order, corpus: Corpus) -> list[PhaseLength]:
    """Steps and words of the order itself; positions and pairs by the sources' means."""
    sources = counted_sources(corpus, config.data.row_tokens)
    captions = {name for name, modality in corpus.sources if modality == PAIRS} | {PAIRS}
    lengths = []
    for number, phase in enumerate(config.phases):
        steps, words = order.steps(number), order.words(number)
        lengths.append(_length(config, phase, sources, captions, steps, words))
    return lengths


def assumed_phases(config: Config, sources: dict[str, Source]) -> list[PhaseLength]:
    """Steps and words from sources of assumed sizes. Raises KeyError with a mix's name that is none of them."""
    batch, lengths = config.training.global_batch, []
    for phase in config.phases:
        mixed = {name: sources[name] for name in phase.mix}
        rows = {name: _rows(config, name, source) for name, source in mixed.items()}
        whole = sum(-(-count // batch) for count in rows.values())  # steps of an epoch
        if phase.steps is not None:
            weight = sum(phase.mix.values())
            words = sum(phase.mix[n] / weight * phase.steps * batch * s.words / rows[n] for n, s in mixed.items())
            steps = phase.steps
        else:
            words = sum(source.words for source in mixed.values())
            epochs = phase.epochs if phase.epochs is not None else (phase.words or 0) / max(words, 1)
            steps, words = max(1, round(epochs * whole)), words * epochs
        lengths.append(_length(config, phase, sources, {PAIRS}, int(steps), int(words)))
    return lengths


def _rows(config: Config, name: str, source: Source) -> int:
    packed = name == TEXT or config.data.pack_captions
    return max(1, round(source.positions / config.data.row_tokens if packed else source.records))


def _length(
    config: Config, phase: PhaseConfig, sources: dict[str, Source], captions: set[str], steps: int, words: int
) -> PhaseLength:
    """The work of `words` of a phase, shared out over its sources as its steps are."""
    mixed = {name: sources[name] for name in phase.mix}
    if phase.steps is None:  # by the sources' sizes
        share = {name: source.words for name, source in mixed.items()}
    else:
        share = {
            n: phase.mix[n] * s.words / _rows(config, TEXT if n not in captions else n, s) for n, s in mixed.items()
        }
    total, work = sum(share.values()), Work()
    for name, source in mixed.items():
        factor = words * share[name] / total / source.words if total and source.words else 0.0
        seen = source.records if name in captions else 0.0
        work += Work(source.positions, source.attended, seen).times(factor)
    return PhaseLength(phase.name, steps, words, work)


def table(plan: Plan) -> str:
    """The plan as a person reads it."""
    state = plan.state
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    config, settings = plan.config, plan.settings
    accumulation = config.accumulation_steps(plan.world)
    lines = [
        f"parameters        {total:,} ({parts})",
        f"ranks             {plan.world}, ZeRO-{settings.stage}{_offloads(settings)}; {config.training.global_batch} "
        f"rows a step = {plan.world} x {config.micro_batch(plan.world)} x {accumulation} micro-batches",
        "",
        f"a rank's memory, {plan.device}",
        *(f"  {name:<16}{_gib(count):>10}" for name, count in memory_parts(plan).items() if count),
        f"  {'in all at most':<16}{_gib(plan.device_bytes):>10}  (gradients and activations peak apart)",
    ]
    if state.host or state.disk:
        places = (("host memory", state.host), ("disk", state.disk))
        lines += [f"  {name:<16}{_gib(count):>10}  a rank" for name, count in places if count]
    lines += ["", f"{'phase':<18}{'steps':>10}{'words':>16}{'positions':>16}"]
    lines += [f"{p.name:<18}{p.steps:>10,}{p.words:>16,}{round(p.work.tokens):>16,}" for p in plan.phases]
    lines.append(f"{'taken':<18}{plan.steps:>10,}{plan.words:>16,}{round(plan.work.tokens):>16,}")
    if not plan.counted:
        lines.append(
            f"  no shards at {config.data.shards}: assumed {ASSUMED_CAPTION_WORDS:g} words a caption, "
            f"{ASSUMED_POSITIONS:g} positions a word"
        )
    flops = plan.flops
    lines += ["", f"operations        {flops.total:.3g} ({flops.text:.3g} text, {flops.vision:.3g} vision)"]
    return "\n".join(lines)


def memory_parts(plan: Plan) -> dict[str, int]:
    """Bytes on the device by what they are for."""
    state = plan.state
    return {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimiser": state.optimizer,
        "update": state.step,
        "buckets": state.buckets,
        "gathered weights": state.gathered,
        "activations": plan.activations,
        "memory module": plan.memory_module,
        "overhead": plan.overhead,
    }


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, elements, operations."""
    return {
        "parameters": plan.parameters,
        "world": plan.world,
        "stage": plan.settings.stage,
        "bytes": memory_parts(plan) | {"total": plan.device_bytes, "host": plan.state.host, "disk": plan.state.disk},
        "phases": [
            {"name": p.name, "steps": p.steps, "words": p.words, **dataclasses.asdict(p.work)} for p in plan.phases
        ],
        "steps": plan.steps,
        "words": plan.words,
        "counted": plan.counted,
        "flops": dataclasses.asdict(plan.flops),
    }


def _offloads(settings: ZeroSettings) -> str:
    moved = {"optimiser": settings.optimizer_on, "parameters": settings.parameters_on}
    told = [f"{what} on {where}" for what, where in moved.items() if where != "none"]
    return f" ({', '.join(told)})" if told else ""


def _gib(count: int) -> str:
    return f"{count / GIB:,.3f} GiB"

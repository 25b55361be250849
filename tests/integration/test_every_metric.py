"""Every metric of the schema on two ranks with different data, one of them without an image, against a plain
computation over the joined data in one process: ZeRO 0 to 3 and offload, accumulation, clipping on.

`CHECKS` holds one check a line of the schema; a line without one fails.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitmar import observing, probing
from bitmar.batch import IGNORE, Batch
from bitmar.config import COMPONENTS, Config, DataConfig, EngineConfig, PhaseConfig, TrainingConfig, WandbConfig
from bitmar.engine.census import HISTOGRAM_EDGES
from bitmar.engine.schedule import Rates
from bitmar.engine.step import train_step
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.evaluating import evaluate_captions
from bitmar.evaluation.perplexity import POOL, validate, without_vision
from bitmar.losses import compute_losses
from bitmar.model.bitmar import BitMar, Outputs, component_parameters, parameter_counts, parameter_sizes
from bitmar.model.flops import Work, training_flops
from bitmar.model.memory import MemoryState
from bitmar.model.quantize import BitLinear, quantize_activations
from bitmar.observability.derived import History, derive
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import (
    DEAD_SHARE,
    OF_SEVERAL_LOGS,
    TEMPLATES,
    Cadence,
    Layout,
    Metric,
    schema_of,
    select,
    title,
)
from bitmar.observability.stats import Statistics
from bitmar.observability.system import SystemProbe
from bitmar.watch import Probes, Window
from shards.loader import LoaderState
from shards.rows import Rows
from shards.tokenizer import BOS
from tests.support.batches import VOCABULARY, caption_batch, rows_of, slice_batch, small_model, text_batch
from tests.support.ranks import run_ranks
from tests.support.states import whole_states

ROWS, RANKS, CLIP = 16, 2, 0.05
RATES = Rates(2e-3, 0.1)
LOSSES = {"lm": 1.0, "contrastive": 0.5, "recall": 0.3}
SOURCES = ("stories", "pictures", "talk")
CASES = [
    *((stage, f"ds_configs/zero{stage}.json", micro) for stage in range(4) for micro in (8, 2)),
    *((stage, f"ds_configs/zero{stage}-offload.json", 4) for stage in (2, 3)),
]
SECONDS = ({"Data": 0.5, "Forward": 2.0, "Backward": 3.0}, {"Data": 0.1, "Forward": 6.0, "Update": 1.0, "Logging": 0.2})
GPU = [  # absent without one
    *(f"System/GPU_Memory_{figure}" for figure in ("Allocated", "Reserved", "Peak", "Percent")),
    *(f"System/GPU_Utilization_{figure}" for figure in ("Max", "Mean")),
    *(f"System/Node_{{node}}_GPU_{figure}" for figure in ("Memory_Peak", "Memory_Percent", "Utilization_Max")),
]


def config_of(ds_config: str, micro: int) -> Config:
    phase = PhaseConfig("all", {"pairs": 1.0}, LOSSES, write_memory=True, steps=10)
    return Config(
        DataConfig("none"),
        (phase,),
        model=small_model(contrastive_group=2, recall_group=2, encoder_layers=3),
        training=TrainingConfig(global_batch=ROWS, micro_batch=micro, gradient_clip=CLIP),
        engine=EngineConfig(ds_config=ds_config),
        wandb=WandbConfig(log_histograms=True),
    )


def rank_batch(step: int, rank: int) -> Batch:
    """Eight captions for rank 0, eight rows of text for rank 1."""
    make = caption_batch if rank == 0 else text_batch
    return make(rows=ROWS // RANKS, seed=10 * step + rank, first_row=step * ROWS + rank * ROWS // RANKS)


def probe_batch(rank: int) -> Batch:
    return caption_batch(rows=4, seed=50 + rank, first_row=4 * rank)


class HeldOut:
    """A validation set of given batches; permuted, each image is the one of the next row."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.rows = len(batch.rows) * RANKS
        self.sample_of_row = np.arange(self.rows)

    def batches(self, vision: str = "right") -> list[Rows]:
        other = self._batch.vision.roll(1, 0) if vision == "permuted" else self._batch.vision
        return [rows_of(self._batch.replace(vision=other), [0] * len(self._batch.rows))]


def validation_batch(rank: int) -> Batch:
    batch = caption_batch(rows=6, seed=80 + rank, first_row=6 * rank)
    first = torch.full_like(batch.tokens[:, :1], BOS)
    return batch.replace(tokens=torch.cat([first, batch.tokens[:, 1:]], dim=1))


def measure(world: World, folder: str, cases: list[tuple[int, str, int]]) -> list[dict[str, Any]]:
    """What two ranks measure in each case, with the states that it can be worked out from."""
    return [measure_one(world, Path(folder), config_of(path, micro)) for _, path, micro in cases]


def measure_one(world: World, folder: Path, config: Config) -> dict[str, Any]:
    torch.manual_seed(0)
    model = BitMar(config.model, seed=1)
    parameters, sizes = parameter_counts(model), parameter_sizes(model)
    engine = ZeroEngine(model, config, world)
    matrices = tuple(m.name for m in engine.matrices)
    layout = Layout(config.model, world.size, world.size, SOURCES, matrices, len(HISTOGRAM_EDGES) - 1)
    statistics = Statistics(schema_of(layout))
    mine = probe_batch(world.rank)
    watch = SimpleNamespace(
        layout=layout,
        statistics=statistics,
        parameters=parameters,
        sizes=sizes,
        probes=Probes((mine,), (rows_of(mine, [world.rank, 1, 2, 0]),)),
        clock=SimpleNamespace(read=lambda: SECONDS[world.rank]),
        peak_tflops=0.5,
        board=None,
    )
    run: Any = SimpleNamespace(
        config=config,
        world=world,
        engine=engine,
        watch=watch,
        lengths=[10],
        damaged={("a", "b")},
        loader=SimpleNamespace(wait_seconds=0.25, order=SimpleNamespace(epochs=lambda phase: 3.0)),
        memory=MemoryState.empty(config.model.memory_size, config.model.episode_dim),
        window=Window(sources=np.zeros(len(SOURCES), np.int64), last=(LoaderState(0, 4), RATES)),
        progress=SimpleNamespace(step=5, words=777, skipped=3),
        logged=[],
    )
    run.sinks = SimpleNamespace(log=lambda step, numbers: run.logged.append(numbers))
    observing.log_start(run)
    told: dict[str, Any] = {"start": run.logged[0]}
    for step in range(2):
        engine.set_rates(RATES, COMPONENTS)
        told |= {f"states{step}": whole_states(engine, world), f"memory{step}": run.memory.tensors()}
        statistics.reset()
        whole = rank_batch(step, world.rank)
        micro = config.micro_batch(world.size)
        batches = [slice_batch(whole, at, at + micro) for at in range(0, ROWS // RANKS, micro)]
        result = train_step(engine, batches, run.memory, config.phases[0], config, world, step, observe=True)
        run.memory = result.memory
        run.window.steps, run.window.seconds = 0, 4.0 + world.rank
        observing.observe(run, [rows_of(whole, [world.rank, 1, 1, 0, 2, 2, 1, 0])], result)
    told |= {"states2": whole_states(engine, world), "memory2": run.memory.tensors(), "written": result.writes.slots}
    told |= {"blends": result.writes.blends, "evictions": result.writes.evictions}
    finish_measuring(run, folder, told)
    return told


def finish_measuring(run: Any, folder: Path, told: dict[str, Any]) -> None:
    statistics, world = run.watch.statistics, run.world
    for batch in run.watch.probes.heads:
        probing.pass_heads(run, batch)
    probing.gather_latents(run)
    observing.fill_progress(run)
    observing.fill_throughput(run)
    observing.fill_memory_state(statistics, run.memory, run.window.written)
    probe = SystemProbe(folder, world.device, world.rank)
    sum(i * i for i in range(1_000_000))  # work that the clock of the process tells of
    probe.fill(statistics)
    process = psutil.Process()
    told["process"] = [world.gather_objects(x) for x in (process.memory_info().rss, process.num_fds())]
    payload = reduce(statistics, world)
    told["numbers"] = derive(payload, run.watch.layout, run.watch.peak_tflops)
    told["histograms"] = {n: torch.from_numpy(a) for n, a in payload.arrays.items() if "/Histogram_" in n}
    told["window"] = world.gather_objects((run.window.samples, run.window.words, run.window.tokens))
    validation = Statistics(select(schema_of(run.watch.layout), Cadence.VALIDATION))
    run.engine.train(False)
    text = HeldOut(text_batch(rows=3, seed=90 + world.rank))
    captions: Any = HeldOut(validation_batch(world.rank))

    def forward(batch: Batch, memory: MemoryState) -> Outputs:
        return run.engine.forward(batch, memory)

    tables = validate(forward, captions, text, run.memory, world, validation)  # type: ignore[arg-type]
    evaluation = Statistics(select(schema_of(run.watch.layout), Cadence.EVALUATION))
    model = run.engine.module
    evaluate_captions(forward, model, captions, captions, tables, VOCABULARY, run.memory, world, evaluation)
    told["numbers"] |= reduce(evaluation, world).numbers
    told["numbers"] |= reduce(validation, world).numbers | told["start"]
    told["nonfinite"] = [name for name, value in told["numbers"].items() if not math.isfinite(value)]


@dataclass
class Joined:
    """One process with the data of both ranks, from the weights that the ranks had."""

    told: dict[str, Any]
    config: Config

    def model(self, at: int) -> BitMar:
        model = BitMar(self.config.model, seed=1)
        model.load_state_dict({name: states["model"] for name, states in self.told[f"states{at}"].items()})
        return model

    def memory(self, at: int) -> MemoryState:
        return MemoryState(**self.told[f"memory{at}"])

    @cached_property
    def batches(self) -> list[Batch]:
        return [rank_batch(1, rank) for rank in range(RANKS)]

    @cached_property
    def trained(self) -> tuple[BitMar, list[Outputs], dict[str, Tensor], Tensor]:
        """(model with gradients, outputs, sums of the losses, objective) of the second step."""
        model, alone = self.model(1), World(0, 1, 0, 1, torch.device("cpu"))
        outputs = [model(b, self.memory(1), recall=True, logits=True) for b in self.batches]
        parts = [
            compute_losses(o, b, alone, self.config.model, set(LOSSES)).sums
            for o, b in zip(outputs, self.batches, strict=True)
        ]
        sums = {name: torch.stack([p[name] for p in parts]).sum() for name in LOSSES}
        objective = torch.stack([LOSSES[name] * sums[name] / self.count(name) for name in LOSSES]).sum()
        objective.backward()
        return model, outputs, {name: value.detach() for name, value in sums.items()}, objective.detach()

    def count(self, loss: str) -> int:
        return self.tokens if loss == "lm" else sum(int(b.pair_mask.sum()) for b in self.batches)

    @cached_property
    def tokens(self) -> int:
        return sum(int((b.targets != IGNORE).sum()) for b in self.batches)

    @cached_property
    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        """([tokens, V], their targets), from logits."""
        rows, targets = [], []
        for batch, out in zip(self.batches, self.trained[1], strict=True):
            asked = batch.targets != IGNORE
            assert out.logits is not None
            rows.append(out.logits.detach()[asked].double().log_softmax(-1))
            targets.append(batch.targets[asked])
        return torch.cat(rows), torch.cat(targets)

    def loss(self, name: str) -> float:
        return float(self.trained[2][name]) / self.count(name)

    def share(self, name: str) -> float:
        return LOSSES[name] * self.loss(name) / float(self.trained[3])

    @cached_property
    def lm(self) -> float:
        table, targets = self.log_probabilities
        return float(-table.gather(1, targets[:, None]).mean())

    @cached_property
    def hits(self) -> float:
        table, targets = self.log_probabilities
        return float((table.gather(1, targets[:, None])[:, 0] >= table.amax(1)).double().mean())

    @cached_property
    def entropy(self) -> float:
        table = self.log_probabilities[0]
        return float(-(table.exp() * table).sum(1).mean())

    def recall_cosine(self, cue: int) -> float:
        cosines = []
        for batch, out in zip(self.batches, self.trained[1], strict=True):
            assert out.recalled is not None
            cosines.append(F.cosine_similarity(out.recalled[:, cue], out.episodes)[batch.pair_mask])
        return float(torch.cat(cosines).detach().mean())

    def gradients(self, component: str | None) -> Tensor:
        """All numbers of the true gradient of a component, or of all."""
        groups = component_parameters(self.trained[0])
        chosen = [p for name, group in groups.items() if component in (None, title(name)) for _, p in group]
        return torch.cat([p.grad.flatten() for p in chosen if p.grad is not None]).double()

    def update_ratio(self, component: str | None) -> float:
        changes, weights = [], []
        for name, after in self.told["states2"].items():
            if component in (None, title(name.split(".")[0])):
                before = self.told["states1"][name]["model"].double()
                changes.append((after["model"].double() - before).flatten())
                weights.append(after["model"].double().flatten())
        return float(torch.cat(changes).norm() / torch.cat(weights).norm())

    def latents(self, name: str) -> Tensor:
        rows = []
        for batch, out in zip(self.batches, self.trained[1], strict=True):
            values = {"Text": out.text_latent, "Vision": out.vision_latent, "Episode": out.episodes}[name]
            rows.append(values.detach()[batch.valid if name == "Text" else batch.pair_mask])
        return torch.cat(rows).double()

    def ternary(self, component: str | None, at: int = 1) -> tuple[Tensor, Tensor]:
        """(ternary values, the gamma of each) of a component's matrices, one after the other."""
        values, scales = [], []
        for name, module in self.model(at).named_modules():
            if isinstance(module, BitLinear) and component in (None, title(name.split(".")[0])):
                value, scale = module.ternary_weight()
                values.append(value.flatten())
                scales.append(scale.expand_as(value).flatten())
        return torch.cat(values), torch.cat(scales).double()

    def flips(self, component: str) -> float:
        """Of every sixteenth weight of each matrix."""
        changed = count = 0
        models = [self.model(at) for at in (0, 1)]
        for (name, old), (_, new) in zip(*(m.named_modules() for m in models), strict=True):
            if not isinstance(old, BitLinear) or title(name.split(".")[0]) != component:
                continue
            pairs = zip(*(m.ternary_weight()[0].split(old.sections) for m in (old, new)), strict=True)  # type: ignore[union-attr]
            for before, after in pairs:
                one, other = before.flatten()[::16], after.flatten()[::16]
                changed, count = changed + int((one != other).sum()), count + len(one)
        return changed / count

    @cached_property
    def probed(self) -> tuple[list[Batch], list[Outputs], list[list[Tensor]]]:
        """(batches, outputs, gradients of the gates) of the probes, by the weights after the second step."""
        model, batches = self.model(2).eval(), [probe_batch(rank) for rank in range(RANKS)]
        outputs = [model(b, self.memory(2), heads=True) for b in batches]
        gradients = []
        for out in outputs:
            gates = [heads.gates for layers in out.heads.values() for heads in layers]
            gradients.append(list(torch.autograd.grad(out.loss, gates, retain_graph=True)))
        return batches, outputs, gradients

    def queries(self, batch: Batch, kind: str) -> Tensor:
        asked = batch.targets != IGNORE
        return asked if kind in ("Encoder", "Decoder") else asked & batch.has_vision[:, None]

    def weights(self, kind: str, layer: int) -> list[Tensor]:
        """Attention weights [H, S] of every query of the probes."""
        name = {"Encoder": "encoder", "Decoder": "decoder", "CrossModal": "cross_modal", "Memory": "memory"}[kind]
        rows = []
        for batch, out in zip(*self.probed[:2], strict=True):
            table = out.heads[name][layer].weights.double()
            for row, at in self.queries(batch, kind).nonzero().tolist():
                seen = at + 1 if kind in ("Encoder", "Decoder") else table.shape[-1]
                rows.append(table[row, :, at, :seen])
        return rows

    def layers(self, kind: str) -> int:
        return Layout(self.config.model).heads[kind][0]

    def head_entropy(self, kind: str, layer: int) -> float:
        found = []
        for w in self.weights(kind, layer):
            whole = torch.cat([w, (1 - w.sum(-1, keepdim=True)).clamp(min=0)], -1) if kind == "Memory" else w
            found.append(torch.special.entr(whole / whole.sum(-1, keepdim=True)).sum(-1).mean())
        return float(torch.stack(found).mean())

    def concentration(self, kind: str) -> float:
        found, written = [], int(self.memory(2).written.sum())
        for layer in range(self.layers(kind)):
            for w in self.weights(kind, layer):
                keys = written if kind == "Memory" else w.shape[-1]
                found.append(w.topk(math.ceil(keys / 10)).values.sum(-1).mean())
        return float(torch.stack(found).mean())

    def first_mass(self, kind: str) -> float:
        found = [w[:, 0].mean() for layer in range(self.layers(kind)) for w in self.weights(kind, layer)]
        return float(torch.stack(found).mean())

    def importance(self, kind: str) -> Tensor:
        """[L, H]"""
        batches, outputs, gradients = self.probed
        total, samples = torch.zeros(*Layout(self.config.model).heads[kind], dtype=torch.float64), 0
        kinds = list(Layout(self.config.model).heads)
        for batch, out, grads in zip(batches, outputs, gradients, strict=True):
            asked = self.queries(batch, kind).sum(1)
            begin = sum(len(layers) for layers in list(out.heads.values())[: kinds.index(kind)])
            for row in asked.nonzero()[:, 0].tolist():
                samples += 1
                for layer in range(len(total)):
                    total[layer] += grads[begin + layer][row].abs().double() / asked[row]
        return total / samples

    @cached_property
    def dead(self) -> int:
        tables = [self.importance(kind) for kind in Layout(self.config.model).heads]
        return sum(int((t < DEAD_SHARE * t.mean()).sum()) for t in tables)

    @cached_property
    def reads(self) -> Tensor:
        """Memory weights [queries, K] of the probes."""
        return torch.cat(self.weights("Memory", 0))

    def rounding(self, component: str) -> tuple[float, float]:
        """(share of zeros, relative RMS error) of the inputs of a component's rounded layers, real positions alone."""
        seen: list[tuple[Tensor, Tensor]] = []
        model = self.model(2).eval()
        for batch in self.probed[0]:
            handles = []
            for name, module in model.named_modules():
                if isinstance(module, BitLinear) and title(name.split(".")[0]) == component:
                    hook = functools.partial(take_rounding, seen, name, batch)
                    handles.append(module.register_forward_pre_hook(hook))
            model(batch, self.memory(2), heads=True)  # as the probes: fused attention rounds differently
            for handle in handles:
                handle.remove()
        x, back = (torch.cat([pair[i].flatten() for pair in seen]).double() for i in (0, 1))
        return float((back == 0).double().mean()), float((x - back).norm() / x.norm())

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(text, vision, episodes, vectors, image ids, sources) of the latents' probe set."""
        model, columns = self.model(2).eval(), []
        for rank in range(RANKS):
            batch = probe_batch(rank)
            out = model(batch, self.memory(2))
            sources = torch.tensor([rank, 1, 2, 0])
            columns.append((out.text_latent, out.vision_latent, out.episodes, batch.vision, batch.image_ids, sources))
        return tuple(torch.cat(c).detach() for c in zip(*columns, strict=True))  # type: ignore[return-value]

    def cosines(self, other: bool) -> float:
        text, vision, _, _, ids, _ = self.gathered
        found = []
        for i in range(len(ids)):
            for j in range(len(ids)):
                if (i == j) if not other else (ids[i] != ids[j]):
                    found.append(F.cosine_similarity(text[i].double(), vision[j].double(), dim=0))
        return float(torch.stack(found).mean())

    @cached_property
    def consistency(self) -> float:
        text, sources = self.gathered[0].double(), self.gathered[5]
        pairs = [(i, j) for i in range(len(text)) for j in range(len(text)) if sources[i] != sources[j]]
        return float(torch.stack([F.cosine_similarity(text[i], text[j], dim=0) for i, j in pairs]).mean())

    @cached_property
    def rebuilt(self) -> Tensor:
        """The errors of each vector by the ridge regression that was fitted without it."""
        episodes, vectors = self.gathered[2].double(), self.gathered[3].double()
        e = torch.cat([episodes, torch.full((len(episodes), 1), float(episodes.norm(dim=1).mean()))], 1)
        ridge = 1e-2 * (e * e).sum(1).mean()
        errors = []
        for left in range(len(e)):
            keep = [i for i in range(len(e)) if i != left]
            a, y = e[keep], vectors[keep]
            weights = torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1]), a.T @ y)
            errors.append(vectors[left] - e[left] @ weights)
        return torch.stack(errors)

    def effective_rank(self, name: str) -> float:
        values = torch.linalg.svdvals(self.gathered[("Text", "Vision", "Episode").index(name)].double())
        share = values / values.sum()
        return math.exp(-sum(s * math.log(s) for s in share.tolist() if s > 0))

    @cached_property
    def held_out(self) -> dict[str, tuple[float, float]]:
        """(nats a token, accuracy) of each way to hold the validation."""
        model, memory = self.model(2).eval(), self.memory(2)
        at = memory.written.nonzero()[:, 0].tolist()
        values = memory.values.clone()
        for place, slot in enumerate(at):
            values[slot] = memory.values[at[place - 1]]
        others = dataclasses.replace(memory, values=values)
        empty = MemoryState.empty(len(memory.keys), memory.keys.shape[1])
        captions = [validation_batch(rank) for rank in range(RANKS)]
        turned = [b.replace(vision=b.vision.roll(1, 0)) for b in captions]
        text = [text_batch(rows=3, seed=90 + rank) for rank in range(RANKS)]
        ways = {
            "right": (captions, memory),
            "shuffled": (turned, memory),
            "off": (captions, empty),
            "mixed": (captions, others),
            "closed": ([without_vision(b) for b in captions], memory),
            "unrounded": (captions, memory),
            "text": (text, memory),
        }
        found = {}
        for name, (batches, state) in ways.items():
            asked = self.unrounded if name == "unrounded" else model
            outputs = [asked(b, state) for b in batches]
            tokens = sum(int((b.targets != IGNORE).sum()) for b in batches)
            nats = sum(float(o.token_losses.sum(dtype=torch.float64)) for o in outputs)
            found[name] = nats / tokens, sum(int(o.hits.sum()) for o in outputs) / tokens
        return found

    @property
    def unrounded(self) -> BitMar:
        """The model after the second step without quantisation."""
        model = BitMar(dataclasses.replace(self.config.model, quantization=False), seed=1)
        model.load_state_dict(self.model(2).state_dict())
        return model.eval()

    @cached_property
    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """(text latents, vision latents, image ids) of the held-out captions."""
        model, parts = self.model(2).eval(), []
        for rank in range(RANKS):
            batch = validation_batch(rank)
            out = model(batch, self.memory(2))
            shown = (out.text_latent, out.vision_latent, batch.image_ids)
            parts.append([x[batch.pair_mask].detach() for x in shown])
        return tuple(torch.cat(c) for c in zip(*parts, strict=True))  # type: ignore[return-value]

    @cached_property
    def retrieval(self) -> float:
        text, vision, ids = self.found
        assert len(ids) <= POOL
        own = 0
        for caption in range(len(ids)):
            cosines = [float(F.cosine_similarity(text[caption], image, dim=0)) for image in vision]
            own += bool(ids[cosines.index(max(cosines))] == ids[caption])
        return own / len(ids)

    def places(self, of_images: bool) -> list[int]:
        """The place of the own image among all images for each caption, or of an image's best caption among all."""
        text, vision, ids = self.found
        images = sorted(set(ids.tolist()))
        table = [
            [float(F.cosine_similarity(t, vision[ids.tolist().index(image)], dim=0)) for image in images] for t in text
        ]
        owner = [images.index(image) for image in ids.tolist()]
        if not of_images:
            return [1 + sum(c > row[own] for c in row) for row, own in zip(table, owner, strict=True)]
        found = []
        for image in range(len(images)):
            column = [row[image] for row in table]
            best = max(c for c, own in zip(column, owner, strict=True) if own == image)
            found.append(1 + sum(c > best for c in column))
        return found

    def within(self, depth: int, of_images: bool) -> float:
        places = self.places(of_images)
        return sum(place <= depth for place in places) / len(places)

    def middle(self, of_images: bool) -> float:
        places = sorted(self.places(of_images))
        return places[(len(places) - 1) // 2]

    def similarity_of_slots(self) -> float:
        memory = self.memory(2)
        values = memory.values[memory.written].double()
        pairs = [(i, j) for i in range(len(values)) for j in range(len(values)) if i != j]
        return float(torch.stack([F.cosine_similarity(values[i], values[j], dim=0) for i, j in pairs]).mean())

    def usage(self) -> Tensor:
        usage = self.memory(2).usage
        return usage / usage.sum()

    def age(self) -> Tensor:
        memory = self.memory(2)
        return memory.age[memory.written].double()

    def work(self) -> Work:
        total = Work()
        for step in range(2):
            for rank in range(RANKS):
                b = rank_batch(step, rank)
                for row in range(len(b.rows)):
                    for segment in {s for s in b.segments[row].tolist() if s} if b.valid[row] else ():
                        n = int((b.segments[row] == segment).sum())
                        total += Work(n, n * (n + 1) / 2, 0)
                total += Work(0, 0, int(b.has_vision.sum()))
        return total

    def rate(self, of: int) -> float:
        return sum(window[of] / (4.0 + rank) for rank, window in enumerate(self.told["window"]))

    def tflops(self) -> float:
        found = 0.0
        for rank in range(RANKS):
            work = Work()
            for step in range(2):
                b = rank_batch(step, rank)
                inside = (b.segments > 0) & b.valid[:, None]
                work += Work(int(inside.sum()), float((b.positions[inside] + 1).sum()), int(b.has_vision.sum()))
            found += training_flops(self.config.model, work).total / (4.0 + rank) / 1e12
        return found

    def source_share(self, name: str) -> float:
        counted = []
        for step in range(2):
            for rank in range(RANKS):
                b = rank_batch(step, rank)
                mask = b.has_vision if b.has_vision.any() else b.valid
                counted += torch.tensor([rank, 1, 1, 0, 2, 2, 1, 0])[mask].tolist()
        return counted.count(SOURCES.index(name)) / len(counted)


def take_rounding(
    seen: list[tuple[Tensor, Tensor]], name: str, batch: Batch, _: Any, inputs: tuple[Tensor, ...]
) -> None:
    seen.append(rounded(name, batch, *inputs))


def rounded(name: str, batch: Batch, x: Any) -> tuple[Tensor, Tensor]:
    """(real inputs of a layer, what they are rounded to)."""
    if x.ndim == 2:
        mask = batch.pair_mask
    elif name.startswith("vision.") or name.endswith("key_value"):
        mask = batch.pair_mask[:, None].expand(x.shape[:2])
    else:
        mask = batch.token_mask
    chosen = x.detach()[mask]
    q, step = quantize_activations(chosen)
    return chosen, q * step


Check = Callable[..., float]
G, Q = "Gradients/", "Quantization/"


def mean_of(values: Tensor) -> float:
    return float(values.detach().mean())


CHECKS: dict[str, Check] = {
    "Training/Loss": lambda j: float(j.trained[3]),
    "Training/Loss_LM": lambda j: j.lm,
    "Training/Loss_Contrastive": lambda j: j.loss("contrastive"),
    "Training/Loss_Recall": lambda j: j.loss("recall"),
    "Training/Loss_Share_LM": lambda j: j.share("lm"),
    "Training/Loss_Share_Contrastive": lambda j: j.share("contrastive"),
    "Training/Loss_Share_Recall": lambda j: j.share("recall"),
    "Training/Learning_Rate": lambda j: RATES.learning_rate,
    "Training/Weight_Decay": lambda j: RATES.weight_decay,
    "Training/Epoch": lambda j: 1.5,
    "Training/Step": lambda j: 5,
    "Training/Phase": lambda j: 0,
    "Training/Words": lambda j: 777,
    "Training/Batch_Size": lambda j: ROWS,
    "Training/Token_Accuracy": lambda j: j.hits,
    "Training/Perplexity": lambda j: math.exp(j.lm),
    "Training/Prediction_Entropy": lambda j: j.entropy,
    "Training/Skipped_Updates": lambda j: 3,
    "Validation/Loss": lambda j: j.held_out["right"][0],
    "Validation/Perplexity": lambda j: math.exp(j.held_out["right"][0]),
    "Validation/Token_Accuracy": lambda j: j.held_out["right"][1],
    "Validation/Loss_Shuffled_Vision": lambda j: j.held_out["shuffled"][0],
    "Validation/Vision_Gain": lambda j: j.held_out["shuffled"][0] - j.held_out["right"][0],
    "Validation/Loss_Memory_Off": lambda j: j.held_out["off"][0],
    "Validation/Memory_Gain": lambda j: j.held_out["off"][0] - j.held_out["right"][0],
    "Validation/Loss_Shuffled_Memory": lambda j: j.held_out["mixed"][0],
    "Validation/Memory_Gain_Shuffled": lambda j: j.held_out["mixed"][0] - j.held_out["right"][0],
    "Validation/Loss_Text": lambda j: j.held_out["text"][0],
    "Validation/Retrieval_R1": lambda j: j.retrieval,
    "Validation/Loss_No_Vision": lambda j: j.held_out["closed"][0],
    "Validation/Loss_Unrounded": lambda j: j.held_out["unrounded"][0],
    "Validation/Rounding_Cost": lambda j: j.held_out["right"][0] - j.held_out["unrounded"][0],
    "Validation/Image_To_Text_Median_Rank": lambda j: j.middle(True),
    "Validation/Text_To_Image_Median_Rank": lambda j: j.middle(False),
    "Memory/Usage_Mean": lambda j: mean_of(j.memory(2).usage),
    "Memory/Usage_Entropy": lambda j: -sum(u * math.log(u) for u in j.usage().tolist() if u > 0),
    "Memory/Active_Slots_Percentage": lambda j: 100 * mean_of(j.memory(2).written.double()),
    "Memory/Age_Mean": lambda j: mean_of(j.age()),
    "Memory/Age_Max": lambda j: float(j.age().max()),
    "Memory/Writes": lambda j: len(j.told["written"]),
    "Memory/Blends": lambda j: j.told["blends"],
    "Memory/Evictions": lambda j: j.told["evictions"],
    "Memory/Write_Norm": lambda j: mean_of(j.memory(2).values[list(j.told["written"])].norm(dim=1)),
    "Memory/Read_Norm": lambda j: mean_of((j.reads @ j.memory(2).values.double()).norm(dim=1)),
    "Memory/Read_Entropy": lambda j: mean_of(torch.special.entr(j.reads / j.reads.sum(1, keepdim=True)).sum(1)),
    "Memory/Analysis_Avg_Similarity": lambda j: j.similarity_of_slots(),
    "Memory/Top_5_Slot_Access": lambda j: sum(sorted(j.usage().tolist())[-5:]),
    "Memory/Gate_Mean": lambda j: float(torch.tanh(j.told["states1"]["memory.reader.gate"]["model"])),
    "Memory/Recall_Cosine_Image": lambda j: j.recall_cosine(0),
    "Memory/Recall_Cosine_Text": lambda j: j.recall_cosine(1),
    "Attention/Encoder_layer_{encoder}_Entropy": lambda j, layer: j.head_entropy("Encoder", int(layer)),
    "Attention/Decoder_layer_{decoder}_Entropy": lambda j, layer: j.head_entropy("Decoder", int(layer)),
    "Attention/CrossModal_layer_{fusion}_Entropy": lambda j, layer: j.head_entropy("CrossModal", int(layer)),
    "Attention/Memory_Mean": lambda j: mean_of(j.reads[:, j.memory(2).written]),
    "Attention/Memory_Entropy": lambda j: j.head_entropy("Memory", 0),
    "Attention/{kind}_Concentration": lambda j, kind: j.concentration(kind),
    "Attention/{text}_First_Token_Mass": lambda j, kind: j.first_mass(kind),
    "Attention/Dead_Heads": lambda j: j.dead,
    "Attention/Head_Importance_{kind}_Mean": lambda j, kind: mean_of(j.importance(kind)),
    "Attention/Head_Importance_{kind}_Max": lambda j, kind: float(j.importance(kind).max()),
    "Features/CrossModal_Similarity": lambda j: j.cosines(False),
    "Features/CrossModal_Similarity_Unmatched": lambda j: j.cosines(True),
    "Features/CrossModal_Similarity_Margin": lambda j: j.cosines(False) - j.cosines(True),
    "Features/Source_Consistency": lambda j: j.consistency,
    "Features/Vision_Reconstruction_MSE": lambda j: mean_of(j.rebuilt.square()),
    "Features/Vision_Reconstruction_L1": lambda j: mean_of(j.rebuilt.abs()),
    Q + "WeightScale_{ternary}": lambda j, part: mean_of(j.ternary(part)[1]),
    Q + "Sparsity_{ternary}": lambda j, part: mean_of((j.ternary(part)[0] == 0).double()),
    Q + "Plus_{ternary}": lambda j, part: mean_of((j.ternary(part)[0] == 1).double()),
    Q + "Minus_{ternary}": lambda j, part: mean_of((j.ternary(part)[0] == -1).double()),
    Q + "Flips_{ternary}": lambda j, part: j.flips(part),
    Q + "Activation_Zero_{ternary}": lambda j, part: j.rounding(part)[0],
    Q + "Activation_Error_{ternary}": lambda j, part: j.rounding(part)[1],
    Q + "Bits_Per_Weight": lambda j: (
        -sum(p * math.log2(p) for p in (mean_of((j.ternary(None)[0] == v).double()) for v in (-1, 0, 1)))
    ),
    G + "Total_Norm": lambda j: float(j.gradients(None).norm()),
    G + "Total_Norm_Max": lambda j: float(j.gradients(None).norm()),
    G + "Total_Mean": lambda j: mean_of(j.gradients(None)),
    G + "Total_Std": lambda j: float(j.gradients(None).std(correction=0)),
    G + "Total_Max": lambda j: float(j.gradients(None).abs().max()),
    G + "{component}_Norm": lambda j, part: float(j.gradients(part).norm()),
    G + "{component}_Mean": lambda j, part: mean_of(j.gradients(part)),
    G + "{component}_Std": lambda j, part: float(j.gradients(part).std(correction=0)),
    G + "{component}_Max": lambda j, part: float(j.gradients(part).abs().max()),
    G + "Update_To_Weight": lambda j: j.update_ratio(None),
    G + "{component}_Update_To_Weight": lambda j, part: j.update_ratio(part),
    G + "Clipped_Fraction": lambda j: 1.0,
    G + "NonFinite_Count": lambda j: 0.0,
    "Model/Parameters_{component}": lambda j, part: parameter_counts(j.model(0))[part.lower()],
    "Model/Parameters_Total": lambda j: sum(p.numel() for p in j.model(0).parameters()),
    "Model/Size_MB_Full": lambda j: 4e-6 * sum(p.numel() for p in j.model(0).parameters()),
    "Model/Size_MB_Packed": lambda j: packed_bytes(j) / 1e6,
    "Model/Compression_Ratio": lambda j: 4 * sum(p.numel() for p in j.model(0).parameters()) / packed_bytes(j),
    Q + "Compression_Ratio": lambda j: 4 / (1 / 4 + 4 * ternary_weights(j)[1] / ternary_weights(j)[0]),
    "Throughput/Samples_Per_Second": lambda j: j.rate(0),
    "Throughput/Words_Per_Second": lambda j: j.rate(1),
    "Throughput/Tokens_Per_Second": lambda j: j.rate(2),
    "Throughput/Padded_Tokens_Per_Second": lambda j: 2 * 8 * 12 * (1 / 4 + 1 / 5),
    "Throughput/Samples_Per_Second_Per_GPU": lambda j: j.rate(0) / 2,
    "Throughput/Words_Per_Second_Per_GPU": lambda j: j.rate(1) / 2,
    "Throughput/Tokens_Per_Second_Per_GPU": lambda j: j.rate(2) / 2,
    "Throughput/Padded_Tokens_Per_Second_Per_GPU": lambda j: 8 * 12 * (1 / 4 + 1 / 5),
    "Throughput/Step_Seconds": lambda j: 9.0 / 2,
    "Throughput/Data_Seconds": lambda j: 0.6 / 2,
    "Throughput/Forward_Seconds": lambda j: 8.0 / 2,
    "Throughput/Backward_Seconds": lambda j: 3.0 / 2,
    "Throughput/Update_Seconds": lambda j: 1.0 / 2,
    "Throughput/Logging_Seconds": lambda j: 0.2 / 2,
    "Throughput/Checkpoint_Seconds": lambda j: 0.0,
    "Throughput/TFLOPs": lambda j: j.tflops(),
    "Throughput/MFU": lambda j: j.tflops() / (0.5 * RANKS),
    "Throughput/Slowest_Rank": lambda j: 1,
    "Throughput/Rank_Imbalance": lambda j: 6.1 / ((6.1 + 2.5) / 2),
    "System/CPU_Percent": lambda j: j.told["numbers"]["System/CPU_Percent"],  # by the system's clock: > 0, below
    "System/Memory_RSS": lambda j: max(j.told["process"][0]),
    "System/Open_Files": lambda j: max(j.told["process"][1]),
    "System/Disk_Free": lambda j: psutil.disk_usage("/tmp").free,
    "System/Node_{node}_Memory_RSS": lambda j, node: j.told["process"][0][int(node)],
    "System/Node_{node}_Open_Files": lambda j, node: j.told["process"][1][int(node)],
    "System/Node_{node}_Disk_Free": lambda j, node: psutil.disk_usage("/tmp").free,
    "System/Node_{node}_CPU_Percent": lambda j, node: j.told["numbers"][f"System/Node_{node}_CPU_Percent"],
    "Data/Wait_Seconds": lambda j: 0.25,
    "Data/Padding_Efficiency": lambda j: j.tokens / (RANKS * 8 * 12),
    "Data/Damaged_Samples": lambda j: 1,
    "Data/Epoch_Progress": lambda j: 0.5,
    "Data/Source_Share_{source}": lambda j, name: j.source_share(name),
}
for _latent in ("Text", "Vision", "Episode"):
    CHECKS |= {
        f"Features/{_latent}_Mean": lambda j, n=_latent: mean_of(j.latents(n)),
        f"Features/{_latent}_Std": lambda j, n=_latent: float(j.latents(n).std(correction=0)),
        f"Features/{_latent}_Min": lambda j, n=_latent: float(j.latents(n).min()),
        f"Features/{_latent}_Max": lambda j, n=_latent: float(j.latents(n).max()),
        f"Features/{_latent}_Norm": lambda j, n=_latent: mean_of(j.latents(n).norm(dim=1)),
        f"Features/{_latent}_Effective_Rank": lambda j, n=_latent: j.effective_rank(n),
    }
for _depth in (1, 5, 10):
    CHECKS |= {
        f"Validation/Image_To_Text_R{_depth}": lambda j, d=_depth: j.within(d, True),
        f"Validation/Text_To_Image_R{_depth}": lambda j, d=_depth: j.within(d, False),
    }
HISTORY = (  # a test of their own
    *(f"{name}_{what}" for name in OF_SEVERAL_LOGS for what in ("Epoch_Mean", "Trend")),
    "Training/Validation_Ratio",
)
LOOSE = {"System/Memory_RSS": 0.2, "System/Open_Files": 0.2, "System/Disk_Free": 0.2, "System/Node_": 0.2}


def ternary_weights(joined: Joined) -> tuple[int, int]:
    """(weights, matrices)"""
    layers = [m for m in joined.model(0).modules() if isinstance(m, BitLinear)]
    return sum(m.weight.numel() for m in layers), sum(len(m.sections) for m in layers)


def packed_bytes(joined: Joined) -> float:
    weights, matrices = ternary_weights(joined)
    total = sum(p.numel() for p in joined.model(0).parameters())
    return weights / 4 + 4 * matrices + 2 * (total - weights)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("metrics")
    return run_ranks(RANKS, folder, measure, str(folder), CASES)[0]


def test_every_line_of_the_schema_has_a_check() -> None:
    numbers = {template.name for template in TEMPLATES if not template.of}
    assert numbers == {*CHECKS, *HISTORY, *GPU}


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{Path(CASES[i][1]).stem}-{CASES[i][2]}")
def test_every_metric_is_that_of_the_joined_data(measured: list[dict[str, Any]], case: int) -> None:
    told = measured[case]
    joined = Joined(told, config_of(*CASES[case][1:]))
    layout = Layout(joined.config.model, RANKS, RANKS, SOURCES)
    wrong = []
    for template in TEMPLATES:
        if template.of or template.name in (*HISTORY, *GPU):
            continue
        for metric, parts in expanded(template, layout):
            want, got = CHECKS[template.name](joined, *parts), told["numbers"].get(metric)
            tolerance = next((t for name, t in LOOSE.items() if metric.startswith(name)), 1e-5)
            if got is None or not math.isclose(got, want, rel_tol=tolerance, abs_tol=1e-6):
                wrong.append(f"{metric}: measured {got}, plainly {want}")
    assert not wrong, "\n".join(wrong)
    assert told["numbers"]["System/CPU_Percent"] > 0
    assert not any(name in told["numbers"] for name in GPU)
    assert told["nonfinite"] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{Path(CASES[i][1]).stem}-{CASES[i][2]}")
def test_histograms_are_those_of_the_joined_data(measured: list[dict[str, Any]], case: int) -> None:
    """But for a number beside an edge, which another order of sums may put on its other side."""
    joined = Joined(measured[case], config_of(*CASES[case][1:]))
    found = measured[case]["histograms"]
    assert len(found) == 2 * len(COMPONENTS)
    for name in COMPONENTS:
        part = title(name)
        weights = [s["model"].flatten() for n, s in joined.told["states1"].items() if n.split(".")[0] == name]
        for group, values in (("Gradients", joined.gradients(part)), ("Model", torch.cat(weights).double())):
            plain = np.histogram(values.numpy(), HISTOGRAM_EDGES.numpy())[0]
            counts = found[f"{group}/Histogram_{part}"].numpy()
            assert counts.sum() == len(values)
            assert np.abs(counts - plain).sum() <= 1e-3 * len(values) + 2


def expanded(template: Metric, layout: Layout) -> list[tuple[str, tuple[str, ...]]]:
    """(name, what stands in its braces) of each metric of a line with at most one placeholder."""
    begin, _, rest = template.name.partition("{")
    if not rest:
        return [(template.name, ())]
    key, _, end = rest.partition("}")
    return [(begin + value + end, (value,)) for value in layout.values()[key]]


def test_what_is_told_of_several_logs() -> None:
    history = History()
    logs = [(1, 0, 0.5, 4.0), (2, 0, 1.0, 3.0), (3, 0, 1.5, 2.5), (4, 1, 0.5, 9.0)]
    found = []
    for step, phase, epoch, loss in logs:
        numbers = {"Training/Step": step, "Training/Phase": phase, "Training/Epoch": epoch, "Training/Loss": loss}
        numbers |= {"Training/Loss_LM": loss / 2} | ({"Training/Loss_Recall": loss} if phase else {})
        found.append(history.add(numbers))
    assert [f["Training/Loss_Epoch_Mean"] for f in found] == [4.0, 3.5, 2.5, 9.0]
    assert [f["Training/Loss_LM_Epoch_Mean"] for f in found] == [2.0, 1.75, 1.25, 4.5]
    assert [f.get("Training/Loss_Recall_Epoch_Mean") for f in found] == [None, None, None, 9.0]  # where there is one
    assert "Training/Loss_Trend" not in found[0]
    assert [f["Training/Loss_Trend"] for f in found[1:3]] == pytest.approx([-1000.0, -750.0])
    assert [f["Training/Loss_LM_Trend"] for f in found[1:3]] == pytest.approx([-500.0, -375.0])
    assert "Training/Loss_Trend" not in found[3]  # another phase
    assert history.add({"Validation/Loss": 9.0}) == {"Training/Validation_Ratio": 2.0}

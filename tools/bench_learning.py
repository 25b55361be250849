"""Is BitMar worth its complexity? Held-out nats a word against a plain transformer, equal parameters and CPU time.

Both models train on the same captions with image vectors for the same CPU seconds, on one thread, and are
scored on captions of images that neither has seen. Prints one JSON object a row.

    python tools/bench_learning.py [--raw DIR] [--seconds 120] [--seeds 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from bitmar.batch import IGNORE, Batch
from bitmar.config import Config, DataConfig, EngineConfig, ModelConfig, OptimizerConfig, PhaseConfig, TrainingConfig
from bitmar.engine.schedule import rates_at
from bitmar.engine.step import train_step
from bitmar.engine.world import World, join_world, leave, leave_world
from bitmar.engine.zero import ZeroEngine
from bitmar.evaluation.perplexity import score
from bitmar.model.bitmar import BitMar, Outputs
from bitmar.model.memory import MemoryState
from shards.convert import convert
from shards.loader import Loader, Shape, ShardSet, ValidationSet
from shards.order import PhaseSpec
from shards.writer import Options
from tools.machine import describe_machine
from tools.make_demo_data import make
from tools.plain_model import PlainModel

ROWS = 64
ROW_TOKENS = 64
VOCABULARY = 4096
ENDLESS = 10**5  # steps, more than any budget reaches
PROGRESS_UNITS = 10_000  # the schedule runs over CPU time, cut into so many parts


@dataclass(frozen=True)
class Scores:
    """Held-out nats a word, and what was trained for them."""

    right: float
    permuted: float
    memory_off: float | None
    captions: int
    parameters: int


@dataclass(frozen=True)
class Data:
    shards: ShardSet
    held_out: ValidationSet
    words: int  # in the held-out captions


def bitmar_config() -> Config:
    """About 7.4 million parameters, like the plain model."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        width=256,
        heads=4,
        ffn_width=640,
        encoder_layers=3,
        decoder_layers=3,
        vision_layers=1,
        fusion_layers=1,
        vision_tokens=4,
        vision_hidden_size=256,
        vision_latent_size=256,
        text_latent_size=256,
        memory_size=64,
        episode_dim=256,
        contrastive_group=32,
    )
    phase = PhaseConfig(
        "memory", {"pairs": 1.0}, {"lm": 1.0, "contrastive": 0.2, "recall": 0.05}, write_memory=True, steps=1
    )
    return Config(
        DataConfig("in memory", row_tokens=ROW_TOKENS),
        (phase,),
        model=model,
        training=TrainingConfig(global_batch=ROWS, micro_batch=ROWS, precision="fp32"),
        optimizer=OptimizerConfig(peak_rate=3e-3, second_rate=2e-3, warmup_steps=PROGRESS_UNITS // 20),
        engine=EngineConfig(ds_config="ds_configs/zero0.json"),
    )


def stream(data: Data, seed: int) -> Iterator[tuple[int, Any]]:
    """Shuffled captions without end: (step, rows)."""
    phases = [PhaseSpec("pairs", {"pairs": 1.0}, None, None, ENDLESS)]
    loader = Loader(
        data.shards,
        phases,
        seed=seed,
        shape=Shape(ROWS, ROW_TOKENS),
        micro_batch=ROWS,
        rank=0,
        world=1,
    )
    for state, rows in loader:
        yield state.position, rows


def timed(data: Data, seed: int, seconds: float, step: Callable[[int, Any, int], None]) -> int:
    """Call step(n, rows, progress unit) until `seconds` of CPU time are used; returns the steps made."""
    used, count = 0.0, 0
    for count, rows in stream(data, seed):
        if used >= seconds:
            break
        began = time.process_time()
        step(count, rows, min(int(used / seconds * PROGRESS_UNITS), PROGRESS_UNITS - 1))
        used += time.process_time() - began
    return count


def train_bitmar(data: Data, seed: int, seconds: float, world: World, config: Config) -> Scores:
    """The product's own step: ZeRO engine, losses, memory writes."""
    torch.manual_seed(seed)
    model = BitMar(config.model, seed)
    engine = ZeroEngine(model, config, world)
    phase = config.phases[0]
    memory = MemoryState.empty(config.model.memory_size, config.model.episode_dim)

    def step(count: int, rows: Any, unit: int) -> None:
        nonlocal memory
        engine.set_rates(rates_at(unit, PROGRESS_UNITS, config.optimizer), phase.train)
        batches = [Batch.from_rows(part) for part in rows]
        memory = train_step(engine, batches, memory, phase, config, world, count).memory

    steps = timed(data, seed, seconds, step)
    engine.train(False)

    def nats(vision: Any, state: MemoryState) -> float:
        return (
            float(score(engine.forward, data.held_out.batches(vision), data.held_out.rows, state, world).nats)
            / data.words
        )

    empty = MemoryState.empty(config.model.memory_size, config.model.episode_dim)
    size = sum(p.numel() for p in model.parameters())
    return Scores(nats("right", memory), nats("permuted", memory), nats("right", empty), steps * ROWS, size)


def train_plain(data: Data, seed: int, seconds: float, world: World, peak_rate: float = 1e-3) -> Scores:
    """Warm-up, then cosine decay to a tenth; AdamW with decay 0.1, clip 1: what one would do first."""
    torch.manual_seed(seed)
    model = PlainModel(VOCABULARY, width=256, heads=4, layers=6)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(_: int, rows: Any, unit: int) -> None:
        done = unit / PROGRESS_UNITS
        warm = min(1.0, done * 20)
        rate = peak_rate * warm * (0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for batch in map(Batch.from_rows, rows):
            logits = model(batch.tokens, batch.vision)
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    steps = timed(data, seed, seconds, step)
    model.eval()

    def forward(batch: Batch, _: MemoryState) -> Outputs:
        logits, nothing = model(batch.tokens, batch.vision), torch.zeros(0)
        losses = F.cross_entropy(logits.mT, batch.targets, ignore_index=IGNORE, reduction="none")
        sides = (nothing, nothing, nothing, nothing, nothing, nothing, nothing)
        return Outputs(losses.sum(), losses, logits.argmax(-1) == batch.targets, logits, *sides, None, nothing, {})

    def nats(vision: Any) -> float:
        state = MemoryState.empty(1, 1)
        return float(score(forward, data.held_out.batches(vision), data.held_out.rows, state, world).nats) / data.words

    size = sum(p.numel() for p in model.parameters())
    return Scores(nats("right"), nats("permuted"), None, steps * ROWS, size)


def open_data(raw: Path, folder: Path) -> Data:
    """Convert the pairs of `raw` (a tenth of the images held out) and open them."""
    pairs = folder / "raw"
    pairs.mkdir()
    for path in raw.iterdir():
        if path.suffix in (".npy", ".json", ".md"):
            (pairs / path.name).symlink_to(path.resolve())
    options = Options(vocab_size=VOCABULARY, validation_fraction=0.1)
    convert(pairs, folder / "shards", options, force=False, report=lambda *_: None)
    shards = ShardSet.open(folder / "shards")
    held_out = ValidationSet(
        shards, modality="pairs", micro_batch=ROWS, row_tokens=ROW_TOKENS, max_samples=10**6, rank=0, world=1
    )
    return Data(shards, held_out, sum(int(rows.words.sum()) for rows in held_out.batches()))


def verdict(holds: Sequence[bool]) -> bool | None:
    """True or False where all seeds agree, None where they straddle the bar."""
    return None if len(set(holds)) > 1 else holds[0]


def rows(ours: list[Scores], theirs: list[Scores], notes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark; figures are medians over seeds."""
    median = statistics.median
    a, b = [s.right for s in ours], [s.right for s in theirs]
    yield notes | {
        "name": "learning: held-out nats a word against a plain transformer",
        "ours": round(median(a), 4),
        "theirs": round(median(b), 4),
        "ratio": round(median(a) / median(b), 4),
        "unit": "nats/word",
        "bar": "<= 1.05",
        "ok": verdict([x <= 1.05 * y for x, y in zip(a, b, strict=True)]),
        "captions_trained": [round(median(s.captions for s in side)) for side in (ours, theirs)],
        "parameters": [ours[0].parameters, theirs[0].parameters],
    }
    a, b = [s.permuted - s.right for s in ours], [s.permuted - s.right for s in theirs]
    yield notes | {
        "name": "learning: vision gain (permuted minus right vectors)",
        "ours": round(median(a), 4),
        "theirs": round(median(b), 4),
        "ratio": round(median(a) / median(b), 4),
        "unit": "nats/word",
        "bar": "> 1",
        "ok": verdict([x > y for x, y in zip(a, b, strict=True)]),
    }
    gains = [s.memory_off - s.right for s in ours if s.memory_off is not None]
    yield notes | {
        "name": "learning: memory gain (off minus on)",
        "ours": round(median(gains), 4),
        "theirs": None,
        "value": round(median(gains), 4),
        "unit": "nats/word",
        "bar": ">= 0",
        "ok": verdict([gain >= 0 for gain in gains]),
        "each_seed": [round(gain, 4) for gain in gains],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both models seed by seed and print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw", type=Path, help="raw pairs; default ../shared/data/raw, else generated ones")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training a model and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, 10 CPU seconds: shows that it runs")
    known = parser.parse_args(arguments)
    seconds, seeds = (10.0, 1) if known.quick else (known.seconds, known.seeds)
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = join_world(threads=1)  # a second thread's waiting would count as CPU time
    with tempfile.TemporaryDirectory() as folder:
        raw = known.raw or Path("../shared/data/raw")
        if not raw.is_dir():
            raw = Path(folder) / "generated"
            make(raw, seed=0, images=2000, words=1000)
        data = open_data(raw, Path(folder))
        ours = [train_bitmar(data, seed, seconds, world, bitmar_config()) for seed in range(seeds)]
        theirs = [train_plain(data, seed, seconds, world) for seed in range(seeds)]
    notes = {
        "machine": describe_machine(),
        "data": "generated" if data.shards.generated else str(raw.name),
        "cpu_seconds": seconds,
        "seeds": seeds,
    }
    for row in rows(ours, theirs, notes):
        if known.quick:
            row["ok"] = None  # too short to tell
        print(json.dumps(row))
    leave_world()
    return 0


if __name__ == "__main__":
    leave(main())

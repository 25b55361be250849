"""Packed captions against length buckets: real tokens a second of whole optimizer steps.

Both sides train the same model on the same captions with as many real tokens a micro-batch; their steps alternate in one
run, and a turn is an epoch of each. Prints one JSON object a row.

    python tools/bench_captions.py [--raw DIR] [--row-tokens 64] [--turns 5] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bitmar.batch import IGNORE, Batch
from bitmar.config import Config, TrainingConfig, load_config
from bitmar.engine.schedule import Rates
from bitmar.engine.step import train_step
from bitmar.engine.world import World, join_world, leave_world
from bitmar.engine.zero import ZeroEngine
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from shards.loader import Loader, LoaderState, Shape, ShardSet
from shards.order import PhaseSpec
from tools.bench_data import Records
from tools.bench_learning import bitmar_config
from tools.machine import describe_machine
from tools.make_demo_data import make

TOKENS = 2048  # positions of a packed micro-batch
GROUP = 8  # captions of a contrastive and of a recall group
ENDLESS = 10**5


class Side:
    """A model in training on captions in one of the two layouts."""

    def __init__(self, shards: ShardSet, config: Config, row_tokens: int, rows: int, pack: bool, world: World) -> None:
        training = TrainingConfig(global_batch=rows, micro_batch=rows, precision="fp32")
        model = dataclasses.replace(config.model, contrastive_group=GROUP, recall_group=GROUP)
        self.config = dataclasses.replace(config, training=training, model=model)
        self.world = world
        torch.manual_seed(0)
        self.engine = ZeroEngine(BitMar(self.config.model, 0), self.config, world)
        self.engine.set_rates(Rates(1e-3, 0.1), config.phases[0].train)
        self.memory = MemoryState.empty(model.memory_size, model.episode_dim, world.device)
        shape = Shape(rows, row_tokens)
        phases = [PhaseSpec("pairs", {"pairs": 1.0}, epochs=ENDLESS)]
        self.loader = Loader(
            shards, phases, seed=0, shape=shape, micro_batch=rows, rank=0, world=1, pack_captions=pack
        )
        self.epoch_steps = self.loader.order.steps(0) // ENDLESS
        self.taken = 0

    def step(self) -> tuple[int, int, float]:
        """(real tokens, positions, seconds) of the next optimizer step."""
        began = time.process_time()
        rows = self.loader.step_rows(LoaderState(0, self.taken))
        batches = [Batch.from_rows(part, self.world.device) for part in rows]
        phase = self.config.phases[0]
        result = train_step(self.engine, batches, self.memory, phase, self.config, self.world, self.taken)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.process_time() - began
        self.memory = result.memory
        self.taken += 1
        tokens = sum(int((part.targets != IGNORE).sum()) for part in rows)
        return tokens, sum(part.targets.size for part in rows), seconds


def turn(sides: dict[str, Side], steps: int | None) -> dict[str, tuple[float, float]]:
    """(real tokens a second, real tokens / positions) of each side over an epoch (or `steps` steps) in turns."""
    left = {name: steps or side.epoch_steps for name, side in sides.items()}
    sums = {name: [0.0, 0.0, 0.0] for name in sides}
    while any(left.values()):
        for name in sorted(left, key=lambda name: -left[name] / (steps or sides[name].epoch_steps)):
            if left[name]:
                left[name] -= 1
                sums[name] = [total + part for total, part in zip(sums[name], sides[name].step(), strict=True)]
    return {name: (tokens / seconds, tokens / positions) for name, (tokens, positions, seconds) in sums.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw", type=Path, help="raw pairs; default ../shared/data/raw, else generated ones")
    parser.add_argument("--recipe", default="bench")
    parser.add_argument("--row-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    known = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = join_world(threads=known.threads)
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder), 16)
        shards = ShardSet.open(records.shards)
        config = bitmar_config()
        if known.recipe != "bench":
            recipe = load_config(Path(f"launch/recipes/{known.recipe}.yaml"), ["data.shards=x"])
            config = dataclasses.replace(config, model=recipe.model)
        rows = TOKENS // known.row_tokens
        corpus = shards.corpus("train")
        mean = float((corpus.tokens + corpus.samples).sum() / corpus.samples.sum())
        packed = Side(shards, config, known.row_tokens, rows, True, world)
        bucket_rows = round(TOKENS * 0.98 / mean / GROUP) * GROUP
        print(mean, rows, bucket_rows)
        buckets = Side(shards, config, known.row_tokens, bucket_rows, False, world)
        sides = {"packed": packed, "buckets": buckets}
        turn(sides, 2)
        ratios = []
        for _ in range(known.turns):
            found = turn(sides, known.steps)
            ratios.append(found["packed"][0] / found["buckets"][0])
            print({k: (round(a), round(b, 4)) for k, (a, b) in found.items()}, round(ratios[-1], 3), flush=True)
        print(known, "ratio", median(ratios))
    leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Packed captions against length buckets: real tokens a second of whole optimizer steps.

Both sides train the same model on the same captions with as many real tokens a micro-batch. Their steps alternate in
one run on one thread, spread over an epoch; CPU seconds count, so that other processes disturb neither. Buckets
are full where captions are many; so the captions are taken as they are, and repeated. One JSON object a row.

    python tools/bench_captions.py [--turns 5] [--quick]
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bitmar.batch import IGNORE, Batch
from bitmar.config import Config, DataConfig, EngineConfig, ModelConfig, PhaseConfig, TrainingConfig, load_config
from bitmar.engine.schedule import Rates
from bitmar.engine.step import train_step
from bitmar.engine.world import World, join_world, leave, leave_world
from bitmar.engine.zero import ZeroEngine
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from shards.loader import Loader, LoaderState, Shape, ShardSet
from shards.order import PhaseSpec
from tools.data_bench.records import Records
from tools.machine import describe_machine

ROW_TOKENS = 64  # of the demo's recipe
GROUP = 8  # captions of a contrastive and of a recall group
ENDLESS = 10**5
MEMORY = PhaseConfig("p", {"pairs": 1}, {"lm": 1, "contrastive": 0.1, "recall": 0.1}, write_memory=True, epochs=1)


@dataclass(frozen=True)
class Case:
    """What is compared: times that the captions are repeated, rows of a packed micro-batch, and the model."""

    repeats: int
    rows: int
    recipe: str


# Those that are repeated speak for corpora of millions of captions, whose buckets are full.
CASES = (Case(1, 8, "demo"), Case(1, 32, "demo"), Case(16, 32, "bitmar-14m"), Case(16, 32, "demo"))


class Side:
    """A model in training on captions in one of the two layouts."""

    def __init__(self, shards: ShardSet, model: ModelConfig, rows: int, pack: bool, world: World) -> None:
        self.config = Config(
            DataConfig("in memory", row_tokens=ROW_TOKENS, pack_captions=pack),
            (MEMORY,),
            model=dataclasses.replace(model, contrastive_group=GROUP, recall_group=GROUP),
            training=TrainingConfig(global_batch=rows, micro_batch=rows, precision="fp32"),
            engine=EngineConfig(ds_config="ds_configs/zero0.json"),
        )
        self.world = world
        torch.manual_seed(0)
        self.engine = ZeroEngine(BitMar(self.config.model), self.config, world)
        self.engine.set_rates(Rates(1e-3, 0.1), MEMORY.train)
        self.memory = MemoryState.empty(model.memory_size, model.episode_dim, world.device)
        shape, phases = Shape(rows, ROW_TOKENS), [PhaseSpec("pairs", {"pairs": 1.0}, epochs=ENDLESS)]
        self.loader = Loader(shards, phases, seed=0, shape=shape, micro_batch=rows, rank=0, world=1, pack_captions=pack)
        self.epoch_steps = self.loader.order.steps(0) // ENDLESS
        self.taken = 0

    def step(self, position: int) -> tuple[int, float]:
        """(real tokens, CPU seconds) of the optimizer step at a position of the order."""
        began = time.process_time()
        rows = self.loader.step_rows(LoaderState(0, position))
        batches = [Batch.from_rows(part, self.world.device) for part in rows]
        result = train_step(self.engine, batches, self.memory, MEMORY, self.config, self.world, self.taken)
        seconds = time.process_time() - began
        self.memory = result.memory
        self.taken += 1
        return sum(int((part.targets != IGNORE).sum()) for part in rows), seconds

    def padding(self) -> float:
        """Real tokens over positions of an epoch."""
        plans = [
            self.loader.order.plan(0, step, 0, self.loader.order.shape.global_batch) for step in range(self.epoch_steps)
        ]
        real = sum(int(plan.lengths.sum()) for plan in plans)
        return real / sum(plan.row_tokens * (len(plan.row_offsets) - 1) for plan in plans)


def turn(sides: Sequence[Side], steps: int) -> list[float]:
    """Real tokens a CPU second of each side over the same `steps` steps, spread over an epoch, at each call."""
    sums = [[0.0, 0.0] for _ in sides]
    for step in range(steps):
        for side, total in zip(sides, sums, strict=True):
            tokens, seconds = side.step(step * side.epoch_steps // steps)
            total[0] += tokens
            total[1] += seconds
    return [tokens / seconds for tokens, seconds in sums]


def compare(shards: ShardSet, case: Case, turns: int, steps: int, world: World) -> dict[str, Any]:
    """One row: packed against buckets."""
    model = load_config(Path(f"launch/recipes/{case.recipe}.yaml")).model
    corpus = shards.corpus("train")
    mean = float((corpus.tokens + corpus.samples).sum() / corpus.samples.sum())
    packed = Side(shards, model, case.rows, True, world)
    captions = max(1, round(case.rows * ROW_TOKENS * packed.padding() / mean / GROUP)) * GROUP
    buckets = Side(shards, model, captions, False, world)
    turn((packed, buckets), 2)  # warms up
    rates = [turn((packed, buckets), steps) for _ in range(turns)]
    ratios = [ours / theirs for ours, theirs in rates]
    count = int(corpus.samples.sum())
    row = {
        "name": f"engine captions packed against length buckets: {case.recipe}'s model, {count:,} captions, "
        f"{captions} a micro-batch",
        "ours": round(median(ours for ours, _ in rates)),
        "theirs": round(median(theirs for _, theirs in rates)),
        "ratio": round(median(ratios), 3),
        "unit": "real tokens/CPU s",
        "bar": None,
        "ok": None,
        "each_turn": [round(ratio, 3) for ratio in ratios],
        "padding": [round(packed.padding(), 4), round(buckets.padding(), 4)],
    }
    if case.repeats > 1:
        default = DataConfig("any").pack_captions
        row["bar"] = f"the faster is the default (pack_captions: {str(default).lower()})"
        row["ok"] = _verdict([(ratio > 1) == default for ratio in ratios])
    return row


def _verdict(holds: Sequence[bool]) -> bool | None:
    """True or False where all turns agree, None where they straddle the bar."""
    return None if len(set(holds)) > 1 else holds[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="measurements of a case")
    parser.add_argument("--quick", action="store_true", help="few steps of the demo's model: shows that it runs")
    known = parser.parse_args(arguments)
    cases = [case for case in CASES if case.recipe == "demo"] if known.quick else CASES
    turns, steps = (1, 3) if known.quick else (known.turns, 24)
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = join_world(threads=1)  # a second thread's waiting would count as CPU time
    machine, shards, rows = describe_machine(), dict[int, ShardSet](), []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if case.repeats not in shards:
                place = Path(folder, str(case.repeats))
                place.mkdir()
                records = Records(place, case.repeats)
                shards[case.repeats] = ShardSet.open(records.shards)
            rows.append(compare(shards[case.repeats], case, turns, steps, world) | {"data": records.kind})
    for row in rows:
        if known.quick:
            row["ok"] = None  # too short to tell
        print(json.dumps(row | {"machine": machine}))
    leave_world()
    return 0


if __name__ == "__main__":
    leave(main())

"""BitMar learns: on images it has never seen the loss falls by a third, and the right image helps.

The product's own path from raw files to summary.json, three seeds, on the real pairs beside the repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmar.config import load_config
from bitmar.engine.world import World
from bitmar.train import train
from tests.support.data import pairs_shards
from tests.support.ranks import run_ranks

SEEDS = (1, 2, 3)
LOSSES = "{lm: 1.0, contrastive: 0.2, recall: 0.05}"
PHASES = (
    f"[{{name: alignment, steps: 70, mix: {{pairs: 1}}, losses: {LOSSES.replace(', recall: 0.05', '')}}},"
    f" {{name: memory, steps: 40, mix: {{pairs: 1}}, losses: {LOSSES}, write_memory: true}}]"
)


def run_seeds(world: World, shards: str, runs: str) -> None:
    for seed in SEEDS:
        overrides = (
            f"data.shards={shards}",
            f"run.directory={runs}",
            f"run.name=seed{seed}",
            f"run.seed={seed}",
            f"phases={PHASES}",
            "data.row_tokens=48",
            "training.precision=fp32",
            "validation.every_steps=1000",
            "checkpoint.every_steps=1000",
            "wandb.enabled=false",
        )
        train(load_config(Path("launch/recipes/demo.yaml"), overrides), world)


@pytest.mark.slow
def test_loss_falls_on_unseen_images_and_the_right_image_helps(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    shards, kind = pairs_shards(tmp_path, vocabulary=4096, held_out=0.15)
    print(f"learning on {kind}")
    record_property("data", kind)
    run_ranks(1, tmp_path / "ranks", run_seeds, str(shards), str(tmp_path / "runs"), threads=2)
    for seed in SEEDS:
        summary = json.loads((tmp_path / f"runs/seed{seed}/summary.json").read_text())
        print({k: summary[k] for k in ("loss_initial", "loss_final", "loss_shuffled_vision", "seconds")})
        assert summary["loss_final"] <= 0.65 * summary["loss_initial"], summary
        assert summary["loss_final"] < summary["loss_shuffled_vision"], summary

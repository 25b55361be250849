"""BitMar learns: on images it has never seen the loss falls by a third, and the right image helps.

The product's own path from raw files to summary.json, three seeds, on the real pairs beside the repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitmar.analysis.heads import check_rankings, held_out, measure_heads, ranked
from bitmar.config import load_config
from bitmar.engine.world import World
from bitmar.evaluation.recall import held_out_pairs, recall_once
from bitmar.evaluation.scores import fraction
from bitmar.loading import load_trained
from bitmar.model.packed import freeze
from bitmar.train import train
from shards.loader import ShardSet
from tests.support.data import pairs_shards
from tests.support.ranks import run_ranks

SEEDS = (1, 2, 3)
LOSSES = "{lm: 1.0, contrastive: 0.2, recall: 0.05}"
LONGER = (220, 110)  # steps after which heads differ in what they are worth; ten epochs of the pairs


def phases(alignment: int, memory: int) -> str:
    without = LOSSES.replace(", recall: 0.05", "")
    return (
        f"[{{name: alignment, steps: {alignment}, mix: {{pairs: 1}}, losses: {without}}},"
        f" {{name: memory, steps: {memory}, mix: {{pairs: 1}}, losses: {LOSSES}, write_memory: true}}]"
    )


def train_all(world: World, shards: str, runs: str) -> None:
    cases = [(f"seed{seed}", seed, (70, 40)) for seed in SEEDS] + [("longer", 1, LONGER)]
    for name, seed, steps in cases:
        overrides = (
            f"data.shards={shards}",
            f"run.directory={runs}",
            f"run.name={name}",
            f"run.seed={seed}",
            f"phases={phases(*steps)}",
            "data.row_tokens=48",
            "training.precision=fp32",
            "validation.every_steps=1000",
            "checkpoint.every_steps=1000",
            "wandb.enabled=false",
        )
        train(load_config(Path("launch/recipes/demo.yaml"), overrides), world)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(folder of the runs, shards, what kind of data)"""
    folder = tmp_path_factory.mktemp("learned")
    shards, kind = pairs_shards(folder, vocabulary=4096, held_out=0.16)
    print(f"learning on {kind}")
    run_ranks(2, folder / "ranks", train_all, str(shards), str(folder / "runs"))
    return folder / "runs", shards, kind


@pytest.mark.slow
def test_loss_falls_on_unseen_images_and_the_right_image_helps(
    learned: tuple[Path, Path, str], record_property: Callable[[str, object], None]
) -> None:
    runs, _, kind = learned
    record_property("data", kind)
    for seed in SEEDS:
        summary = json.loads((runs / f"seed{seed}/summary.json").read_text())
        print({k: summary[k] for k in ("loss_initial", "loss_final", "loss_shuffled_vision", "seconds")})
        assert summary["loss_final"] <= 0.65 * summary["loss_initial"], summary
        assert summary["loss_final"] < summary["loss_shuffled_vision"], summary


@pytest.mark.slow
def test_the_heads_that_the_gate_gradient_names_are_missed_most(learned: tuple[Path, Path, str]) -> None:
    """The first tenth by gate gradient costs more than a tenth by chance (20 draws)."""
    runs, shards, _ = learned
    trained = load_trained(runs / "longer")
    batches = held_out(shards, 128, 48)
    importance = measure_heads(trained.model, trained.memory, batches).importance
    order = ranked({kind: importance[kind] for kind in ("encoder", "decoder", "cross_modal")})
    check = check_rankings(trained.model, trained.memory, batches, {"gate": order}, 0.1, draws=20)
    print(check)
    assert check.heads == 3
    assert check.top["gate"] > np.mean(check.random)


@pytest.mark.slow
def test_the_memory_recalls_pairs_that_it_was_shown_once(learned: tuple[Path, Path, str]) -> None:
    """64 pairs of unseen images, asked for by the image alone while fusion sees none: above chance once they were
    shown, at chance with an empty memory and where 64 other pairs were shown."""
    runs, shards, _ = learned
    trained = load_trained(runs / "longer")
    pairs = held_out_pairs(ShardSet.open(shards), 128, 48)
    assert len(pairs) == 128
    shown, others = pairs.part(0, 64), pairs.part(64, 128)
    model = freeze(trained.model)
    found = recall_once(model, shown, others, "image")
    scores = {
        name: fraction("memory", name, getattr(found, name).numpy(), "pair", 1 / 64)
        for name in ("shown", "others", "off")
    }
    print(scores)
    assert scores["shown"].low is not None
    assert scores["others"].low is not None
    assert scores["shown"].low > 1 / 64
    assert scores["others"].low <= 1 / 64
    assert scores["off"].value == pytest.approx(1 / 64)

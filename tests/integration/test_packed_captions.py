"""Whole trainings on packed captions: any split of a step is one step, and resuming in mid-epoch changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmar.assembly import open_loader, open_shards
from bitmar.config import Config
from bitmar.engine.checkpoint import CheckpointError, Progress
from bitmar.engine.world import World
from bitmar.train import train
from shards.loader import Loader
from tests.support.ranks import run_ranks
from tests.support.runs import checkpoint_progress, checkpoint_tensors, differing, metrics, newest, tiny_config

STEPS = {"phases.0.steps": 1, "phases.1.steps": 3, "phases.2.steps": 6}
STOP = 7
PACKED = ("data.pack_captions=true", *(f"{key}={value}" for key, value in STEPS.items()))
EXACT = ("model.quantization=false", "validation.every_steps=100")
COMPARED = ("Training/Loss_LM", "Training/Loss_Contrastive", "Training/Loss_Recall", "Gradients/Total_Norm")
SPANNING = "model.contrastive_group=8"  # of four rows a rank: a block lies on two ranks


def config_of(folder: Path, shards: Path, name: str, *overrides: str) -> Config:
    return tiny_config(folder / "recipes", shards, folder / "runs", name, *PACKED, *overrides)


def scenario(world: World, folder: str, shards: str) -> dict[str, Any]:
    """Trainings on this many ranks, each in a folder of its own."""
    base = Path(folder) / str(world.size)
    own = base / f"of{world.rank}" if world.rank else base

    def start(name: str, *overrides: str) -> None:
        config = tiny_config(own / "recipes", Path(shards), base / "runs", name, *PACKED, *overrides)
        train(config, world)

    start("small", *EXACT)
    start("spanning", *EXACT, SPANNING, f"training.micro_batch={8 // world.size}")
    if world.size == 2:
        start("straight")
        start("resumed", f"training.max_steps={STOP}")
        start("resumed")
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[int, Path]:
    """The folder of the runs on so many ranks."""
    folder = tmp_path_factory.mktemp("packed")
    for size in (1, 2):
        run_ranks(size, folder / f"ranks{size}", scenario, str(folder), str(tiny_shards))
    return {size: folder / str(size) / "runs" for size in (1, 2)}


def loader_of(config: Config) -> Loader:
    return open_loader(config, open_shards(config), Progress("none"), World(0, 1, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("name", ["small", "spanning"])
def test_one_rank_is_two_ranks(runs: dict[int, Path], name: str) -> None:
    """Four micro-batches on one rank, two on each of two; or blocks of one rank and of two. 1e-5 without rounding."""
    one, two = ([line for line in metrics(runs[size] / name) if "Training/Loss" in line] for size in (1, 2))
    assert len(one) == len(two) == sum(STEPS.values())
    for mine, other in zip(one, two, strict=True):
        for metric in COMPARED:
            assert mine.get(metric) == pytest.approx(other.get(metric), rel=1e-5), (metric, mine["Training/Step"])
        assert mine["Training/Words"] == other["Training/Words"]
    assert all(any(line.get(metric) for line in one) for metric in COMPARED)
    memory = [checkpoint_tensors(newest(runs[size] / name)) for size in (1, 2)]
    for part in ("age", "image_ids", "written"):
        assert torch.equal(memory[0][f"memory.{part}"], memory[1][f"memory.{part}"]), part
    assert memory[0]["memory.written"].any()


def test_a_block_of_other_size_is_another_loss(runs: dict[int, Path]) -> None:
    small, spanning = (metrics(runs[1] / name)[-1]["Training/Loss_Contrastive"] for name in ("small", "spanning"))
    assert small != pytest.approx(spanning, rel=1e-2)


def test_stop_and_resume_in_mid_epoch_changes_no_bit(runs: dict[int, Path], tmp_path: Path, tiny_shards: Path) -> None:
    straight, resumed = newest(runs[2] / "straight"), newest(runs[2] / "resumed")
    assert differing(checkpoint_tensors(straight), checkpoint_tensors(resumed)) == []
    assert checkpoint_progress(straight) == checkpoint_progress(resumed)
    assert metrics(runs[2] / "resumed") == metrics(runs[2] / "straight")


def test_captions_and_words_are_counted(runs: dict[int, Path], tmp_path: Path, tiny_shards: Path) -> None:
    """Those that the loader gives out, whatever the split."""
    config = config_of(tmp_path, tiny_shards, "count")
    words = samples = captions = 0
    for _, micro in loader_of(config):
        for rows in micro:
            words += int(rows.words.sum())
            samples += rows.samples
            captions += int(rows.has_vision.sum()) if rows.modality == "pairs" else int(rows.valid.sum())
            assert rows.slots > 1 or rows.modality == "text"
    assert samples == captions
    for size in (1, 2):
        progress = checkpoint_progress(newest(runs[size] / "small"))
        assert (progress["words"], progress["samples"]) == (words, samples)


def test_another_layout_does_not_go_on(runs: dict[int, Path], tmp_path: Path, tiny_shards: Path) -> None:
    """A checkpoint that names no layout is of one caption a row."""
    chosen = newest(runs[2] / "resumed")
    state = json.loads((chosen / "state.json").read_text())
    assert state["identity"]["order"]["data.pack_captions"] is True
    refused = run_ranks(1, tmp_path / "ranks", refusal, str(tmp_path), str(tiny_shards), str(chosen))[0]
    assert "data.pack_captions is True there and False here" in refused


def refusal(world: World, folder: str, shards: str, chosen: str) -> str:
    overrides = ("data.pack_captions=false", f"checkpoint.resume={chosen}")
    try:
        train(config_of(Path(folder), Path(shards), "other", *overrides), world)
    except CheckpointError as error:
        return str(error)
    return ""

"""Runs whose heads were pruned, masked or reset train on, save, resume and load, under any stage and world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmar.config import load_config
from bitmar.engine.fragments import read_state
from bitmar.engine.progress import checkpoint_directories
from bitmar.engine.world import World
from bitmar.export.huggingface import export_directory
from bitmar.loading import load_trained
from bitmar.model.bitmar import BitMar
from bitmar.train import train
from tests.support.exports import assert_same_model
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, checkpoint_progress, metrics, newest, run_tool, tiny_config

pytestmark = pytest.mark.slow

FIRST, LAST, END = 6, 9, 11  # steps before the surgery, after it, after a resume
EXACT = ("model.quantization=false", "attention_analysis.log_every_n_steps=1", "wandb.attention_log_interval=1")
HEADS = "L1H0,cross_modal.L0H1"


def stage(name: str) -> str:
    return f"engine.ds_config={ROOT / 'ds_configs' / name}.json"


def train_each(world: World, runs: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Train from each recipe, with overrides."""
    for path, overrides in runs:
        train(load_config(Path(path), list(overrides)), world)


def train_first(world: World, folder: str, shards: str) -> None:
    overrides = [*EXACT, stage("zero2"), f"training.max_steps={FIRST}"]
    train(
        tiny_config(Path(folder) / f"recipes{world.rank}", Path(shards), Path(folder) / "runs", "base", *overrides),
        world,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Runs `base`, and from it `pruned`, `masked`, `reset` and `again`, trained on under other stages."""
    folder = tmp_path_factory.mktemp("edited")
    where = folder / "runs"
    run_ranks(2, folder / "first", train_first, str(folder), str(tiny_shards))
    for name, how in (
        ("pruned", ["--prune", HEADS]),
        ("masked", ["--mask", HEADS]),
        ("reset", ["--reset", HEADS]),
        ("again", ["--prune", HEADS, "--restart"]),
    ):
        done = run_tool("edit_heads.py", "--checkpoint", where / "base", *how, "--out", where / name)
        assert done.returncode == 0, done.stderr
        assert "encoder.L1H0, cross_modal.L0H1" in done.stdout
    end = f"training.max_steps={LAST}"
    fine_tuning = ["phases.0.steps=2", "phases.1.steps=2", "phases.2.steps=1", "optimizer.peak_rate=1e-3"]
    cases = [
        (str(where / "pruned" / "config.yaml"), [stage("zero3"), end]),
        (str(where / "masked" / "config.yaml"), [stage("zero1"), end]),
        (str(where / "reset" / "config.yaml"), [stage("zero0"), end]),
        (str(where / "again" / "config.yaml"), [stage("zero2-offload"), "training.max_steps=null", *fine_tuning]),
    ]
    run_ranks(2, folder / "second", train_each, cases)
    resumed = [(str(where / "pruned" / "config.yaml"), [stage("zero1"), f"training.max_steps={END}"])]
    run_ranks(1, folder / "third", train_each, resumed)
    return where


def test_a_pruned_run_goes_on_as_the_masked_one(runs: Path) -> None:
    steps, losses = {}, {}
    for name in ("pruned", "masked"):
        lines = [line for line in metrics(runs / name) if "Training/Loss" in line]
        steps[name] = [line["Training/Step"] for line in lines]
        losses[name] = lines[0]["Training/Loss"]
    assert steps == {"pruned": list(range(FIRST + 1, END + 1)), "masked": list(range(FIRST + 1, LAST + 1))}
    assert losses["pruned"] == pytest.approx(losses["masked"], rel=1e-5), "the same step of the same model"


def test_a_pruned_run_is_saved_and_loaded_in_its_own_shapes(runs: Path) -> None:
    loaded, base = load_trained(runs / "pruned"), load_trained(runs / "base")
    assert loaded.progress.step == END
    width, whole = loaded.config.model.width, base.config.model
    counts = [sum(p.numel() for p in model.parameters()) for model in (base.model, loaded.model)]
    own = width // whole.heads
    assert counts[0] - counts[1] == 2 * (4 * own * width + own)
    assert [layer.heads for layer in loaded.config.model.pruned_heads] == [(1,), (0,)]
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())


def test_statistics_know_which_head_is_gone(runs: Path) -> None:
    with np.load(runs / "pruned" / "attention_analysis" / f"heads_step_{LAST}.npz", allow_pickle=False) as arrays:
        gone = np.isnan(arrays["Encoder_Importance"])
        assert gone.tolist() == [[False, False], [True, False]]
        assert np.isnan(arrays["CrossModal_Entropy"]).tolist() == [[False, True]]
        assert np.isfinite(arrays["Decoder_Importance"]).all()
    last = [line for line in metrics(runs / "pruned") if "Attention/Encoder_layer_1_Entropy" in line][-1]
    assert last["Attention/Encoder_layer_1_Entropy"] > 0
    assert last["Attention/Head_Importance_CrossModal_Max"] > 0


def test_a_reset_run_has_the_base_runs_numbers_but_for_its_heads(runs: Path) -> None:
    edited = load_trained(checkpoint_directories(runs / "reset")[-1])
    base = load_trained(newest(runs / "base"))
    assert edited.progress.step == base.progress.step == FIRST
    torch.manual_seed(base.config.run.seed)
    fresh = dict(BitMar(base.config.model).named_parameters())
    changed = set()
    for (name, after), before in zip(edited.model.named_parameters(), base.model.parameters(), strict=True):
        different = after != before
        if different.any():
            changed.add(name)
            assert torch.equal(after[different], fresh[name][different])
    parts = ("qkv", "sub_norm", "output"), ("query", "key_value", "sub_norm", "output")
    expected = {f"encoder.blocks.1.attention.{part}.weight" for part in parts[0]}
    expected |= {f"fusion.layers.0.attention.{part}.weight" for part in parts[1]}
    assert changed == expected


def test_fine_tuning_begins_at_step_one_with_phases_of_its_own(runs: Path) -> None:
    lines = [line for line in metrics(runs / "again") if "Training/Loss" in line]
    assert [line["Training/Step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["Training/Phase"] for line in lines] == [0, 0, 1, 1, 2]
    first, base = (read_state(checkpoint_directories(runs / name)[-1]) for name in ("again", "base"))
    assert first["progress"]["run_id"] != base["progress"]["run_id"]
    assert lines[0]["Training/Words"] > base["progress"]["words"], "BabyLM counts the words that the model has seen"
    assert checkpoint_progress(newest(runs / "again"))["step"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prune", "L1H0,L1H1"], "encoder.L1 would have no head left"),
        (["--prune", "L9H0"], "no head encoder.L9H0"),
        (["--prune", "layer 2"], "names no head"),
        ([], "nothing to do"),
    ],
)
def test_what_is_refused(runs: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run_tool("edit_heads.py", "--checkpoint", runs / "base", *arguments, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_be_edited(runs: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path, "neither a run's folder"), (runs / "base" / "checkpoints", "neither")):
        done = run_tool("edit_heads.py", "--checkpoint", path, "--mask", "L0H0", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert words in done.stderr
    done = run_tool("edit_heads.py", "--checkpoint", runs / "base", "--mask", "L0H0", "--out", runs / "masked")
    assert done.returncode == 2
    assert "exists" in done.stderr


@pytest.mark.parametrize("name", ["base", "pruned", "masked", "reset"])
def test_runs_of_any_stage_and_world_are_exported(runs: Path, tmp_path: Path, name: str) -> None:
    """ZeRO-2, ZeRO-3, ZeRO-1 and ZeRO-0 on 2 ranks; pruned also by ZeRO-1 on 1."""
    for checkpoint in checkpoint_directories(runs / name):
        export_directory(load_trained(checkpoint), tmp_path / checkpoint.name, [])
        assert_same_model(tmp_path / checkpoint.name, checkpoint)

"""What real runs leave in attention_analysis/: which steps, which heads, and what these attend to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitmar.head_names import CAUSAL, KINDS, TITLES
from bitmar.observability.records import read_lines
from bitmar.observability.schema import STEP_METRIC
from tests.support.runs import STEPS, recipe, write_recipe
from tests.support.trainers import trainers

pytestmark = pytest.mark.slow

EVERY = 4
STEPS_ANALYSED = range(EVERY, STEPS + 1, EVERY)
TOP = 3
PATTERNS = ("head_patterns", "npz")


def run_recipe(folder: Path, shards: Path, *overrides: str, ranks: int = 1) -> Path:
    """Train to the end; the run's folder."""
    path = write_recipe(folder / "recipe.yaml", recipe(shards, folder, "run"))
    with trainers(path, ranks, *overrides) as started:
        assert started.codes() == [0] * ranks, started.said(0)
    return folder / "run"


def analysed(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "attention_analysis").iterdir()}


def load(run_dir: Path, name: str) -> Any:
    return np.load(run_dir / "attention_analysis" / name, allow_pickle=False)


def steps_with(run_dir: Path, metric: str) -> set[int]:
    return {int(line[STEP_METRIC]) for line in read_lines(run_dir / "metrics.jsonl") if metric in line}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run of two ranks that makes no pictures, with passes of the probe set at other steps too."""
    return run_recipe(
        tmp_path_factory.mktemp("analysed"),
        tiny_shards,
        *("wandb.log_every_n_steps=7", "wandb.attention_log_interval=10", "checkpoint.every_steps=20"),
        *(f"attention_analysis.log_every_n_steps={EVERY}", f"attention_analysis.track_top_k={TOP}"),
        "attention_analysis.save_head_patterns=true",
        ranks=2,
    )


def test_files_are_of_exactly_the_steps_that_are_analysed(run: Path) -> None:
    kinds = [f"{what}_{kind}_step_{{}}.{end}" for kind in KINDS for what, end in (("top_heads", "npy"), PATTERNS)]
    assert analysed(run) == {name.format(step) for name in ("heads_step_{}.npz", *kinds) for step in STEPS_ANALYSED}
    assert not (run / "plots").exists()
    assert steps_with(run, "Attention/Dead_Heads") == {*STEPS_ANALYSED, 10, 20}
    assert steps_with(run, "Training/Loss") == {*STEPS_ANALYSED, 10, 20, 7, 14}


@pytest.mark.parametrize("step", STEPS_ANALYSED)
def test_top_heads_are_those_of_the_highest_importance(run: Path, step: int) -> None:
    figures = load(run, f"heads_step_{step}.npz")
    assert int(figures["step"]) == step
    for kind in KINDS:
        importance = figures[f"{TITLES[kind]}_Importance"]
        top = load(run, f"top_heads_{kind}_step_{step}.npy")
        ranked = sorted(np.ndindex(importance.shape), key=lambda place: (-importance[place], place))
        assert (top.dtype, top.tolist()) == (np.int64, [list(place) for place in ranked[:TOP]])


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_of_one_caption_without_padding(run: Path, kind: str) -> None:
    (words,) = {tuple(load(run, f"head_patterns_{k}_step_{s}.npz")["words"]) for k in KINDS for s in STEPS_ANALYSED}
    assert all(words)
    keys = {"cross_modal": 3, "memory": 7}.get(kind, len(words))  # vision tokens and slots of the recipe
    for step in STEPS_ANALYSED:
        found = load(run, f"head_patterns_{kind}_step_{step}.npz")
        top, weights = load(run, f"top_heads_{kind}_step_{step}.npy"), found["weights"]
        assert (weights.dtype, weights.shape) == (np.float32, (len(top), len(words), keys))
        assert found["heads"].tolist() == top.tolist()
        importance = load(run, f"heads_step_{step}.npz")[f"{TITLES[kind]}_Importance"]
        assert found["importance"].tolist() == [importance[tuple(head)] for head in top]
        if kind == "memory":  # the null slot has the rest, all of it before anything is written
            assert (weights.sum(-1) < 1 + 1e-5).all()
            assert weights.any() == (step > 8)
        else:
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        if kind in CAUSAL:
            assert not np.triu(weights, 1).any()


def test_kinds_that_are_off_are_in_no_file_and_stay_metrics(tmp_path: Path, tiny_shards: Path) -> None:
    off = ("attention_analysis.analyze_memory_attention=false", "attention_analysis.analyze_cross_modal=false")
    run_dir = run_recipe(tmp_path, tiny_shards, *off, "training.max_steps=5", "wandb.create_plots=true")
    arrays = {"heads_step_5.npz", "top_heads_encoder_step_5.npy", "top_heads_decoder_step_5.npy"}
    pictures = {f"attention_{name}_step_5.png" for name in ("heads_encoder", "heads_decoder", "timeline")}
    assert analysed(run_dir) == arrays | pictures
    assert {name.partition("_")[0] for name in load(run_dir, "heads_step_5.npz")} == {"step", "Encoder", "Decoder"}
    for metric in ("Attention/Memory_Entropy", "Attention/CrossModal_Concentration"):
        assert steps_with(run_dir, metric) == {5}


def test_no_attention_logged_is_none_analysed(tmp_path: Path, tiny_shards: Path) -> None:
    run_dir = run_recipe(tmp_path, tiny_shards, "wandb.log_attention=false", "training.max_steps=5")
    assert not (run_dir / "attention_analysis").exists()


def test_a_run_that_goes_on_from_an_earlier_step_forgets_later_analyses(tmp_path: Path, tiny_shards: Path) -> None:
    run_dir = run_recipe(tmp_path, tiny_shards)
    earlier = {name for name in analysed(run_dir) if f"step_{STEPS}" not in name}
    assert {name.rpartition("_")[2] for name in analysed(run_dir) - earlier} == {f"{STEPS}.npz", f"{STEPS}.npy"}
    (run_dir / "attention_analysis" / f"attention_timeline_step_{STEPS}.png").touch()
    resumed = f"checkpoint.resume={run_dir}/checkpoints/step_{STEPS - 5:08d}"
    assert run_recipe(tmp_path, tiny_shards, resumed, f"training.max_steps={STEPS - 2}") == run_dir
    assert analysed(run_dir) == earlier


def test_epochs_end_with_an_analysis(tmp_path: Path, tiny_shards: Path) -> None:
    options = ("attention_analysis.viz_every_n_epochs=1", "attention_analysis.log_every_n_steps=1000")
    options += (
        "wandb.attention_log_interval=1000",
        "phases.2.steps=null",
        "phases.2.epochs=2",
        "phases.2.mix={pairs: 1}",
    )
    run_dir = run_recipe(tmp_path, tiny_shards, *options)
    ends, before = set[int](), (0.0, 0)  # the phase, and its epochs that have ended
    for line in read_lines(run_dir / "metrics.jsonl"):
        if "Training/Epoch" in line:
            at = line["Training/Phase"], math.floor(line["Training/Epoch"] + 1e-6)
            ends |= {int(line[STEP_METRIC])} if at[1] > (before[1] if at[0] == before[0] else 0) else set()
            before = at
    assert len(ends) >= 2, ends
    assert {name for name in analysed(run_dir) if name.endswith("npz")} == {f"heads_step_{step}.npz" for step in ends}
    assert steps_with(run_dir, "Attention/Dead_Heads") == ends

"""Whole trainings on 2 ranks: resume to the bit, the run's directory, checkpoints that are refused.

The ranks are started once and run training after training; the tests read what the runs left on disk.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmar.assembly import assemble, open_loader
from bitmar.config import ConfigError, load_config
from bitmar.engine.fragments import CheckpointError
from bitmar.engine.progress import Progress, checkpoint_directories
from bitmar.engine.world import World
from bitmar.observability.records import EVENTS_FILE, read_lines
from bitmar.observability.schema import Layout, schema_of
from bitmar.train import hold_validation, train
from shards.loader import ShardSet
from tests.support.ranks import run_ranks
from tests.support.runs import (
    STEPS,
    STOP,
    checkpoint_progress,
    checkpoint_tensors,
    differing,
    metrics,
    newest,
    tiny_config,
)

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
WATCHED = ("wandb.attention_log_interval=1", "wandb.pca_log_interval=1")
PARTS = ("attention", "features", "gradients", "quantization", "memory")
UNWATCHED = ("wandb.log_every_n_steps=1000", *(f"wandb.log_{part}=false" for part in PARTS))
DEMO_VOCABULARY = 4096
PARTIAL = ".step_00000015.partial"
SUMMARY = {
    *("loss_initial", "loss_final", "loss_shuffled_vision", "perplexity", "seconds", "samples_per_second"),
    *("parameters", "words", "step", "data"),
}
UNFILLED = ("GPU_", "Throughput/MFU", "Quantization/Flips")  # without a GPU, its peak, or a log before


def scenario(world: World, folder: str, shards: str) -> dict[str, Any]:
    """All trainings of this file."""
    base = Path(folder)
    runs = base / "runs"

    def start(name: str, *overrides: str, stage: int) -> None:
        config = tiny_config(base / f"recipes{world.rank}", Path(shards), runs, name, *overrides, stage=stage)
        train(config, world)

    for stage in STAGES:
        start(f"straight{stage}", stage=stage)
        start(f"resumed{stage}", f"training.max_steps={STOP}", stage=stage)
        if world.is_first:
            half = runs / f"resumed{stage}"
            shutil.copytree(half, base / f"half{stage}")
            (half / "checkpoints" / PARTIAL).mkdir()
            (half / "checkpoints" / PARTIAL / "left-over").write_text("of a run that was killed")
        start(f"resumed{stage}", stage=stage)
    start("recomputed", "engine.activation_checkpointing=true", stage=1)
    start("watched", *WATCHED, stage=1)
    start("unwatched", *UNWATCHED, stage=1)
    if world.is_first:
        shutil.copytree(base / "half1", runs / "crossed")
        shutil.copytree(runs / "straight1", runs / "validated")
    world.barrier()
    start("crossed", stage=3)
    start("wide", "model.width=128", f"model.vocab_size={DEMO_VOCABULARY}", "training.max_steps=1", stage=1)
    apart = base / ("apart" if world.is_first else "apart-of-rank-1")
    try:
        train(tiny_config(base / f"recipes{world.rank}", Path(shards), apart, "apart"), world)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return {
        "memory kept": validation_keeps_memory(world, base, runs, Path(shards)),
        "apart": refused,
    }


def validation_keeps_memory(world: World, base: Path, runs: Path, shards: Path) -> bool:
    """Validate with the full memory of a trained run."""
    run = assemble(tiny_config(base / f"recipes{world.rank}", shards, runs, "validated"), world)
    before = {name: tensor.clone() for name, tensor in run.memory.tensors().items()}
    assert run.validated_at != run.progress.step
    hold_validation(run)
    run.sinks.close(0)
    return bool(before["written"].any()) and not differing(before, run.memory.tensors())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[Path, list[dict[str, Any]]]:
    """(folder of the runs, what each rank found)."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_ranks(2, folder / "ranks", scenario, str(folder), str(tiny_shards))


@pytest.fixture(scope="module")
def runs(trained: tuple[Path, list[dict[str, Any]]]) -> Path:
    return trained[0] / "runs"


@pytest.mark.parametrize("stage", STAGES)
def test_stop_and_resume_changes_no_bit(runs: Path, stage: int) -> None:
    straight, resumed = newest(runs / f"straight{stage}"), newest(runs / f"resumed{stage}")
    assert straight.name == resumed.name == f"step_{STEPS:08d}"
    tensors = checkpoint_tensors(straight)
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "memory", "rng"}
    assert bool(tensors["memory.written"].any())
    assert differing(tensors, checkpoint_tensors(resumed)) == []
    assert checkpoint_progress(straight) == checkpoint_progress(resumed)


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(runs: Path, stage: int) -> None:
    expected = metrics(runs / f"straight{stage}")
    assert [line["Training/Step"] for line in expected if "Training/Loss" in line] == list(range(1, STEPS + 1))
    assert sum(line["Training/Step"] == STOP for line in expected) == 2  # the step and its validation
    assert metrics(runs / f"resumed{stage}") == expected


def test_a_checkpoint_goes_on_under_another_stage(runs: Path) -> None:
    """Half of the steps under ZeRO-1, the rest under ZeRO-3; rounding amplifies the other order of sums."""
    for name in ("Training/Loss", "Gradients/Total_Norm"):
        before, after = (step_line(runs / run, STOP + 1)[name] for run in ("straight1", "crossed"))
        assert after == pytest.approx(before, rel=1e-5), name
    one, other = metrics(runs / "straight1")[-1], metrics(runs / "crossed")[-1]
    assert one["Training/Step"] == other["Training/Step"] == STEPS
    assert other["Validation/Loss"] == pytest.approx(one["Validation/Loss"], rel=5e-3)


def step_line(run: Path, step: int) -> dict[str, Any]:
    """The training metrics of a step."""
    (line,) = [line for line in metrics(run) if line["Training/Step"] == step and "Training/Loss" in line]
    return line


def test_recomputed_activations_change_no_bit(runs: Path) -> None:
    assert metrics(runs / "recomputed") == metrics(runs / "straight1")
    assert (
        differing(checkpoint_tensors(newest(runs / "recomputed")), checkpoint_tensors(newest(runs / "straight1"))) == []
    )


def test_watching_changes_no_bit(runs: Path) -> None:
    """Probe passes before every step, and none."""
    watched, unwatched = (checkpoint_tensors(newest(runs / name)) for name in ("watched", "unwatched"))
    assert differing(watched, unwatched) == []
    told = {name for line in metrics(runs / "watched") for name in line}
    probed = {"Attention/Dead_Heads", "Features/Text_Effective_Rank", "Quantization/Activation_Zero_Encoder"}
    assert probed - told == set()
    assert not {name for line in metrics(runs / "unwatched") for name in line if name.startswith("Attention/")}


def test_a_folder_that_the_ranks_do_not_share_is_refused(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = trained
    said, same = (rank["apart"] for rank in found)
    assert said.replace("apart-of-rank-1", "apart") == same.replace("apart-of-rank-1", "apart")
    assert "run.directory" in said
    assert "rank 1" in said
    assert not (folder / "apart-of-rank-1").exists()


def test_validation_changes_nothing_in_the_memory(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [rank["memory kept"] for rank in trained[1]] == [True, True]


def test_the_run_directory_is_complete(runs: Path) -> None:
    run = runs / "straight1"
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "tokenizer.json", "metrics.jsonl", "events.jsonl", "log.txt", "summary.json"}
    assert names == files | {"checkpoints", "attention_analysis", "evaluation"}  # pictures: test_pictures.py
    assert all((run / name).stat().st_size > 0 for name in files)
    assert load_config(run / "config.yaml").run.name == "straight1"
    kinds = [line["kind"] for line in read_lines(run / EVENTS_FILE)]
    assert kinds.count("checkpoint") == STEPS / 5
    assert json.loads((run / "summary.json").read_text())["data"] == "generated"


def test_every_metric_is_logged_and_finite(runs: Path) -> None:
    lines = list(read_lines(runs / "straight1" / "metrics.jsonl"))
    seen = {name for line in lines for name in line}
    config = load_config(runs / "straight1" / "config.yaml")
    shards = ShardSet.open(config.data.shards)
    schema = {m.name for m in schema_of(Layout(config.model, sources=shards.source_names)) if not m.of}
    assert {name for name in schema - seen if not any(part in name for part in UNFILLED)} == set()
    assert seen - {"time"} <= schema
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_summary_says_what_the_log_says(runs: Path) -> None:
    summary = json.loads((runs / "straight1" / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    validations = [line for line in metrics(runs / "straight1") if "Validation/Loss" in line]
    assert summary["loss_initial"] == validations[0]["Validation/Loss"]
    assert summary["loss_final"] == validations[-1]["Validation/Loss"]
    assert summary["loss_shuffled_vision"] == validations[-1]["Validation/Loss_Shuffled_Vision"]
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss_final"]))
    assert summary["seconds"] > 0
    assert summary["samples_per_second"] > 0


def test_words_are_those_of_the_order(runs: Path, tiny_shards: Path) -> None:
    config = load_config(runs / "straight1" / "config.yaml")
    world = World(0, 1, 0, 1, torch.device("cpu"))
    order = open_loader(config, ShardSet.open(tiny_shards), Progress("none"), world).order
    words = [order.words(phase) for phase in range(len(config.phases))]
    for name in ("straight0", "resumed3"):
        assert json.loads((runs / name / "summary.json").read_text())["words"] == sum(words)
    lines = metrics(runs / "straight1")
    counted = {line["Training/Step"]: line["Training/Words"] for line in lines if "Training/Words" in line}
    assert [counted[4], counted[8], counted[STEPS]] == list(itertools.accumulate(words))


def test_loss_starts_at_that_of_a_guess(runs: Path) -> None:
    """At the demo's width and vocabulary; logits spread more where a model is narrower."""
    first = next(line for line in metrics(runs / "wide") if "Validation/Loss" in line)
    assert first["Training/Step"] == 0
    assert first["Validation/Loss"] == pytest.approx(math.log(DEMO_VOCABULARY), rel=0.05)


def test_old_checkpoints_go_and_left_overs_are_replaced(runs: Path) -> None:
    for stage in STAGES:
        kept = sorted(path.name for path in (runs / f"resumed{stage}" / "checkpoints").iterdir())
        assert kept == ["step_00000015", "step_00000020"]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusals(world: World, cases: list[tuple[str, str, list[str]]], folder: str, shards: str) -> list[str]:
    """What a start in the run of each case (name, shards or "", overrides) says; "" where it goes on."""
    said = []
    for name, other, overrides in cases:
        config = tiny_config(
            Path(folder) / f"recipes{world.rank}", Path(other or shards), Path(folder), name, *overrides
        )
        try:
            train(config, world)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
    return said


DAMAGED = ("parameters-00000.safetensors", "parameters-00001.safetensors", "memory.safetensors", "state.json")
CHANGED = {
    "model.memory_size": ["model.memory_size=9"],
    "run.seed": ["run.seed=2"],
    "training.global_batch": ["training.global_batch=32"],
    "data.row_tokens": ["data.row_tokens=64"],
    "phases": ["phases.0.steps=5"],
}


def test_checkpoints_that_do_not_fit_are_refused_by_name(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, tiny_shards: Path, other_shards: Path
) -> None:
    half = trained[0] / "half1"
    cases: list[tuple[str, str, list[str]]] = []
    expected: list[tuple[str, ...]] = []
    for number, name in enumerate(DAMAGED):
        shutil.copytree(half, tmp_path / f"damaged{number}")
        damaged = newest(tmp_path / f"damaged{number}")
        flip_byte(damaged / name)
        cases.append((f"damaged{number}", "", [f"checkpoint.resume={damaged}"]))
        expected.append((name, "damaged", "remove"))
    shutil.copytree(half, tmp_path / "hopeless")
    for directory in checkpoint_directories(tmp_path / "hopeless"):
        (directory / "parameters-00001.safetensors").unlink()
    cases.append(("hopeless", "", []))
    expected.append(("step_00000010", "parameters-00001.safetensors is missing", "no earlier checkpoint is whole"))
    shutil.copytree(half, tmp_path / "whole")
    for key, overrides in CHANGED.items():
        cases.append(("whole", "", overrides))
        expected.append((key, "run.name"))
    cases.append(("whole", str(other_shards), []))
    expected.append(("shards", "run.name"))
    cases.append(("whole", "", ["checkpoint.resume=never"]))
    expected.append(("holds checkpoints already", "run.name"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said, same = run_ranks(2, tmp_path.with_name("refused"), refusals, cases, str(tmp_path), str(tiny_shards))
    assert same == said, "the ranks part"
    for message, parts in zip(said, expected, strict=True):
        assert all(part in message for part in parts), (message, parts)
    after = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if "recipes" not in str(path.relative_to(tmp_path))
    }
    assert {p: t for p, t in after.items() if p != tmp_path} == {p: t for p, t in before.items() if p != tmp_path}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, tiny_shards: Path
) -> None:
    shutil.copytree(trained[0] / "half1", tmp_path / "passing")
    folder = tmp_path / "passing" / "checkpoints"
    flip_byte(folder / "step_00000010" / "parameters-00001.safetensors")
    (folder / "step_00000012").mkdir()  # half there: no state.json
    case = ("passing", "", ["training.max_steps=7"])
    said = run_ranks(1, tmp_path / "ranks", refusals, [case], str(tmp_path), str(tiny_shards))
    assert said == [[""]]
    names = {path.name for path in folder.iterdir()}
    assert names == {"damaged_step_00000010", "step_00000005", "step_00000007", "step_00000012"}
    (event,) = [e for e in read_lines(tmp_path / "passing" / EVENTS_FILE) if e["kind"] == "checkpoint_passed_over"]
    assert "parameters-00001.safetensors is damaged" in event["problem"]
    assert [line["Training/Step"] for line in metrics(tmp_path / "passing") if "Training/Loss" in line][-2:] == [6, 7]


def test_a_run_goes_on_from_the_checkpoint_that_it_is_told(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, tiny_shards: Path
) -> None:
    chosen = checkpoint_directories(trained[0] / "half1")[-1]
    overrides = [f"checkpoint.resume={chosen}", "training.max_steps=7"]
    assert run_ranks(1, tmp_path / "ranks", refusals, [("told", "", overrides)], str(tmp_path), str(tiny_shards)) == [
        [""]
    ]
    assert [line["Training/Step"] for line in metrics(tmp_path / "told") if "Training/Loss" in line] == [6, 7]
    for step, tolerance in ((6, 1e-5), (7, 1e-3)):  # one rank goes on from two
        expected = step_line(trained[0] / "runs" / "straight1", step)["Training/Loss"]
        assert step_line(tmp_path / "told", step)["Training/Loss"] == pytest.approx(expected, rel=tolerance)


def test_a_run_that_is_told_to_go_back_sets_later_checkpoints_aside(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, tiny_shards: Path
) -> None:
    shutil.copytree(trained[0] / "runs" / "straight1", tmp_path / "back")
    folder = tmp_path / "back" / "checkpoints"
    overrides = [f"checkpoint.resume={folder / 'step_00000015'}", "training.max_steps=17"]
    said = run_ranks(1, tmp_path / "ranks", refusals, [("back", "", overrides)], str(tmp_path), str(tiny_shards))
    assert said == [[""]]
    assert sorted(path.name for path in folder.iterdir()) == ["left_step_00000020", "step_00000015", "step_00000017"]

"""A user's mistakes: one line that names the thing and the way out, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmar import train
from bitmar.config import ConfigError, load_config
from bitmar.engine.fragments import CheckpointError
from bitmar.engine.world import World
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, recipe, write_recipe

# overrides of a good recipe -> what the message must hold
OVERRIDES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown key": (["training.globl_batch=8"], ("training.globl_batch", "did you mean global_batch")),
    "unknown section": (["modle.width=8"], ("modle", "did you mean model")),
    "unknown phase key": (["phases.1.epoch=1"], ("phases[1].epoch", "did you mean epochs")),
    "wrong type": (["model.width=wide"], ("model.width", "whole number", "'wide'")),
    "wrong type of a list": (["phases.0.train=encoder"], ("phases[0].train", "list")),
    "a section that is a number": (["training=3"], ("training", "section")),
    "not a pair": (["training.global_batch"], ("training.global_batch", "key.path=value")),
    "out of range": (["model.memory_size=0"], ("model.memory_size", "> 0", "got 0")),
    "heads": (["model.heads=5"], ("model.width 32", "model.heads 5")),
    "pretrained text encoder": (["model.text_encoder=bert-base"], ("model.text_encoder", "bert-base", "pretrained")),
    "two lengths": (["phases.0.words=100"], ("phases[text]", "exactly one of epochs, words, steps")),
    "unknown loss": (["phases.0.losses={lm: 1.0, mse: 1.0}"], ("phases[text].losses", "mse", "contrastive")),
    "unknown component": (["phases.0.train=[embedding, brain]"], ("phases[text].train", "brain", "encoder")),
    "batch of no whole micro-batches": (["training.global_batch=10"], ("global_batch 10", "micro_batch 4")),
    "recall group": (["model.recall_group=3"], ("micro_batch 4", "model.recall_group 3")),
    "words": (["data.words_limit=1000"], ("data.words_limit", "1,000", "BabyLM")),
    "vocabulary": (["model.vocab_size=100"], ("model.vocab_size 100", "--vocab-size")),
    "vector width": (["model.vision_encoder_dim=64"], ("model.vision_encoder_dim 64", "768")),
    "shards": (["data.shards=nowhere"], ("nowhere", "tools/make_shards.py")),
    "best without validation": (
        ["checkpoint.keep_best=1", "validation.every_steps=3"],
        ("checkpoint.keep_best", "checkpoint.every_steps 5", "validation.every_steps 3"),
    ),
    "milestones": (["checkpoint.word_milestones=soon"], ("checkpoint.word_milestones", "list")),
    "compile under ZeRO-3": (
        ["engine.compile=true", f"engine.ds_config={ROOT / 'ds_configs' / 'zero3.json'}"],
        ("engine.compile", "ZeRO-3"),
    ),
    "GPUs on a CPU": (
        [f"engine.ds_config={ROOT / 'ds_configs' / 'zeropp.json'}"],
        ("zeropp.json", "zero_quantized_weights", "needs GPUs"),
    ),
    "ds_config": (["engine.ds_config=zero9.json"], ("engine.ds_config zero9.json", "does not exist")),
}
# found once the engine stands: the model is that of a checkpoint, the phases fit the shards
LATE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "passes": (["training.max_epochs=1", "phases.2.steps=200"], ("training.max_epochs 1", "phases", "source")),
    "mix": (["phases.1.mix={pears: 1.0}"], ("'pairs'", "pears", "the shards hold only")),
    "words of less than a batch": (["phases.0.steps=null", "phases.0.words=3"], ("'text'", "words 3")),
    "checkpoint": (["checkpoint.resume=nowhere"], ("checkpoint nowhere", "state.json")),
    "a file in the way": (["run.directory=LICENSE"], ("run.directory", "LICENSE")),
}
DS_CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a key of the recipe": (
        json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}),
        ("train_batch_size", "training.global_batch", "remove"),
    ),
    "an optimizer": (json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {}}), ("optimizer", "remove")),
    "no stage": ("{}", ("zero_optimization.stage", "0, 1, 2 or 3")),
    "a hierarchy of no node": (
        json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}),
        ("zero_hpz_partition_size", "1 ranks", "auto"),
    ),
    "no folder for NVMe": (
        json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": ""}}}),
        ("offload_optimizer.nvme_path", "local disk"),
    ),
    "no JSON": ("{stage: 1}", ("is not JSON",)),
    "no object": ("[]", ("must hold an object",)),
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], runs: Path, parts: tuple[str, ...]) -> None:
    """Start a training in this process; it must end with exit code 2 and one line that holds `parts`."""
    capsys.readouterr()
    code = train.main(arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert all(part in said for part in parts), said
    assert not runs.exists()


@pytest.fixture
def good(tmp_path: Path, tiny_shards: Path) -> dict[str, Any]:
    """A recipe that would train."""
    return recipe(tiny_shards, tmp_path / "runs", "bad")


@pytest.mark.parametrize("case", OVERRIDES)
def test_recipe(
    case: str, good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, parts = OVERRIDES[case]
    path = write_recipe(tmp_path / "recipe.yaml", good)
    refused(capsys, ["--config", str(path), *overrides], tmp_path / "runs", parts)


@pytest.mark.parametrize("case", DS_CONFIGS)
def test_ds_config(case: str, good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, parts = DS_CONFIGS[case]
    (tmp_path / "zero.json").write_text(text)
    path = write_recipe(tmp_path / "recipe.yaml", good)
    arguments = ["--config", str(path), f"engine.ds_config={tmp_path / 'zero.json'}"]
    refused(capsys, arguments, tmp_path / "runs", (str(tmp_path / "zero.json"), *parts))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: {name: a\n", ("recipe.yaml", "is not YAML")),
        ("- a\n", ("recipe.yaml", "mapping of sections", "list")),
        ("run: {name: a}\n", ("missing key data",)),
        ("data: {shards: x}\nphases: []\n", ("phases is empty",)),
        ("data: {shards: x}\nphases: {lm: 1}\n", ("phases must be a list",)),
        (b"\xff\xfe\x00", ("recipe.yaml", "cannot be read")),
    ],
)
def test_recipe_file(text: str | bytes, parts: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, ["--config", str(path)], tmp_path / "runs", parts)


def test_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere.yaml"
    refused(capsys, ["--config", str(missing)], tmp_path / "runs", (str(missing), "launch/recipes/"))


def test_batch_that_ranks_do_not_divide(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found from the launcher's environment, before the ranks wait for each other."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    path = write_recipe(tmp_path / "recipe.yaml", good)
    refused(capsys, ["--config", str(path)], tmp_path / "runs", ("global_batch 16", "3 ranks", "multiple of 12"))


def test_what_needs_a_compiler_is_refused_without_one(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_recipe(tmp_path / "recipe.yaml", good)
    config = json.loads((ROOT / "ds_configs" / "zero3-nvme.json").read_text())
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path / "swap")
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    arguments = ["--config", str(path), f"engine.ds_config={tmp_path / 'nvme.json'}"]
    refused(capsys, arguments, tmp_path / "runs", ("nvme.json", "libaio", "C++ compiler"))
    refused(capsys, ["--config", str(path), "engine.compile=true"], tmp_path / "runs", ("engine.compile", "g++"))


@pytest.mark.parametrize("damage", ["manifest", "tokenizer", "index"])
def test_damaged_shards(
    damage: str, good: dict[str, Any], tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    if damage == "manifest":
        (shards / "manifest.json").write_text('{"format": ')
    elif damage == "tokenizer":
        (shards / "tokenizer.json").unlink()
    else:
        next(shards.glob("*.index.npz")).unlink()
    path = write_recipe(tmp_path / "recipe.yaml", good)
    refused(capsys, ["--config", str(path), f"data.shards={shards}"], tmp_path / "runs", (str(shards), "make"))


def late_refusals(world: World, path: str, cases: list[list[str]]) -> list[str]:
    """What a training says to each list of overrides."""
    said = []
    for overrides in cases:
        try:
            train.train(load_config(Path(path), overrides), world)
            said.append("")
        except (ConfigError, CheckpointError) as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_late_refusals(good: dict[str, Any], tmp_path: Path) -> None:
    """In one process of its own: DeepSpeed makes no second engine after its process group has gone."""
    path = write_recipe(tmp_path / "recipe.yaml", good)
    cases = [overrides for overrides, _ in LATE.values()]
    (said,) = run_ranks(1, tmp_path / "ranks", late_refusals, str(path), cases)
    for name, message, (_, parts) in zip(LATE, said, LATE.values(), strict=True):
        assert all(part in message for part in parts), (name, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.text_encoder=bert-base", "phases.1.mix={pears: 1.0}"])
def test_as_a_process(override: str, good: dict[str, Any], tmp_path: Path) -> None:
    """The module as the launcher starts it: the same line, and nothing else on standard error."""
    path = write_recipe(tmp_path / "recipe.yaml", good)
    command = [sys.executable, "-m", "bitmar.train", "--config", str(path), override]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=clean)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()

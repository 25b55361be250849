"""The plan's parts that need no rank: operations, activations, lengths of phases, changes that make a run fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitmar.batch import Batch
from bitmar.config import load_config
from bitmar.engine.memory_plan import ZeroSettings, activation_bytes, state_bytes
from bitmar.engine.world import World
from bitmar.losses import compute_losses
from bitmar.model.bitmar import BitMar
from bitmar.model.flops import Work, training_flops
from bitmar.model.memory import MemoryState
from tests.support.batches import caption_batch, small_model
from tools import plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"


def whole_rows(rows: int, length: int) -> Batch:
    """Captions without any padding."""
    batch = caption_batch(rows=rows, length=length)
    full = torch.ones(rows, length, dtype=torch.bool)
    return batch.replace(
        segments=full.int(),
        targets=batch.tokens,
        valid=full[:, 0],
        has_vision=full[:, 0],
        positions=torch.arange(length).expand(rows, length).int(),
    )


def test_operations_are_those_that_torch_counts() -> None:
    """Torch counts attention without its causal half, and neither look-up nor element-wise work."""
    rows, length = 8, 12
    model = small_model(quantization=False, width=64, ffn_width=96)
    network, batch = BitMar(model), whole_rows(rows, length)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        outputs = network(batch, MemoryState.empty(model.memory_size, model.episode_dim))
        compute_losses(outputs, batch, world, model, {"lm"}).sums["lm"].backward()
    planned = training_flops(model, Work(rows * length, rows * length * length, rows)).total
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_causal_attention_counts_the_pairs_it_looks_at() -> None:
    model = small_model()
    layers = model.encoder_layers + model.decoder_layers
    more = training_flops(model, Work(10, 55, 1)).total - training_flops(model, Work(10, 45, 1)).total
    assert more == 3 * 4 * model.width * layers * 10


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_of_one_rank_holds_all(stage: int) -> None:
    groups = [[1000, 24], [7]]
    state = state_bytes(groups, ZeroSettings(stage), world=1)
    assert state.parameters == pytest.approx(4 * 1031, abs=16)
    assert state.gradients == pytest.approx(4 * 1031, abs=16)
    assert state.optimizer == pytest.approx(12 * 1031, abs=48)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_shrinks_with_the_ranks(stage: int) -> None:
    groups = [[1_000_000] * 8]
    few, many = (state_bytes(groups, ZeroSettings(stage), world).lasting for world in (1, 8))
    expected = {1: 8 + 12 / 8, 2: 4 + 16 / 8, 3: 20 / 8}[stage]  # bytes a parameter
    assert many == pytest.approx(8_000_000 * expected, rel=0.01)
    assert few > many


def test_offload_moves_state_to_the_host() -> None:
    groups = [[1_000_000] * 8]
    here = state_bytes(groups, ZeroSettings(3), world=2)
    away = state_bytes(groups, ZeroSettings(3, optimizer_on="cpu", parameters_on="cpu"), world=2)
    disk = state_bytes(groups, ZeroSettings(3, optimizer_on="nvme", parameters_on="nvme"), world=2)
    assert away.lasting == 0 < here.lasting <= away.host
    assert disk.disk >= here.parameters + here.optimizer


@pytest.mark.slow
def test_activations_follow_micro_batch_and_checkpointing() -> None:
    config = load_config(RECIPES / "demo.yaml")
    spared = dataclasses.replace(config, engine=dataclasses.replace(config.engine, activation_checkpointing=True))
    whole = activation_bytes(config, torch.float32, 32)
    assert activation_bytes(config, torch.float32, 16) == pytest.approx(whole / 2, rel=0.15)
    assert activation_bytes(spared, torch.float32, 32) < 0.8 * whole
    assert activation_bytes(config, torch.bfloat16, 32) < whole


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan.main([*arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def recipe(name: str) -> list[str]:
    return ["--config", str(RECIPES / f"{name}.yaml"), "data.shards=nowhere"]


def test_a_plan_without_shards_uses_words(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*recipe("bitmar-120m"), "--gpus", "8", "--json"]
    code, out, _ = planned(capsys, *arguments, "--words", "100M")
    told = json.loads(out)
    assert code == 0
    assert not told["counted"]
    assert told["words"] == pytest.approx((2 * 50 + 3 * 50 + 5 * 100) * 1e6, rel=0.01)  # the recipe's epochs
    _, half, _ = planned(capsys, *arguments, "--words", "50M")
    assert json.loads(half)["steps"] == pytest.approx(told["steps"] / 2, rel=0.01)


def test_more_gpus_take_less_time(capsys: pytest.CaptureFixture[str]) -> None:
    days = [json.loads(planned(capsys, *recipe("bitmar-120m"), "--gpus", n, "--json")[1])["days"] for n in ("1", "16")]
    assert days[0] == pytest.approx(16 * days[1])


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*recipe("bitmar-120m"), "--ds", str(ROOT / "ds_configs/zero1.json"), "--gpus", "8"]
    code, out, _ = planned(capsys, *arguments, "--gpu-memory", "80GB", "--json")
    needed = json.loads(out)["bytes"]["total"]
    assert (code, json.loads(out)["fits"]) == (0, True)
    code, out, _ = planned(capsys, *arguments, "--gpu-memory", f"{needed * 0.7 / 1e9:.3f}GB", "--json")
    told = json.loads(out)
    assert (code, told["fits"]) == (1, False)
    assert told["changes"]
    for change in told["changes"]:  # each, typed as it is told, fits
        words = change["change"].split()
        code, out, _ = planned(capsys, *arguments, *words, "--gpu-memory", f"{needed * 0.7 / 1e9:.3f}GB", "--json")
        assert (code, json.loads(out)["bytes"]["total"]) == (0, change["total"]), words
    code, out, _ = planned(capsys, *arguments, "--gpu-memory", "1MB")
    assert code == 1
    assert "no ZeRO stage" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu-memory", "large"], ("--gpu-memory", "'large'", "80GB")),
        (["--gpus", "0"], ("--gpus", "> 0", "got 0")),
        (["--mfu", "1.5"], ("--mfu", "1.5")),
        (["--words", "many"], ("--words", "'many'", "100M")),
        (["--gpus", "3"], ("training.global_batch 512", "3 ranks")),
        (["--ds", "zero9.json"], ("zero9.json", "does not exist")),
        (["model.widht=3"], ("model.widht", "did you mean width")),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = planned(capsys, *recipe("bitmar-120m"), *arguments)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said

"""A run on a GPU, against the same run on the CPU: every number of its logs but times, sizes and flips, under ZeRO 0
to 3 and with offload; of rounded weights up to the first step.

One rank: NCCL takes no two of them on one device. Where there is no GPU these tests are skipped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmar.config import Config
from bitmar.engine.world import World
from bitmar.observability.records import METRICS_FILE, read_lines
from bitmar.train import train
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, metrics, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS = 10  # through all phases
DS_CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
ALIKE = (
    *("training.precision=fp32", "model.dropout=0.0", "training.micro_batch=8", f"training.max_steps={STEPS}"),
    *("checkpoint.every_steps=1000", "validation.every_steps=1000", "evaluation.every_steps=1000"),
    *("wandb.attention_log_interval=1", "wandb.pca_log_interval=1"),
)
CLOSE = {"plain": 1e-3, "rounded": 2e-2}  # relative
PICTURES = ("wandb.create_plots=true", "attention_analysis.viz_every_n_epochs=1")


def case(folder: Path, shards: Path, name: str, *overrides: str) -> Config:
    rates = "optimizer.peak_rate=2e-4", "optimizer.second_rate=1.4e-4"
    return tiny_config(folder, shards, folder / "runs", name, *ALIKE, *rates, *overrides)


def train_each(world: World, configs: list[Config]) -> None:
    for config in configs:
        train(config, world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[str, Path]:
    """Folders of runs, by device, rounding and ds_config."""
    found = dict[str, Path]()
    for device in ("cpu", "cuda"):
        folder, configs = tmp_path_factory.mktemp(device), list[Config]()
        for rounding in CLOSE:
            for ds_config in DS_CONFIGS if device == "cuda" else ("zero1",):
                own = (
                    f"model.quantization={str(rounding == 'rounded').lower()}",
                    f"engine.ds_config={ROOT}/ds_configs/{ds_config}.json",
                )
                configs.append(case(folder, tiny_shards, f"{rounding}-{ds_config}", *own))
        run_ranks(1, folder / "ranks", train_each, configs, device=device)
        found |= {f"{device}-{config.run.name}": config.run_directory for config in configs}
    return found


def apart(one: Any, other: Any) -> float:
    """How far two numbers lie apart, relative to the larger."""
    return abs(one - other) / max(abs(one), abs(other), 1e-4)


@pytest.mark.parametrize("ds_config", DS_CONFIGS)
@pytest.mark.parametrize("rounding", CLOSE)
def test_a_gpu_tells_what_a_cpu_tells(rounding: str, ds_config: str, runs: dict[str, Path]) -> None:
    expected, told = metrics(runs[f"cpu-{rounding}-zero1"]), metrics(runs[f"cuda-{rounding}-{ds_config}"])
    steps = [line["Training/Step"] for line in told]
    assert steps == [line["Training/Step"] for line in expected]
    assert {0, 1, STEPS} <= set(steps)
    if rounding == "rounded":  # one activation that rounds the other way is seen in all that follows its step
        told, expected = ([line for line in lines if line["Training/Step"] <= 1] for lines in (told, expected))
    for mine, other in zip(told, expected, strict=True):
        assert mine.keys() == other.keys()
        assert "nonfinite" not in mine
        far = {name: (mine[name], other[name]) for name in mine if apart(mine[name], other[name]) > CLOSE[rounding]}
        assert not far, (mine["Training/Step"], far)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run as a user starts it, with pictures."""
    folder = tmp_path_factory.mktemp("bf16")
    config = case(folder, tiny_shards, "bf16", "training.precision=auto", *PICTURES)
    run_ranks(1, folder / "ranks", train_each, [config], device="cuda")
    return config.run_directory


def test_what_the_gpu_does_is_told(bf16: Path) -> None:
    logs = [line for line in read_lines(bf16 / METRICS_FILE) if "Training/Loss" in line]
    assert len(logs) == STEPS
    for line in logs:
        assert 0 < line["System/GPU_Memory_Allocated"] <= line["System/GPU_Memory_Peak"]
        assert line["System/GPU_Memory_Allocated"] <= line["System/GPU_Memory_Reserved"]
        assert 0 < line["System/GPU_Memory_Percent"] <= 100
        assert line["System/GPU_Memory_Peak"] <= torch.cuda.get_device_properties(0).total_memory
        parts = [line[f"Throughput/{part}_Seconds"] for part in ("Data", "Forward", "Backward", "Update")]
        assert all(seconds > 0 for seconds in parts)
        assert 0 < line["Throughput/MFU"] < 1
        assert math.isfinite(line["Training/Loss"])
    assert logs[-1]["Training/Loss_LM"] < logs[0]["Training/Loss_LM"]


def test_pictures_of_a_run_on_a_gpu(bf16: Path) -> None:
    for folder in ("plots", "attention_analysis"):
        assert list((bf16 / folder).glob("*.png")), folder

"""What the plan tells of a rank's memory, against ranks that train: their tensors, and the growth of the process.

Worlds of 1 to 4 ranks, each with a model of its own, under ZeRO-1, 2 and 3. The ranks are started once a world.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bitmar.config import COMPONENTS, Config, DataConfig, EngineConfig, ModelConfig, PhaseConfig, TrainingConfig
from bitmar.engine.ds_config import read_ds_config
from bitmar.engine.memory_plan import ZeroSettings
from bitmar.engine.schedule import Rates
from bitmar.engine.step import train_step
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.losses import compute_losses
from bitmar.model.bitmar import BitMar
from bitmar.model.flops import Work
from bitmar.model.memory import MemoryState
from bitmar.plan import PhaseLength, Plan, make_plan
from tests.support.batches import caption_batch
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
MICRO, LENGTH = 8, 32
PHASE = PhaseConfig("p", {"pairs": 1.0}, {"lm": 1.0, "contrastive": 0.1, "recall": 0.1}, write_memory=True, steps=9)
MODELS: dict[int, dict[str, Any]] = {  # by world: 5 to 15 million parameters in different proportions
    1: dict(width=256, ffn_width=640, vocab_size=16_384, heads=4, encoder_layers=4, decoder_layers=4),
    2: dict(width=192, ffn_width=512, vocab_size=8192, heads=4, encoder_layers=5, decoder_layers=5),
    3: dict(width=320, ffn_width=800, vocab_size=4096, heads=4, encoder_layers=3, decoder_layers=3),
    4: dict(width=256, ffn_width=1024, vocab_size=8192, heads=8, encoder_layers=4, decoder_layers=3),
}
BUCKET = 2_000_000  # elements, so that a bucket is not more than such a model
BUCKET_BYTES = 4 * BUCKET


def config_of(world: int, ds_config: Path) -> Config:
    model = ModelConfig(
        vision_encoder_dim=24, memory_size=32, recall_group=4, contrastive_group=8, writes_per_step=4, **MODELS[world]
    )
    return Config(
        DataConfig("none", row_tokens=LENGTH),
        (PHASE,),
        model=model,
        training=TrainingConfig(global_batch=2 * MICRO * world, micro_batch=MICRO, precision="fp32"),
        engine=EngineConfig(ds_config=str(ds_config)),
    )


def small_buckets(folder: Path, stage: int) -> Path:
    """A ds_config of the repository with buckets of a size that fits these models."""
    values = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    zero = values["zero_optimization"]
    for key in zero:
        if "bucket_size" in key:
            zero[key] = BUCKET
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(values))
    return path


def plan_of(config: Config, world: int) -> Plan:
    settings = ZeroSettings.of(read_ds_config(Path(config.engine.ds_config)))
    phases = [PhaseLength("p", 9, 0, Work())]
    return make_plan(config, settings, world, phases, device="cpu", dtype=torch.float32, counted=False)


def held_bytes(before: set[int]) -> int:
    """Bytes of all storages that tensors of this process hold, each once, but those of `before` and buckets."""
    gc.collect()
    sizes: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in sizes.items() if place not in before and size != BUCKET_BYTES)


def places() -> set[int]:
    gc.collect()
    return {t.untyped_storage().data_ptr() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(world: World, folders: list[str]) -> dict[str, dict[str, int]]:
    """Bytes of state in the middle of an accumulating step, and the growth of the process at its peak."""
    warm_up = config_of(world.size, Path(folders[0]))
    tiny = dataclasses.replace(warm_up.model, width=32, vocab_size=97, ffn_width=32, encoder_layers=1, decoder_layers=1)
    measure_stage(world, dataclasses.replace(warm_up, model=tiny))  # libraries that are loaded when first used
    return {folder: measure_stage(world, config_of(world.size, Path(folder))) for folder in folders}


def measure_stage(world: World, config: Config) -> dict[str, int]:
    gc.collect()
    before = places()
    ctypes.CDLL(None).malloc_trim(0)  # what the engine before has left free
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    rss = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    engine = ZeroEngine(BitMar(config.model), config, world)
    engine.set_rates(Rates(1e-3, 0.1), COMPONENTS)
    memory = MemoryState.empty(config.model.memory_size, config.model.episode_dim)
    for step in range(2):
        batches = [caption_batch(MICRO, LENGTH, seed=2 * step + half) for half in range(2)]
        memory = train_step(engine, batches, memory, PHASE, config, world, step).memory
    peak = peak_rss_bytes() - rss
    batch = caption_batch(MICRO, LENGTH)
    outputs = engine.forward(batch, memory, recall=True)
    losses = compute_losses(outputs, batch, world, config.model, {"lm", "contrastive", "recall"})
    engine.backward(sum(losses.sums.values()) + 0.0 * outputs.side_sum())  # type: ignore[arg-type]
    engine.step()
    del outputs, losses, batch, batches, memory
    state = held_bytes(before)
    return {"state": state, "peak": peak}


@pytest.mark.parametrize("size", sorted(MODELS))
def test_plan_is_what_ranks_hold(size: int, tmp_path: Path) -> None:
    folders = [str(small_buckets(tmp_path, stage)) for stage in STAGES]
    ranks: list[dict[str, Any]] = run_ranks(size, tmp_path / "ranks", measure, folders)
    for stage, folder in zip(STAGES, folders, strict=True):
        plan = plan_of(config_of(size, Path(folder)), size)
        state = max(rank[folder]["state"] for rank in ranks)
        peak = max(rank[folder]["peak"] for rank in ranks)
        assert plan.state.lasting == pytest.approx(state, rel=0.05), (size, stage)
        assert plan.device_bytes == pytest.approx(peak, rel=0.2), (size, stage)

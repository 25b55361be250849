"""Folders of runs as the trainer leaves them, written by its own sinks and plots."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from bitmar.config import Config, DataConfig, PhaseConfig, RunConfig, dump_config
from bitmar.observability.plots import write_plots
from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, JsonlSink

LONG_AGO = 1_000_000_000.0  # a run last written then is dead
PHASES = {"text": 70, "pairs": 330}
LAYERS = 3


def config_text(name: str, directory: str = "runs", seed: int = 1) -> str:
    """A resolved configuration, as assembly writes it."""
    phases = tuple(PhaseConfig(n, {"text": 1.0}, {"lm": 1.0}, steps=steps) for n, steps in PHASES.items())
    run = RunConfig(name=name, directory=directory, seed=seed)
    return dump_config(Config(data=DataConfig(shards="data/demo/shards"), phases=phases, run=run))


def values_at(step: int, seed: int) -> dict[str, float]:
    """A log's numbers: of the schema, of layers, and one that no schema knows."""
    loss = 2 + 0.3 * seed + 6 * math.exp(-step / (70 + 20 * seed)) + 0.15 * math.sin(step * (1 + seed))
    return {
        "Training/Loss": loss,
        "Training/Loss_LM": loss - 0.1,
        "Training/Learning_Rate": 3e-3 * min(step / 40, (400 - step) / 360),
        "Training/Words": 2900.0 * step,
        "Training/Phase": float(step > PHASES["text"]),
        "Gradients/Total_Norm": 1 + math.exp(-step / 30),
        "Memory/Active_Slots_Percentage": min(100.0, step / 3),
        "Throughput/Samples_Per_Second": 110 + 5 * math.cos(step / 7 + seed),
        "System/Memory_RSS": 8.7e8 + 1e5 * step,
        "Data/Wait_Seconds": 0.005,
        **{f"Attention/Encoder_layer_{layer}_Entropy": 3 - 0.3 * layer - step / 900 for layer in range(LAYERS)},
        "Novel/Never_Heard_Of": float(seed),
    }


def finished_run(folder: Path, seed: int = 1, steps: int = 400, every: int = 5, plots: bool = True) -> Path:
    """A run that reached its end; its loss was not finite at one log."""
    sink = JsonlSink(folder)
    (folder / "config.yaml").write_text(config_text(folder.name, seed=seed), encoding="utf-8")
    sink.event("start", step=0, world=2, parameters=2_363_876, phases=PHASES, data="generated")
    for step in range(0, steps + 1, every):
        if step % 100 == 0:
            loss = 2.1 + 0.2 * seed + 6 * math.exp(-step / 90)
            sink.log(step, {"Validation/Loss": loss, "Validation/Perplexity": math.exp(loss)})
        if step:
            values = values_at(step, seed)
            sink.log(step, values | ({"Training/Loss": math.nan} if step == 40 * every else {}))
    sink.event("skipped_update", step=40 * every, not_finite="loss", in_a_row=1)
    sink.event("checkpoint", step=steps, path=f"runs/{folder.name}/checkpoints/step_{steps:08d}", hold_seconds=0.01)
    if plots:
        for path in write_plots(folder):
            sink.image(steps, f"Plots/{path.stem}", path)
    sink.close()
    summary = {
        "data": "generated",
        "step": steps,
        "loss_initial": 8.2,
        "loss_final": 2.27,
        "loss_shuffled_vision": 2.61,
        "loss_text": None,
        "perplexity": 9.68,
        "seconds": 231.5,
        "samples_per_second": 110.4,
        "words": 2900 * steps,
        "parameters": 2_363_876,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return folder


def died_run(folder: Path, metrics: str = "torn") -> Path:
    """A run that died in step 3, long ago: its metrics.jsonl is `torn` in its last line, `empty` or `missing`."""
    sink = JsonlSink(folder)
    (folder / "config.yaml").write_text(config_text(folder.name), encoding="utf-8")
    sink.event("start", step=0, world=2, parameters=2_363_876, phases=PHASES)
    if metrics == "torn":
        for step in (1, 2):
            sink.log(step, values_at(step, 1))
    sink.close()
    path = folder / METRICS_FILE
    if metrics == "torn":
        with path.open("a", encoding="utf-8") as out:
            out.write('{"Training/Step": 3, "time": 17956923')
    elif metrics == "missing":
        path.unlink()
    for file in folder.iterdir():
        os.utime(file, (LONG_AGO, LONG_AGO))
    assert (folder / EVENTS_FILE).is_file()
    return folder

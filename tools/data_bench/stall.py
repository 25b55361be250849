"""How long training waits for data: the demo's recipe, read from the metrics that its run logs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch
import yaml

from bitmar.observability.records import METRICS_FILE, read_lines
from shards.convert import convert
from shards.writer import Options
from tools.data_bench.records import ROOT, Bench, Row
from tools.make_demo_data import make

RECIPE = ROOT / "launch/recipes/demo.yaml"


def stall_rows(bench: Bench) -> Iterator[Row]:
    """The demo on 2 ranks as launch/demo.sh runs it; quick: a few steps of each phase in one process."""
    recipe = yaml.safe_load(RECIPE.read_text())
    raw, shards = bench.folder / "demo_raw", bench.folder / "demo_shards"
    images, words = (300, 20_000) if bench.quick else (4000, 150_000)  # the latter is what launch/demo.sh makes
    make(raw, seed=0, images=images, words=words)
    convert(raw, shards, Options(vocab_size=recipe["model"]["vocab_size"]), force=False, report=lambda *_: None)
    train = [sys.executable, "-m", "bitmar.train", "--config"] if bench.quick else ["bash", "launch/local.sh"]
    overrides = [f"data.shards={shards}", f"run.directory={bench.folder}", "run.name=stall", "wandb.enabled=false"]
    if bench.quick:
        overrides += [f"phases.{number}.steps=3" for number in range(len(recipe["phases"]))]
        overrides += ["training.global_batch=32", "engine.threads_per_rank=1", "validation.max_samples=32"]
        overrides += ["model.encoder_layers=1", "model.decoder_layers=1"]
    command = [*train, str(RECIPE), *([] if bench.quick else [str(torch.cuda.device_count() or 2)]), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    waited = trained = 0.0
    before = 0
    for line in read_lines(bench.folder / "stall" / METRICS_FILE):
        if "Throughput/Step_Seconds" in line:  # means over the ranks and over the steps since the line before
            steps = line["Training/Step"] - before
            waited += steps * line["Data/Wait_Seconds"]
            trained += steps * line["Throughput/Step_Seconds"]
            before = line["Training/Step"]
    yield {
        "name": f"data stall: Data/Wait_Seconds over Throughput/Step_Seconds, {before:.0f} steps of the demo",
        "ours": round(waited / trained, 5),
        "theirs": None,
        "value": round(waited / trained, 5),
        "unit": "seconds / second",
        "bar": "<= 0.01",
        "ok": waited / trained <= 0.01,
    }

"""Whole trainings for tests: tiny generated shards, a recipe for them, and what a run leaves on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from bitmar.config import Config, load_config
from bitmar.engine.fragments import KINDS, MEMORY_FILE, FragmentReader, read_generator, read_state, state_shapes
from bitmar.engine.progress import checkpoint_directories
from bitmar.observability.records import METRICS_FILE, read_lines
from tests.support.batches import small_model

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512
STEPS = 20
STOP = 10  # in the middle of the memory phase


def heed_interrupts() -> None:
    """As in a person's shell: where these tests run in the background, a script would inherit a deaf ear."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_tool(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ as a user does."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ))


def make_shards(raw: Path, out: Path, vocabulary: int = VOCABULARY, tokenizer: Path | None = None) -> Path:
    """Shards of `raw` in `out`, with enough held out for a validation."""
    words = ("--vocab-size", vocabulary) if tokenizer is None else ("--tokenizer", tokenizer)
    done = run_tool("make_shards.py", "--raw", raw, "--out", out, *words, "--validation-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    return out


def recipe(shards: Path, directory: Path, name: str, stage: int = 1) -> dict[str, Any]:
    """A recipe of 20 steps through three phases as a person would write it; two micro-batches on 2 ranks."""
    model = dataclasses.asdict(small_model(vocab_size=VOCABULARY, vision_encoder_dim=768, dropout=0.1))
    both = {"pairs": 0.8, "text": 0.2}
    return {
        "run": {"name": name, "directory": str(directory)},
        "data": {"shards": str(shards), "row_tokens": 32},
        "model": model,
        "training": {"global_batch": 16, "micro_batch": 4, "precision": "fp32"},
        "optimizer": {"peak_rate": 3e-3, "second_rate": 2e-3, "warmup_steps": 3},
        "engine": {"ds_config": str(ROOT / f"ds_configs/zero{stage}.json"), "threads_per_rank": 1},
        "checkpoint": {"every_steps": 5, "keep_last": 2},
        "validation": {"every_steps": 5, "max_samples": 24, "micro_batch": 8},
        "evaluation": {"every_steps": 10},
        "wandb": {
            "log_every_n_steps": 1,
            "attention_log_interval": 5,
            "pca_log_interval": 10,
            "enabled": False,
            "create_plots": False,
        },
        "attention_analysis": {"log_every_n_steps": 5, "viz_every_n_epochs": 1000},
        "phases": [
            {
                "name": "text",
                "steps": 4,
                "mix": {"text": 1.0},
                "losses": {"lm": 1.0},
                "train": ["embedding", "decoder"],
            },
            {"name": "pairs", "steps": 4, "mix": both, "losses": {"lm": 1.0, "contrastive": 0.3}},
            {
                "name": "memory",
                "steps": STEPS - 8,
                "mix": both,
                "losses": {"lm": 1.0, "contrastive": 0.3, "recall": 0.2},
                "write_memory": True,
            },
        ],
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def tiny_config(folder: Path, shards: Path, directory: Path, name: str, *overrides: str, stage: int = 1) -> Config:
    """The recipe above, read back from a file in `folder` with overrides, as the command line does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_recipe(folder / f"{name}.yaml", recipe(shards, directory, name, stage))
    return load_config(path, overrides)


def metrics(run_directory: Path, after: int = -1) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of steps after `after`, without what a clock, the process's memory or the log
    before tells, which a start does not remember."""
    timed = ("Throughput/", "System/", "Data/Wait_Seconds", "time", "Quantization/Flips")
    lines = (line for line in read_lines(run_directory / METRICS_FILE) if line["Training/Step"] > after)
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def checkpoint_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights and both moments put together, memory, generators."""
    state = read_state(directory)
    shapes = state_shapes(state)
    reader = FragmentReader(directory, state["files"], shapes)
    found = {
        f"{kind}.{name}": reader.read(kind, name, 0, math.prod(shape)).view(shape)
        for name, shape in shapes.items()
        for kind in KINDS
    }
    found |= {f"memory.{name}": tensor for name, tensor in load_file(directory / MEMORY_FILE).items()}
    for rank in range(state["world"]["ranks"]):
        generator = read_generator(directory, rank)
        assert generator is not None
        found[f"rng.{rank}"] = generator
    return found


def checkpoint_progress(directory: Path) -> dict[str, Any]:
    """Where the run stands, without its id and the time it took."""
    state = json.loads((directory / "state.json").read_text())
    left_out = ("run_id", "seconds")
    return {k: v for k, v in state["progress"].items() if k not in left_out} | {"adam_step": state["adam_step"]}


def newest(run_directory: Path) -> Path:
    return checkpoint_directories(run_directory)[0]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit, or that only one side has."""
    common = one.keys() & other.keys()
    bits = [n for n in common if one[n].shape != other[n].shape or not torch.equal(_bits(one[n]), _bits(other[n]))]
    return sorted(bits + list(one.keys() ^ other.keys()))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor


def cannot_run(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run; in CI, which has all that is needed, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)

"""Where a run stands, where its checkpoints lie, and what must be equal for one to go on. Needs no engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmar.config import Config, ModelConfig
from bitmar.engine.fragments import STATE_FILE

FOLDER = "checkpoints"  # in a run's
ORDER_KEYS = ("row_tokens", "window_shards", "partitions", "pack_captions")  # of data: what the order follows from


@dataclass(frozen=True)
class Progress:
    """Where a run stands, apart from tensors. `step` counts optimizer steps since the run began."""

    run_id: str
    step: int = 0
    phase: int = 0
    position: int = 0  # optimizer step inside the phase
    words: int = 0
    samples: int = 0
    initial_loss: float | None = None  # validation before the first step
    seconds: float = 0.0  # training time so far, over all starts
    skipped: int = 0  # updates left out because a loss or gradient was not finite
    skipped_in_a_row: int = 0
    recent_losses: Sequence[float] = ()  # of the phase's last steps, for the spike guard
    left_out: Sequence[int] = ()  # steps that are not trained, after a loss spike
    rewinds: int = 0
    validation_due: bool = False  # a stop cut the validation of this step short


def identity_of(config: Config, tokenizer_hash: str, data_hash: str) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on: the model, and all that the order of the data follows from."""
    return {
        "model": identity_of_model(config.model),
        "order": {
            "run.seed": config.run.seed,
            "training.global_batch": config.training.global_batch,
            **{f"data.{name}": getattr(config.data, name) for name in ORDER_KEYS},
            "phases": [[p.name, p.mix, p.epochs, p.words, p.steps] for p in config.phases],
            "tokenizer": tokenizer_hash,
            "shards": data_hash,
        },
    }


def identity_of_model(config: ModelConfig) -> dict[str, Any]:
    """A model as state.json holds it and gives it back; what no surgery has touched is left out."""
    model = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in model.items() if value or name not in ("masked_heads", "pruned_heads")}


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint, in FOLDER."""
    return f"step_{step:08d}"


def checkpoint_directories(run_directory: Path) -> list[Path]:
    """Whole checkpoints of a run, newest first."""
    found = (run_directory / FOLDER).glob("step_*")
    return sorted((p for p in found if (p / STATE_FILE).is_file()), reverse=True)

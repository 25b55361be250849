"""Reads a ds_config: the ZeRO stage, offload and communication of a run, which no recipe owns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bitmar.config import ConfigError
from bitmar.engine.world import World

RECIPE_OWNS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.gradient_clip",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.*",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "wandb": "wandb.*",
    "tensorboard": "wandb.*",
    "activation_checkpointing": "engine.activation_checkpointing",
}
NEED_GPUS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
OFFLOADS = ("offload_optimizer", "offload_param")
HIERARCHY = "zero_hpz_partition_size"  # ranks that hold a copy of the weights together; "auto": those of a node


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a ds_config and refuse what the recipe owns. Raises ConfigError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"engine.ds_config {path} does not exist; see ds_configs/") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"engine.ds_config {path} must hold an object, got {type(config).__name__}")
    for key, owner in RECIPE_OWNS.items():
        if key in config:
            raise ConfigError(f"{path}: {key} belongs to the recipe ({owner}); remove it from the ds_config")
    section = config.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    return config


def fit_ds_config(config: dict[str, Any], path: Path, world: World) -> dict[str, Any]:
    """The ds_config as this world can run it: "auto" filled in. Raises ConfigError where it cannot."""
    zero = dict(config["zero_optimization"])
    for key in NEED_GPUS:
        if zero.get(key) and world.device.type != "cuda":
            raise ConfigError(f"{path}: zero_optimization.{key} needs GPUs, and this run is on {world.device.type}; "
                              "take ds_configs/zero3.json")  # fmt: skip
    if HIERARCHY in zero:
        size = world.local_size if zero[HIERARCHY] == "auto" else zero[HIERARCHY]
        if type(size) is not int or size < 1 or world.size % size != 0:
            raise ConfigError(
                f"{path}: zero_optimization.{HIERARCHY} must divide the {world.size} ranks (the ranks of a node, or "
                f"auto), got {size!r}"
            )
        zero[HIERARCHY] = size
    for key in OFFLOADS:
        section = zero.get(key)
        if isinstance(section, dict) and section.get("device") == "nvme":
            _check_folder(section.get("nvme_path"), f"{path}: zero_optimization.{key}.nvme_path")
    return config | {"zero_optimization": zero}


def uses_nvme(config: dict[str, Any]) -> bool:
    """Whether something is offloaded to files."""
    sections = (config["zero_optimization"].get(key) for key in OFFLOADS)
    return any(isinstance(section, dict) and section.get("device") == "nvme" for section in sections)


def _check_folder(folder: Any, key: str) -> None:
    """Refuse a folder for swap files that cannot be written."""
    problem = None if isinstance(folder, str) and folder else f"got {folder!r}"
    if problem is None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
        else:
            problem = None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    if problem is not None:
        raise ConfigError(f"{key} must be a folder on a local disk of every node: {problem}")

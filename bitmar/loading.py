"""A trained model on its own: from a run's folder or a checkpoint of any ZeRO stage and world, without an engine, or
from a directory that tools/export.py hf has written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitmar.config import Config, ConfigError, DataConfig, ModelConfig, RunConfig, load_config, model_from
from bitmar.engine.fragments import MEMORY_FILE, CheckpointError, read_parameters, read_state
from bitmar.engine.progress import FOLDER, Progress, checkpoint_directories
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState

CONFIG_FILE, TOKENIZER_FILE = "config.yaml", "tokenizer.json"  # in a run's folder
EXPORTED_CONFIG, EXPORTED_WEIGHTS = "config.json", "model.safetensors"  # in an exported directory
MODEL_TYPE, SLOTS = "bitmar", "slots."  # of its config; before the names of the memory's tensors


@dataclass(frozen=True)
class Exported:
    """What an exported directory tells of its run's configuration; it names no shards."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, on the CPU in fp32, with the memory of its checkpoint."""

    model: BitMar
    memory: MemoryState
    config: Config | Exported
    progress: Progress
    run_directory: Path  # or the exported one
    checkpoint: Path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file, which every start of a run leaves in its folder."""
        return self.run_directory / TOKENIZER_FILE


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run's folder, checkpoint) of a run's folder, of which the newest whole checkpoint is taken, or of a checkpoint.

    Raises CheckpointError.
    """
    if (path / CONFIG_FILE).is_file():
        found = checkpoint_directories(path)
        if not found:
            raise CheckpointError(f"{path} has no checkpoint in {FOLDER}/; train until one is written")
        return path, found[0]
    run = path.absolute().parent.parent
    if path.absolute().parent.name == FOLDER and (run / CONFIG_FILE).is_file():
        return run, path
    raise CheckpointError(
        f"{path} is neither a run's folder (with {CONFIG_FILE} and {FOLDER}/) nor a checkpoint in one "
        f"(RUN/{FOLDER}/step_...)"
    )


def is_exported(path: Path) -> bool:
    """Whether a folder is an exported Hugging Face directory."""
    return (path / EXPORTED_CONFIG).is_file() and not (path / CONFIG_FILE).is_file()


def load_trained(path: Path) -> Loaded:
    """Raises CheckpointError where there is none or it is damaged, ConfigError where its recipe cannot be read."""
    if is_exported(path):
        return _load_exported(path)
    run, checkpoint = find_checkpoint(path)
    config = load_config(run / CONFIG_FILE)
    state = read_state(checkpoint)
    model = BitMar(config.model, config.run.seed)
    if not _take(model, dict(read_parameters(checkpoint))):
        raise CheckpointError(f"checkpoint {checkpoint} is of another model than {run / CONFIG_FILE} describes")
    try:
        memory = MemoryState(**load_file(checkpoint / MEMORY_FILE))
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {MEMORY_FILE} cannot be read: {error}") from None
    return Loaded(model.eval(), memory, config, Progress(**state["progress"]), run, checkpoint)


def _take(model: BitMar, found: dict[str, Tensor]) -> bool:
    """Copy parameters into a model; False where names or shapes are not the model's."""
    if {n: tuple(t.shape) for n, t in found.items()} != {n: tuple(p.shape) for n, p in model.named_parameters()}:
        return False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    return True


def _load_exported(path: Path) -> Loaded:
    """How often slots were read (`usage`) is not exported and starts at 0. With `use_memory: false` all are empty."""
    try:
        told: Any = json.loads((path / EXPORTED_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / EXPORTED_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no exported model that can be read: {error}") from None
    config, progress, reads_memory = _read_exported(path / EXPORTED_CONFIG, told)
    slots = {name.removeprefix(SLOTS): tensors.pop(name) for name in list(tensors) if name.startswith(SLOTS)}
    empty = MemoryState.empty(config.model.memory_size, config.model.episode_dim).tensors()
    shapes = {name: tensor.shape for name, tensor in empty.items() if name != "usage"}
    model = BitMar(config.model)
    if not _take(model, tensors) or {name: tensor.shape for name, tensor in slots.items()} != shapes:
        raise CheckpointError(f"{path / EXPORTED_WEIGHTS} is of another model than {EXPORTED_CONFIG} describes")
    held = slots if reads_memory else {}
    memory = MemoryState(**{name: held[name].to(t.dtype) if name in held else t for name, t in empty.items()})
    return Loaded(model.eval(), memory, config, progress, path, path)


def _read_exported(file: Path, told: Any) -> tuple[Exported, Progress, bool]:
    """(configuration, where the run stood, whether the memory is read) of a config.json. Raises CheckpointError."""
    if not isinstance(told, dict):
        raise CheckpointError(f"{file} holds no object of keys")
    if told.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{file} is of a model of type {told.get('model_type')}, not {MODEL_TYPE}")
    known = {"run_name": "", "step": 0, "words": 0, "use_memory": True} | told
    kinds = {"bitmar": dict, "max_position_embeddings": int, "run_name": str, "step": int, "words": int}
    for name, kind in (kinds | {"use_memory": bool}).items():
        if name not in known:
            raise CheckpointError(f"{file} lacks the key {name}")
        if type(known[name]) is not kind:
            raise CheckpointError(f"{file}: {name} is {known[name]!r}, where {kind.__name__} would do")
    try:
        data, model = DataConfig(shards="", row_tokens=known["max_position_embeddings"]), model_from(known["bitmar"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    exported = Exported(RunConfig(name=known["run_name"] or "exported"), data, model)
    return exported, Progress("", step=known["step"], words=known["words"]), known["use_memory"]

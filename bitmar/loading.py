"""A trained model on its own: from a run's folder or a checkpoint of any ZeRO stage and world, without an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitmar.config import Config, load_config
from bitmar.engine.fragments import MEMORY_FILE, CheckpointError, read_parameters, read_state
from bitmar.engine.progress import FOLDER, Progress, checkpoint_directories
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState

CONFIG_FILE, TOKENIZER_FILE = "config.yaml", "tokenizer.json"  # in a run's folder


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, on the CPU in fp32, with the memory of its checkpoint."""

    model: BitMar
    memory: MemoryState
    config: Config
    progress: Progress
    run_directory: Path
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


def load_trained(path: Path) -> Loaded:
    """Raises CheckpointError where there is none or it is damaged, ConfigError where its recipe cannot be read."""
    run, checkpoint = find_checkpoint(path)
    config = load_config(run / CONFIG_FILE)
    state = read_state(checkpoint)
    model = BitMar(config.model, config.run.seed)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = dict(read_parameters(checkpoint))
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        raise CheckpointError(f"checkpoint {checkpoint} is of another model than {run / CONFIG_FILE} describes")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    try:
        memory = MemoryState(**load_file(checkpoint / MEMORY_FILE))
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {MEMORY_FILE} cannot be read: {error}") from None
    return Loaded(model.eval(), memory, config, Progress(**state["progress"]), run, checkpoint)

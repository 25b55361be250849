"""Episodes of pairs that a trained model is shown once: no gradient, no optimizer step.

Shapes: N pairs, V width of the image vector, T longest caption, C episode width, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import ConfigError
from bitmar.config_checks import require
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState, grow_older, write
from shards.record import image_ids
from shards.tokenizer import PAD


def pair_batch(captions: Sequence[Sequence[int]], vectors: Float[Tensor, "N V"]) -> Batch:
    """A row for each pair, where the vectors are; captions begin with <bos>."""
    longest = max(map(len, captions))
    tokens = torch.tensor([[*caption, *[PAD] * (longest - len(caption))] for caption in captions])
    lengths = torch.tensor([len(caption) for caption in captions])
    batch = Batch.of_text(tokens, vectors.shape[1]).replace(
        segments=(torch.arange(longest) < lengths[:, None]).int(),
        vision=vectors.cpu().float(),
        has_vision=torch.ones(len(captions), dtype=torch.bool),
        image_ids=torch.from_numpy(image_ids(vectors.cpu().numpy())),
        words=lengths,
    )
    return batch.to(vectors.device)


@torch.no_grad()
def remember(
    model: BitMar, memory: MemoryState, captions: Sequence[Sequence[int]], vectors: Float[Tensor, "N V"]
) -> tuple[MemoryState, tuple[int, ...]]:
    """Show the pairs to the model one after the other: (the memory then, the slot that took each episode).

    As in training, reading a pair ages the slots and its episode takes the least recently used one, or blends into one
    of the same image.
    """
    config, slots, vectors = model.config, [], vectors.to(model.embedding.weight.device)
    for number, caption in enumerate(captions):
        outputs = model(pair_batch([caption], vectors[number : number + 1]), memory)
        ids = image_ids(vectors[number : number + 1].cpu().numpy()).tolist()
        older = grow_older(memory, outputs.read_mass)
        memory, report = write(older, outputs.keys, outputs.episodes, ids, config.memory_alpha, config.memory_match)
        slots.append(report.slots[0])
    return memory, tuple(slots)


def save_memory(memory: MemoryState, path: Path) -> None:
    """In one move. Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(memory.tensors(), temporary)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    temporary.replace(path)


def load_memory(path: Path, model: BitMar) -> MemoryState:
    """Raises ConfigError for a file that is missing, damaged, or of a memory of another size."""
    config = model.config
    try:
        memory = MemoryState(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ConfigError(f"{path} holds no memory that can be read: {error}") from None
    empty = MemoryState.empty(config.memory_size, config.episode_dim).tensors()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (memory.tensors(), empty)]
    require(shapes[0] == shapes[1], f"{path} holds a memory of another size than the model's")
    return memory

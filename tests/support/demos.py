"""What the demo page shows, of a model that was not trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bitmar.engine.progress import Progress
from bitmar.loading import Loaded
from bitmar.model.bitmar import BitMar
from shards.tokenizer import train_tokenizer
from tests.support.batches import filled_memory, small_model
from tests.support.runs import VOCABULARY, tiny_config
from tools.demo_page.session import Demo

WIDTH = 24  # of the vectors
CAPTIONS = ("a dog by the sea", "two cats on a red chair", "a man rides a horse")


def made(folder: Path, **changes: object) -> Demo:
    return Demo(untrained(folder, **changes))


def untrained(folder: Path, **changes: object) -> Loaded:
    """A model that was not trained, with gates open."""
    torch.manual_seed(3)
    config = tiny_config(folder, folder / "shards", folder, "run")
    model = BitMar(small_model(vocab_size=VOCABULARY, memory_size=7, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape)).add_(0.05 * torch.randn(parameter.shape))
        model.memory["reader"].gate.fill_(1.0)  # type: ignore[union-attr]
    config = dataclasses.replace(config, model=model.config)
    (folder / "tokenizer.json").write_text(train_tokenizer([*CAPTIONS] * 3, 300), encoding="utf-8")
    return Loaded(model.eval(), filled_memory(model.config), config, Progress("", step=8), folder, folder)


def image(number: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))

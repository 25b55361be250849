"""Which shards a trained model is scored on, and where it is told."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from bitmar.config_checks import ConfigError
from bitmar.loading import Loaded, is_exported
from shards.dataset import ShardSet
from shards.record import DataError
from shards.tokenizer import TextTokenizer


def check_exported(path: Path, **given: object) -> None:
    """Raises ConfigError where `path` is an exported directory and one of the options `given` is None: it names no
    shards, and nothing is to be written into it."""
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and is_exported(path):
        raise ConfigError(
            f"{path} is an exported directory, which names no shards and is to be uploaded as it is: "
            f"give {' and '.join(missing)}"
        )


def open_shards(loaded: Loaded, location: str | None) -> ShardSet:
    """Shards that a model can read; None: those of its run. Raises DataError where they have another tokenizer or other
    vectors, or cannot be opened."""
    shards = ShardSet.open(location or loaded.config.data.shards)
    mine, width = TextTokenizer(loaded.tokenizer), loaded.config.model.vision_encoder_dim
    if shards.tokenizer_hash != mine.sha256 and _plain(shards.tokenizer) != _plain(mine.inner.to_str()):
        raise DataError(
            f"the shards {shards.location} have another tokenizer than {loaded.tokenizer}, which the model knows"
        )
    if shards.vector_size != width:
        raise DataError(
            f"the shards {shards.location} hold vectors of {shards.vector_size} numbers; the model takes {width}"
        )
    return shards


def _plain(tokenizer: str) -> object:
    """A tokenizer without what it puts around a text, which an export adds."""
    told = json.loads(tokenizers.Tokenizer.from_str(tokenizer).to_str())
    return {name: value for name, value in told.items() if name not in ("post_processor", "truncation", "padding")}

"""What captions are asked of: held-out pairs of a set of shards, or a vector of one's own.

Shapes: V width of the image vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.config_checks import ConfigError
from shards.index import load_columns
from shards.loader import ShardSet
from shards.record import DataError
from tools.attention_patterns import read_vector


@dataclass(frozen=True)
class Pair:
    """An image's vector; of a held-out pair also its caption and its key in the shards."""

    vector: Float[Tensor, "V"]
    caption: str = ""
    key: str = ""


def held_out(shards: ShardSet, most: int) -> list[Pair]:
    """Up to `most` pairs of the validation split, each of another image, as they stand there.

    Raises DataError where the split holds none, or a shard cannot be read.
    """
    found: dict[int, Pair] = {}
    for number, entry in enumerate(shards.manifest["shards"]):
        if entry["split"] != "validation" or entry["modality"] != "pairs" or len(found) >= most:
            continue
        opened = shards.readers.get(number)
        keys = load_columns(opened.reader.index, ["keys"])["keys"]
        for sample, image in enumerate(opened.reader.columns["image_id"].tolist()):
            if image in found or sample in opened.damaged or len(found) >= most:
                continue
            vector = opened.reader.vector(sample)
            if vector is not None:
                key = keys[sample].decode("utf-8", "replace")
                found[image] = Pair(torch.from_numpy(vector), opened.reader.text(sample), key)
    shards.readers.check_damage()
    if not found:
        raise DataError(
            f"{shards.location}: the validation split holds no pairs: make the shards with a larger "
            "--validation-fraction"
        )
    return list(found.values())


def own_vector(path: Path, width: int) -> Pair:
    """The vector of a .npy file. Raises ConfigError unless it is one of `width` finite numbers, ValueError, OSError."""
    array = read_vector(path)
    assert array is not None
    if array.squeeze().shape != (width,) or not np.isfinite(array).all():
        raise ConfigError(
            f"{path.name} holds an array of shape {list(array.shape)}: one vector of {width} finite numbers would do"
        )
    return Pair(torch.from_numpy(array.reshape(width).astype(np.float32)))

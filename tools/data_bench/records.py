"""What every group of rows measures on: the same real captions and vectors, our shards of them, their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.convert import convert
from shards.raw import open_raw
from shards.record import VECTOR_SIZE
from shards.tokenizer import TextTokenizer
from shards.writer import Options
from tools.make_demo_data import make

Row = dict[str, Any]  # name, ours, theirs, ratio or value, unit, bar, ok
ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "../shared/data/raw"


class Records:
    """The same records for every side: captions, vectors, our shards of them, a tokenizer."""

    def __init__(self, folder: Path, repeats: int, validation_fraction: float = 0.0) -> None:
        raw = REAL
        if not raw.is_dir():
            raw = folder / "generated"
            make(raw, seed=0, images=1000, words=2000)
        pairs = open_raw(raw).pairs[0]
        self.kind = "real captions" if raw == REAL else "generated captions"
        self.captions = [str(caption) for caption in pairs.records()] * repeats
        vectors = pairs.vectors(np.arange(len(pairs)))
        shifts = np.random.default_rng(0).standard_normal((repeats, 1, VECTOR_SIZE)).astype("<f4") * 0.1
        self.vectors = np.concatenate([vectors + shift for shift in shifts]).astype("<f4")
        source = folder / "raw"
        source.mkdir()
        (source / "flickr_captions.json").write_text(json.dumps(self.captions))
        np.save(source / "flickr_dino_v2_states.npy", self.vectors)
        self.shards = folder / "shards"
        options = Options(vocab_size=4096, validation_fraction=validation_fraction)
        convert(source, self.shards, options, force=False, report=lambda *_: None)
        self.tars = sorted(str(tar) for tar in self.shards.glob("*.tar"))
        self.tokenizer = TextTokenizer(self.shards / "tokenizer.json")
        self.folder, self.repeats = folder, repeats

    def encoder(self) -> Callable[[list[str]], list[list[int]]]:
        """The library's own encode_batch."""
        inner = self.tokenizer.inner
        return lambda texts: [e.ids for e in inner.encode_batch(texts, add_special_tokens=False)]


@dataclass(frozen=True)
class Bench:
    """What a group of rows gets: an empty folder of the run, and whether it must be quick."""

    folder: Path
    quick: bool

    @cached_property
    def records(self) -> Records:
        """Made when the first group asks for them."""
        return Records(self.folder, repeats=2 if self.quick else 8)


def verdict(values: Sequence[float], least: float) -> bool | None:
    """Whether all values reach `least`; None where they straddle it."""
    reached = [value >= least for value in values]
    return None if any(reached) and not all(reached) else all(reached)

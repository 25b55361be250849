"""The fault table of stored shards: what training does with each, and what check_shards says of it.

Conversions, downloads, servers and ranks that fail have tests of their own in tests/integration.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shards.foreign import build_index
from shards.index import index_path, load_columns
from shards.loader import Loader, PhaseSpec, Shape, ShardSet
from shards.record import BLOCK_BYTES, DataError
from shards.tokenizer import TextTokenizer
from tests.unit.shards.making import make
from tools import check_shards

TAR = "pairs-train-00001.tar"
NO_FILE = "No such file"


@dataclass(frozen=True)
class Fault:
    """How a set is broken; what training refuses it with, or how many samples it masks; what check_shards names."""

    breaks: Callable[[Path], object]
    refused: str = ""
    masked: int = 0
    checked: str = TAR.removesuffix(".tar")


def flip(column: str, offset: int) -> Callable[[Path], object]:
    """One bit, at a place of the fifth sample."""

    def breaks(shards: Path) -> None:
        tar = shards / TAR
        data = bytearray(tar.read_bytes())
        data[int(load_columns(index_path(tar), [column])[column][5]) + offset] ^= 1
        tar.write_bytes(bytes(data))

    return breaks


def truncate(shards: Path) -> None:
    os.truncate(shards / TAR, (shards / TAR).stat().st_size // 2 // BLOCK_BYTES * BLOCK_BYTES)


def blank(shards: Path) -> None:
    """The end of a tar that a crash of the machine left as zeros, its size unchanged."""
    size = (shards / TAR).stat().st_size
    truncate(shards)
    os.truncate(shards / TAR, size)


def grow(shards: Path) -> None:
    """The tar was written anew, with one sample more than its index knows of."""
    tar = shards / TAR
    data, offset = tar.read_bytes(), load_columns(index_path(tar), ["text_offset"])["text_offset"]
    first = data[: int(offset[1]) - BLOCK_BYTES]
    tar.write_bytes(first.replace(b"flickr-", b"flickz-") + data)


def swap(shards: Path) -> None:
    """The tar was written anew, of the size it had: two samples changed places."""
    tar = shards / TAR
    data, offset = tar.read_bytes(), load_columns(index_path(tar), ["text_offset"])["text_offset"]
    at = [int(begin) - BLOCK_BYTES for begin in offset[:3]]
    tar.write_bytes(data[: at[0]] + data[at[1] : at[2]] + data[at[0] : at[1]] + data[at[2] :])


def other_index(shards: Path) -> None:
    index_path(shards / TAR).write_bytes(index_path(shards / "pairs-train-00000.tar").read_bytes())


def other_tokenizer(shards: Path) -> None:
    """A tokenizer that fits by itself, and is not the one that made the tokens."""
    described = json.loads((shards / "tokenizer.json").read_text())
    described["model"]["merges"].pop()
    (shards / "tokenizer.json").write_text(json.dumps(described))
    TextTokenizer(shards / "tokenizer.json")


def indexed_by_another_tokenizer(shards: Path) -> None:
    tokenizer = shards / "tokenizer.json"
    whole = tokenizer.read_bytes()
    other_tokenizer(shards)
    build_index(shards / TAR, TextTokenizer(tokenizer))
    tokenizer.write_bytes(whole)


def foreign_manifest(shards: Path) -> None:
    """The manifest of another set lies over this one's."""
    other = make(shards.parent / "raw", shards.parent / "other", samples_per_shard=40, vocab_size=300)
    assert other["shards"]
    shutil.copy(shards.parent / "other" / "manifest.json", shards)


FAULTS = {
    "truncated tar": Fault(truncate, "is truncated or changed"),
    "tar with a blank end": Fault(blank, "samples are damaged .* more than"),
    "flipped bit in a text": Fault(flip("text_offset", 2), masked=1),
    "flipped bit in a vector": Fault(flip("vector_offset", 700), masked=1),
    "flipped bit in a header, which training never reads": Fault(flip("text_offset", -BLOCK_BYTES + 2)),
    "missing index": Fault(lambda shards: index_path(shards / TAR).unlink(), NO_FILE),
    "index older than its tar, which grew": Fault(grow, "is truncated or changed"),
    "index older than its tar, of one size": Fault(swap, "samples are damaged .* more than"),
    "index of another tar": Fault(other_index, "of another size|is truncated or changed|does not hold"),
    "manifest of another set": Fault(foreign_manifest, "manifest", checked="manifest"),
    "no manifest of ours": Fault(
        lambda shards: (shards / "manifest.json").write_text('{"a": 1}'), "is not a manifest", checked="manifest"
    ),
    "other tokenizer": Fault(other_tokenizer, "tokenizer", checked="tokenizer"),
    "index by another tokenizer": Fault(indexed_by_another_tokenizer, "tokenizer"),
    "missing shard": Fault(lambda shards: (shards / TAR).unlink(), NO_FILE),
}


def targets(shards: Path, ceiling: float) -> tuple[np.ndarray, int]:
    """All targets of an epoch of the pairs, and how many samples were masked."""
    phases = [PhaseSpec("p", {"pairs": 1}, epochs=1)]
    opened = ShardSet.open(shards, damage_ceiling=ceiling)
    loader = Loader(opened, phases, seed=1, shape=Shape(8, 32), micro_batch=8, rank=0, world=1)
    rows = [rows for _, micro in loader for rows in micro]
    return np.concatenate([one.targets[one.targets >= 0] for one in rows]), len(loader.damaged)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FAULTS)
def test_a_set_that_is_broken(
    name: str, small_dir: Path, small_raw_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    shards = shutil.copytree(small_dir, tmp_path / "shards")
    shutil.copytree(small_raw_dir, tmp_path / "raw")
    fault.breaks(shards)
    if fault.refused:
        with pytest.raises(DataError, match=fault.refused) as caught:
            targets(shards, 1e-4)
        assert "\n" not in str(caught.value)
    else:
        whole, _ = targets(small_dir, 1e-4)
        left, masked = targets(shards, 0.01)
        assert masked == fault.masked
        assert (len(left) < len(whole)) == (masked > 0)
    assert check_shards.main([str(shards)]) in (1, 2)
    said = capsys.readouterr()
    assert fault.checked in said.out + said.err

"""Raw data for tests: the real pairs beside the repository where they are, else the generated set."""

from __future__ import annotations

from pathlib import Path

from shards.convert import convert
from shards.writer import Options
from tools.make_demo_data import make

REAL = Path("../shared/data/raw")


def pairs_raw(folder: Path) -> tuple[Path, str]:
    """(directory that holds pairs only, what they are)."""
    raw = folder / "raw"
    if not REAL.is_dir():
        make(raw, seed=0, images=1000, words=2000)
        return raw, "generated pairs (../shared/data is absent)"
    raw.mkdir(parents=True)
    for path in REAL.glob("flickr_*"):
        (raw / path.name).symlink_to(path.resolve())
    return raw, "real pairs of ../shared/data"


def pairs_shards(folder: Path, vocabulary: int, held_out: float) -> tuple[Path, str]:
    """(directory of shards of those pairs, what they are)."""
    raw, kind = pairs_raw(folder)
    options = Options(vocab_size=vocabulary, validation_fraction=held_out)
    convert(raw, folder / "shards", options, force=False, report=lambda *_: None)
    return folder / "shards", kind

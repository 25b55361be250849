"""Small raw sets and conversions for the tests of the data plane."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.convert import convert
from shards.raw import TEXT_MEMBERS
from shards.record import VECTOR_SIZE
from shards.writer import Options

REAL_RAW = Path(__file__).resolve().parents[4] / "shared" / "data" / "raw"
WORDS = tuple("the cat sat on a mat near héllo wörld 日本 and then some 7 more words , .".split())  # noqa: SIM905


def captions_of(count: int, seed: int = 0) -> list[str]:
    """Captions of 1 to 30 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(1, 31)))) for _ in range(count)]


def vectors_of(images: int, count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, V] of `images` different images, each used in turn."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((images, VECTOR_SIZE)) * 1.7).astype("<f4")[np.arange(count) % images]


def text_of(words: int, seed: int = 0) -> str:
    """Lines, headings and blank lines of about `words` words."""
    rng = np.random.default_rng(seed)
    lines, count = [], 0
    while count < words:
        line = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 40))))
        count += len(line.split())
        lines.append(line)
        if rng.random() < 0.1:
            lines.append("")
        if rng.random() < 0.05:
            lines += [f"= = = {rng.choice(WORDS)} = = =", ""]
    return "\n".join(lines) + "\n"


def write_pairs(directory: Path, name: str, captions: Sequence[object], vectors: np.ndarray, cut: int = 0) -> None:
    """One NAME; in two halves when `cut` > 0."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}_captions.json").write_text(json.dumps(list(captions)))
    parts = {"_1of2": vectors[:cut], "_2of2": vectors[cut:]} if cut else {"": vectors}
    for suffix, part in parts.items():
        np.save(directory / f"{name}_dino_v2_states{suffix}.npy", part)


def write_zip(directory: Path, texts: dict[str, bytes], folder: str = "") -> None:
    """train_50M.zip; files not in `texts` get one line."""
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / "train_50M.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for stem in TEXT_MEMBERS:
            archive.writestr(f"{folder}{stem}.train", texts.get(stem, f"{stem} has one line .\n".encode()))


def small_raw(directory: Path) -> Path:
    """60 images x 3 captions in halves, 12 of another NAME, and text."""
    write_pairs(directory, "flickr", captions_of(180), vectors_of(60, 180), cut=100)
    write_pairs(directory, "local_narr", captions_of(12, 5), vectors_of(6, 12, 5))
    write_zip(directory, {stem: text_of(4000, n).encode() for n, stem in enumerate(TEXT_MEMBERS[:3])}, "train_50M/")
    return directory


def silent(stage: str, done: int, total: int | None, unit: str) -> None:
    """A report that says nothing."""


def make(raw: Path, out: Path, force: bool = False, resume: bool = False, jobs: int = 1, **options: object) -> dict:
    """Convert without a word; returns the manifest."""
    settings = {"validation_fraction": 0.2, **options}
    chosen = Options(**settings)  # type: ignore[arg-type]
    manifest = convert(raw, out, chosen, force=force, resume=resume, jobs=jobs, report=silent).manifest
    assert manifest is not None
    return manifest


def tree(directory: Path) -> dict[str, bytes]:
    """All files of a directory by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }

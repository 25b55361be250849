"""Check a folder of shards: every checksum, sample, index and token. --rebuild-index indexes tars that others wrote.

Exit code 0: all is well. 1: something is damaged, each sample or file named. 2: it cannot be checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.progress import Progress

from shards.foreign import build_index
from shards.index import ShardReader
from shards.record import DataError
from shards.tokenizer import TextTokenizer
from shards.writer import (
    LENGTHS,
    MANIFEST,
    TOKENIZER,
    Labels,
    describe,
    file_checksum,
    file_sha256,
    read_manifest,
    write_manifest,
)


def check_set(directory: Path, console: Console) -> int:
    """Print each fault of a set; returns how many there are. Raises DataError when there is no manifest."""
    manifest = read_manifest(directory)
    faults = [*check_files(directory, manifest)]
    tokenizer = TextTokenizer(directory / manifest["tokenizer"]["file"])
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=len(manifest["shards"]))
        for entry in manifest["shards"]:
            faults += check_shard(directory, entry, manifest["tokenizer"]["sha256"], tokenizer)
            progress.advance(task)
    for fault in faults:
        console.print(fault, highlight=False, markup=False, soft_wrap=True)
    return len(faults)


def check_files(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Faults of the files that belong to the whole set."""
    for entry in (manifest["tokenizer"], manifest["lengths"]):
        path = directory / entry["file"]
        if not path.is_file():
            yield f"{path}: missing"
        elif file_sha256(path) != entry["sha256"]:
            yield f"{path}: its checksum is not the manifest's"


def check_shard(directory: Path, entry: dict[str, Any], sha256: str, tokenizer: TextTokenizer) -> Iterator[str]:
    """Faults of one shard: its file, its index, and then every sample."""
    tar, index = directory / entry["file"], directory / entry["index"]["file"]
    for path, told in ((tar, entry), (index, entry["index"])):
        if not path.is_file():
            yield f"{path}: missing"
            return
        if path.stat().st_size != told["bytes"]:
            yield f"{path}: {path.stat().st_size} bytes, the manifest says {told['bytes']}"
            return
    whole = file_checksum(tar) == entry["xxh3_128"]
    if file_checksum(index) != entry["index"]["xxh3_128"]:
        yield f"{index}: its checksum is not the manifest's"
    try:
        reader = ShardReader(tar, sha256, index)
    except DataError as error:
        yield str(error)
        return
    damaged = reader.damaged().tolist()
    yield from (f"{tar}: sample {reader.key(sample)} is damaged" for sample in damaged)
    if not whole and not damaged:
        yield f"{tar}: its checksum is not the manifest's, though every sample is whole"
    if len(reader) != entry["samples"]:
        yield f"{index}: {len(reader)} samples, the manifest says {entry['samples']}"
    yield from _check_samples(reader, tar, set(damaged), tokenizer)


def _check_samples(reader: ShardReader, tar: Path, damaged: set[int], tokenizer: TextTokenizer) -> Iterator[str]:
    """Faults of whole samples: tokens that the text does not give, vectors that are not finite."""
    samples = [sample for sample in range(len(reader)) if sample not in damaged]
    try:
        encoded = tokenizer.encode_batch([reader.text(sample) for sample in samples])
        vectors = {sample: reader.vector(sample) for sample in samples}
    except DataError as error:
        yield str(error)
        return
    for at, sample in enumerate(samples):
        tokens = encoded.tokens[encoded.offsets[at] : encoded.offsets[at + 1]]
        vector = vectors[sample]
        if not np.array_equal(tokens, reader.sample_tokens(sample)):
            yield f"{tar}: sample {reader.key(sample)} has other tokens in its index than its text gives"
        if vector is not None and not np.isfinite(vector).all():
            yield f"{tar}: sample {reader.key(sample)} has a vector with NaN or infinity"


def rebuild(directory: Path, tokenizer_file: Path | None, validation: Sequence[str], console: Console) -> None:
    """Index every tar of a folder and write its manifest. Raises DataError when a tar cannot be used."""
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise DataError(f"{directory} holds no .tar file")
    unknown = sorted(set(validation) - {tar.name for tar in tars})
    if unknown:
        raise DataError(f"--validation names {unknown[0]!r}, which is no tar of {directory}")
    own = directory / TOKENIZER
    if tokenizer_file is not None:
        TextTokenizer(tokenizer_file)
        own.write_bytes(tokenizer_file.read_bytes())
    if not own.is_file():
        raise DataError(f"{directory} has no {TOKENIZER}: name one with --tokenizer")
    tokenizer = TextTokenizer(own)
    written = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for tar in progress.track(tars, description="index"):
            counted = build_index(tar, tokenizer)
            kinds = set((ShardReader(tar).columns["vector_kind"] > 0).tolist())
            if len(kinds) > 1:
                raise DataError(
                    f"{tar}: some samples have a vector and others have none: put them into tars of their own"
                )
            split = "validation" if tar.name in validation else "train"
            labels = Labels("pairs" if kinds == {True} else "text", split, 0)
            written.append(describe(tar, labels, counted, file_checksum(tar)))
    about = {
        "generated": False,
        "fingerprint": "",
        "tokenizer": {"file": TOKENIZER, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "rejected": {"total": 0, "by_source": {}},
    }
    write_manifest(directory, written, about)
    console.print(f"{directory / MANIFEST} and {LENGTHS} written: {len(tars)} shards", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, or index; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", type=Path, help="folder of the shards")
    parser.add_argument("--rebuild-index", action="store_true", help="index the tars there and write a manifest")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for --rebuild-index where the folder has none")
    parser.add_argument("--validation", nargs="*", default=[], metavar="TAR", help="tars held out, for --rebuild-index")
    known = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        if known.rebuild_index:
            rebuild(known.shards, known.tokenizer, known.validation, console)
        faults = check_set(known.shards, console)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"{faults} fault(s)" if faults else "every shard is whole")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Raw files -> a directory of shards with `manifest.json`: scan, split, tokenizer, shards.

Three passes over the raw files, none of which holds all vectors or texts. Symbols: N samples of a source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.raw import RawPairs, RawSet, RawText, Rejected, open_raw, scan_pairs
from shards.record import VECTOR_DTYPES, DataError, Sample, sample_key, text_id
from shards.tokenizer import TextTokenizer, default_vocab_size, train_tokenizer
from shards.writer import (
    FORMAT,
    MANIFEST,
    REJECTED,
    SPLITS,
    TOKENIZER,
    Labels,
    Options,
    ShardWriter,
    WrittenShard,
    building,
    read_manifest,
    write_manifest,
)

BATCH = 1024
HASH_BYTES = 1 << 22
ID_RANGE = 2.0**64

Report = Callable[[str, int, int | None], None]  # stage, done, total (None: not known)


@dataclass
class Scan:
    """The first pass over the raw files: ids of all records, which are usable, words of the train split."""

    ids: dict[str, np.ndarray] = field(default_factory=dict)  # source -> int64 [N]
    usable: dict[str, np.ndarray] = field(default_factory=dict)  # source -> bool [N]
    rejected: list[Rejected] = field(default_factory=list)
    train_words: int = 0


def in_validation(ids: np.ndarray, fraction: float) -> np.ndarray:
    """bool [N]: which ids (int64 hashes) belong to the validation split; equal ids never part."""
    return ids.view(np.uint64) < np.uint64(min(fraction * ID_RANGE, ID_RANGE - 2048))


def convert(raw: Path, out: Path, options: Options, *, force: bool, report: Report) -> tuple[dict, bool]:
    """Convert the raw files in `raw` to shards in `out`.

    Returns (manifest, made): made is False when `out` already held exactly this. Raises DataError on bad
    input, on too many rejected samples, and on an `out` that holds something else; nothing is half-written.
    """
    raw_set = open_raw(raw)
    inputs = [_fingerprint_file(path, report) for path in raw_set.files]
    fingerprint = _fingerprint(inputs, options, raw_set.generated)
    existing = _existing(out, fingerprint, force)
    if existing is not None:
        return existing, False
    with building(out) as part:
        scan = _scan(raw_set, options, report)
        _check_rejected(scan, options)
        tokenizer = _tokenizer(raw_set, scan, options, part, report)
        written: list[WrittenShard] = []
        for pairs in raw_set.pairs:
            written += _write_pairs(pairs, scan, options, tokenizer, part, report)
        for text in raw_set.texts:
            written += _write_texts(text, scan, options, tokenizer, part, report)
        lines = [json.dumps(asdict(r), ensure_ascii=True) + "\n" for r in scan.rejected]
        (part / REJECTED).write_text("".join(lines))
        about = _about(raw_set, inputs, fingerprint, options, scan, tokenizer)
        manifest = write_manifest(part, written, about)
    return manifest, True


def _fingerprint_file(path: Path, report: Report) -> dict[str, Any]:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
            done += len(block)
            report(f"checksum {path.name}", done, size)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _fingerprint(inputs: list[dict[str, Any]], options: Options, generated: bool) -> str:
    settings: dict[str, Any] = {**asdict(options), "tokenizer": None}
    if options.tokenizer is not None:
        settings["tokenizer"] = TextTokenizer(options.tokenizer).sha256
    whole = json.dumps([FORMAT, inputs, settings, generated], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _existing(out: Path, fingerprint: str, force: bool) -> dict | None:
    """The manifest in `out` when it is complete and the same; None when `out` is free to be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else None
    if manifest is None:
        raise DataError(f"{out} exists and holds no shards of ours: choose another --out or empty it")
    if force:
        return None
    if manifest["fingerprint"] != fingerprint:
        raise DataError(
            f"{out} holds shards of other raw files or options: choose another --out, or pass --force to replace them"
        )
    for entry in manifest["shards"]:
        for part in (entry, entry["index"]):
            path = out / part["file"]
            if not path.is_file() or path.stat().st_size != part["bytes"]:
                raise DataError(f"{path} is missing or changed: pass --force to make the shards again")
    return manifest


def _scan(raw_set: RawSet, options: Options, report: Report) -> Scan:
    """Check every sample, take ids and count the words of the train split."""
    scan = Scan()
    for pairs in raw_set.pairs:
        blocks, bad = [], []
        done = 0
        for ids, rejected in scan_pairs(pairs, VECTOR_DTYPES[options.vector_dtype]):
            blocks.append(ids)
            bad += rejected
            done += len(ids)
            report(f"check {pairs.source}", done, len(pairs))
        _note(scan, pairs.source, np.concatenate(blocks), bad)
        train = scan.usable[pairs.source] & ~in_validation(scan.ids[pairs.source], options.validation_fraction)
        scan.train_words += sum(len((pairs.caption(row) or "").split()) for row in np.flatnonzero(train).tolist())
    for text in raw_set.texts:
        ids, words, bad = [], [], []
        for record in text.records():
            if isinstance(record, Rejected):
                bad.append(record)
            ids.append(1 if isinstance(record, Rejected) else text_id(record))
            words.append(0 if isinstance(record, Rejected) else len(record.split()))
            report(f"check {text.source}", len(ids), None)
        _note(scan, text.source, np.array(ids, np.int64), bad)
        train = ~in_validation(scan.ids[text.source], options.validation_fraction)
        scan.train_words += int(np.array(words, np.int64)[train].sum())
    return scan


def _note(scan: Scan, source: str, ids: np.ndarray, rejected: list[Rejected]) -> None:
    scan.ids[source] = ids
    usable = np.ones(len(ids), bool)
    usable[[r.row for r in rejected]] = False
    scan.usable[source] = usable
    scan.rejected += rejected


def _check_rejected(scan: Scan, options: Options) -> None:
    total, bad = sum(len(ids) for ids in scan.ids.values()), len(scan.rejected)
    empty = [source for source, usable in scan.usable.items() if not usable.any()]
    if bad <= options.max_reject_fraction * total and not empty:
        return
    reasons = Counter((r.source, "not UTF-8" if r.reason.startswith("line ") else r.reason) for r in scan.rejected)
    listed = "; ".join(f"{source}: {n} x {reason}" for (source, reason), n in reasons.most_common(4))
    first = f" (first: {scan.rejected[0].source} row {scan.rejected[0].row})" if scan.rejected else ""
    if empty:
        raise DataError(f"source {empty[0]} has no usable sample ({listed or 'it is empty'}){first}: mend it")
    raise DataError(
        f"{bad} of {total} samples rejected, more than --max-reject-fraction {options.max_reject_fraction}: "
        f"{listed}{first}; mend the raw files or raise --max-reject-fraction"
    )


def _tokenizer(raw_set: RawSet, scan: Scan, options: Options, part: Path, report: Report) -> TextTokenizer:
    """Train the tokenizer on the train split, or take the given one; it lies in `part` afterwards."""
    target = part / TOKENIZER
    if options.tokenizer is not None:
        target.write_bytes(options.tokenizer.read_bytes())
        return TextTokenizer(target)
    size = options.vocab_size or default_vocab_size(scan.train_words)
    report("train tokenizer", 0, None)
    target.write_text(train_tokenizer(_train_texts(raw_set, scan, options), size), encoding="utf-8")
    return TextTokenizer(target)


def _train_texts(raw_set: RawSet, scan: Scan, options: Options) -> Iterator[str]:
    for pairs in raw_set.pairs:
        for row in np.flatnonzero(_chosen(scan, pairs.source, "train", options)):
            yield pairs.caption(int(row)) or ""
    for text in raw_set.texts:
        chosen = _chosen(scan, text.source, "train", options)
        for row, record in enumerate(text.records()):
            if chosen[row] and isinstance(record, str):
                yield record


def _chosen(scan: Scan, source: str, split: str, options: Options) -> np.ndarray:
    """bool [N]: the usable rows of a source that belong to a split."""
    validation = in_validation(scan.ids[source], options.validation_fraction)
    return scan.usable[source] & (validation if split == "validation" else ~validation)


class _Shards:
    """The shards of one source and split, each of at most `samples_per_shard`."""

    def __init__(self, part: Path, labels: Labels, tokenizer: TextTokenizer, options: Options) -> None:
        self._part, self._labels, self._tokenizer, self._options = part, labels, tokenizer, options
        self._writer: ShardWriter | None = None
        self.written: list[WrittenShard] = []

    def add(self, samples: Sequence[Sample], ids: Sequence[int]) -> None:
        """Append samples (`ids`: their image ids, 0 for text)."""
        done, limit = 0, self._options.samples_per_shard
        while done < len(samples):
            if self._writer is None:
                labels = dataclasses.replace(self._labels, number=len(self.written))
                self._writer = ShardWriter(self._part, labels, self._tokenizer, self._options.vector_dtype)
            take = min(len(samples) - done, limit - len(self._writer))
            self._writer.add(samples[done : done + take], ids[done : done + take])
            done += take
            if len(self._writer) == limit:
                self.close()

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        finished = self._writer.close() if self._writer is not None else None
        if finished is not None:
            self.written.append(finished)
        self._writer = None


def _write_pairs(
    pairs: RawPairs, scan: Scan, options: Options, tokenizer: TextTokenizer, part: Path, report: Report
) -> list[WrittenShard]:
    """Shards of one NAME, shuffled within each split."""
    written = []
    ids = scan.ids[pairs.source]
    for number, split in enumerate(SPLITS):
        shards = _Shards(part, Labels(pairs.source, "pairs", split, 0), tokenizer, options)
        rows = np.flatnonzero(_chosen(scan, pairs.source, split, options))
        seed = [options.shuffle_seed, zlib.crc32(pairs.source.encode()), number]
        rows = np.random.default_rng(seed).permutation(rows)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            vectors = pairs.vectors(batch)
            samples = [
                Sample(sample_key(pairs.source, row), pairs.caption(row) or "", vector)
                for row, vector in zip(batch.tolist(), vectors, strict=True)
            ]
            shards.add(samples, ids[batch].tolist())
            report(f"write {pairs.source} {split}", start + len(batch), len(rows))
        shards.close()
        written += shards.written
    return written


def _write_texts(
    text: RawText, scan: Scan, options: Options, tokenizer: TextTokenizer, part: Path, report: Report
) -> list[WrittenShard]:
    """Shards of one text file, in file order within each split."""
    shards: dict[str, _Shards] = {}
    pending: dict[str, list[Sample]] = {}
    chosen = {split: _chosen(scan, text.source, split, options) for split in SPLITS}
    for split in SPLITS:
        shards[split], pending[split] = _Shards(part, Labels(text.source, "text", split, 0), tokenizer, options), []
    total = len(scan.ids[text.source])
    for row, record in enumerate(text.records()):
        for split in SPLITS:
            if chosen[split][row] and isinstance(record, str):
                pending[split].append(Sample(sample_key(text.source, row), record, None))
            if len(pending[split]) == BATCH:
                shards[split].add(pending[split], [0] * BATCH)
                pending[split].clear()
                report(f"write {text.source}", row + 1, total)
    written = []
    for split in SPLITS:
        shards[split].add(pending[split], [0] * len(pending[split]))
        shards[split].close()
        written += shards[split].written
    report(f"write {text.source}", total, total)
    return written


def _about(
    raw_set: RawSet,
    inputs: list[dict[str, Any]],
    fingerprint: str,
    options: Options,
    scan: Scan,
    tokenizer: TextTokenizer,
) -> dict[str, Any]:
    """What the manifest tells beside its shards."""
    by_source: dict[str, Counter[str]] = {}
    for item in scan.rejected:
        reason = "not UTF-8" if item.reason.startswith("line ") else item.reason
        by_source.setdefault(item.source, Counter())[reason] += 1
    return {
        "generated": raw_set.generated,
        "fingerprint": fingerprint,
        "inputs": inputs,
        "options": {**asdict(options), "tokenizer": None if options.tokenizer is None else tokenizer.sha256},
        "tokenizer": {"file": TOKENIZER, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "vector_dtype": options.vector_dtype,
        "rejected": {"total": len(scan.rejected), "by_source": by_source},
    }

"""Raw files -> a directory of shards with `manifest.json`: fingerprint, spool, tokenizer, blocks, manifest.

A conversion is cut into blocks of records (shards.division) that do not know of each other, so they may be made by
several processes, by several machines, and at different times. Memory: one byte a record here, while a tokenizer is
trained, and 8 in each process, which are mapped. Symbols: N records of a modality.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.blocks import TRAIN, UNUSABLE, Block, Sources, Work, build_block, kind_of, scan
from shards.crew import Crew
from shards.division import Division
from shards.raw import RawPairs, RawSet, RawText, open_raw
from shards.record import DataError
from shards.spool import Spools, write_spool
from shards.tokenizer import TextTokenizer, default_vocab_size, train_tokenizer
from shards.workplace import WHOLE, Part, Workplace, sync, working
from shards.writer import (
    FORMAT,
    MANIFEST,
    MODALITIES,
    REJECTED,
    SPLITS,
    TOKENIZER,
    Options,
    WrittenShard,
    file_checksum,
    read_manifest,
    write_manifest,
)

SCAN_ROWS = 1 << 16
FLUSHES_AHEAD = 4  # blocks that may wait for the disk

Report = Callable[[str, int, int | None, str], None]  # stage, done, total (None: not known), unit


@dataclass(frozen=True)
class Conversion:
    """What came of it. manifest: None while blocks of other parts are missing. made: False where it was all there."""

    manifest: dict[str, Any] | None
    made: bool
    missing: int = 0


@dataclass(frozen=True)
class _Rejects:
    """What was left out: how many of how many records, by source and reason, and the first of them."""

    records: int
    counts: Counter[tuple[str, str]]
    first: str
    empty: list[str]  # sources without a usable record

    def check(self, allowed: float) -> None:
        """Raises DataError when there are more than allowed, or a source has nothing else."""
        bad = self.counts.total()
        listed = "; ".join(f"{source}: {count} x {reason}" for (source, reason), count in self.counts.most_common(4))
        first = f" (first: {self.first})" if self.first else ""
        if self.empty:
            raise DataError(f"source {self.empty[0]} has no usable sample ({listed or 'it is empty'}){first}: mend it")
        if bad > allowed * self.records:
            raise DataError(
                f"{bad} of {self.records} samples rejected, more than --max-reject-fraction {allowed}: "
                f"{listed}{first}; mend the raw files or raise --max-reject-fraction"
            )


def convert(
    raw: Path,
    out: Path,
    options: Options,
    *,
    report: Report,
    force: bool = False,
    jobs: int = 1,
    part: Part = WHOLE,
    resume: bool = False,
) -> Conversion:
    """Convert the raw files in `raw` to shards in `out`, or this part's share of them.

    The result does not depend on jobs, parts or interruptions. Raises DataError on bad input, on too many rejected
    samples, and on an `out` that holds something else; OSError where the disk fails. `out` appears whole or not at
    all; what an interruption leaves beside it is what `resume` goes on from.
    """
    raw_set = open_raw(raw)
    with Crew(jobs) as crew:
        inputs = _hash_inputs(raw_set.files, crew, report)
        fingerprint = _fingerprint(inputs, options, raw_set.generated)
        existing = _existing(out, fingerprint, force)
        if existing is not None:
            return Conversion(existing, False)
        out.parent.mkdir(parents=True, exist_ok=True)
        with working(out, fingerprint, part, resume) as place:
            try:
                sources = _lay_out(raw_set, place, crew, report)
                work = Work(options, place.own / TOKENIZER, place.own / "build", place.set)
                _make_tokenizer(work, sources, crew, report)
                _build(work, sources, place, part, resume, crew, report)
                with place.alone():
                    if not place.set.is_dir():  # another part was the last
                        return Conversion(read_manifest(out), False)
                    return _finish(work, sources, place, _about(raw_set, inputs, fingerprint, work))
            except DataError:
                if part.count == 1:
                    place.remove()
                raise


def _hash_inputs(files: Sequence[Path], crew: Crew, report: Report) -> list[dict[str, Any]]:
    """Name, bytes and 128-bit XXH3 of each raw file, which tells whether it is the same in a tenth of the time."""
    found: dict[int, dict[str, Any]] = {}
    total, done = sum(path.stat().st_size for path in files), 0
    for number, told in crew.run(_hash_file, [(path,) for path in files]):
        found[number] = told
        done += told["bytes"]
        report("checksums", done, total, "bytes")
    return [found[number] for number in range(len(files))]


def _hash_file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": file_checksum(path)}


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


def _lay_out(raw_set: RawSet, place: Workplace, crew: Crew, report: Report) -> list[Sources]:
    """Texts where any of them is found at once: a spool a source."""
    items = (*raw_set.pairs, *raw_set.texts)
    total, done = sum(len(pairs) for pairs in raw_set.pairs) or None, 0
    paths = [place.own / item.source for item in items]
    for _, records in crew.run(_spool, list(zip(items, paths, strict=True))):
        done += records
        report("read texts", done, None if raw_set.texts else total, "records")
    cut = len(raw_set.pairs)
    parts = tuple(vectors for pairs in raw_set.pairs for vectors in pairs.parts)
    names = [item.source for item in items]
    return [
        Sources(modality, tuple(names[here]), tuple(paths[here]), vectors)
        for modality, here, vectors in zip(MODALITIES, (slice(cut), slice(cut, None)), (parts, ()), strict=True)
        if names[here]
    ]


def _spool(item: RawPairs | RawText, path: Path) -> int:
    write_spool(path, item.batches())
    return len(Spools([path]))


def _make_tokenizer(work: Work, sources: list[Sources], crew: Crew, report: Report) -> None:
    """Take the given tokenizer, or train one on the train split, unless an interrupted try left it."""
    if work.tokenizer.exists():
        return
    if work.options.tokenizer is not None:
        data = work.options.tokenizer.read_bytes()
    else:
        fates, words = _scan(sources, work.options, crew, report)
        size = work.options.vocab_size or default_vocab_size(words)
        report("train tokenizer", 0, None, "")
        data = train_tokenizer(_train_texts(sources, fates), size).encode("utf-8")
    unnamed = work.tokenizer.with_suffix(".part")
    unnamed.write_bytes(data)
    os.replace(unnamed, work.tokenizer)


def _scan(sources: list[Sources], options: Options, crew: Crew, report: Report) -> tuple[list[np.ndarray], int]:
    """(the fate of every record, uint8 [N] for each modality; words of the train split). Raises DataError."""
    tasks, places = [], []
    fates = [np.zeros(len(Spools(each.spools)), np.uint8) for each in sources]
    for at, each in enumerate(sources):
        for low in range(0, len(fates[at]), SCAN_ROWS):
            rows = range(low, min(low + SCAN_ROWS, len(fates[at])))
            tasks.append((each, rows, options))
            places.append((at, rows))
    words, total, done = 0, sum(map(len, fates)), 0
    counts, first = Counter[tuple[str, str]](), ""
    for number, (found, trained, faults) in crew.run(scan, tasks):
        at, rows = places[number]
        fates[at][rows.start : rows.stop] = found
        words += trained
        counts += faults
        done += len(rows)
        report("check", done, total, "samples")
    empty = []
    for each, fate in zip(sources, fates, strict=True):
        begins = Spools(each.spools).begins
        bad = np.flatnonzero(fate == UNUSABLE)
        if len(bad) and not first:
            at = int(np.searchsorted(begins, bad[0], side="right")) - 1
            first = f"{each.names[at]} row {bad[0] - begins[at]}"
        spans = zip(each.names, itertools.pairwise(begins.tolist()), strict=True)
        empty += [name for name, (low, high) in spans if not (fate[low:high] != UNUSABLE).any()]
    _Rejects(total, counts, first, empty).check(options.max_reject_fraction)
    return fates, words


def _train_texts(sources: list[Sources], fates: list[np.ndarray]) -> Iterator[str]:
    for each, fate in zip(sources, fates, strict=True):
        spools = Spools(each.spools)
        for low in range(0, len(fate), SCAN_ROWS):
            rows = low + np.flatnonzero(fate[low : low + SCAN_ROWS] == TRAIN)
            yield from (text.decode("utf-8") for text in spools.texts(rows))


def _divisions(sources: Iterable[Sources], options: Options) -> list[tuple[Sources, Division]]:
    size, seed = options.samples_per_shard, options.shuffle_seed
    return [(each, Division(len(Spools(each.spools)), size, seed, each.modality)) for each in sources]


def _build(
    work: Work, sources: list[Sources], place: Workplace, part: Part, resume: bool, crew: Crew, report: Report
) -> None:
    """Make this part's blocks, and note each as finished once the disk holds it."""
    every = [(each, division, n) for each, division in _divisions(sources, work.options) for n in range(len(division))]
    mine = every[part.number - 1 :: part.count]
    files = [place.block(each.modality, number) for each, _, number in mine]
    if not resume:
        for file in files:
            file.unlink(missing_ok=True)
    left = [at for at, file in enumerate(files) if not file.exists()]
    total = _records(mine)
    done = total - _records([mine[at] for at in left])
    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(1, "flush") as flusher:
        try:
            for number, block in crew.run(build_block, [(work, *mine[at]) for at in left]):
                at = left[number]
                waiting.append(flusher.submit(_flush, block, work.target, files[at]))
                while len(waiting) > FLUSHES_AHEAD:
                    waiting.pop(0).result()
                done += _records([mine[at]])
                report("write shards", done, total, "samples")
            for flushed in waiting:
                flushed.result()
        finally:
            flusher.shutdown(wait=True, cancel_futures=True)


def _records(blocks: Iterable[tuple[Sources, Division, int]]) -> int:
    return sum(min(division.size, division.records - number * division.size) for _, division, number in blocks)


def _flush(block: Block, folder: Path, file: Path) -> None:
    for entry in block.shards:
        sync(folder / entry["file"], forget=True)
        sync(folder / entry["index"]["file"])
    unnamed = file.with_suffix(".part")
    unnamed.write_text(block.to_json())
    sync(unnamed)
    os.replace(unnamed, file)


def _finish(work: Work, sources: list[Sources], place: Workplace, about: dict[str, Any]) -> Conversion:
    """Bring the blocks of all parts together, where they are all there. Raises DataError."""
    divisions = _divisions(sources, work.options)
    files = [place.block(each.modality, number) for each, division in divisions for number in range(len(division))]
    missing = sum(not file.exists() for file in files)
    if missing:
        return Conversion(None, True, missing)
    names = [name for each in sources for name in each.names]
    written: list[WrittenShard] = []
    rejected: list[dict[str, Any]] = []
    rounding = 0.0
    for file in files:
        block = Block.from_json(file.read_text())
        written += map(WrittenShard, block.shards, (np.array(lengths, np.int64) for lengths in block.lengths))
        rejected += block.rejected
        rounding = max(rounding, block.rounding)
    rejected.sort(key=lambda one: (names.index(one["source"]), one["row"]))
    counts = Counter((one["source"], kind_of(one["reason"])) for one in rejected)
    held = {name for shard in written for name in shard.entry["sources"]}
    first = f"{rejected[0]['source']} row {rejected[0]['row']}" if rejected else ""
    records = sum(division.records for _, division in divisions)
    _Rejects(records, counts, first, [n for n in names if n not in held]).check(work.options.max_reject_fraction)
    (place.set / REJECTED).write_text("".join(json.dumps(one, ensure_ascii=True) + "\n" for one in rejected))
    (place.set / TOKENIZER).write_bytes(work.tokenizer.read_bytes())
    by_source: dict[str, dict[str, int]] = {}
    for (source, reason), count in counts.items():
        by_source.setdefault(source, {})[reason] = count
    about |= {"rounding_error": rounding, "rejected": {"total": len(rejected), "by_source": by_source}}
    written.sort(key=lambda shard: (MODALITIES.index(shard.entry["modality"]), SPLITS.index(shard.entry["split"])))
    manifest = write_manifest(place.set, written, about)
    for name in (REJECTED, TOKENIZER, MANIFEST, manifest["lengths"]["file"]):
        sync(place.set / name)
    place.publish()
    return Conversion(manifest, True)


def _about(raw_set: RawSet, inputs: list[dict[str, Any]], fingerprint: str, work: Work) -> dict[str, Any]:
    """What the manifest tells beside its shards."""
    options, tokenizer = work.options, TextTokenizer(work.tokenizer)
    return {
        "generated": raw_set.generated,
        "fingerprint": fingerprint,
        "inputs": inputs,
        "options": {**asdict(options), "tokenizer": None if options.tokenizer is None else tokenizer.sha256},
        "tokenizer": {"file": TOKENIZER, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "vector_dtype": options.vector_dtype,
    }

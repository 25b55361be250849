"""The data plane measured: loader, padding, packing, seek and plan, against other loaders on the same records.

Each row is one JSON object. Loaders run in this process on one thread, over real captions (repeated, each time with
other vectors) in shuffled order, and yield tokenised and collated micro-batches of 64 as torch tensors.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.convert import convert
from shards.corpus import Corpus, ShardLengths
from shards.index import IndexBuilder, Members, index_path
from shards.loader import Loader, LoaderState, PhaseSpec, Shape, ShardSet
from shards.order import Order
from shards.raw import open_raw
from shards.record import VECTOR_SIZE
from shards.tokenizer import BOS, EOS, TextTokenizer
from shards.writer import Labels, Options, describe, write_manifest
from tools.machine import describe_machine
from tools.make_demo_data import make

REAL = Path("../shared/data/raw")
GLOBAL_BATCH, MICRO_BATCH = 512, 64  # ours accumulates 8 micro-batches a step, as the 120m recipe does 16
ROW_TOKENS = 64
SEEK_SHARDS, SEEK_SAMPLES = 1000, 10_000
RANKS, NODES = 4096, 512


class Records:
    """The same records for every side: captions, vectors, our shards of them, a tokenizer."""

    def __init__(self, folder: Path, repeats: int) -> None:
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
        options = Options(vocab_size=4096, validation_fraction=0.0)
        convert(source, self.shards, options, force=False, report=lambda *_: None)
        self.tars = sorted(str(tar) for tar in self.shards.glob("*.tar"))
        self.tokenizer = TextTokenizer(self.shards / "tokenizer.json")
        self.folder, self.repeats = folder, repeats


def collate(tokens: Sequence[Sequence[int]], vectors: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and float32 vectors of a micro-batch, as a user of another loader writes it."""
    width = max(len(ids) for ids in tokens) + 1
    inputs = np.zeros((len(tokens), width), np.int64)
    targets = np.full((len(tokens), width), -100, np.int64)
    for row, ids in enumerate(tokens):
        inputs[row, 0] = BOS
        inputs[row, 1 : len(ids) + 1] = ids
        targets[row, : len(ids)] = ids
        targets[row, len(ids)] = EOS
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(np.stack(vectors)).float()


def grouped(samples: Iterator[tuple[Any, np.ndarray]], tokens_of: Callable[[list[Any]], list[Any]]) -> int:
    """Collate samples (text or ids, vector) by 64; returns how many were collated."""
    texts, vectors, count = [], [], 0
    for text, vector in samples:
        texts.append(text)
        vectors.append(vector)
        if len(texts) == MICRO_BATCH:
            collate(tokens_of(texts), vectors)
            count += len(texts)
            texts, vectors = [], []
    return count


def rate(epoch: Callable[[], int]) -> float:
    """Samples a second of one epoch."""
    began = time.perf_counter()
    count = epoch()
    return count / (time.perf_counter() - began)


def our_loader(records: Records) -> Callable[[], int]:
    """An epoch of our loader, a later one at each call."""
    phases = [PhaseSpec("pairs", {"pairs": 1.0}, epochs=1000)]
    shape = Shape(GLOBAL_BATCH, ROW_TOKENS)
    micro = MICRO_BATCH
    loader = Loader(ShardSet.open(records.shards), phases, seed=0, shape=shape, micro_batch=micro, rank=0, world=1)
    steps = loader.order.steps(0) // 1000
    begun = 0

    def epoch() -> int:
        nonlocal begun
        count = 0
        for step in range(begun, begun + steps):
            for rows in loader.step_rows(LoaderState(0, step)):
                for array in (rows.tokens, rows.targets):
                    torch.from_numpy(array)
                torch.from_numpy(rows.vision).float()
                count += rows.samples
        begun += steps
        return count

    return epoch


def encoder(records: Records) -> Callable[[list[str]], list[list[int]]]:
    """The library's own encode_batch."""
    inner = records.tokenizer.inner
    return lambda texts: [e.ids for e in inner.encode_batch(texts, add_special_tokens=False)]


def webdataset_loader(records: Records) -> Callable[[], int]:
    """webdataset as its documentation shows it."""
    import webdataset

    encode = encoder(records)

    def epoch() -> int:
        data = webdataset.WebDataset(records.tars, shardshuffle=False, empty_check=False)  # type: ignore[attr-defined]
        return grouped(iter(data.decode().shuffle(5000).to_tuple("txt", "npy")), encode)

    return epoch


def wids_loader(records: Records) -> Callable[[], int]:
    """wids: random access to tars that are on local disk already, a permutation of all samples."""
    import wids

    encode = encoder(records)
    manifest = json.loads((records.shards / "manifest.json").read_text())["shards"]
    shards = [{"url": str(records.shards / e["file"]), "nsamples": e["samples"]} for e in manifest]
    with contextlib.redirect_stdout(sys.stderr):  # it prints its shards
        cache = str(records.folder / "wids")
        data = wids.ShardListDataset(shards, keep=True, lru_size=len(shards), cache_dir=cache)
    rng = np.random.default_rng(0)

    def samples() -> Iterator[tuple[Any, np.ndarray]]:
        for at in rng.permutation(len(data)).tolist():
            sample = data[at]
            yield sample[".txt"], sample[".npy"]

    return lambda: grouped(samples(), encode)


def litdata_loader(records: Records) -> Callable[[], int]:
    """litdata: its own chunks, ids tokenised beforehand."""
    import litdata
    from litdata.streaming.writer import BinaryWriter

    out = records.folder / "litdata"
    out.mkdir()
    writer = BinaryWriter(str(out), chunk_bytes="64MB")
    for at, ids in enumerate(encoder(records)(records.captions)):
        writer[at] = {"ids": np.array(ids, np.uint16), "vector": records.vectors[at].astype("<f2")}
    writer.done()
    writer.merge()
    data = litdata.StreamingDataset(str(out), shuffle=True)
    return lambda: grouped(((s["ids"], s["vector"]) for s in data), lambda ids: ids)


def loader_rows(records: Records, rounds: int) -> Iterator[dict[str, Any]]:
    """Ours against webdataset, wids and litdata; their rounds alternate."""
    sides: dict[str, Callable[[], int]] = {"ours": our_loader(records)}
    first = rate(sides["ours"])
    sides |= {
        "webdataset": webdataset_loader(records),
        "wids": wids_loader(records),
        "litdata": litdata_loader(records),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, epoch in sides.items():
            measured = median(rate(epoch) for _ in range(8)) if name == "ours" else rate(epoch)
            if turn:  # the first round warms up
                rates[name].append(measured)
    best = max(("wids", "litdata"), key=lambda name: median(rates[name]))
    about = f"{records.kind}, one process, micro-batches of 64, after the first epoch"
    for other, least in (("webdataset", 60), (best, 2)):
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[other], strict=True)]
        yield {
            "name": f"data loader against {other} ({about})",
            "ours": round(median(rates["ours"])),
            "theirs": round(median(rates[other])),
            "ratio": round(median(ratios), 2),
            "unit": "samples/s",
            "bar": f">= {least}",
            "ok": _verdict(ratios, least),
        }
    yield {
        "name": "data loader, first epoch, which verifies every checksum",
        "ours": round(first),
        "theirs": None,
        "value": round(first),
        "unit": "samples/s",
        "bar": None,
        "ok": None,
    }


def _verdict(values: Sequence[float], least: float) -> bool | None:
    """Whether all values reach `least`; None where they straddle it."""
    reached = [value >= least for value in values]
    return None if any(reached) and not all(reached) else all(reached)


def padding_row(records: Records) -> dict[str, Any]:
    """Real tokens over slots of an epoch of micro-batches of 32, against batches of perfectly sorted captions."""
    captions = len(records.captions) // records.repeats
    tokens = np.array([len(ids) + 1 for ids in encoder(records)(records.captions[:captions])])
    lengths = np.sort(tokens)
    cuts = [lengths[at : at + 32] for at in range(0, len(lengths), 32)]
    best = lengths.sum() / sum(32 * int(cut.max()) for cut in cuts)
    values, many = np.unique(tokens - 1, return_counts=True)
    counts = np.stack([np.zeros(len(values), np.int64), values, many], axis=1)
    one = np.zeros(1, np.int64)
    held = ShardLengths(tokens - 1, tokens * 0, tokens * 0, lambda samples, _: samples * 0)
    total = np.array([len(tokens)]), one, np.array([int((tokens - 1).sum())])
    corpus = Corpus((("flickr", "pairs"),), one, one, *total, counts, lambda _: held)
    order = Order(corpus, [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=0, shape=Shape(32, 128))
    plans = [order.plan(0, step, 0, 32) for step in range(order.steps(0))]
    ours = sum(int(plan.lengths.sum()) for plan in plans) / sum(32 * plan.row_tokens for plan in plans)
    return {
        "name": f"data padding efficiency, {captions} {records.kind}, micro-batch 32, against sorted captions",
        "ours": round(ours, 4),
        "theirs": round(float(best), 4),
        "ratio": round(ours / float(best), 4),
        "unit": "real tokens / slots",
        "bar": ">= 0.95 (ours)",
        "ok": bool(ours >= 0.95),
    }


def packing_row(folder: Path) -> dict[str, Any]:
    """Real tokens over slots of an epoch of packed text."""
    raw = folder / "text"
    if (REAL / "train_50M.zip").is_file():
        raw.mkdir()
        (raw / "train_50M.zip").symlink_to((REAL / "train_50M.zip").resolve())
        kind = "real text"
    else:
        make(raw, seed=0, images=10, words=200_000)
        kind = "generated text"
    convert(raw, folder / "text_shards", Options(vocab_size=4096), force=False, report=lambda *_: None)
    corpus = ShardSet.open(folder / "text_shards").corpus("train")
    order = Order(corpus, [PhaseSpec("t", {"text": 1}, epochs=1)], seed=0, shape=Shape(32, 256))
    plans = [order.plan(0, step, 0, 32) for step in range(order.steps(0))]
    value = sum(int(plan.lengths.sum()) for plan in plans) / sum(32 * plan.row_tokens for plan in plans)
    return {
        "name": f"data text packing (padding of packed rows), {kind}, rows of 256, micro-batch 32",
        "ours": round(value, 4),
        "theirs": None,
        "value": round(value, 4),
        "unit": "real tokens / slots",
        "bar": ">= 0.98",
        "ok": value >= 0.98,
    }


def make_sparse_set(out: Path, tokenizer: Path, shards: int) -> None:
    """A set of sparse tars with indexes that are true of them: zeros, whose checksums are those of zeros."""
    out.mkdir()
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    ours = TextTokenizer(out / "tokenizer.json")
    captions = [" ".join(["dog"] * int(n)) for n in np.random.default_rng(0).integers(5, 25, SEEK_SAMPLES)]
    size, at = 3584, np.arange(SEEK_SAMPLES, dtype=np.int64)
    zeros = dict.fromkeys(("text_kind", "source"), at * 0)
    texts = np.array([len(caption) for caption in captions])
    crcs = [zlib.crc32(bytes(VECTOR_SIZE * 2), zlib.crc32(bytes(n))) for n in texts.tolist()]
    vectors = {"vector_offset": at * size + 1664, "vector_size": at * 0 + 1536, "vector_kind": at * 0 + 1}
    columns = {**zeros, **vectors, "text_offset": at * size + 512, "text_size": texts, "crc32": np.array(crcs)}
    builder = IndexBuilder(ours)
    keys = [f"x-{n:09d}".encode() for n in range(SEEK_SAMPLES)]
    builder.add(Members(keys, captions, ["x"], {**columns, "image_id": at + 1}))
    written = []
    first: Path | None = None
    for number in range(shards):
        tar = out / Labels("pairs", "train", number).file
        with tar.open("wb") as stream:
            stream.truncate(SEEK_SAMPLES * size)
        if first is None:
            counted = builder.write(index_path(tar), SEEK_SAMPLES * size)
            described, first = describe(tar, Labels("pairs", "train", number), counted, "0" * 64), tar
        else:
            index_path(tar).hardlink_to(index_path(first))
        index = {**described.entry["index"], "file": index_path(tar).name}
        written.append(type(described)({**described.entry, "file": tar.name, "index": index}, described.lengths))
    about = {"sha256": ours.sha256, "file": "tokenizer.json", "vocab_size": ours.vocab_size}
    write_manifest(out, written, {"generated": True, "fingerprint": "", "tokenizer": about})


def seek(directory: Path) -> dict[str, float]:
    """Open a set and read the step in the middle of its second epoch: seconds and bytes that stay resident."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    shards = ShardSet.open(directory)
    phases = [PhaseSpec("pairs", {"pairs": 1.0}, epochs=10)]
    shape = Shape(512, ROW_TOKENS)
    loader = Loader(shards, phases, seed=0, shape=shape, micro_batch=512, rank=0, world=1)
    loader.step_rows(LoaderState(0, loader.order.steps(0) * 3 // 20 + 7))
    return {"seconds": time.perf_counter() - began, "bytes": process.memory_info().rss - before}


def seek_rows(folder: Path, tokenizer: Path, shards: int) -> Iterator[dict[str, Any]]:
    """A fresh process that resumes in the middle of a large set."""
    make_sparse_set(folder / "sparse", tokenizer, shards)
    found = []
    for _ in range(3):
        command = [sys.executable, __file__, "--seek", str(folder / "sparse")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = [one["seconds"] for one in found]
    per_sample = [one["bytes"] / (shards * SEEK_SAMPLES) for one in found]
    about = f"{shards:,} shards, {shards * SEEK_SAMPLES:,} samples"
    for name, values, most, unit in (("seek", seconds, 1.0, "s"), ("seek memory", per_sample, 64.0, "bytes/sample")):
        below = [value <= most for value in values]
        yield {
            "name": f"data {name} to the middle of {about}",
            "ours": round(median(values), 3),
            "theirs": None,
            "value": round(median(values), 3),
            "unit": unit,
            "bar": f"<= {most:g}",
            "ok": all(below) if all(below) or not any(below) else None,
        }


def plan(shards: int, samples: int, steps: int) -> dict[str, float]:
    """One rank of 4,096 plans its rows of consecutive steps: milliseconds of each, bytes that stay resident."""
    process = psutil.Process()
    before = process.memory_info().rss
    values = np.arange(4, 36)
    many = np.full(len(values), samples // len(values))
    tokens = np.repeat(values, many)
    held = ShardLengths(tokens, tokens, np.zeros(len(tokens), np.uint8), lambda ids, _: ids * 0)
    each, every = np.arange(shards), np.ones(shards, np.int64)
    counts = np.stack([np.repeat(each, len(values)), np.tile(values, shards), np.tile(many, shards)], axis=1)
    total = every * len(tokens), every * int(tokens.sum()), every * int(tokens.sum())
    corpus = Corpus((("p", "pairs"),), each, every * 0, *total, counts, lambda _: held)
    shape = Shape(RANKS * 32, ROW_TOKENS, NODES)
    order = Order(corpus, [PhaseSpec("p", {"pairs": 1}, epochs=1000)], seed=0, shape=shape)
    middle, times = order.steps(0) // 3000, []
    for step in range(middle, middle + steps):
        began = time.perf_counter()
        order.plan(0, step, 1234 * 32, 32)
        times.append(time.perf_counter() - began)
    return {"mean_ms": 1000 * sum(times) / len(times), "bytes": process.memory_info().rss - before}


def plan_rows(steps: int) -> Iterator[dict[str, Any]]:
    """The plan of a rank at 10 million and at a billion samples, each in a fresh process."""
    found = {}
    for shards, samples in ((1024, 9_984), (10_240, 97_664)):
        command = [sys.executable, __file__, "--plan", str(shards), str(samples), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[shards * samples] = json.loads(done.stdout.splitlines()[-1])
    (few, small), (lots, large) = found.items()
    yield {
        "name": f"data plan of one rank of {RANKS:,}, {lots:,} samples, first step included",
        "ours": round(large["mean_ms"], 3),
        "theirs": None,
        "value": round(large["mean_ms"], 3),
        "unit": "ms/batch",
        "bar": "<= 10",
        "ok": large["mean_ms"] <= 10,
    }
    yield {
        "name": f"data plan memory, {lots:,} samples in 10,240 shards over {few:,} in 1,024 (grows with shards alone)",
        "ours": round((large["bytes"] - small["bytes"]) / lots, 4),
        "theirs": None,
        "value": round((large["bytes"] - small["bytes"]) / lots, 4),
        "unit": "bytes/sample",
        "bar": "<= 0.1",
        "ok": (large["bytes"] - small["bytes"]) / lots <= 0.1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: under a minute")
    parser.add_argument("--seek", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=int, nargs=3, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if known.seek or known.plan:
        print(json.dumps(seek(known.seek) if known.seek else plan(*known.plan)))
        return 0
    torch.set_num_threads(1)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = Records(folder, repeats=2 if known.quick else 8)
        sets = folder / "shards" / "tokenizer.json"
        rows = [
            *loader_rows(records, 1 if known.quick else 5),
            padding_row(records),
            packing_row(folder),
            *seek_rows(folder, sets, SEEK_SHARDS),
            *plan_rows(200 if known.quick else 1000),
        ]
    for row in rows:
        print(json.dumps(row | {"machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

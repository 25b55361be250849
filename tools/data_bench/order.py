"""The order measured: padding, packing, seek and plan.

`python -m tools.data_bench.order seek FOLDER` and `... plan SHARDS SAMPLES STEPS` measure one fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from shards.convert import convert
from shards.corpus import Corpus, ShardLengths
from shards.index import IndexBuilder, Members, index_path
from shards.loader import Loader, LoaderState, PhaseSpec, Shape, ShardSet
from shards.order import Order
from shards.record import VECTOR_SIZE
from shards.tokenizer import TextTokenizer
from shards.writer import Labels, Options, describe, write_manifest
from tools.data_bench.records import REAL, ROOT, Bench, Row
from tools.make_demo_data import make

ROW_TOKENS = 64
SEEK_SHARDS, SEEK_SAMPLES = 1000, 10_000
RANKS, NODES = 4096, 512


def padding_rows(bench: Bench) -> Iterator[Row]:
    """Real tokens over slots of an epoch of micro-batches of 32, against batches of perfectly sorted captions."""
    records = bench.records
    captions = len(records.captions) // records.repeats
    tokens = np.array([len(ids) + 1 for ids in records.encoder()(records.captions[:captions])])
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
    yield {
        "name": f"data padding efficiency, {captions} {records.kind}, micro-batch 32, against sorted captions",
        "ours": round(ours, 4),
        "theirs": round(float(best), 4),
        "ratio": round(ours / float(best), 4),
        "unit": "real tokens / slots",
        "bar": ">= 0.95 (ours)",
        "ok": bool(ours >= 0.95),
    }


def packing_rows(bench: Bench) -> Iterator[Row]:
    """Real tokens over slots of an epoch of packed text."""
    folder = bench.folder
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
    yield {
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


def _fresh(*arguments: str) -> dict[str, float]:
    """What this file measures when it runs as a program."""
    command = [sys.executable, "-m", "tools.data_bench.order", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


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


def seek_rows(bench: Bench) -> Iterator[Row]:
    """A fresh process that resumes in the middle of a large set."""
    shards, sparse = SEEK_SHARDS, bench.folder / "sparse"
    make_sparse_set(sparse, bench.records.shards / "tokenizer.json", shards)
    found = [_fresh("seek", str(sparse)) for _ in range(3)]
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
    counts = np.empty((shards, len(values), 3), np.int32)
    counts[..., 0], counts[..., 1], counts[..., 2] = each[:, None], values, many
    counts = counts.reshape(-1, 3)
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


def plan_rows(bench: Bench) -> Iterator[Row]:
    """The plan of a rank at 10 million and at a billion samples, each in a fresh process."""
    found = {}
    for shards, samples in ((10_240, 9_766), (102_400, 9_766)):
        found[shards * samples] = _fresh("plan", str(shards), str(samples), "200" if bench.quick else "1000")
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
        "name": f"data plan memory, {lots:,} samples over {few:,} (tables that grow with the shards)",
        "ours": round((large["bytes"] - small["bytes"]) / lots, 4),
        "theirs": None,
        "value": round((large["bytes"] - small["bytes"]) / lots, 4),
        "unit": "bytes/sample",
        "bar": "<= 0.1",
        "ok": (large["bytes"] - small["bytes"]) / lots <= 0.1,
    }


if __name__ == "__main__":
    if sys.argv[1] == "seek":
        print(json.dumps(seek(Path(sys.argv[2]))))
    else:
        print(json.dumps(plan(*map(int, sys.argv[2:]))))

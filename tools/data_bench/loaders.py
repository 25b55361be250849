"""Loaders on the same records: ours, webdataset, wids and litdata.

They run in this process on one thread, over captions (repeated, each time with other vectors) in shuffled order, and
yield tokenised and collated micro-batches of 64 as torch tensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from shards.loader import Loader, LoaderState, PhaseSpec, Shape, ShardSet
from shards.tokenizer import BOS, EOS
from tools.data_bench.records import Bench, Records, Row, verdict

GLOBAL_BATCH, MICRO_BATCH = 512, 64  # ours accumulates 8 micro-batches a step, as the 120m recipe does 16
ROW_TOKENS = 64


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


def webdataset_loader(records: Records) -> Callable[[], int]:
    """webdataset as its documentation shows it."""
    import webdataset

    encode = records.encoder()

    def epoch() -> int:
        data = webdataset.WebDataset(records.tars, shardshuffle=False, empty_check=False)  # type: ignore[attr-defined]
        return grouped(iter(data.decode().shuffle(5000).to_tuple("txt", "npy")), encode)

    return epoch


def wids_loader(records: Records) -> Callable[[], int]:
    """wids: random access to tars that are on local disk already, a permutation of all samples."""
    import wids

    encode = records.encoder()
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
    for at, ids in enumerate(records.encoder()(records.captions)):
        writer[at] = {"ids": np.array(ids, np.uint16), "vector": records.vectors[at].astype("<f2")}
    writer.done()
    writer.merge()
    data = litdata.StreamingDataset(str(out), shuffle=True)
    return lambda: grouped(((s["ids"], s["vector"]) for s in data), lambda ids: ids)


def loader_rows(bench: Bench) -> Iterator[Row]:
    """Ours against webdataset, wids and litdata; their rounds alternate."""
    records, rounds = bench.records, 1 if bench.quick else 5
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
            "ok": verdict(ratios, least),
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

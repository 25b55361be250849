"""Rows of the conversion: against webdataset's writer, against cp, with two processes, and its memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from shards.convert import convert
from shards.raw import open_raw
from shards.record import VECTOR_SIZE
from shards.writer import Options
from tools.data_bench.records import ROOT, Bench, Row, verdict

CHUNK = 1 << 14
HELD_OUT = 0.01  # share of the images in the validation split
POLL_SECONDS = 0.02


def conversion_rows(bench: Bench) -> Iterator[Row]:
    """One process against ShardWriter and cp on one set; two processes and their memory on a larger one.

    Where it must be quick the sets are too small to tell: starting costs as much as converting.
    """
    for row in _rows(bench):
        yield row | {"ok": None} if bench.quick else row


def _rows(bench: Bench) -> Iterator[Row]:
    pairs, many, rounds = (10_000, 50_000, 1) if bench.quick else (300_000, 1_000_000, 3)
    folder = bench.folder / "conversion"
    kind, captions = _captions(bench)
    tokenizer = bench.records.shards / "tokenizer.json"
    small = _write_raw(folder / "small", captions, pairs)
    yield from _writer_rows(small, folder, tokenizer, f"{pairs:,} pairs with {kind}", rounds)
    large = _write_raw(folder / "large", captions, many)
    about = f"{many:,} generated pairs with {kind}"
    yield from _jobs_rows(large, folder, tokenizer, about, 1 if bench.quick else 3)
    yield from _memory_rows(small, large, many - pairs, folder, about)


def _captions(bench: Bench) -> tuple[str, list[str]]:
    records = bench.records
    once = len(records.captions) // records.repeats
    return records.kind, records.captions[:once]


def _write_raw(raw: Path, captions: Sequence[str], pairs: int) -> Path:
    """Official names: three quarters in cc_3M, whose vectors come in two parts, the rest in local_narr."""
    raw.mkdir(parents=True)
    rng, large = np.random.default_rng(0), pairs * 3 // 4
    sizes = {"cc_3M": (large // 2, large - large // 2), "local_narr": (pairs - large,)}
    for name, parts in sizes.items():
        texts = [captions[at] for at in rng.integers(len(captions), size=sum(parts)).tolist()]
        (raw / f"{name}_captions.json").write_text(json.dumps(texts))
        for number, rows in enumerate(parts, 1):
            part = f"_{number}of{len(parts)}" if len(parts) > 1 else ""
            path = raw / f"{name}_dino_v2_states{part}.npy"
            out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, VECTOR_SIZE))
            for low in range(0, rows, CHUNK):
                chunk = out[low : low + CHUNK]
                chunk[:] = rng.standard_normal(chunk.shape, dtype=np.float32)
            out.flush()
    return raw


def _timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, with the disk at rest before it."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ours(raw: Path, out: Path, tokenizer: Path | None, jobs: int = 1) -> float:
    """Seconds of a conversion by a fresh process, its start not counted."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-m", __name__, raw, out, tokenizer or "", jobs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def _convert(raw: Path, out: Path, tokenizer: Path | None, jobs: int) -> None:
    options = Options(tokenizer=tokenizer, validation_fraction=HELD_OUT)
    convert(raw, out, options, jobs=jobs, report=lambda *_: None)


def _shard_writer(raw: Path, out: Path) -> None:
    """webdataset's own writer in a plain loop: the same texts and float16 vectors."""
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=10_000, verbose=0) as writer:  # type: ignore[attr-defined]
        for pairs in open_raw(raw).pairs:
            texts = json.loads(pairs.captions.read_text())
            vectors = [row for part in pairs.parts for row in np.load(part.path, mmap_mode="r")]
            for row, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
                key = f"{pairs.source}-{row:09d}"
                writer.write({"__key__": key, "txt": text, "npy": vector.astype(np.float16)})


def _copy(folder: Path, out: Path) -> None:
    """cp, then fsync of each file: what the disk needs for the bytes alone."""
    subprocess.run(["cp", "-r", folder, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _writer_rows(raw: Path, folder: Path, tokenizer: Path, about: str, rounds: int) -> Iterator[Row]:
    pairs = sum(map(len, open_raw(raw).pairs))
    out, theirs, copy = folder / "ours", folder / "theirs", folder / "copy"
    found: dict[str, list[float]] = {name: [] for name in ("given", "trained", "theirs", "copy")}
    for _ in range(rounds):
        found["trained"].append(_ours(raw, out, None))
        found["given"].append(_ours(raw, out, tokenizer))
        found["copy"].append(_timed(lambda: _copy(out, copy)))
        found["theirs"].append(_timed(lambda: _shard_writer(raw, theirs)))
        for made in (copy, theirs):
            shutil.rmtree(made)
    for name, least in (("given", 8), ("trained", None)):
        ratios = [slow / fast for fast, slow in zip(found[name], found["theirs"], strict=True)]
        yield {
            "name": f"data conversion, one process, tokenizer {name}, against webdataset.ShardWriter, {about}",
            "ours": round(pairs / median(found[name])),
            "theirs": round(pairs / median(found["theirs"])),
            "ratio": round(median(ratios), 2),
            "unit": "samples/s",
            "bar": f">= {least}" if least else None,
            "ok": verdict(ratios, least) if least else None,
        }
    times = [mine / plain for mine, plain in zip(found["given"], found["copy"], strict=True)]
    within = [value <= 4 for value in times]
    yield {
        "name": f"data conversion, one process, against cp and fsync of what it made, {about}",
        "ours": round(median(found["given"]), 3),
        "theirs": round(median(found["copy"]), 3),
        "ratio": round(median(times), 2),
        "unit": "s",
        "bar": "<= 4",
        "ok": all(within) if all(within) or not any(within) else None,
    }


def _jobs_rows(raw: Path, folder: Path, tokenizer: Path, about: str, rounds: int) -> Iterator[Row]:
    pairs = sum(map(len, open_raw(raw).pairs))
    one, two = [], []
    for _ in range(rounds):
        one.append(_ours(raw, folder / "ours", tokenizer))
        two.append(_ours(raw, folder / "ours", tokenizer, jobs=2))
    ratios = [slow / fast for slow, fast in zip(one, two, strict=True)]
    yield {
        "name": f"data conversion, --jobs 2 against one process, {about}",
        "ours": round(pairs / median(two)),
        "theirs": round(pairs / median(one)),
        "ratio": round(median(ratios), 2),
        "unit": "samples/s",
        "bar": ">= 1.7",
        "ok": verdict(ratios, 1.7),
    }


def _memory_rows(small: Path, large: Path, more: int, folder: Path, about: str) -> Iterator[Row]:
    """The whole command, tokenizer trained: the most memory that a process of it had, and how that grows."""
    less, most = (_most_memory(raw, folder / "memory") for raw in (small, large))
    grown = (most - less) / more
    for name, value, unit, bar in (
        ("peak memory of a process", most / 2**20, "MiB", 1024),
        (f"growth of the peak memory over {more:,} samples", grown, "bytes/sample", 16),
    ):
        yield {
            "name": f"data conversion, {name}, --jobs 2, tokenizer trained, {about}",
            "ours": round(value, 1),
            "theirs": None,
            "value": round(value, 1),
            "unit": unit,
            "bar": f"<= {bar}",
            "ok": value <= bar,
        }


def _most_memory(raw: Path, out: Path) -> int:
    """The bytes that the largest process of a conversion had resident at its peak."""
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "--raw", raw, "--out", out, "--jobs", "2"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, cwd=ROOT)
    root, peaks = psutil.Process(process.pid), {}
    while process.poll() is None:
        for pid in (process.pid, *(child.pid for child in root.children(recursive=True))):
            peaks[pid] = max(_peak(pid), peaks.get(pid, 0))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"make_shards ended with {process.returncode}")
    shutil.rmtree(out)
    return max(peaks.values())


def _peak(pid: int) -> int:
    """The most bytes a process had resident at a time (the kernel's own note); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    raw, out, tokenizer, jobs = sys.argv[1:]
    print(_timed(lambda: _convert(Path(raw), Path(out), Path(tokenizer) if tokenizer else None, int(jobs))))

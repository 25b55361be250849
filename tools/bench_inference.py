"""What inference costs: bytes and resident memory of packed models, tokens a second with and without what saves time.

    python tools/bench_inference.py [--quick]      # --quick: the 14M recipe alone

Prints one JSON object a row. Weights are first weights: sizes do not depend on training.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
FILE_BARS = {"2": 12.0, "1.6": 15.0}  # times smaller, 120M, the embedding left out on both sides
RESIDENT_BAR = 5.0  # times less, at 120M
ROW_TOKENS = 256  # of the recipes
TOKENS = 32  # read before memory is measured
CACHE_BAR, CACHE_TOKENS = 5.0, 128  # times faster with the keys and values of the tokens before
DECODE_BAR, DECODE_TOKENS = 1.5, 12  # times faster than nn.Linear in fp32, at 700M with one thread
ROUNDS = 3
EVALUATED_SAMPLES = 1024  # captions
RANKS_BAR, EVALUATED = 1.7, "perplexity,retrieval,captioning,distractors,quantization"
SIDES = ("torch", "fp32", "packed")


def recipe(name: str) -> Any:
    from bitmar.config import load_config

    return load_config(ROOT / "launch" / "recipes" / f"{name}.yaml").model


def file_rows(name: str, folder: Path, barred: bool) -> Iterator[dict[str, Any]]:
    """Write packed files of a recipe's model, and compare their bytes."""
    from bitmar.export.packed import save_packed
    from bitmar.model.bitmar import BitMar, parameter_counts
    from bitmar.model.memory import MemoryState
    from bitmar.model.packed import PLACES

    model = BitMar(recipe(name))
    counts = parameter_counts(model)
    embedding = counts.pop("embedding")
    full = 4 * sum(counts.values())
    for bits in PLACES:
        path = folder / f"{name}-{bits}.safetensors"
        save_packed(
            model, MemoryState.empty(model.config.memory_size, model.config.episode_dim), path, ROW_TOKENS, bits
        )
        mine = path.stat().st_size - 2 * embedding
        bar = FILE_BARS[bits] if barred else None
        yield {
            "name": f"packed file at {bits} bits against fp32 weights, without embedding ({name})",
            "ours": mine,
            "theirs": full,
            "ratio": round(full / mine, 2),
            "unit": "bytes",
            "bar": None if bar is None else f">= {bar:g}",
            "ok": None if bar is None else full / mine >= bar,
        }


def resident_row(name: str, folder: Path, barred: bool) -> dict[str, Any]:
    """Memory of processes that hold the model, above that of one that only imported torch."""
    command = [sys.executable, str(Path(__file__)), "--side"]
    found = {}
    for side in SIDES:
        done = subprocess.run([*command, side, name, str(folder)], check=True, capture_output=True, text=True, cwd=ROOT)
        found[side] = int(done.stdout)
    ours, theirs = found["packed"] - found["torch"], found["fp32"] - found["torch"]
    return {
        "name": f"resident memory of the packed runtime (2 bits) against fp32 ({name})",
        "ours": round(ours / 2**20, 1),
        "theirs": round(theirs / 2**20, 1),
        "ratio": round(theirs / ours, 2),
        "unit": "MiB above a process that only imported torch",
        "bar": f">= {RESIDENT_BAR:g}" if barred else None,
        "ok": theirs / ours >= RESIDENT_BAR if barred else None,
    }


@torch.no_grad()
def resident(side: str, name: str, folder: Path) -> int:
    """Bytes of this process once it has run the model of a side, which it still holds."""
    held: Any = None
    if side != "torch":
        from bitmar.export.packed import load_packed
        from bitmar.generation.incremental import IncrementalReader
        from bitmar.model.bitmar import BitMar
        from bitmar.model.memory import MemoryState

        config = recipe(name)
        if side == "packed":
            held = load_packed(folder / f"{name}-2.safetensors")
        else:
            held = BitMar(config).eval(), MemoryState.empty(config.memory_size, config.episode_dim)
        model, memory = held
        reader = IncrementalReader(model, memory, torch.randn(1, config.vision_encoder_dim), 1, TOKENS)
        for token in torch.randint(3, config.vocab_size, (TOKENS, 1, 1)):
            reader.read(token)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def cache_row(name: str) -> dict[str, Any]:
    """A text from an image, token by token, against reading all of it again for each token."""
    from bitmar.generation.incremental import IncrementalReader
    from bitmar.model.bitmar import BitMar
    from bitmar.model.memory import MemoryState
    from bitmar.model.packed import freeze

    config = recipe(name)
    model, memory = freeze(BitMar(config)), MemoryState.empty(config.memory_size, config.episode_dim)
    vector, text = torch.randn(1, config.vision_encoder_dim), torch.randint(3, config.vocab_size, (1, CACHE_TOKENS))

    def with_cache() -> None:
        reader = IncrementalReader(model, memory, vector, 1, CACHE_TOKENS)
        for place in range(CACHE_TOKENS):
            reader.read(text[:, place : place + 1])

    def without() -> None:
        for end in range(1, CACHE_TOKENS + 1):
            IncrementalReader(model, memory, vector, 1, end).read(text[:, :end])

    ours, theirs = seconds(with_cache, without)
    return rate_row(
        f"generation of {CACHE_TOKENS} tokens with KV cache against without ({name})",
        CACHE_TOKENS,
        (ours, theirs),
        CACHE_BAR,
    )


def decode_row(name: str, folder: Path) -> dict[str, Any]:
    """Tokens a second of a packed model and of the same in fp32 without rounding, one thread, batch 1."""
    from bitmar.export.packed import load_packed, save_packed
    from bitmar.generation.incremental import IncrementalReader
    from bitmar.model.bitmar import BitMar
    from bitmar.model.memory import MemoryState

    config = recipe(name)
    memory = MemoryState.empty(config.memory_size, config.episode_dim)
    save_packed(BitMar(config), memory, folder / "decode.safetensors", ROW_TOKENS)
    packed, _ = load_packed(folder / "decode.safetensors")
    plain = BitMar(dataclasses.replace(config, quantization=False, vision_quantization=False)).eval()
    text = torch.randint(3, config.vocab_size, (1, DECODE_TOKENS))

    def decode(model: BitMar) -> None:
        reader = IncrementalReader(model, memory, None, 1, DECODE_TOKENS)
        for place in range(DECODE_TOKENS):
            reader.read(text[:, place : place + 1])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, theirs = seconds(lambda: decode(packed), lambda: decode(plain))
    torch.set_num_threads(threads)
    return rate_row(
        f"packed decode against nn.Linear in fp32, batch 1, 1 thread ({name})",
        DECODE_TOKENS,
        (ours, theirs),
        DECODE_BAR,
    )


def evaluation_row(folder: Path) -> dict[str, Any]:
    """tools/evaluate.py on 2 ranks against 1, each of one thread; and whether the scores are the same."""
    from bitmar.engine.world import free_port, join_world, leave_world
    from bitmar.train import train
    from tools.engine_bench.common import Bench

    bench, model = Bench(folder, True, validation_fraction=0.3), recipe("bitmar-14m")  # few captions, all layers
    layers = (f"model.encoder_layers={model.encoder_layers}", f"model.decoder_layers={model.decoder_layers}")
    steps = ("training.max_steps=1", "training.precision=fp32", "validation.max_samples=64", "wandb.enabled=false")
    config = bench.config("bitmar-14m", "evaluated", *layers, *steps)
    with contextlib.redirect_stdout(sys.stderr):
        train(config, join_world())
    leave_world()
    run, found = folder / "runs" / "evaluated", []
    for size in (1, 2):
        out, port, ranks = folder / f"scores-{size}.json", str(free_port()), []
        told = {"checkpoint": run, "tasks": EVALUATED, "max_samples": EVALUATED_SAMPLES, "threads": 1, "out": out}
        command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *(f"--{k}={v}" for k, v in told.items())]
        for rank in map(str, range(size)):
            group = {"RANK": rank, "WORLD_SIZE": str(size), "LOCAL_RANK": rank, "LOCAL_SIZE": str(size)}
            environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL))
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise RuntimeError(f"evaluation on {size} ranks failed")
        found.append(json.loads(out.read_text(encoding="utf-8")))
    one, two = found
    apart = max(abs(a["value"] - b["value"]) for a, b in zip(one["scores"], two["scores"], strict=True))
    took = [sum(task["seconds"] for task in result["tasks"].values()) for result in found]
    return {
        "name": f"evaluation on 2 ranks against 1 (bitmar-14m; {EVALUATED}; largest difference of a score {apart:.0e})",
        "ours": round(took[1], 1),
        "theirs": round(took[0], 1),
        "ratio": round(took[0] / took[1], 2),
        "unit": "s",
        "bar": f">= {RANKS_BAR:g}, same scores",
        "ok": took[0] / took[1] >= RANKS_BAR and apart < 1e-6,
    }


def seconds(ours: Callable[[], None], theirs: Callable[[], None]) -> tuple[float, float]:
    """Medians of ROUNDS turns each, one after the other, behind one of each that does not count."""
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for work, times in zip((ours, theirs), took, strict=True):
            begin = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - begin)
    return statistics.median(took[0]), statistics.median(took[1])


def rate_row(name: str, tokens: int, took: tuple[float, float], bar: float) -> dict[str, Any]:
    ours, theirs = (tokens / s for s in took)
    return {
        "name": name,
        "ours": round(ours, 1),
        "theirs": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
        "unit": "tokens/s",
        "bar": f">= {bar:g}",
        "ok": ours / theirs >= bar,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_inference", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the 14M recipe alone")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if known.side:
        side, name, folder = known.side
        print(resident(side, name, Path(folder)))
        return 0
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bitmar-14m",) if known.quick else ("bitmar-14m", "bitmar-120m"):
            barred = name == "bitmar-120m"
            for row in (
                *file_rows(name, Path(folder), barred),
                resident_row(name, Path(folder), barred),
                cache_row(name),
            ):
                print(json.dumps(row | {"machine": machine}), flush=True)
        if not known.quick:
            place = Path(folder) / "evaluation"
            place.mkdir()
            for row in (evaluation_row(place), decode_row("bitmar-700m", Path(folder))):
                print(json.dumps(row | {"machine": machine}), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    from bitmar.engine.world import leave  # not above: a side that is measured imports what it needs

    leave(code)

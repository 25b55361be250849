"""What a packed model saves: bytes of its file and resident memory, against the fp32 weights.

    python tools/bench_inference.py [--quick]      # --quick: the 14M recipe alone

Prints one JSON object a row. Weights are first weights: sizes do not depend on training.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
FILE_BARS = {"2": 12.0, "1.6": 15.0}  # times smaller, 120M, the embedding left out on both sides
RESIDENT_BAR = 5.0  # times less, at 120M
TOKENS = 32  # of the forward pass after which memory is measured
SIDES = ("torch", "fp32", "packed")


def recipe(name: str) -> Any:
    from bitmar.config import load_config

    return load_config(ROOT / "launch" / "recipes" / f"{name}.yaml").model


def file_rows(name: str, folder: Path, barred: bool) -> Iterator[dict[str, Any]]:
    """Write packed files of a recipe's model, and compare their bytes."""
    from bitmar.export.packed import PLACES, save_packed
    from bitmar.model.bitmar import BitMar, parameter_counts
    from bitmar.model.memory import MemoryState

    model = BitMar(recipe(name))
    counts = parameter_counts(model)
    embedding = counts.pop("embedding")
    full = 4 * sum(counts.values())
    for bits in PLACES:
        path = folder / f"{name}-{bits}.safetensors"
        save_packed(model, MemoryState.empty(model.config.memory_size, model.config.episode_dim), path, bits)
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
        from bitmar.batch import Batch
        from bitmar.export.packed import load_packed
        from bitmar.model.bitmar import BitMar
        from bitmar.model.memory import MemoryState

        config = recipe(name)
        if side == "packed":
            held = load_packed(folder / f"{name}-2.safetensors")
        else:
            held = BitMar(config).eval(), MemoryState.empty(config.memory_size, config.episode_dim)
        model, memory = held
        model(Batch.of_text(torch.randint(3, config.vocab_size, (1, TOKENS)), config.vision_encoder_dim), memory)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


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
            for row in (*file_rows(name, Path(folder), barred), resident_row(name, Path(folder), barred)):
                print(json.dumps(row | {"machine": machine}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Direct writes against gradient steps on the slots: what an episode's single exposure leaves in the memory.

BitMar's description names a third way to write, a gradient step on the slots themselves. Here 64 episodes are
shown once to an empty memory of 64 slots, by `write` and by 1, 10 and 100 plain gradient steps on the keys and
values (the best of a grid of rates), and recalled by their keys. Prints one JSON object a row.

    python tools/bench_memory.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmar.model.memory import MemoryState, address, write
from tools.machine import describe_machine

EPISODES, SLOTS, WIDTH, SHARPNESS = 64, 64, 256, 20.0
RATES = (1.0, 10.0, 100.0, 1000.0, 10_000.0)


def episodes(seed: int) -> tuple[Tensor, Tensor]:
    """(keys of unit length, values of unit RMS) of 64 episodes, each with a part in common, as captions have."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(1, WIDTH, generator=g)
    keys = F.normalize(torch.randn(EPISODES, WIDTH, generator=g) + common, dim=-1)
    return keys, torch.randn(EPISODES, WIDTH, generator=g) + common


def recall_cosine(slot_keys: Tensor, slot_values: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mean cosine of what each key recalls with its episode."""
    written = torch.ones(1, SLOTS, dtype=torch.bool)
    weights = address(keys[None], slot_keys[None], written, SHARPNESS, "attention")
    return F.cosine_similarity((weights @ slot_values)[0], values, dim=-1).mean()


def direct(keys: Tensor, values: Tensor) -> tuple[float, float]:
    """(recall cosine, seconds) after writing every episode once."""
    began = time.perf_counter()
    state, _ = write(MemoryState.empty(SLOTS, WIDTH), keys, values, list(range(1, EPISODES + 1)), 0.3, 0.5)
    seconds = time.perf_counter() - began
    return float(recall_cosine(state.keys, state.values, keys, values)), seconds


def by_gradient(keys: Tensor, values: Tensor, steps: int, rate: float, seed: int) -> tuple[float, float]:
    """(recall cosine, seconds) after `steps` gradient steps on slots that start small and random."""
    g = torch.Generator().manual_seed(seed + 1)
    slot_keys = torch.randn(SLOTS, WIDTH, generator=g).mul_(0.1).requires_grad_()
    slot_values = torch.randn(SLOTS, WIDTH, generator=g).mul_(0.1).requires_grad_()
    began = time.perf_counter()
    for _ in range(steps):
        loss = 1 - recall_cosine(slot_keys, slot_values, keys, values)
        gradients = torch.autograd.grad(loss, (slot_keys, slot_values))
        with torch.no_grad():
            for slot, gradient in zip((slot_keys, slot_values), gradients, strict=True):
                slot -= rate * gradient
    seconds = time.perf_counter() - began
    with torch.no_grad():
        return float(recall_cosine(slot_keys, slot_values, keys, values)), seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each number of gradient steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed instead of five")
    seeds = range(1 if parser.parse_args(arguments).quick else 5)
    data = [episodes(seed) for seed in seeds]
    direct_writes = [direct(*pair) for pair in data]
    ours = sum(cosine for cosine, _ in direct_writes) / len(data)
    for steps in (1, 10, 100):
        tried = {
            rate: [by_gradient(*pair, steps, rate, seed) for seed, pair in zip(seeds, data, strict=True)]
            for rate in RATES
        }
        best = max(tried, key=lambda rate: sum(cosine for cosine, _ in tried[rate]))
        theirs = sum(cosine for cosine, _ in tried[best]) / len(data)
        row = {
            "name": f"memory write: recall cosine, direct against {steps} gradient step(s) on the slots",
            "ours": round(ours, 4),
            "theirs": round(theirs, 4),
            "ratio": round(ours / theirs, 3),
            "unit": "cosine",
            "bar": "> 1",
            "ok": ours > theirs,
            "rate": best,
            "milliseconds": [
                round(1000 * min(seconds for _, seconds in side), 2) for side in (direct_writes, tried[best])
            ],
            "machine": describe_machine(),
        }
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())

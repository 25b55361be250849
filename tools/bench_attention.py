"""What it costs to analyse the attention heads of a long run: seconds and memory of analyze_attention_heads.py."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.machine import describe_machine

SECONDS_BAR, MIB_BAR = 20, 1024
LAYERS, HEADS, EVERY_STEPS = 24, 16, 100
KINDS = {
    "Encoder": (LAYERS, HEADS),
    "Decoder": (LAYERS, HEADS),
    "CrossModal": (1, HEADS),
    "Memory": (1, 1),
}


def write_run(folder: Path, steps: int, seed: int = 0) -> Path:
    """Figures of heads as training writes them, whose importance drifts from one set of heads to another."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    early = {kind: rng.lognormal(-6.0, 1.2, shape) for kind, shape in KINDS.items()}
    late = {kind: rng.lognormal(-6.0, 1.2, shape) for kind, shape in KINDS.items()}
    for count in range(1, steps + 1):
        share, arrays = min(2 * count / steps, 1.0), {"step": np.array(EVERY_STEPS * count)}
        for kind, shape in KINDS.items():
            middle = early[kind] ** (1 - share) * late[kind] ** share
            arrays[f"{kind}_Importance"] = middle * rng.lognormal(0.0, 0.3, shape)
            arrays[f"{kind}_Entropy"] = rng.uniform(1.0, 1.2, shape) * (3.0 - share)
            arrays[f"{kind}_Concentration"] = rng.uniform(0.2, 0.3, shape) * (1.0 + share)
            if kind in ("Encoder", "Decoder"):
                arrays[f"{kind}_Distance"] = rng.uniform(2.0, 8.0, shape)
                arrays[f"{kind}_First_Token"] = rng.uniform(0.0, 0.4, shape)
        np.savez_compressed(folder / f"heads_step_{EVERY_STEPS * count}.npz", **arrays)  # type: ignore[arg-type]
    return folder


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The tool in a process of its own, its start counted, over a generated run; the report is made."""
    steps = 20 if quick else 200
    command = [sys.executable, str(Path(__file__).with_name("analyze_attention_heads.py")), "--create_report"]
    with tempfile.TemporaryDirectory() as folder:
        analysis = write_run(Path(folder) / "run" / "attention_analysis", steps)
        began = time.perf_counter()
        tool = subprocess.Popen([*command, "--analysis_dir", str(analysis)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(tool.pid, 0)  # its own peak, which RUSAGE_CHILDREN would mix with others'
        seconds = time.perf_counter() - began
        tool.returncode = os.waitstatus_to_exitcode(status)
    assert tool.returncode == 0, f"exit code {tool.returncode}"
    size = f"{steps} steps of {LAYERS} + {LAYERS} layers, {HEADS} heads, with the report"
    for what, value, unit, bar in (
        ("time", seconds, "s", SECONDS_BAR),
        ("peak memory", usage.ru_maxrss / 1024, "MiB", MIB_BAR),
    ):
        yield {
            "name": f"attention analysis: {what}, {size}",
            "ours": round(value, 1),
            "theirs": None,
            "value": round(value, 1),
            "unit": unit,
            "bar": f"<= {bar}",
            "ok": value <= bar,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: under a minute")
    quick = parser.parse_args(arguments).quick
    machine = describe_machine()
    for row in rows(quick):
        print(json.dumps(row | {"machine": machine}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

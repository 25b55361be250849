"""What it costs to watch a run: step time, collectives, bytes, memory, and the training thread's time for pictures."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

if not torch.cuda.is_available():  # which DeepSpeed would tell of on standard output
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench_groups import read_groups
from tools.engine_bench.common import Bench, Row
from tools.machine import describe_machine
from tools.observability_bench.cadence import cadence_rows
from tools.observability_bench.costs import collective_rows, memory_rows, plot_rows
from tools.observability_bench.servers import server_rows

GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "cadence": cadence_rows,
    "servers": server_rows,
    "collectives": collective_rows,
    "plot": plot_rows,
    "memory": memory_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the groups asked for and print their rows; what the trainer says goes to standard error."""
    groups, quick = read_groups(__doc__ or "", GROUPS, arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["WANDB_MODE"] = "offline"
    machine, out = describe_machine(), sys.stdout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(Path(folder), quick, validation_fraction=0.05)  # the probe set is held out
        for group in groups:
            for row in GROUPS[group](bench):
                print(json.dumps(row | {"machine": machine}), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The engine measured, both sides in one run: one JSON object a row, when it is known.

python tools/bench_engine.py [--quick] [GROUP ...]
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.engine.world import leave, leave_world
from tools.bench_groups import read_groups
from tools.engine_bench.captions import caption_rows
from tools.engine_bench.checkpoints import checkpoint_rows
from tools.engine_bench.common import Bench, Row
from tools.engine_bench.ranks import rank_rows
from tools.engine_bench.starts import start_rows
from tools.engine_bench.steps import step_rows
from tools.machine import describe_machine

GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "step": step_rows,
    "rank": rank_rows,
    "checkpoint": checkpoint_rows,
    "start": start_rows,
    "captions": caption_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the groups asked for and print their rows; the trainer's own lines go to standard error."""
    groups, quick = read_groups((__doc__ or "").split("\n\n")[0], GROUPS, arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine, out = describe_machine(), sys.stdout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(Path(folder), quick)
        for group in groups:
            for row in GROUPS[group](bench):
                print(json.dumps(row | {"machine": machine}), file=out, flush=True)
        leave_world()
    return 0


if __name__ == "__main__":
    leave(main())

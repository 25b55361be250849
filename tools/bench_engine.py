"""The engine measured, both sides in one run: one JSON object a row, when it is known.

python tools/bench_engine.py [--quick] [GROUP ...]
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.engine.world import leave_world
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: under a minute")
    known = parser.parse_args(arguments)
    unknown = [name for name in known.groups if name not in GROUPS]
    if unknown:
        parser.error(f"no group {unknown[0]!r}: choose from {', '.join(GROUPS)}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine, out = describe_machine(), sys.stdout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(Path(folder), known.quick)
        for group in known.groups or GROUPS:
            for row in GROUPS[group](bench):
                print(json.dumps(row | {"machine": machine}), file=out, flush=True)
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())

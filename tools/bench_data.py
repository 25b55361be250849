"""The data plane measured, against other programs on the same records: one JSON object a row, when it is known."""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench_groups import read_groups
from tools.data_bench.conversion import conversion_rows
from tools.data_bench.loaders import loader_rows
from tools.data_bench.order import packing_rows, padding_rows, plan_rows, seek_rows
from tools.data_bench.records import Bench, Row
from tools.data_bench.stall import stall_rows
from tools.machine import describe_machine

GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "loader": loader_rows,
    "conversion": conversion_rows,
    "padding": padding_rows,
    "packing": packing_rows,
    "seek": seek_rows,
    "plan": plan_rows,
    "stall": stall_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the groups asked for and print their rows."""
    groups, quick = read_groups(__doc__ or "", GROUPS, arguments)
    torch.set_num_threads(1)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), quick)
        for group in groups:
            for row in GROUPS[group](bench):
                print(json.dumps(row | {"machine": machine}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

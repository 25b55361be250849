"""Convert BabyLM's raw files (captions, DINOv2 vectors, text) to WebDataset shards with an index."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from shards.convert import convert
from shards.record import VECTOR_DTYPES, DataError
from shards.writer import MANIFEST, REJECTED, Options


class Bars:
    """A progress bar a stage on a terminal; one plain line a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(console=console) if console.is_terminal else None
        self._stage, self._task = "", TaskID(0)

    def __enter__(self) -> Bars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Note that `done` of `total` (None: not known) of a stage are done."""
        begins = stage != self._stage
        self._stage = stage
        if self._progress is None:
            if begins:
                self._console.print(stage, highlight=False)
            return
        if begins:
            self._task = self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, required=True, help="directory of the raw files")
    parser.add_argument("--out", type=Path, required=True, help="directory to make; reused when it is there")
    parser.add_argument("--vocab-size", type=int, help="default: by the number of words, 512 to 16384")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--samples-per-shard", type=int, default=defaults.samples_per_shard)
    parser.add_argument("--validation-fraction", type=float, default=defaults.validation_fraction)
    parser.add_argument("--vector-dtype", choices=sorted(VECTOR_DTYPES), default=defaults.vector_dtype)
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=defaults.max_reject_fraction,
        help="stop when more of all samples than this are unusable",
    )
    parser.add_argument("--shuffle-seed", type=int, default=defaults.shuffle_seed)
    parser.add_argument("--force", action="store_true", help="replace shards of other inputs or options")
    return parser.parse_args(arguments)


def summary(manifest: dict[str, Any]) -> Table:
    """A table of what was made: a line a source and split."""
    table = Table(title="GENERATED data, not BabyLM" if manifest["generated"] else None)
    for name in ("source", "split", "samples", "words", "tokens", "bytes", "rejected"):
        table.add_column(name, justify="left" if name in ("source", "split") else "right")
    sums: dict[tuple[str, str], list[int]] = {}
    for entry in manifest["shards"]:
        (source,) = entry["sources"]
        line = sums.setdefault((source, entry["split"]), [0, 0, 0, 0])
        for at, name in enumerate(("samples", "words", "tokens", "bytes")):
            line[at] += entry[name]
    told: set[str] = set()
    for (source, split), line in sums.items():
        rejected = sum(manifest["rejected"]["by_source"].get(source, {}).values())
        table.add_row(source, split, *[f"{n:,}" for n in line], "" if source in told else f"{rejected:,}")
        told.add(source)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversion; returns 0, or 2 after a user's mistake."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    args = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        options = Options(
            vocab_size=args.vocab_size,
            tokenizer=args.tokenizer,
            samples_per_shard=args.samples_per_shard,
            validation_fraction=args.validation_fraction,
            vector_dtype=args.vector_dtype,
            max_reject_fraction=args.max_reject_fraction,
            shuffle_seed=args.shuffle_seed,
        )
        with Bars(console) as bars:
            manifest, made = convert(args.raw, args.out, options, force=args.force, report=bars.report)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    console.print(summary(manifest))
    if manifest["rejected"]["total"]:
        console.print(f"{manifest['rejected']['total']} samples rejected, listed in {args.out / REJECTED}")
    console.print(f"{args.out / MANIFEST}: {'written' if made else 'already there'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Convert BabyLM's raw files (captions, DINOv2 vectors, text) to WebDataset shards with an index."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from shards.convert import Conversion, convert
from shards.record import VECTOR_DTYPES, DataError
from shards.workplace import Part
from shards.writer import MANIFEST, REJECTED, Options
from tools.progress import Bars


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, required=True, help="directory of the raw files")
    parser.add_argument("--out", type=Path, required=True, help="directory to make; reused when it is there")
    parser.add_argument("--vocab-size", type=int, help="default: by the number of words, 512 to 16384")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=defaults.samples_per_shard,
        help="raw records of a pair of shards: those of the train split go into one, those held out into the other",
    )
    parser.add_argument("--validation-fraction", type=float, default=defaults.validation_fraction)
    parser.add_argument(
        "--vector-dtype",
        choices=sorted(VECTOR_DTYPES),
        default=defaults.vector_dtype,
        help="how vectors are stored; the largest rounding error is printed",
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=defaults.max_reject_fraction,
        help="stop when more of all samples than this are unusable",
    )
    parser.add_argument(
        "--shuffle-seed", type=int, default=defaults.shuffle_seed, help="of the shuffle of all sources over the shards"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="make the I-th of N shares, such as a node's; the last one to end completes the set",
    )
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted conversion stopped")
    parser.add_argument("--force", action="store_true", help="replace shards of other inputs or options")
    return parser.parse_args(arguments)


def explain(error: DataError | OSError) -> str:
    """One line that says what would do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'}: no space left: make room, then go on with --resume"
    return str(error)


def tell(console: Console, out: Path, done: Conversion, part: Part) -> None:
    """What was made, and where it lies."""
    from tools.plot_shards import closing_table, draw_plots  # matplotlib; each process of --jobs imports this file

    manifest = done.manifest
    if manifest is None:
        console.print(f"part {part} is done; {done.missing} blocks of other parts are missing: the last part completes")
        return
    console.print(closing_table(manifest))
    if manifest["rejected"]["total"]:
        console.print(f"{manifest['rejected']['total']} samples rejected, listed in {out / REJECTED}")
    if manifest["vector_dtype"] != "float32" and "pairs" in {source["modality"] for source in manifest["sources"]}:
        console.print(f"largest rounding error of a number stored as float16: {manifest['rounding_error']:.3g}")
    for plot in draw_plots(out):
        console.print(f"{plot} drawn", soft_wrap=True)
    console.print(f"{out / MANIFEST}: {'written' if done.made else 'already there'}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversion; returns 0, or 2 after a user's mistake."""
    args = parse(arguments)
    if args.jobs == 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        part = Part.parse(args.part)
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
            done = convert(
                args.raw,
                args.out,
                options,
                report=bars.report,
                force=args.force,
                jobs=args.jobs,
                part=part,
                resume=args.resume,
            )
        tell(console, args.out, done, part)
    except (DataError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: interrupted; {args.out} is not made, the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Prune, mask or reset attention heads of a checkpoint; the trainer goes on from what is written.

    python tools/edit_heads.py --checkpoint runs/demo --prune L2H3,decoder.L1H0 --reset L1H2 --out runs/edited
    deepspeed --module bitmar.train --config runs/edited/config.yaml

A head is named KIND.L2H3 (layer and head count from 0; KIND encoder, decoder, cross_modal or, for --mask, memory);
without KIND it is of --attention_type. --prune makes the projections smaller, --mask keeps them and sets the head's
output to 0, --reset gives it first weights again. The run goes on where it stood; with --restart it is step 0 of a new
one, whose recipe may be changed: fine-tuning. Any ZeRO stage and world can have written the checkpoint and can read the
result. Exit code 0: written; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.surgery import Surgery, edit_checkpoint
from bitmar.config import load_config
from bitmar.head_names import parse_heads
from bitmar.loading import CONFIG_FILE, find_checkpoint

OPERATIONS = ("prune", "mask", "reset")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edit_heads", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    for name in OPERATIONS:
        parser.add_argument(f"--{name}", default="", metavar="HEADS", help="such as L2H3,decoder.L1H0")
    parser.add_argument(
        "--attention_type",
        choices=("encoder", "decoder", "cross_modal", "memory"),
        default="encoder",
        help="of heads that are named without one (default: encoder)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder of the edited run")
    parser.add_argument("--restart", action="store_true", help="as step 0 of a new run, without the optimiser's state")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit, and print what was done."""
    known = parse(arguments)
    try:
        heads = {name: parse_heads(getattr(known, name), known.attention_type) for name in OPERATIONS}
        surgery = Surgery(**heads)
        if not surgery.changed:
            raise ValueError("nothing to do: give --prune, --mask or --reset")
        run, checkpoint = find_checkpoint(known.checkpoint)
        edit_checkpoint(checkpoint, load_config(run / CONFIG_FILE), surgery, known.out, known.restart)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, named in heads.items():
        if named:
            print(f"{name}: {', '.join(map(str, named))}")
    print(f"written: {known.out} (from {checkpoint}); go on with --config {known.out / CONFIG_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

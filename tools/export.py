"""Write a trained model in another form.

    python tools/export.py packed --checkpoint runs/demo --out demo.safetensors               # 2 bits a ternary weight
    python tools/export.py packed --checkpoint runs/demo --out demo.safetensors --bits 1.6    # five to a byte

The layout of packed files stands in bitmar/export/packed.py. Any ZeRO stage and world can have written the checkpoint.
Exit code 0: written; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.export.packed import save_packed
from bitmar.loading import load_trained
from bitmar.model.bitmar import parameter_counts
from bitmar.model.packed import PLACES


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export", description=(__doc__ or "").split("\n\n")[0])
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    packed = forms.add_parser("packed", help="one safetensors file: ternary weights packed, all else in bf16")
    packed.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    packed.add_argument("--out", type=Path, required=True, metavar="FILE")
    packed.add_argument("--bits", choices=tuple(PLACES), default="2", help="of a ternary weight (default: 2)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print its size."""
    known = parse(arguments)
    try:
        loaded = load_trained(known.checkpoint)
        save_packed(loaded.model, loaded.memory, known.out, known.bits)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size, full = known.out.stat().st_size, 4 * sum(parameter_counts(loaded.model).values())
    print(f"written: {known.out} ({size / 1e6:.2f} MB; the weights in fp32 {full / 1e6:.2f} MB, {full / size:.1f}x)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

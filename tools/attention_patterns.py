r"""What every head of a trained model attends to in a text: three pictures.

    python tools/attention_patterns.py --checkpoint runs/demo --text "To be or not to be" --name tobe
    python tools/attention_patterns.py --checkpoint runs/demo --text "a dog" --vector dog.npy --name dog \
        --attention_type cross_modal

Writes NAME_attention_all_layers_heads.png, NAME_attention_avg_per_layer.png and NAME_attention_last_layer_detailed.png
into --out (default: attention_analysis/patterns in the run's folder). From Python:
bitmar.analysis.patterns.visualize_attention. Exit code 0: written; 2: a mistake in what was asked, or a damaged
checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.patterns import CHOICES, TEXT, visualize_attention
from bitmar.loading import find_checkpoint, is_exported


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="attention_patterns", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run's folder, a checkpoint, an exported directory",
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--name", required=True, help="the beginning of the files' names")
    parser.add_argument("--vector", type=Path, metavar="FILE", help="the image's vector: a .npy of one dimension")
    parser.add_argument(
        "--attention_type", choices=CHOICES, default=TEXT, help=f"{TEXT}: encoder and decoder (default)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/attention_analysis/patterns")
    return parser.parse_args(arguments)


def read_vector(path: Path | None) -> np.ndarray | None:
    """Raises ValueError where the file is no array of numbers."""
    if path is None:
        return None
    vector = np.load(path, allow_pickle=False)
    if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
        raise ValueError(f"{path} is not an array of floating point numbers")
    return vector


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and print where the pictures are."""
    known = parse(arguments)
    try:
        run = known.checkpoint if is_exported(known.checkpoint) else find_checkpoint(known.checkpoint)[0]
        out = known.out or run / "attention_analysis" / "patterns"
        vector = read_vector(known.vector)
        paths = visualize_attention(known.text, known.name, known.checkpoint, vector, known.attention_type, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

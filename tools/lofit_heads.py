"""Which attention heads matter by LoFiT (Yin et al. 2024): weights frozen, a scale for each head trained.

    python tools/lofit_heads.py --checkpoint runs/demo --data data/demo/shards --top_k 20

Writes into --out (default: attention_analysis/lofit in the run's folder):
    importance_TYPE.npy     norm of each head's A [layers, heads]; NaN: pruned
    top_heads_TYPE.npy      int [k, 2]: (layer, head) of those among the --top_k of all heads, best first
    lofit.safetensors       scale.HEAD: A of every head; offset.HEAD: v of the top ones, trained in the second step
    lofit.json              the ranking with its numbers, and the losses of both steps
Exit code 0: written; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.heads import Table, ranked, training_captions
from bitmar.analysis.lofit import Biases, Fit, Selection, select_heads, tune_biases
from bitmar.head_names import KINDS, HeadName
from bitmar.loading import load_trained

MEAN_OF = 10  # steps, of the losses that are printed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lofit_heads", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    parser.add_argument("--data", metavar="SHARDS", help="captions of its training split (default: the run's shards)")
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256, help="captions (default: 256)")
    parser.add_argument("--steps", type=int, default=Fit.steps, help=f"of each of the two steps (default: {Fit.steps})")
    parser.add_argument("--rate", type=float, default=Fit.rate, help=f"learning rate (default: {Fit.rate})")
    parser.add_argument("--l1", type=float, default=Fit.l1, help=f"penalty of A in the first step (default: {Fit.l1})")
    parser.add_argument("--seed", type=int, default=Fit.seed)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/attention_analysis/lofit")
    known = parser.parse_args(arguments)
    for name in ("top_k", "samples", "steps"):
        if getattr(known, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(known, name)}")
    if known.rate <= 0 or known.l1 < 0:
        parser.error(f"--rate must be > 0 and --l1 >= 0, got {known.rate} and {known.l1}")
    return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Train A, then v on the heads that lead; print the ranking."""
    known = parse(arguments)
    try:
        loaded = load_trained(known.checkpoint)
        data = loaded.config.data
        batches = training_captions(known.data or data.shards, known.samples, data.row_tokens, known.seed)
        fit = Fit(known.steps, known.rate, known.l1, known.seed)
        selection = select_heads(loaded.model, loaded.memory, batches, fit)
        importance = selection.importance(loaded.model)
        top = ranked(importance)[: known.top_k]
        biases = tune_biases(loaded.model, loaded.memory, batches, top, fit)
        out = known.out or loaded.run_directory / "attention_analysis" / "lofit"
        write(out, selection, importance, top, biases)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for place, head in enumerate(top, 1):
        print(f"{place:3d}  {head!s:20}  norm of A {importance[head.kind][head.layer, head.head]:.4f}")
    for name, losses in (("A", selection.losses), ("v", biases.losses)):
        first, last = (np.mean(part) for part in (losses[:MEAN_OF], losses[-MEAN_OF:]))
        print(f"loss with {name}: {first:.4f} -> {last:.4f} nats a token (means of {min(MEAN_OF, len(losses))} steps)")
    print(f"written: {out}")
    return 0


def write(out: Path, selection: Selection, importance: Table, top: Sequence[HeadName], biases: Biases) -> None:
    """Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        np.save(out / f"importance_{kind}.npy", importance[kind], allow_pickle=False)
        places = [(head.layer, head.head) for head in top if head.kind == kind]
        np.save(out / f"top_heads_{kind}.npy", np.array(places, np.int64).reshape(-1, 2), allow_pickle=False)
    tensors = {f"scale.{head}": scale.contiguous() for head, scale in selection.scales.items()}
    tensors |= {f"offset.{head}": offset.contiguous() for head, offset in biases.offsets.items()}
    save_file(tensors, out / "lofit.safetensors")
    told = {
        "ranking": [[str(head), float(importance[head.kind][head.layer, head.head])] for head in ranked(importance)],
        "top": list(map(str, top)),
        "losses_with_scales": selection.losses,
        "losses_with_offsets": biases.losses,
    }
    (out / "lofit.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""How much each attention head matters, by three measures, and which of them to believe.

    python tools/head_importance.py --checkpoint runs/demo --data data/demo/shards

Gate gradient (mean |d loss / d gate| of a gate of 1 on each head's output), entropy of the attention (low entropy
first) and, where tools/lofit_heads.py has been run, the norm of LoFiT's A each rank the heads. The check takes the
first and the last --share of each ranking out, and as many heads by chance, --draws times, and measures the loss: a
measure whose first heads cost more than chance, and whose last cost less, can be believed. Writes head_importance.json
into --out (default: attention_analysis in the run's folder). Exit code 0: written; 2: a mistake in what was asked, or a
damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.heads import AblationCheck, HeadFigures, check_rankings, held_out, measure_heads, ranked
from bitmar.head_names import KINDS, HeadName
from bitmar.loading import Loaded, load_trained

GATE, ENTROPY, LOFIT = "gate gradient", "entropy", "LoFiT"
RANKED = ("encoder", "decoder", "cross_modal")  # memory attention has one head


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="head_importance", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    parser.add_argument("--data", metavar="SHARDS", help="captions of its validation split (default: the run's shards)")
    parser.add_argument("--samples", type=int, default=128, help="captions (default: 128)")
    parser.add_argument("--share", type=float, default=0.1, help="of the heads that is taken out (default: 0.1)")
    parser.add_argument("--draws", type=int, default=20, help="of heads by chance (default: 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/attention_analysis")
    known = parser.parse_args(arguments)
    if known.samples < 1 or known.draws < 1 or not 0 < known.share < 1:
        parser.error("--samples and --draws must be >= 1, --share between 0 and 1")
    return known


def rankings_of(loaded: Loaded, measured: HeadFigures) -> dict[str, list[HeadName]]:
    """Measure -> heads, the most important first."""
    tables = {
        GATE: measured.importance,
        ENTROPY: {kind: -values for kind, values in measured.entropy.items()},
    }
    folder = loaded.run_directory / "attention_analysis" / "lofit"
    files = {kind: folder / f"importance_{kind}.npy" for kind in KINDS}
    if all(path.is_file() for path in files.values()):
        tables[LOFIT] = {kind: np.load(path, allow_pickle=False) for kind, path in files.items()}
    return {name: ranked({kind: table[kind] for kind in RANKED}) for name, table in tables.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rank, check and print."""
    known = parse(arguments)
    try:
        loaded = load_trained(known.checkpoint)
        data = loaded.config.data
        batches = held_out(known.data or data.shards, known.samples, data.row_tokens)
        measured = measure_heads(loaded.model, loaded.memory, batches)
        rankings = rankings_of(loaded, measured)
        check = check_rankings(loaded.model, loaded.memory, batches, rankings, known.share, known.draws)
        out = known.out or loaded.run_directory / "attention_analysis"
        out.mkdir(parents=True, exist_ok=True)
        told = {name: list(map(str, heads)) for name, heads in rankings.items()}
        content = {"rankings": told, "check": dataclasses.asdict(check)}
        (out / "head_importance.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report(rankings, check))
    print(f"written: {out / 'head_importance.json'}")
    return 0


def report(rankings: dict[str, list[HeadName]], check: AblationCheck) -> str:
    """The rankings' first heads and the check, as text."""
    lines = [f"{name}: {', '.join(map(str, heads[:8]))} ..." for name, heads in rankings.items()]
    spread = statistics.pstdev(check.random)
    lines.append(f"loss with all heads {check.whole:.4f}; without {check.heads} of them, nats a token more:")
    for name in rankings:
        first, last = (losses[name] - check.whole for losses in (check.top, check.bottom))
        lines.append(f"  {name:14} its first {first:+.4f}  its last {last:+.4f}")
    chance = statistics.mean(check.random) - check.whole
    lines.append(f"  {'chance':14} {chance:+.4f} (standard deviation {spread:.4f} of {len(check.random)} draws)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""What kind of head each attention head of a trained model is: a table and a picture.

    python tools/head_types.py --checkpoint runs/demo --data data/demo/shards

Types and their thresholds are those of bitmar/analysis/head_types.py, printed with --criteria. Writes head_types.md,
head_types.json and head_types.png into --out (default: attention_analysis/types in the run's folder). Exit code 0:
written; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.head_types import CRITERIA, DEAD, HeadType, classify_heads
from bitmar.analysis.heads import held_out
from bitmar.analysis.type_plots import types_figure
from bitmar.loading import load_trained
from bitmar.observability import drawing as d
from shards.tokenizer import token_texts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="head_types", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="a run's folder or a checkpoint")
    parser.add_argument("--data", metavar="SHARDS", help="captions of its validation split (default: the run's shards)")
    parser.add_argument("--samples", type=int, default=128, help="captions (default: 128)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/attention_analysis/types")
    parser.add_argument("--criteria", action="store_true", help="print the types with their criteria, and end")
    known = parser.parse_args(arguments)
    if known.checkpoint is None and not known.criteria:
        parser.error("--checkpoint is missing")
    if known.samples < 1:
        parser.error(f"--samples must be >= 1, got {known.samples}")
    return known


def criteria() -> str:
    """The types, as a table in Markdown."""
    lines = ["| type | criterion, in this order | at least | attention |", "| --- | --- | --- | --- |"]
    lines += [f"| {c.name} | {c.meaning} | {c.threshold:g} | {', '.join(c.kinds)} |" for c in CRITERIA]
    lines += [f"| dead: {name} | {meaning} | {least:g} | all |" for name, (_, least, meaning) in DEAD.items()]
    return "\n".join(lines)


def table(types: Sequence[HeadType]) -> str:
    """The heads, as a table in Markdown."""
    names = [c.number for c in CRITERIA] + [number for number, *_ in DEAD.values()]
    lines = [f"| head | type | dead | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for head in types:
        numbers = (head.numbers.get(name, math.nan) for name in names)
        cells = " | ".join("" if math.isnan(value) else f"{value:.3f}" for value in numbers)
        lines.append(f"| {head.head} | {head.type} | {', '.join(head.dead)} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify, print the table and write it."""
    known = parse(arguments)
    if known.criteria:
        print(criteria())
        return 0
    try:
        loaded = load_trained(known.checkpoint)
        data = loaded.config.data
        batches = held_out(known.data or data.shards, known.samples, data.row_tokens)
        decode = token_texts(loaded.tokenizer.read_text(encoding="utf-8"))
        types = classify_heads(loaded.model, loaded.memory, batches, decode)
        out = known.out or loaded.run_directory / "attention_analysis" / "types"
        out.mkdir(parents=True, exist_ok=True)
        (out / "head_types.md").write_text(f"{table(types)}\n\n{criteria()}\n", encoding="utf-8")
        (out / "head_types.json").write_text(json.dumps([as_json(head) for head in types], indent=1), encoding="utf-8")
        about = d.About(loaded.config.run.name, loaded.progress.step)
        d.save(types_figure(about, types, loaded.config.model), out / "head_types.png")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(types))
    print(f"written: {out}")
    return 0


def as_json(head: HeadType) -> dict[str, object]:
    numbers = {name: value if math.isfinite(value) else None for name, value in head.numbers.items()}
    return {"head": str(head.head), "type": head.type, "dead": list(head.dead), "numbers": numbers}


if __name__ == "__main__":
    sys.exit(main())

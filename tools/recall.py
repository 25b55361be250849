"""What a trained model's memory recalls of pairs that it was shown once.

    python tools/recall.py --checkpoint runs/demo --shards data/demo/shards
    python tools/recall.py --checkpoint runs/demo --shards data/demo/shards --pairs 32 --out recall

Held-out pairs of distinct images are written into an empty memory, one exposure each, and asked for by image alone and
by caption alone (bitmar/evaluation/recall.py says how): recall by cue, against the number of episodes stored, after
further episodes (forgetting), and how many slots are in use. Prints tables, and writes recall.json and recall.png into
--out (default: evaluation/ in the run's folder). Exit code 0: done; 2: a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.config_checks import require
from bitmar.evaluation.recall import (
    CUES,
    Pairs,
    forgetting,
    held_out_pairs,
    recall_by_stored,
    recall_once,
)
from bitmar.evaluation.scores import FOLDER, fraction
from bitmar.evaluation.sources import check_exported, open_shards
from bitmar.loading import Loaded, load_trained
from bitmar.model.packed import freeze
from bitmar.observability import drawing as d

CHECKPOINT = "a run's folder, a checkpoint, or an exported directory (then with --shards and --out)"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="recall", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=CHECKPOINT)
    parser.add_argument("--shards", metavar="DIR", help="pairs of its validation split (default: the run's shards)")
    parser.add_argument("--pairs", type=int, default=64, help="that are shown and asked for (default: 64)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: RUN/{FOLDER}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    known = parse(arguments)
    try:
        require(known.pairs > 1, f"--pairs must be > 1, got {known.pairs}")
        check_exported(known.checkpoint, shards=known.shards, out=known.out)
        loaded = load_trained(known.checkpoint)
        wanted = 2 * known.pairs + loaded.config.model.memory_size  # others, too, until the memory has turned over
        pairs = held_out_pairs(open_shards(loaded, known.shards), wanted, loaded.config.data.row_tokens)
        require(
            len(pairs) >= 2 * known.pairs,
            f"--pairs {known.pairs} needs as many other images; {len(pairs)} images are held out",
        )
        found = measured(loaded, pairs.part(0, known.pairs), pairs.part(known.pairs, len(pairs)))
        out = known.out or loaded.run_directory / FOLDER
        out.mkdir(parents=True, exist_ok=True)
        (out / "recall.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        draw(loaded, found, out / "recall.png")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report(found))
    print(f"written: {out / 'recall.json'}, {out / 'recall.png'}")
    return 0


def measured(loaded: Loaded, pairs: Pairs, others: Pairs) -> dict[str, Any]:
    """Shares in [0, 1] with their 95 % intervals (bootstrap over pairs), as JSON holds them."""
    model, count = freeze(loaded.model), len(pairs)
    again = others.part(0, count)
    return {
        "step": loaded.progress.step,
        "pairs": count,
        "slots": model.config.memory_size,
        "recall": {
            cue: {
                "shown": share(found.shown),
                "other pairs shown": share(found.others),
                "memory off": share(found.off),
            }
            for cue, found in ((cue, recall_once(model, pairs, again, cue)) for cue in CUES)
        },
        "by stored": {cue: {n: share(hits) for n, hits in recall_by_stored(model, pairs, cue).items()} for cue in CUES},
        "forgetting": {
            cue: {
                n: share(left.hits) | {"held": left.held, "slots used": left.used}
                for n, left in forgetting(model, pairs, others, cue).items()
            }
            for cue in CUES
        },
    }


def share(hits: Tensor) -> dict[str, Any]:
    score = fraction("memory", "recall", hits.numpy(), "pair", 1 / len(hits))
    return {"value": score.value, "low": score.low, "high": score.high, "chance": score.chance}


def report(found: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        f"{found['pairs']} pairs shown once each to an empty memory of {found['slots']} slots, step {found['step']:,}"
    ]
    lines.append(f"{'asked by':12} {'shown':>22} {'other pairs shown':>22} {'memory off':>22} {'chance':>8}")
    for name, row in found["recall"].items():
        cells = [_told(row[state]) for state in ("shown", "other pairs shown", "memory off")]
        lines.append(f"{name:12} {cells[0]:>22} {cells[1]:>22} {cells[2]:>22} {row['shown']['chance']:8.1%}")
    for title, key in (("episodes stored", "by stored"), ("other pairs shown afterwards", "forgetting")):
        lines.append(
            f"{title:28} {'image cue':>22} {'text cue':>22}"
            + ("  still held, slots used" if key == "forgetting" else "")
        )
        image, text = (found[key][cue] for cue in CUES)
        for n in image:
            held = f"{image[n]['held']:12}, {image[n]['slots used']}" if "held" in image[n] else ""
            lines.append(f"{n:28} {_told(image[n]):>22} {_told(text[n]):>22}{held}")
    return "\n".join(lines)


def _told(share: Mapping[str, float]) -> str:
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


@d.styled
def draw(loaded: Loaded, found: Mapping[str, Any], path: Path) -> None:
    """Recall against episodes stored, and while others follow."""
    figure = d.new_figure(d.About(loaded.config.run.name, found["step"]), "Recall after one exposure", 5.2)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(
        axes, ("by stored", "forgetting"), ("episodes stored", "other pairs shown afterwards"), strict=True
    ):
        for cue, colour in zip(CUES, (d.BLUE, d.RED), strict=True):
            points = list(found[key][cue].values())
            axis.plot([100 * p["value"] for p in points], color=colour, marker="o", label=f"asked by {cue}")
            edges = ([100 * p[edge] for p in points] for edge in ("low", "high"))
            axis.fill_between(range(len(points)), *edges, color=colour, alpha=0.15, linewidth=0)
        axis.plot([100 * p["chance"] for p in points], color=d.GREY, linestyle="--", label="chance")
        axis.set_xticks(range(len(points)), list(map(str, found[key]["image"])))
        axis.set_xlabel(label)
        axis.set_ylim(0, 102)
        axis.yaxis.set_major_formatter(d.PERCENT)
    axes[0].set_ylabel("pairs recalled, 95 % intervals")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    d.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())

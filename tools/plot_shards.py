"""What a folder of shards holds, for people: a table, and two plots beside the manifest.

`caption_lengths.png`: how many words a caption has, a line a source of pairs. `words_per_source.png`: the words of each
source in both splits. make_shards draws them; alone: `python tools/plot_shards.py SHARDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from rich.table import Table

from shards.index import load_columns
from shards.record import DataError
from shards.writer import SPLITS, read_manifest

CAPTION_LENGTHS, WORDS_PER_SOURCE = "caption_lengths.png", "words_per_source.png"
COUNTS = ("samples", "words", "tokens")
GENERATED_TITLE = "GENERATED data, not BabyLM"
# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", ":", "-.")
WIDTH_INCHES, DPI = 7.2, 150
SHOWN_SHARE = 0.999  # of the captions of every source lie inside the plot


def by_source(manifest: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    """(source, split) -> samples, words, tokens and bytes, by modality and name.

    Sources share a shard's bytes by their samples (pairs) or words (text), rounded so that the sums stay exact.
    """
    sums: dict[tuple[str, str], dict[str, int]] = {}
    for entry in manifest["shards"]:
        names = sorted(entry["sources"])
        weights = [entry["sources"][name]["samples" if entry["modality"] == "pairs" else "words"] for name in names]
        ends = np.cumsum([0, *weights]) / max(sum(weights), 1)
        shares = np.diff(np.rint(ends * entry["bytes"])).astype(np.int64).tolist()
        for name, share in zip(names, shares, strict=True):
            line = sums.setdefault((name, entry["split"]), dict.fromkeys((*COUNTS, "bytes"), 0))
            for count in COUNTS:
                line[count] += entry["sources"][name][count]
            line["bytes"] += share
    kinds = {source["name"]: source["modality"] for source in manifest["sources"]}
    return {key: sums[key] for key in sorted(sums, key=lambda key: (kinds[key[0]], *key))}


def closing_table(manifest: dict[str, Any]) -> Table:
    """What was made: a line a source and split, then their sums."""
    table = Table(title=GENERATED_TITLE if manifest["generated"] else None)
    for name in ("source", "split", *COUNTS, "bytes", "rejected"):
        table.add_column(name, justify="left" if name in ("source", "split") else "right", no_wrap=True)
    rejected = {name: sum(faults.values()) for name, faults in manifest["rejected"]["by_source"].items()}
    told: set[str] = set()
    for (source, split), line in by_source(manifest).items():
        cells = [f"{value:,}" for value in line.values()]
        table.add_row(source, split, *cells, "" if source in told else f"{rejected.get(source, 0):,}")
        told.add(source)
    table.add_section()
    for split in SPLITS:
        total = manifest["totals"][split]
        cells = [f"{total[name]:,}" for name in (*COUNTS, "bytes")]
        table.add_row("all", split, *cells, f"{manifest['rejected']['total']:,}" if split == SPLITS[0] else "")
    return table


def caption_lengths(directory: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Source of pairs -> int64 [W]: how many captions have 0, 1, ... W - 1 words."""
    counts: dict[str, np.ndarray] = {}
    for entry in manifest["shards"]:
        if entry["modality"] != "pairs":
            continue
        columns = load_columns(directory / entry["index"]["file"], ["words", "source", "sources"])
        for number, name in enumerate(columns["sources"].tolist()):
            found = np.bincount(columns["words"][columns["source"] == number])
            before = counts.get(name.decode(), np.zeros(0, np.int64))
            size = max(len(before), len(found))
            counts[name.decode()] = np.pad(before, (0, size - len(before))) + np.pad(found, (0, size - len(found)))
    return dict(sorted(counts.items()))


def draw_plots(directory: Path) -> list[Path]:
    """Draw both plots of the shards in `directory` into it; the first only where there are pairs.

    The same shards give the same bytes. Raises DataError when the manifest or an index is missing or damaged.
    """
    manifest = read_manifest(directory)
    drawn = []
    lengths = caption_lengths(directory, manifest)
    if lengths:
        drawn.append(_draw(directory / CAPTION_LENGTHS, manifest, lengths, _caption_lengths, 4.0))
    sums = by_source(manifest)
    rows = len({source for source, _ in sums})
    drawn.append(_draw(directory / WORDS_PER_SOURCE, manifest, sums, _words_per_source, 1.4 + 0.5 * rows))
    return drawn


def _draw(path: Path, manifest: dict[str, Any], data: Any, plot: Any, height_inches: float) -> Path:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes, data)
    if manifest["generated"]:
        figure.suptitle(GENERATED_TITLE, color="#D55E00", fontweight="bold", fontsize=11)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", metadata={"Software": None})  # no version: the bytes follow from the data
    os.replace(part, path)
    return path


def _caption_lengths(axes: Axes, counts: dict[str, np.ndarray]) -> None:
    longest = 1
    for number, (source, found) in enumerate(counts.items()):
        total = int(found.sum())
        mean = float(found @ np.arange(len(found))) / total
        axes.stairs(
            np.append(found, 0) / total,
            np.arange(len(found) + 2) - 0.5,
            baseline=None,
            color=COLOURS[number % len(COLOURS)],
            linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
            linewidth=1.5,
            label=f"{source}: {total:,} captions, {mean:.1f} words on average",
        )
        longest = max(longest, int(np.searchsorted(np.cumsum(found), SHOWN_SHARE * total)))
    axes.set_xlim(0, longest + 1)
    axes.set_ylim(bottom=0)
    axes.set_title("How long captions are", fontsize=11, loc="left")
    axes.set_xlabel("words a caption")
    axes.set_ylabel("share of the source's captions")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8)


def _words_per_source(axes: Axes, sums: dict[tuple[str, str], dict[str, int]]) -> None:
    sources = list(dict.fromkeys(source for source, _ in sums))[::-1]
    figures = EngFormatter(places=1, sep="")
    for place, split in enumerate(SPLITS):
        words = [sums.get((source, split), {}).get("words", 0) for source in sources]
        middles = np.arange(len(sources)) + (0.2, -0.2)[place]
        bars = axes.barh(middles, words, height=0.38, color=COLOURS[place], label=split)
        labels = [figures(count) if count >= 1000 else str(count or "none") for count in words]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(sources)), sources)
    axes.margins(x=0.12)
    axes.set_title("Words of each source", fontsize=11, loc="left")
    axes.set_xlabel("words")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))  # above every bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw both plots; returns 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="directory that make_shards made")
    try:
        for path in draw_plots(parser.parse_args(arguments).shards):
            print(path)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

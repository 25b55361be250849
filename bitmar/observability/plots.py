"""PNG pictures of a run, drawn from what lies in its folder into plots/ and attention_analysis/:
`python -m bitmar.observability.plots RUN_DIR`.

The trainer has them drawn by this command in a process of its own, which stays while the run does
(bitmar/observability/drawer.py).
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bitmar.head_names import KINDS
from bitmar.observability import attention_plots, curve_plots, memory_plots, weight_plots
from bitmar.observability.board import PICTURE_FOLDERS
from bitmar.observability.curve_plots import FLIPS, GRADIENTS, LOSSES, METRICS, SCHEDULE, THROUGHPUT, Panel
from bitmar.observability.drawing import copy, save
from bitmar.observability.run_folder import RunFolder, read_settings

PARENT_POLL_S = 1.0
HEATMAPS = "plot_attention_heatmaps"  # the key of pictures of heads


def _curves(heading: str, panels: tuple[Panel, ...], always: bool = False) -> Callable[[RunFolder], Figure | None]:
    def make(run: RunFolder) -> Figure | None:
        if not always and not curve_plots.has_any(panels, run.series):
            return None
        return curve_plots.curves_figure(run.about(), heading, panels, run.series, run.settings.phases)

    return make


def _memory_usage(run: RunFolder) -> Figure | None:
    records = run.records("memory", *memory_plots.ARRAYS)
    return memory_plots.usage_figure(run.about(int(records[-1]["step"])), records[-1]) if records else None


def _memory_timeline(run: RunFolder) -> Figure | None:
    return memory_plots.timeline_figure(run.about(), run.records("memory", *memory_plots.ARRAYS))


def _memory_reads(run: RunFolder) -> Figure | None:
    records = run.records("memory", *memory_plots.ARRAYS)
    return memory_plots.reads_figure(run.about(int(records[-1]["step"])), records[-1]) if records else None


def _attention_distribution(run: RunFolder) -> Figure | None:
    logs = run.heads
    return attention_plots.distribution_figure(run.about(int(logs[-1]["step"])), logs[-1]) if logs else None


def _head_importance(run: RunFolder) -> Figure | None:
    logs = run.heads
    return attention_plots.importance_figure(run.about(int(logs[-1]["step"])), logs[-1]) if logs else None


@functools.lru_cache(maxsize=1)
def _importance_timeline(run: RunFolder) -> Figure | None:
    """Once for both folders."""
    logs = run.heads
    return attention_plots.timeline_figure(run.about(int(logs[-1]["step"])), logs) if logs else None


def _cross_modal(run: RunFolder) -> Figure | None:
    found = run.last("cross_modal", "words", "weights")
    if found is None or found["words"].shape != found["weights"].shape[:2]:
        return None
    return attention_plots.cross_modal_figure(run.about(int(found["step"])), found["words"], found["weights"])


def _weights(run: RunFolder) -> Figure | None:
    records = run.records("quantization", *weight_plots.MATRIX_ARRAYS)
    return weight_plots.weights_figure(run.about(int(records[-1]["step"])), records[-1]) if records else None


def _latents(run: RunFolder) -> Figure | None:
    found = run.last("latents", *weight_plots.LATENT_ARRAYS)
    return None if found is None else weight_plots.latents_figure(run.about(int(found["step"])), found)


# name of the file: the key of the recipe's section wandb, and what makes it
PICTURES: dict[str, tuple[str, Callable[[RunFolder], Figure | None]]] = {
    "losses": ("plot_losses", _curves("Losses", LOSSES, always=True)),
    "throughput": ("plot_losses", _curves("Throughput of the whole cluster", THROUGHPUT, always=True)),
    "schedule": ("plot_losses", _curves("Schedule and gradient", SCHEDULE, always=True)),
    "gradients": ("plot_gradients", _curves("Gradients and updates by component", GRADIENTS)),
    "memory_usage": ("plot_memory_usage", _memory_usage),
    "memory_timeline": ("plot_memory_usage", _memory_timeline),
    "memory_reads": ("plot_memory_usage", _memory_reads),
    "attention_distribution": (HEATMAPS, _attention_distribution),
    "head_importance": (HEATMAPS, _head_importance),
    "importance_timeline": (HEATMAPS, _importance_timeline),
    "cross_modal": ("log_attention_maps", _cross_modal),
    "weights": ("plot_quantization_dist", _weights),
    "flips": ("plot_quantization_dist", _curves("Flips of ternary weights", FLIPS)),
    "latents": ("log_feature_pca", _latents),
}


def _plots(run: RunFolder) -> Iterator[tuple[str, Figure | None]]:
    for name, (key, make) in PICTURES.items():
        if run.settings.are_on([key]):
            yield name, make(run)


def _head_pictures(run: RunFolder) -> Iterator[tuple[str, Figure | None]]:
    """Of the last analysis, whose step is in their names."""
    logs = run.heads
    if not logs or not run.settings.are_on([]):
        return
    step = int(logs[-1]["step"])
    about = run.about(step)
    if run.settings.are_on([HEATMAPS]):
        for kind in KINDS:
            yield f"attention_heads_{kind}_step_{step}", attention_plots.heads_figure(about, logs[-1], kind)
        yield f"attention_timeline_step_{step}", _importance_timeline(run)
    for kind in KINDS:
        patterns = run.patterns(kind, step)
        if patterns is not None:
            yield f"head_patterns_{kind}_step_{step}", attention_plots.patterns_figure(about, kind, patterns)


def draw_plots(run_dir: Path, folders: Sequence[str] = PICTURE_FOLDERS) -> Iterator[Path]:
    """Draw the pictures of a run into some of its folders and give each one's path when it is there.

    Which, and how the phases are called, is read from run_dir/config.yaml; a picture whose data the run does not have
    is left out. Raises ValueError when the run has logged nothing.
    """
    run = RunFolder(run_dir, METRICS.__contains__)
    saved = weakref.WeakKeyDictionary[Figure, Path]()
    for folder, figures in zip(PICTURE_FOLDERS, (_plots, _head_pictures), strict=True):
        for name, figure in figures(run) if folder in folders else ():
            if figure is not None:
                path = run_dir / folder / f"{name}.png"
                path.parent.mkdir(exist_ok=True)
                if figure in saved:
                    copy(saved[figure], path)
                else:
                    save(figure, path)
                saved[figure] = path
                yield path


def write_plots(run_dir: Path, folders: Sequence[str] = PICTURE_FOLDERS) -> list[Path]:
    """All pictures of `draw_plots`."""
    return list(draw_plots(run_dir, folders))


def serve(run_dir: Path) -> None:
    """Draw for each line of standard input, which names folders; an empty line follows the paths of its pictures."""
    for line in sys.stdin:
        for path in draw_plots(run_dir, line.split()):
            print(path, flush=True)
        _importance_timeline.cache_clear()
        gc.collect()  # figures hold themselves
        print(flush=True)


def end_without(parent: int) -> None:
    """End this process when it is no longer the child of `parent`: a run that was killed leaves nothing behind."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures of one run's folder and print the path of each when it is there."""
    parser = argparse.ArgumentParser(
        description=f"Draw a run's pictures into its folders {' and '.join(PICTURE_FOLDERS)}."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--folders", nargs="+", choices=PICTURE_FOLDERS, default=PICTURE_FOLDERS, help="these alone")
    parser.add_argument("--serve", action="store_true", help="draw folders as lines of standard input name them")
    parser.add_argument("--parent", type=int, help="with --serve: end when this process, which started it, is gone")
    options = parser.parse_args(arguments)
    run_dir = options.run_dir
    if options.parent is not None:
        threading.Thread(target=end_without, args=(options.parent,), daemon=True).start()
    if options.serve:
        serve(run_dir)
        return
    if not read_settings(run_dir).are_on([]):
        print(f"{run_dir / 'config.yaml'} says wandb.create_plots: false; nothing is drawn", file=sys.stderr)
    for path in draw_plots(run_dir, options.folders):
        print(path, flush=True)


if __name__ == "__main__":
    main()

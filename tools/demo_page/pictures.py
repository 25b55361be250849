"""Pictures of what each word of a caption looked at: words across, vision tokens or memory slots down.

Shapes: T words, P vision tokens, K slots, R rows of a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitmar.observability import drawing as d
from bitmar.observability.attention_plots import word_labels
from tools.demo_page.session import Episode, Recalled, Word

WIDTH_IN = 8.6
SLOTS = 8  # in a picture, those that are read most
_ROW_IN, _LABELS_IN = 0.23, 0.85  # height of a row, and of the words below
_LETTERS = 22  # of a caption beside its slot
_SIZES = ((24, 10), (44, 8))  # up to so many words, in points; more are set smaller still


@d.styled
def image_picture(words: Sequence[Word], head: tuple[int, int] | None) -> str:
    """Attention to the vision tokens; `head`: layer and place in it, None: mean over all heads and layers.

    The figure as a data: URL, as those below.
    """
    seen = [word for word in words if word.cross_modal]
    figure, axis = _empty(len(seen[0].cross_modal[0][0]) if seen else 3)
    if not seen:
        d.say(axis, "no image is seen")
        return _url(figure)
    if head is None:
        values = np.stack([np.mean([layer.mean(0) for layer in word.cross_modal], axis=0) for word in seen])
    else:
        values = np.stack([word.cross_modal[head[0]][head[1]] for word in seen])
    _heat(figure, axis, seen, values.T, [str(token) for token in range(values.shape[1])])
    axis.set_ylabel("vision token", size=10)
    return _url(figure)


@d.styled
def memory_picture(words: Sequence[Word], episodes: Mapping[int, Episode]) -> str:
    """Weights of the slots that are read most, the most first; those of this session with their captions."""
    weights = np.stack([word.memory for word in words]) if words else np.zeros((0, 0))
    mass = np.abs(weights).sum(0)
    slots = [int(slot) for slot in np.argsort(-mass, kind="stable")[:SLOTS] if mass[slot] > 0]
    figure, axis = _empty(len(slots) or 3)
    if not slots:
        d.say(axis, "the memory is off or empty: nothing is read")
        return _url(figure)
    _heat(figure, axis, words, weights[:, slots].T, [slot_label(slot, episodes) for slot in slots])
    if len(slots) < np.count_nonzero(mass):
        share = mass[slots].sum() / mass.sum()
        axis.set_title(f"{len(slots)} of {np.count_nonzero(mass)} slots, {share:.0%} of what is read", size=10)
    return _url(figure)


@d.styled
def recall_picture(recalled: Recalled, episodes: Mapping[int, Episode]) -> str:
    """How much the image's cue reads of the slots that it reads most."""
    slots = recalled.best(SLOTS)
    figure, axis = _empty(len(slots) or 2)
    if not slots:
        d.say(axis, "the memory is off or empty: nothing is recalled")
        return _url(figure)
    colours = [d.RED if slot in episodes else d.SKY for slot in slots]
    weights = recalled.weights[slots]
    axis.barh(range(len(slots)), 100 * weights, color=colours, height=0.7)
    axis.set_yticks(range(len(slots)), [slot_label(slot, episodes) for slot in slots])
    axis.set_ylim(max(len(slots), 3) - 0.5, -0.5)
    axis.set_xlim(min(0.0, 105 * float(weights.min())), max(1.0, 105 * float(weights.max())))
    axis.xaxis.set_major_formatter(d.PERCENT)
    axis.set_xlabel("weight that the image alone gives the slot")
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")
    return _url(figure)


def slot_label(slot: int, episodes: Mapping[int, Episode]) -> str:
    """`slot 5`, and the caption that was shown to it in this session."""
    caption = f" {d.shortened(d.shown(episodes[slot].caption), _LETTERS)}" if slot in episodes else ""
    return f"slot {slot}{caption}"


def _empty(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, _ROW_IN * max(rows, 3) + _LABELS_IN), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _heat(
    figure: Figure, axis: Axes, words: Sequence[Word], values: Float[np.ndarray, "R T"], rows: Sequence[str]
) -> None:
    most = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())  # least squares: of either sign
    colours = {"cmap": "RdBu_r", "vmin": -most} if signed else {"cmap": "viridis", "vmin": 0.0}
    picture = axis.imshow(values, vmax=most, aspect="auto", interpolation="nearest", **colours)
    size = next((points for most, points in _SIZES if len(words) <= most), 6)
    axis.set_xticks(range(len(words)), word_labels([word.text for word in words]), rotation=90, size=size)
    for label, word in zip(axis.get_xticklabels(), words, strict=True):
        label.set_color(d.GREY if word.given else d.BLACK)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    bar = figure.colorbar(picture, ax=axis, pad=0.01, aspect=12)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()


def _url(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=d.DPI)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""Pictures of attention: what heads look at, which matter, what words look at in an image.

Shapes: L layers, H heads, T words, S what these attend to, P vision tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from bitmar.head_names import CAUSAL, TITLES
from bitmar.observability import drawing as d
from bitmar.observability.board import Arrays
from bitmar.observability.head_analysis import top_heads
from bitmar.observability.schema import DEAD_SHARE

KINDS = tuple(d.KIND_COLOURS)
_TOP = 5  # heads that the timeline names
_CAPTIONS, _WORDS = 4, 30  # that fit into a picture
_WORD_LETTERS = 12
_PATTERNS, _PATTERN_COLUMNS = 12, 3  # of heads in a picture
_NAMED_COLUMNS, _NAMED_ROW_IN = 12, 0.22  # most heads a row, and least height of one, that leave room for names
_NUMBERED_COLUMNS = 6  # and for numbers
_LABEL_IN, _LABEL_SIZE = 0.15, 9  # height of a word, and its points


def of_kinds(heads: Arrays, figure: str) -> dict[str, np.ndarray]:
    """kind -> [L, H] of a figure, for the kinds that have any finite number."""
    found = {kind: heads.get(f"{kind}_{figure}") for kind in KINDS}
    return {kind: x for kind, x in found.items() if x is not None and x.ndim == 2 and np.isfinite(x).any()}


@d.styled
def distribution_figure(about: d.About, heads: Arrays) -> Figure | None:
    """Entropy, concentration and first-token mass of the heads, by layer and kind. None: nothing to show."""
    panels = (
        ("Entropy", "Entropy over the keys", "nats", False),
        ("Concentration", "Mass on the top tenth of the keys", "share of mass", True),
        ("First_Token", "Mass on the first key", "share of mass", True),
    )
    values = {figure: of_kinds(heads, figure) for figure, *_ in panels}
    if not any(values.values()):
        return None
    room = d.Room(bottom=0.65 + d.LEGEND_ROW_IN)
    figure, axes = d.grid(about, "What attention heads look at", [1.7] * 3, room=room, sharex=True)
    axes = axes[:, 0]
    kinds = [kind for kind in KINDS if any(kind in found for found in values.values())]
    for axis, (name, heading, unit, share) in zip(axes, panels, strict=True):
        axis.set_title(heading)
        factor = 100.0 if share else 1.0
        axis.set_ylabel(unit)
        axis.grid(True, axis="y")
        for place, kind in enumerate(kinds):
            if kind in values[name]:
                _layers(axis, factor * values[name][kind], kind, (place - (len(kinds) - 1) / 2) * 0.16)
        if not values[name]:
            d.say(axis, "not measured in this run")
            continue
        axis.set_ylim(0.0, axis.dataLim.y1 * 1.1 or 1.0)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        if share:
            axis.yaxis.set_major_formatter(d.PERCENT)
    layers = max(x.shape[0] for found in values.values() for x in found.values())
    axes[-1].set_xticks(d.every(layers, 16))
    axes[-1].set_xlim(-0.6, layers - 0.4)
    axes[-1].set_xlabel("layer; a dot a head, a bar their mean")
    handles = [axes[0].scatter([], [], color=d.KIND_COLOURS[kind], label=d.kind_name(kind)) for kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=len(kinds))
    return figure


def _layers(axis: Axes, values: np.ndarray, kind: str, offset: float) -> None:
    colour = d.KIND_COLOURS[kind]
    at = np.arange(len(values)) + offset
    axis.scatter(at.repeat(values.shape[1]), values.ravel(), color=colour, s=12, alpha=0.55, linewidths=0)
    finite = np.isfinite(values)
    means = np.where(finite, values, 0.0).sum(1) / np.where(finite.any(1), finite.sum(1), np.nan)
    axis.hlines(means, at - 0.07, at + 0.07, color=colour, linewidth=2.5)


def sorted_heads(importance: np.ndarray) -> np.ndarray:
    """[L, H] with each layer's heads by falling importance; what is not finite comes last."""
    return -np.sort(-np.where(np.isfinite(importance), importance, np.nan), axis=1)


@d.styled
def importance_figure(about: d.About, heads: Arrays) -> Figure | None:
    """Importance of the heads, layer x head, and the same with each layer's heads in order. None: nothing to show."""
    found = {kind: x for kind, x in of_kinds(heads, "Importance").items() if x.size > 1}
    if not found:
        return None
    rows = [min(max(0.3 * len(x), 0.9), 3.2) for x in found.values()]
    room = d.Room(right=d.BAR_IN, column=0.45, row=0.65)
    figure, axes = d.grid(about, "Importance of attention heads", rows, 2, room)
    for pair, (kind, importance) in zip(axes, found.items(), strict=True):
        picture = _raw_heat(pair[0], importance, d.kind_name(kind))
        _heat(pair[1], sorted_heads(importance))
        pair[1].set_title("sorted in each layer")
        d.colour_bar(figure, picture, pair, "nats", MaxNLocator(4))
    axes[-1, 0].set_xlabel("head")
    axes[-1, 1].set_xlabel("rank in the layer")
    return figure


@d.styled
def heads_figure(about: d.About, heads: Arrays, kind: str) -> Figure | None:
    """Importance of the heads of one kind, layer x head, and below it those of all layers by rank, row by row. None:
    nothing to show."""
    importance = of_kinds(heads, "Importance").get(TITLES[kind])
    if importance is None:
        return None
    layers, count = importance.shape
    height_in = min(max(0.32 * layers, 0.7), 3.2)
    room = d.Room(right=d.BAR_IN, bottom=0.2, row=0.85)
    figure, ((raw,), (ranked,)) = d.grid(about, f"Importance of {_heads_of(kind)}", [height_in] * 2, room=room)
    picture = _raw_heat(raw, importance, "Layer by head")
    raw.set_xlabel("head")
    order = top_heads(importance, importance.size)
    values = np.full(importance.size, np.nan)
    values[: len(order)] = importance[tuple(order.T)]
    _heat(ranked, values.reshape(layers, count))
    ranked.set_title("All heads by rank, row by row")
    ranked.set_xticks([])
    firsts = d.every(layers, 8) * count + 1
    spans = [f"{first}\N{EN DASH}{first + count - 1}" if count > 1 else f"{first}" for first in firsts]
    ranked.set_yticks(d.every(layers, 8), spans)
    ranked.set_ylabel("rank")
    if count <= _NAMED_COLUMNS and height_in / layers >= _NAMED_ROW_IN:
        for rank, (layer, head) in enumerate(order.tolist()):
            colour = "black" if values[rank] > 0.6 * values[0] else "white"
            number = f": {values[rank]:.2g}" if count <= _NUMBERED_COLUMNS else ""
            text, place = f"L{layer}H{head}{number}", (rank % count, rank // count)
            ranked.annotate(text, place, ha="center", va="center", color=colour, size=9 if count <= 8 else 8)
    d.colour_bar(figure, picture, [raw, ranked], "nats", MaxNLocator(4))
    return figure


def _heads_of(kind: str) -> str:
    return f"{d.kind_name(TITLES[kind]).lower()} attention heads"


def _raw_heat(axis: Axes, importance: np.ndarray, heading: str) -> AxesImage:
    """Layer x head, dead heads crossed."""
    dead = importance < DEAD_SHARE * np.nanmean(importance)
    picture = _heat(axis, importance)
    layers, heads = np.nonzero(dead)
    axis.scatter(heads, layers, marker="x", color="white", s=22, linewidths=1.4)
    axis.set_title(heading + (f": {dead.sum()} dead (x)" if dead.any() else ""))
    axis.set_ylabel("layer")
    return picture


def _heat(axis: Axes, values: np.ndarray) -> AxesImage:
    finite = values[np.isfinite(values)]
    top = finite.max() if finite.size and finite.max() > 0 else 1.0
    shown = np.ma.masked_invalid(values)
    picture = axis.imshow(shown, cmap="viridis", vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
    axis.set_xticks(d.every(values.shape[1], 12))
    axis.set_yticks(d.every(values.shape[0], 8))
    return picture


@d.styled
def timeline_figure(about: d.About, logs: Sequence[Arrays]) -> Figure | None:
    """Importance of every head over the steps, the last's most important ones named. None: nothing to show."""
    kinds = [kind for kind in KINDS if any(kind in of_kinds(heads, "Importance") for heads in logs)]
    if not kinds:
        return None
    room = d.Room(right=d.legend_room(["L00H00"]))
    heading = "Importance of attention heads over time"
    figure, axes = d.grid(about, heading, [1.6] * len(kinds), room=room, sharex=True)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        steps, values = importance_over_time(logs, kind)
        named = top_heads(values[-1], _TOP).tolist()
        marker = "o" if len(steps) < 30 else ""
        for layer, head in np.ndindex(values.shape[1:]):
            if [layer, head] not in named:
                axis.plot(steps, values[:, layer, head], color="#bbbbbb", linewidth=0.8, marker=marker, markersize=2)
        for order, (layer, head) in enumerate(named):
            sign = d.MARKERS[order] if marker else ""
            axis.plot(steps, values[:, layer, head], color=d.CYCLE[order], label=f"L{layer}H{head}", marker=sign)
        heads = int(np.isfinite(values[-1]).sum())
        chosen = f": top {_TOP} of {heads} at the last analysis" if heads > _TOP else ""
        axis.set_title(d.kind_name(kind) + chosen)
        axis.set_ylabel("nats")
        axis.set_ylim(0.0, axis.dataLim.y1 * 1.08 or 1.0)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.grid(True)
        d.legend_beside(axis)
    d.step_axis(axes[-1, 0], 0.0, float(max(int(heads["step"]) for heads in logs)))
    return figure


def importance_over_time(logs: Sequence[Arrays], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], importance [N, L, H]) of the logs that have it in the shape that the last has."""
    found = [(int(heads["step"]), of_kinds(heads, "Importance").get(kind)) for heads in logs]
    known = [(step, x) for step, x in found if x is not None]
    known = [(step, x) for step, x in known if x.shape == known[-1][1].shape]
    return np.array([step for step, _ in known], dtype=np.float64), np.stack([x for _, x in known])


def word_labels(words: Sequence[str]) -> list[str]:
    """Tokens as labels: a word's start without its space, its continuation as -ing, special tokens as they are."""
    labels: list[str] = []
    before = "<"
    for word in words:
        bare = word.strip()
        goes_on = bare[:1].isalnum() and not word[:1].isspace() and not before.startswith("<")
        labels.append(d.shortened(("-" if goes_on else "") + (d.shown(bare) or "(space)"), _WORD_LETTERS))
        before = bare or " "
    return labels


@d.styled
def cross_modal_figure(about: d.About, words: np.ndarray, weights: np.ndarray) -> Figure | None:
    """Words [N, T] ("" is padding) x vision tokens: weights [N, T, P]. None: no caption with a finite weight."""
    lengths = (words != "").sum(1)
    usable = [i for i, length in enumerate(lengths) if length and np.isfinite(weights[i, :length]).any()]
    if not usable:
        return None
    chosen = usable[:_CAPTIONS]
    labels = {i: word_labels(words[i][words[i] != ""][:_WORDS].tolist()) for i in chosen}
    columns = min(len(chosen), 2)
    rows = [chosen[first : first + columns] for first in range(0, len(chosen), columns)]
    heights = [0.19 * max(len(labels[i]) for i in row) for row in rows]
    beside = [0.2 + d.widest_in([w for i in chosen[c::columns] for w in labels[i]], 10) for c in range(columns)]
    room = d.Room(beside[0], bottom=1.25, column=beside[-1], row=0.65)
    figure, axes = d.grid(about, "Attention of words to vision tokens", heights, columns, room)
    numbers = np.concatenate([weights[i, : lengths[i]].ravel() for i in chosen])
    most = float(numbers[np.isfinite(numbers)].max())
    picture = None
    for axis, i in zip(axes.ravel(), chosen, strict=False):
        length, tokens = len(labels[i]), weights.shape[2]
        seen = np.ma.masked_invalid(weights[i, words[i] != ""][:length])
        picture = axis.imshow(seen, cmap="viridis", vmin=0.0, vmax=most or 1.0, aspect="auto", interpolation="nearest")
        axis.set_yticks(range(length), labels[i])
        axis.set_xticks(d.every(tokens, 8))
        cut = f", {length} of {lengths[i]} tokens" if length < lengths[i] else ""
        axis.set_title(f"caption {i + 1} of {len(words)}{cut}")
        axis.tick_params(axis="y", length=0)
    for axis in axes.ravel()[len(chosen) :]:
        axis.set_axis_off()
    for axis in axes[-1, : len(rows[-1])]:
        axis.set_xlabel("vision token")
    if picture is not None:
        label = "attention weight, mean over heads"
        d.colour_bar(figure, picture, axes.ravel(), label, MaxNLocator(6), below_in=0.6)
    return figure


@d.styled
def patterns_figure(about: d.About, kind: str, found: Arrays) -> Figure | None:
    """What the top heads of one kind attend to in a caption, a map a head: `found` as head_patterns_*.npz has it,
    weights [k, T, S]. None: no head, or no finite weight."""
    heads, weights, words = found["heads"], found["weights"], word_labels(list(found["words"]))
    if weights.shape[:2] != (len(heads), len(words)) or not np.isfinite(weights).any():
        return None
    shown = min(len(heads), _PATTERNS)
    columns = 2 if shown == 4 else min(shown, _PATTERN_COLUMNS)
    rows = -(-shown // columns)
    height_in = min(max(_LABEL_IN * len(words), 1.3), 2.3)
    part = f", {shown} of {len(heads)}" if shown < len(heads) else ""
    heading = f"What the top {_heads_of(kind)} attend to{part}"
    word_in = d.widest_in(words, _LABEL_SIZE)
    below = 0.1 + (word_in if kind in CAUSAL else 0.15)  # labels of keys
    last_row = 0.35 + below if shown % columns else 0.35  # labels above an empty place
    room = d.Room(0.45 + word_in, d.BAR_IN, 0.4 + below, column=0.15, row=0.35, last_row=last_row)
    figure, axes = d.grid(about, heading, [height_in] * rows, columns, room, sharex=True, sharey=True)
    width_in = axes[0, 0].get_position().width * d.WIDTH_IN
    seen = np.ma.masked_invalid(weights)
    most, signed = float(np.abs(seen).max()) or 1.0, bool((seen < 0).any())  # least squares: of either sign
    colours = {"cmap": "RdBu_r", "vmin": -most} if signed else {"cmap": "viridis", "vmin": 0.0}
    picture = None
    for axis, (layer, head), own, importance in zip(axes.ravel(), heads, seen, found["importance"], strict=False):
        picture = axis.imshow(own, vmax=most, aspect="auto", interpolation="nearest", **colours)
        axis.set_title(f"L{layer}H{head}, {importance:.2g} nats", size=11)
        axis.tick_params(length=0, labelsize=_LABEL_SIZE)
        if not own.any():  # of the memory, before it is written
            axis.text(0.5, 0.5, "all weights are 0", ha="center", va="center", color="white", transform=axis.transAxes)
        if kind in CAUSAL:
            axis.tick_params(axis="x", labelrotation=90)
    _label_words(axes[0, 0].yaxis, words, height_in)
    if kind in CAUSAL:
        _label_words(axes[0, 0].xaxis, words, width_in)
    else:
        number_in = 0.15 + d.widest_in([str(weights.shape[2])], _LABEL_SIZE)
        axes[0, 0].set_xticks(d.every(weights.shape[2], int(width_in / number_in)))
    for axis in axes.ravel()[shown:]:
        axis.set_axis_off()
    for axis in axes.ravel()[:shown][-columns:]:  # the last of each column, which may stand above an empty place
        axis.xaxis.set_tick_params(labelbottom=True)
    keys = {"cross_modal": "vision token", "memory": "memory slot"}.get(kind, "word attended to")
    figure.supxlabel(keys, y=0.1 / figure.get_figheight(), size=11)
    figure.supylabel("word that attends", x=0.1 / d.WIDTH_IN, size=11)
    if picture is not None:
        d.colour_bar(figure, picture, axes.ravel(), "attention weight", MaxNLocator(6))
    return figure


def _label_words(axis: Axis, words: Sequence[str], room_in: float) -> None:
    """As many words as there is room for, evenly taken."""
    places = d.every(len(words), int(room_in / _LABEL_IN))
    axis.set_ticks(places, [words[int(place)] for place in places])

"""Pictures of the ternary weights and of the latents."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitmar.observability import drawing as d
from bitmar.observability.board import Arrays
from bitmar.observability.schema import TERNARY, title

MATRIX_ARRAYS = ("matrices", "size", "zeros", "plus", "scale")
LATENT_ARRAYS = ("text", "vision", "text_shares", "vision_shares", "sources", "names")
_LAYER = re.compile(r"\.(?:blocks|layers)\.(\d+)\.")
_LABEL_IN = 0.17  # room of a layer's number
_VALUES = ("-1", "0", "1")
_VALUE_COLOURS = (d.BLUE, "#bbbbbb", d.ORANGE)


@dataclass(frozen=True)
class Stretch:
    """A layer of a component, or what of it belongs to no layer."""

    component: str
    layer: int | None
    matrices: tuple[int, ...]  # their places


def stretches(matrices: Sequence[str]) -> list[Stretch]:
    """The layers in the model's order; of each component first the layers, then the rest."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for place, name in enumerate(matrices):
        layer = _LAYER.search(name)
        found.setdefault((name.split(".")[0], int(layer.group(1)) if layer else None), []).append(place)

    def order(key: tuple[str, int | None]) -> tuple[int, bool, int]:
        component, layer = key
        return TERNARY.index(component) if component in TERNARY else len(TERNARY), layer is None, layer or 0

    return [Stretch(title(key[0]), key[1], tuple(found[key])) for key in sorted(found, key=order)]


def value_shares(record: Arrays) -> dict[str, tuple[float, float, float]]:
    """component -> shares of its weights that are -1, 0, 1; a component without weights is left out."""
    shares: dict[str, tuple[float, float, float]] = {}
    owner = np.array([str(name).split(".")[0] for name in record["matrices"]])
    for component in TERNARY:
        mine = (owner == component) & (record["size"] > 0)
        size, zeros, plus = (float(record[key][mine].sum()) for key in ("size", "zeros", "plus"))
        if size > 0:
            shares[title(component)] = (1 - (zeros + plus) / size, zeros / size, plus / size)
    return shares


@d.styled
def weights_figure(about: d.About, record: Arrays) -> Figure | None:
    """The three values by component; sparsity and scale of every matrix by layer. None: no ternary weights."""
    shares = value_shares(record)
    if not shares:
        return None
    room = d.Room(bottom=0.65 + d.LEGEND_ROW_IN, right=d.legend_room(_VALUES), row=0.7)
    figure, ((top,), (middle,), (bottom,)) = d.grid(about, "Ternary weights", [1.9, 1.6, 1.6], room=room)
    at = np.arange(len(shares))
    for place, (value, colour) in enumerate(zip(_VALUES, _VALUE_COLOURS, strict=True)):
        heights = [100 * found[place] for found in shares.values()]
        bars = top.bar(at + 0.27 * (place - 1), heights, 0.25, color=colour, label=value)
        top.bar_label(bars, fmt="%.0f", fontsize=9, padding=1)
    top.set_title("Values by component")
    top.set_xticks(at, list(shares))
    top.set_ylabel("weights (%)")
    top.set_ylim(0.0, top.dataLim.y1 * 1.15 or 1.0)
    top.grid(True, axis="y")
    d.legend_beside(top)
    with np.errstate(invalid="ignore", divide="ignore"):
        sparsity = 100 * record["zeros"] / record["size"]
    layers = stretches([str(name) for name in record["matrices"]])
    for axis, values, heading, unit in (
        (middle, sparsity, "Sparsity by layer: weights that are 0", "weights (%)"),
        (bottom, record["scale"], "Scale by layer: what 1 stands for", "scale (1)"),
    ):
        _by_layer(axis, values, layers)
        axis.set_title(heading)
        axis.set_ylabel(unit)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.grid(True, axis="y")
    bottom.set_xlabel("layer (+: beside the layers); a dot a matrix, a bar their mean")
    owners = dict.fromkeys(stretch.component for stretch in layers)
    handles = [bottom.scatter([], [], color=d.COMPONENT_COLOURS.get(name, d.GREY), label=name) for name in owners]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), handletextpad=0.2, columnspacing=1.2)
    return figure


def _by_layer(axis: Axes, values: np.ndarray, layers: list[Stretch]) -> None:
    for place, stretch in enumerate(layers):
        own = values[list(stretch.matrices)]
        own = own[np.isfinite(own)]
        colour = d.COMPONENT_COLOURS.get(stretch.component, d.GREY)
        axis.scatter(np.full(len(own), place), own, s=14, color=colour, alpha=0.5, linewidths=0)
        if len(own):
            axis.hlines(own.mean(), place - 0.35, place + 0.35, color=colour, linewidth=2.5)
    shown = _labelled(layers, axis.get_position().width * d.WIDTH_IN)
    axis.set_xticks(shown, ["+" if layers[i].layer is None else str(layers[i].layer) for i in shown])
    axis.set_xlim(-0.6, len(layers) - 0.4)


def _labelled(layers: list[Stretch], width_in: float) -> list[int]:
    """The places that are named below an axis, as many as there is room for; what is beside the layers goes first."""
    every, apart = -(-len(layers) // 24), math.ceil(_LABEL_IN * len(layers) / width_in)
    shown: list[int] = []
    for i in sorted(range(len(layers)), key=lambda i: layers[i].layer is not None):
        named = (layers[i].layer or 0) % every == 0
        if named and all(abs(i - other) >= apart for other in shown):
            shown.append(i)
    return sorted(shown)


@d.styled
def latents_figure(about: d.About, values: Arrays) -> Figure | None:
    """Text and vision latents on their first two principal components, coloured by source. None: nothing finite."""
    finite = {key: np.isfinite(values[key]).all(1) for key in ("text", "vision")}
    if not any(found.any() for found in finite.values()):
        return None
    sources = values["sources"]
    present = np.unique(sources)
    columns = min(len(present), 3)
    room = d.Room(bottom=0.65 + d.LEGEND_ROW_IN * -(-len(present) // columns))
    figure, (axes,) = d.grid(about, "Latents of held-out captions and images", [3.1], 2, room)
    names = {int(s): str(values["names"][s]) if 0 <= s < len(values["names"]) else f"source {s}" for s in present}
    for axis, key in zip(axes, ("text", "vision"), strict=True):
        axis.set_title(key.capitalize())
        if not finite[key].any():
            d.say(axis, "not finite")
            continue
        for place, source in enumerate(present):
            points = values[key][(sources == source) & finite[key]]
            label = f"{d.shortened(d.shown(names[int(source)]), 20)} ({(sources == source).sum():,})"
            colour, marker = d.CYCLE[place % len(d.CYCLE)], d.MARKERS[(place + place // 8) % len(d.MARKERS)]
            size = 26 if len(sources) <= 200 else 14
            axis.scatter(*points.T, s=size, color=colour, marker=marker, alpha=0.75, linewidths=0, label=label)
        for name, share in zip("xy", values[f"{key}_shares"], strict=True):
            part = f" ({share:.0%} of variance)" if np.isfinite(share) else ""
            axis.set(**{f"{name}label": f"component {'xy'.index(name) + 1}{part}"})
            getattr(axis, f"{name}axis").set_major_locator(MaxNLocator(5))
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(True)
    handles, labels = next(axis for axis in axes if axis.collections).get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=columns, markerscale=1.3)
    return figure

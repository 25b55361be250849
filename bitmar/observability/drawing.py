"""What all pictures of a run share: their look, titles, names that the font may lack, and the thinning of long runs.

wandb shows a picture about 600 pixels wide, half of its own width: few elements, large ones.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from bitmar.observability.schema import TERNARY, title

WIDTH_IN, DPI = 8.0, 150
PNG_LEVEL = 1  # as many bytes as the four channels at zlib's own level, in 0.6 of the time
CURVE_POINTS = 2000  # more than a curve has pixels
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 11,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "text.usetex": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "#aaaaaa",
}

# Okabe and Ito's colours, told apart by colour-blind readers too
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SKY, BLACK, GREY, PALE = "#56B4E9", "#000000", "#555555", "#eeeeee"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
COMPONENT_COLOURS = {
    "Embedding": BLACK,
    **dict(zip([title(name) for name in TERNARY], (BLUE, ORANGE, GREEN, PURPLE, RED), strict=True)),
}
KIND_COLOURS = {"Encoder": BLUE, "Decoder": RED, "CrossModal": GREEN, "Memory": PURPLE}
KIND_NAMES = {"CrossModal": "Cross-modal"}  # others as they are

PERCENT = FuncFormatter(lambda value, _: f"{value:g}%")
_NAME_LETTERS = 44  # of a run, in a title
_P = ParamSpec("_P")
_R = TypeVar("_R")


def styled(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function make or save its figure in the look of this file."""

    @functools.wraps(make)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with matplotlib.rc_context(STYLE):
            return make(*args, **kwargs)

    return inner


@dataclass(frozen=True)
class About:
    """Whose picture it is."""

    run: str
    step: int
    generated: bool = False

    def title(self, heading: str) -> str:
        """Two lines: what is shown; of which run and step."""
        name = shortened(shown(self.run), _NAME_LETTERS)
        return f"{heading}\n{name}, step {self.step:,}" + (" (generated data)" if self.generated else "")


def new_figure(about: About, heading: str, height_in: float) -> Figure:
    """An empty figure with its title."""
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(about.title(heading))
    return figure


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a PNG in one move, so that a kill leaves the old file or the new one.

    Without a channel of transparency, a third of what has to be packed here, and unpacked again on its way to wandb.
    """
    temporary = path.with_suffix(".png.tmp")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.save(temporary, format="png", dpi=(DPI, DPI), compress_level=PNG_LEVEL)
    temporary.replace(path)


def say(axis: Axes, text: str) -> None:
    """Tell in an axis' place why nothing is drawn there."""
    axis.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])


def step_axis(axis: Axes, first: float, last: float) -> None:
    """The x axis as optimizer steps."""
    axis.set_xlabel("optimizer step")
    last = max(last, first + 1.0)
    axis.set_xlim(first, last + 0.01 * (last - first))  # room for a marker
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_y(axis: Axes) -> None:
    """Powers of ten and, where they are few, their double and fivefold, in plain digits."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    axis.set_autoscaley_on(False)  # which would warn of a single tiny value
    axis.set_yscale("log")
    axis.set_ylim(low / 1.3, high * 1.3)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend_beside(axis: Axes, **options: Any) -> None:
    """The legend to the right of its axis."""
    axis.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2, handlelength=1.5, handletextpad=0.5, **options
    )


def kind_name(kind: str) -> str:
    return KIND_NAMES.get(kind, kind)


def shown(text: str) -> str:
    """A text as the font can show it: a character that it lacks, or that has no shape, as its code, \\u6f22."""
    fonts = [get_font(findfont(FontProperties(family=FONT, weight=weight))) for weight in ("normal", "bold")]

    def has_shape(character: str) -> bool:
        known = all(font.get_char_index(ord(character)) != 0 for font in fonts)
        return known and unicodedata.category(character)[0] not in "CZ"

    return "".join(c if c == " " or has_shape(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, letters: int) -> str:
    """At most so many letters, the last an ellipsis where some are left out."""
    return text if len(text) <= letters else text[: max(letters - 1, 0)].rstrip() + "…"


def groups(count: int, limit: int) -> np.ndarray:
    """Starts of at most `limit` even runs that `count` things in a row fall into, as np.add.reduceat takes them."""
    return np.unique(np.arange(min(count, limit)) * count // max(min(count, limit), 1))


def thinned(values: np.ndarray, limit: int = CURVE_POINTS) -> np.ndarray:
    """Indices, rising, of at most `limit` points that draw the same curve: first, last, and each group's extremes.

    A group without a finite value is kept as a gap.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    starts = groups(count, max((limit - 2) // 2, 1))
    kept = {0, count - 1}
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        part = values[start:end]
        if np.isfinite(part).any():
            kept |= {
                int(start + np.where(np.isfinite(part), part, np.inf).argmin()),
                int(start + np.where(np.isfinite(part), part, -np.inf).argmax()),
            }
        else:
            kept.add(int(start))
    return np.array(sorted(kept))


def every(count: int, most: int) -> np.ndarray:
    """0, and every so-manieth of `count` places, for at most so many ticks."""
    return np.arange(0, count, -(-count // most))


def evenly(things: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of some things, evenly taken, the last among them."""
    if len(things) <= limit:
        return list(things)
    return [things[-1 - int(place)] for place in groups(len(things), limit)][::-1]

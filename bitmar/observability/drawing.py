"""What all pictures of a run share: their look, titles, the places of their axes, names that the font may lack, and the
thinning of long runs.

wandb shows a picture about 600 pixels wide, half of its own width: few elements, large ones.
"""

from __future__ import annotations

import functools
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from bitmar.observability.schema import TERNARY, title

WIDTH_IN, DPI = 8.0, 150
BAR_IN = 1.2  # a bar of colours beside an axis, with its numbers and label
LEGEND_ROW_IN = 0.22
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
    """An empty figure with its title, whose axes matplotlib's layout engine will place."""
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(about.title(heading))
    return figure


@dataclass(frozen=True)
class Room:
    """Inches that a figure leaves beside and between its axes, for their text."""

    left: float = 0.95  # an axis' label, and numbers of up to seven digits
    right: float = 0.5
    bottom: float = 0.6
    top: float = 0.95  # the figure's title, and the heading of the first axes
    column: float = 0.85
    row: float = 0.45
    last_row: float | None = None  # where it differs


def grid(
    about: About, heading: str, heights_in: Sequence[float], columns: int = 1, room: Room = Room(), **sharing: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with its title, and its axes [rows, columns]: of these heights, and as wide as the room leaves them.

    For pictures that are drawn while a run trains: a layout engine measures all text of all axes, twice, which is a
    third of a picture's time or more. A test holds that no text lies on another or is cut off.
    """
    rows = len(heights_in)
    gaps = [room.row] * (rows - 1)
    if gaps and room.last_row is not None:
        gaps[-1] = room.last_row
    height = room.top + sum(heights_in) + sum(gaps) + room.bottom
    width = (WIDTH_IN - room.left - room.right - room.column * (columns - 1)) / columns
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(about.title(heading), y=1 - 0.1 / height, verticalalignment="top")
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    above = room.top
    for row, tall, gap in zip(axes, heights_in, [*gaps, 0.0], strict=True):
        for column, axis in enumerate(row):
            left = room.left + column * (width + room.column)
            place = np.array([left / WIDTH_IN, 1 - (above + tall) / height, width / WIDTH_IN, tall / height])
            axis.set_position(place)
        above += tall + gap
    return figure, axes


def colour_bar(
    figure: Figure,
    picture: AxesImage | QuadMesh,
    axes: Iterable[Axes],
    label: str,
    locator: Locator,
    below_in: float | None = None,
) -> None:
    """A bar along the right side of some axes, which takes BAR_IN of the room there; or so far below them."""
    around = Bbox.union([axis.get_position() for axis in axes])
    inch_x, inch_y = 1 / figure.get_figwidth(), 1 / figure.get_figheight()
    if below_in is None:
        place = (around.x1 + 0.12 * inch_x, around.y0, 0.16 * inch_x, around.height)
    else:
        place = (around.x0, around.y0 - (below_in + 0.14) * inch_y, around.width, 0.14 * inch_y)
    orientation = "vertical" if below_in is None else "horizontal"
    figure.colorbar(picture, cax=figure.add_axes(place), label=label, ticks=locator, orientation=orientation)


def widest_in(texts: Iterable[str], size: float) -> float:
    """Inches of the widest line of some texts in the pictures' font, of `size` points."""
    font = get_font(findfont(FontProperties(family=FONT)))
    font.set_size(size, DPI)

    def width(line: str) -> float:
        font.set_text(line)
        return font.get_width_height()[0] / 64 / DPI  # told in parts of a pixel

    return max((width(line) for text in texts for line in text.split("\n")), default=0.0)


def legend_room(labels: Iterable[str]) -> float:
    """Inches to the right of an axis for a legend beside it."""
    return 0.5 + widest_in(labels, STYLE["legend.fontsize"])


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a PNG in one move, so that a kill leaves the old file or the new one.

    Without a channel of transparency, a third of what has to be packed here, and unpacked again on its way to wandb.
    """
    temporary = _temporary(path)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.save(temporary, format="png", dpi=(DPI, DPI), compress_level=PNG_LEVEL)
    temporary.replace(path)


def copy(picture: Path, path: Path) -> None:
    """The same picture once more, in one move."""
    temporary = _temporary(path)
    shutil.copyfile(picture, temporary)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_suffix(".png.tmp")


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

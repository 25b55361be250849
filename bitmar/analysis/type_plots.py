"""A picture of the heads' types: layer x head, a colour a type, dead ones crossed out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bitmar.analysis.head_types import CRITERIA, OTHER, HeadType
from bitmar.head_names import KINDS
from bitmar.model_config import ModelConfig
from bitmar.observability import drawing as d

TYPES = (*(criterion.name for criterion in CRITERIA), OTHER)
# Okabe and Ito's, darker and lighter ones between them
COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#7F5FA8", "#8C564B", "#BBBBBB")


@d.styled
def types_figure(about: d.About, types: Sequence[HeadType], model: ModelConfig) -> Figure:
    """A panel a kind of attention; a place without colour is a pruned head's."""
    kinds = [kind for kind in KINDS if any(head.head.kind == kind for head in types)]
    layers = [model.attention_shape(kind)[0] for kind in kinds]
    heights = [max(0.3 * count, 0.5) for count in layers]
    figure = d.new_figure(about, "Types of attention heads", 2.6 + sum(heights) + 0.6 * len(kinds))
    axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[h + 0.25 for h in heights])[:, 0]
    colours = ListedColormap(COLOURS[: len(TYPES)])
    for axis, kind in zip(axes, kinds, strict=True):
        shape = model.attention_shape(kind)
        numbers = np.full(shape, np.nan)
        mine = [head for head in types if head.head.kind == kind]
        for head in mine:
            numbers[head.head.layer, head.head.head] = TYPES.index(head.type)
        axis.imshow(np.ma.masked_invalid(numbers), cmap=colours, vmin=-0.5, vmax=len(TYPES) - 0.5, aspect="auto")
        dead = [head.head for head in mine if head.dead]
        axis.scatter([h.head for h in dead], [h.layer for h in dead], marker="x", color="black", s=26, linewidths=1.4)
        axis.set_title(kind.replace("_", "-"))
        axis.set_ylabel("layer")
        axis.set_xticks(d.every(shape[1], 16))
        axis.set_yticks(d.every(shape[0], 8))
    axes[-1].set_xlabel("head")
    used = [name for name in TYPES if any(head.type == name for head in types)]
    handles: list[Patch | Line2D] = [Patch(color=COLOURS[TYPES.index(name)], label=name) for name in used]
    if any(head.dead for head in types):
        handles.append(Line2D([], [], marker="x", color="black", linestyle="", label="dead"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure

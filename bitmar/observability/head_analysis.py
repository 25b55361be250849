"""The analysis of attention heads at a step: which matter most, what these attend to, and the names of its files.

RUN/attention_analysis/ gets of each analysis, at step X, KIND one of bitmar.head_names.KINDS:

    heads_step_X.npz                step; Encoder_Importance [L, H] and the other figures of each kind
    top_heads_KIND_step_X.npy       int [k, 2]: layer and head, the most important first
    head_patterns_KIND_step_X.npz   (save_head_patterns) step; heads int [k, 2]; importance [k]; weights fp32 [k, T, S];
                                    words [T]

and its pictures attention_heads_KIND_step_X.png, attention_timeline_step_X.png, head_patterns_KIND_step_X.png. Shapes:
L layers, H heads, T text positions of a caption, S what they attend to: T positions, vision tokens, or memory slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitmar.head_names import KINDS, TITLES, HeadName
from bitmar.watch_config import AttentionAnalysisConfig

if TYPE_CHECKING:
    from bitmar.observability.probes import Caption  # which needs torch, as a process that draws does not

FOLDER = "attention_analysis"  # in the run's
_KINDS = "|".join(KINDS)
_FILE = re.compile(
    rf"(?:heads|attention_timeline|(?:top_heads|attention_heads|head_patterns)_(?:{_KINDS}))_step_(\d+)"
    r"\.(?:npz|npy|png|tmp|png\.tmp)"
)
_STEP = re.compile(r"_step_\d+$")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class HeadAnalysis:
    """Of one step, of the kinds that the recipe asks for."""

    figures: Arrays  # Encoder_Importance and so on -> [L, H]
    top: Arrays  # kind -> int64 [k, 2]
    patterns: Arrays = field(default_factory=dict)  # kind -> fp32 [k, T, S], of the top heads
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [T], of the patterns' caption

    def files(self, step: int, decode: Callable[[int], str]) -> Iterator[tuple[str, np.ndarray | Arrays]]:
        """(name, what a .npy or .npz of that name holds). `decode`: a token's text."""
        yield f"heads_step_{step}.npz", {"step": np.array(step), **self.figures}
        for kind, heads in self.top.items():
            yield f"top_heads_{kind}_step_{step}.npy", heads
        words = np.array([decode(token) for token in self.tokens.tolist()], dtype=np.str_)
        for kind, weights in self.patterns.items():
            heads = self.top[kind]
            importance = self.figures[f"{TITLES[kind]}_Importance"][tuple(heads.T)]
            values = {"step": np.array(step), "heads": heads, "importance": importance}
            yield f"head_patterns_{kind}_step_{step}.npz", values | {"weights": weights, "words": words}


def top_heads(importance: np.ndarray, most: int) -> np.ndarray:
    """int64 [k, 2]: (layer, head) of the largest of `importance` [L, H], the first the largest; equal ones by layer and
    head. k: at most `most`, and no more than are finite; a head that was pruned is NaN."""
    values = importance.ravel()
    order = np.argsort(-values, kind="stable")
    order = order[np.isfinite(values[order])][:most]
    return np.stack(np.divmod(order, importance.shape[1]), axis=1)


def analyse(
    arrays: Mapping[str, np.ndarray], config: AttentionAnalysisConfig, caption: Caption | None
) -> HeadAnalysis | None:
    """From the reduced arrays of a log; None where no pass of the probe set came before it. `caption`: whose patterns
    are kept."""
    figures, top, patterns = Arrays(), Arrays(), Arrays()
    for kind in config.kinds:
        mine = f"Attention/Heads_{TITLES[kind]}_"
        found = {name.partition("/Heads_")[2]: array for name, array in arrays.items() if name.startswith(mine)}
        if found:
            figures |= found
            top[kind] = top_heads(found[f"{TITLES[kind]}_Importance"], config.track_top_k)
    if not figures:
        return None
    if caption is None:
        return HeadAnalysis(figures, top)
    for kind, heads in top.items():
        chosen = [caption.weights[HeadName(kind, layer, head)].cpu().numpy() for layer, head in heads.tolist()]
        if chosen:
            patterns[kind] = np.stack(chosen)
    return HeadAnalysis(figures, top, patterns, caption.tokens.cpu().numpy())


def remove_after(folder: Path, step: int) -> None:
    """Remove the files of analyses later than `step`, also those that a kill has left unfinished."""
    for path in folder.glob("*_step_*"):
        found = _FILE.fullmatch(path.name)
        if found is not None and int(found[1]) > step:
            path.unlink(missing_ok=True)


def without_step(path: Path) -> str:
    """A picture's name without the step: that of all pictures of its kind."""
    return _STEP.sub("", path.stem)

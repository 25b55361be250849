"""What training has written of its attention heads, attention_analysis/heads_step_STEP.npz, as arrays over the steps.

A file holds `step` and KIND_FIGURE arrays [L, H] (L layers, H heads; bitmar/observability/probes.py says how each is
measured). A number that is missing or not finite was not measured, as of a head that is pruned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitmar.head_names import KINDS, TITLES
from bitmar.observability.board import Arrays
from bitmar.observability.run_folder import read_npz

PATTERN = "heads_step_*.npz"
FIGURES = ("Importance", "Entropy", "Concentration")  # those that every kind has
_NAME = re.compile(r"heads_step_(0|[1-9][0-9]*)\.npz")


@dataclass(frozen=True)
class LeftOut:
    """A file that is not part of the analysis."""

    file: str
    why: str


@dataclass(frozen=True)
class History:
    """Figures of the heads over N analysis steps."""

    steps: np.ndarray  # int [N], rising
    figures: dict[str, dict[str, np.ndarray]]  # kind -> figure -> float [N, L, H], NaN: not measured
    left_out: tuple[LeftOut, ...]


def read_history(directory: Path) -> History:
    """Read a run's attention_analysis directory.

    Files that are damaged, or of other shapes than the last whole one (of another model), are left out and named.
    Raises ValueError where there is no such directory, or no file of it can be used.
    """
    whole: dict[int, Arrays] = {}
    left_out: list[LeftOut] = []
    for path in _head_files(directory):
        found = _NAME.fullmatch(path.name)
        if found is None:
            left_out.append(LeftOut(path.name, "its name gives no step"))
            continue
        arrays = read_npz(path)
        problem = "cut short, damaged or not readable" if arrays is None else _problem(arrays, int(found[1]))
        if arrays is not None and problem is None:
            whole[int(found[1])] = arrays
        else:
            left_out.append(LeftOut(path.name, str(problem)))
    shapes: dict[str, tuple[int, ...]] = {}
    for step in sorted(whole, reverse=True):
        mine = _shapes(whole[step])
        other = [kind for kind, shape in mine.items() if shapes.get(kind, shape) != shape]
        if other:
            left_out.append(LeftOut(f"heads_step_{step}.npz", f"another number of {other[0]} heads than later files"))
            del whole[step]
        else:
            shapes |= mine
    if not whole:
        first = left_out[0]
        raise ValueError(
            f"{directory}: none of its {len(left_out)} files can be used, such as {first.file}: {first.why}"
        )
    return History(np.array(sorted(whole)), _stacked(dict(sorted(whole.items())), shapes), tuple(left_out))


def _head_files(directory: Path) -> list[Path]:
    """Raises ValueError where there are none."""
    try:
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise ValueError(f"{directory} {what}; give a run's attention_analysis directory")
        files = sorted(directory.glob(PATTERN), key=lambda path: (len(path.name), path.name))  # by step
        inner = directory / "attention_analysis"
        instead = inner if any(inner.glob(PATTERN)) else "a run's attention_analysis directory"
        empty = not any(directory.iterdir())
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {error.strerror}") from None
    if files:
        return files
    if empty:
        raise ValueError(f"{directory} is empty: the run has not measured its attention heads yet")
    raise ValueError(f"{directory} holds no {PATTERN.replace('*', 'STEP')}; give {instead}")


def _problem(arrays: Arrays, step: int) -> str | None:
    """What is wrong with the arrays of a file that can be read; None: nothing."""
    told = arrays.get("step")
    if told is None or told.size != 1 or told.dtype.kind not in "iu" or int(told.item()) != step:
        return "its array `step` is missing or tells another step than its name"
    known = {name: array for parts in _named(arrays).values() for name, array in parts.items()}
    if not known:
        return "no figures of heads in it"
    for name, array in known.items():
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
            return f"{name} is no array of numbers [layers, heads]"
    for kind, parts in _named(arrays).items():
        if len({array.shape for array in parts.values()}) > 1:
            return f"figures of {kind} heads have different shapes"
    return None


def _named(arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """kind -> array name -> array, of the figures that are in the file."""
    named = {kind: {f"{TITLES[kind]}_{figure}" for figure in FIGURES} & arrays.keys() for kind in KINDS}
    return {kind: {name: arrays[name] for name in sorted(names)} for kind, names in named.items() if names}


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {kind: next(iter(parts.values())).shape for kind, parts in _named(arrays).items()}


def _stacked(whole: dict[int, Arrays], shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """kind -> figure -> [N, L, H]."""
    figures: dict[str, dict[str, np.ndarray]] = {}
    for kind in (kind for kind in KINDS if kind in shapes):
        figures[kind] = {}
        for figure in FIGURES:
            missing = np.full(shapes[kind], np.nan)
            rows = np.stack([arrays.get(f"{TITLES[kind]}_{figure}", missing) for arrays in whole.values()])
            rows = rows.astype(np.float64)
            figures[kind][figure] = np.where(np.isfinite(rows), rows, np.nan)
    return figures

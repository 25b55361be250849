"""What a run's folder holds for pictures. Parts that a kill has damaged, or a resumed run left behind, are left out."""

from __future__ import annotations

import functools
import json
import math
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bitmar.observability.board import Arrays, read_records
from bitmar.observability.drawing import About, evenly
from bitmar.observability.head_analysis import FOLDER
from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, read_lines
from bitmar.observability.schema import STEP_METRIC

HEAD_FILES = 200  # read for a timeline
Series = dict[str, tuple[np.ndarray, np.ndarray]]


def read_series(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Series:
    """metrics.jsonl as metric -> (steps [N], values [N]); a value that was not finite is NaN."""
    points: dict[str, tuple[array[float], array[float]]] = {}
    for fields in read_lines(path):
        step = fields[STEP_METRIC]
        for name, value in fields.items():
            if "/" in name and wanted(name):  # not "time", not "nonfinite"
                steps, values = points.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(math.nan if value is None else value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in points.items()}


@dataclass(frozen=True)
class Settings:
    """What the run's config.yaml says to pictures."""

    keys: dict[str, bool]  # of the section wandb; a key that is missing counts as on
    phases: tuple[str, ...]  # names, by index

    def are_on(self, keys: Iterable[str]) -> bool:
        return all(self.keys.get(key, True) for key in ("create_plots", *keys))


def read_settings(run_dir: Path) -> Settings:
    """Every picture is on where there is no config.yaml, or none that can be read."""
    try:
        config: Any = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    config = config if isinstance(config, dict) else {}
    wandb, phases = config.get("wandb"), config.get("phases")
    keys = {key: value for key, value in wandb.items() if value is False} if isinstance(wandb, dict) else {}
    named = [p.get("name") if isinstance(p, dict) else None for p in phases] if isinstance(phases, list) else []
    return Settings(keys, tuple(f"phase {i + 1}" if name is None else str(name) for i, name in enumerate(named)))


def is_generated(run_dir: Path) -> bool:
    """Whether the run's data is generated, as its summary or its last start tells; no where neither does."""
    told: Any = None
    try:
        told = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = (event for event in read_lines(run_dir / EVENTS_FILE) if event.get("kind") == "start")
        for event in starts:
            told = event.get("data", told)
    return told == "generated"


class RunFolder:
    """Read once for all pictures. Raises ValueError where the run has logged nothing."""

    def __init__(self, run_dir: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.run_dir, self.settings = run_dir, read_settings(run_dir)
        self.series = read_series(run_dir / METRICS_FILE, lambda name: name == STEP_METRIC or wanted(name))
        if not self.series:
            raise ValueError(f"{run_dir / METRICS_FILE}: no metrics to plot; is it the directory of a run?")
        self.step = int(self.series[STEP_METRIC][0].max())
        self._generated = is_generated(run_dir)
        self._records: dict[str, list[Arrays]] = {}

    def about(self, step: int | None = None) -> About:
        """For the title of a picture of `step`, or of all up to the last."""
        return About(self.run_dir.resolve().name, self.step if step is None else step, self._generated)

    def records(self, name: str, *arrays: str) -> list[Arrays]:
        """plots/data/NAME.npys: those that have `arrays`, of the lengths that the last one has."""
        if name not in self._records:
            self._records[name] = list(read_records(self.run_dir / "plots" / "data" / f"{name}.npys"))
        found = self._records[name]
        rows = [record for record in found if {"step", *arrays} <= record.keys() and int(record["step"]) <= self.step]
        return [row for row in rows if all(row[key].shape == rows[-1][key].shape for key in arrays)]

    def last(self, name: str, *arrays: str) -> Arrays | None:
        """plots/data/NAME.npz, where it is whole and has `arrays`."""
        return self._whole(self.run_dir / "plots" / "data" / f"{name}.npz", *arrays)

    @functools.cached_property
    def heads(self) -> list[Arrays]:
        """Figures of the heads over the steps, at most HEAD_FILES of them, evenly taken, the last among them."""
        files = (self.run_dir / FOLDER).glob("heads_step_*.npz")
        steps = {path: path.stem.rpartition("_")[2] for path in files}
        known = sorted((int(step), path) for path, step in steps.items() if step.isdigit() and int(step) <= self.step)
        read = (self._whole(path) for _, path in evenly(known, HEAD_FILES))
        return [arrays for arrays in read if arrays is not None]

    def patterns(self, kind: str, step: int) -> Arrays | None:
        """What the top heads of a kind attend to at a step, where that was kept and is whole."""
        path = self.run_dir / FOLDER / f"head_patterns_{kind}_step_{step}.npz"
        return self._whole(path, "heads", "importance", "weights", "words")

    def _whole(self, path: Path, *names: str) -> Arrays | None:
        arrays = read_npz(path)
        if arrays is None or not {"step", *names} <= arrays.keys() or int(arrays["step"]) > self.step:
            return None
        return arrays


def read_npz(path: Path) -> Arrays | None:
    """The arrays of a file; None where it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # np.load leaves a bad one open
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    except RuntimeError:  # of a bit that calls it encrypted, or packed in an unknown way
        return None

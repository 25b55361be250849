from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitmar.config import COMPONENTS
from bitmar.observability.curve_plots import (
    FLIPS,
    GRADIENTS,
    LOSSES,
    METRICS,
    SCHEDULE,
    THROUGHPUT,
    curves_figure,
    has_any,
    phase_spans,
)
from bitmar.observability.drawing import About
from bitmar.observability.records import JsonlSink
from bitmar.observability.run_folder import Series, read_series
from bitmar.observability.schema import SCHEMA, title

ABOUT = About("run", 58)


def fake_run(run_dir: Path, steps: int = 60) -> Series:
    sink = JsonlSink(run_dir)
    for step in range(0, steps, 2):
        values = {metric.name: 1.0 + step / 10 for metric in SCHEMA if not metric.name.startswith("Validation/")}
        sink.log(step, {**values, "Training/Phase": float(step // 20), "Training/Loss": 9.0 - step / 20})
        if step % 10 == 0:
            sink.log(step, {"Validation/Loss": 5.0, "Validation/Loss_Shuffled_Vision": math.nan})
    sink.close()
    return read_series(run_dir / "metrics.jsonl")


def curves(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    lines = (line for line in axis.lines if not str(line.get_label()).startswith("_"))
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in lines
    }


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for axis in figure.axes for text in axis.texts)


def test_every_curve_is_of_the_schema() -> None:
    assert {metric.name for metric in SCHEMA} >= METRICS
    for panels in (GRADIENTS[:1], GRADIENTS[1:]):
        assert {curve.label for curve in panels[0].curves} == {title(name) for name in COMPONENTS}


def test_series_keep_steps_and_gaps(tmp_path: Path) -> None:
    series = fake_run(tmp_path, steps=12)
    steps, values = series["Validation/Loss_Shuffled_Vision"]
    assert steps.tolist() == [0, 10]
    assert np.isnan(values).all()
    assert "time" not in series
    assert "nonfinite" not in series
    few = read_series(tmp_path / "metrics.jsonl", lambda name: name == "Training/Loss")
    assert list(few) == ["Training/Loss"]
    assert few["Training/Loss"][1].tolist() == series["Training/Loss"][1].tolist()


def test_phases_become_stretches(tmp_path: Path) -> None:
    assert phase_spans(fake_run(tmp_path)) == [(0, 0, 20), (1, 20, 40), (2, 40, 58)]
    assert phase_spans({}) == []


def test_curves_are_the_logged_numbers(tmp_path: Path) -> None:
    series = fake_run(tmp_path)
    training, validation = curves_figure(ABOUT, "Losses", LOSSES, series, ("text", "align")).axes
    steps, values = curves(training)["objective"]
    assert (steps, values) == (list(range(0, 60, 2)), series["Training/Loss"][1].tolist())
    assert curves(validation) == {"right image": (list(range(0, 60, 10)), [5.0] * 6)}
    assert [text.get_text() for text in training.texts] == ["text", "align", "phase 3"]
    assert (training.get_ylabel(), validation.get_xlabel()) == ("loss (nats/token)", "optimizer step")


def test_parts_of_a_step_are_stacked(tmp_path: Path) -> None:
    series = fake_run(tmp_path)
    axis = curves_figure(ABOUT, "Throughput", THROUGHPUT, series).axes[2]
    tops = [float(area.get_paths()[0].vertices[:, 1].max()) for area in axis.collections[:6]]  # type: ignore[index]
    assert tops == pytest.approx([6.8 * (i + 1) for i in range(6)])
    assert list(curves(axis)) == ["step"]
    assert axis.get_ylim()[0] == 0.0


def test_flips_are_percent_and_zeros_have_no_place_on_a_log_axis() -> None:
    steps = np.array([10.0, 20.0, 30.0])
    series = {"Quantization/Flips_Encoder": (steps, np.array([0.02, 0.0, 0.01]))}
    (axis,) = curves_figure(ABOUT, "Flips", FLIPS, series).axes
    shown = curves(axis)["Encoder"][1]
    assert (shown[0], math.isnan(shown[1]), shown[2]) == (2.0, True, 1.0)
    assert axis.get_yscale() == "log"
    assert not has_any(FLIPS, {"Quantization/Flips_Encoder": (steps, np.zeros(3))})


def test_long_runs_keep_their_extremes() -> None:
    values = np.ones(100_000)
    values[77_777], values[3] = 9.0, 0.5
    steps = np.arange(100_000.0)
    series = {"Training/Learning_Rate": (steps, values)}
    axis = curves_figure(ABOUT, "Schedule", SCHEDULE, series).axes[0]
    shown = np.asarray(axis.lines[0].get_ydata())
    assert len(shown) <= 2000
    assert (shown.min(), shown.max()) == (0.5, 9.0)


@pytest.mark.parametrize("panels", [LOSSES, THROUGHPUT, SCHEDULE, GRADIENTS, FLIPS])
@pytest.mark.parametrize("value", [math.nan, 0.0, 1e-30, 1e30])
def test_one_log_of_any_value(panels: tuple, value: float) -> None:
    series = {name: (np.array([5.0]), np.array([value])) for name in METRICS if name != "Training/Phase"}
    figure = curves_figure(ABOUT, "Heading", panels, series)
    figure.canvas.draw()
    assert ("not logged in this run" in texts(figure)) == (not has_any(panels, series)) or value == 0.0

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bitmar.observability.plots import main, phase_spans, read_series, write_plots
from bitmar.observability.records import JsonlSink
from bitmar.observability.schema import SCHEMA


def fake_run(run_dir: Path, steps: int = 60) -> None:
    sink = JsonlSink(run_dir)
    for step in range(0, steps, 2):
        values = {metric.name: 1.0 + step / 10 for metric in SCHEMA if not metric.name.startswith("Validation/")}
        sink.log(step, {**values, "Training/Phase": float(step // 20), "Training/Loss": 9.0 - step / 20})
        if step % 10 == 0:
            sink.log(step, {"Validation/Loss": 5.0, "Validation/Loss_Shuffled_Vision": math.nan})
    sink.close()


def test_plots_are_written_and_not_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, title, **options: titles.append(title))
    fake_run(tmp_path)
    paths = write_plots(tmp_path, phase_names=("text", "align"), generated=True)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/losses.png",
        "plots/throughput.png",
        "plots/schedule.png",
    ]
    for path in paths:
        image = imread(path)
        assert image.shape[1] == 1650  # 11 inches at 150 DPI
        assert np.mean(image[..., :3] < 0.9) > 0.005
    assert all(title.endswith("(generated data)") for title in titles)
    write_plots(tmp_path)
    assert not any("generated" in title for title in titles[3:])


def test_series_keep_steps_and_gaps(tmp_path: Path) -> None:
    fake_run(tmp_path, steps=12)
    series = read_series(tmp_path / "metrics.jsonl")
    steps, values = series["Validation/Loss_Shuffled_Vision"]
    assert steps.tolist() == [0, 10]
    assert np.isnan(values).all()
    assert "time" not in series
    assert "nonfinite" not in series


def test_phases_become_stretches(tmp_path: Path) -> None:
    fake_run(tmp_path)
    assert phase_spans(read_series(tmp_path / "metrics.jsonl")) == [(0, 0, 20), (1, 20, 40), (2, 40, 58)]
    assert phase_spans({}) == []


def test_one_log_is_enough_and_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics to plot"):
        write_plots(tmp_path)
    sink = JsonlSink(tmp_path)
    sink.log(0, {"Training/Loss": math.nan, "Gradients/Total_Norm": 0.0})
    sink.close()
    assert len(write_plots(tmp_path)) == 3


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run(tmp_path)
    main([str(tmp_path), "--phases", "text", "align", "memory"])
    assert capsys.readouterr().out.splitlines()[0].endswith("losses.png")

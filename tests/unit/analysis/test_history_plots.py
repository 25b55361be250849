"""Pictures show the numbers that they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from bitmar.analysis.head_statistics import KindAnalysis, analyse, movers
from bitmar.analysis.history_plots import (
    consistency_figure,
    layers_figure,
    movers_figure,
    patterns_figure,
    stability_figure,
)
from bitmar.observability.drawing import About

ABOUT = About("run", 90)


def kind(name: str = "encoder", steps: int = 9, layers: int = 3, heads: int = 4) -> KindAnalysis:
    x = np.random.default_rng(0).gamma(1.0, 0.01, (steps, layers, heads))
    x[:, 0, 1] = np.nan
    return analyse(name, 10 * np.arange(1, steps + 1), x, 4)


def test_the_heat_map_is_the_consistency() -> None:
    a = kind()
    axis, bar = consistency_figure(ABOUT, a).axes
    shown = np.ma.asarray(axis.images[0].get_array()).filled(np.nan)
    np.testing.assert_array_equal(shown, 100 * a.consistency.reshape(3, 4))
    assert np.isnan(shown[0, 1])
    assert axis.get_title("left") == "of 3 x 4 heads, at 9 analysis steps; grey: 1 never measured"
    assert (axis.get_xlabel(), axis.get_ylabel(), bar.get_ylabel()) == ("head", "layer", "share of steps")


def test_stability_is_drawn_where_there_are_two_steps_and_two_heads() -> None:
    a = kind()
    figure = stability_figure(ABOUT, [a, kind("decoder", steps=1), kind("memory", layers=1, heads=2)])
    assert figure is not None
    (axis,) = figure.axes
    before, last = axis.lines
    np.testing.assert_array_equal(np.asarray(before.get_xydata()), np.stack([a.steps, a.to_previous], 1))
    np.testing.assert_array_equal(np.asarray(last.get_ydata()), a.to_last)
    assert axis.get_title("left") == "Encoder: 12 heads"


def test_layers_are_bars_of_the_mean_and_dots_of_the_last_step() -> None:
    a = kind()
    figure = layers_figure(ABOUT, [a, kind("cross_modal", layers=1)])
    assert figure is not None
    share, top = figure.axes
    for axis, values in ((share, 100 * a.layer_share), (top, a.layer_top)):
        np.testing.assert_allclose([bar.get_height() for bar in axis.patches], values.mean(0))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(axis.lines[0].get_ydata()), values[-1])


def test_movers_are_named_with_their_ranks_from_the_largest_rise_to_the_largest_fall() -> None:
    a = kind()
    figure = movers_figure(ABOUT, [a])
    assert figure is not None
    (axis,) = figure.axes
    widths = [bar.get_width() for bar in axis.patches]  # type: ignore[attr-defined]
    assert widths == sorted(widths, reverse=True)
    rose, fell = movers(a)
    np.testing.assert_array_equal(widths, a.rise[[*rose, *fell[::-1]]])
    first = axis.get_yticklabels()[0].get_text().split()
    place = rose[0]
    assert first == [f"L{place // 4}H{place % 4}", f"{a.early_rank[place]:.0f}", "→", f"{a.late_rank[place]:.0f}"]


def test_patterns_are_a_line_a_head_and_their_mean() -> None:
    steps, x = np.array([10, 20, 30]), np.random.default_rng(0).uniform(0, 1, (3, 1, 4))
    nothing = np.full((3, 1, 1), np.nan)
    figures = {
        "cross_modal": {"Importance": x, "Entropy": x + 1, "Concentration": x},
        "memory": {"Importance": nothing, "Entropy": x[..., :1], "Concentration": nothing},
    }
    figure = patterns_figure(ABOUT, steps, figures)
    assert figure is not None
    assert len(figure.axes) == 6
    *heads, middle = figure.axes[0].lines
    np.testing.assert_array_equal([np.asarray(line.get_ydata()) for line in heads], x.reshape(3, 4).T)
    np.testing.assert_allclose(np.asarray(middle.get_ydata()), x.mean((1, 2)))
    np.testing.assert_allclose(np.asarray(figure.axes[4].lines[-1].get_ydata()), 100 * x.mean((1, 2)))
    assert [axis.texts[0].get_text() for axis in (figure.axes[1], figure.axes[5])] == ["not measured in this run"] * 2
    assert len(figure.axes[3].lines) == 1


def test_nothing_to_show_is_no_picture() -> None:
    one = kind(steps=1, layers=1)
    assert stability_figure(ABOUT, [one]) is None
    assert layers_figure(ABOUT, [one]) is None
    assert movers_figure(ABOUT, [one]) is None
    empty = {"memory": {name: np.full((2, 1, 1), np.nan) for name in ("Importance", "Entropy", "Concentration")}}
    assert patterns_figure(ABOUT, np.array([1, 2]), empty) is None
    assert patterns_figure(ABOUT, np.array([1, 2]), {}) is None


@pytest.mark.parametrize(("layers", "heads"), [(1, 2), (24, 16), (200, 64)])
def test_every_size_is_drawn(layers: int, heads: int) -> None:
    a = kind(steps=3, layers=layers, heads=heads)
    for figure in (consistency_figure(ABOUT, a), layers_figure(ABOUT, [a]), movers_figure(ABOUT, [a])):
        if figure is not None:
            figure.canvas.draw()
            assert figure.get_size_inches()[1] < 8

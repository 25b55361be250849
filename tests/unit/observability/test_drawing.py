from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bitmar.observability import drawing as d

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=400)


@given(VALUES, st.integers(3, 50))
def test_thinning_keeps_ends_extremes_and_order(numbers: list[float], limit: int) -> None:
    values = np.array(numbers)
    kept = d.thinned(values, limit)
    assert len(kept) <= max(limit, 4)
    assert (np.diff(kept) > 0).all()
    if len(values):
        assert kept[0] == 0
        assert kept[-1] == len(values) - 1
    finite = values[np.isfinite(values)]
    if len(finite):
        shown = values[kept]
        shown = shown[np.isfinite(shown)]
        assert (shown.min(), shown.max()) == (finite.min(), finite.max())


def test_a_long_curve_keeps_each_spike_and_gap() -> None:
    values = np.sin(np.arange(100_000) / 500.0)
    values[71_234] = 50.0
    values[40_000:40_300] = np.nan
    kept = d.thinned(values)
    assert len(kept) <= d.CURVE_POINTS
    assert 71_234 in kept
    assert np.isnan(values[kept]).any()


def test_a_short_curve_stays_as_it_is() -> None:
    assert d.thinned(np.arange(7.0)).tolist() == list(range(7))
    assert d.thinned(np.empty(0)).tolist() == []


@given(st.integers(0, 5000), st.integers(1, 400))
def test_groups_are_even_and_whole(count: int, limit: int) -> None:
    starts = d.groups(count, limit)
    assert len(starts) == min(count, limit)
    if count:
        sizes = np.diff([*starts, count])
        assert starts[0] == 0
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1


@given(st.lists(st.integers(), max_size=300), st.integers(1, 50))
def test_some_of_many_hold_the_last(things: list[int], limit: int) -> None:
    chosen = d.evenly(list(enumerate(things)), limit)
    assert len(chosen) == min(len(things), limit)
    assert chosen == sorted(chosen)
    assert chosen[-1:] == list(enumerate(things))[-1:]


@given(st.integers(1, 3000), st.integers(1, 20))
def test_ticks_are_few_and_even(count: int, most: int) -> None:
    ticks = d.every(count, most)
    assert 1 <= len(ticks) <= most
    assert ticks[0] == 0
    assert len(set(np.diff(ticks).tolist())) <= 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo", "photo"),
        ("ﬁsh", "ﬁsh"),
        ("漢", "\\u6f22"),
        ("🐎", "\\U0001f40e"),
        ("שלום", "שלום"),
        ("a\tb\x00", "a\\tb\\x00"),
        ("\u200b", "\\u200b"),
        ("\xa0", "\\xa0"),
        ("\ud800", "\\ud800"),
        ("a b", "a b"),
    ],
)
def test_what_the_font_lacks_is_shown_as_its_code(text: str, shown: str) -> None:
    assert d.shown(text) == shown


@given(st.text(max_size=8))
@example("$$")  # no formula
@example("\U0001d5a0")  # the regular font has it, the bold one of titles does not
def test_no_text_is_too_strange_to_draw(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d.styled(drawn)(text)


def drawn(text: str) -> None:
    figure = d.new_figure(d.About(text, 3), "Heading", 1.0)
    figure.set_layout_engine("none")
    figure.canvas.draw()  # type: ignore[attr-defined]


@given(st.text(max_size=30), st.integers(1, 20))
def test_shortened_texts_fit(text: str, letters: int) -> None:
    assert len(d.shortened(text, letters)) <= letters


def test_the_look_is_not_left_behind() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    d.styled(lambda: None)()
    assert dict(matplotlib.rcParams) == before


@d.styled
def extent_in(text: str, size: float) -> float:
    figure = Figure(dpi=d.DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    return figure.text(0, 0, text, size=size).get_window_extent(renderer).width / d.DPI


@given(st.lists(st.text("abcWil .-109\n", max_size=12), min_size=1, max_size=4), st.sampled_from([9.0, 10.0, 11.0]))
def test_a_width_is_that_of_the_text_when_it_is_drawn(texts: list[str], size: float) -> None:
    widest = max(extent_in(text, size) for text in texts)
    assert d.widest_in(texts, size) == pytest.approx(widest, abs=0.05)  # half a letter: what stands beside ink

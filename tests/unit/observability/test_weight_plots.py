from __future__ import annotations

import numpy as np

from bitmar.observability.board import Arrays
from bitmar.observability.drawing import About
from bitmar.observability.weight_plots import latents_figure, stretches, value_shares, weights_figure
from tests.support.picture_runs import matrices

ABOUT = About("run", 40)
NAMES = (
    "encoder.blocks.0.a",
    "encoder.blocks.10.a",
    "encoder.blocks.2.a",
    "encoder.latent",
    "decoder.blocks.0.a",
    "x.y",
)


def record(names: tuple[str, ...] = NAMES) -> Arrays:
    count = len(names)
    return {
        "step": np.array(40),
        "matrices": np.array(names),
        "size": np.full(count, 100.0),
        "zeros": np.linspace(30.0, 40.0, count),
        "plus": np.full(count, 20.0),
        "scale": np.linspace(0.1, 0.2, count),
    }


def latents(samples: int = 30, sources: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    plane = {key: rng.normal(size=(samples, 2)) for key in ("text", "vision")}
    shares = {f"{key}_shares": np.array([0.4, 0.2]) for key in plane}
    names = np.array([f"source {i}" for i in range(sources)])
    return {"step": np.array(40), "sources": np.arange(samples) % sources, "names": names, **plane, **shares}


def test_layers_stand_in_the_order_of_the_model() -> None:
    found = [(s.component, s.layer, s.matrices) for s in stretches(NAMES)]
    assert found == [
        ("Encoder", 0, (0,)),
        ("Encoder", 2, (2,)),
        ("Encoder", 10, (1,)),
        ("Encoder", None, (3,)),
        ("Decoder", 0, (4,)),
        ("X", None, (5,)),
    ]


def test_every_matrix_has_its_place() -> None:
    names = matrices(12)
    placed = [place for stretch in stretches(names) for place in stretch.matrices]
    assert sorted(placed) == list(range(len(names)))


def test_three_bars_of_a_component_are_its_shares() -> None:
    shares = value_shares(record())
    assert list(shares) == ["Encoder", "Decoder"]
    np.testing.assert_allclose(shares["Encoder"], (0.8 - 0.33, 0.33, 0.2))
    figure = weights_figure(ABOUT, record())
    assert figure is not None
    heights = np.array([bar.get_height() for bar in figure.axes[0].patches]).reshape(3, 2)  # type: ignore[attr-defined]
    np.testing.assert_allclose(heights, 100 * np.array(list(shares.values())).T)


def test_sparsity_and_scale_by_layer() -> None:
    figure = weights_figure(ABOUT, record())
    assert figure is not None
    order = [0, 2, 1, 3, 4, 5]
    for axis, values in ((figure.axes[1], record()["zeros"]), (figure.axes[2], record()["scale"])):
        dots = [np.asarray(c.get_offsets()) for c in axis.collections if len(np.asarray(c.get_offsets())) == 1]
        dots = [dot[0] for dot in dots if dot[0][0] or dot[0][1]]
        np.testing.assert_allclose(dots[: len(order)], [(i, values[place]) for i, place in enumerate(order)])
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "2", "10", "+", "0", "+"]


def test_no_weights_are_no_picture() -> None:
    assert weights_figure(ABOUT, record(names=())) is None
    assert weights_figure(ABOUT, record() | {"size": np.zeros(len(NAMES))}) is None


def test_latents_are_coloured_by_source() -> None:
    values = latents()
    figure = latents_figure(ABOUT, values)
    assert figure is not None
    for axis, key in zip(figure.axes, ("text", "vision"), strict=True):
        assert len(axis.collections) == 3
        for source, dots in enumerate(axis.collections):
            np.testing.assert_array_equal(dots.get_offsets(), values[key][values["sources"] == source])
        assert axis.get_xlabel() == "component 1 (40% of variance)"
    colours = {tuple(np.asarray(dots.get_facecolor())[0]) for dots in figure.axes[0].collections}
    assert len(colours) == 3


def test_more_sources_than_colours_differ_by_marker() -> None:
    figure = latents_figure(ABOUT, latents(samples=60, sources=20))
    assert figure is not None
    looks = {
        (tuple(np.asarray(dots.get_facecolor())[0]), np.asarray(dots.get_paths()[0].vertices).tobytes())
        for dots in figure.axes[0].collections
    }
    assert len(looks) == 20


def test_latents_that_are_not_finite() -> None:
    values = latents()
    values["text"][:] = np.nan
    values["sources"][0] = 99  # no name
    figure = latents_figure(ABOUT, values)
    assert figure is not None
    assert figure.axes[0].texts[0].get_text() == "not finite"
    values["vision"][:] = np.inf
    assert latents_figure(ABOUT, values) is None

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import AxesImage

from bitmar.observability.attention_plots import (
    cross_modal_figure,
    distribution_figure,
    heads_figure,
    importance_figure,
    importance_over_time,
    of_kinds,
    patterns_figure,
    sorted_heads,
    timeline_figure,
    word_labels,
)
from bitmar.observability.board import Arrays
from bitmar.observability.drawing import About

ABOUT = About("run", 40)


def heads(step: int = 40, layers: int = 2, count: int = 4, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed + step)
    shapes = {"Encoder": (layers, count), "CrossModal": (1, count), "Memory": (1, 1)}
    arrays = {f"{kind}_Importance": rng.uniform(1, 2, shape) for kind, shape in shapes.items()}
    arrays |= {f"{kind}_Entropy": rng.uniform(1, 2, shape) for kind, shape in shapes.items()}
    return {"step": np.array(step), "Encoder_First_Token": rng.uniform(0, 1, (layers, count)), **arrays}


def test_heatmaps_are_the_importances_raw_and_sorted() -> None:
    arrays = heads()
    figure = importance_figure(ABOUT, arrays)
    assert figure is not None
    encoder, ordered, cross, cross_ordered = figure.axes[:4]
    assert [axis.get_title("left") for axis in (encoder, cross)] == ["Encoder", "Cross-modal"]  # Memory: one head
    for axis, key, order in (
        (encoder, "Encoder", False),
        (ordered, "Encoder", True),
        (cross, "CrossModal", False),
        (cross_ordered, "CrossModal", True),
    ):
        values = arrays[f"{key}_Importance"]
        np.testing.assert_array_equal(shown(axis.images[0]), np.sort(values, axis=1)[:, ::-1] if order else values)


def test_dead_heads_are_counted_and_marked() -> None:
    arrays = heads()
    arrays["Encoder_Importance"][1, 2] = 1e-6
    figure = importance_figure(ABOUT, arrays)
    assert figure is not None
    assert figure.axes[0].get_title("left") == "Encoder: 1 dead (x)"
    assert np.asarray(figure.axes[0].collections[0].get_offsets()).tolist() == [[2.0, 1.0]]


def test_what_is_not_finite_is_sorted_last() -> None:
    values = sorted_heads(np.array([[1.0, np.nan, 3.0, np.inf]]))
    np.testing.assert_array_equal(values, [[3.0, 1.0, np.nan, np.nan]])


def test_distribution_has_a_dot_a_head() -> None:
    arrays = heads()
    figure = distribution_figure(ABOUT, arrays)
    assert figure is not None
    entropy, concentration, first = figure.axes
    dots = np.asarray(entropy.collections[0].get_offsets())
    np.testing.assert_array_equal(dots[:, 1], arrays["Encoder_Entropy"].ravel())
    np.testing.assert_array_equal(np.round(dots[:, 0]), np.arange(2).repeat(4))
    assert concentration.texts[0].get_text() == "not measured in this run"
    np.testing.assert_allclose(
        np.asarray(first.collections[0].get_offsets())[:, 1], 100 * arrays["Encoder_First_Token"].ravel()
    )


def test_the_timeline_names_the_most_important() -> None:
    logs = [heads(step) for step in (10, 20, 30)]
    logs[-1]["Encoder_Importance"][1, 3] = 9.0
    figure = timeline_figure(ABOUT, logs)
    assert figure is not None
    named = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    assert (len(named), named[0].get_label()) == (5, "L1H3")
    assert np.asarray(named[0].get_ydata()).tolist() == [x["Encoder_Importance"][1, 3] for x in logs]
    assert len(figure.axes[0].lines) == 8


def test_heads_that_were_pruned_are_not_named() -> None:
    logs = [heads(step) for step in (10, 20)]
    for log in logs:
        log["Encoder_Importance"][:, 1:] = np.nan
    figure = timeline_figure(ABOUT, logs)
    assert figure is not None
    named = {line.get_label() for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    assert named == {"L0H0", "L1H0"}
    assert figure.axes[0].get_title("left") == "Encoder"


def shown(image: AxesImage) -> np.ndarray:
    return np.ma.asarray(image.get_array()).filled(np.nan)


def test_heads_of_a_kind_stand_by_layer_and_by_rank() -> None:
    arrays = heads()
    arrays["Encoder_Importance"][0, 2] = np.nan
    figure = heads_figure(ABOUT, arrays, "encoder")
    assert figure is not None
    raw, ranked = figure.axes[:2]
    values = arrays["Encoder_Importance"]
    np.testing.assert_array_equal(shown(raw.images[0]), values)
    rest = np.sort(values[np.isfinite(values)])[::-1]
    np.testing.assert_array_equal(shown(ranked.images[0]), [rest[:4], [*rest[4:], np.nan]])
    layer, head = divmod(int(np.nanargmax(values)), 4)
    texts = [text.get_text() for text in ranked.texts]
    assert (len(texts), texts[0]) == (7, f"L{layer}H{head}: {rest[0]:.2g}")
    assert not any("L0H2" in text for text in texts)
    assert [label.get_text() for label in ranked.get_yticklabels()] == ["1\N{EN DASH}4", "5\N{EN DASH}8"]


def test_a_single_head_is_a_picture_too() -> None:
    figure = heads_figure(ABOUT, heads(), "memory")
    assert figure is not None
    assert [text.get_text().partition(":")[0] for text in figure.axes[1].texts] == ["L0H0"]


def test_a_kind_that_was_not_analysed_has_no_picture() -> None:
    assert heads_figure(ABOUT, heads(), "decoder") is None


def patterns(count: int, words: int, keys: int) -> Arrays:
    rng = np.random.default_rng(0)
    places = np.stack([np.arange(count) // 4, np.arange(count) % 4], axis=1)
    weights = rng.uniform(0, 1, (count, words, keys)).astype(np.float32)
    named = np.array([f" w{i}" for i in range(words)], dtype=np.str_)
    return {"heads": places, "importance": 0.5 - 0.01 * np.arange(count), "weights": weights, "words": named}


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (2, 2), (4, 4), (10, 10), (12, 12), (20, 12)])
def test_patterns_are_a_map_a_head(count: int, drawn: int) -> None:
    found = patterns(count, 5, 5)
    figure = patterns_figure(ABOUT, "decoder", found)
    assert figure is not None
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title("left") for axis in maps[:2]] == ["L0H0, 0.5 nats", "L0H1, 0.49 nats"][:count]
    assert len(maps) == drawn
    for axis, weights in zip(maps, found["weights"], strict=False):
        np.testing.assert_array_equal(shown(axis.images[0]), weights)
        assert axis.images[0].get_clim() == (0.0, found["weights"].max())
    words = [f"w{i}" for i in range(5)]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == words
    assert [label.get_text() for label in maps[-1].get_xticklabels()] == words


def test_long_captions_have_the_words_that_fit() -> None:
    figure = patterns_figure(ABOUT, "encoder", patterns(3, 64, 64))
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["w0", "w5"]
    assert figure.axes[0].images[0].get_size() == (64, 64)


@pytest.mark.parametrize(("kind", "told"), [("cross_modal", "vision token"), ("memory", "memory slot")])
def test_what_is_no_word_is_numbered(kind: str, told: str) -> None:
    figure = patterns_figure(ABOUT, kind, patterns(1, 5, 40))
    assert figure is not None
    assert figure.get_supxlabel() == told
    assert figure.axes[0].get_xticks().tolist() == list(range(0, 40, 3))


def test_weights_of_either_sign_stand_around_zero() -> None:
    found = patterns(1, 3, 4)
    found["weights"][0, 0, 0] = -2.0
    figure = patterns_figure(ABOUT, "memory", found)
    assert figure is not None
    assert figure.axes[0].images[0].get_clim() == (-2.0, 2.0)


def test_patterns_without_a_number_are_no_picture() -> None:
    assert patterns_figure(ABOUT, "memory", patterns(0, 3, 4)) is None
    found = patterns(2, 3, 4)
    assert patterns_figure(ABOUT, "memory", {**found, "words": found["words"][:2]}) is None
    assert patterns_figure(ABOUT, "memory", {**found, "weights": found["weights"] * np.nan}) is None
    empty = {**found, "weights": found["weights"] * 0}  # nothing is written yet
    figure = patterns_figure(ABOUT, "memory", empty)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["all weights are 0"]


def test_logs_of_another_shape_are_left_out_of_the_timeline() -> None:
    steps, values = importance_over_time([heads(10, layers=3), heads(20), {"step": np.array(25)}, heads(30)], "Encoder")
    assert (steps.tolist(), values.shape) == ([20.0, 30.0], (2, 2, 4))


def test_nothing_to_show_is_no_picture() -> None:
    for arrays in ({"step": np.array(1)}, {"step": np.array(1), "Encoder_Importance": np.full((2, 2), np.nan)}):
        assert of_kinds(arrays, "Importance") == {}
        assert distribution_figure(ABOUT, arrays) is None
        assert importance_figure(ABOUT, arrays) is None
        assert timeline_figure(ABOUT, [arrays]) is None
    assert timeline_figure(ABOUT, []) is None


def test_words_become_labels() -> None:
    words = ["<bos>", "a", " gold", "en", " horse", ".", " ", "\n", "漢", "<eos>", "next"]
    labels = ["<bos>", "a", "gold", "-en", "horse", ".", "(space)", "(space)", "-\\u6f22", "<eos>", "next"]
    assert word_labels(words) == labels
    assert word_labels([" " + "x" * 40]) == ["x" * 11 + "…"]


@pytest.mark.parametrize("captions", [1, 2, 3, 100])
def test_maps_are_the_weights_without_padding(captions: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array([["<bos>", " a", " dog", *([" runs"] if i % 2 else [""])] for i in range(captions)])
    weights = rng.uniform(0, 1, (captions, 4, 6)).astype(np.float32)
    figure = cross_modal_figure(ABOUT, words, weights)
    assert figure is not None
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == min(captions, 4)
    for i, axis in enumerate(maps):
        np.testing.assert_array_equal(np.ma.asarray(axis.images[0].get_array()), weights[i, : 3 + i % 2])
        assert [label.get_text() for label in axis.get_yticklabels()] == ["<bos>", "a", "dog", "runs"][: 3 + i % 2]


def test_a_long_caption_is_cut_and_says_so() -> None:
    figure = cross_modal_figure(ABOUT, np.array([[" w"] * 64]), np.ones((1, 64, 4)))
    assert figure is not None
    assert figure.axes[0].get_title("left") == "caption 1 of 1, 30 of 64 tokens"


def test_captions_without_a_number_are_left_out() -> None:
    words = np.array([["a", "b"], ["c", ""], ["", ""]])
    weights = np.ones((3, 2, 4))
    weights[0] = np.nan
    figure = cross_modal_figure(ABOUT, words, weights)
    assert figure is not None
    assert figure.axes[0].get_title("left") == "caption 2 of 3"
    assert cross_modal_figure(ABOUT, words[:1], weights[:1]) is None
    assert cross_modal_figure(ABOUT, words[:0], weights[:0]) is None

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitmar.head_names import HeadName
from bitmar.model.attention import Heads
from bitmar.observability.head_analysis import analyse, remove_after, top_heads, without_step
from bitmar.observability.probes import Caption, first_caption
from bitmar.watch_config import AttentionAnalysisConfig
from tests.support.batches import caption_batch, text_batch

NAN = np.nan


@pytest.mark.parametrize(
    ("importance", "most", "expected"),
    [
        ([[1.0, 3.0], [2.0, 4.0]], 3, [[1, 1], [0, 1], [1, 0]]),
        ([[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]], 6, [[0, 1], [1, 0], [1, 2], [0, 0], [0, 2], [1, 1]]),  # ties
        ([[NAN, 1.0], [5.0, NAN]], 4, [[1, 0], [0, 1]]),
        ([[np.inf, 1.0], [-np.inf, 0.0]], 4, [[0, 1], [1, 1]]),
        ([[NAN, NAN]], 2, []),
        ([[0.5]], 10, [[0, 0]]),
    ],
)
def test_top_heads(importance: list[list[float]], most: int, expected: list[list[int]]) -> None:
    found = top_heads(np.array(importance), most)
    assert found.dtype == np.int64
    assert found.shape == (len(expected), 2)
    assert found.tolist() == expected


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"Encoder": (2, 3), "Decoder": (1, 3), "CrossModal": (1, 3), "Memory": (1, 1)}
    figures = ("Importance", "Entropy")
    found = {f"Attention/Heads_{kind}_{what}": rng.random(shape) for kind, shape in shapes.items() for what in figures}
    return {**found, "Quantization/Matrix_Size": np.ones(3)}


def test_an_analysis_has_the_figures_of_all_heads_and_names_the_first() -> None:
    found = analyse(arrays(), AttentionAnalysisConfig(track_top_k=2), None)
    assert found is not None
    assert found.figures.keys() == {name.partition("/Heads_")[2] for name in arrays() if "Heads_" in name}
    assert {kind: top.shape for kind, top in found.top.items()} == {
        **dict.fromkeys(("encoder", "decoder", "cross_modal"), (2, 2)),
        "memory": (1, 2),
    }
    best = found.figures["Encoder_Importance"].argmax()
    assert found.top["encoder"][0].tolist() == [best // 3, best % 3]
    assert found.patterns == {}


def test_kinds_that_are_off_are_left_out() -> None:
    config = AttentionAnalysisConfig(analyze_memory_attention=False, analyze_cross_modal=False)
    assert config.kinds == ("encoder", "decoder")
    found = analyse(arrays(), config, None)
    assert found is not None
    assert {name.partition("_")[0] for name in found.figures} == {"Encoder", "Decoder"}
    assert found.top.keys() == {"encoder", "decoder"}


def test_a_log_without_a_pass_has_no_analysis() -> None:
    assert analyse({"Quantization/Matrix_Size": np.ones(3)}, AttentionAnalysisConfig(), None) is None


def test_patterns_are_those_of_the_top_heads_in_their_order() -> None:
    importance = {"Attention/Heads_Encoder_Importance": np.array([[1.0, NAN], [NAN, 2.0]])}
    weights = {HeadName("encoder", l, h): torch.full((2, 2), 10.0 * l + h) for l in range(2) for h in range(2)}  # noqa: E741
    caption = Caption(torch.tensor([5, 6]), weights)
    found = analyse(importance, AttentionAnalysisConfig(), caption)
    assert found is not None
    assert found.patterns["encoder"][:, 0, 0].tolist() == [11.0, 0.0]
    files = dict(found.files(30, "t{}".format))
    assert list(files) == ["heads_step_30.npz", "top_heads_encoder_step_30.npy", "head_patterns_encoder_step_30.npz"]
    told = files["head_patterns_encoder_step_30.npz"]
    assert isinstance(told, dict)
    assert told["importance"].tolist() == [2.0, 1.0]
    assert told["words"].tolist() == ["t5", "t6"]
    assert (told["weights"].dtype, told["heads"].tolist(), int(told["step"])) == (np.float32, [[1, 1], [0, 0]], 30)


def test_no_head_has_no_patterns() -> None:
    importance = {"Attention/Heads_Encoder_Importance": np.full((1, 2), NAN)}
    found = analyse(importance, AttentionAnalysisConfig(), Caption(torch.tensor([5]), {}))
    assert found is not None
    assert found.patterns == {}
    assert found.top["encoder"].shape == (0, 2)


def heads_of(weights: torch.Tensor, numbers: tuple[int, ...]) -> Heads:
    """What a layer of two heads, of which others may be pruned, shows."""
    return Heads(weights, weights.new_zeros(*weights.shape[:3], 1), torch.ones(weights.shape[:2]), numbers, 2)


def test_a_caption_is_the_first_that_counts_without_its_padding() -> None:
    batch = caption_batch(rows=4, length=9)
    valid = torch.tensor([False, True, True, True])
    batch = batch.replace(valid=valid, has_vision=valid)
    shape = (4, 2, 9)
    shown = {
        "encoder": [heads_of(torch.rand(*shape, 9), (0, 1)) for _ in range(2)],
        "cross_modal": [heads_of(torch.rand(*shape, 3), (0, 1))],
    }
    found = first_caption(shown, batch, ("encoder", "cross_modal"))
    assert found is not None
    length = int((batch.segments[1] > 0).sum())
    assert length < 9
    assert torch.equal(found.tokens, batch.tokens[1, :length])
    assert len(found.weights) == 2 * 2 + 2
    torch.testing.assert_close(
        found.weights[HeadName("encoder", 1, 0)], shown["encoder"][1].weights[1, 0, :length, :length]
    )
    torch.testing.assert_close(
        found.weights[HeadName("cross_modal", 0, 1)], shown["cross_modal"][0].weights[1, 1, :length]
    )
    shown["encoder"][1].weights.zero_()
    assert found.weights[HeadName("encoder", 1, 0)].any()  # a copy


def test_heads_keep_their_numbers_where_others_were_pruned() -> None:
    batch = caption_batch(rows=4, length=5)
    layers = [heads_of(torch.rand(4, len(numbers), 5, 5), numbers) for numbers in ((0, 1), (1,))]
    found = first_caption({"encoder": layers}, batch, ("encoder",))
    assert found is not None
    assert set(map(str, found.weights)) == {"encoder.L0H0", "encoder.L0H1", "encoder.L1H1"}
    torch.testing.assert_close(found.weights[HeadName("encoder", 1, 1)], layers[1].weights[0, 0])


def test_rows_without_an_image_are_no_captions() -> None:
    assert first_caption({}, text_batch(), ()) is None


def test_files_of_later_steps_are_removed_and_no_others(tmp_path: Path) -> None:
    remove_after(tmp_path / "missing", 0)
    names = [
        f"{name}_step_{{}}.{end}"
        for name, end in (
            *(("heads", "npz"), ("top_heads_cross_modal", "npy"), ("head_patterns_memory", "npz"), ("heads", "tmp")),
            *(("attention_heads_decoder", "png"), ("attention_timeline", "png"), ("attention_timeline", "png.tmp")),
        )
    ]
    others = ["heads_step_9.txt", "my_heads_step_9.npz", "heads_step_x.npz", "top_heads_all_step_9.npy"]
    for name in [*(name.format(step) for name in names for step in (5, 6, 10)), *others]:
        (tmp_path / name).touch()
    remove_after(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {name.format(5) for name in names} | set(others)


def test_a_picture_has_one_name_at_all_steps() -> None:
    assert without_step(Path("a/attention_heads_encoder_step_120.png")) == "attention_heads_encoder"
    assert without_step(Path("plots/losses.png")) == "losses"

"""What the demo page asks of a model: words as generate has them, a memory of its own, recall by an image alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmar.config import ConfigError
from bitmar.generation.generate import generate
from bitmar.generation.sampling import Sampling
from shards.record import DataError
from shards.tokenizer import BOS, EOS
from tests.support.demos import CAPTIONS, WIDTH, image, made
from tools.demo_page.pairs import Pair, own_vector
from tools.demo_page.pictures import image_picture, memory_picture, recall_picture, slot_label
from tools.demo_page.session import Demo, Recalled, SessionMemory, Word

FEW = Sampling(max_tokens=6)
DRAWN = Sampling(max_tokens=9, temperature=1.2, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return made(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("sampling", [FEW, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("seeing", [True, False])
@pytest.mark.parametrize("prompt", ["", "a dog"])
def test_words_are_those_of_generate(demo: Demo, sampling: Sampling, seeing: bool, prompt: str) -> None:
    memory, vector = demo.memory_at_start(), image(1) if seeing else None
    words = list(demo.write(memory, vector, prompt, sampling))
    begin = demo.tokenizer.encode_batch([prompt]).tokens.tolist()
    vectors = None if vector is None else vector[None]
    found = generate(demo.model, memory.state, [[BOS, *begin]], vectors, sampling, 32)[0]
    assert [word.token for word in words if word.given] == begin
    written = [word.token for word in words if not word.given]
    assert written == [*found.tokens, *([EOS] if found.ended else [])]
    chances = [word.chance for word in words if not word.given]
    assert np.log(chances).sum() == pytest.approx(found.log_probability, rel=1e-4)
    assert demo.text(words).startswith(prompt)


def test_each_word_has_the_attention_that_predicted_it(demo: Demo) -> None:
    words = list(demo.write(demo.memory_at_start(), image(1), "a dog", FEW))
    other = list(demo.write(demo.memory_at_start(), image(1), "a cat", FEW))
    assert words[0].token == other[0].token
    for layer, same in zip(words[0].cross_modal, other[0].cross_modal, strict=True):
        np.testing.assert_array_equal(layer, same)
    for word in words:
        assert [layer.shape for layer in word.cross_modal] == [(2, 3)]
        np.testing.assert_allclose(word.cross_modal[0].sum(-1), 1, rtol=1e-6)
        assert word.memory.shape == (7,)
        assert 0 < word.memory.sum() < 1
    assert all(word.cross_modal == () for word in demo.write(demo.memory_at_start(), None, "", FEW))


def test_an_empty_memory_is_read_for_nothing(demo: Demo) -> None:
    words = list(demo.write(demo.empty_memory(), image(1), "", FEW))
    assert not any(word.memory.any() for word in words)
    assert demo.recall(demo.empty_memory(), image(1)).best(5) == []
    assert demo.recall(demo.empty_memory(), image(1)).nothing == pytest.approx(1)


def test_an_episode_is_recalled_by_its_image(demo: Demo) -> None:
    before = demo.empty_memory()
    memory, slot = demo.remember(before, image(1), CAPTIONS[0], "key-1")
    assert (before.used, memory.used) == (0, 1)
    assert memory.episodes[slot].caption == CAPTIONS[0]
    assert not memory.episodes[slot].blended
    recalled = demo.recall(memory, image(1))
    assert recalled.best(3) == [slot]
    assert recalled.nothing == pytest.approx(1 - recalled.weights[slot])
    again, taken = demo.remember(memory, image(1), CAPTIONS[0], "key-1")
    assert (taken, again.used, again.episodes[slot].blended) == (slot, 1, True)
    full: SessionMemory = again
    for number in range(2, 9):
        full, taken = demo.remember(full, image(number), CAPTIONS[1], f"key-{number}")
        assert full.episodes[taken].key == f"key-{number}"
    assert full.used == 7
    assert len(full.episodes) == 7
    assert demo.memory_at_start().episodes == {}


def test_what_is_recalled_changes_the_caption_though_the_image_is_not_seen(demo: Demo) -> None:
    def chances(memory: SessionMemory, vector: torch.Tensor) -> list[float]:
        return [word.chance for word in demo.write(memory, vector, "a dog by", FEW, by_image=True)]

    memory, _ = demo.remember(demo.empty_memory(), image(1), CAPTIONS[0], "")
    assert chances(memory, image(1)) != chances(demo.empty_memory(), image(1))
    assert chances(demo.empty_memory(), image(1)) == chances(demo.empty_memory(), image(2))
    assert all(word.cross_modal == () for word in demo.write(memory, image(1), "", FEW, by_image=True))


def test_mistakes(demo: Demo, tmp_path: Path) -> None:
    def first(words: Iterator[Word]) -> Word:
        return next(words)

    memory = demo.memory_at_start()
    with pytest.raises(ConfigError, match="this model was trained on rows of 32"):
        first(demo.write(memory, None, "dog " * 40, FEW))
    with pytest.raises(ConfigError, match="24 finite numbers"):
        first(demo.write(memory, torch.zeros(5), "", FEW))
    with pytest.raises(ConfigError, match="24 finite numbers"):
        demo.recall(memory, torch.full((WIDTH,), torch.nan))
    with pytest.raises(ConfigError, match="the caption is empty"):
        demo.remember(memory, image(1), " ", "")
    with pytest.raises(ConfigError, match="trained on rows of 32"):
        demo.remember(memory, image(1), "dog " * 40, "")
    np.save(tmp_path / "two.npy", np.zeros((2, WIDTH), np.float32))
    with pytest.raises(ConfigError, match="one vector of 24 finite numbers"):
        own_vector(tmp_path / "two.npy", WIDTH)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises((ValueError, DataError)):
        own_vector(tmp_path / "text.npy", WIDTH)
    np.save(tmp_path / "one.npy", np.ones((1, WIDTH), np.float64))
    assert torch.equal(own_vector(tmp_path / "one.npy", WIDTH).vector, Pair(torch.ones(WIDTH)).vector)


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_pictures(tmp_path: Path, addressing: str) -> None:
    demo = made(tmp_path, memory_addressing=addressing)
    memory, slot = demo.remember(demo.memory_at_start(), image(1), "a $ and \u6f22", "")
    words = list(demo.write(memory, image(1), "a dog", FEW))
    mean = image_picture(words, None)
    pictures = [mean, image_picture(words, (0, 1)), memory_picture(words, memory.episodes)]
    recalled = demo.recall(memory, image(1))
    pictures.append(recall_picture(recalled, memory.episodes))
    assert len(set(pictures)) == 4
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert (recalled.nothing is None) == (addressing == "larimar")
    assert slot_label(slot, memory.episodes) == f"slot {slot} a $ and \\u6f22"
    blind = list(demo.write(demo.empty_memory(), None, "", FEW))
    for picture in (
        image_picture(blind, None),
        memory_picture(blind, {}),
        recall_picture(Recalled(np.zeros(7), 1), {}),
    ):
        assert picture.startswith("data:image/png;base64,")

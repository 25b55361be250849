"""Caption metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitmar.evaluation.captioning import (
    bleu,
    bleu_counts,
    caption_scores,
    cider,
    distinct,
    has_wordnet,
    meteor,
    rouge_l,
)


def bleu_of(captions: list[str], references: list[list[str]]) -> float:
    return float(bleu(bleu_counts(captions, references).sum(0)[None])[0])


def test_bleu_by_hand() -> None:
    assert bleu_of(["the cat sat on the mat"], [["a dog", "The cat sat on the mat"]]) == pytest.approx(1)
    five = bleu_of(["a b c d e"], [["a b c d f"]])
    assert five == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = bleu_of(["a b c d"], [["a b c d e"]])
    assert short == pytest.approx(math.exp(1 - 5 / 4)), "the brevity penalty"
    assert bleu_of(["x y z w"], [["a b c d"]]) == 0


def test_bleu_is_of_the_corpus() -> None:
    """Counts are added before they are divided: 4-grams 2 of 2 and 1 of 2, ..."""
    found = bleu_of(["a b c d e", "a b c d e"], [["a b c d e"], ["a b c d f"]])
    assert found == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_cider_by_hand() -> None:
    """Two images: every n-gram is of one of them, and has weight ln 2."""
    references = [["a b"], ["c d"]]
    np.testing.assert_allclose(cider(["a b", "c x"], references), [10 * (1 + 1) / 4, 10 * 0.5 / 4])
    one_word = 10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72)
    np.testing.assert_allclose(cider(["a", "d c"], references), [one_word, 10 / 4])


def test_cider_of_what_every_image_has_is_nothing() -> None:
    references = [["a dog", "a cat"], ["a boat"]]
    found = cider(["a", "a boat"], references)
    assert found[0] == 0
    ln2 = math.log(2)
    weights = np.array([0, ln2])  # a, boat; the pair has ln 2 too
    expected = 10 / 4 * (weights @ weights / ln2**2 + 1)
    assert found[1] == pytest.approx(expected)


def test_cider_is_the_mean_over_references_and_clips_repetitions() -> None:
    references = [["a b", "c d"], ["e f"]]
    np.testing.assert_allclose(cider(["a b", "e f"], references), [2.5, 5])
    repeated = cider(["a a b b", "e f"], references)[0]
    penalty = math.exp(-((3 - 1) ** 2) / 72)
    unigrams = (1 + 1) / (math.sqrt(8) * math.sqrt(2))  # min(2, 1) x 1 twice over the norms
    pairs = 1 / (math.sqrt(3) * 1)  # a a, a b, b b against a b
    assert repeated == pytest.approx(10 / 4 * penalty * (unigrams + pairs) / 2)


def test_rouge_by_hand() -> None:
    np.testing.assert_allclose(rouge_l(["a b c", "a b"], [["x y", "a x c"], ["a b c d"]]), [2 / 3, 2 / 3])


def test_distinct_by_hand() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct([""], 2) == 0


def test_scores_have_the_chance_of_other_images_captions() -> None:
    captions = ["a red boat on a lake", "two dogs play in the snow", "a man rides a horse"]
    references = [["a red boat on a lake"], ["two dogs play in the snow", "dogs in snow"], ["a man rides a horse"]]
    scores, notes = caption_scores(captions, references)
    found = {score.name: score for score in scores}
    assert found["BLEU-4"].value == pytest.approx(1)
    assert found["BLEU-4"].chance == 0
    assert found["ROUGE-L"].value == pytest.approx(1)
    assert found["ROUGE-L"].chance is not None
    assert found["ROUGE-L"].chance < 0.5
    assert found["CIDEr-D"].chance is not None
    assert found["CIDEr-D"].value > 5 > found["CIDEr-D"].chance
    assert found["length"].value == pytest.approx((6 + 6 + 5) / 3)
    assert found["length of references"].value == pytest.approx((6 + 6 + 3 + 5) / 4)
    assert found["distinct-1"].low is None
    assert ("METEOR" in found) == has_wordnet() == (not notes)


class NoSynonyms:
    """A thesaurus without an entry: words then match alike or by their stems."""

    def synsets(self, _: str) -> list[object]:
        return []


def test_meteor_by_hand() -> None:
    """P and R of matched words; F = P R / (0.9 P + 0.1 R); 1 - 0.5 (chunks / matches)^3 of it; the best reference."""
    captions = ["The cats sat.", "a dog"]
    references = [["the cat sat"], ["a cat sat here", "dogs"]]
    found = meteor(captions, references, NoSynonyms())
    assert found.tolist() == pytest.approx([1 - 0.5 / 27, 0.5 / (0.9 * 0.5 + 0.1) * 0.5])

"""Accuracy of choice tasks: minimal pairs, a caption among distractors, VQA with answer candidates, Winoground.

The candidate with the largest log-probability is chosen; a tie with the right one is wrong. What is compared:

- Minimal pairs: the sum over all tokens of a sentence, without the end token. No space stands before the sentence, as
  in BabyLM's pipeline of 2025; lm-evaluation-harness scores " " + sentence by default.
- Distractors: the caption with its end token, the sum and the mean of a token.
- VQA: " " + answer behind the question, without the end token, the sum, and the sum over the answer's own bytes, in
  which lm-evaluation-harness does not count the space either; and the sum with the image closed, which tells what the
  words alone give away.
- Winoground (Thrush et al. 2022): text score, both images choose their caption; image score, both captions choose
  their image; group score, both. The chance of four independent values: 1/4, 1/4, 1/6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from bitmar.evaluation.likelihood import Candidate, Choice, Image, by_item, is_right
from bitmar.evaluation.scores import Score, fraction
from shards.loader import ValidationSet
from shards.tokenizer import EOS

# ln p of each candidate (likelihood.log_probabilities)
Scorer = Callable[[Sequence[Candidate]], Float[np.ndarray, "N"]]


def minimal_pair_scores(scorer: Scorer, items: Sequence[tuple[str, Choice]], task: str) -> list[Score]:
    """Accuracy of all pairs, and of each paradigm where there are several."""
    paradigms = np.array([paradigm for paradigm, _ in items])
    right = _right(scorer, [choice for _, choice in items])
    scores = [fraction(task, "accuracy", right, "pair", 0.5)]
    names = sorted(set(paradigms.tolist()))
    for name in names if len(names) > 1 else ():
        scores.append(fraction(task, f"accuracy, {name or 'no UID'}", right[paradigms == name], "pair", 0.5))
    return scores


def distractor_scores(scorer: Scorer, items: Sequence[Choice], task: str) -> list[Score]:
    chance = _chance(items)
    values = scorer(_all(items))
    lengths = np.array([len(c.continuation) for c in _all(items)])
    return [
        fraction(task, "accuracy", _chosen(values, items), "item", chance),
        fraction(task, "accuracy, by mean of a token", _chosen(values / lengths, items), "item", chance),
    ]


def vqa_scores(scorer: Scorer, items: Sequence[Choice], task: str) -> tuple[list[Score], Float[np.ndarray, "N"]]:
    """(scores, ln p of all candidates one item after the other)."""
    chance, values = _chance(items), scorer(_all(items))
    bytes_ = np.array([c.bytes for c in _all(items)])
    blind = [Choice(tuple(dataclasses.replace(c, image=None) for c in item.candidates), item.answer) for item in items]
    scores = [
        fraction(task, "accuracy", _chosen(values, items), "item", chance),
        fraction(task, "accuracy, by mean of a byte", _chosen(values / bytes_, items), "item", chance),
        fraction(task, "accuracy without the image", _right(scorer, blind), "item", chance),
    ]
    return scores, values


def winoground_scores(scorer: Scorer, items: Sequence[tuple[Candidate, ...]], task: str) -> list[Score]:
    values = scorer([c for item in items for c in item]).reshape(-1, 2, 2)  # item, image, caption
    text, image = winoground(values)
    return [
        fraction(task, "text score", text, "item", 1 / 4),
        fraction(task, "image score", image, "item", 1 / 4),
        fraction(task, "group score", text & image, "item", 1 / 6),
    ]


def winoground(values: Float[np.ndarray, "N 2 2"]) -> tuple[np.ndarray, np.ndarray]:
    """(whether both images choose their caption, whether both captions choose their image), bool [N]. `values`: of
    image i and caption j, which belong together where i = j."""
    text = (values[:, 0, 0] > values[:, 0, 1]) & (values[:, 1, 1] > values[:, 1, 0])
    image = (values[:, 0, 0] > values[:, 1, 0]) & (values[:, 1, 1] > values[:, 0, 1])
    return text, image


def held_out_choices(captions: ValidationSet, candidates: int, limit: int, seed: int = 0) -> list[Choice]:
    """An item an image: its first caption among captions of as many other images, drawn by `seed`; captions are cut at
    `limit` tokens. Nothing where fewer than two images are held out."""
    images, first = np.unique(captions.image_ids, return_index=True)
    count = min(candidates, len(images))
    generator = np.random.default_rng(seed)
    items = []
    for at, chosen in enumerate(first.tolist()) if count > 1 else ():
        others = generator.choice(len(first) - 1, count - 1, replace=False)
        others += others >= at
        vector = captions.vector(chosen)
        assert vector is not None, "a pair has a vector"
        image = Image(vector, int(images[at]))
        answer = int(generator.integers(count))
        order = first[others].tolist()
        order.insert(answer, chosen)
        made = [Candidate((*captions.tokens(one).tolist(), EOS)[:limit], (), image) for one in order]
        items.append(Choice(tuple(made), answer))
    return items


def _all(items: Sequence[Choice]) -> list[Candidate]:
    return [c for item in items for c in item.candidates]


def _right(scorer: Scorer, items: Sequence[Choice]) -> np.ndarray:
    return _chosen(scorer(_all(items)), items)


def _chosen(values: Float[np.ndarray, "N"], items: Sequence[Choice]) -> np.ndarray:
    """Whether each item's answer has the largest value, bool [items]."""
    return np.array([is_right(mine, item.answer) for mine, item in zip(by_item(values, items), items, strict=True)])


def _chance(items: Sequence[Choice]) -> float:
    return float(np.mean([item.chance for item in items]))

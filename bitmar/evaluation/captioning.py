"""Captions against references, several an image: BLEU-4, ROUGE-L, CIDEr-D, METEOR, distinct words, length.

BLEU by sacrebleu (tokenizer 13a, lower case, of the corpus), ROUGE-L by rouge-score (F1 of the best reference, mean of
images), METEOR by nltk where its WordNet is at hand. CIDEr-D is worked out here: pycocoevalcap, which has it, is a
download of 100 MB of Java programs and the pictures' library of COCO. Words are runs of letters, digits and
apostrophes in lower case.

Chance is what the same captions reach against the references of other images.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from nltk.corpus import wordnet
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from bitmar.evaluation.scores import Score, fact, scored

TASK = "captioning"
ORDERS = 4
SIGMA = 6.0  # CIDEr-D: how much a caption of another length than the reference loses, in words
SCALE = 10.0
_WORDS = re.compile(r"[\w']+")

Thesaurus = Any  # whose synsets(word) are the word's, as nltk's WordNet
Vector = dict[tuple[str, ...], float]


def words_of(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(order)), strict=False))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "I"]:
    """CIDEr-D of each caption, 0 to 10 (Vedantam et al. 2015, section 4 and equation 5).

    g(s) of an n-gram is its count in s times ln(images / images of which a reference has it). With r a reference, the
    score is 10 x the mean over n = 1 to 4 and over r of

        exp(-(l(c) - l(r))^2 / (2 x 6^2)) x sum of min(g(c), g(r)) x g(r) / (|g(c)| |g(r)|)

    where l counts pairs of neighbouring words, as the paper's program does.
    """
    tokens = [[words_of(text) for text in texts] for texts in references]
    found = Counter[tuple[str, ...]]()
    for texts in tokens:
        found.update({gram for words in texts for n in range(1, ORDERS + 1) for gram in ngrams(words, n)})
    scores = []
    for caption, texts in zip(captions, tokens, strict=True):
        mine = _weighted(words_of(caption), found, len(references))
        pairs = [_similarity(mine, _weighted(words, found, len(references))) for words in texts]
        scores.append(SCALE * float(np.mean(pairs)))
    return np.array(scores)


def _weighted(words: Sequence[str], found: Mapping[tuple[str, ...], int], images: int) -> tuple[list[Vector], int]:
    """(g of each order, neighbouring pairs of words)."""
    vectors = [
        {gram: count * math.log(images / max(1, found.get(gram, 0))) for gram, count in ngrams(words, n).items()}
        for n in range(1, ORDERS + 1)
    ]
    return vectors, max(0, len(words) - 1)


def _similarity(mine: tuple[list[Vector], int], other: tuple[list[Vector], int]) -> float:
    penalty = math.exp(-((mine[1] - other[1]) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for one, two in zip(mine[0], other[0], strict=True):
        norms = math.sqrt(sum(g * g for g in one.values()) * sum(g * g for g in two.values()))
        if norms > 0:
            total += sum(min(g, two.get(gram, 0.0)) * two.get(gram, 0.0) for gram, g in one.items()) / norms
    return penalty * total / ORDERS


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "I 10"]:
    """What BLEU of a corpus is made from: matching n-grams (4), n-grams (4), lengths of caption and reference."""
    metric = BLEU(lowercase=True, effective_order=True)  # which sentence_score asks for; the counts are the same
    rows = []
    for caption, texts in zip(captions, references, strict=True):
        found = metric.sentence_score(caption, list(texts))
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, dtype=np.float64)


def bleu(sums: Float[np.ndarray, "R 10"]) -> Float[np.ndarray, "R"]:
    """BLEU-4 from 0 to 1 of summed counts; 0 where an order has no match (no smoothing)."""
    scores = []
    for row in sums.round().astype(int).tolist():
        found = BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="none")
        scores.append(found.score / 100)
    return np.array(scores)


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "I"]:
    """F1 of the longest common subsequence of words with the best reference."""
    scorer = RougeScorer(["rougeL"])
    pairs = zip(captions, references, strict=True)
    return np.array([scorer.score_multi(list(texts), caption)["rougeL"].fmeasure for caption, texts in pairs])


def has_wordnet() -> bool:
    """Whether nltk finds the WordNet that METEOR looks synonyms up in."""
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):  # OSError: a part of its files
        return False
    return True


def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]], thesaurus: Thesaurus = wordnet
) -> Float[np.ndarray, "I"]:
    """METEOR with the best reference (Banerjee and Lavie 2005, nltk's constants)."""
    pairs = [
        (words_of(caption), list(map(words_of, texts))) for caption, texts in zip(captions, references, strict=True)
    ]
    return np.array([meteor_score(texts, caption, wordnet=thesaurus) for caption, texts in pairs])


def distinct(captions: Sequence[str], order: int) -> float:
    """Distinct n-grams over all n-grams of all captions (Li et al. 2016); 0 where there are none."""
    counts = sum((ngrams(words_of(caption), order) for caption in captions), Counter[tuple[str, ...]]())
    return len(counts) / max(1, counts.total())


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[Score], list[str]]:
    """(scores of a caption an image, what was left out and why). `references`: the texts of each image, one at
    least."""
    turned = [*references[1:], *references[:1]] if len(references) > 1 else None
    by_image: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]] = {
        "ROUGE-L": rouge_l,
        "CIDEr-D": cider,
    }
    notes = []
    if has_wordnet():
        by_image["METEOR"] = meteor
    else:
        notes.append("METEOR is left out: nltk's WordNet is not at hand (python -m nltk.downloader wordnet)")
    chance = None if turned is None else float(bleu(bleu_counts(captions, turned).sum(0)[None])[0])
    scores = [scored(TASK, "BLEU-4", bleu_counts(captions, references), "image", chance, bleu)]
    for name, metric in by_image.items():
        table = np.stack([metric(captions, references), np.ones(len(captions))], axis=1)
        chance = None if turned is None else float(metric(captions, turned).mean())
        measure = "0 to 10" if name == "CIDEr-D" else "fraction"
        scores.append(scored(TASK, name, table, "image", chance, measure=measure))
    for order in (1, 2):
        scores.append(
            fact(TASK, f"distinct-{order}", distinct(captions, order), "image", len(captions), "share of n-grams")
        )
    lengths = [len(words_of(caption)) for caption in captions]
    theirs = [len(words_of(text)) for text in itertools.chain.from_iterable(references)]
    table = np.stack([np.array(lengths, np.float64), np.ones(len(lengths))], axis=1)
    scores.append(scored(TASK, "length", table, "image", measure="words"))
    scores.append(fact(TASK, "length of references", float(np.mean(theirs)), "image", len(captions), "words"))
    return scores, notes

"""Retrieval: blocks equal one matrix and loops; conventions of ties and of several captions an image; chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmar.engine.world import World
from bitmar.evaluation.retrieval import (
    Latents,
    Ranks,
    chance_median,
    chance_within,
    median_rank,
    rank_all,
    retrieval_scores,
)

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def looped(latents: Latents) -> tuple[list[int], list[int]]:
    """The ranks by the definition, one cosine at a time."""

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))

    owner = latents.owner.tolist()
    table = [[cosine(t, i) for i in latents.images] for t in latents.text]
    by_caption, by_image = [], []
    for caption, row in enumerate(table):
        own = row[owner[caption]]
        by_caption.append(1 + sum(c >= own - 1e-6 for image, c in enumerate(row) if image != owner[caption]))
    for image in range(len(latents.images)):
        best = max(row[image] for row, of in zip(table, owner, strict=True) if of == image)
        by_image.append(1 + sum(row[image] >= best - 1e-6 for row, of in zip(table, owner, strict=True) if of != image))
    return by_caption, by_image


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(1, 30), st.booleans(), st.integers(0, 2**31))
def test_blocks_are_one_matrix(images: int, more: int, block: int, whole: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def vectors(count: int) -> torch.Tensor:
        """Whole numbers make ties."""
        made = torch.randn(count, 5, generator=g)
        return made.sign() if whole else made

    owner = torch.cat([torch.arange(images), torch.randint(0, images, (more,), generator=g)])
    latents = Latents(vectors(images + more), vectors(images), owner)
    ranks, one = rank_all(latents, ALONE, block), rank_all(latents, ALONE, 10**6)
    np.testing.assert_array_equal(ranks.by_caption, one.by_caption)
    np.testing.assert_array_equal(ranks.by_image, one.by_image)
    assert (one.by_caption.tolist(), one.by_image.tolist()) == looped(latents)


def test_an_image_finds_the_best_of_its_captions() -> None:
    """Image 0 along x has captions at 0 and 80 degrees, image 1 along y one at 60 degrees."""
    angles = torch.tensor([0.0, 80.0, 60.0]).deg2rad()
    text = torch.stack([angles.cos(), angles.sin()], dim=1)
    ranks = rank_all(Latents(text, torch.eye(2), torch.tensor([0, 0, 1])), ALONE)
    assert ranks.by_image.tolist() == [1, 2], "the caption at 80 degrees stands before image 1's own"
    assert ranks.by_caption.tolist() == [1, 2, 1]


def test_ties_and_broken_latents_count_against_the_model() -> None:
    same = Latents(torch.ones(4, 3), torch.ones(4, 3), torch.arange(4))
    assert rank_all(same, ALONE).by_caption.tolist() == [4] * 4
    assert rank_all(same, ALONE).by_image.tolist() == [4] * 4
    broken = Latents(torch.full((4, 3), math.nan), torch.ones(4, 3), torch.arange(4))
    assert rank_all(broken, ALONE).by_caption.tolist() == [4] * 4
    assert rank_all(broken, ALONE).by_image.tolist() == [4] * 4


def test_chance_is_that_of_all_orders() -> None:
    own, candidates = [1, 2], 5
    for depth in range(1, 6):
        found = []
        for count in own:
            orders = list(itertools.permutations(range(candidates)))
            found.append(np.mean([min(order[:count]) < depth for order in orders]))
        assert chance_within(depth, candidates, np.array(own)) == pytest.approx(float(np.mean(found)))
    assert chance_within(10, 5, np.array(own)) == 1
    assert chance_median(100, np.ones(7, np.int64)) == 50
    least = chance_median(100, np.full(7, 5))
    assert chance_within(least - 1, 100, np.array([5])) < 0.5 <= chance_within(least, 100, np.array([5]))


def test_the_median_is_the_least_rank_that_half_reach() -> None:
    assert median_rank(np.array([1, 3, 5, 7]), np.ones(4)) == 3
    assert median_rank(np.array([1, 3, 7]), np.ones(3)) == 3
    assert median_rank(np.array([1, 3, 7]), np.array([1, 0, 5])) == 7


def test_scores_of_ranks() -> None:
    """Image 0 has three captions, image 1 one."""
    ranks = Ranks(np.array([1, 2, 6, 1]), np.array([1, 3]), np.array([0, 0, 0, 1]))
    found = {score.name: score for score in retrieval_scores(ranks)}
    assert found["text to image R@1"].value == 0.5
    assert found["text to image R@5"].value == 0.75
    assert found["image to text R@1"].value == 0.5
    assert found["image to text median rank"].value == 1
    assert found["text to image median rank"].value == 1
    assert found["text to image R@1"].chance == pytest.approx(0.5)
    assert found["image to text R@1"].chance == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert {score.unit for score in found.values()} == {"image"}
    assert found["text to image R@1"].low == pytest.approx(1 / 3), "both draws of image 0"
    assert found["text to image R@1"].high == 1

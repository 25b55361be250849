"""Rows "engine captions": captions a second, against the public BitMar's way of feeding its model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitmar.config import Config
from bitmar.engine.world import join_world
from tools.engine_bench.common import BareLoop, Bench, Clock, Row, step_batches
from tools.engine_bench.public_model import VOCABULARY, PublicModel
from tools.engine_bench.steps import open_captions

CAPTIONS = 32  # of a step, on both sides


@dataclass(frozen=True)
class Shape:
    """A recipe, the public code's name for it, what its captions are padded to, and the bar."""

    recipe: str
    name: str
    padded: int
    bar: float


SHAPES = (Shape("bitmar-14m", "21M", 256, 15.0), Shape("bitmar-120m", "120M", 128, 5.0))


class PublicLoop:
    """Tokenise a caption at a time, pad all alike, forward, loss over all positions, AdamW."""

    def __init__(self, bench: Bench, config: Config, padded: int) -> None:
        torch.manual_seed(0)
        self.records, self.padded = bench.records, padded
        self.model = PublicModel(config.model, padded)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def batch(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """CAPTIONS tokenised captions, what of them is real, and their vectors."""
        tokens = torch.zeros(CAPTIONS, self.padded, dtype=torch.int64)
        chosen = [(first + offset) % len(self.records.captions) for offset in range(CAPTIONS)]
        real = torch.zeros(CAPTIONS, self.padded, dtype=torch.bool)
        for row, at in enumerate(chosen):
            ids = self.records.tokenizer.inner.encode(self.records.captions[at]).ids[: self.padded]
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = True
        return tokens, real, torch.from_numpy(self.records.vectors[chosen])

    def step(self, first: int) -> None:
        tokens, real, vectors = self.batch(first)
        logits = self.model(tokens, real, vectors)
        targets = tokens.masked_fill(~real, -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def caption_rows(bench: Bench) -> Iterator[Row]:
    """Steps of both sides in turn, on all cores; quick: the smaller shape, padded to a quarter."""
    world = join_world()
    for shape in SHAPES[:1] if bench.quick else SHAPES:
        config = bench.config(
            shape.recipe,
            "captions",
            "training.precision=fp32",
            f"training.global_batch={CAPTIONS}",
            f"training.micro_batch={CAPTIONS}",
        )
        loader = open_captions(config, bench, world)
        padded = shape.padded // 4 if bench.quick else shape.padded
        ours, theirs = BareLoop(config, world), PublicLoop(bench, config, padded)
        rates, ratios = list[tuple[float, float]](), list[float]()
        few = 2 if bench.quick else 8  # of ours in a round
        for turn in range(2 if bench.quick else 4):
            with Clock() as mine:
                for step in range(few * turn, few * (turn + 1)):
                    ours.step(step_batches(loader, step * 41, world))
            with Clock() as other:
                theirs.step(turn * CAPTIONS)
            if turn:
                rates.append((few * CAPTIONS / mine.wall, CAPTIONS / other.wall))
                ratios.append(rates[-1][0] / rates[-1][1])
        yield {
            "name": f"engine captions: against the public BitMar's way of feeding its model, {shape.name} shape "
            f"({shape.recipe}'s widths and layers, vocabulary {VOCABULARY:,}, padded to {padded}; "
            f"{bench.records.kind}, {CAPTIONS} a step)",
            "ours": round(median(mine for mine, _ in rates), 2),
            "theirs": round(median(other for _, other in rates), 2),
            "ratio": round(median(ratios), 2),
            "unit": "captions/s",
            "bar": f">= {shape.bar:g}",
            "ok": bench.verdict(ratios, lambda ratio, bar=shape.bar: ratio >= bar),
            "parameters": [sum(p.numel() for p in side.model.parameters()) for side in (ours, theirs)],
        }

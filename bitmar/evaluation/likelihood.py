"""How likely a model finds given tokens behind others, with an image or without: what every choice task rests on.

Shapes: N candidates, V width of the image vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bitmar.batch import IGNORE, Batch
from bitmar.engine.world import World
from bitmar.evaluation.perplexity import Forward
from bitmar.model.memory import MemoryState
from shards.record import DataError
from shards.tokenizer import BOS, EOS, TextTokenizer

BATCH = 32


@dataclass(frozen=True)
class Image:
    vector: Float[np.ndarray, "V"] = field(repr=False)
    id: int  # shards.record.image_id: a reader is kept from the episodes of its own image


@dataclass(frozen=True)
class Candidate:
    """Scored is the continuation, behind the first token and the context."""

    continuation: tuple[int, ...]  # one token at least
    context: tuple[int, ...] = ()
    image: Image | None = None
    bytes: int = 1  # of the continuation's text, without the space that joins it to a context

    @property
    def positions(self) -> int:
        return len(self.context) + len(self.continuation)


def candidate(
    tokenizer: TextTokenizer, text: str, context: str = "", image: Image | None = None, ends: bool = False
) -> Candidate:
    """A candidate of texts. Behind a context the continuation begins with a space; `ends`: the end token is scored
    too. Raises DataError for a text without a token."""
    continuation = f" {text}" if context else text
    encoded = tokenizer.encode_batch([context, continuation])
    parts = [tuple(part.tolist()) for part in np.split(encoded.tokens, encoded.offsets[1:-1])]
    if not parts[1]:
        raise DataError("an empty text cannot be scored")
    end = (EOS,) if ends else ()
    return Candidate(parts[1] + end, parts[0], image, len(text.encode("utf-8")))


@torch.no_grad()
def log_probabilities(
    forward: Forward, candidates: Sequence[Candidate], width: int, memory: MemoryState, world: World, batch: int = BATCH
) -> Float[np.ndarray, "N"]:
    """ln p of each continuation, the sum over its tokens, on every rank. `width`: V.

    Candidates are sorted by length and batches dealt to the ranks in turn: equal work, and the same batches in any
    world.
    """
    order = sorted(range(len(candidates)), key=lambda at: (candidates[at].positions, at))
    found = torch.zeros(len(candidates), dtype=torch.float64, device=world.device)
    for start in range(world.rank * batch, len(order), world.size * batch):
        chosen = order[start : start + batch]
        made = _batch([candidates[at] for at in chosen], width)
        made = Batch(**{name: _moved(value, world.device) for name, value in vars(made).items()})
        found[chosen] = -forward(made, memory).token_losses.sum(1, dtype=torch.float64)
    return world.sum(found).cpu().numpy()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _batch(candidates: Sequence[Candidate], width: int) -> Batch:
    """A row a candidate, whose targets are its continuation."""
    rows, length = len(candidates), max(c.positions for c in candidates)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    targets = torch.full((rows, length), IGNORE)
    inside = torch.zeros(rows, length, dtype=torch.bool)
    vision, ids = torch.zeros(rows, width), torch.zeros(rows, dtype=torch.int64)
    for row, c in enumerate(candidates):
        read = torch.tensor([BOS, *c.context, *c.continuation])
        tokens[row, : c.positions], inside[row, : c.positions] = read[:-1], True
        targets[row, len(c.context) : c.positions] = read[1 + len(c.context) :]
        if c.image is not None:
            vision[row], ids[row] = torch.from_numpy(np.array(c.image.vector, np.float32)), c.image.id
    return Batch(
        tokens=tokens,
        targets=targets,
        segments=inside.int(),
        positions=torch.arange(length, dtype=torch.int32) * inside,
        vision=vision,
        has_vision=torch.tensor([c.image is not None for c in candidates]),
        image_ids=ids,
        words=torch.zeros(rows, dtype=torch.int64),
        rows=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
        packed=False,
        trained=(targets != IGNORE).flatten().nonzero()[:, 0],
    )


@dataclass(frozen=True)
class Choice:
    """Candidates of which one is right."""

    candidates: tuple[Candidate, ...]
    answer: int

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates)


def by_item(values: np.ndarray, items: Sequence[Choice]) -> Iterator[np.ndarray]:
    """The values of each item's candidates, of all candidates one after the other."""
    ends = np.cumsum([len(item.candidates) for item in items])
    yield from np.split(values, ends[:-1])


def is_right(values: np.ndarray, answer: int) -> bool:
    """Whether the answer's value is larger than every other; a tie is wrong."""
    others = np.delete(values, answer)
    return bool((values[answer] > others).all())

"""Which token comes next: the likeliest, or one drawn by temperature, top-k and top-p. Pure functions.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.config_checks import require
from bitmar.random_numbers import generator_of
from shards.tokenizer import BOS, PAD

FORBIDDEN = (PAD, BOS)  # which no text holds


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError."""

    max_tokens: int | None = None  # new ones; None: as many as the limit lets
    temperature: float = 0.0  # 0: the likeliest (greedy)
    top_k: int | None = None  # only the k likeliest
    top_p: float = 1.0  # only the likeliest whose probabilities sum to p (Holtzman et al. 2020)
    beams: int = 1  # more: beam search, without temperature
    length_penalty: float = 1.0  # a beam counts by log probability / length ** penalty
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens is None or self.max_tokens > 0, f"max_tokens must be > 0, got {self.max_tokens}")
        require(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        require(self.top_k is None or self.top_k > 0, f"top_k must be > 0, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        require(self.beams > 0, f"beams must be > 0, got {self.beams}")
        require(self.length_penalty >= 0, f"length_penalty must be >= 0, got {self.length_penalty}")
        require(0 <= self.seed < 1 << 31, f"seed must lie in [0, 2^31), got {self.seed}")
        require(self.beams == 1 or self.temperature == 0, "beams > 1 search for the likeliest: leave temperature at 0")
        free = self.temperature == 0 and (self.top_k is not None or self.top_p < 1)
        require(not free, "top_k and top_p change nothing at temperature 0: give a temperature")


def possible(logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Log probabilities (fp64) of the tokens that may come next."""
    banned = torch.tensor(FORBIDDEN, device=logits.device)
    return logits.double().index_fill(1, banned, float("-inf")).log_softmax(-1)


def narrowed(log_probabilities: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Log probabilities at the temperature, -inf outside of top-k and, of what these leave, top-p."""
    scaled = log_probabilities / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        scaled = scaled.masked_fill(out, float("-inf"))
    return scaled.log_softmax(-1)


def choose(
    log_probabilities: Float[Tensor, "B V"], sampling: Sampling, step: int, texts: Sequence[int]
) -> Int[Tensor, "B"]:
    """The next token of each row. Row b goes on with text number `texts[b]`, and draws from (seed + number, step)."""
    if sampling.temperature == 0:
        return log_probabilities.argmax(-1)
    cumulative = narrowed(log_probabilities, sampling).exp().cpu().cumsum(-1)
    generators = [generator_of(sampling.seed + text, step) for text in texts]
    drawn = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    chosen = (cumulative <= drawn[:, None] * cumulative[:, -1:]).sum(-1)  # the first token whose sum passes the point
    return chosen.to(log_probabilities.device)


class Beams:
    """The beam search of one prompt: what goes on, what has ended."""

    def __init__(self, beams: int, length_penalty: float, end: int) -> None:
        self._width, self._penalty, self._end = beams, length_penalty, end
        self.running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # log probability, tokens; best first
        self.ended: list[tuple[float, tuple[int, ...]]] = []

    def grow(self, log_probabilities: Float[Tensor, "R V"]) -> list[int]:
        """Take the R running beams a token further; gives which of them each new one goes on from."""
        sums = torch.tensor([score for score, _ in self.running], dtype=torch.float64)
        totals = (sums[:, None] + log_probabilities.cpu()).flatten()
        vocabulary = log_probabilities.shape[1]
        count = min(2 * self._width, int(torch.isfinite(totals).sum()))
        best = totals.topk(count)
        going, parents = [], []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, vocabulary)
            tokens = self.running[parent][1]
            if token == self._end:
                if rank < self._width:
                    self.ended.append((score, tokens))
            elif len(going) < self._width:
                going.append((score, (*tokens, token)))
                parents.append(parent)
        self.running = going
        return parents

    def worth(self, score: float, length: int) -> float:
        """By what beams are compared; `length` in tokens, the end token among them."""
        return score / max(length, 1) ** self._penalty

    def is_done(self, longest: int) -> bool:
        """Whether no running beam can still come before the best `beams` that have ended, up to `longest` tokens."""
        if not self.running:
            return True
        if len(self.ended) < self._width:
            return False
        least = sorted((self.worth(s, len(t) + 1) for s, t in self.ended), reverse=True)[self._width - 1]
        score, tokens = self.running[0]  # a sum that only falls, over a length that only grows
        return self.worth(score, max(longest, len(tokens) + 1)) <= least

    def best(self) -> tuple[float, tuple[int, ...], bool]:
        """(log probability, tokens, whether it has ended) of the best; those that go on count as well."""
        candidates = [(self.worth(s, len(t) + 1), s, t, True) for s, t in self.ended]
        candidates += [(self.worth(s, len(t)), s, t, False) for s, t in self.running]
        _, score, tokens, ended = max(candidates, key=lambda c: c[0])
        return score, tokens, ended

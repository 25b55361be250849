"""What kind of head each one is, by criteria that are written down: CRITERIA, tried in its order; the first that holds
names the type, 'other' where none does. Apart from its type a head may be dead, for a reason of DEAD.

All numbers are means over the queries of the samples, from the second position on (the first has one key alone).
Shapes: B rows, T positions, S keys, H heads of a layer, P vision tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmar.analysis.heads import CAUSAL, existing_heads
from bitmar.batch import Batch
from bitmar.head_names import KINDS, HeadName
from bitmar.model.attention import Heads
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState

# Closed-class words of English, and punctuation: what the syntactic proxy takes for the skeleton of a sentence
FUNCTION_WORD = re.compile(
    r"""a|an|the|this|that|these|those|my|your|his|her|its|our|their|some|any|no|every|each|all|both
    |and|or|but|nor|so|yet|if|because|as|than|when|while|where|who|whom|whose|which|what
    |of|in|on|at|by|for|with|about|against|between|into|through|during|before|after|above|below|to|from|up|down|out|off
    |over|under|again|am|is|are|was|were|be|been|being|have|has|had|having|do|does|did|will|would|shall|should|may
    |might|must|can|could|not|n't|i|you|he|she|it|we|they|me|him|us|them|there|here
    |[^\w\s]+""",
    re.VERBOSE,
)
SPECIAL_TOKENS = 3  # at the beginning of a vocabulary
REPEATED = 24  # tokens of a random sequence that is then repeated, for induction


@dataclass(frozen=True)
class Criterion:
    name: str
    number: str  # of Numbers, which must reach the threshold
    threshold: float
    meaning: str
    kinds: tuple[str, ...] = KINDS


CRITERIA = (
    Criterion("induction", "induction", 0.3, "on a random sequence, repeated: mass on the token after the first "
              "occurrence of the current one", CAUSAL),
    Criterion("previous token", "previous", 0.4, "mass on the token before", CAUSAL),
    Criterion("current token", "current", 0.4, "mass on the token itself", CAUSAL),
    Criterion("first token (sink)", "first", 0.5, "mass on the first token", CAUSAL),
    Criterion("vision-grounded", "vision", 0.1, "how far the attention moves (total variation) when the image "
              "is that of another caption", ("decoder", "cross_modal")),
    Criterion("memory-reading", "memory", 0.1, "memory attention: mass on written slots; decoder: how far the "
              "attention moves (total variation) when the memory is emptied", ("decoder", "memory")),
    Criterion("positional", "positional", 0.9, "1 - how far the attention lies (total variation) from its mean over "
              "the samples at the same place", CAUSAL),
    Criterion("syntactic", "syntactic", 1.5, "mass on function words and punctuation, over that of attention spread "
              "evenly over the same keys", CAUSAL),
    Criterion("semantic", "semantic", 0.3, "correlation of the attention with the cosine of the tokens' embeddings, "
              "over the keys but the token itself", CAUSAL),
)  # fmt: skip
DEAD = {
    "uniform": ("evenness", 0.98, "entropy over that of attention spread evenly; such a head has no type"),
    "single position": ("fixed", 0.98, "mass on one key, the same for all queries and samples"),
    "no variation over inputs": ("sameness", 0.999, "share of the output's mean square that is the same in all samples "
                                 "at a place"),
}  # fmt: skip
OTHER = "other"


@dataclass(frozen=True)
class HeadType:
    head: HeadName
    type: str
    dead: tuple[str, ...]  # reasons
    numbers: Mapping[str, float]  # NaN where a number has no meaning for its kind of attention


def classify(numbers: Mapping[str, float], kind: str) -> tuple[str, tuple[str, ...]]:
    """(type, reasons for being dead) of a head with these numbers."""
    dead = tuple(name for name, (key, least, _) in DEAD.items() if numbers.get(key, math.nan) >= least)
    held = (c.name for c in CRITERIA if kind in c.kinds and numbers.get(c.number, math.nan) >= c.threshold)
    return OTHER if "uniform" in dead else next(held, OTHER), dead


def classify_heads(
    model: BitMar,
    memory: MemoryState,
    batches: Sequence[Batch],
    decode: Callable[[int], str],
    seed: int = 0,
) -> list[HeadType]:
    """Every head of a model, from captions with images. `decode`: the text of a token."""
    function = _function_words(decode, model.config.vocab_size)
    sums: dict[HeadName, dict[str, tuple[float, float]]] = {}
    for batch in batches:
        for head, numbers in _numbers(model, memory, batch, function).items():
            mine = sums.setdefault(head, {})
            for name, (total, count) in numbers.items():
                before = mine.get(name, (0.0, 0.0))
                mine[name] = before[0] + total, before[1] + count
    induction = _induction(model, memory, seed)
    found = []
    for head in existing_heads(model.config):
        numbers = {name: total / count if count else math.nan for name, (total, count) in sums[head].items()}
        numbers |= {"induction": induction[head]} if head in induction else {}
        found.append(HeadType(head, *classify(numbers, head.kind), numbers))
    return found


def _function_words(decode: Callable[[int], str], vocabulary: int) -> Bool[Tensor, "V"]:
    """Which tokens are function words or punctuation."""
    texts = (decode(token).strip().lower() for token in range(vocabulary))
    return torch.tensor([FUNCTION_WORD.fullmatch(text) is not None for text in texts])


@dataclass(frozen=True)
class _Shown:
    weights: Float[Tensor, "B T S"]
    outputs: Float[Tensor, "B T E"]


def _each(shown: Mapping[str, Sequence[Heads]]) -> dict[HeadName, _Shown]:
    return {
        HeadName(kind, layer, number): _Shown(heads.weights[:, place], heads.outputs[:, place])
        for kind, layers in shown.items()
        for layer, heads in enumerate(layers)
        for place, number in enumerate(heads.numbers)
    }


@torch.no_grad()
def _numbers(
    model: BitMar, memory: MemoryState, batch: Batch, function: Bool[Tensor, "V"]
) -> dict[HeadName, dict[str, tuple[float, float]]]:
    """(sum, count) of each number of each head, over a batch."""
    # each caption with the image of the row before it
    swapped = batch.replace(vision=batch.vision.roll(1, 0), image_ids=batch.image_ids.roll(1, 0))
    other_image = _each(model(swapped, memory, heads=True).heads)
    no_memory = _each(model(batch, MemoryState.empty(len(memory.keys), memory.keys.shape[1]), heads=True).heads)
    asked = batch.token_mask & batch.has_vision[:, None]
    asked[:, 0] = False
    count = float(asked.sum())
    embedded = torch.nn.functional.normalize(model.embedding.weight, dim=-1)[batch.tokens]
    cosines, words = embedded @ embedded.mT, function[batch.tokens] & batch.token_mask
    found = {}
    for head, shown in _each(model(batch, memory, heads=True).heads).items():
        w, numbers = shown.weights, dict[str, Tensor]()
        if head.kind in CAUSAL:
            numbers |= _causal_numbers(w, words, cosines)
        if head.kind == "cross_modal":
            numbers["evenness"] = torch.special.entr(w).sum(-1) / math.log(w.shape[-1])
        if head.kind in ("decoder", "cross_modal"):
            numbers["vision"] = (w - other_image[head].weights).abs().sum(-1) / 2
        if head.kind == "decoder":
            numbers["memory"] = (w - no_memory[head].weights).abs().sum(-1) / 2
        if head.kind == "memory":
            numbers["memory"] = w.abs().sum(-1)
        found[head] = {name: (float((x.double() * asked).sum()), count) for name, x in numbers.items()}
        found[head]["fixed"] = (float((w.double() * asked[..., None]).sum((0, 1)).max()), count)
        found[head]["positional"] = _steadiness(w, asked)
        found[head]["sameness"] = _sameness(shown.outputs, asked)
    return found


def _causal_numbers(
    w: Float[Tensor, "B T T"], words: Bool[Tensor, "B T"], cosines: Float[Tensor, "B T T"]
) -> dict[str, Float[Tensor, "B T"]]:
    """Of each query; the first's mean nothing."""
    length = w.shape[1]
    keys = torch.arange(1, length + 1, dtype=w.dtype)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (words[:, None] & causal).to(w.dtype)
    share = seen.sum(-1) / keys
    return {
        "previous": torch.nn.functional.pad(w.diagonal(offset=-1, dim1=1, dim2=2), (1, 0)),
        "current": w.diagonal(dim1=1, dim2=2),
        "first": w[..., 0],
        "evenness": torch.special.entr(w).sum(-1) / keys.log().clamp(min=1e-9),
        "syntactic": torch.where(share > 0, (w * seen).sum(-1) / share.clamp(min=1e-9), 1.0),
        "semantic": _correlation(w, cosines, causal.tril(-1)),
    }


def _correlation(
    a: Float[Tensor, "B T T"], b: Float[Tensor, "B T T"], among: Bool[Tensor, "T T"]
) -> Float[Tensor, "B T"]:
    """Pearson's over the keys that count; 0 where one of the two does not vary."""
    count = among.sum(-1, keepdim=True).clamp(min=1)
    first, second = (torch.where(among, x - (x * among).sum(-1, keepdim=True) / count, 0.0) for x in (a, b))
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    return torch.where(norms > 1e-9, (first * second).sum(-1) / norms.clamp(min=1e-9), 0.0)


def _by_place(x: Float[Tensor, "B T D"], asked: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """(mean over the rows that are asked [T, D], queries whose place several rows ask for [B, T])."""
    rows = asked.sum(0)
    mean = (x * asked[..., None]).sum(0) / rows.clamp(min=1)[:, None]
    return mean, asked & (rows > 1)


def _steadiness(w: Float[Tensor, "B T S"], asked: Bool[Tensor, "B T"]) -> tuple[float, float]:
    mean, counted = _by_place(w.double(), asked)
    apart = (w - mean).abs().sum(-1) / 2
    return float(((1 - apart) * counted).sum()), float(counted.sum())


def _sameness(z: Float[Tensor, "B T E"], asked: Bool[Tensor, "B T"]) -> tuple[float, float]:
    mean, counted = _by_place(z.double(), asked)
    return float((mean.square().sum(-1) * counted).sum()), float((z.double().square().sum(-1) * counted).sum())


@torch.no_grad()
def _induction(model: BitMar, memory: MemoryState, seed: int) -> dict[HeadName, float]:
    """Mean mass that the second half of a random sequence, repeated, lays on the token after the first occurrence
    (prefix matching of Olsson et al. 2022, "In-context Learning and Induction Heads")."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(SPECIAL_TOKENS, model.config.vocab_size, (8, REPEATED), generator=generator)
    batch = Batch.of_text(torch.cat([half, half], 1), model.config.vision_encoder_dim)
    shown = _each(model(batch, memory, heads=True).heads)
    second = torch.arange(REPEATED, 2 * REPEATED - 1)
    return {
        head: float(of.weights[:, second, second - REPEATED + 1].mean())
        for head, of in shown.items()
        if head.kind in CAUSAL
    }

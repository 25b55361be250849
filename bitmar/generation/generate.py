"""Text from a trained model: of an image's vector, of a prompt, of both or of neither.

Shapes: B prompts, V width of the image vector, or vocabulary; R running beams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.config import ConfigError
from bitmar.generation.incremental import IncrementalReader, Seen
from bitmar.generation.sampling import Beams, Sampling, choose, possible
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from shards.tokenizer import BOS, EOS, PAD


@dataclass(frozen=True)
class Generated:
    tokens: tuple[int, ...]  # behind the prompt, the end token left out
    log_probability: float  # of these tokens and the end token, in nats, at temperature 1
    ended: bool  # with the end token


def generate(
    model: BitMar,
    memory: MemoryState,
    prompts: Sequence[Sequence[int]],
    vectors: Float[Tensor, "B V"] | None,
    sampling: Sampling,
    limit: int,
    watch: Callable[[list[int], Seen], None] | None = None,
) -> list[Generated]:
    """Go on with every prompt until it ends, or is as long as it may be.

    A prompt begins with <bos>. `vectors`: an image for each, or none for any. `limit`: of a prompt and what follows it,
    in tokens: the length of the rows that the model was trained on (data.row_tokens). Greedy and drawn texts are the
    same whatever prompts stand beside them; text b is drawn with seed + b. `watch`, without beams, is told of each
    step: the tokens that were chosen, by what the model then saw. Raises ConfigError for prompts that are empty or too
    long, and for vectors of another number or width.
    """
    _check(model, prompts, vectors, sampling, limit)
    room = [limit - len(prompt) for prompt in prompts]
    longest = [min(left, sampling.max_tokens or left) for left in room]
    reader, seen = read_prompts(model, memory, prompts, vectors, max(map(len, prompts)) + max(longest))
    if sampling.beams > 1:
        return _search(reader, seen, longest, sampling)
    return _draw(reader, seen, longest, sampling, watch)


def read_prompts(
    model: BitMar,
    memory: MemoryState,
    prompts: Sequence[Sequence[int]],
    vectors: Float[Tensor, "B V"] | None,
    capacity: int,
    pad_left: bool = True,
) -> tuple[IncrementalReader, Seen]:
    """A reader that has read the prompts, and what it made of them."""
    device = model.embedding.weight.device
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), PAD)
    inside = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if pad_left else slice(0, len(prompt))
        tokens[row, where], inside[row, where] = torch.tensor(prompt), True
    seen_images = None if vectors is None else vectors.to(device, torch.float32)
    reader = IncrementalReader(model, memory, seen_images, len(prompts), capacity)
    return reader, reader.read(tokens.to(device), inside.to(device))


def _check(
    model: BitMar, prompts: Sequence[Sequence[int]], vectors: Tensor | None, sampling: Sampling, limit: int
) -> None:
    wanted = sampling.max_tokens or 1
    for number, prompt in enumerate(prompts):
        if not prompt or prompt[0] != BOS:
            raise ConfigError(f"prompt {number} does not begin with <bos> ({BOS})")
        if len(prompt) + wanted > limit:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens with <bos>, and {wanted} more are asked for: this model was "
                f"trained on rows of {limit}"
            )
        if not all(0 <= token < model.config.vocab_size for token in prompt):
            raise ConfigError(f"prompt {number} has tokens outside of the vocabulary of {model.config.vocab_size}")
    if not prompts:
        raise ConfigError("there is no prompt; one of <bos> alone lets the model begin by itself")
    if vectors is not None:
        check_vectors(vectors, len(prompts), model.config.vision_encoder_dim)


def check_vectors(vectors: Tensor, count: int, width: int) -> None:
    """Raises ConfigError unless these are `count` vectors of `width` finite numbers."""
    if tuple(vectors.shape) != (count, width) or not bool(torch.isfinite(vectors).all()):
        raise ConfigError(
            f"image vectors of shape {list(vectors.shape)}: {count} of {width} finite numbers each would do"
        )


def _draw(
    reader: IncrementalReader,
    seen: Seen,
    longest: list[int],
    sampling: Sampling,
    watch: Callable[[list[int], Seen], None] | None,
) -> list[Generated]:
    """Token by token, all rows together; those that have ended are left behind."""
    texts = [Generated((), 0.0, False) for _ in longest]
    active = list(range(len(longest)))
    for step in range(max(longest)):
        chances = possible(seen.logits)
        chosen = choose(chances, sampling, step, active)
        gained = chances.gather(1, chosen[:, None])[:, 0].tolist()
        tokens = chosen.tolist()
        if watch is not None:
            watch(tokens, seen)
        stay = []
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            text, ended = texts[row], token == EOS
            taken = text.tokens if ended else (*text.tokens, token)
            texts[row] = Generated(taken, text.log_probability + gained[place], ended)
            if not ended and step + 1 < longest[row]:
                stay.append(place)
        if not stay:
            break
        if len(stay) < len(active):
            places = torch.tensor(stay, device=chosen.device)
            reader.pick(places)
            chosen, active = chosen[places], [active[place] for place in stay]
        seen = reader.read(chosen[:, None])
    return texts


def _search(reader: IncrementalReader, seen: Seen, longest: list[int], sampling: Sampling) -> list[Generated]:
    """Beam search, the beams of all prompts together."""
    searches = [Beams(sampling.beams, sampling.length_penalty, EOS) for _ in longest]
    active = list(range(len(longest)))
    chances = possible(seen.logits)
    for step in range(max(longest)):
        rows: list[int] = []
        going: list[int] = []
        begin = 0
        for number in active:
            search = searches[number]
            count = len(search.running)
            parents = search.grow(chances[begin : begin + count])
            if step + 1 < longest[number] and not search.is_done(longest[number]):
                rows += [begin + parent for parent in parents]
                going.append(number)
            begin += count
        active = going
        if not active:
            break
        device = chances.device
        reader.pick(torch.tensor(rows, device=device))
        last = [tokens[-1] for number in active for _, tokens in searches[number].running]
        chances = possible(reader.read(torch.tensor(last, device=device)[:, None]).logits)
    found = [search.best() for search in searches]
    return [Generated(tokens, score, ended) for score, tokens, ended in found]

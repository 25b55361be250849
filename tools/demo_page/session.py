"""What the page asks of a trained model: captions word by word, episodes written, episodes recalled.

Shapes: V width of the image vector, H heads of a layer, P vision tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.config_checks import require
from bitmar.evaluation.recall import Pairs, slot_scores
from bitmar.generation.episodes import remember
from bitmar.generation.generate import check_vectors
from bitmar.generation.incremental import IncrementalReader, Seen
from bitmar.generation.sampling import Sampling, choose, possible
from bitmar.loading import Loaded
from bitmar.model.fusion import FusionLayer
from bitmar.model.memory import MemoryState
from bitmar.model.packed import freeze
from shards.tokenizer import BOS, EOS, TextTokenizer, token_texts


@dataclass(frozen=True)
class Word:
    """A token, and what the model looked at when it predicted it."""

    token: int
    text: str  # as it stands in the caption, its space before it
    given: bool  # by the prompt
    chance: float  # that the model gave it, in [0, 1]
    cross_modal: tuple[Float[np.ndarray, "H P"], ...]  # a layer each; none where there is no image
    memory: Float[np.ndarray, "K"]  # weights of the slots


@dataclass(frozen=True)
class Episode:
    """A pair that was shown to a browser session's memory."""

    caption: str
    key: str
    blended: bool  # into the episode of the same image that the slot held


@dataclass(frozen=True)
class SessionMemory:
    """A browser session's own memory: never written to disk."""

    state: MemoryState
    episodes: dict[int, Episode]  # those shown in this session, by slot

    @property
    def used(self) -> int:
        """Slots that hold an episode."""
        return int(self.state.written.sum())


@dataclass(frozen=True)
class Recalled:
    """What an image alone asks of the memory."""

    weights: Float[np.ndarray, "K"]
    nothing: float | None  # the share that says nothing is recalled; None where least squares address, without such

    def best(self, count: int) -> list[int]:
        """The slots that are read most, at most `count` of those that are read at all."""
        order = np.argsort(-np.abs(self.weights), kind="stable")[:count]
        return [int(slot) for slot in order if self.weights[slot] != 0]


class Demo:
    """A trained model, made ready to speak. Keeps nothing of what it is asked."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises DataError where the run's tokenizer cannot be read. `loaded` is changed: its weights are rounded."""
        self.run, self.step = loaded.config.run.name, loaded.progress.step
        self.tokenizer = TextTokenizer(loaded.tokenizer)
        self._text_of = token_texts(loaded.tokenizer.read_text(encoding="utf-8"))
        self._trained, self._limit = loaded.memory, loaded.config.data.row_tokens
        self.model = freeze(loaded.model)
        self.config = self.model.config
        layers: list[FusionLayer] = list(self.model.fusion.layers)  # type: ignore[arg-type]
        self.heads = [layer.attention.layer.kept for layer in layers]  # of each, those that were not pruned

    def memory_at_start(self) -> SessionMemory:
        """The checkpoint's."""
        return SessionMemory(self._trained, {})

    def empty_memory(self) -> SessionMemory:
        return SessionMemory(MemoryState.empty(self.config.memory_size, self.config.episode_dim), {})

    def write(
        self,
        memory: SessionMemory,
        vector: Float[Tensor, "V"] | None,
        prompt: str,
        sampling: Sampling,
        by_image: bool = False,
    ) -> Iterator[Word]:
        """The words of the prompt, then one after the other those that the model goes on with, the end token too.

        `by_image`: the memory is asked by the image alone, which is not seen otherwise. Raises ConfigError for a prompt
        that is too long and a vector of another width.
        """
        tokens = self._tokens(prompt, sampling.max_tokens or 1)
        if vector is not None:
            check_vectors(vector[None], 1, self.config.vision_encoder_dim)
        require(vector is not None or not by_image, "the image alone is to ask: give one")
        longest = min(sampling.max_tokens or self._limit, self._limit - len(tokens))
        vectors = None if vector is None else vector[None].float()
        reader = IncrementalReader(self.model, memory.state, vectors, 1, len(tokens) + longest, by_image)
        sees = vector is not None and not by_image
        seen = reader.read(torch.tensor([tokens[:1]]))
        for token in tokens[1:]:  # what stands before a word predicts it
            yield self._word(token, seen, True, sees)
            seen = reader.read(torch.tensor([[token]]))
        for step in range(longest):
            token = int(choose(possible(seen.logits), sampling, step, [0]))
            yield self._word(token, seen, False, sees)
            if token == EOS or step + 1 == longest:
                return
            seen = reader.read(torch.tensor([[token]]))

    def remember(
        self, memory: SessionMemory, vector: Float[Tensor, "V"], caption: str, key: str
    ) -> tuple[SessionMemory, int]:
        """(the memory after it was shown the pair once, the slot that took it).

        Raises ConfigError for a caption that is empty or too long, and a vector of another width.
        """
        require(bool(caption.strip()), "an episode is an image with its caption: the caption is empty")
        tokens = self._tokens(caption, 0)
        check_vectors(vector[None], 1, self.config.vision_encoder_dim)
        state, (slot,) = remember(self.model, memory.state, [tokens], vector[None].float())
        held = bool(memory.state.written[slot] and memory.state.image_ids[slot] == state.image_ids[slot])
        return SessionMemory(state, memory.episodes | {slot: Episode(caption, key, held)}), slot

    def recall(self, memory: SessionMemory, vector: Float[Tensor, "V"]) -> Recalled:
        """Raises ConfigError for a vector of another width."""
        check_vectors(vector[None], 1, self.config.vision_encoder_dim)
        asking = Pairs(((BOS,),), vector[None].float())
        weights = slot_scores(self.model, memory.state, range(len(memory.state.written)), asking, "image")[0].numpy()
        has_null = self.config.memory_addressing == "attention"
        return Recalled(weights, float(1 - weights.sum()) if has_null else None)

    def text(self, words: list[Word]) -> str:
        """Of these tokens together, the end token left out: one alone may be part of a letter."""
        return self.tokenizer.decode([word.token for word in words if word.token != EOS])

    def _tokens(self, text: str, more: int) -> list[int]:
        tokens = [BOS, *self.tokenizer.encode_batch([text]).tokens.tolist()]
        require(
            len(tokens) + more <= self._limit,
            f"the text has {len(tokens) - 1} tokens{f', and {more} more are asked for' if more else ''}: this model "
            f"was trained on rows of {self._limit}, the first token counted",
        )
        return tokens

    def _word(self, token: int, seen: Seen, given: bool, sees: bool) -> Word:
        chance = float(possible(seen.logits)[0, token].exp())
        cross_modal = tuple(layer[0, :, -1].numpy() for layer in seen.cross_modal) if sees else ()
        return Word(token, self._text_of(token), given, chance, cross_modal, seen.memory[0, -1].numpy())

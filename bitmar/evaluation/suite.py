"""The tasks of tools/evaluate.py by name: a trained model and its data -> scores, the same on every rank."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.engine.world import World
from bitmar.evaluation import choices
from bitmar.evaluation.captioning import caption_scores
from bitmar.evaluation.items import Reader
from bitmar.evaluation.likelihood import BATCH, Candidate, log_probabilities
from bitmar.evaluation.perplexity import MIXED, RIGHT, WAYS, Way, perplexity_scores, score_way, whole_tables
from bitmar.evaluation.quantization import loss_scores, rounding_scores, rounding_tables, unrounded, weight_scores
from bitmar.evaluation.recall import held_out_pairs, recall_scores
from bitmar.evaluation.retrieval import gather_latents, rank_all, retrieval_scores
from bitmar.evaluation.scores import Score
from bitmar.evaluation.sources import open_shards
from bitmar.generation.generate import generate
from bitmar.generation.sampling import Sampling
from bitmar.loading import Loaded, load_trained
from bitmar.model.bitmar import BitMar, Outputs
from bitmar.model.memory import MemoryState
from bitmar.model.packed import freeze
from shards.loader import ShardSet, ValidationSet
from shards.tokenizer import BOS, TextTokenizer

CAPTION_TOKENS = 64
SHOWN = 64  # pairs that the memory is asked for
CANDIDATES = 8  # of an item of distractors that is made from the shards: one right, the others other images'
OWN = ""  # shards: those of the run
TEXT_WAYS: tuple[Way, ...] = (RIGHT, ("right", "off"))


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode on the world's device, and where its data is. `notes`: of what was left out."""

    loaded: Loaded
    memory: MemoryState
    tokenizer: TextTokenizer
    world: World
    shards: ShardSet | None  # None: no task needs any
    files: Mapping[str, Path] = field(default_factory=dict)  # of tasks that read JSONL
    max_samples: int = 2048  # held-out captions and texts; retrieval and captioning's references are of all
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> BitMar:
        return self.loaded.model

    @functools.cached_property
    def frozen(self) -> BitMar:
        """A copy whose weights were rounded once, for what reads token by token."""
        return freeze(copy.deepcopy(self.model))

    @property
    def limit(self) -> int:
        """Tokens of a row."""
        return self.loaded.config.data.row_tokens

    @torch.no_grad()
    def forward(self, batch: Batch, memory: MemoryState) -> Outputs:
        return self.model(batch, memory)

    def scorer(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """ln p of each candidate."""
        width = self.loaded.config.model.vision_encoder_dim
        return log_probabilities(self.forward, candidates, width, self.memory, self.world)

    @property
    def reader(self) -> Reader:
        """Of JSONL files."""
        return Reader(self.tokenizer, self.loaded.config.model.vision_encoder_dim, self.limit)

    @functools.cached_property
    def pairs(self) -> ValidationSet | None:
        return self._held_out("pairs", self.max_samples)

    @functools.cached_property
    def text(self) -> ValidationSet | None:
        return self._held_out("text", self.max_samples)

    @functools.cached_property
    def every_pair(self) -> ValidationSet | None:
        return self._held_out("pairs", None)

    def _held_out(self, modality: Literal["pairs", "text"], most: int | None) -> ValidationSet | None:
        shards = self.shards
        if shards is None or modality not in shards.validated:
            return None
        return ValidationSet(
            shards,
            modality=modality,
            micro_batch=BATCH,
            row_tokens=self.limit,
            max_samples=most or shards.samples("validation", modality),
            rank=self.world.rank,
            world=self.world.size,
        )


def open_subject(
    checkpoint: Path, shards: str | None, world: World, files: Mapping[str, Path], max_samples: int
) -> Subject:
    """Load a checkpoint, and open shards where asked for: OWN are its run's. Raises CheckpointError, ConfigError,
    DataError."""
    loaded = load_trained(checkpoint)
    tokenizer = TextTokenizer(loaded.tokenizer)
    opened = None if shards is None else open_shards(loaded, None if shards == OWN else shards)
    loaded.model.to(world.device)
    memory = MemoryState(**{name: tensor.to(world.device) for name, tensor in loaded.memory.tensors().items()})
    return Subject(loaded, memory, tokenizer, world, opened, files, max_samples)


def perplexity(subject: Subject) -> list[Score]:
    scores, world = [], subject.world
    sets = (
        (subject.pairs, caption_ways(subject), "", "caption"),
        (subject.text, TEXT_WAYS, "text", "record"),
    )
    for held_out, ways, what, unit in sets:
        if held_out is not None:
            tables = {way: score_way(subject.forward, held_out, way, subject.memory, world).table for way in ways}
            whole = whole_tables(tables, held_out.sample_of_row, world)
            scores += perplexity_scores(whole, subject.tokenizer.vocab_size, what, unit)
    return scores


def caption_ways(subject: Subject) -> tuple[Way, ...]:
    """All, but for those that permute images where one image has too many of the captions."""
    ways = (*WAYS, MIXED)
    if subject.pairs is None or subject.pairs.is_permutable:
        return ways
    subject.notes.append("permuted vision is left out: one image has more than half of the captions")
    return tuple(way for way in ways if way[0] != "permuted")


def retrieval(subject: Subject) -> list[Score]:
    every, world = subject.every_pair, subject.world
    if every is None:
        return []
    latents = gather_latents(subject.forward, every.batches(), every.rows, subject.memory, world)
    return [] if latents is None else retrieval_scores(rank_all(latents, world))


def captioning(subject: Subject) -> list[Score]:
    """A caption an image of the drawn captions, by greedy choice; the images are dealt to the ranks in batches."""
    pairs, every = subject.pairs, subject.every_pair
    if pairs is None or every is None:
        return []
    images, first = np.unique(pairs.image_ids, return_index=True)
    references = references_of(images, every)
    world, made = subject.world, dict[int, str]()
    sampling = Sampling(max_tokens=min(CAPTION_TOKENS, subject.limit - 1))
    for start in range(world.rank * BATCH, len(first), world.size * BATCH):
        numbers = range(start, min(start + BATCH, len(first)))
        vectors = stacked(pairs, first[start : start + BATCH].tolist()).to(world.device)
        prompts = [[BOS]] * len(numbers)
        found = generate(subject.frozen, subject.memory, prompts, vectors, sampling, subject.limit)
        made |= {n: subject.tokenizer.decode(g.tokens) for n, g in zip(numbers, found, strict=True)}
    joined = dict(itertools.chain.from_iterable(part.items() for part in world.gather_objects(made)))
    scores, notes = caption_scores([joined[n] for n in range(len(first))], references)
    subject.notes.extend(notes)
    return scores


def references_of(images: Int[np.ndarray, "I"], captions: ValidationSet) -> list[list[str]]:
    """The texts of all captions of each of `images`, which are distinct and in order."""
    texts: list[list[str]] = [[] for _ in images]
    for chosen in np.flatnonzero(np.isin(captions.image_ids, images)).tolist():
        texts[int(np.searchsorted(images, captions.image_ids[chosen]))].append(captions.text(chosen))
    return texts


def stacked(pairs: ValidationSet, chosen: Sequence[int]) -> Float[Tensor, "N V"]:
    """The vectors of chosen captions."""
    vectors = [pairs.vector(at) for at in chosen]
    return torch.from_numpy(np.stack([vector for vector in vectors if vector is not None]))


def minimal_pairs(subject: Subject) -> list[Score]:
    items = subject.reader.minimal_pairs(subject.files["minimal_pairs"])
    return choices.minimal_pair_scores(subject.scorer, items, "minimal pairs")


def distractors(subject: Subject) -> list[Score]:
    """Of a file; without one, of captions of the held-out images."""
    path = subject.files.get("distractors")
    if path is not None:
        items = subject.reader.distractors(path)
    else:
        items = [] if subject.pairs is None else choices.held_out_choices(subject.pairs, CANDIDATES, subject.limit)
    return choices.distractor_scores(subject.scorer, items, "distractors") if items else []


def vqa(subject: Subject) -> list[Score]:
    items = subject.reader.vqa(subject.files["vqa"])
    return choices.vqa_scores(subject.scorer, items, "VQA")[0]


def winoground(subject: Subject) -> list[Score]:
    items = subject.reader.winoground(subject.files["winoground"])
    return choices.winoground_scores(subject.scorer, items, "Winoground")


def quantization(subject: Subject) -> list[Score]:
    model, pairs, world = subject.model, subject.pairs, subject.world
    scores = weight_scores(model)
    if pairs is None:
        return scores
    rounded = score_way(subject.forward, pairs, RIGHT, subject.memory, world).table
    with unrounded(model):
        plain = score_way(subject.forward, pairs, RIGHT, subject.memory, world).table
    units = pairs.sample_of_row
    both: dict[Way, Tensor] = {RIGHT: rounded, ("right", "unrounded"): plain}
    scores += loss_scores(*whole_tables(both, units, world).values())
    errors = rounding_tables(subject.forward, model, pairs.batches(), pairs.rows, subject.memory, world)
    return scores + rounding_scores(errors, units, world)


def memory(subject: Subject) -> list[Score]:
    """On every rank alike."""
    if subject.pairs is None or subject.shards is None:
        return []
    pairs = held_out_pairs(subject.shards, 2 * SHOWN, subject.limit)
    return recall_scores(subject.frozen, pairs, SHOWN) if len(pairs) > 3 else []


TASKS: dict[str, Callable[[Subject], list[Score]]] = {
    "perplexity": perplexity,
    "retrieval": retrieval,
    "captioning": captioning,
    "minimal_pairs": minimal_pairs,
    "distractors": distractors,
    "vqa": vqa,
    "winoground": winoground,
    "memory": memory,
    "quantization": quantization,
}
FROM_FILES = ("minimal_pairs", "vqa", "winoground")  # alone: distractors are made from shards where there is no file

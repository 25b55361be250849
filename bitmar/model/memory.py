"""Episodic memory: pure functions over a state of K slots, and the modules that write to and read from it.

After Larimar (Das et al. 2024, arXiv 2403.11901, section 3) with slots that stay apart, so that a reader can
be kept from the episodes of its own image. Shapes: B rows, T positions, N captions (rows, where not packed) or
episodes, K slots, C episode width, D model width, Z latent width, G groups of the recall loss, M captions of a group.

The state never is a Parameter. All micro-batches of an optimizer step read the state from before the step;
it changes once, at the step's end, in `commit`.

A third way to write, a gradient step on the slots themselves, is left out: its slots mix episodes of many images,
so that no mask could keep a reader from its own, and it keeps less of an episode than a direct write does
(tools/bench_memory.py measures both).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bitmar.batch import Packing, by_group
from bitmar.config import ModelConfig
from bitmar.model.attention import Heads, Shown, head_gates
from bitmar.model.quantize import BitLinear, RMSNorm
from bitmar.random_numbers import generator_of

Addressing = Literal["attention", "larimar"]

RIDGE = 1e-3  # Tikhonov term of the pseudo-inverse, for keys of unit length


@dataclass(frozen=True)
class MemoryState:
    keys: Float[Tensor, "K C"]
    values: Float[Tensor, "K C"]
    age: Int[Tensor, "K"]  # optimizer steps since the last write, or read that mattered
    usage: Float[Tensor, "K"]  # read mass received in all (fp64)
    image_ids: Int[Tensor, "K"]  # image of the slot's episode, 0 where none
    written: Bool[Tensor, "K"]

    @classmethod
    def empty(cls, slots: int, width: int, device: torch.device | str = "cpu") -> MemoryState:
        return cls(
            keys=torch.zeros(slots, width, device=device),
            values=torch.zeros(slots, width, device=device),
            age=torch.zeros(slots, dtype=torch.int64, device=device),
            usage=torch.zeros(slots, dtype=torch.float64, device=device),
            image_ids=torch.zeros(slots, dtype=torch.int64, device=device),
            written=torch.zeros(slots, dtype=torch.bool, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Episodes:
    """Candidates for the memory. `surprise`: the row's mean token loss, -inf where the row has no image."""

    surprise: Float[Tensor, "N"]
    rows: Int[Tensor, "N"]  # global row position
    image_ids: Int[Tensor, "N"]
    keys: Float[Tensor, "N C"]
    values: Float[Tensor, "N C"]

    def best(self, count: int) -> Episodes:
        """The `count` most surprising, ties by global position, best first."""
        order = torch.argsort(self.rows, stable=True)
        order = order[torch.argsort(self.surprise[order], descending=True, stable=True)][:count]
        return Episodes(*(getattr(self, f.name)[order] for f in dataclasses.fields(self)))

    def filled(self, count: int) -> Episodes:
        """At least `count` of them, as many on every rank: those that are added are never written."""
        lacking = max(0, count - len(self.rows))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        added = {name: value.new_zeros(lacking, *value.shape[1:]) for name, value in fields.items()}
        added["surprise"] = added["surprise"].fill_(float("-inf"))
        return Episodes.join([self, Episodes(**added)])

    @staticmethod
    def join(parts: list[Episodes]) -> Episodes:
        return Episodes(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Episodes)))


@dataclass(frozen=True)
class WriteReport:
    slots: tuple[int, ...]  # where each episode went, in order
    blends: int
    evictions: int


def address(
    query: Float[Tensor, "B T C"],
    keys: Float[Tensor, "#B K C"],
    allowed: Bool[Tensor, "B K"],
    sharpness: Float[Tensor, "1"] | float,
    addressing: Addressing,
) -> Float[Tensor, "B T K"]:
    """Weights over the slots, in the query's precision (fp32 or fp64); exactly 0 where not allowed.

    attention: softmax of sharpness x cosine over the allowed slots and a null slot of logit 0 (so a memory
    that has nothing to say, or is empty, returns nothing).
    larimar: least squares, w = q M^+ (Larimar, section 3.2), the pseudo-inverse over the allowed keys M with a
    ridge term: w = q M^T (M M^T + r I)^-1. Larimar's own memory, written from all the slots' episodes Z at once
    (W = Z M0^+, M = W^+ Z), spans the same space as Z, so its read z M^+ M is the projection of z that these
    weights make where values are the keys; ours reads the values instead.
    """
    query = F.normalize(query, dim=-1)
    keys = F.normalize(keys.to(query.dtype), dim=-1) * allowed[..., None]
    products = query @ keys.mT
    if addressing == "attention":
        logits = (products * sharpness).masked_fill(~allowed[:, None], float("-inf"))
        return torch.softmax(F.pad(logits, (0, 1)), dim=-1)[..., :-1]
    gram = keys @ keys.mT + RIDGE * torch.eye(keys.shape[-2], device=keys.device, dtype=keys.dtype)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(products.mT, factor).mT


def read(
    state: MemoryState,
    query: Float[Tensor, "B T C"],
    reader_ids: Int[Tensor, "B"],
    sharpness: Float[Tensor, "1"] | float,
    addressing: Addressing,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T K"]]:
    """(value, weights). A reader never sees slots of its own image (id 0 has no image and sees all)."""
    own = (reader_ids[:, None] == state.image_ids) & (reader_ids != 0)[:, None]
    weights = address(query, state.keys[None], state.written & ~own, sharpness, addressing)
    return weights @ state.values.to(weights.dtype), weights


def read_packed(
    state: MemoryState,
    query: Float[Tensor, "B T C"],
    reader_ids: Int[Tensor, "N"],
    sharpness: Float[Tensor, "1"] | float,
    addressing: Addressing,
    packing: Packing,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "X K"]]:
    """`read` for each caption of packed rows; the weights stand as Packing takes positions apart."""
    chunks = zip(packing.split(packing.apart(query)), packing.split_captions(reader_ids), strict=True)
    found = [read(state, asked, ids, sharpness, addressing) for asked, ids in chunks]
    values, weights = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*found, strict=True))
    return packing.together(values), weights


def write(
    state: MemoryState,
    keys: Float[Tensor, "N C"],
    values: Float[Tensor, "N C"],
    image_ids: list[int],
    alpha: float,
    match: float,
) -> tuple[MemoryState, WriteReport]:
    """Write N episodes in order. Differentiable in `keys` and `values`.

    An episode that matches a slot blends into it: old + alpha (new - old). A match is the slot of the same
    image with the most similar key, if that cosine reaches `match`; slots of other images never match, or a
    blended slot would hand out an image's own episode in spite of `read`'s mask. Otherwise it takes the least
    recently used slot: an unwritten one first, then the oldest, an episode of this very call last.
    """
    slot_image, written = state.image_ids.tolist(), state.written.tolist()
    staleness = [float("inf") if not w else float(a) for a, w in zip(state.age.tolist(), written, strict=True)]
    key_of: dict[int, Tensor] = {}
    value_of: dict[int, Tensor] = {}
    slots: list[int] = []
    blends = evictions = 0
    for n, image in enumerate(image_ids):
        same = [k for k, i in enumerate(slot_image) if written[k] and i == image] if image else []
        slot, cosine = _most_similar(keys[n], [(k, key_of.get(k, state.keys[k])) for k in same])
        if same and cosine >= match:
            old_key, old_value = key_of.get(slot, state.keys[slot]), value_of.get(slot, state.values[slot])
            key_of[slot] = old_key + alpha * (keys[n] - old_key)
            value_of[slot] = old_value + alpha * (values[n] - old_value)
            blends += 1
        else:
            slot = max(range(len(staleness)), key=staleness.__getitem__)
            evictions += written[slot]
            key_of[slot], value_of[slot] = keys[n], values[n]
            slot_image[slot], written[slot] = image, True
        staleness[slot] = -float(n + 1)
        slots.append(slot)
    if not slots:
        return state, WriteReport((), 0, 0)
    where = torch.tensor(list(key_of), device=state.keys.device)
    new_state = MemoryState(
        keys=state.keys.index_copy(0, where, torch.stack([key_of[k] for k in key_of])),
        values=state.values.index_copy(0, where, torch.stack([value_of[k] for k in key_of])),
        age=state.age.index_fill(0, where, 0),
        usage=state.usage,
        image_ids=torch.tensor(slot_image, device=where.device),
        written=torch.tensor(written, device=where.device),
    )
    return new_state, WriteReport(tuple(slots), blends, evictions)


def _most_similar(key: Tensor, candidates: list[tuple[int, Tensor]]) -> tuple[int, float]:
    if not candidates:
        return -1, -2.0
    others = torch.stack([c for _, c in candidates]).detach()
    cosines = F.cosine_similarity(key.detach()[None], others).tolist()
    best = max(range(len(cosines)), key=cosines.__getitem__)
    return candidates[best][0], cosines[best]


def grow_older(state: MemoryState, read_mass: Float[Tensor, "K"]) -> MemoryState:
    """One optimizer step passes: ages grow by 1; a read that mattered sets the slot's age to 0.

    A read matters when the slot got at least the mean of the written slots' read mass (summed over all ranks).
    """
    count = state.written.sum().clamp(min=1)
    share = read_mass.sum() / count
    mattered = state.written & (read_mass >= share) & (read_mass > 0)
    age = torch.where(mattered, 0, state.age + state.written.long())
    return dataclasses.replace(state, age=age, usage=state.usage + read_mass.double())


def commit(
    state: MemoryState,
    episodes: Episodes,
    read_mass: Float[Tensor, "K"],
    config: ModelConfig,
    seed: int,
    step: int,
) -> tuple[MemoryState, WriteReport]:
    """The memory after an optimizer step: ages from the read mass, then the best episodes written in order.

    `episodes` and `read_mass` are those of all ranks (gathered), so the result is the same on every rank.
    Larimar's write noise comes from (seed, step) alone.
    """
    state = grow_older(state, read_mass)
    chosen = episodes.best(config.writes_per_step)
    real = torch.isfinite(chosen.surprise)
    keys, values = chosen.keys[real], chosen.values[real]
    if config.memory_noise > 0 and len(keys):
        noise = torch.randn(keys.shape, generator=generator_of(seed, step)).to(keys.device)
        keys = keys + config.memory_noise * noise / keys.shape[1] ** 0.5
    return write(state, keys, values, chosen.image_ids[real].tolist(), config.memory_alpha, config.memory_match)


class EpisodeWriter(nn.Module):
    """episode = norm(W_write [text_latent, vision_latent]), the slot's value; key = W_key episode, unit length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        joined = config.text_latent_size + config.vision_latent_size
        self.input_norm = RMSNorm(joined)
        self.write = BitLinear(joined, config.episode_dim, config.quantization)
        self.value_norm = RMSNorm(config.episode_dim)
        self.key = BitLinear(config.episode_dim, config.episode_dim, config.quantization)

    def forward(
        self, text_latent: Float[Tensor, "N Z"], vision_latent: Float[Tensor, "N Z"]
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """(keys, episodes), both fp32."""
        joined = self.input_norm(torch.cat([text_latent, vision_latent], dim=-1))
        episode = self.value_norm(self.write(joined))
        return F.normalize(self.key(episode).float(), dim=-1), episode.float()


# Plain, because ZeRO-3 finds the tensors in tuples but not in dataclasses: hidden states, read mass of each slot over
# the marked positions (fp64), the gate, and what the image cue and the text cue recalled.
Reading = tuple[Float[Tensor, "B T D"], Float[Tensor, "K"], Float[Tensor, "1"], Float[Tensor, "N 2 C"] | None]


class MemoryReader(nn.Module):
    """x + tanh(gate) * W_out norm(read(query(x))); the same query reads the recall copies from pooled cues."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.query_norm = RMSNorm(config.width)
        self.query = BitLinear(config.width, config.episode_dim, config.quantization)
        self.output_norm = RMSNorm(config.episode_dim)
        self.output = BitLinear(config.episode_dim, config.width, config.quantization)
        self.gate = nn.Parameter(torch.full((1,), 0.25))
        self.is_masked = bool(config.masked_in("memory", 0))
        # cosines count tenfold at the start; least squares needs no such factor
        softmax = config.memory_addressing == "attention"
        self.log_sharpness = nn.Parameter(torch.full((1,), 2.3026)) if softmax else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MemoryState,
        reader_ids: Int[Tensor, "N"],
        mask: Bool[Tensor, "B T"],
        recall: RecallInput | None,
        packing: Packing | None = None,
        shown: Shown | None = None,
    ) -> Reading:
        sharpness = 1.0 if self.log_sharpness is None else self.log_sharpness.float().exp()
        query = self.query(self.query_norm(x))
        cues = None
        if recall is not None:
            cues = self.query(self.query_norm(torch.stack([recall.image_cue, recall.text_cue], dim=1)))
        recalled = None
        with torch.autocast(x.device.type, enabled=False):  # addressing in bf16 is no addressing
            addressing = self.config.memory_addressing
            if packing is None:
                value, weights = read(state, query.float(), reader_ids, sharpness, addressing)
                counted = mask
            else:
                value, weights = read_packed(state, query.float(), reader_ids, sharpness, addressing, packing)
                counted = packing.inside
            if recall is not None and cues is not None:
                recalled = read_copies(state, recall, cues.float(), sharpness, self.config)
        read_mass = (weights.detach().abs() * counted[..., None]).flatten(0, -2).sum(0, dtype=torch.float64)
        gate = torch.tanh(self.gate)
        found = self.output(self.output_norm(value.to(x.dtype)))
        if shown is not None:
            assert packing is None, "heads are shown of unpacked rows"
            z = found[:, None]  # behind the norm, which would take the gate out again
            found = shown.take(Heads(weights.detach()[:, None], z.detach(), head_gates(z), (0,), 1), z)[:, 0]
        x = x + gate * (found * 0 if self.is_masked else found)  # every parameter keeps a gradient
        return x, read_mass, gate.detach(), recalled


@dataclass(frozen=True)
class RecallInput:
    """Episodes of a micro-batch and one-modality cues for them (pooled hidden states)."""

    keys: Float[Tensor, "N C"]
    values: Float[Tensor, "N C"]
    image_ids: Int[Tensor, "N"]
    counted: Bool[Tensor, "N"]
    image_cue: Float[Tensor, "N D"]
    text_cue: Float[Tensor, "N D"]
    groups: Int[Tensor, "G M"]  # Batch.groups(recall_group)


def read_copies(
    state: MemoryState,
    recall: RecallInput,
    cues: Float[Tensor, "N 2 C"],
    sharpness: Float[Tensor, "1"] | float,
    config: ModelConfig,
) -> Float[Tensor, "N 2 C"]:
    """Write each group's episodes differentiably to a copy of the state and read every cue of the group from it.

    Groups are of consecutive captions (Batch.groups), so the result does not depend on how rows are split over
    micro-batches and ranks. The committed state is not touched.
    """
    ids, counted = recall.image_ids.tolist(), recall.counted.tolist()
    copies = []
    for group in recall.groups.tolist():
        members = [n for n in group if n >= 0 and counted[n]]
        episodes = (recall.keys[members], recall.values[members], [ids[n] for n in members])
        copies.append(write(state, *episodes, config.memory_alpha, config.memory_match)[0])
    keys = torch.stack([c.keys for c in copies])
    values = torch.stack([c.values for c in copies])
    written = torch.stack([c.written for c in copies])
    grouped = by_group(cues, recall.groups).flatten(1, 2)
    weights = address(grouped, keys, written, sharpness, config.memory_addressing)
    found = (weights @ values).unflatten(1, (-1, 2)).flatten(0, 1)
    return found if len(found) == len(cues) else found[recall.groups.flatten() >= 0]

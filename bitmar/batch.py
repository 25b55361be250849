"""Batch: what the model eats.

Shapes: B rows, T text positions, V width of the image vector, N captions (of unpacked rows N = B: one a row, or none
where the row is text), S slots a row, X positions of the chunks that captions are taken apart into,
G groups, M captions of a group.

A row is one sequence: a caption with its image vector; or several captions, each with its own; or several text
records laid end to end. `segments` tells the records of a row apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from shards.rows import IGNORED, PER_SLOT, Rows

IGNORE = IGNORED  # the target of a position that is not trained
CHUNKS = 8  # of captions by length; more have less padding but are more calls


@dataclass(frozen=True)
class Packing:
    """Where the captions of packed rows stand: takes rows [B T] apart into captions, and puts them together again.

    What works on one position alone runs on the rows, which have next to no padding; where positions of a caption
    meet (attention, its image, its memory), each caption is a row of its own, so that none can see another. Taken
    apart, captions stand by length in up to CHUNKS chunks, each [n L] as wide as its longest, so that these have little
    padding too.
    """

    slots: int  # S
    rows: int  # B
    chunks: tuple[tuple[int, int], ...]  # (n, L) of each
    places: Int[Tensor, "N"]  # row * S + slot of each caption, rising
    lengths: Int[Tensor, "N"]
    order: Int[Tensor, "N"]  # the captions as they stand in the chunks
    back: Int[Tensor, "N"]  # where in that order each caption is
    inside: Bool[Tensor, "X"]  # positions of the chunks, one after the other, that hold a token
    from_rows: Int[Tensor, "X"]  # where in the flat rows each position of the chunks stands
    from_chunks: Int[Tensor, "BT"]  # where in the flat chunks each position of the rows stands
    chunk_pads: Int[Tensor, "_"]  # flat positions of the chunks that stand nowhere in the rows
    row_pads: Int[Tensor, "_"]  # and the other way round

    @classmethod
    def of(cls, segments: np.ndarray, slots: int, device: torch.device | str = "cpu") -> Packing:
        """The packing of `segments` int [B, T]; a batch without any caption gets one without tokens."""
        rows, width = segments.shape
        at = np.flatnonzero(segments)
        place = at // width * slots + segments.reshape(-1)[at] - 1
        places, begins, lengths = np.unique(place, return_index=True, return_counts=True)
        if not len(places):
            places, begins, lengths = (np.zeros(1, np.int64) for _ in range(3))
        order = np.argsort(-lengths, kind="stable")
        parts = np.array_split(order, min(CHUNKS, len(order)))
        chunks = tuple((len(part), max(1, int(lengths[part[0]]))) for part in parts)
        wide = np.repeat([width for _, width in chunks], [count for count, _ in chunks])  # of each caption's chunk
        starts = np.cumsum(wide) - wide
        caption = np.repeat(np.arange(len(order)), wide)
        offset = np.arange(int(wide.sum())) - starts[caption]
        inside = offset < lengths[order][caption]
        from_rows, from_chunks = np.zeros(len(inside), np.int64), np.zeros(rows * width, np.int64)
        if len(at):
            from_rows[inside] = at[(begins[order][caption] + offset)[inside]]
            from_chunks[from_rows[inside]] = np.flatnonzero(inside)
        pads = np.flatnonzero(~inside), np.flatnonzero(segments == 0)
        arrays = (places, lengths, order, np.argsort(order), inside, from_rows, from_chunks, *pads)
        on_device = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
        return cls(slots, rows, chunks, *on_device)

    def apart(self, x: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "X *D"]:
        """The values at the positions of the chunks, 0 past a caption's end."""
        moves = (self.from_rows, self.chunk_pads, self.from_chunks, self.row_pads)
        return _Move.apply(x.flatten(0, 1), *moves)  # type: ignore[return-value]

    def together(self, x: Shaped[Tensor, "X *D"]) -> Shaped[Tensor, "B T *D"]:
        """The values at the positions of the rows, 0 where padded."""
        moves = (self.from_chunks, self.row_pads, self.from_rows, self.chunk_pads)
        return _Move.apply(x, *moves).unflatten(0, (self.rows, -1))  # type: ignore[union-attr]

    def split(self, x: Shaped[Tensor, "X *D"]) -> list[Tensor]:
        """The chunks [n L *D] of what `apart` gave."""
        return [
            part.unflatten(0, size)
            for part, size in zip(x.split([n * w for n, w in self.chunks]), self.chunks, strict=True)
        ]

    def split_captions(self, x: Shaped[Tensor, "N *D"]) -> list[Tensor]:
        """[n *D] for each chunk."""
        return list(x[self.order].split([n for n, _ in self.chunks]))

    def total(self, x: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "N *D"]:
        """The sum over each caption's positions."""
        return torch.cat([part.sum(1) for part in self.split(self.apart(x))])[self.back]

    def by_slot(self, x: Shaped[Tensor, "N *D"]) -> Shaped[Tensor, "BS *D"]:
        """A value for each slot of each row, 0 where it holds no caption."""
        return x.new_zeros(self.rows * self.slots, *x.shape[1:]).index_copy(0, self.places, x)


class _Move(torch.autograd.Function):
    """x[index] with 0 at `pads`. `back` and `back_pads` undo it, so that the backward pass is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, pads: Tensor, back: Tensor, back_pads: Tensor) -> Tensor:
        ctx.save_for_backward(back, back_pads)
        return x.index_select(0, index).index_fill_(0, pads, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, back_pads = ctx.saved_tensors
        return grads[0].index_select(0, back).index_fill_(0, back_pads, 0), None, None, None, None


@dataclass(frozen=True)
class Batch:
    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]  # the next token, IGNORE where padded or masked
    segments: Int[Tensor, "B T"]  # 1, 2, ... per record of the row; 0 is padding
    positions: Int[Tensor, "B T"]  # restart at each record
    vision: Float[Tensor, "N V"]
    has_vision: Bool[Tensor, "N"]
    image_ids: Int[Tensor, "N"]  # hash of the vector, 0 without an image
    words: Int[Tensor, "B"]
    rows: Int[Tensor, "B"]  # global row position: (phase << 40) | row of the phase
    valid: Bool[Tensor, "B"]  # False: a masked row that only fills the batch up
    packed: bool  # several records in a row: attention stays inside each
    packing: Packing | None = None  # several captions in a row, each with its own image
    trained: Int[Tensor, "M"] | None = None  # which of the B T positions have a target; None: not told, all may have

    @classmethod
    def from_rows(cls, rows: Rows, device: torch.device | str = "cpu") -> Batch:
        """Move the loader's numpy arrays to `device`; empty slots of packed captions are left behind."""
        packing = Packing.of(rows.segments, rows.slots, device) if rows.slots > 1 else None
        trained = torch.from_numpy(np.flatnonzero(rows.targets != IGNORE)).to(device, non_blocking=True)
        values: dict[str, Any] = {"packed": rows.packed, "packing": packing, "trained": trained}
        for f in dataclasses.fields(cls):
            if f.name not in values:
                value = torch.from_numpy(getattr(rows, f.name))
                if packing is not None and f.name in PER_SLOT:
                    value = value[packing.places.cpu()]
                values[f.name] = value.to(device, non_blocking=True)
        return cls(**(values | {"vision": values["vision"].float()}))  # shards hold float16, half as much to move

    @classmethod
    def of_text(cls, tokens: Int[Tensor, "B T"], vision_width: int) -> Batch:
        """Rows of tokens of one length, without an image; each token's target is the next."""
        rows, length = tokens.shape
        none = torch.zeros(rows, dtype=torch.bool)
        return cls(
            tokens=tokens,
            targets=torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE),
            segments=torch.ones(rows, length, dtype=torch.int32),
            positions=torch.arange(length, dtype=torch.int32).repeat(rows, 1),
            vision=torch.zeros(rows, vision_width),
            has_vision=none,
            image_ids=torch.zeros(rows, dtype=torch.int64),
            words=torch.full((rows,), length),
            rows=torch.arange(rows),
            valid=~none,
            packed=False,
        )

    @property
    def token_mask(self) -> Bool[Tensor, "B T"]:
        """Positions that hold a token of a row that counts."""
        return (self.segments > 0) & self.valid[:, None]

    @property
    def pair_mask(self) -> Bool[Tensor, "N"]:
        """Captions that count and have an image."""
        return self.has_vision & (self.valid if self.packing is None else self.valid[self._row_of(self.packing)])

    @property
    def captions(self) -> Int[Tensor, "N"]:
        """Each caption's place in the global order of the step."""
        if self.packing is None:
            return self.rows
        return self.rows[self._row_of(self.packing)] * self.packing.slots + self.packing.places % self.packing.slots

    @property
    def samples(self) -> Int[Tensor, ""]:
        """How many captions, or rows of text, count."""
        return (self.valid if self.packing is None else self.pair_mask).sum()

    def groups(self, size: int) -> Int[Tensor, "G M"]:
        """The captions of each group, -1 where it has fewer: `size` consecutive ones within `size` consecutive rows.

        Rows are split over micro-batches and ranks by whole groups, so a caption's group does not depend on the split.
        """
        count = len(self.has_vision)
        if self.packing is None:
            return torch.arange(count, device=self.rows.device).view(-1, size)
        block = self.packing.places // (self.packing.slots * size)
        members: list[list[int]] = [[]]
        last = 0
        for caption, of in enumerate(block.tolist()):
            if of != last or len(members[-1]) == size:
                members.append([])
            members[-1].append(caption)
            last = of
        padded = [group + [-1] * (size - len(group)) for group in members if group]
        return torch.tensor(padded, device=self.rows.device)

    def replace(self, **changes: Tensor | bool | Packing | None) -> Batch:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Batch:
        """Of rows that are not packed captions."""
        assert self.packing is None, "packings are made where they are used"
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @staticmethod
    def _row_of(packing: Packing) -> Int[Tensor, "N"]:
        return packing.places // packing.slots


def by_group(x: Shaped[Tensor, "N *D"], groups: Int[Tensor, "G M"]) -> Shaped[Tensor, "G M *D"]:
    """The values of each group's captions; those of the first caption where the group has fewer."""
    if groups.numel() == len(x):  # every caption is in one group, in their order
        return x.unflatten(0, tuple(groups.shape))
    return x[groups.clamp(min=0)]

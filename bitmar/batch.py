"""Batch: what the model eats.

Shapes: B rows, T text positions, V width of the image vector, N captions (of unpacked rows N = B: one a row, or none
where the row is text), S slots a row, L positions of the longest caption, G groups, M captions of a group.

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


@dataclass(frozen=True)
class Packing:
    """Where the captions of packed rows stand: moves values between rows [B T] and captions [N L].

    What works on one position alone runs on the rows, which have next to no padding; where positions of a caption
    meet (attention, pooling, its image, its memory), they stand in captions, so that none can see another.
    """

    slots: int  # S
    places: Int[Tensor, "N"]  # row * S + slot of each caption, rising
    inside: Bool[Tensor, "N L"]  # positions that hold a token
    in_rows: Int[Tensor, "NL"]  # where in the flat rows each position of a caption stands
    in_captions: Int[Tensor, "BT"]  # where in the flat captions each position of a row stands
    caption_pads: Int[Tensor, "_"]  # flat positions of captions that stand nowhere in the rows
    row_pads: Int[Tensor, "_"]  # and the other way round
    rows: int  # B

    @classmethod
    def of(cls, segments: np.ndarray, slots: int, device: torch.device | str = "cpu") -> Packing:
        """The packing of `segments` int [B, T]; a batch without any caption gets one without tokens."""
        rows, width = segments.shape
        at = np.flatnonzero(segments)
        place = at // width * slots + segments.reshape(-1)[at] - 1
        places, lengths = np.unique(place, return_counts=True)
        if not len(places):
            places = lengths = np.zeros(1, np.int64)
        longest = max(1, int(lengths.max()))
        inside = np.arange(longest) < lengths[:, None]
        in_captions = np.zeros(rows * width, np.int64)
        in_rows = np.zeros(inside.size, np.int64)
        in_captions[at] = np.flatnonzero(inside)
        in_rows[in_captions[at]] = at
        pads = np.flatnonzero(~inside), np.flatnonzero(segments == 0)
        arrays = (places.astype(np.int64), inside, in_rows, in_captions, *pads)
        return cls(slots, *(torch.from_numpy(a).to(device, non_blocking=True) for a in arrays), rows=rows)

    def captions(self, x: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "N L *D"]:
        """The values of each caption's positions, 0 past its end."""
        moves = (self.in_rows, self.caption_pads, self.in_captions, self.row_pads)
        return _Move.apply(x.flatten(0, 1), *moves).unflatten(0, tuple(self.inside.shape))  # type: ignore[union-attr]

    def to_rows(self, x: Shaped[Tensor, "N L *D"]) -> Shaped[Tensor, "B T *D"]:
        """The values of each row's positions, 0 where padded."""
        moves = (self.in_captions, self.row_pads, self.in_rows, self.caption_pads)
        return _Move.apply(x.flatten(0, 1), *moves).unflatten(0, (self.rows, -1))  # type: ignore[union-attr]

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

    @classmethod
    def from_rows(cls, rows: Rows, device: torch.device | str = "cpu") -> Batch:
        """Move the loader's numpy arrays to `device`; empty slots of packed captions are left behind."""
        packing = Packing.of(rows.segments, rows.slots, device) if rows.slots > 1 else None
        values: dict[str, Any] = {"packed": rows.packed, "packing": packing}
        for f in dataclasses.fields(cls):
            if f.name not in values:
                value = torch.from_numpy(getattr(rows, f.name))
                if packing is not None and f.name in PER_SLOT:
                    value = value[packing.places.cpu()]
                values[f.name] = value.to(device, non_blocking=True)
        return cls(**(values | {"vision": values["vision"].float()}))  # shards hold float16, half as much to move

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

    @staticmethod
    def _row_of(packing: Packing) -> Int[Tensor, "N"]:
        return packing.places // packing.slots


def by_group(x: Shaped[Tensor, "N *D"], groups: Int[Tensor, "G M"]) -> Shaped[Tensor, "G M *D"]:
    """The values of each group's captions; those of the first caption where the group has fewer."""
    if groups.numel() == len(x):  # every caption is in one group, in their order
        return x.unflatten(0, tuple(groups.shape))
    return x[groups.clamp(min=0)]

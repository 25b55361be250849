"""Batch: what the model eats.

Shapes: B rows, T text positions, V width of the image vector. A row is one sequence: a caption with its
image vector, or several text records laid end to end (told apart by `segments`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shards.rows import IGNORED, Rows

IGNORE = IGNORED  # the target of a position that is not trained


@dataclass(frozen=True)
class Batch:
    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]  # the next token, IGNORE where padded or masked
    segments: Int[Tensor, "B T"]  # 1, 2, ... per record of the row; 0 is padding
    positions: Int[Tensor, "B T"]  # restart at each record
    vision: Float[Tensor, "B V"]
    has_vision: Bool[Tensor, "B"]
    image_ids: Int[Tensor, "B"]  # hash of the vector, 0 without an image
    words: Int[Tensor, "B"]
    rows: Int[Tensor, "B"]  # global row position: (phase << 40) | row of the phase
    valid: Bool[Tensor, "B"]  # False: a masked row that only fills the batch up
    packed: bool  # several records in a row: attention stays inside each

    @classmethod
    def from_rows(cls, rows: Rows, device: torch.device | str = "cpu") -> Batch:
        """Move the loader's numpy arrays to `device`."""
        values = {}
        for f in dataclasses.fields(cls):
            value = getattr(rows, f.name)
            values[f.name] = value if f.name == "packed" else torch.from_numpy(value).to(device, non_blocking=True)
        return cls(**(values | {"vision": values["vision"].float()}))  # shards hold float16, half as much to move

    @property
    def token_mask(self) -> Bool[Tensor, "B T"]:
        """Positions that hold a token of a row that counts."""
        return (self.segments > 0) & self.valid[:, None]

    @property
    def pair_mask(self) -> Bool[Tensor, "B"]:
        """Rows that count and have an image."""
        return self.has_vision & self.valid

    def replace(self, **changes: Tensor | bool) -> Batch:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

"""Which block a raw record belongs to: a keyed permutation of record numbers, cut into blocks of equal size.

A Feistel network permutes the smallest 2^(2k) >= N numbers, and is applied again to what falls outside of N ("cycle
walking", Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3). So any block is known from
(N, seed) alone: nothing is stored, and neither rejected records nor other blocks change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Division:
    """N records in blocks of `size` (the last may be smaller), mixed by `seed`; `name` tells divisions apart."""

    records: int
    size: int
    seed: int
    name: str

    def __len__(self) -> int:
        """How many blocks there are."""
        return -(-self.records // self.size)

    def block(self, number: int) -> np.ndarray:
        """int64 [at most size]: the records of a block, in its order."""
        low = number * self.size
        return self._permuted(np.arange(low, min(low + self.size, self.records), dtype=np.uint64))

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        half = max(1, -(-(self.records - 1).bit_length() // 2))
        values = self._network(values, half)
        outside = np.flatnonzero(values >= self.records)
        while len(outside):
            values[outside] = self._network(values[outside], half)
            outside = outside[values[outside] >= self.records]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray, half: int) -> np.ndarray:
        shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
        left, right = values >> shift, values & mask
        for turn in range(ROUNDS):
            key = np.uint64(xxhash.xxh3_64_intdigest(f"{self.name} {self.seed} {turn}".encode()))
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << shift | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64: the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom generators", 2014)."""
    mixed = values * _ODD
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

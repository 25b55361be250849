"""Random numbers that depend on what they are for, and on nothing else."""

from __future__ import annotations

import numpy as np
import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose numbers every one of `numbers` (>= 0) decides.

    torch seeds its CPU generator with 32 bits of what it is given: shifting numbers beside each other loses some.
    """
    (seed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(seed))

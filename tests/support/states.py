"""What an engine holds, put together from its ranks' fragments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitmar.engine.fragments import KINDS
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine


def whole_states(engine: ZeroEngine, world: World) -> dict[str, dict[str, Tensor]]:
    """Weight and moments of every parameter, whole, on every rank (a collective)."""
    mine = {f.name: (f.start, {k: t.clone() for k, t in f.tensors.items()}) for f in engine.fragments()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, shape in engine.parameter_shapes().items():
        numbers, owners = torch.zeros(len(KINDS), math.prod(shape)), torch.zeros(math.prod(shape))
        if name in mine:
            start, tensors = mine[name]
            for row, kind in zip(numbers, KINDS, strict=True):
                row[start : start + len(tensors[kind])] = tensors[kind]
            owners[start : start + len(tensors["model"])] += 1
        assert bool((world.sum(owners) == 1).all()), f"{name} has numbers of no rank, or of several"
        found[name] = dict(zip(KINDS, (part.view(shape) for part in world.sum(numbers)), strict=True))
    return found

"""Bytes that a rank needs, before there is a rank: ZeRO's state by formula, activations by tracing the model.

The state follows DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), whose partitions are padded and which
keeps a second copy of the weights that a rank steps under ZeRO-1 and 2. Activations are those of a forward and
backward pass on fake tensors, which have shapes and no memory: what autograd keeps, and the temporaries on top.
Everything is fp32 but what the pass itself computes in bf16.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitmar.batch import Batch
from bitmar.config import Config, ModelConfig
from bitmar.engine.world import World
from bitmar.losses import compute_losses
from bitmar.model.bitmar import BitMar, component_parameters
from bitmar.model.memory import MemoryState

FP32 = 4
TRACED_ROWS = 8
ALLREDUCE_ELEMENTS = 500_000_000  # DeepSpeed's buffer of a plain all-reduce (engine.buffered_allreduce_fallback)


@dataclass(frozen=True)
class ZeroSettings:
    """What of a ds_config decides over memory; numbers are elements, with DeepSpeed's defaults."""

    stage: int
    optimizer_on: str = "none"  # none (the device), cpu or nvme
    parameters_on: str = "none"
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    persistence: int = 100_000  # ZeRO-3: parameters of at most so many elements stay gathered
    max_live: int = 1_000_000_000
    prefetch: int = 50_000_000
    sub_group: int = 1_000_000_000
    secondary: int = 1  # ZeRO++: ranks that share a second copy of the weights

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> ZeroSettings:
        """The settings of a checked ds_config (bitmar.engine.zero.read_ds_config)."""
        zero = ds_config["zero_optimization"]
        stage = zero["stage"]
        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            optimizer_on=(zero.get("offload_optimizer") or {}).get("device", "none"),
            parameters_on=(zero.get("offload_param") or {}).get("device", "none"),
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=stage == 3 if overlap is None else bool(overlap),
            persistence=int(zero.get("stage3_param_persistence_threshold", cls.persistence)),
            max_live=int(zero.get("stage3_max_live_parameters", cls.max_live)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            sub_group=int(zero.get("sub_group_size", cls.sub_group)),
            secondary=int(zero.get("zero_hpz_partition_size", 1)),
        )


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the training state of the fullest rank; `host` and `disk` hold what a ds_config offloads."""

    parameters: int  # what the modules compute with
    gradients: int
    optimizer: int  # both moments, and the weights that are stepped where they are a copy
    buckets: int  # communication: filled as far as there are gradients
    gathered: int = 0  # ZeRO-3: weights of other ranks that are held at a time
    step: int = 0  # what the update holds on top, when activations are gone
    host: int = 0
    disk: int = 0

    @property
    def lasting(self) -> int:
        """What is held from step to step, gradients while they accumulate included."""
        return self.parameters + self.gradients + self.optimizer


def parameter_groups(model: BitMar) -> list[list[int]]:
    """Elements of every parameter, by optimizer group (matrices and the rest of each component)."""
    groups = []
    for parameters in component_parameters(model).values():
        for matrices in (True, False):
            members = [p.numel() for _, p in parameters if (p.ndim > 1) == matrices]
            if members:
                groups.append(members)
    return groups


def state_bytes(groups: Sequence[Sequence[int]], settings: ZeroSettings, world: int) -> StateBytes:
    """The state of one of `world` ranks that train parameters of `groups` (elements)."""
    total = sum(map(sum, groups))
    if settings.stage == 0:
        reduced = min(total, ALLREDUCE_ELEMENTS) if world > 1 else 0
        return StateBytes(FP32 * total, FP32 * total, 2 * FP32 * total, FP32 * reduced)
    return (_state_bytes_3 if settings.stage == 3 else _state_bytes_12)(groups, settings, world)


def _state_bytes_12(groups: Sequence[Sequence[int]], settings: ZeroSettings, world: int) -> StateBytes:
    """ZeRO-1 and 2: each group is one flat buffer, padded to 2 elements a rank (stage_1_and_2.py, __init__)."""
    flat = [-(-sum(group) // (2 * world)) * 2 * world for group in groups]
    own = sum(flat) // world
    largest = max(flat) // world
    gradients = sum(map(sum, groups)) if settings.stage == 1 else _owned_whole(groups, flat, world)
    buckets = settings.reduce_bucket * (2 if settings.overlap else 1)
    optimizer = 3 * own  # the weights once more, and two moments
    if settings.optimizer_on == "none":
        return StateBytes(FP32 * sum(flat), FP32 * gradients, FP32 * optimizer, FP32 * buckets, step=FP32 * largest)
    widest = max(map(max, groups))
    moved = optimizer + 2 * own  # and gradients, and the weights on their way back
    held = gradients if settings.stage == 1 else 2 * widest
    return StateBytes(FP32 * sum(flat), FP32 * held, 0, FP32 * buckets, host=FP32 * moved)


def _owned_whole(groups: Sequence[Sequence[int]], flat: Sequence[int], world: int) -> int:
    """Elements of the parameters that reach into a rank's part: ZeRO-2 keeps their gradients whole; the most."""
    most = 0
    for rank in range(world):
        held = 0
        for group, size in zip(groups, flat, strict=True):
            first, last = rank * size // world, (rank + 1) * size // world
            start = 0
            for count in group:
                if start < last and start + count > first:
                    held += count
                start += count
        most = max(most, held)
    return most


def _state_bytes_3(groups: Sequence[Sequence[int]], settings: ZeroSettings, world: int) -> StateBytes:
    """ZeRO-3: every parameter is padded to the ranks; the weights that are stepped are a copy here too."""
    sizes = [count for group in groups for count in group]
    own = sum(-(-count // world) for count in sizes)
    total = sum(sizes)
    persistent = sum(count for count in sizes if count <= settings.persistence)
    live = min(total, persistent + settings.max_live + settings.prefetch)
    largest = min(max(sum(-(-count // world) for count in group) for group in groups), settings.sub_group)
    secondary = -(-total // settings.secondary) if settings.secondary > 1 else 0
    # a bucket is copied into the order of the ranks to be reduced, and fetched weights out of it
    copies = min(settings.reduce_bucket, total) + min(settings.prefetch, total) if world > 1 else 0
    device = {"parameters": own + secondary, "gradients": own, "optimizer": 3 * own, "step": largest}
    host = disk = 0
    if settings.optimizer_on != "none":
        device |= {"optimizer": 0, "gradients": 0, "step": 0}
        moved = 3 * own
        host += 2 * own + (moved if settings.optimizer_on == "cpu" else 3 * largest)  # gradients, and the update's
        disk += 0 if settings.optimizer_on == "cpu" else moved
    if settings.parameters_on != "none":
        device["parameters"] = secondary
        host += own if settings.parameters_on == "cpu" else 0
        disk += own if settings.parameters_on == "nvme" else 0
    return StateBytes(
        **{name: FP32 * count for name, count in device.items()},
        buckets=FP32 * (settings.reduce_bucket + copies),
        gathered=FP32 * live,
        host=FP32 * host,
        disk=FP32 * disk,
    )


def memory_module_bytes(model: ModelConfig) -> int:
    """The episodic memory before and after a write, which every rank holds whole."""
    slots, width = model.memory_size, model.episode_dim
    return 2 * slots * (2 * FP32 * width + 8 + 8 + 8 + 1)  # keys, values, age, usage, image, written


def activation_bytes(config: Config, dtype: torch.dtype, rows: int) -> int:
    """The most that a micro-batch of `rows` of any phase needs on top of the state, each as long as it may be."""
    model = config.model
    recompute = config.engine.activation_checkpointing
    text = any(set(phase.mix) != {"pairs"} for phase in config.phases)  # needs what captions do, and a mask
    traced = _peak(model, rows, config.data.row_tokens, text, recompute, dtype)
    if any(phase.losses.get("recall", 0) > 0 for phase in config.phases):
        # each group's copy of keys and values, twice, and their gradients
        traced += 4 * 2 * FP32 * -(-rows // model.recall_group) * model.memory_size * model.episode_dim
    return traced


def _peak(model: ModelConfig, rows: int, length: int, text: bool, recompute: bool, dtype: torch.dtype) -> int:
    """`_traced` of any depth and number of rows, both of which it is linear in: tracing much takes time."""

    def of(encoder: int, decoder: int, rows: int) -> int:
        shallow = dataclasses.replace(model, encoder_layers=encoder, decoder_layers=decoder)
        return _traced(shallow, rows, length, text, recompute, dtype)

    def at(rows: int) -> int:
        layers = model.encoder_layers + model.decoder_layers
        if layers <= 3:
            return of(model.encoder_layers, model.decoder_layers, rows)
        few, more = of(1, 1, rows), of(1, 2, rows)
        return few + (layers - 2) * (more - few)

    if rows <= 2 * TRACED_ROWS:
        return at(rows)
    few, more = at(TRACED_ROWS), at(2 * TRACED_ROWS)
    return few + (rows - TRACED_ROWS) * (more - few) // TRACED_ROWS


@lru_cache(maxsize=256)
def _traced(model: ModelConfig, rows: int, length: int, text: bool, recompute: bool, dtype: torch.dtype) -> int:
    """Peak bytes of a forward and backward pass, parameters and their gradients not counted.

    The other losses than the language model's need next to nothing, and the recall writes by the values of image ids,
    which fakes lack.
    """
    world = World(0, 1, 0, 1, torch.device("cpu"))
    with FakeTensorMode():
        network = BitMar(model, activation_checkpointing=recompute, compute_dtype=dtype)
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(_let_go)
        with _LiveBytes() as live:
            batch = _longest_batch(model, rows, length, text)
            memory = MemoryState.empty(model.memory_size, model.episode_dim)
            outputs = network(batch, memory)
            losses = compute_losses(outputs, batch, world, model, {"lm"})
            loss = losses.sums["lm"] + 0.0 * outputs.side_sum()
            del outputs, losses
            loss.backward()
    return live.peak


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _longest_batch(model: ModelConfig, rows: int, length: int, text: bool) -> Batch:
    positions = torch.zeros(rows, length, dtype=torch.int32)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    of_row = torch.zeros(rows, dtype=torch.int64)
    valid = torch.ones(rows, dtype=torch.bool)
    return Batch(
        tokens=tokens,
        targets=tokens,
        segments=positions,
        positions=positions,
        vision=torch.zeros(rows, model.vision_encoder_dim),
        has_vision=valid,
        image_ids=of_row,
        words=of_row,
        rows=of_row,
        valid=valid,
        packed=text,
    )


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still held; `peak` is the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()  # ids of storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._held:
            return
        self._held.add(id(storage))
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, id(storage), size)

    def _freed(self, storage: int, size: int) -> None:
        self._held.discard(storage)
        self.now -= size

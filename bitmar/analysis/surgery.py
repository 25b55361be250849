"""Surgery on attention heads: a checkpoint with heads pruned, masked or reset, for the trainer to go on from.

Pruning takes a head's rows out of query, key and value and its columns out of the output projection. The model that is
left computes what the whole one computes with the head's output at 0: the sub-norm still divides by the layer's whole
width (RMSNorm.of) and each ternary matrix keeps its scale (model.pruned_heads[].scales). Moments go with their numbers;
those of masked and reset heads become 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmar.config import Config, ConfigError, dump_config
from bitmar.engine.fragments import (
    KINDS,
    MEMORY_FILE,
    CheckpointError,
    DamagedCheckpoint,
    Fragment,
    FragmentReader,
    damage,
    parameter_file,
    read_state,
    record_of,
    state_shapes,
    sync,
    write_fragments,
    write_state,
)
from bitmar.engine.progress import FOLDER, Progress, checkpoint_name, identity_of_model
from bitmar.engine.retention import Keep
from bitmar.head_names import HeadName
from bitmar.loading import CONFIG_FILE, TOKENIZER_FILE
from bitmar.model.attention import CrossAttention, SelfAttention
from bitmar.model.bitmar import BitMar
from bitmar.model.quantize import BitLinear, section_scales
from bitmar.model_config import ModelConfig, PrunedLayer

Weights = dict[str, Tensor]  # by parameter


@dataclass(frozen=True)
class Surgery:
    prune: tuple[HeadName, ...] = ()
    mask: tuple[HeadName, ...] = ()
    reset: tuple[HeadName, ...] = ()

    @property
    def changed(self) -> tuple[HeadName, ...]:
        return self.prune + self.mask + self.reset


def edited_model(config: ModelConfig, surgery: Surgery) -> ModelConfig:
    """The model after surgery, scales of pruned layers still 1. Raises ConfigError for heads that are not there."""
    cut = {head for layer in config.pruned_heads for head in layer.names}
    for head in surgery.changed:
        config.require_head(head)
        if head in cut:
            raise ConfigError(f"head {head} was pruned before")
        if head.kind == "memory" and head not in surgery.mask:
            raise ConfigError(f"head {head} is the only one that reads the memory: it can be masked, no more")
    for one, other in itertools.combinations((surgery.prune, surgery.mask, surgery.reset), 2):
        if twice := set(one) & set(other):
            raise ConfigError(f"head {min(twice)} is named for two operations; one at a time")
    layers: dict[str, set[int]] = {}
    for head in cut | set(surgery.prune):
        layers.setdefault(head.place, set()).add(head.head)
    scales = {layer.layer: layer.scales for layer in config.pruned_heads}
    pruned = tuple(
        PrunedLayer(place, tuple(sorted(heads)), scales.get(place, (1.0,) * 4))
        for place, heads in sorted(layers.items())
    )
    gone = {str(head) for head in surgery.prune}
    kept = [name for name in config.masked_heads if name not in gone]
    masked = (*kept, *(str(head) for head in surgery.mask if str(head) not in kept))
    return dataclasses.replace(config, pruned_heads=pruned, masked_heads=masked)


def attention_of(model: BitMar, place: str) -> tuple[str, SelfAttention | CrossAttention]:
    """(its name in the model, the attention layer) of a place such as encoder.L2."""
    kind, _, layer = place.partition(".L")
    stack = {"encoder": "encoder.blocks", "decoder": "decoder.blocks", "cross_modal": "fusion.layers"}[kind]
    name = f"{stack}.{layer}.attention"
    module = model.get_submodule(name)
    assert isinstance(module, SelfAttention | CrossAttention)
    return name, module


def _numbers(module: SelfAttention | CrossAttention, heads: Iterable[int]) -> Tensor:
    """Which of the numbers that a layer's heads put out are those of `heads`."""
    width = module.output.weight.shape[1] // module.heads
    places = [module.layer.kept.index(head) for head in heads]
    return torch.cat([torch.arange(place * width, (place + 1) * width) for place in places])


def _parts(name: str, module: SelfAttention | CrossAttention) -> list[tuple[str, int, Sequence[int]]]:
    """(parameter, dimension that counts the heads' numbers, where each section begins) of a layer."""
    inner = module.output.weight.shape[1]
    wide = [("qkv", 3)] if isinstance(module, SelfAttention) else [("query", 1), ("key_value", 2)]
    parts = [(f"{name}.{part}.weight", 0, range(0, count * inner, inner)) for part, count in wide]
    return [*parts, (f"{name}.sub_norm.weight", 0, (0,)), (f"{name}.output.weight", 1, (0,))]


def head_slices(model: BitMar, head: HeadName) -> list[tuple[str, int, Tensor]]:
    """(parameter, dimension, indices along it) of what belongs to one head."""
    name, module = attention_of(model, head.place)
    own = _numbers(module, [head.head])
    return [(part, dim, torch.cat([own + start for start in starts])) for part, dim, starts in _parts(name, module)]


def edit_parameters(
    config: ModelConfig, states: Sequence[Weights], surgery: Surgery, seed: int
) -> tuple[ModelConfig, list[Weights]]:
    """The model after surgery and its parameters. `states`: whole weights, then their moments, if any.

    Reset heads get the numbers that a model of this shape begins with, drawn from `seed`. Raises ConfigError.
    """
    target = edited_model(config, surgery)
    torch.manual_seed(seed)
    model = BitMar(config, seed)
    weights, *moments = map(dict, states)
    _clear(model, weights, moments, surgery)
    uncut = dict(weights)
    by_place: dict[str, list[int]] = {}
    for head in surgery.prune:
        by_place.setdefault(head.place, []).append(head.head)
    for place, heads in by_place.items():
        _cut(model, (weights, *moments), place, heads)
    scaled = tuple(
        dataclasses.replace(layer, scales=_scales(model, uncut, weights, layer.layer))
        if layer.layer in by_place
        else layer
        for layer in target.pruned_heads
    )
    return dataclasses.replace(target, pruned_heads=scaled), [weights, *moments]


def _clear(model: BitMar, weights: Weights, moments: Sequence[Weights], surgery: Surgery) -> None:
    """Moments of reset and masked heads to 0, and first weights, which `model` has, to those that are reset."""
    fresh = dict(model.named_parameters())
    for head in (*surgery.reset, *(h for h in surgery.mask if h.kind != "memory")):
        for name, dim, own in head_slices(model, head):
            for state in moments:
                state[name] = state[name].index_fill(dim, own, 0.0)
            if head in surgery.reset:
                weights[name] = weights[name].index_copy(dim, own, fresh[name].detach().index_select(dim, own))


def _cut(model: BitMar, states: Sequence[Weights], place: str, heads: Sequence[int]) -> None:
    """Leave heads out of every parameter of their layer."""
    layer_name, module = attention_of(model, place)
    gone = set(_numbers(module, heads).tolist())
    kept = torch.tensor([n for n in range(module.output.weight.shape[1]) if n not in gone])
    for name, dim, starts in _parts(layer_name, module):
        chosen = torch.cat([kept + start for start in starts])
        for state in states:
            state[name] = state[name].index_select(dim, chosen)


def _scales(model: BitMar, whole: Weights, cut: Weights, place: str) -> tuple[float, ...]:
    """PrunedLayer.scales: gamma of each matrix before over mean|W| after. 1 where nothing is rounded."""
    name, module = attention_of(model, place)
    factors: list[float] = []
    for part, layer in module.named_children():
        if isinstance(layer, BitLinear):
            key = f"{name}.{part}.weight"
            count = len(layer.sections)
            before = section_scales(whole[key], layer.sections, layer.factors)
            after = section_scales(cut[key], (len(cut[key]) // count,) * count)
            factors += [float(b.double() / a.double()) for b, a in zip(before, after, strict=True)]
    return tuple(factors) if model.config.quantization else (1.0,) * len(factors)


def edit_checkpoint(checkpoint: Path, config: Config, surgery: Surgery, out: Path, restart: bool = False) -> Config:
    """Write a run's folder `out` with one checkpoint, the edited one, and the recipe that goes with it.

    `restart`: it is step 0 of a new run, with no moments, whose recipe may have other phases and other data; else the
    run goes on where it stood. Raises ConfigError, CheckpointError, OSError.
    """
    state = read_state(checkpoint)
    problem = damage(checkpoint, state["files"], state["files"])
    if problem is not None:
        raise DamagedCheckpoint(problem)
    shapes = state_shapes(state)
    if shapes != {name: tuple(p.shape) for name, p in BitMar(config.model).named_parameters()}:
        raise CheckpointError(f"checkpoint {checkpoint} is of another model than its run's {CONFIG_FILE} describes")
    reader = FragmentReader(checkpoint, state["files"], shapes)
    states = [
        {name: reader.read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in shapes.items()}
        for kind in KINDS
    ]
    target, states = edit_parameters(config.model, states, surgery, config.run.seed)
    run = dataclasses.replace(config.run, name=out.name, directory=str(out.parent))
    edited = dataclasses.replace(config, model=target, run=run)
    if restart:
        states[1:] = [{name: torch.zeros_like(tensor) for name, tensor in states[0].items()} for _ in states[1:]]
        state |= {"adam_step": 0, "progress": dataclasses.asdict(Progress("", words=state["progress"]["words"]))}
    state["progress"]["run_id"] = secrets.token_hex(4)
    state["keep"] = dataclasses.asdict(Keep())
    _write_run(checkpoint, edited, state, states, out, restart)
    return edited


def _write_run(
    checkpoint: Path, config: Config, state: dict[str, Any], kinds: Sequence[Weights], out: Path, restart: bool
) -> None:
    """The folder appears whole or not at all. Raises ConfigError where there is one already."""
    if out.exists():
        raise ConfigError(f"{out} exists; give another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder = partial / FOLDER / checkpoint_name(state["progress"]["step"])
    folder.mkdir(parents=True)
    pieces = [
        Fragment(
            name, 0, {kind: tensors[name].flatten().contiguous() for kind, tensors in zip(KINDS, kinds, strict=True)}
        )
        for name in kinds[0]
    ]
    shutil.copyfile(checkpoint / MEMORY_FILE, folder / MEMORY_FILE)
    files = {
        parameter_file(0): write_fragments(folder / parameter_file(0), pieces, torch.get_rng_state()),
        MEMORY_FILE: record_of(folder / MEMORY_FILE),
    }
    identity = state["identity"] | {"model": identity_of_model(config.model)}
    state = state | {
        "identity": identity | {"order": {}} if restart else identity,
        "world": {"ranks": 1, "zero_stage": 0},
        "parameters": {name: list(tensor.shape) for name, tensor in kinds[0].items()},
        "files": {name: dataclasses.asdict(record) for name, record in files.items()},
    }
    write_state(folder, state)
    (partial / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    source = checkpoint.parent.parent / TOKENIZER_FILE
    if source.is_file():
        shutil.copyfile(source, partial / TOKENIZER_FILE)
    sync(folder)
    partial.replace(out)

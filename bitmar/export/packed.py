"""Packed models: ternary weights in 2 bits, or five to a byte (1.6 bits), all else in bf16, in one safetensors file.

Layout, for a reader in any language:

    metadata      format "bitmar-packed", version "1", bits "2" or "1.6", config: the recipe's section `model` as JSON,
                  inputs: the columns of each ternary matrix, as JSON; row_tokens: of the rows that it was trained on
    NAME.packed   uint8 [rows, bytes]: the ternary matrix NAME, each row to whole bytes. 2 bits: value + 1 in bits 0-1,
                  2-3, 4-5, 6-7 of a byte; 1.6 bits: the sum of (value + 1) 3^i, i = 0 to 4. What fills up a row's last
                  byte is the value 0
    NAME.scale    fp32 [S]: gamma of each of the S equal sections (query, key, value; gate, up) that the rows fall into
    NAME          bf16: any other parameter
    slots.NAME    the episodic memory: keys and values bf16, the rest as it is

A weight is its value times its section's gamma; both come back bit for bit. README.md has a reader in numpy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmar.config import ConfigError, model_from
from bitmar.model.attention import CrossAttention, SelfAttention, head_mask
from bitmar.model.bitmar import BitMar, rounded_layers
from bitmar.model.memory import MemoryState
from bitmar.model.packed import PLACES, Bits, PackedEmbedding, PackedLinear, pack
from bitmar.model.quantize import BitLinear

FORMAT, VERSION = "bitmar-packed", "1"
SLOTS = "slots."  # before the names of the memory's tensors
IN_BF16 = ("keys", "values")  # of the memory


def save_packed(model: BitMar, memory: MemoryState, path: Path, row_tokens: int, bits: Bits = "2") -> None:
    """Write a model and its memory, in one move. `row_tokens`: of the rows that it was trained on.

    Raises OSError or SafetensorError.
    """
    tensors: dict[str, Tensor] = {}
    ternary = dict(rounded_layers(model))
    for name, layer in ternary.items():
        values, _ = layer.ternary_weight()
        tensors[f"{name}.weight.packed"] = pack(values, bits)
        tensors[f"{name}.weight.scale"] = layer.section_scales()
    rest = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in ternary}
    tensors |= {name: p.detach().bfloat16() for name, p in rest.items()}
    for name, tensor in memory.tensors().items():
        tensors[SLOTS + name] = tensor.bfloat16() if name in IN_BF16 else tensor
    config = json.dumps(dataclasses.asdict(model.config))
    inputs = json.dumps({f"{name}.weight": layer.weight.shape[1] for name, layer in ternary.items()})
    header = {"format": FORMAT, "version": VERSION, "bits": bits, "config": config, "inputs": inputs}
    header["row_tokens"] = str(row_tokens)
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)
    temporary.replace(path)


def packed_tokenizer(path: Path) -> Path:
    """The tokenizer's file, which stands beside a packed model."""
    return path.with_suffix(".tokenizer.json")


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a packed model. Raises ConfigError for a file that is missing, damaged or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    wanted = (header.get("format"), header.get("version")) == (FORMAT, VERSION) and header.get("bits") in PLACES
    if not wanted or not {"config", "row_tokens"} <= header.keys():
        raise ConfigError(f"{path} is no packed model of version {VERSION}; tools/export.py packed writes one")
    return header


def load_packed(path: Path) -> tuple[BitMar, MemoryState]:
    """The model, in evaluation mode, whose ternary weights stay packed, and its memory.

    Raises ConfigError for a file that is missing, damaged or of another kind.
    """
    header = read_header(path)
    bits: Bits = header["bits"]  # type: ignore[assignment]
    with torch.device("meta"):  # no number of it is made before the file's are there
        model = BitMar(model_from(json.loads(header["config"]))).eval()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        for name, layer in rounded_layers(model):
            packed, scale = (tensors.pop(f"{name}.weight.{part}") for part in ("packed", "scale"))
            _check(f"{name}.weight", layer, packed, scale, bits)
            model.set_submodule(name, PackedLinear(layer, packed, scale, bits))
        table = tensors.pop("embedding.weight")
        if table.shape != model.embedding.weight.shape or table.dtype != torch.bfloat16:
            raise ValueError(f"embedding.weight is {table.dtype} {list(table.shape)}")
        model.set_submodule("embedding", PackedEmbedding(table, model.embedding.output_scale))
        empty = MemoryState.empty(model.config.memory_size, model.config.episode_dim).tensors()
        held = {name: tensors.pop(SLOTS + name) for name in empty}
        if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in empty.items()}:
            raise ValueError("its memory has another size")
        memory = MemoryState(**{name: held[name].to(t.dtype) for name, t in empty.items()})
        found = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False, assign=True)
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} does not hold the model that it describes: {error}") from None
    wrong = [*(name for name, p in model.named_parameters() if p.is_meta), *found.unexpected_keys]
    if wrong:
        raise ConfigError(f"{path} does not hold the model that it describes: {wrong[0]} is missing or too much")
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.mask = head_mask(module.layer, model.config.width)
    return model, memory


def _check(name: str, layer: BitLinear, packed: Tensor, scale: Tensor, bits: Bits) -> None:
    """Raises ValueError unless these are the bytes of such a layer: what reads them reads no further."""
    outputs, inputs = layer.weight.shape
    shape = (outputs, -(-inputs // len(PLACES[bits])))
    if tuple(packed.shape) != shape or packed.dtype != torch.uint8:
        raise ValueError(f"{name}.packed is {packed.dtype} {list(packed.shape)}, not bytes {list(shape)}")
    if tuple(scale.shape) != (len(layer.sections),) or scale.dtype != torch.float32:
        raise ValueError(f"{name}.scale is {scale.dtype} {list(scale.shape)}")
    outside = packed & (packed >> 1) & 0b01010101 if bits == "2" else packed >= 3**5
    if bool(outside.any()):
        raise ValueError(f"{name}.packed has bytes that stand for no ternary values")

"""Packed models: what goes in comes out, bit for bit, and they compute what the trained model does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bitmar.analysis.surgery import Surgery, edit_parameters
from bitmar.config import ConfigError
from bitmar.engine.census import rounded_layers
from bitmar.export.packed import PLACES, Bits, PackedLinear, load_packed, pack, save_packed, unpack
from bitmar.head_names import parse_heads
from bitmar.model.bitmar import BitMar
from bitmar.model.quantize import BitLinear
from tests.support.batches import caption_batch, filled_memory, logits_of, small_model, text_batch

BITS: tuple[Bits, ...] = ("2", "1.6")


def trained_like(**changes: object) -> BitMar:
    torch.manual_seed(3)
    model = BitMar(small_model(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.5 * torch.rand(p.shape)).add_(0.05 * torch.randn(p.shape))
    return model


@torch.no_grad()
def rounded(model: BitMar) -> BitMar:
    """The model with all that is not ternary rounded to bf16."""
    ternary = {f"{name}.weight" for name, _ in rounded_layers(model)}
    copy = BitMar(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for name, p in copy.named_parameters():
        if name not in ternary:
            p.copy_(p.bfloat16().float())
    return copy


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 23), st.integers(0, 2**31))
def test_values_come_back(bits: Bits, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    packed = pack(values, bits)
    assert packed.shape == (rows, -(-columns // len(PLACES[bits])))
    assert torch.equal(unpack(packed, columns, bits), values)


def test_bytes_are_as_the_layout_says() -> None:
    values = torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0, 0.0]])
    assert pack(values, "2").tolist() == [[0 + 1 * 4 + 2 * 16 + 2 * 64, 0 + 1 * 4 + 1 * 16 + 1 * 64]]
    assert pack(values, "1.6").tolist() == [[0 + 1 * 3 + 2 * 9 + 2 * 27 + 0, 1 + 1 * 3 + 1 * 9 + 1 * 27 + 1 * 81]]


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_model_computes_what_the_model_does(tmp_path: Path, bits: Bits) -> None:
    model, memory = trained_like(), filled_memory(small_model())
    save_packed(model, memory, tmp_path / "m.safetensors", bits)
    packed, held = load_packed(tmp_path / "m.safetensors")
    half = {"keys": memory.keys.bfloat16().float(), "values": memory.values.bfloat16().float()}
    expected = dataclasses.replace(memory, **half)
    assert all(torch.equal(t, expected.tensors()[name]) for name, t in held.tensors().items())
    same = rounded(model)
    for batch in (caption_batch(), text_batch()):
        assert torch.equal(logits_of(packed, batch, held), logits_of(same, batch, expected))
    assert not any(isinstance(module, BitLinear) and module.quantized for module in packed.modules())


@pytest.mark.parametrize("bits", BITS)
def test_weights_come_back_bit_for_bit(tmp_path: Path, bits: Bits) -> None:
    model = trained_like()
    save_packed(model, filled_memory(model.config), tmp_path / "m.safetensors", bits)
    packed = load_packed(tmp_path / "m.safetensors")[0]
    for name, layer in rounded_layers(model):
        mine = packed.get_submodule(name)
        assert isinstance(mine, PackedLinear)
        values, scale = layer.ternary_weight()
        assert torch.equal(unpack(mine.packed, mine.inputs, bits), values)
        assert torch.equal(
            mine.scale.repeat_interleave(len(values) // len(layer.sections))[:, None], scale.expand(len(values), 1)
        )


def test_pruned_and_masked_models_are_packed_too(tmp_path: Path) -> None:
    whole = trained_like(fusion_layers=2)
    surgery = Surgery(prune=parse_heads("encoder.L0H1,cross_modal.L1H0"), mask=parse_heads("decoder.L1H0"))
    config, (weights,) = edit_parameters(
        whole.config, [{n: p.detach() for n, p in whole.named_parameters()}], surgery, 0
    )
    model = BitMar(config).eval()
    model.load_state_dict(weights)
    memory = filled_memory(config)
    save_packed(model, memory, tmp_path / "m.safetensors")
    packed, held = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(logits_of(packed, caption_batch(), held), logits_of(rounded(model), caption_batch(), held))


def test_a_model_without_rounding_is_only_made_smaller(tmp_path: Path) -> None:
    model, memory = trained_like(quantization=False, vision_quantization=False), filled_memory(small_model())
    save_packed(model, memory, tmp_path / "m.safetensors")
    packed, held = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(logits_of(packed, caption_batch(), held), logits_of(rounded(model), caption_batch(), held))


def test_files_that_are_no_packed_model(tmp_path: Path) -> None:
    model = trained_like()
    good = tmp_path / "good.safetensors"
    save_packed(model, filled_memory(model.config), good)
    with safe_open(good, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    broken = tmp_path / "broken.safetensors"
    without = {name: t for name, t in tensors.items() if name != "embedding.weight"}
    cases = [
        (tensors, header | {"version": "9"}, "version 1"),
        (tensors, None, "no packed model"),
        (without, header, "embedding.weight"),
        (tensors | {"surplus": torch.zeros(1)}, header, "surplus"),
        (tensors, header | {"config": json.dumps(json.loads(header["config"]) | {"width": 64})}, "describes"),
    ]
    for content, said, words in cases:
        save_file(content, broken, said)
        with pytest.raises(ConfigError, match=words):
            load_packed(broken)
    broken.write_bytes(good.read_bytes()[:500])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_packed(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_packed(tmp_path / "none.safetensors")

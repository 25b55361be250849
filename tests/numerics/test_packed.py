"""Packed models: what goes in comes out, bit for bit, and they compute what the trained model does."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bitmar.analysis.surgery import Surgery, edit_parameters
from bitmar.config import ConfigError
from bitmar.export.packed import load_packed, save_packed
from bitmar.head_names import parse_heads
from bitmar.model import packed as packed_layers
from bitmar.model.bitmar import BitMar, rounded_layers
from bitmar.model.kernel import COMPILERS, kernel
from bitmar.model.packed import PLACES, Bits, PackedEmbedding, PackedLinear, RoundedLinear, freeze, pack, unpack
from bitmar.model.quantize import BitLinear
from bitmar.model.text import TokenEmbedding
from bitmar.model_config import ModelConfig
from tests.support.batches import caption_batch, filled_memory, logits_of, small_model, text_batch

README = Path(__file__).resolve().parents[2] / "README.md"
BITS: tuple[Bits, ...] = ("2", "1.6")
ROW_TOKENS = 24


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
    save_packed(model, memory, tmp_path / "m.safetensors", ROW_TOKENS, bits)
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
    save_packed(model, filled_memory(model.config), tmp_path / "m.safetensors", ROW_TOKENS, bits)
    packed = load_packed(tmp_path / "m.safetensors")[0]
    for name, layer in rounded_layers(model):
        mine = packed.get_submodule(name)
        assert isinstance(mine, PackedLinear)
        values, scale = layer.ternary_weight()
        assert torch.equal(unpack(mine.packed, mine.inputs, mine.bits), values)
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
    save_packed(model, memory, tmp_path / "m.safetensors", ROW_TOKENS)
    packed, held = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(logits_of(packed, caption_batch(), held), logits_of(rounded(model), caption_batch(), held))


def test_a_model_without_rounding_is_only_made_smaller(tmp_path: Path) -> None:
    model, memory = trained_like(quantization=False, vision_quantization=False), filled_memory(small_model())
    save_packed(model, memory, tmp_path / "m.safetensors", ROW_TOKENS)
    packed, held = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(logits_of(packed, caption_batch(), held), logits_of(rounded(model), caption_batch(), held))


@pytest.mark.parametrize("bits", BITS)
def test_the_reader_in_the_readme_reads_it(tmp_path: Path, bits: Bits) -> None:
    (block,) = re.findall(r"```python\n(.*?def read_packed.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 30
    there: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), there)
    model, memory = trained_like(), filled_memory(small_model())
    save_packed(model, memory, tmp_path / "m.safetensors", ROW_TOKENS, bits)
    arrays, config = there["read_packed"](tmp_path / "m.safetensors")
    assert ModelConfig(**config | {"masked_heads": (), "pruned_heads": ()}) == model.config
    ternary = dict(rounded_layers(model))
    for name, p in model.named_parameters():
        layer = ternary.get(name.removesuffix(".weight"))
        expected = p.detach().bfloat16().float()
        if layer is not None:
            values, scale = layer.ternary_weight()
            expected = values * scale
        assert torch.equal(torch.from_numpy(arrays[name].copy()), expected), name
    assert torch.equal(torch.from_numpy(arrays["slots.values"].copy()), memory.values.bfloat16().float())


needs_compiler = pytest.mark.skipif(kernel() is None, reason="no C++ compiler")


def test_this_machine_has_a_kernel_where_it_has_a_compiler() -> None:
    assert (kernel() is None) == (not any(map(shutil.which, COMPILERS)))


@needs_compiler
@given(
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.integers(2000, 2500)),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_the_kernel_gives_the_same_bits(tokens: int, inputs: int, sections: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    layer = BitLinear(inputs, tuple(sections))
    packed = PackedLinear(layer, pack(layer.ternary_weight()[0], "2"), layer.section_scales(), "2")
    x = torch.randn(tokens, inputs) * 10.0 ** torch.randint(-8, 9, (tokens, 1))
    x[0] *= seed % 3 > 0
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
        assert torch.equal(packed.plain(x), layer(x))


@needs_compiler
def test_the_largest_sums_do_not_overflow() -> None:
    """All weights 1 and all activations 127 or -127: the products of a register fill its 16 bits."""
    layer = BitLinear(8192, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        packed = PackedLinear(layer, pack(layer.ternary_weight()[0], "2"), layer.section_scales(), "2")
        for x in (torch.ones(5, 8192), -torch.ones(5, 8192)):
            assert torch.equal(packed(x), layer(x))


@needs_compiler
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_are_none_come_out_as_such(odd: float) -> None:
    layer = BitLinear(40, 3)
    packed = PackedLinear(layer, pack(layer.ternary_weight()[0], "2"), layer.section_scales(), "2")
    x = torch.ones(2, 40)
    x[1, 7] = odd
    y = packed(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17])
def test_the_embedding_in_bf16_gives_the_same_logits(tokens: int) -> None:
    table = (0.02 * torch.randn(2100, 75)).bfloat16()
    whole = TokenEmbedding(2100, 75)
    with torch.no_grad():
        whole.weight.copy_(table)
    mine = PackedEmbedding(table, whole.output_scale)
    ids, hidden = torch.randint(0, 2100, (2, tokens)), torch.randn(1, tokens, 75)
    assert torch.equal(mine(ids), whole(ids))
    torch.testing.assert_close(mine(hidden), whole(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_frozen_models_compute_what_trained_ones_do(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(packed_layers, "kernel", lambda: None)
    model, memory = trained_like(), filled_memory(small_model())
    expected = logits_of(model, caption_batch(), memory)
    assert torch.equal(logits_of(freeze(model), caption_batch(), memory), expected)
    kinds = {type(m) for m in model.modules()} & {BitLinear, PackedLinear, RoundedLinear}
    assert kinds == {PackedLinear if compiled and kernel() is not None else RoundedLinear}


def test_files_that_are_no_packed_model(tmp_path: Path) -> None:
    model = trained_like()
    good = tmp_path / "good.safetensors"
    save_packed(model, filled_memory(model.config), good, ROW_TOKENS)
    with safe_open(good, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    broken = tmp_path / "broken.safetensors"
    name = "decoder.blocks.0.feed_forward.down.weight"
    many, scales = tensors[f"{name}.packed"], tensors[f"{name}.scale"]
    other: dict[str, dict[str, torch.Tensor]] = {
        "holds rows": {f"{name}.packed": torch.cat([many, many])},
        "holds short rows": {f"{name}.packed": many[:, :-1].contiguous()},
        "holds other numbers": {f"{name}.packed": many.float()},
        "holds no ternary": {f"{name}.packed": torch.full_like(many, 255)},
        "holds few scales": {f"{name}.scale": scales[:0]},
        "has a narrow table": {"embedding.weight": tensors["embedding.weight"][:, :-1].contiguous()},
        "has an fp32 table": {"embedding.weight": tensors["embedding.weight"].float()},
        "has another memory": {"slots.age": tensors["slots.age"][:-1].contiguous()},
    }
    without = {name: t for name, t in tensors.items() if name != "embedding.weight"}
    cases = [
        (tensors, header | {"version": "9"}, "version 1"),
        (tensors, None, "no packed model"),
        (without, header, "embedding.weight"),
        (tensors | {"surplus": torch.zeros(1)}, header, "surplus"),
        (tensors, header | {"config": json.dumps(json.loads(header["config"]) | {"width": 64})}, "describes"),
    ]
    cases += [(tensors | changed, header, "does not hold the model") for changed in other.values()]
    cases.append((tensors, header | {"bits": "1.6"}, "does not hold the model"))
    cases.append((tensors, {k: v for k, v in header.items() if k != "config"}, "no packed model"))
    for content, said, words in cases:
        save_file(content, broken, said)
        with pytest.raises(ConfigError, match=words):
            load_packed(broken)
    broken.write_bytes(good.read_bytes()[:500])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_packed(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_packed(tmp_path / "none.safetensors")

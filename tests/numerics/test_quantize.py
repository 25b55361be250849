"""BitLinear against the formulas of BitNet b1.58, written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitmar.model.quantize import (
    BitLinear,
    RMSNorm,
    RoundedInput,
    looked_at,
    quantize_activations,
    rounded,
    ternary,
    ternary_scale,
)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """In fp64. No number may lie so near to a half that fp32 rounds it to the other side."""
    x, weight = x.double(), weight.double()
    gamma = max(weight.abs().mean().item(), 1e-5)
    top = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    for exact in (weight / gamma, 127 * x / top):
        assume(bool(((exact - exact.floor() - 0.5).abs() > 1e-6 * exact.abs().clamp(min=1)).all()))
    w_q = torch.clamp(torch.round(weight / gamma), -1, 1)
    x_q = torch.clamp(torch.round(127 * x / top), -128, 127)
    return (x_q @ w_q.T * gamma * top / 127).float()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 40),
    sections=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 10**6),
)
def test_forward_equals_formula(rows: int, inputs: int, sections: list[int], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BitLinear(inputs, tuple(sections))
    x = torch.randn(rows, inputs) * scale
    expected = torch.cat([reference(x, part) for part in layer.weight.detach().split(sections)], dim=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_weight_is_the_formulas(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 40).to(dtype)
    values, scale, scales = rounded(weight, (30, 20), (), dtype)
    assert torch.equal(scale, ternary_scale(weight, (30, 20)))
    assert torch.equal(values, ternary(weight, scale).to(dtype))
    assert [float(gamma) for gamma in scales] == [float(scale[0]), float(scale[-1])]


def test_weights_take_three_values_and_activations_eight_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 30)
    assert set(ternary(weight, ternary_scale(weight, (50,))).unique().tolist()) == {-1.0, 0.0, 1.0}
    x_q, step = quantize_activations(torch.randn(20, 30))
    assert torch.equal(x_q, x_q.round())
    assert x_q.abs().amax(-1).eq(127).all()
    assert step.shape == (20, 1)


def test_sections_keep_their_own_scale() -> None:
    torch.manual_seed(0)
    layer = BitLinear(16, (4, 6))
    with torch.no_grad():
        layer.weight[4:] *= 10
    _, scale = layer.ternary_weight()
    assert scale[:4].unique().numel() == 1
    assert scale[4:].unique().numel() == 1
    assert math.isclose(scale[0].item(), layer.weight[:4].abs().mean().item(), rel_tol=1e-6)
    assert math.isclose(scale[-1].item(), layer.weight[4:].abs().mean().item(), rel_tol=1e-6)


def test_gradients_are_straight_through() -> None:
    """dx = g W_hat and dW = g^T x_hat, with the rounded operands in the place of the real ones."""
    torch.manual_seed(0)
    layer = BitLinear(12, (5, 3))
    x = torch.randn(7, 12, requires_grad=True)
    grad = torch.randn(7, 8)
    layer(x).backward(grad)
    w_q, scale = layer.ternary_weight()
    x_q, step = quantize_activations(x.detach())
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad, grad @ (w_q * scale))
    torch.testing.assert_close(layer.weight.grad, grad.T @ (x_q * step))


def test_kept_scales_change_no_bit() -> None:
    """They are those of the weight as it was in the pass."""
    torch.manual_seed(0)
    layer = BitLinear(12, (5, 3))
    x, grad = torch.randn(7, 12, requires_grad=True), torch.randn(7, 8)

    def taken() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, layer.weight), grad)

    expected, scales = taken(), layer.section_scales()
    layer.keeps_scales = True
    assert all(torch.equal(mine, other) for mine, other in zip(taken(), expected, strict=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(torch.stack(layer.scales), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_hands_on_the_same_gradient(dtype: torch.dtype) -> None:
    """It scales the gradient instead of the weight, which rounds differently; what it gives keeps every bit."""
    torch.manual_seed(0)
    layer, x = BitLinear(12, (5, 3)), torch.randn(7, 12, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        trained = layer(x)
        grad = torch.randn_like(trained)
        expected, _ = torch.autograd.grad(trained, (x, layer.weight), grad)
        layer.weight.requires_grad_(False)
        frozen = layer(x)
    assert torch.equal(frozen, trained)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.autograd.grad(frozen, x, grad)[0], expected, rtol=4 * eps, atol=4 * eps)
    assert torch.equal(layer(x.detach()), layer(x)), "what needs no gradient is the same product"


def test_a_layer_that_is_looked_at_shows_what_it_multiplies_by() -> None:
    torch.manual_seed(0)
    layers = {"first": BitLinear(12, 5), "second": BitLinear(12, 4)}
    x, products = torch.randn(2, 7, 12, requires_grad=True), dict[str, torch.Tensor]()

    def look(name: str, shown: torch.Tensor, rounded_input: RoundedInput) -> None:
        assert torch.equal(shown, x)
        assert not shown.requires_grad
        w_q, gamma = layers[name].ternary_weight()
        products[name] = rounded_input.values @ w_q.T * rounded_input.step * gamma.T

    with looked_at(layers.items(), look):
        found = {name: layer(x) for name, layer in layers.items()}
    for name, y in found.items():
        torch.testing.assert_close(products.pop(name).view_as(y), y)
        layers[name](x)
    assert not products, "it is looked at inside alone"


@pytest.mark.parametrize("of", [None, 9])
def test_a_frozen_norm_hands_on_the_same_gradient(of: int | None) -> None:
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(12, of), torch.randn(7, 12, requires_grad=True), torch.randn(7, 12)
    expected, _ = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    norm.weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(norm(x), x, grad)[0], expected)


def test_rounding_off_is_a_plain_linear_map() -> None:
    layer = BitLinear(12, 5, quantized=False)
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_input_gives_zero(dtype: torch.dtype) -> None:
    out = BitLinear(12, 5)(torch.zeros(3, 12, dtype=dtype))
    assert torch.equal(out, torch.zeros(3, 5, dtype=dtype))


def test_bf16_products_are_those_of_fp32_up_to_the_rounding_of_the_result() -> None:
    """Both operands are whole numbers that bf16 holds exactly."""
    torch.manual_seed(0)
    layer = BitLinear(64, 32)
    x = torch.randn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=2**-7, atol=1e-6)


def test_each_row_is_quantised_alone() -> None:
    """A token's result does not depend on its neighbours, bit for bit (the public code fails this)."""
    torch.manual_seed(0)
    layer = BitLinear(12, 5)
    x = torch.randn(6, 12)
    other = torch.cat([x[:3], 100 * torch.randn(3, 12)])
    assert torch.equal(layer(x)[:3], layer(other)[:3])

"""What a forward pass shows of its attention heads, and what gates on them say of their importance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.head_names import KINDS
from bitmar.model.attention import Heads
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.model.quantize import RoundedInput, quantize_activations
from bitmar.observability.probes import TOP_SHARE, RoundingSums, figures, gates_of
from tests.support.batches import caption_batch, filled_memory, small_model

CAUSAL = {"encoder": True, "decoder": True, "cross_modal": False, "memory": False}


def unrounded() -> tuple[BitMar, Batch, MemoryState]:
    torch.manual_seed(0)
    model = BitMar(small_model(quantization=False)).eval()
    return model, caption_batch(), filled_memory(model.config)


def test_shown_heads_compute_what_fused_attention_does() -> None:
    model, batch, memory = unrounded()
    plain, shown = model(batch, memory), model(batch, memory, heads=True)
    assert plain.heads == {}
    torch.testing.assert_close(shown.token_losses, plain.token_losses, atol=1e-5, rtol=1e-5)
    config = model.config
    layers = {kind: len(heads) for kind, heads in shown.heads.items()}
    expected = (config.encoder_layers, config.decoder_layers, config.fusion_layers, 1)
    assert layers == dict(zip(KINDS, expected, strict=True))
    for kind in ("encoder", "decoder", "cross_modal"):
        for heads in shown.heads[kind]:
            torch.testing.assert_close(heads.weights.sum(-1), torch.ones(heads.weights.shape[:-1]), check_dtype=False)
    for kind in ("encoder", "decoder"):
        assert all((heads.weights.triu(1) == 0).all() for heads in shown.heads[kind])


def output_weights(model: BitMar, kind: str, head: int) -> Tensor:
    """The weights that a head's output in the last layer of its kind is linear in: scaling them scales it."""
    width = model.config.width
    each = width // model.config.heads
    mine = slice(head * each, (head + 1) * each)
    if kind == "memory":
        return model.memory["reader"].output.weight.data  # type: ignore[union-attr]
    if kind == "cross_modal":
        return model.fusion.layers[-1].attention.key_value.weight.data[width:][mine]  # type: ignore[union-attr]
    stack = model.encoder if kind == "encoder" else model.decoder
    return stack.blocks[-1].attention.qkv.weight.data[2 * width :][mine]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_s_gradient_is_the_finite_difference(kind: str) -> None:
    """Of a sample's loss, by a factor of 1 on the head's output."""
    model, batch, memory = unrounded()
    outputs = model(batch, memory, heads=True)
    gradients = torch.autograd.grad(outputs.loss, gates_of(outputs.heads))
    kinds = [name for name, layers in outputs.heads.items() for _ in layers]
    last = len(kinds) - 1 - kinds[::-1].index(kind)
    head, step, losses = gradients[last].shape[1] - 1, 2e-2, []
    weights = output_weights(model, kind, head)
    start = weights.clone()
    for sign in (1, -1):
        weights.copy_(start * (1 + sign * step))
        losses.append(model(batch, memory).token_losses.double().sum(1))
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(gradients[last][:, head].double(), slope, atol=5e-3, rtol=2e-2)
    assert slope.abs().max() > 1e-2


def test_figures_are_those_of_a_plain_loop() -> None:
    model, batch, memory = unrounded()
    outputs = model(batch, memory, heads=True)
    gradients = iter(torch.autograd.grad(outputs.loss, gates_of(outputs.heads)))
    for kind, layers in outputs.heads.items():
        mine = [next(gradients) for _ in layers]
        got = figures(layers, mine, batch, CAUSAL[kind])
        for layer, (heads, gradient) in enumerate(zip(layers, mine, strict=True)):
            for head in range(heads.weights.shape[1]):
                entropy, top, far, first, queries, importance, samples = plain(
                    heads, gradient, batch, head, CAUSAL[kind]
                )
                assert got.entropy[layer, head].item() == pytest.approx(entropy, rel=1e-5)
                assert got.concentration[layer, head].item() == pytest.approx(top, rel=1e-5)
                assert got.importance[layer, head].item() == pytest.approx(importance, rel=1e-5)
                assert (int(got.queries), int(got.samples)) == (queries, samples)
                if CAUSAL[kind]:
                    assert got.distance[layer, head].item() == pytest.approx(far, rel=1e-5)
                    assert got.first[layer, head].item() == pytest.approx(first, rel=1e-5)


def plain(heads: Heads, gradient: Tensor, batch: Batch, head: int, causal: bool) -> tuple[float, ...]:
    entropy = top = far = first = importance = 0.0
    queries = samples = 0
    for row in range(len(batch.rows)):
        tokens = 0
        for at in range(batch.tokens.shape[1]):
            if batch.targets[row, at] == IGNORE or not (causal or batch.has_vision[row]):
                continue
            tokens += 1
            weights = heads.weights[row, head, at].tolist()
            seen = weights[: at + 1] if causal else weights
            whole = seen if causal else [*seen, max(0.0, 1 - sum(seen))]
            entropy -= sum(w * math.log(w) for w in whole if w > 0)
            top += sum(sorted(seen, reverse=True)[: math.ceil(len(seen) / TOP_SHARE)])
            far += sum(w * (at - key) for key, w in enumerate(seen))
            first += seen[0]
        queries += tokens
        samples += tokens > 0
        importance += abs(gradient[row, head].item()) / tokens if tokens else 0.0
    return entropy, top, far, first, queries, importance, samples


def test_rounding_sums_are_those_of_the_layers_own_rounding() -> None:
    """Of two components, whose layers differ in width and shape."""
    g = torch.Generator().manual_seed(1)
    sums, expected = RoundingSums(["encoder", "vision"], torch.device("cpu")), torch.zeros(2, 4, dtype=torch.float64)
    for component, shape in ((0, (3, 5, 16)), (1, (4, 8)), (0, (3, 5, 8)), (1, (2, 3, 16)), (1, (4, 8))):
        x, asked = torch.randn(*shape, generator=g), torch.rand(*shape[:-1], generator=g) > 0.3
        own = RoundedInput(*quantize_activations(x.flatten(0, -2)))
        sums.add(("encoder", "vision")[component], x, own, asked)
        rounded, step = quantize_activations(x[asked])
        error = (x[asked] - rounded * step).square().sum()
        numbers = ((rounded == 0).sum(), asked.sum() * shape[-1], error, x[asked].square().sum())
        expected[component] += torch.stack([n.double() for n in numbers])
    torch.testing.assert_close(sums.table(), expected, rtol=1e-5, atol=0)

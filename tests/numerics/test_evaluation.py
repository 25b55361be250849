"""Scores that need a model, against plain computations: likelihoods, choices, losses of captions, rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.engine.world import World
from bitmar.evaluation.choices import distractor_scores, minimal_pair_scores, vqa_scores, winoground, winoground_scores
from bitmar.evaluation.likelihood import Candidate, Choice, Image, is_right, log_probabilities
from bitmar.evaluation.perplexity import POOL, RIGHT, perplexity_scores, score, validate, without_vision
from bitmar.evaluation.quantization import rounding_tables, unrounded, weight_scores
from bitmar.evaluation.scores import joined
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.model.quantize import BitLinear, quantize_activations
from bitmar.observability.reduce import reduce
from bitmar.observability.stats import Statistics
from shards.rows import Rows
from shards.tokenizer import BOS
from tests.support.batches import VOCABULARY, caption_batch, filled_memory, logits_of, rows_of, slice_batch, small_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
WIDTH = 24


def trained(**changes: object) -> BitMar:
    torch.manual_seed(0)
    return BitMar(small_model(**changes), seed=1).eval()


def some_candidates() -> list[Candidate]:
    g = np.random.default_rng(0)
    made = []
    for n in range(11):
        tokens = [tuple(g.integers(3, VOCABULARY, size).tolist()) for size in (1 + n % 4, n % 3)]
        image = Image(g.normal(size=WIDTH).astype(np.float32), 100 + n) if n % 2 else None
        made.append(Candidate(tokens[0], tokens[1], image, 1 + n))
    return made


def plainly(model: BitMar, candidate: Candidate) -> float:
    """The sum of ln p, from the logits of this candidate alone."""
    read = [BOS, *candidate.context, *candidate.continuation]
    batch = Batch.of_text(torch.tensor([read]), WIDTH)
    if candidate.image is not None:
        batch = batch.replace(
            vision=torch.from_numpy(candidate.image.vector)[None],
            has_vision=torch.ones(1, dtype=torch.bool),
            image_ids=torch.tensor([candidate.image.id]),
        )
    with torch.no_grad():
        table = logits_of(model, batch, filled_memory(model.config))[0].log_softmax(-1)
    first = 1 + len(candidate.context)
    return sum(float(table[at - 1, read[at]]) for at in range(first, len(read)))


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_likelihoods_are_those_of_the_logits(batch: int) -> None:
    model, candidates = trained(quantization=False), some_candidates()
    found = log_probabilities(model, candidates, WIDTH, filled_memory(model.config), ALONE, batch)
    np.testing.assert_allclose(found, [plainly(model, c) for c in candidates], atol=1e-5)


def test_an_image_changes_likelihoods_and_the_image_of_a_slot_is_kept_out() -> None:
    model = trained(quantization=False)
    memory = filled_memory(model.config)
    vector = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    images = [None, Image(vector, 5), Image(vector, int(memory.image_ids[0]))]
    values = log_probabilities(model, [Candidate((5, 6), (), i) for i in images], WIDTH, memory, ALONE)
    assert len(set(values.round(6).tolist())) == 3


def test_a_tie_is_wrong() -> None:
    assert is_right(np.array([1.0, 2.0, 1.0]), 1)
    assert not is_right(np.array([2.0, 2.0]), 0)
    assert not is_right(np.array([math.nan, 2.0]), 0)


def told(values: Sequence[float]) -> Any:
    """A scorer that knows what it says of each candidate by its first token."""
    return lambda candidates: np.array([values[c.continuation[0]] for c in candidates])


def of(*tokens: int, answer: int = 0, length: int = 1) -> Choice:
    image = Image(np.zeros(WIDTH, np.float32), 1)
    made = (
        Candidate((token,) * (length if place == answer else 1), (), image, 2) for place, token in enumerate(tokens)
    )
    return Choice(tuple(made), answer)


def test_accuracies_of_choices() -> None:
    scorer = told([-1.0, -2.0, -3.0, -4.0])
    pairs = [("a", of(0, 1)), ("a", of(2, 1)), ("b", of(0, 3)), ("b", of(1, 3))]
    found = {s.name: s for s in minimal_pair_scores(scorer, pairs, "minimal pairs")}
    assert {name: s.value for name, s in found.items()} == {"accuracy": 0.75, "accuracy, a": 0.5, "accuracy, b": 1.0}
    assert found["accuracy, a"].count == 2
    items = [of(2, 1, answer=0, length=2), of(0, 1, 2, answer=0)]
    by_sum, by_token = distractor_scores(scorer, items, "distractors")
    assert (by_sum.value, by_token.value) == (0.5, 1.0), "-3 is less than -2, but two tokens have -1.5 each"
    assert by_sum.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_vqa_by_byte_and_without_the_image() -> None:
    long, short = (Candidate((0,), (9,), Image(np.zeros(WIDTH, np.float32), 1), size) for size in (8, 2))
    item = Choice((long, Candidate((1,), (9,), short.image, 2)), 0)

    def scorer(candidates: Sequence[Candidate]) -> np.ndarray:
        seen = candidates[0].image is not None
        return np.array([-4.0, -2.0] if seen else [-1.0, -2.0])

    scores, values = vqa_scores(scorer, [item], "VQA")
    assert [s.value for s in scores] == [0.0, 1.0, 1.0]
    assert values.tolist() == [-4, -2]


def test_winoground_is_what_its_paper_says() -> None:
    values = np.random.default_rng(5).integers(0, 4, (300, 2, 2)).astype(float)
    text, image = winoground(values)
    for table, t, i in zip(values, text, image, strict=True):
        (c0_i0, c1_i0), (c0_i1, c1_i1) = table
        assert t == (c0_i0 > c1_i0 and c1_i1 > c0_i1)
        assert i == (c0_i0 > c0_i1 and c1_i1 > c1_i0)
    random = winoground(np.random.default_rng(6).normal(size=(40_000, 2, 2)))
    assert random[0].mean() == pytest.approx(1 / 4, abs=0.01)
    assert random[1].mean() == pytest.approx(1 / 4, abs=0.01)
    assert (random[0] & random[1]).mean() == pytest.approx(1 / 6, abs=0.01)
    item = tuple(Candidate((n,)) for n in range(4))
    scores = winoground_scores(told([0.0, -1.0, -2.0, -1.5]), [item], "Winoground")
    assert [s.value for s in scores] == [1.0, 0.0, 0.0]
    assert [s.chance for s in scores] == [1 / 4, 1 / 4, 1 / 6]


@pytest.mark.parametrize("vision", [True, False])
def test_losses_of_captions(vision: bool) -> None:
    """By caption, of two batches whose rows stand anywhere; a filler row adds nothing."""
    model = trained(quantization=False)
    memory = filled_memory(model.config)
    batches = [caption_batch(8, seed=1, first_row=0), caption_batch(8, seed=2, first_row=8)]
    sums = score(model, [rows_of(b, [0] * 8) for b in batches], 15, memory, ALONE, vision)
    for batch in batches:
        seen = batch if vision else without_vision(batch)
        with torch.no_grad():
            table = logits_of(model, seen, memory).double().log_softmax(-1)
        for row in range(7):
            asked = batch.targets[row] != IGNORE
            targets = batch.targets[row][asked]
            own = table[row][asked].gather(1, targets[:, None])[:, 0]
            hits = (own >= table[row][asked].amax(1)).sum()
            expected = torch.stack([-own.sum(), asked.sum().double(), hits.double()])
            torch.testing.assert_close(sums.table[int(batch.rows[row])], expected, atol=1e-4, rtol=1e-5)
    assert sums.table.shape == (15, 3)
    assert float(sums.tokens) == sum(int((b.targets != IGNORE).sum()) for b in batches)


TOTALS = [100, POOL, POOL + 1, 700]
TEXT, VISION = (torch.randn(720, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
OF_IMAGE = torch.arange(720) % 90  # 8 captions each, whose image is one


def planted(batch: Batch, memory: MemoryState) -> Any:
    """Outputs of a model whose latents are known: of every third row the caption's is that of its image."""
    vision = VISION[OF_IMAGE[batch.rows]]
    text = torch.where((batch.rows % 3 == 0)[:, None], vision, TEXT[batch.rows])
    nothing = torch.zeros(batch.tokens.shape)
    return SimpleNamespace(token_losses=nothing, hits=nothing, text_latent=text, vision_latent=vision)


def held_out_rows(total: int, size: int) -> list[Rows]:
    """`total` captions in batches of `size`; the last one is filled up with rows that do not count."""
    whole = caption_batch(rows=-(-total // size) * size)
    valid = whole.rows < total
    targets = whole.targets.masked_fill(~valid[:, None], IGNORE)
    ids = (1 + OF_IMAGE[whole.rows]) * valid
    whole = whole.replace(valid=valid, has_vision=valid, image_ids=ids, targets=targets)
    starts = range(0, len(valid), size)
    return [rows_of(slice_batch(whole, start, start + size), [0] * size) for start in starts]


def pool_of(total: int) -> list[int]:
    """The first of each of POOL parts of the rows; all where there are fewer."""
    return list(range(total)) if total < POOL else [math.ceil(part * total / POOL) for part in range(POOL)]


@pytest.mark.parametrize("total", TOTALS)
def test_the_pool_of_retrieval_is_the_same_however_rows_are_spread(total: int) -> None:
    """Over batches of any size and order, and over ranks, whose pools are added up."""
    memory = MemoryState.empty(7, 16)

    def latents(batches: list[Rows]) -> tuple[Tensor, ...]:
        return score(planted, batches, total, memory, ALONE, pool=True).latents

    text, vision, ids, counted = latents(held_out_rows(total, 720))
    chosen = planted(Batch.from_rows(held_out_rows(total, 720)[0], ALONE.device), memory)
    pool = pool_of(total)
    assert int(counted.sum()) == len(pool) == min(total, POOL)
    assert torch.equal(text[counted], chosen.text_latent[pool])
    assert torch.equal(vision[counted], chosen.vision_latent[pool])
    assert torch.equal(ids[counted], 1 + OF_IMAGE[pool])
    small = held_out_rows(total, 8)
    mine, other = latents(small[::2]), latents(small[1::2])
    for spread in (latents(small), latents(small[::-1]), tuple(a + b for a, b in zip(mine, other, strict=True))):
        assert all(map(torch.equal, spread, (text, vision, ids, counted)))


class HeldOut:
    """Captions as a validation set gives them."""

    def __init__(self, batches: list[Rows], total: int) -> None:
        self.rows, self._batches = total, batches

    def batches(self, vision: str = "right") -> list[Rows]:
        return self._batches


@pytest.mark.parametrize("total", TOTALS)
def test_retrieval_is_that_of_the_pool(total: int) -> None:
    """By a plain search, one caption at a time."""
    statistics = Statistics()
    captions: Any = HeldOut(held_out_rows(total, 8), total)
    validate(planted, captions, None, MemoryState.empty(7, 16), ALONE, statistics)
    found = reduce(statistics, ALONE).numbers["Validation/Retrieval_R1"]
    own, pool = 0, pool_of(total)
    for row in pool:
        text = VISION[OF_IMAGE[row]] if row % 3 == 0 else TEXT[row]
        nearest = int(F.cosine_similarity(text[None], VISION[OF_IMAGE[pool]]).argmax())
        own += int(OF_IMAGE[pool[nearest]] == OF_IMAGE[row])
    assert found == pytest.approx(own / len(pool))
    assert 0.2 < found < 0.9


def test_scores_of_losses() -> None:
    """Two captions, of 4 and 6 tokens; the second without the image is 3 nats worse."""
    right, closed = np.array([[8.0, 4, 1], [12.0, 6, 2]]), np.array([[8.0, 4, 1], [15.0, 6, 2]])
    found = {s.name: s for s in perplexity_scores({RIGHT: right, ("none", "on"): closed}, 50, "", "caption")}
    loss = found["loss, right vision, memory on"]
    assert (loss.value, loss.count, loss.chance) == (2.0, 2, pytest.approx(math.log(50)))
    assert found["perplexity, right vision, memory on"].value == pytest.approx(math.e**2)
    assert found["token accuracy, right vision, memory on"].value == pytest.approx(0.3)
    gain = found["gain of the right image over none"]
    assert (gain.value, gain.low, gain.high) == (pytest.approx(0.3), 0.0, pytest.approx(0.5))


def test_unrounded_is_the_model_without_quantisation() -> None:
    model, batch = trained(), caption_batch()
    plain = trained(quantization=False)
    plain.load_state_dict(model.state_dict())
    memory = filled_memory(model.config)
    with torch.no_grad():
        before = model(batch, memory).loss
        with unrounded(model):
            torch.testing.assert_close(model(batch, memory).token_losses, plain(batch, memory).token_losses)
        assert model(batch, memory).loss == before
    assert before != plain(batch, memory).loss


def test_shares_of_ternary_values() -> None:
    model = trained()
    found = {s.name: s for s in weight_scores(model)}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    for group in ("encoder", "memory", "all"):
        values = torch.cat(
            [m.ternary_weight()[0].flatten() for n, m in layers.items() if group in (n.split(".")[0], "all")]
        )
        shares = [float((values == v).double().mean()) for v in (0, 1, -1)]
        assert [found[f"share of {v}, {group}"].value for v in ("zero", "plus", "minus")] == pytest.approx(shares)
        entropy = -sum(p * math.log2(p) for p in shares)
        assert found[f"entropy of a weight, {group}"].value == pytest.approx(entropy)
    total = sum(p.numel() for p in model.parameters())
    assert found["size in fp32"].value == pytest.approx(4e-6 * total)


def test_rounding_errors_by_caption() -> None:
    model, batch = trained(), caption_batch()
    memory = filled_memory(model.config)
    seen: list[tuple[str, Tensor]] = []

    def look(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        seen.append((name, inputs[0].detach()))

    tables = rounding_tables(model, model, [rows_of(batch, [0] * 8)], 8, memory, ALONE)
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.register_forward_pre_hook(functools.partial(look, name))
    with torch.no_grad():
        model(batch, memory)
    expected = {group: torch.zeros(8, 2, dtype=torch.float64) for group in tables}
    for name, x in seen:
        for row in range(7):  # the last is a filler
            inside = batch.segments[row] > 0
            values = x[row][inside] if x.ndim == 3 and x.shape[1] == batch.tokens.shape[1] else x[row]
            flat = values.reshape(-1, x.shape[-1])
            q, step = quantize_activations(flat)
            error = (flat - q * step).double().square().sum()
            expected[name.split(".")[0]][row] += torch.stack([error, flat.double().square().sum()])
    for group, table in tables.items():
        torch.testing.assert_close(table, expected[group], rtol=1e-4, atol=1e-8)
    assert set(tables) == {"encoder", "vision", "fusion", "memory", "decoder"}
    assert joined(tables["encoder"].numpy(), np.array([0, 0, 1, 1, 2, 2, 3, 3])).shape == (4, 2)

"""Generation: pieces, batches and padding change nothing; choices follow their formulas; searches find what is best."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmar.batch import Batch
from bitmar.config import ConfigError
from bitmar.generation.generate import Generated, generate, read_prompts
from bitmar.generation.incremental import IncrementalReader, memory_reader
from bitmar.generation.sampling import Sampling, choose, narrowed, possible
from bitmar.model.bitmar import BitMar
from bitmar.model.kernel import kernel
from bitmar.model.memory import MemoryState
from bitmar.model.packed import freeze
from bitmar.model_config import PrunedLayer
from shards.tokenizer import BOS, EOS
from tests.support.batches import VOCABULARY, filled_memory, logits_of, small_model

LIMIT = 24
GREEDY = Sampling()
DRAWN = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=5)


def trained_like(seed: int = 3, frozen: bool = False, **changes: object) -> BitMar:
    """`frozen`: as tools generate, with whole blocks in the kernel where there is a compiler."""
    torch.manual_seed(seed)
    model = BitMar(small_model(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.5 * torch.rand(p.shape)).add_(0.05 * torch.randn(p.shape))
        memory_reader(model).gate.fill_(1.0)
        for name, p in model.named_parameters():
            if name.startswith("fusion") and name.endswith("gate"):
                p.fill_(1.0)
    return freeze(model) if frozen else model


FROZEN = pytest.mark.parametrize(
    "frozen", [pytest.param(False, marks=pytest.mark.slow), True], ids=["trained", "frozen"]
)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(8))


def texts(count: int, longest: int = 12) -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [[BOS, *torch.randint(3, VOCABULARY, (length,), generator=g).tolist()] for length in lengths]


def last_logits(model: BitMar, memory: MemoryState, text: Sequence[int], vector: torch.Tensor | None) -> torch.Tensor:
    """Read in one piece."""
    reader = IncrementalReader(model, memory, None if vector is None else vector[None], 1, len(text))
    return reader.read(torch.tensor([text])).logits[0]


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
@pytest.mark.parametrize("seeing", [True, False])
@pytest.mark.parametrize("remembering", [True, False])
def test_reading_is_the_model(addressing: str, seeing: bool, remembering: bool) -> None:
    model = trained_like(quantization=False, memory_addressing=addressing)
    memory = filled_memory(model.config) if remembering else MemoryState.empty(7, 16)
    for number, text in enumerate(texts(5)):
        vector = images(5)[number]
        batch = Batch.of_text(torch.tensor([text]), 24)
        if seeing:
            batch = batch.replace(vision=vector[None], has_vision=torch.ones(1, dtype=torch.bool))
        with torch.no_grad():
            whole = logits_of(model, batch, memory)[0, -1]
        mine = last_logits(model, memory, text, vector if seeing else None)
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_the_quantised_model_reads_alike() -> None:
    """Activations that stand between two levels may round either way, so a few numbers differ by a step of 1/127."""
    model = trained_like()
    memory = filled_memory(model.config)
    for text in texts(5):
        with torch.no_grad():
            whole = logits_of(model, Batch.of_text(torch.tensor([text]), 24), memory)[0, -1]
        assert (last_logits(model, memory, text, None) - whole).abs().max() < 0.02 * whole.abs().max()


@pytest.mark.skipif(kernel() is None, reason="no C++ compiler")
@pytest.mark.parametrize("edited", [False, True])
def test_the_kernels_blocks_are_the_models(edited: bool) -> None:
    """But for activations that stand between two levels; masked and pruned heads, padding and kept columns included."""
    surgery = {
        "masked_heads": ("encoder.L0H1",),
        "pruned_heads": (PrunedLayer("decoder.L1", (0,), (1.1, 0.9, 1.0, 1.2)),),
    }
    model = trained_like(**(surgery if edited else {}))
    memory, prompts = filled_memory(model.config), texts(6)
    _, plain = read_prompts(model, memory, prompts, images(6), LIMIT)
    reader, compiled = read_prompts(freeze(model), memory, prompts, images(6), LIMIT)
    assert all(block is not None for block in reader.compiled)
    apart = (plain.logits - compiled.logits).abs()
    assert float(apart.median()) < 1e-5
    assert float(apart.max()) < 0.02 * float(plain.logits.abs().max())


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from(["attention", "larimar"]),
    st.booleans(),
    st.booleans(),
)
def test_pieces_change_nothing(sizes: list[int], addressing: str, seeing: bool, frozen: bool) -> None:
    model = trained_like(frozen=frozen, memory_addressing=addressing)
    memory, vectors = filled_memory(model.config), images(2) if seeing else None
    g = torch.Generator().manual_seed(sum(sizes))
    tokens = torch.randint(3, VOCABULARY, (2, sum(sizes)), generator=g)
    reader = IncrementalReader(model, memory, vectors, 2, sum(sizes))
    for piece in tokens.split(sizes, dim=1):
        seen = reader.read(piece)
    whole = IncrementalReader(model, memory, vectors, 2, sum(sizes)).read(tokens)
    torch.testing.assert_close(seen.logits, whole.logits, rtol=1e-5, atol=1e-5)


@FROZEN
@pytest.mark.parametrize("pad_left", [True, False])
def test_neighbours_and_padding_change_nothing(pad_left: bool, frozen: bool) -> None:
    model = trained_like(frozen=frozen)
    memory, vectors, prompts = filled_memory(model.config), images(6), texts(6)
    reader, seen = read_prompts(model, memory, prompts, vectors, LIMIT, pad_left)
    following = torch.arange(6)[:, None] + 10
    after = reader.read(following)
    for row, prompt in enumerate(prompts):
        alone = last_logits(model, memory, prompt, vectors[row])
        torch.testing.assert_close(seen.logits[row], alone, rtol=1e-5, atol=1e-5)
        later = last_logits(model, memory, [*prompt, int(following[row])], vectors[row])
        torch.testing.assert_close(after.logits[row], later, rtol=1e-5, atol=1e-5)


@FROZEN
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_without_a_cache_the_same_text(sampling: Sampling, frozen: bool) -> None:
    model = trained_like(frozen=frozen)
    memory, vectors, prompts = filled_memory(model.config), images(4), texts(4)
    for row, found in enumerate(generate(model, memory, prompts, vectors, sampling, LIMIT)):
        tokens: list[int] = []
        total = 0.0
        while len(prompts[row]) + len(tokens) < LIMIT:
            chances = possible(last_logits(model, memory, [*prompts[row], *tokens], vectors[row])[None])
            token = int(choose(chances, sampling, len(tokens), [row]))
            total += float(chances[0, token])
            if token == EOS:
                break
            tokens.append(token)
        assert found.tokens == tuple(tokens)
        assert found.ended == (len(prompts[row]) + len(tokens) < LIMIT)
        assert found.log_probability == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(beams=3)], ids=["greedy", "drawn", "beams"])
@FROZEN
@pytest.mark.parametrize("seeing", [True, False])
def test_a_batch_is_its_rows(sampling: Sampling, seeing: bool, frozen: bool) -> None:
    model = trained_like(frozen=frozen)
    memory, vectors, prompts = filled_memory(model.config), images(5) if seeing else None, texts(5)
    together = generate(model, memory, prompts, vectors, sampling, LIMIT)
    for row, prompt in enumerate(prompts):
        own = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
        vector = None if vectors is None else vectors[row : row + 1]
        (alone,) = generate(model, memory, [prompt], vector, own, LIMIT)
        assert alone.tokens == together[row].tokens
        assert alone.log_probability == pytest.approx(together[row].log_probability, abs=1e-5)


def brute_force(model: BitMar, prompt: list[int], longest: int, penalty: float) -> Generated:
    """The best of all texts."""
    memory = filled_memory(model.config)
    best = (float("-inf"), Generated((), 0.0, False))

    def go_on(tokens: tuple[int, ...], total: float) -> None:
        nonlocal best
        if len(tokens) == longest:
            best = max(best, (total / longest**penalty, Generated(tokens, total, False)), key=lambda found: found[0])
            return
        chances = possible(last_logits(model, memory, [*prompt, *tokens], None)[None])[0].tolist()
        ended = total + chances[EOS]
        worth = ended / (len(tokens) + 1) ** penalty
        best = max(best, (worth, Generated(tokens, ended, True)), key=lambda found: found[0])
        for token in range(3, model.config.vocab_size):
            go_on((*tokens, token), total + chances[token])

    go_on((), 0.0)
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_beams_find_the_best_text(penalty: float) -> None:
    for seed in range(3):
        model = trained_like(seed, vocab_size=6)
        prompt = [BOS, 3 + seed]
        sampling = Sampling(max_tokens=3, beams=40, length_penalty=penalty)
        (found,) = generate(model, filled_memory(model.config), [prompt], None, sampling, LIMIT)
        best = brute_force(model, prompt, 3, penalty)
        assert (found.tokens, found.ended) == (best.tokens, best.ended)
        assert found.log_probability == pytest.approx(best.log_probability, abs=1e-5)


def test_more_beams_are_no_worse() -> None:
    model = trained_like()
    memory, prompts = filled_memory(model.config), texts(4)
    (one, many) = (
        generate(model, memory, prompts, None, Sampling(max_tokens=6, beams=n, length_penalty=0.0), LIMIT)
        for n in (2, 50)
    )
    greedy = generate(model, memory, prompts, None, Sampling(max_tokens=6), LIMIT)
    assert all(
        b.log_probability >= max(a.log_probability, g.log_probability) - 1e-6
        for a, b, g in zip(one, many, greedy, strict=True)
    )


def test_top_k_and_top_p_by_hand() -> None:
    chances = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).double()
    (three,) = narrowed(chances.log(), Sampling(temperature=1.0, top_k=2)).exp()
    assert three.tolist() == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0, 0])  # two are the second likeliest
    (nucleus,) = narrowed(chances.log(), Sampling(temperature=1.0, top_p=0.6)).exp()
    assert nucleus.tolist() == pytest.approx([5 / 7, 2 / 7, 0, 0, 0])
    (cold,) = narrowed(chances.log(), Sampling(temperature=0.5)).exp()
    squares = [0.25, 0.04, 0.04, 0.0036, 0.0016]
    assert cold.tolist() == pytest.approx([x / sum(squares) for x in squares])


def test_draws_follow_the_chances() -> None:
    chances = torch.tensor([0.6, 0.3, 0.1]).double().log().expand(4000, 3)
    drawn = choose(chances, Sampling(temperature=1.0, seed=7), 0, range(4000))
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)  # four standard errors


def test_special_tokens_never_come() -> None:
    chances = possible(torch.tensor([[9.0, 9.0, 0.0, 0.0]])).exp()
    assert chances.tolist() == [pytest.approx([0, 0, 0.5, 0.5])]


def test_texts_end_at_the_limit() -> None:
    model, memory = trained_like(), filled_memory(small_model())
    prompts = [[BOS, *range(3, 3 + n)] for n in (1, LIMIT - 2)]
    with torch.no_grad():
        model.embedding.weight[EOS] = 0  # unlikely
    for sampling in (GREEDY, Sampling(beams=2)):
        found = generate(model, memory, prompts, None, sampling, LIMIT)
        assert [len(p) + len(f.tokens) for p, f in zip(prompts, found, strict=True)] == [LIMIT, LIMIT]
        assert not any(f.ended for f in found)


MISTAKES = {
    "too long": ([[BOS] * LIMIT], None, GREEDY, "trained on rows of 24"),
    "too many asked for": ([[BOS, 5]], None, Sampling(max_tokens=23), "23 more are asked for"),
    "no first token": ([[5]], None, GREEDY, "does not begin with <bos>"),
    "no prompt": ([], None, GREEDY, "there is no prompt"),
    "no such token": ([[BOS, 97]], None, GREEDY, "outside of the vocabulary"),
    "width": ([[BOS]], torch.zeros(1, 23), GREEDY, "1 of 24 finite numbers"),
    "count": ([[BOS]], torch.zeros(2, 24), GREEDY, "1 of 24 finite numbers"),
    "not finite": ([[BOS]], torch.full((1, 24), float("nan")), GREEDY, "finite"),
}


@pytest.mark.parametrize(("prompts", "vectors", "sampling", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(prompts: list[list[int]], vectors: torch.Tensor, sampling: Sampling, says: str) -> None:
    model = trained_like()
    with pytest.raises(ConfigError, match=says):
        generate(model, filled_memory(model.config), prompts, vectors, sampling, LIMIT)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0, "temperature": 1.0}, "top_k"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p"),
        ({"top_p": 0.5}, "temperature 0"),
        ({"beams": 0}, "beams"),
        ({"beams": 2, "temperature": 1.0}, "beams"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": -1.0}, "length_penalty"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**changes)  # type: ignore[arg-type]

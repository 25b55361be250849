"""Exported models compute what the trained ones do: with images, text, memory, cache, padding, pruned heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitmar.batch import Batch
from bitmar.generation.incremental import IncrementalReader
from bitmar.loading import load_trained
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from tests.support.batches import caption_batch, logits_of
from tests.support.exports import ROW_TOKENS, VOCABULARY, edited_model, export, trained_model

transformers = pytest.importorskip("transformers")

MODELS = {
    "plain": lambda: trained_model(),
    "least squares": lambda: trained_model(memory_addressing="larimar"),
    "edited": edited_model,
    "unrounded": lambda: trained_model(quantization=False, vision_quantization=False),
    "unrounded vision": lambda: trained_model(vision_quantization=False),
}


class Case:
    """A model, its memory, and what its exported directory loads as."""

    def __init__(self, folder: Path, model: BitMar) -> None:
        self.model = model
        self.directory, self.memory = export(folder, model)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.exported: Any = load(self.directory, trust_remote_code=True)

    def logits(self, tokens: Tensor, **known: Any) -> Tensor:
        with torch.no_grad():
            return self.exported(input_ids=tokens, **known).logits


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("exported"), MODELS[request.param]())


def readers(batch: Batch) -> Batch:
    """Readers who have no image of their own in the memory, as an exported model's."""
    return batch.replace(image_ids=torch.zeros_like(batch.image_ids))


def of_captions(case: Case, batch: Batch) -> Tensor:
    mask = batch.token_mask.long()
    return case.logits(batch.tokens, attention_mask=mask, vision_vectors=batch.vision, has_vision=batch.has_vision)


def prompts(rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) >= torch.arange(rows)[:, None] * 2).long()
    return tokens * mask, mask


def test_logits_are_the_trainers(case: Case) -> None:
    batch = readers(caption_batch())
    mask = batch.token_mask
    with torch.no_grad():
        ours = logits_of(case.model, batch, case.memory)[mask]
    exact = transformers.AutoModelForCausalLM.from_pretrained(
        case.directory, trust_remote_code=True, inference_dtype="float32"
    )
    for model in (exact, case.exported):
        known = {"vision_vectors": batch.vision, "has_vision": batch.has_vision, "attention_mask": mask.long()}
        with torch.no_grad():
            theirs = model(input_ids=batch.tokens, **known).logits[mask]
        # in fp64 a number may fall on the other side of a rounding, which is rare
        worst = (theirs - ours).abs().amax(-1) / ours.abs().max()
        assert float((worst > 1e-6).float().mean()) <= (0.0 if model is exact else 0.05)


def test_logits_are_those_of_our_own_generation(case: Case) -> None:
    """Which has attention and the memory's read in fp64, as an export has by default."""
    batch = caption_batch(rows=6)
    reader = IncrementalReader(case.model, case.memory, batch.vision, 6, batch.tokens.shape[1])
    for place in range(batch.tokens.shape[1]):
        ours = reader.read(batch.tokens[:, place : place + 1]).logits
        theirs = case.logits(batch.tokens[:, : place + 1], vision_vectors=batch.vision)[:, -1]
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_logits_of_text(case: Case) -> None:
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    batch = Batch.of_text(tokens, 24)
    exact = transformers.AutoModelForCausalLM.from_pretrained(
        case.directory, trust_remote_code=True, inference_dtype="float32"
    )
    slots, width = case.memory.keys.shape
    for memory, used in ((case.memory, True), (MemoryState.empty(slots, width), False)):
        exact.config.use_memory = used
        with torch.no_grad():
            ours, theirs = logits_of(case.model, batch, memory), exact(tokens).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-5)
    assert not torch.equal(case.logits(tokens), exact(tokens).logits), "the memory must matter here"


def test_a_cached_pass_is_the_plain_one(case: Case) -> None:
    batch = caption_batch(rows=4)
    known = {"vision_vectors": batch.vision}
    whole = case.logits(batch.tokens, **known)
    cache, parts = transformers.DynamicCache(), []
    for step in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 12)):
        parts.append(case.logits(batch.tokens[:, step], past_key_values=cache, **known))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_rows_together_are_rows_alone(case: Case) -> None:
    batch = caption_batch()
    together = of_captions(case, batch)
    for row in range(len(batch.tokens) - 1):
        length = int(batch.segments[row].sum())
        alone = case.logits(batch.tokens[row, None, :length], vision_vectors=batch.vision[row, None])
        torch.testing.assert_close(together[row, None, :length], alone, rtol=0, atol=1e-5)


def test_the_side_of_the_padding_does_not_matter(case: Case) -> None:
    tokens, mask = prompts()
    padded = case.logits(tokens, attention_mask=mask)
    for row in range(len(tokens)):
        inside = mask[row].bool()
        alone = case.logits(tokens[row][inside][None])
        torch.testing.assert_close(padded[row][inside][None], alone, rtol=0, atol=1e-5)
    causal = mask[:, None].repeat(1, tokens.shape[1], 1).tril()  # as BabyLM's fine-tuning makes them
    inside = mask.bool()
    for shaped in (causal, causal[:, None], causal.bool()):
        found = case.logits(tokens, attention_mask=shaped)
        torch.testing.assert_close(found[inside], padded[inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_masks_that_are_added_to_scores(case: Case, least: float) -> None:
    tokens, mask = prompts()
    expected = case.logits(tokens, attention_mask=mask)
    looks = mask[:, None].repeat(1, tokens.shape[1], 1).tril()[:, None].bool()
    added = torch.zeros(looks.shape).masked_fill(~looks, least)
    inside = mask.bool()
    for given in (added, torch.zeros(mask.shape).masked_fill(~inside, least), mask.float()):
        found = case.logits(tokens, attention_mask=given)
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-5)
    everybody = torch.zeros(4, 1, *2 * tokens.shape[1:])
    torch.testing.assert_close(case.logits(tokens, attention_mask=everybody), case.logits(tokens), rtol=0, atol=1e-5)
    for wrong in (added - 1, 2 * looks.float() - 1):
        with pytest.raises(ValueError, match="neither yes nor no"):
            case.logits(tokens, attention_mask=wrong)


class NoFp64(TorchDispatchMode):
    """A device without fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else (found,):
            assert not isinstance(part, Tensor) or part.dtype != torch.float64, f"{func} gives fp64"
        return found


def test_a_device_without_fp64_computes_in_fp32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = caption_batch(rows=4)
    known = {"attention_mask": batch.token_mask.long(), "vision_vectors": batch.vision}
    layers = sys.modules[type(case.exported).__module__.replace("modeling", "layers")]
    with pytest.raises(AssertionError, match="gives fp64"), NoFp64():
        case.logits(batch.tokens, **known)
    monkeypatch.setattr(layers, "WITHOUT_FP64", {"cpu"})
    with NoFp64():
        found = case.logits(batch.tokens, **known)
    monkeypatch.undo()
    exact = transformers.AutoModelForCausalLM.from_pretrained(
        case.directory, trust_remote_code=True, inference_dtype="float32"
    )
    with torch.no_grad():
        torch.testing.assert_close(found, exact(batch.tokens, **known).logits, rtol=0, atol=1e-5)


def test_a_later_token_changes_nothing_before_it(case: Case) -> None:
    batch = caption_batch(rows=4)
    changed = batch.tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    known = {"vision_vectors": batch.vision}
    before, after = case.logits(batch.tokens, **known), case.logits(changed, **known)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
    "beam": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("how", GENERATIONS.values(), ids=list(GENERATIONS))
def test_generation(case: Case, how: dict[str, Any]) -> None:
    tokens, mask = prompts()
    vectors = caption_batch(rows=4).vision
    known = {"max_new_tokens": 6, "min_new_tokens": 6, "vision_vectors": vectors, **how}

    def generated(tokens: Tensor, mask: Tensor, **more: Any) -> Tensor:
        torch.manual_seed(0)
        return case.exported.generate(input_ids=tokens, attention_mask=mask, **(known | more))

    cached = generated(tokens, mask)
    assert cached.shape == (4, 15)
    assert torch.equal(cached, generated(tokens, mask, use_cache=False))
    if not how["do_sample"]:
        for row in range(4):
            inside = mask[row].bool()
            alone = generated(tokens[row][inside][None], mask[row][inside][None], vision_vectors=vectors[row, None])
            assert torch.equal(alone[0], cached[row][mask[row].argmax() :])


def test_generation_from_a_vector_alone(case: Case) -> None:
    """What each step chooses from are the logits of the text so far with its image."""
    vectors = caption_batch(rows=2).vision
    known = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = case.exported.generate(vision_vectors=vectors, return_dict_in_generate=True, output_logits=True, **known)
    assert found.sequences.shape == (2, 5)
    assert (found.sequences[:, 0] == 1).all()
    steps = torch.stack(found.logits, 1)
    said = found.sequences[:, :-1]
    torch.testing.assert_close(steps, case.logits(said, vision_vectors=vectors), rtol=0, atol=1e-5)
    assert not torch.allclose(steps, case.logits(said), atol=1e-2), "the image must matter here"


def test_saving_and_loading_keeps_every_bit(case: Case, tmp_path: Path) -> None:
    case.exported.save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(case.directory, trust_remote_code=True).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    old, new = case.exported.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    tokens, _ = prompts()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, case.logits(tokens))
    for directory in (case.directory, tmp_path):
        loaded = load_trained(directory)
        assert loaded.model.config == case.model.config
        mine = dict(case.model.named_parameters())
        assert all(torch.equal(p, mine[name]) for name, p in loaded.model.named_parameters())
        held = loaded.memory.tensors()
        assert all(torch.equal(t, held[name]) for name, t in case.memory.tensors().items())
        assert (loaded.progress.step, loaded.progress.words) == (7, 1234)
        assert loaded.config.data.row_tokens == ROW_TOKENS


def test_gradients_are_the_trainers(case: Case) -> None:
    """Fine-tuning: the loss and the straight-through gradient of every parameter that takes part."""
    batch = readers(caption_batch(rows=4))
    batch = batch.replace(targets=torch.nn.functional.pad(batch.tokens[:, 1:], (0, 1), value=-100))
    inside = batch.token_mask
    batch = batch.replace(targets=batch.targets.masked_fill(batch.targets == 0, -100))
    case.model.zero_grad()
    count = int((batch.targets != -100).sum())
    (case.model(batch, case.memory).loss / count).backward()
    case.exported.train()
    labels = batch.tokens.masked_fill(~inside, -100)
    output = case.exported(
        input_ids=batch.tokens, attention_mask=inside.long(), vision_vectors=batch.vision, labels=labels
    )
    output.loss.backward()
    theirs = {name: p.grad for name, p in case.exported.named_parameters()}
    case.exported.zero_grad()
    case.exported.eval()
    compared = 0
    for name, p in case.model.named_parameters():
        mine = theirs[name]
        if mine is not None and p.grad is not None:
            compared += 1
            assert (mine - p.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-7, name
    assert compared > 40
    case.model.zero_grad()


def test_hidden_states(case: Case) -> None:
    tokens, mask = prompts()
    model = transformers.AutoModel.from_pretrained(case.directory, trust_remote_code=True)
    with torch.no_grad():
        output = model(tokens, mask, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert output.last_hidden_state.shape == (*tokens.shape, model.config.hidden_size)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    scaled = output.last_hidden_state * (7.0 / (0.02 * model.config.hidden_size))
    torch.testing.assert_close(
        scaled @ case.model.embedding.weight.T, case.logits(tokens, attention_mask=mask), rtol=1e-5, atol=1e-5
    )
    last = case.logits(tokens, attention_mask=mask, logits_to_keep=2)
    assert last.shape[1] == 2
    as_tuple = model(tokens, mask, return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state)
    embedded = case.exported(inputs_embeds=case.exported.get_input_embeddings()(tokens), attention_mask=mask).logits
    assert torch.equal(embedded, case.logits(tokens, attention_mask=mask))


def test_what_does_not_fit_is_told(case: Case) -> None:
    tokens, _ = prompts()
    for known, words in (
        ({"vision_vectors": torch.zeros(4, 5)}, r"\[4, 5\]; \[4, 24\] would do"),
        ({"vision_vectors": torch.zeros(3, 24)}, r"\[3, 24\]; \[4, 24\] would do"),
        ({"vision_vectors": torch.zeros(4, 24), "pixel_values": torch.zeros(4, 3, 8, 8)}, "either vision_vectors or"),
        ({"attention_mask": torch.ones(4, 5)}, "covers 5 positions; 9 would do"),
        ({"vision_vectors": torch.zeros(4, 24), "has_vision": torch.ones(1)}, r"\[1\]; \[4\] would do"),
    ):
        with pytest.raises(ValueError, match=words):
            case.logits(tokens, **known)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        case.exported()
    for rows in (1, 3):
        with pytest.raises(ValueError, match=rf"\[{rows}, 24\]; \[4, 24\] would do"):
            case.exported.generate(tokens, vision_vectors=torch.zeros(rows, 24), max_new_tokens=2)
    with pytest.raises(ValueError, match="either vision_vectors or pixel_values"):
        case.exported.generate(tokens, vision_vectors=torch.zeros(4, 24), pixel_values=torch.zeros(4, 3, 8, 8))


def test_a_keyword_that_is_misspelt_is_told(case: Case) -> None:
    tokens, mask = prompts()
    base = transformers.AutoModel.from_pretrained(case.directory, trust_remote_code=True)
    for model in (case.exported, base):
        with pytest.raises(TypeError, match="forward knows no vision_vector, pixels"):
            model(tokens, vision_vector=torch.zeros(4, 24), pixels=1)
        passed = {"cache_position": torch.arange(9), "token_type_ids": mask, "output_attentions": False, "other": None}
        model(tokens, **passed)  # as versions of transformers do
    with pytest.raises(ValueError, match="vision_vector"):
        case.exported.generate(tokens, vision_vector=torch.zeros(4, 24), max_new_tokens=2)


def test_the_trainer_of_transformers(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(case.directory, trust_remote_code=True)
    row = {"input_ids": list(range(3, 12)), "attention_mask": [1] * 9, "labels": list(range(3, 12)), "id": 7}
    rows: Any = [row | {"vision_vectors": [0.5] * 24}] * 8
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=3e-3
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before

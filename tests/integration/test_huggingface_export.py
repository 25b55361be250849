"""Exported directories as others use them: fresh processes without this project and without a network, BabyLM's calls,
lm-evaluation-harness, images through a DINOv2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import ConfigError
from bitmar.engine.fragments import CheckpointError
from bitmar.engine.retention import BABYLM_MILESTONES
from bitmar.export.huggingface import parse_words, revision_name
from bitmar.loading import EXPORTED_CONFIG, TOKENIZER_FILE, load_trained
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from shards.tokenizer import BOS, TextTokenizer
from tests.support.batches import logits_of
from tests.support.exports import TEXTS, export, trained_model

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

ALONE = """
import importlib.util, json, socket, sys
sys.modules["torchvision"] = None
tried = []
def refuse(self, address):
    tried.append(address)
    raise OSError("the network is refused")
socket.socket.connect = socket.socket.connect_ex = refuse
assert importlib.util.find_spec("bitmar") is None and importlib.util.find_spec("shards") is None
directory = sys.argv[1]
"""


def run_alone(folder: Path, script: str, *arguments: object, **more: str) -> Any:
    """What a script prints as JSON in its last line, in a process that knows neither this project nor a network."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(folder / "hf"), **more}
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Tiny:
    """A model and its exported directory."""

    def __init__(self, folder: Path) -> None:
        self.model: BitMar = trained_model()
        self.directory, self.memory = export(folder, self.model)
        self.tokenizer = TextTokenizer(folder / TOKENIZER_FILE)

    def tokens(self, text: str) -> list[int]:
        return [BOS, *self.tokenizer.encode_batch([text]).tokens.tolist()]

    @torch.no_grad()
    def log_likelihood(self, text: str, after: str = "") -> float:
        """Of a text behind <bos> and `after`, in nats."""
        start, tokens = len(self.tokens(after)), self.tokens(after + text)
        logits = logits_of(self.model, Batch.of_text(torch.tensor([tokens]), 24), self.memory)[0].log_softmax(-1)
        return float(sum(logits[at - 1, tokens[at]] for at in range(start, len(tokens))))


def assert_close(found: Any, expected: Any, within: float = 1e-4) -> None:
    """Most numbers within so much, all within 0.05: where the order of a sum differs, an activation may fall on the
    other side of its rounding."""
    difference = np.abs(np.asarray(found) - np.asarray(expected))
    assert difference.max() < 0.05
    assert np.mean(difference <= within) >= 0.5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def load(kind: str, directory: Path, **known: Any) -> Any:
    return getattr(transformers, kind).from_pretrained(directory, trust_remote_code=True, **known)


def test_a_directory_loads_alone(tiny: Tiny, tmp_path: Path) -> None:
    script = """
import torch
sys.modules["PIL"] = None  # nothing for images is there
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
known = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(directory, **known)
processor = AutoProcessor.from_pretrained(directory, **known)
tokenizer = AutoTokenizer.from_pretrained(directory, **known)
inputs = processor("two dogs run", return_tensors="pt")
assert inputs["input_ids"].tolist() == tokenizer("two dogs run", return_tensors="pt")["input_ids"].tolist()
with torch.no_grad():
    logits = model(**inputs).logits
    hidden = AutoModel.from_pretrained(directory, **known)(**inputs).last_hidden_state
text = processor.decode(model.generate(**inputs, max_new_tokens=3)[0], skip_special_tokens=True)
config = AutoConfig.from_pretrained(directory, **known)
print(json.dumps({"logits": logits[0].tolist(), "hidden": hidden.shape, "text": text, "tried": tried,
                  "config": [config.hidden_size, config.num_attention_heads, config.vocab_size]}))
"""
    told = run_alone(tmp_path, script, tiny.directory)
    assert told["tried"] == []
    assert told["text"].startswith("two dogs run")
    assert told["config"] == [32, 2, 300]
    tokens = torch.tensor([tiny.tokens("two dogs run")])
    assert told["hidden"] == [*tokens.shape, 32]
    with torch.no_grad():
        ours = logits_of(tiny.model, Batch.of_text(tokens, 24), tiny.memory)[0]
    assert_close(told["logits"], ours, within=2e-5)


def test_lm_evaluation_harness(tiny: Tiny, tmp_path: Path) -> None:
    """Minimal pairs, and endings of a context, from JSON lines: each likelihood is that of the trained model."""
    pairs = [{"sentence_good": good, "sentence_bad": " ".join(reversed(good.split()))} for good in TEXTS]
    endings = [{"context": "the cat sees", "endings": [" a bird", " the snow"], "label": 0}]
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    tasks = {
        "pairs": {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[sentence_good, sentence_bad]}}"},
        "endings": {
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "{{endings}}",
            "target_delimiter": "",
        },
    }
    for name, rows in (("pairs", pairs), ("endings", endings)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"test": str(tmp_path / f"{name}.jsonl")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        task |= {"output_type": "multiple_choice", "metric_list": metric, **tasks[name]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    script = """
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
of_model = {"pretrained": directory, "trust_remote_code": True, "inference_dtype": "float32"}
found = lm_eval.simple_evaluate(
    model="hf", device="cpu", model_args=of_model,
    tasks=["pairs", "endings"], task_manager=manager, bootstrap_iters=0, batch_size=4)
told = {name: [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        for name, samples in found["samples"].items()}
print(json.dumps({"likelihoods": told, "acc": found["results"]["pairs"]["acc,none"], "tried": tried}))
"""
    told = run_alone(tmp_path, script, tiny.directory, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert told["tried"] == []
    expected = [[tiny.log_likelihood(" " + text) for text in pair.values()] for pair in pairs]  # with its delimiter
    assert_close(told["likelihoods"]["pairs"], expected)
    assert told["acc"] == np.mean([good > bad for good, bad in told["likelihoods"]["pairs"]])
    expected = [[tiny.log_likelihood(end, after=row["context"]) for end in row["endings"]] for row in endings]
    assert_close(told["likelihoods"]["endings"], expected)


def test_zero_shot_calls_of_babylm(tiny: Tiny) -> None:
    """A completion's likelihood by offsets, padded on the right; the next word's; in the way of the 2025 pipeline."""
    processor = load("AutoProcessor", tiny.directory, padding_side="right", revision=None)
    model = load("AutoModelForCausalLM", tiny.directory, revision=None).eval()
    sentences = [("the cat sees", " a bird"), ("two dogs run", " in the snow today")]
    rows, masks, phrases = [], [], []
    for prefix, completion in sentences:
        encoded = processor(text=prefix + completion, return_offsets_mapping=True)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        assert isinstance(tokens[0], int)
        rows.append(torch.tensor(tokens))
        masks.append(torch.tensor(encoded["attention_mask"]))
        phrases.append(torch.tensor([int(end > len(prefix)) for _, end in offsets]))
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
    mask, phrase = pad(masks, batch_first=True), pad(phrases, batch_first=True)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1])["logits"][:, -(tokens.shape[1] - 1) :]
    each = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] * phrase[:, 1:]
    expected = [tiny.log_likelihood(completion, after=prefix) for prefix, completion in sentences]
    assert_close(each.sum(1), expected)

    inputs = processor("the cat", return_tensors="pt").to("cpu")
    with torch.no_grad():
        following = model(**inputs).logits[0, -1].log_softmax(-1)
    word = processor(" sees", add_special_tokens=False)["input_ids"]
    assert processor.decode(word[0]) == processor.tokenizer.decode(word)[: len(processor.decode(word[0]))]
    assert_close(following[word[0]], tiny.log_likelihood(processor.decode(word[0]), after="the cat"))


@pytest.mark.parametrize("causal", [False, True])
def test_fine_tuning_calls_of_babylm(tiny: Tiny, causal: bool) -> None:
    """A classifier over AutoModel's last_hidden_state, pairs of texts, masks [B, S] and [B, S, S]: the loss falls."""
    processor = load("AutoProcessor", tiny.directory)
    model = load("AutoModel", tiny.directory).train()
    texts = [("two dogs run", "dogs run"), ("the cat sees a bird", "a bird"), ("birds see", "the snow")]
    encoded = processor(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
    mask = encoded.attention_mask
    if causal:
        mask = mask.unsqueeze(1).repeat(1, mask.shape[-1], 1).tril()
    torch.manual_seed(0)
    head = torch.nn.Linear(model.config.hidden_size, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    labels, losses = torch.tensor([0, 1, 1]), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(model(encoded.input_ids, mask).last_hidden_state[:, -1]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.encoder.blocks[0].attention.qkv.weight.grad.abs().sum() > 0


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(["<eos> a", "", " a  b "]))
def test_texts_come_back_from_their_tokens(tiny: Tiny, text: str) -> None:
    tokenizer = _tokenizer(tiny.directory)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == tiny.tokens(text), "as in training"
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    first, *others = encoded["offset_mapping"]
    assert first == (0, 0)
    covered = {at for start, end in others for at in range(start, end)}
    assert covered == set(range(len(text)))
    assert others == sorted(others)
    if text.isascii():
        assert "".join(text[start:end] for start, end in others) == text


_loaded: dict[Path, Any] = {}


def _tokenizer(directory: Path) -> Any:
    if directory not in _loaded:
        _loaded[directory] = load("AutoTokenizer", directory)
    return _loaded[directory]


def dinov2(folder: Path, width: int) -> Any:
    """A real DINOv2 of a few weights, saved."""
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (300, 411, 3), np.uint8)


def test_images_go_through_the_named_dinov2(tiny: Tiny, tmp_path: Path) -> None:
    vision = dinov2(tmp_path / "dinov2", 24)
    model = load("AutoModelForCausalLM", tiny.directory, vision_model=str(tmp_path / "dinov2"))
    processor = load("AutoProcessor", tiny.directory)
    text = processor(text="a dog", return_tensors="pt")
    model(**text)
    assert model.image_model == [], "text loads no image model"
    inputs = processor(text="a dog", images=picture(), return_tensors="pt")
    with torch.no_grad():
        vectors = vision(inputs["pixel_values"]).last_hidden_state[:, 0]
        by_pixels, by_vectors = model(**inputs).logits, model(**text, vision_vectors=vectors).logits
    assert torch.equal(by_pixels, by_vectors)
    assert not torch.allclose(by_pixels, model(**text).logits, atol=1e-2)
    assert len(model.image_model) == 1
    assert not [name for name in model.state_dict() if "image_model" in name]
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4, do_sample=False),
        model.generate(**text, vision_vectors=vectors, max_new_tokens=4, do_sample=False),
    )
    flat = processor(text="a dog", images=picture(), return_offsets_mapping=True)
    assert flat["input_ids"] == text["input_ids"][0].tolist()
    assert torch.equal(torch.FloatTensor(flat["pixel_values"]), inputs["pixel_values"])
    given = processor(text=["a dog", "a bird"], vision_vectors=np.zeros((2, 24)), padding=True, return_tensors="pt")
    assert given["vision_vectors"].shape == (2, 24)
    model.config.vision_model, model.image_model = None, []
    with pytest.raises(ValueError, match="names no vision_model"):
        model(**inputs)
    dinov2(tmp_path / "narrow", 16)
    model.config.vision_model = str(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"\[1, 16\]; \[1, 24\] would do"):
        model(**inputs)


def test_pixels_are_those_of_dinov2s_own_processor(tiny: Tiny) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    theirs = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = load("AutoProcessor", tiny.directory)
    for image in (picture(), picture(1).transpose(1, 0, 2)):
        mine = processor(images=image)["pixel_values"]
        assert mine.shape == (1, 3, 224, 224)
        np.testing.assert_allclose(mine[0], theirs(image)["pixel_values"][0], atol=1e-5)


def test_pixels_of_floats_and_what_is_no_image(tiny: Tiny) -> None:
    processor = load("AutoProcessor", tiny.directory)
    expected = processor.pixels(picture())
    as_floats = picture().astype(np.float32) / 255
    for same in (as_floats, as_floats.astype(np.float64), torch.tensor(as_floats), picture().astype(np.int64)):
        np.testing.assert_array_equal(processor.pixels(same), expected)
    grey = Image.fromarray(picture()[..., 0])
    np.testing.assert_array_equal(
        processor.pixels(Image.fromarray(np.asarray(grey, np.float32) / 255)), processor.pixels(grey)
    )
    for wrong, words in (
        (picture().astype(np.float32), "image of float32 holds what is no colour"),
        (as_floats - 0.5, "no colour"),
        (np.full((4, 4, 3), np.nan), "no colour"),
        (picture().astype(np.int64) + 1, "no colour"),
        (picture() > 100, "image of bool"),
        (picture().transpose(2, 0, 1), r"shape \[3, 300, 411\]; \[height, width, 3\] would do"),
        (picture()[None], "would do"),
    ):
        with pytest.raises(ValueError, match=words):
            processor.pixels(wrong)


def damaged(directory: Path, out: Path, change: Any) -> Path:
    """A directory with another config.json."""
    shutil.copytree(directory, out)
    told = json.loads((directory / EXPORTED_CONFIG).read_text())
    (out / EXPORTED_CONFIG).write_text(json.dumps(change(told)))
    return out


DAMAGES: dict[str, tuple[Any, str]] = {
    "a list": (lambda told: [told], "holds no object of keys"),
    "other": (lambda told: told | {"model_type": "gpt2"}, "of type gpt2, not bitmar"),
    "no model": (lambda told: {n: v for n, v in told.items() if n != "bitmar"}, "lacks the key bitmar"),
    "no rows": (
        lambda told: {n: v for n, v in told.items() if n != "max_position_embeddings"},
        "lacks the key max_position_embeddings",
    ),
    "a text": (lambda told: told | {"bitmar": "large"}, "bitmar is 'large', where dict would do"),
    "rows": (lambda told: told | {"max_position_embeddings": 0}, "data.row_tokens must be > 0"),
    "key": (lambda told: told | {"bitmar": told["bitmar"] | {"widht": 3}}, "unknown key model.widht"),
    "width": (lambda told: told | {"bitmar": told["bitmar"] | {"ffn_width": 64}}, "of another model than config.json"),
    "step": (lambda told: told | {"step": "nine"}, "step is 'nine', where int would do"),
    "memory": (lambda told: told | {"use_memory": "no"}, "use_memory is 'no', where bool would do"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_config_is_told_in_a_line(tiny: Tiny, tmp_path: Path, name: str) -> None:
    change, words = DAMAGES[name]
    with pytest.raises(CheckpointError, match=words) as error:
        load_trained(damaged(tiny.directory, tmp_path / "damaged", change))
    assert "config.json" in str(error.value)


def test_a_memory_that_is_switched_off_is_empty(tiny: Tiny, tmp_path: Path) -> None:
    assert load_trained(tiny.directory).memory.written.any()
    off = load_trained(damaged(tiny.directory, tmp_path / "off", lambda told: told | {"use_memory": False}))
    slots, width = tiny.memory.keys.shape
    empty = MemoryState.empty(slots, width).tensors()
    assert all(torch.equal(tensor, empty[name]) for name, tensor in off.memory.tensors().items())


def test_rows_longer_than_in_training_are_warned_of(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    model = load("AutoModelForCausalLM", tiny.directory)
    tokens = torch.full((1, 30), 5)
    logger = transformers.utils.logging.get_logger(type(model).__module__)
    messages: list[str] = []
    logger.warning_once = messages.append
    model(tokens[:, :24])
    assert messages == []
    model(tokens)
    assert messages == ["a row of 30 tokens: the model was trained on rows of at most 24"]


def test_revisions() -> None:
    names = [revision_name(words) for words in BABYLM_MILESTONES]
    expected = [*range(1, 10), *range(10, 101, 10), *range(200, 1001, 100)]
    assert names == [f"chck_{count}M" for count in expected]
    assert [parse_words(name.removeprefix("chck_")) for name in names] == list(BABYLM_MILESTONES)
    for text in ("11M", "0M", "10", "10m words", "", "1.5M", "-1M"):
        with pytest.raises(ConfigError):
            parse_words(text)


def test_mixed_rows(tiny: Tiny) -> None:
    """Rows with and without an image in one batch."""
    model = load("AutoModelForCausalLM", tiny.directory)
    tokens, vectors = torch.full((2, 4), 7), torch.randn(2, 24, generator=torch.Generator().manual_seed(0))

    def logits(**known: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, **known).logits

    both = logits(vision_vectors=vectors, has_vision=torch.tensor([True, False]))
    assert torch.equal(both[0], logits(vision_vectors=vectors)[0])
    assert torch.equal(both[1], logits()[1])

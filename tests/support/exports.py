"""Exported Hugging Face directories of small models."""

from __future__ import annotations

from pathlib import Path

import torch

from bitmar.analysis.surgery import Surgery, edit_parameters
from bitmar.batch import Batch
from bitmar.config import DataConfig, RunConfig
from bitmar.engine.progress import Progress
from bitmar.export.huggingface import export_directory
from bitmar.export.model_card import Revision
from bitmar.head_names import parse_heads
from bitmar.loading import TOKENIZER_FILE, Exported, Loaded, load_trained
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from shards.tokenizer import train_tokenizer
from tests.support import offline
from tests.support.batches import filled_memory, logits_of, small_model

assert offline
VOCABULARY = 300
ROW_TOKENS = 24
TEXTS = ["a dog runs along the beach", "two dogs run in the snow", "the cat sees a bird", "birds see the cats"]
PRUNED, MASKED = "encoder.L0H1,cross_modal.L1H0", "decoder.L1H0"


def trained_model(**changes: object) -> BitMar:
    """A small model whose weights, norms and gates are none as they were made; gates are open."""
    torch.manual_seed(3)
    model = BitMar(small_model(vocab_size=VOCABULARY, **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 + 0.5 * torch.rand(p.shape, generator=generator))
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
            if name.endswith("gate"):
                p.fill_(1.0)
    return model


def edited_model() -> BitMar:
    """With pruned and masked heads."""
    whole = trained_model(fusion_layers=2)
    surgery = Surgery(prune=parse_heads(PRUNED), mask=parse_heads(MASKED))
    weights = {name: p.detach() for name, p in whole.named_parameters()}
    config, (weights,) = edit_parameters(whole.config, [weights], surgery, 0)
    model = BitMar(config).eval()
    model.load_state_dict(weights)
    return model


def export(folder: Path, model: BitMar, vision_model: str = "none") -> tuple[Path, MemoryState]:
    """(exported directory, its memory) of a model, under a tokenizer of a few sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FILE).write_text(train_tokenizer(TEXTS * 3, VOCABULARY), encoding="utf-8")
    config = Exported(RunConfig(name="tiny"), DataConfig(shards="", row_tokens=ROW_TOKENS), model.config)
    memory = filled_memory(model.config)
    loaded = Loaded(model, memory, config, Progress("", step=7, words=1234), folder, folder)
    out = folder / "exported"
    export_directory(loaded, out, [Revision("main", Path("exported"))], vision_model)
    return out, memory


def assert_same_model(exported: Path, trained: Path) -> None:
    """What transformers loads from a directory has the logits of a checkpoint's model."""
    import transformers

    loaded = load_trained(trained)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, inference_dtype="float32"
    )
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        ours = logits_of(loaded.model, Batch.of_text(tokens, loaded.model.config.vision_encoder_dim), loaded.memory)
        torch.testing.assert_close(model(tokens).logits, ours, rtol=1e-6, atol=1e-5)
    assert (model.config.step, model.config.words) == (loaded.progress.step, loaded.progress.words)

"""Hugging Face directories: the model, its tokenizer, and code that transformers runs without this project.

    config.json               model_type bitmar; section `bitmar` is the recipe's section `model`
    model.safetensors         fp32 shadow weights under the trainer's names; slots.NAME: the episodic memory
    tokenizer.json, ..._config.json    <bos> in front of a text, and between the two of a pair
    processor_config.json, generation_config.json, README.md (the model card)
    configuration_, layers_, modeling_, processing_bitmar.py    copies of bitmar/export/hf_code

A pair's second text begins as a record does in training, with <bos>: <eos> is a target there and never an input.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from bitmar.config import ConfigError
from bitmar.engine.fragments import read_state
from bitmar.engine.progress import checkpoint_directories
from bitmar.engine.retention import BABYLM_MILESTONES, MILLION
from bitmar.export.model_card import Revision, model_card
from bitmar.loading import EXPORTED_CONFIG, EXPORTED_WEIGHTS, MODEL_TYPE, SLOTS, TOKENIZER_FILE, Loaded
from shards.tokenizer import BOS, EOS, PAD, SPECIALS, TextTokenizer

CODE = Path(__file__).parent / "hf_code"
CODE_FILES = ("configuration_bitmar.py", "layers_bitmar.py", "modeling_bitmar.py", "processing_bitmar.py")
MAIN = "main"  # the revision of the newest checkpoint
VISION_MODEL = "facebook/dinov2-base"  # whose vectors BabyLM gives
AUTO_CLASSES = {
    "AutoConfig": "configuration_bitmar.BitMarConfig",
    "AutoModel": "modeling_bitmar.BitMarModel",
    "AutoModelForCausalLM": "modeling_bitmar.BitMarForCausalLM",
    "AutoProcessor": "processing_bitmar.BitMarProcessor",
}


def revision_name(words: int) -> str:
    """chck_1M to chck_10M, chck_20M to chck_100M, chck_200M to chck_1000M. Raises ConfigError for other counts."""
    if words not in BABYLM_MILESTONES:
        raise ConfigError(f"BabyLM has no revision for {words:,} words; 1M to 10M, 20M to 100M, 200M to 1000M would do")
    return f"chck_{words // MILLION}M"


def parse_words(text: str) -> int:
    """10M -> 10,000,000. Raises ConfigError where that is no milestone of BabyLM."""
    number = text.strip().upper().removesuffix("M")
    if not (text.strip().upper().endswith("M") and number.isdecimal()):
        raise ConfigError(f"--words {text}: a number of millions such as 10M, or all")
    words = int(number) * MILLION
    revision_name(words)
    return words


def milestone_checkpoints(run: Path) -> dict[int, Path]:
    """Words -> the checkpoint that a run keeps of having passed so many, ascending. Raises CheckpointError."""
    found: dict[int, Path] = {}
    for directory in checkpoint_directories(run):
        for words in read_state(directory)["keep"]["milestone_words"]:
            found.setdefault(words, directory)
    return dict(sorted(found.items()))


def plan_export(run: Path, words: str | None, checkpoint: Path) -> list[tuple[str, Path]]:
    """(revision, checkpoint) of each directory to write: that of `words` (10M), of `all` there are and the newest.

    None: `checkpoint` as it is. Raises ConfigError, CheckpointError.
    """
    if words is None:
        return [(MAIN, checkpoint)]
    held = {count: path for count, path in milestone_checkpoints(run).items() if count in BABYLM_MILESTONES}
    told = ", ".join(f"{count // MILLION}M" for count in held) or "none: train with checkpoint.word_milestones=true"
    if words == "all":
        if not held:
            raise ConfigError(f"{run} has checkpoints at BabyLM's milestones: {told}")
        newest = checkpoint_directories(run)[0]
        return [*((revision_name(count), path) for count, path in held.items()), (MAIN, newest)]
    wanted = parse_words(words)
    if wanted not in held:
        raise ConfigError(f"{run} has no checkpoint at {words} words; of those at milestones it has {told}")
    return [(revision_name(wanted), held[wanted])]


def export_directory(
    loaded: Loaded, out: Path, revisions: Sequence[Revision], vision_model: str = VISION_MODEL
) -> None:
    """Write a model as a directory, in one move. `revisions`: what the card tells how to upload.

    Raises ConfigError where `out` holds something already, DataError for a tokenizer that cannot be read, OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; name another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(tensors_of(loaded), temporary / EXPORTED_WEIGHTS, {"format": "pt"})
    for name, content in settings(loaded, vision_model).items():
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (temporary / TOKENIZER_FILE).write_text(tokenizer_json(loaded.tokenizer), encoding="utf-8")
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, temporary / name)
    (temporary / "README.md").write_text(model_card(loaded, vision_model, revisions), encoding="utf-8")
    if out.exists():
        out.rmdir()
    temporary.rename(out)


def tensors_of(loaded: Loaded) -> dict[str, Tensor]:
    """Parameters, and the memory but for how often slots were read in all."""
    slots = {SLOTS + name: tensor for name, tensor in loaded.memory.tensors().items() if name != "usage"}
    tensors = {name: p.detach() for name, p in loaded.model.named_parameters()} | slots
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def settings(loaded: Loaded, vision_model: str) -> dict[str, dict[str, Any]]:
    """The JSON files but for the tokenizer itself."""
    model, row_tokens = loaded.model.config, loaded.config.data.row_tokens
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    pad, bos, eos = SPECIALS
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["BitMarForCausalLM"],
        "auto_map": AUTO_CLASSES,
        "bitmar": dataclasses.asdict(model),
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.encoder_layers + model.decoder_layers,
        "max_position_embeddings": row_tokens,
        "use_memory": True,
        "vision_model": vision_model,
        "vision_feature": "pooler_output",
        "run_name": loaded.config.run.name,
        "step": loaded.progress.step,
        "words": loaded.progress.words,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        **special,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "BitMarProcessor",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": row_tokens,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a literal <eos> in a text is text, as in training
        "model_input_names": ["input_ids", "attention_mask"],
    }
    processor = {"processor_class": "BitMarProcessor", "auto_map": {"AutoProcessor": AUTO_CLASSES["AutoProcessor"]}}
    return {
        EXPORTED_CONFIG: config,
        "tokenizer_config.json": tokenizer,
        "processor_config.json": processor,
        "generation_config.json": special,
    }


def tokenizer_json(path: Path) -> str:
    """A run's tokenizer that puts <bos> in front of a text. Raises DataError."""
    TextTokenizer(path)  # checks that the specials are where they must be
    inner = tokenizers.Tokenizer.from_file(str(path))
    bos = SPECIALS[BOS]
    inner.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS)]
    )
    return inner.to_str(pretty=True)

"""The model card of an exported directory: data, words, scores, limits, how to load, how to upload."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmar.evaluation.scores import path_of
from bitmar.loading import Exported, Loaded
from bitmar.model.bitmar import parameter_counts
from bitmar.observability.records import METRICS_FILE, read_lines
from bitmar.observability.run_folder import is_generated
from bitmar.observability.schema import STEP_METRIC
from shards.writer import MANIFEST

Row = tuple[str, ...]
_SCORES, _RULE = ("score", "value", "95 % interval", "chance"), ("---",) * 4

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [bitmar, babylm, bitnet, vision-language]
# license: yours to choose; the training data has licences of its own
---

# {name}

A BitMar model: a vision-language transformer with ternary weights and 8-bit activations (BitNet b1.58) and an episodic
memory of image-text episodes that is read while it predicts. {parameters:,} parameters, stored as fp32 shadow weights
that are rounded in every forward pass.

## Training

Step {step:,}, {words:,} words seen (a word counts each time it is read).
{warning}
{sources}

## Scores

{scores}

## Limits

- Rows of {row_tokens} tokens in training; longer texts get a warning.
- English; trained on little data from scratch, so what it writes is not to be relied on.
- The memory ({slots} slots) is what training left in it; loading it here never writes. `use_memory: false` in
  config.json leaves it out.
- Images come as DINOv2 vectors of {vector} numbers (`vision_vectors`), or as `pixel_values` through `{vision_model}`
  (its `pooler_output`), which is loaded when the first image comes.
- 8-bit rounding amplifies differences of 1e-7. Attention and the memory's read are therefore computed in fp64 at
  inference (in fp32 on MPS), so that cached, batched and padded passes agree; `inference_dtype: float32` gives the
  trainer's numbers.

## Use

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(PATH, trust_remote_code=True)
inputs = processor("a dog", return_tensors="pt")            # images=..., or vision_vectors=[{vector} numbers]
print(processor.decode(model.generate(**inputs, max_new_tokens=30)[0], skip_special_tokens=True))
```

`AutoModel` gives `last_hidden_state`, for fine-tuning. For batches of prompts of unequal length set
`processor.tokenizer.padding_side = "left"`. The tokenizer puts <bos> in front of a text, as training did; a version of
lm-evaluation-harness that switches this off needs `add_bos_token=True`.

## Upload

```python
{upload}
```
"""


@dataclass(frozen=True)
class Revision:
    """A directory and the revision of the repository that it is to be."""

    name: str
    directory: Path


def model_card(loaded: Loaded, vision_model: str, revisions: Sequence[Revision]) -> str:
    """README.md of a directory. Parts of the run's folder that are missing or damaged are left out."""
    manifest = _manifest(loaded)
    return _CARD.format(
        name=loaded.config.run.name,
        parameters=sum(parameter_counts(loaded.model).values()),
        step=loaded.progress.step,
        words=loaded.progress.words,
        warning=_warning(loaded, manifest),
        sources=_sources(manifest),
        scores=_table(_SCORES, [*_validation(loaded), *_evaluation(loaded)]) or "None is recorded.",
        row_tokens=loaded.config.data.row_tokens,
        slots=loaded.model.config.memory_size,
        vector=loaded.model.config.vision_encoder_dim,
        vision_model=vision_model,
        upload=upload_commands(revisions),
    )


def upload_commands(revisions: Sequence[Revision]) -> str:
    """What a user runs, logged in, to upload the directories; nothing here does it."""
    lines = ["from huggingface_hub import HfApi  # after: hf auth login", "", 'api, repo = HfApi(), "USER/NAME"']
    lines.append("api.create_repo(repo, exist_ok=True)")
    for revision in revisions:
        if revision.name != "main":
            lines.append(f'api.create_branch(repo, branch="{revision.name}", exist_ok=True)')
        where = f'folder_path="{revision.directory}", revision="{revision.name}"'
        lines.append(f"api.upload_folder(repo_id=repo, {where})")
    return "\n".join(lines)


def _manifest(loaded: Loaded) -> dict[str, Any]:
    """That of the shards; empty where it cannot be read."""
    if isinstance(loaded.config, Exported):
        return {}
    try:
        found = json.loads((Path(loaded.config.data.shards) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _warning(loaded: Loaded, manifest: dict[str, Any]) -> str:
    try:
        generated = manifest.get("generated") or is_generated(loaded.run_directory)
    except ValueError:  # a damaged line of events
        generated = False
    return "The data is GENERATED: scores on it say nothing of real text.\n" if generated else ""


def _sources(manifest: dict[str, Any]) -> str:
    """Words of each source's training split."""
    words: dict[str, int] = {}
    try:
        for shard in manifest["shards"]:
            for name, held in shard["sources"].items() if shard["split"] == "train" else ():
                words[name] = words.get(name, 0) + held["words"]
        kinds = {source["name"]: source["modality"] for source in manifest["sources"]}
    except (KeyError, TypeError):
        return "Which sources it was trained on could not be read when this was written."
    rows = [(name, f"{words[name]:,} ({kinds.get(name, '')})") for name in sorted(words)]
    return _table(("source", "words of the training split"), rows)


def _validation(loaded: Loaded) -> Iterator[Row]:
    """The last of each validation metric up to the checkpoint's step."""
    last: dict[str, float] = {}
    try:
        for line in read_lines(loaded.run_directory / METRICS_FILE):
            if line.get(STEP_METRIC, 0) <= loaded.progress.step:
                last |= {n: v for n, v in line.items() if n.startswith("Validation/") and isinstance(v, int | float)}
    except ValueError:  # a damaged line; what stands before it is right
        pass
    yield from ((name, f"{value:.4f}", "", "") for name, value in sorted(last.items()))


def _evaluation(loaded: Loaded) -> Iterator[Row]:
    """What tools/evaluate.py has found of this checkpoint."""
    path = path_of(loaded.run_directory, loaded.progress.step)
    try:
        for score in json.loads(path.read_text(encoding="utf-8"))["scores"]:
            value, low, high, chance = (score[key] for key in ("value", "low", "high", "chance"))
            interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
            name = f"{score['task']}: {score['name']}"
            yield name, "" if value is None else f"{value:.4f}", interval, "" if chance is None else f"{chance:.4f}"
    except (OSError, ValueError, KeyError, TypeError):
        return


def _table(head: Row, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = ([cell.replace("|", "/") for cell in row] for row in (head, _RULE[: len(head)], *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Folders of runs with all that pictures are made of, of any size, as the trainer's board writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitmar.config import ModelConfig
from bitmar.head_names import KINDS, TITLES
from bitmar.observability.board import append
from bitmar.observability.head_analysis import HeadAnalysis, top_heads
from bitmar.observability.records import JsonlSink
from bitmar.observability.schema import Cadence, Layout, schema_of, select

CAPTION = ("<bos>", "a", " photo", " of", " one", " gold", "en", " horse", " beside", " a", " flag", ".", "<eos>")
SOURCES = ("bnc_spoken", "cc_3M", "childes", "gutenberg", "local_narr", "open_subtitles", "simple_wiki", "switchboard")
PICTURES = (
    *("losses", "throughput", "schedule", "gradients", "memory_usage", "memory_timeline", "memory_reads"),
    *("attention_distribution", "head_importance", "importance_timeline", "cross_modal", "weights", "flips", "latents"),
)


def head_pictures(step: int) -> tuple[str, ...]:
    """Of attention_analysis/, where the last analysis is of `step`."""
    maps, patterns = (tuple(f"{what}_{kind}" for kind in KINDS) for what in ("attention_heads", "head_patterns"))
    return tuple(f"{name}_step_{step}" for name in (*maps, "attention_timeline", *patterns))


@dataclass(frozen=True)
class Size:
    """Of what a run writes."""

    slots: int = 37
    logs: int = 6
    every: int = 10  # steps from one log to the next
    factor: float = 1.0  # of what is logged, importance and read mass
    layers: int = 3
    heads: int = 4
    vision_tokens: int = 4
    captions: int = 3
    sources: int = 2
    samples: int = 40
    top: int = 10  # heads of each kind

    @property
    def last(self) -> int:
        """The last step."""
        return self.every * self.logs

    @property
    def layout(self) -> Layout:
        model = ModelConfig(
            width=16 * self.heads,
            heads=self.heads,
            encoder_layers=self.layers,
            decoder_layers=self.layers,
            vision_tokens=self.vision_tokens,
        )
        return Layout(model, sources=SOURCES[: self.sources], matrices=matrices(self.layers))


def matrices(layers: int) -> tuple[str, ...]:
    parts = [f"attention.qkv.{i}" for i in range(3)] + [
        "attention.output",
        "feed_forward.gate_up.0",
        "feed_forward.down",
    ]
    text = {c: [f"{c}.blocks.{i}.{p}" for i in range(layers) for p in parts] for c in ("encoder", "decoder")}
    return (
        *(*text["encoder"], "encoder.latent", "vision.compress", "vision.expand"),
        *(f"vision.blocks.0.{p}" for p in parts),
        *("vision.latent", "fusion.layers.0.attention.query", "fusion.layers.0.attention.output"),
        *("memory.writer.write", "memory.writer.key", "memory.reader.query", *text["decoder"]),
    )


def write_run(folder: Path, size: Size = Size(), seed: int = 0, caption: tuple[str, ...] = CAPTION) -> Path:
    """A run of three phases in `folder`; the memory is written from the middle on. `caption`: of its pictures."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plots" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "attention_analysis").mkdir(exist_ok=True)
    keys = {"create_plots": True, "plot_losses": True}
    phases = [{"name": name} for name in ("text", "alignment", "memory")]
    (folder / "config.yaml").write_text(json.dumps({"wandb": keys, "phases": phases}), encoding="utf-8")
    write_metrics(folder, size, rng)
    write_memory(folder / "plots" / "data" / "memory.npys", size, rng)
    write_weights(folder / "plots" / "data" / "quantization.npys", size, rng)
    for log in range(1, size.logs + 1):
        write_heads(folder, size, size.every * log, rng, caption)
    write_captions(folder, size, rng, caption)
    write_latents(folder, size, rng)
    return folder


def write_metrics(folder: Path, size: Size, rng: np.random.Generator) -> None:
    """Every metric of the schema, falling and noisy."""
    sink = JsonlSink(folder)
    sink.event("start", step=0, data="generated")
    names = [m.name for m in select(schema_of(size.layout), Cadence.STEP, Cadence.ATTENTION) if not m.of]
    for log in range(1, size.logs + 1):
        share = log / size.logs
        values = dict(
            zip(names, (size.factor * np.exp(-2 * share) * rng.uniform(0.5, 1.5, len(names))).tolist(), strict=True)
        )
        sink.log(size.every * log, {**values, "Training/Phase": float(min(int(3 * share), 2))})
        if log % max(size.logs // 8, 1) == 0:
            loss = size.factor * 9 * np.exp(-share)
            sink.log(
                size.every * log,
                {"Validation/Loss": loss, "Validation/Loss_Shuffled_Vision": loss + size.factor * share},
            )
    sink.close()


def write_memory(path: Path, size: Size, rng: np.random.Generator) -> None:
    usage, half = np.zeros(size.slots), size.logs // 2
    for log in range(1, size.logs + 1):
        filled = int(size.slots * min(1.0, 0.9 * max(log - half, 0) / max(size.logs - half, 1)))
        written = np.arange(size.slots) < max(filled, int(log > half))
        usage = usage + size.factor * written * rng.gamma(0.5, 20.0, size.slots)
        ages = rng.integers(0, 9, size.slots) * written
        ids = rng.integers(1, 2**62, size.slots) * written
        append(
            path,
            {"step": np.array(size.every * log), "usage": usage, "age": ages, "written": written, "image_ids": ids},
        )


def write_weights(path: Path, size: Size, rng: np.random.Generator) -> None:
    names = np.array(matrices(size.layers))
    for log in range(1, size.logs + 1):
        full = np.full(len(names), 4096.0)
        zeros = np.round(full * rng.uniform(0.28, 0.34, len(names)))
        plus = np.round((full - zeros) * rng.uniform(0.48, 0.52, len(names)))
        scale = rng.uniform(0.02, 0.07, len(names))
        values = {"matrices": names, "size": full, "zeros": zeros, "plus": plus, "scale": scale}
        append(path, {"step": np.array(size.every * log), **values})


def write_heads(
    folder: Path, size: Size, step: int, rng: np.random.Generator, caption: tuple[str, ...] = CAPTION
) -> None:
    """And, at the last log, the patterns of the top heads in a caption."""
    arrays: dict[str, np.ndarray] = {}
    for kind, shape in size.layout.heads.items():
        arrays[f"{kind}_Importance"] = size.factor * rng.gamma(1.0, 0.004, shape)
        arrays[f"{kind}_Entropy"] = rng.uniform(1.0, 3.0, shape)
        arrays[f"{kind}_Concentration"] = rng.uniform(0.2, 0.5, shape)
        if kind in ("Encoder", "Decoder"):
            arrays[f"{kind}_Distance"] = rng.uniform(2.0, 8.0, shape)
            arrays[f"{kind}_First_Token"] = rng.uniform(0.0, 0.4, shape)
    top = {kind: top_heads(arrays[f"{name}_Importance"], size.top) for kind, name in TITLES.items()}
    words, keys = len(caption), {"cross_modal": size.vision_tokens, "memory": size.slots}
    patterns = {}
    for kind, heads in top.items() if step == size.last else ():
        weights = rng.dirichlet(np.full(keys.get(kind, words), 0.3), (len(heads), words)).astype(np.float32)
        patterns[kind] = weights if kind in keys else np.tril(weights)
    analysis = HeadAnalysis(arrays, top, patterns, np.arange(words))
    for name, values in analysis.files(step, caption.__getitem__):
        path = folder / "attention_analysis" / name
        if isinstance(values, np.ndarray):
            np.save(path, values)
        else:
            np.savez_compressed(path, **values)  # type: ignore[arg-type]


def write_captions(folder: Path, size: Size, rng: np.random.Generator, caption: tuple[str, ...] = CAPTION) -> None:
    """Captions of different lengths, padded to the longest."""
    longest = len(caption)
    words = np.array(
        [[*caption[: max(longest - i % 4, 1)], *[""] * min(i % 4, longest - 1)] for i in range(size.captions)]
    )
    weights = rng.dirichlet(np.ones(size.vision_tokens), words.shape).astype(np.float32)
    values = {"words": words, "tokens": (words != "").astype(np.int64), "weights": weights}
    np.savez_compressed(folder / "plots" / "data" / "cross_modal.npz", step=np.array(size.last), **values)


def write_latents(folder: Path, size: Size, rng: np.random.Generator) -> None:
    sources = rng.integers(0, size.sources, size.samples)
    centres = rng.normal(0.0, 2.0, (size.sources, 2))
    values = {"sources": sources, "names": np.array(SOURCES[: size.sources])}
    for key in ("text", "vision"):
        values[key] = centres[sources] + rng.normal(0.0, 0.6, (size.samples, 2))
        values[f"{key}_shares"] = np.array([0.41, 0.23])
    np.savez_compressed(folder / "plots" / "data" / "latents.npz", step=np.array(size.last), **values)

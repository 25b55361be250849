"""What the heads of a trained model attend to in a text, and pictures of it.

Shapes: T tokens, S keys (tokens, vision tokens or memory slots), H heads of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from bitmar.batch import Batch
from bitmar.config import ConfigError
from bitmar.head_names import KINDS
from bitmar.loading import Loaded, load_trained
from bitmar.observability import drawing as d
from bitmar.observability.attention_plots import word_labels
from shards.tokenizer import TextTokenizer, token_texts

BOS = 1
TEXT = "text"  # encoder and decoder, one after the other
CHOICES = (TEXT, *KINDS)
FIGURES = ("all_layers_heads", "avg_per_layer", "last_layer_detailed")
_LABELS, _NUMBERS = 28, 12  # tokens that get labels, and numbers in their cells
_KEYS = {"cross_modal": "vision token", "memory": "memory slot"}


@dataclass(frozen=True)
class Layer:
    kind: str
    number: int
    heads: tuple[int, ...]  # their numbers
    weights: Float[np.ndarray, "H T S"]

    @property
    def name(self) -> str:
        return f"{self.kind} L{self.number}"


@dataclass(frozen=True)
class Patterns:
    words: tuple[str, ...]  # of the T tokens, the first token included
    layers: tuple[Layer, ...]


@torch.no_grad()
def attention_of(loaded: Loaded, text: str, vector: Float[np.ndarray, "V"] | None = None) -> Patterns:
    """The attention of every head to a text, with an image's vector or without.

    Raises ConfigError for a text that is empty or longer than a row, or a vector of another width; DataError where the
    tokenizer cannot be read.
    """
    tokenizer, config = TextTokenizer(loaded.tokenizer), loaded.config
    tokens = [BOS, *tokenizer.encode_batch([text]).tokens.tolist()]
    if not 1 < len(tokens) <= config.data.row_tokens:
        raise ConfigError(f"the text has {len(tokens) - 1} tokens; 1 to {config.data.row_tokens - 1} would do")
    batch = Batch.of_text(torch.tensor([tokens]), config.model.vision_encoder_dim)
    if vector is not None:
        if vector.shape != (config.model.vision_encoder_dim,) or not np.isfinite(vector).all():
            raise ConfigError(
                f"the vector has shape {list(vector.shape)}; {config.model.vision_encoder_dim} finite numbers would do"
            )
        seen = torch.from_numpy(vector.astype(np.float32))[None]
        batch = batch.replace(vision=seen, has_vision=torch.ones(1, dtype=torch.bool))
    shown = loaded.model(batch, loaded.memory, heads=True).heads
    decode = token_texts(loaded.tokenizer.read_text(encoding="utf-8"))
    layers = [
        Layer(kind, number, heads.numbers, heads.weights[0].numpy())
        for kind in KINDS
        for number, heads in enumerate(shown[kind])
        if kind != "cross_modal" or vector is not None
    ]
    return Patterns(tuple(decode(token) for token in tokens), tuple(layers))


def visualize_attention(
    text: str,
    name: str,
    checkpoint: str | Path,
    vector: np.ndarray | None = None,
    attention_type: str = TEXT,
    out: str | Path = ".",
) -> list[Path]:
    """Draw NAME_attention_all_layers_heads.png, _avg_per_layer.png and _last_layer_detailed.png into `out`.

    `checkpoint`: a run's folder, a checkpoint, or an exported Hugging Face directory. Raises ConfigError,
    CheckpointError, DataError.
    """
    if not name or "/" in name:
        raise ConfigError(f"the name {name!r} must be the beginning of a file's name")
    if attention_type == "cross_modal" and vector is None:
        raise ConfigError("cross-modal attention is to an image: give its vector")
    loaded = load_trained(Path(checkpoint))
    patterns = attention_of(loaded, text, vector)
    chosen = ("encoder", "decoder") if attention_type == TEXT else (attention_type,)
    layers = [layer for layer in patterns.layers if layer.kind in chosen]
    about = d.About(loaded.config.run.name, loaded.progress.step)
    labels = word_labels(patterns.words)
    figures = (
        all_heads_figure(about, layers, loaded.config.model.heads),
        layers_figure(about, layers, labels),
        last_layer_figure(about, layers[-1], labels),
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_attention_{part}.png" for part in FIGURES]
    for figure, path in zip(figures, paths, strict=True):
        d.save(figure, path)
    return paths


@d.styled
def all_heads_figure(about: d.About, layers: Sequence[Layer], heads: int) -> Figure:
    """Every head, layers down, heads across; a pruned head's place is empty."""
    columns = heads if layers[0].kind != "memory" else 1
    figure = d.new_figure(about, f"Attention of every head: {_kinds(layers)}", 1.2 + len(layers) * _height(columns))
    axes = figure.subplots(len(layers), columns, squeeze=False)
    picture = None
    for row, layer in zip(axes, layers, strict=True):
        for number, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            if number in layer.heads:
                picture = _heat(axis, layer.weights[layer.heads.index(number)])
            else:
                axis.set_axis_off()
        row[0].set_ylabel(layer.name.replace("_", "-"), fontsize=8 if len(layers) > 12 else 10)
        row[0].set_axis_on()
    for number, axis in enumerate(axes[0]):
        axis.set_title(f"H{number}", fontsize=10, loc="center")
    if picture is not None:
        bar = figure.colorbar(picture, ax=axes, location="bottom", aspect=50, pad=0.01, fraction=0.02)
        bar.set_label(f"attention weight; down: token, across: {_KEYS.get(layers[-1].kind, 'token it attends to')}")
    return figure


def _height(columns: int) -> float:
    """Inches of a row of square panels."""
    return max(0.95 * (d.WIDTH_IN - 0.8) / max(columns, 4), 0.4)


@d.styled
def layers_figure(about: d.About, layers: Sequence[Layer], labels: Sequence[str]) -> Figure:
    """The mean over each layer's heads."""
    columns = min(len(layers), 2 if len(labels) > _NUMBERS else 3)
    rows = -(-len(layers) // columns)
    labelled = len(labels) <= _LABELS
    figure = d.new_figure(about, f"Attention, mean over heads: {_kinds(layers)}", 1.4 + rows * (8.2 / columns + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    picture = None
    for axis, layer in zip(axes.ravel(), layers, strict=False):
        picture = _heat(axis, layer.weights.mean(0))
        axis.set_title(layer.name.replace("_", "-"))
        _name_tokens(axis, layer, labels, labelled)
    for axis in axes.ravel()[len(layers) :]:
        axis.set_axis_off()
    if picture is not None:
        bar = figure.colorbar(picture, ax=axes, location="bottom", aspect=50, pad=0.01, fraction=0.02)
        bar.set_label("attention weight, mean over heads")
    return figure


@d.styled
def last_layer_figure(about: d.About, layer: Layer, labels: Sequence[str]) -> Figure:
    """Each head of one layer, with the numbers in the cells of short texts."""
    columns = min(len(layer.heads), 2)
    rows = -(-len(layer.heads) // columns)
    figure = d.new_figure(about, f"Attention of each head in {layer.name}", 1.4 + rows * (8.2 / columns + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, number, weights in zip(axes.ravel(), layer.heads, layer.weights, strict=False):
        picture = _heat(axis, weights)
        axis.set_title(f"H{number}")
        _name_tokens(axis, layer, labels, len(labels) <= _LABELS)
        if max(weights.shape) <= _NUMBERS:
            for (row, column), value in np.ndenumerate(weights):
                colour = "white" if value < 0.6 else "black"
                if layer.kind not in ("encoder", "decoder") or column <= row:
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    for axis in axes.ravel()[len(layer.heads) :]:
        axis.set_axis_off()
    bar = figure.colorbar(picture, ax=axes, location="bottom", aspect=50, pad=0.01, fraction=0.02)
    bar.set_label("attention weight")
    return figure


def _kinds(layers: Sequence[Layer]) -> str:
    return ", ".join(dict.fromkeys(layer.kind.replace("_", "-") for layer in layers))


def _heat(axis: Axes, weights: np.ndarray) -> AxesImage:
    return axis.imshow(weights, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")


def _name_tokens(axis: Axes, layer: Layer, labels: Sequence[str], labelled: bool) -> None:
    tokens, keys = layer.weights.shape[1:]
    if labelled:
        axis.set_yticks(range(tokens), labels, fontsize=8)
    else:
        axis.set_yticks(d.every(tokens, 12))
        axis.set_ylabel("token")
    if layer.kind in _KEYS:
        axis.set_xticks(d.every(keys, 12))
        axis.set_xlabel(_KEYS[layer.kind])
    elif labelled:
        axis.set_xticks(range(keys), labels, fontsize=8, rotation=90)
    else:
        axis.set_xticks(d.every(keys, 12))
        axis.set_xlabel("token it attends to")

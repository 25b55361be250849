"""What a model is made of: the recipe's section `model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmar.config_checks import ConfigError, not_negative, positive, require
from bitmar.head_names import HeadName, parse_head

MATRICES = ("query", "key", "value", "output")  # of an attention layer


@dataclass(frozen=True)
class PrunedLayer:
    """An attention layer from which tools/edit_heads.py has cut heads."""

    layer: str  # encoder.L2
    heads: tuple[int, ...]
    # by what the mean |W| of query, key, value and output is multiplied, to be that of the whole matrix when it was cut
    scales: tuple[float, ...]

    @property
    def names(self) -> tuple[HeadName, ...]:
        """Raises ValueError."""
        return tuple(parse_head(f"{self.layer}H{head}") for head in self.heads)


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 16_384
    width: int = 384  # D
    heads: int = 6
    ffn_width: int = 1024
    encoder_layers: int = 3
    decoder_layers: int = 3
    vision_layers: int = 1
    fusion_layers: int = 1
    vision_tokens: int = 4  # P
    vision_encoder_dim: int = 768  # width of the image vector
    vision_hidden_size: int = 384
    vision_latent_size: int = 384
    text_latent_size: int = 384
    vision_quantization: bool = True
    quantization: bool = True  # False: the same model without any rounding
    memory_size: int = 128  # K
    episode_dim: int = 384  # C
    memory_alpha: float = 0.3  # weight of the new episode where it blends into a slot
    memory_match: float = 0.5  # cosine above which an episode matches a slot of its image
    memory_addressing: Literal["attention", "larimar"] = "attention"
    memory_noise: float = 0.0  # standard deviation of the write noise (Larimar), keys of unit length
    writes_per_step: int = 4
    recall_group: int = 4  # consecutive rows that share one copy of the memory in the recall loss
    contrastive_group: int = 16  # consecutive rows of the global order that are each other's negatives
    dropout: float = 0.0
    rotary_base: float = 500_000.0
    text_encoder: str | None = None
    masked_heads: tuple[str, ...] = ()  # encoder.L2H3: their output is 0
    pruned_heads: tuple[PrunedLayer, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.text_encoder is None,
            f"model.text_encoder: {self.text_encoder!r} names pretrained weights, and BitMar trains from scratch: "
            "words seen in pretraining count against BabyLM's limit, and full-precision weights do not survive "
            "rounding to three values; remove the key",
        )
        positive(
            "model",
            self,
            *("vocab_size", "width", "heads", "ffn_width", "encoder_layers", "decoder_layers"),
            *("vision_layers", "fusion_layers", "vision_encoder_dim", "vision_hidden_size"),
            *("vision_latent_size", "text_latent_size", "memory_size", "episode_dim"),
            *("recall_group", "rotary_base"),
        )
        not_negative("model", self, "memory_noise", "writes_per_step")
        require(
            self.vision_tokens > 1,
            f"model.vision_tokens must be > 1, got {self.vision_tokens}: "
            "attention over a single key has weights of exactly 1 and learns nothing",
        )
        require(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0,
            f"model.width {self.width} must be an even multiple of model.heads {self.heads}",
        )
        require(
            self.text_latent_size == self.vision_latent_size,
            f"model.text_latent_size {self.text_latent_size} must equal model.vision_latent_size "
            f"{self.vision_latent_size}: the contrastive loss compares the two",
        )
        require(self.contrastive_group > 1, f"model.contrastive_group must be > 1, got {self.contrastive_group}")
        require(0 < self.memory_alpha <= 1, f"model.memory_alpha must lie in (0, 1], got {self.memory_alpha}")
        require(-1 <= self.memory_match <= 1, f"model.memory_match must lie in [-1, 1], got {self.memory_match}")
        require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1), got {self.dropout}")
        self._check_heads()

    def _check_heads(self) -> None:
        try:
            masked = tuple(map(parse_head, self.masked_heads))
            pruned = tuple(head for layer in self.pruned_heads for head in layer.names)
        except ValueError as error:
            raise ConfigError(f"model.masked_heads, model.pruned_heads: {error}") from None
        for head in (*masked, *pruned):
            self.require_head(head)
        both = set(masked) & set(pruned)
        require(not both, f"model.masked_heads: {', '.join(map(str, sorted(both)))} are pruned as well")
        require(
            all(head.kind != "memory" for head in pruned),
            "model.pruned_heads: memory attention has one head, without which there is no reading",
        )
        places = [layer.layer for layer in self.pruned_heads]
        require(len(set(places)) == len(places), f"model.pruned_heads names a layer twice: {places}")
        for layer in self.pruned_heads:
            require(len(set(layer.heads)) < self.heads, f"model.pruned_heads: {layer.layer} would have no head left")
            require(
                len(layer.scales) == len(MATRICES) and min(layer.scales) > 0,
                f"model.pruned_heads: {layer.layer} needs scales > 0 of {', '.join(MATRICES)}, got {layer.scales}",
            )

    def require_head(self, head: HeadName) -> None:
        """Raises ConfigError where the model has no such head."""
        layers, heads = self.attention_shape(head.kind)
        require(
            head.layer < layers and head.head < heads,
            f"there is no head {head}: {head.kind} attention has {layers} layers (L0 to L{layers - 1}) of {heads} "
            f"heads (H0 to H{heads - 1})",
        )

    def attention_shape(self, kind: str) -> tuple[int, int]:
        """(layers, heads a layer) of a kind of attention, pruned ones counted."""
        layers = {"encoder": self.encoder_layers, "decoder": self.decoder_layers, "cross_modal": self.fusion_layers}
        return (1, 1) if kind == "memory" else (layers[kind], self.heads)

    def pruned_from(self, kind: str, layer: int) -> PrunedLayer | None:
        """What was cut from a layer."""
        return next((found for found in self.pruned_heads if found.layer == f"{kind}.L{layer}"), None)

    def masked_in(self, kind: str, layer: int) -> tuple[int, ...]:
        """The masked heads of a layer."""
        heads = map(parse_head, self.masked_heads)
        return tuple(sorted({head.head for head in heads if head.place == f"{kind}.L{layer}"}))

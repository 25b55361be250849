"""BitMar for transformers: text encoder -> fusion with vision -> memory read -> decoder, and the language model.

Parameters have the trainer's names. Shapes: B rows, T text positions, S positions with those in the cache, P vision
tokens, V width of an image's vector, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_bitmar import BitMarConfig
from .layers_bitmar import BitLinear, Block, CrossAttention, Heads, MemoryReader, Positions, Precise, RMSNorm, Slots

TABLE_STD = 0.02  # of the embedding when training began; vectors are divided by it
OUTPUT_GAIN = 7.0  # logits are multiplied by OUTPUT_GAIN / (TABLE_STD * D)
# what outputs call the keys and values of earlier positions: `cache` since transformers 5.23 or so
CACHE = {"cache", "past_key_values"}.intersection(f.name for f in dataclasses.fields(CausalLMOutputWithPast)).pop()

VERY_NEGATIVE = -1e4  # what is added to scores where nobody may look is at most this
# keywords that transformers and its Trainer may pass, and that change nothing here
NEUTRAL = {"cache_position", "num_items_in_batch", "output_attentions", "token_type_ids"}

logger = logging.get_logger(__name__)


def who_may_look(mask: Tensor) -> Tensor:
    """bool, from 1 and 0, or from what is added to scores: 0 and very negative numbers. Raises ValueError.

    A mask of floats is of the second kind where it has negative numbers, or is [B, 1, T, S] without positive ones.
    """
    if not mask.is_floating_point() or not mask.numel():
        return mask > 0
    negative, positive = bool((mask < 0).any()), bool((mask > 0).any())
    if not negative and (positive or mask.ndim < 4):
        return mask > 0
    if not bool(((mask == 0) | (mask <= VERY_NEGATIVE)).all()):
        raise ValueError(
            "attention_mask holds numbers below 0 that say neither yes nor no: 1 and 0 would do, or, to be added to "
            f"scores, 0 and numbers up to {VERY_NEGATIVE:g}"
        )
    return mask == 0


def refuse_unknown(known: dict[str, Any]) -> None:
    """Raises TypeError for keywords that are none of a forward pass."""
    unknown = [name for name, value in known.items() if value is not None and name not in NEUTRAL]
    if unknown:
        raise TypeError(f"BitMar's forward knows no {', '.join(unknown)}")


class TextEncoder(nn.Module):
    """Causal blocks. The latent, of a caption as a whole, takes part in no prediction."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        made_of = config.bitmar
        self.blocks = nn.ModuleList(
            Block(config, f"encoder.L{layer}", made_of["quantization"], layer)
            for layer in range(made_of["encoder_layers"])
        )
        self.latent_norm = RMSNorm(made_of["width"])
        self.latent = BitLinear(made_of["width"], (made_of["text_latent_size"],), made_of["quantization"])


class VisionEncoder(nn.Module):
    """An image's vector becomes P tokens. A row without an image takes a learned vector, which its gate leaves out."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        made_of = config.bitmar
        quantized = made_of["quantization"] and made_of["vision_quantization"]
        inputs, hidden, width = made_of["vision_encoder_dim"], made_of["vision_hidden_size"], made_of["width"]
        self.tokens = made_of["vision_tokens"]
        self.null_vector = nn.Parameter(torch.zeros(inputs))
        self.input_norm = RMSNorm(inputs)
        self.compress = BitLinear(inputs, (hidden,), quantized)
        self.expand_norm = RMSNorm(hidden)
        self.expand = BitLinear(hidden, (self.tokens * width,), quantized)
        self.token_embedding = nn.Parameter(torch.zeros(self.tokens, width))
        self.blocks = nn.ModuleList(Block(config, None, quantized) for _ in range(made_of["vision_layers"]))
        self.norm = RMSNorm(width)
        self.latent = BitLinear(width, (made_of["vision_latent_size"],), quantized)

    def forward(self, vectors: Tensor, has_vision: Tensor) -> Tensor:
        """[B V], bool [B] -> [B P D]"""
        vectors = torch.where(has_vision[:, None], vectors.float(), self.null_vector.float())
        hidden = self.expand_norm(self.compress(self.input_norm(vectors)))
        tokens = self.expand(hidden).unflatten(-1, (self.tokens, -1)) + self.token_embedding.float()
        for block in self.blocks:
            tokens = block(tokens, None)
        return self.norm(tokens)


class FusionLayer(nn.Module):
    """x + tanh(gate) * cross_attention(norm(x), vision)"""

    def __init__(self, config: BitMarConfig, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size)
        self.attention = CrossAttention(config, Heads(config, f"cross_modal.L{layer}"))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, vision: Tensor, has_vision: Tensor) -> Tensor:
        gate = torch.tanh(self.gate.float()) * has_vision.float()[:, None, None]
        return x + gate * self.attention(self.norm(x), vision)


class Fusion(nn.Module):
    """The fusion layers; the temperature belongs to the contrastive loss."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, layer) for layer in range(config.bitmar["fusion_layers"]))
        self.log_temperature = nn.Parameter(torch.zeros(1))


class EpisodeWriter(nn.Module):
    """What wrote the memory in training; here only its weights are kept."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        made_of = config.bitmar
        joined, episode = made_of["text_latent_size"] + made_of["vision_latent_size"], made_of["episode_dim"]
        self.input_norm = RMSNorm(joined)
        self.write = BitLinear(joined, (episode,), made_of["quantization"])
        self.value_norm = RMSNorm(episode)
        self.key = BitLinear(episode, (episode,), made_of["quantization"])


class TextDecoder(nn.Module):
    """Causal blocks and the last norm."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__()
        made_of = config.bitmar
        self.blocks = nn.ModuleList(
            Block(config, f"decoder.L{layer}", made_of["quantization"], made_of["encoder_layers"] + layer)
            for layer in range(made_of["decoder_layers"])
        )
        self.norm = RMSNorm(made_of["width"])


class BitMarPreTrainedModel(PreTrainedModel):
    config_class = BitMarConfig
    base_model_prefix = ""  # the language model has the same parameters as the model: its head is the embedding
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        """Of parameters that no file gives."""
        if isinstance(module, BitLinear):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=TABLE_STD)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Slots):
            for buffer in module.buffers():
                nn.init.zeros_(buffer)
        else:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=TABLE_STD)


class BitMarModel(BitMarPreTrainedModel):
    """Hidden states. Text alone, or with vision_vectors [B, V], or with pixel_values [B, 3, height, width]."""

    def __init__(self, config: BitMarConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = TextEncoder(config)
        self.vision = VisionEncoder(config)
        self.fusion = Fusion(config)
        self.memory = nn.ModuleDict({"writer": EpisodeWriter(config), "reader": MemoryReader(config)})
        self.decoder = TextDecoder(config)
        self.slots = Slots(config.bitmar["memory_size"], config.bitmar["episode_dim"])
        self.reads_memory = not config.masked_in("memory.L0")
        self.image_model: list[nn.Module] = []  # in a list, so that it is none of this model's parameters
        for module in self.modules():
            if isinstance(module, Precise):
                module.inference_dtype = getattr(torch, config.inference_dtype)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @torch.no_grad()
    def image_vectors(self, pixel_values: Tensor) -> Tensor:
        """[B 3 height width] -> [B V], by the config's vision_model, which is loaded when it is first needed."""
        name = self.config.vision_model
        if name is None:
            raise ValueError("the config names no vision_model for pixel_values: name one, or give vision_vectors")
        if not self.image_model:
            self.image_model.append(AutoModel.from_pretrained(name).eval())
        model = self.image_model[0].to(self.device)
        return getattr(model(pixel_values.to(self.device, torch.float32)), self.config.vision_feature).float()

    def vision_tokens(self, rows: int, vectors: Tensor, has_vision: Tensor) -> Tensor:
        """[B P D]. Raises ValueError where vectors do not fit the model or the rows."""
        width = self.config.bitmar["vision_encoder_dim"]
        if tuple(vectors.shape) != (rows, width):
            raise ValueError(f"images' vectors have shape {list(vectors.shape)}; {[rows, width]} would do")
        if tuple(has_vision.shape) != (rows,):
            raise ValueError(f"has_vision has shape {list(has_vision.shape)}; {[rows]} would do")
        return self.vision(vectors.to(self.device), has_vision)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_vectors: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_vision: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """attention_mask: 1 where a token counts, [B, S]; or who may look at whom, [B, T, S] or [B, 1, T, S], also
        as what is added to scores (0, or the least float).

        has_vision: bool [B], which rows have an image (default: all, where images are given). vision_tokens: what
        `vision_tokens()` gave, instead of images. inputs_embeds: rows of the embedding's table. past_key_values or
        cache: of the positions before, by the version of transformers.
        """
        refuse_unknown(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = (self.embedding(input_ids) if inputs_embeds is None else inputs_embeds).float() * (1 / TABLE_STD)
        rows, length = x.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = self._positions(rows, length, past, attention_mask, position_ids)
        tokens, seen = self._see(rows, vision_vectors, pixel_values, has_vision, vision_tokens)

        states = [x]
        for block in self.encoder.blocks:
            x = block(x, positions, cache)
            states.append(x)
        for layer in self.fusion.layers if tokens is not None else ():
            x = layer(x, tokens, seen)
        if self.config.use_memory and self.reads_memory:
            x = self.memory["reader"](x, self.slots)
        for block in self.decoder.blocks:
            x = block(x, positions, cache)
            states.append(x)
        x = states[-1] = self.decoder.norm(x)

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(states) if wanted else None,
            **{CACHE: cache if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output

    def _see(
        self, rows: int, vectors: Tensor | None, pixels: Tensor | None, seen: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """(vision tokens, None where there is no image at all; bool [B], which rows have one)."""
        if pixels is not None:
            if vectors is not None:
                raise ValueError("give either vision_vectors or pixel_values")
            vectors = self.image_vectors(pixels)
        has_vision = torch.ones(rows, dtype=torch.bool, device=self.device)
        if seen is not None:
            has_vision = seen.to(self.device, torch.bool)
        if tokens is None and vectors is not None:
            tokens = self.vision_tokens(rows, vectors, has_vision)
        return tokens, has_vision

    def _positions(
        self, rows: int, length: int, past: int, mask: Tensor | None, position_ids: Tensor | None
    ) -> Positions:
        """Angles of the new positions and whom each may look at. A position may always look at itself."""
        places = torch.arange(past + length, device=self.device)
        numbers, allowed = places[None, past:], None
        if mask is not None:
            if mask.shape[-1] != past + length:
                raise ValueError(f"attention_mask covers {mask.shape[-1]} positions; {past + length} would do")
            mask = who_may_look(mask.to(self.device))
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
            numbers = (mask[:, 0].any(-2).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            mask = None if mask.shape[-2] == 1 and bool(mask.all()) else mask
        if position_ids is not None:
            numbers = position_ids.to(self.device)
        if past or mask is not None:
            causal = places <= places[past:, None]
            allowed = causal[None, None] if mask is None else (mask & causal) | (places == places[past:, None])
        most = self.config.max_position_embeddings
        if past + length > most:
            logger.warning_once(f"a row of {past + length} tokens: the model was trained on rows of at most {most}")
        made_of = self.config.bitmar
        return Positions.of(numbers, allowed, made_of["width"] // made_of["heads"], made_of["rotary_base"])


class BitMarForCausalLM(BitMarModel, GenerationMixin):
    """Logits of the next token, at every position; the head is the embedding's table."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        vision_vectors: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_vision: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As BitMarModel's. labels: token ids [B, T], -100 where none; the loss is the mean over those that follow a
        position. logits_to_keep: of the last so many positions, 0 for all, or which ones."""
        found: Any = super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            vision_vectors,
            pixel_values,
            has_vision,
            vision_tokens,
            use_cache,
            output_hidden_states,
            cache=cache,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = found.last_hidden_state[:, kept] * (OUTPUT_GAIN / (TABLE_STD * self.config.hidden_size))
        table: Any = self.embedding.weight
        logits = F.linear(hidden, table.float())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=found.hidden_states, **{CACHE: found.get(CACHE)}
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: Tensor | None = None, *arguments: Any, **known: Any) -> Any:
        """GenerationMixin's; images are looked at once, not at every token."""
        pixels, vectors = known.pop("pixel_values", None), known.pop("vision_vectors", None)
        if pixels is not None:
            if vectors is not None:
                raise ValueError("give either vision_vectors or pixel_values")
            vectors = self.image_vectors(pixels)
        if vectors is not None:
            prompts = (inputs, known.get("input_ids"), known.get("inputs_embeds"))
            rows = next((len(prompt) for prompt in prompts if prompt is not None), len(vectors))
            seen = known.get("has_vision")
            seen = torch.ones(rows, dtype=torch.bool) if seen is None else seen
            known["has_vision"] = seen.to(self.device, torch.bool)
            with torch.no_grad():
                known["vision_tokens"] = self.vision_tokens(rows, vectors, known["has_vision"])
        return GenerationMixin.generate(self, inputs, *arguments, **known)  # type: ignore[arg-type]


BitMarModel.register_for_auto_class("AutoModel")
BitMarForCausalLM.register_for_auto_class("AutoModelForCausalLM")

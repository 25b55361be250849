"""Configuration of an exported BitMar model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# of the section `bitmar`, the model as it was trained
DEFAULTS: dict[str, Any] = {
    "vocab_size": 16_384,
    "width": 384,
    "heads": 6,
    "ffn_width": 1024,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "vision_layers": 1,
    "fusion_layers": 1,
    "vision_tokens": 4,
    "vision_encoder_dim": 768,
    "vision_hidden_size": 384,
    "vision_latent_size": 384,
    "text_latent_size": 384,
    "vision_quantization": True,
    "quantization": True,
    "memory_size": 128,
    "episode_dim": 384,
    "memory_addressing": "attention",
    "dropout": 0.0,
    "rotary_base": 500_000.0,
    "masked_heads": [],  # encoder.L2H3: their output is 0
    "pruned_heads": [],  # {"layer": "encoder.L2", "heads": [1], "scales": [query, key, value, output]}
}


class BitMarConfig(PretrainedConfig):
    """`bitmar` says what the model is made of; the names that transformers knows follow from it.

    use_memory: whether the decoder reads the episodic memory. vision_model: the name or folder of the DINOv2 that turns
    pixel_values into vectors, loaded only when images come. vision_feature: which of its outputs is the vector;
    pooler_output is DINOv2's CLS token behind the last norm. inference_dtype: in which attention and the memory's read
    are computed at inference; float32 gives the trainer's numbers to the bit, float64 the same with a cache, in a batch
    or padded as without (on MPS, which has no float64, float32 in any case). run_name, step, words: where the weights
    come from.
    """

    model_type = "bitmar"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, transformers' own way

    def __init__(
        self,
        bitmar: dict[str, Any] | None = None,
        max_position_embeddings: int = 256,
        use_memory: bool = True,
        vision_model: str | None = "facebook/dinov2-base",
        vision_feature: str = "pooler_output",
        inference_dtype: str = "float64",
        run_name: str = "",
        step: int = 0,
        words: int = 0,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        **kwargs: Any,
    ) -> None:
        self.bitmar = DEFAULTS | (bitmar or {})
        self.vocab_size = self.bitmar["vocab_size"]
        self.hidden_size = self.bitmar["width"]
        self.intermediate_size = self.bitmar["ffn_width"]
        self.num_attention_heads = self.bitmar["heads"]
        self.num_hidden_layers = self.bitmar["encoder_layers"] + self.bitmar["decoder_layers"]
        self.max_position_embeddings = max_position_embeddings
        self.use_memory = use_memory
        self.vision_model = vision_model
        self.vision_feature = vision_feature
        if inference_dtype not in ("float32", "float64"):
            raise ValueError(f"inference_dtype must be float32 or float64, got {inference_dtype!r}")
        self.inference_dtype = inference_dtype
        self.run_name, self.step, self.words = run_name, step, words
        self.use_cache = use_cache
        for derived in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
            kwargs.pop(derived, None)  # written for other readers; `bitmar` owns them
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        kwargs.setdefault("tie_word_embeddings", False)  # the table is tied inside the model
        super().__init__(**kwargs)

    def pruned_from(self, layer: str) -> dict[str, Any] | None:
        """What was cut from a layer, named as encoder.L2."""
        return next((cut for cut in self.bitmar["pruned_heads"] if cut["layer"] == layer), None)

    def masked_in(self, layer: str) -> list[int]:
        """The masked heads of a layer."""
        named = (head.rpartition("H") for head in self.bitmar["masked_heads"])
        return sorted({int(number) for place, _, number in named if place == layer})


BitMarConfig.register_for_auto_class()  # so that save_pretrained copies this code

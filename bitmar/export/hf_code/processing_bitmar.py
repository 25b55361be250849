"""Texts and images as BitMar takes them. Text alone needs no package for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding, ProcessorMixin


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 [height, width, channels] or [height, width], from floats in [0, 1] or whole numbers up to 255.

    Raises ValueError.
    """
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[-1] in (3, 4)):
        raise ValueError(f"an image has shape {list(image.shape)}; [height, width, 3] would do")
    most = {"f": 1, "u": 255, "i": 255}.get(image.dtype.kind)
    if most is None or not ((image >= 0) & (image <= most)).all():
        raise ValueError(
            f"an image of {image.dtype} holds what is no colour: whole numbers in 0 to 255 or floats in [0, 1] would do"
        )
    return (image * (255 / most)).round().astype(np.uint8)


class BitMarProcessor(ProcessorMixin):
    """Texts through the tokenizer, images as DINOv2 was trained to see them.

    An image's shorter side becomes `shortest_edge` pixels (bicubic), the middle `crop_size` x `crop_size` is cut out,
    and each channel is normalised by mean and standard deviation.
    """

    attributes = ["tokenizer"]  # noqa: RUF012, transformers' own way
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        shortest_edge: int = 256,
        crop_size: int = 224,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **known: Any,
    ) -> None:
        self.shortest_edge, self.crop_size = shortest_edge, crop_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        super().__init__(tokenizer, **known)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        vision_vectors: Any = None,
        return_tensors: str | None = None,
        **known: Any,
    ) -> BatchEncoding:
        """What the tokenizer gives, and pixel_values fp32 [N, 3, crop, crop] or vision_vectors fp32 [N, V].

        images: one or a list, PIL images or arrays [height, width, 3] of bytes or of floats in [0, 1]. vision_vectors:
        [V] or [N, V].
        """
        if text is None:
            found = BatchEncoding({})
        else:
            found = self.tokenizer(text, return_tensors=return_tensors, **known)
        arrays: dict[str, np.ndarray] = {}
        if images is not None:
            several = list(images) if isinstance(images, list | tuple) else [images]
            arrays["pixel_values"] = np.stack([self.pixels(image) for image in several])
        if vision_vectors is not None:
            arrays["vision_vectors"] = np.atleast_2d(np.asarray(vision_vectors, np.float32))
        return BatchEncoding(dict(found) | dict(BatchEncoding(arrays, tensor_type=return_tensors)), found.encodings)

    def pixels(self, image: Any) -> np.ndarray:
        """fp32 [3, crop, crop]. Raises ValueError for an array that is no image."""
        try:  # transformers asks for a package that is imported elsewhere, even where only text comes
            from PIL import Image
        except ImportError:
            raise ImportError("images need the package pillow; vision_vectors need none") from None
        if not isinstance(image, Image.Image) or image.mode[0] in "FI":  # modes of floats and of 16 or 32 bits
            image = Image.fromarray(to_bytes(np.asarray(image)))
        image = image.convert("RGB")
        width, height = image.size
        short, crop = min(width, height), self.crop_size
        longer = int(self.shortest_edge * max(width, height) / short)
        size = (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
        top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
        middle = pixels[top : top + crop, left : left + crop]
        normalised = (middle - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return normalised.transpose(2, 0, 1).astype(np.float32)

    def batch_decode(self, *arguments: Any, **known: Any) -> Any:
        return self.tokenizer.batch_decode(*arguments, **known)

    def decode(self, *arguments: Any, **known: Any) -> Any:
        return self.tokenizer.decode(*arguments, **known)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "vision_vectors"]


BitMarProcessor.register_for_auto_class("AutoProcessor")

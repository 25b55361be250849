"""The JSONL files of choice tasks: one JSON object a line, checked when read.

    minimal pairs   {"sentence_good": "...", "sentence_bad": "...", "UID": "anaphor_number_agreement"}   (BLiMP's own)
    distractors     {"image": IMAGE, "candidates": ["...", ...], "answer": 0}
    VQA             {"image": IMAGE, "question": "...", "candidates": ["...", ...], "answer": 0}
    Winoground      {"image_0": IMAGE, "image_1": IMAGE, "caption_0": "...", "caption_1": "..."}

IMAGE is {"file": "vectors.npy", "row": 12}: a row of an array [N, V] of floats, or without "row" an array [V]; the
file is looked for from the folder of the JSONL on. Other keys are left alone. A line that is none of these is a
DataError that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bitmar.evaluation.likelihood import Candidate, Choice, Image, candidate
from shards.record import DataError, image_id
from shards.tokenizer import TextTokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """Turns lines into items for one model: its tokenizer, width of vectors, positions of a row."""

    tokenizer: TextTokenizer
    width: int
    limit: int

    def minimal_pairs(self, path: Path) -> list[tuple[str, Choice]]:
        """(paradigm, good and bad sentence) of each line; the paradigm is "" where a line has no UID."""
        return list(_lines(path, self._minimal_pair))

    def distractors(self, path: Path) -> list[Choice]:
        """Whole captions, the end token too, with their image."""
        return list(_lines(path, lambda line, images: self._choice(line, images, question=False)))

    def vqa(self, path: Path) -> list[Choice]:
        """Answers behind a question, with its image."""
        return list(_lines(path, lambda line, images: self._choice(line, images, question=True)))

    def winoground(self, path: Path) -> list[tuple[Candidate, ...]]:
        """(caption 0 with image 0, caption 1 with image 0, caption 0 with image 1, caption 1 with image 1)."""
        return list(_lines(path, self._winoground))

    def _minimal_pair(self, line: dict[str, Any], _: _Images) -> tuple[str, Choice]:
        sentences = [_text(line, name) for name in ("sentence_good", "sentence_bad")]
        uid = line.get("UID", "")
        if not isinstance(uid, str):
            raise DataError(f"UID must be a text, got {uid!r}")
        return uid, Choice(tuple(self._candidate(text) for text in sentences), 0)

    def _choice(self, line: dict[str, Any], images: _Images, question: bool) -> Choice:
        image = images.of(line, "image", self.width)
        context = _text(line, "question") if question else ""
        texts = line.get("candidates")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError("candidates must be a list of two texts at least, none of them empty")
        answer = line.get("answer")
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise DataError(f"answer must be a number from 0 to {len(texts) - 1}, got {answer!r}")
        made = (self._candidate(text, context, image, ends=not question) for text in texts)
        return Choice(tuple(made), answer)

    def _winoground(self, line: dict[str, Any], images: _Images) -> tuple[Candidate, ...]:
        seen = [images.of(line, name, self.width) for name in ("image_0", "image_1")]
        texts = [_text(line, name) for name in ("caption_0", "caption_1")]
        return tuple(self._candidate(text, image=image, ends=True) for image in seen for text in texts)

    def _candidate(self, text: str, context: str = "", image: Image | None = None, ends: bool = False) -> Candidate:
        made = candidate(self.tokenizer, text, context, image, ends)
        if made.positions > self.limit:
            raise DataError(f"{made.positions} tokens, of which data.row_tokens allows {self.limit}: {text[:40]!r}")
        return made


def _lines(path: Path, make: Callable[[dict[str, Any], _Images], T]) -> Iterator[T]:
    """What is made of each line. Raises DataError, with the line's number, and where there is none."""
    images, count = _Images(path.parent), 0
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        count += 1
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise DataError("not a JSON object")
            yield make(values, images)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
    if not count:
        raise DataError(f"{path} holds no line")


def _text(line: dict[str, Any], name: str) -> str:
    text = line.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{name} must be a text that is not empty, got {text!r}")
    return text


class _Images:
    """Vectors of .npy files, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, np.ndarray] = {}

    def of(self, line: dict[str, Any], name: str, width: int) -> Image:
        place = line.get(name)
        if not isinstance(place, dict) or not isinstance(place.get("file"), str):
            raise DataError(f'{name} must be {{"file": "x.npy", "row": 0}}, got {place!r}')
        array, row = self._open(place["file"]), place.get("row")
        if array.shape[-1:] != (width,):
            raise DataError(f"{name}: {place['file']} has shape {list(array.shape)}; vectors of {width} would do")
        if array.ndim == 2:
            if type(row) is not int or not 0 <= row < len(array):
                raise DataError(f"{name}: row must be a number from 0 to {len(array) - 1}, got {row!r}")
            array = array[row]
        elif row is not None:
            raise DataError(f"{name}: {place['file']} is one vector; leave row out")
        vector = array.astype(np.float32)
        if vector.ndim != 1 or not np.isfinite(vector).all():
            raise DataError(f"{name}: {place['file']}, row {row}, is no vector of finite numbers")
        return Image(vector, image_id(vector))

    def _open(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            try:
                array = np.load(self._folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"vectors {name} cannot be read: {error}") from None
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                raise DataError(f"vectors {name} are no array of floats")
            self._arrays[name] = array
        return self._arrays[name]

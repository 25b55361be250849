"""JSONL files of choice tasks: what is read, and that a line which is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitmar.evaluation.items import Reader
from shards.record import DataError, image_id
from shards.tokenizer import EOS, TextTokenizer, train_tokenizer

WIDTH = 6
IMAGE = {"file": "v.npy", "row": 1}
CHOICE = {"image": IMAGE, "question": "what is it ?", "candidates": ["a dog", "a cat"], "answer": 1}
PAIR = {"image_0": IMAGE, "image_1": {"file": "one.npy"}, "caption_0": "a dog", "caption_1": "a cat"}


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(["a dog and a cat", "what is it ?"] * 3, 300), encoding="utf-8")
    np.save(tmp_path / "v.npy", np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH))
    np.save(tmp_path / "one.npy", np.ones(WIDTH, np.float16))
    np.save(tmp_path / "wide.npy", np.ones((2, WIDTH + 1), np.float32))
    np.save(tmp_path / "whole.npy", np.ones((2, WIDTH), np.int64))
    np.save(tmp_path / "nan.npy", np.full((2, WIDTH), np.nan, np.float32))
    return Reader(TextTokenizer(path), WIDTH, 24)


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "items.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_vqa(reader: Reader, tmp_path: Path) -> None:
    (item,) = reader.vqa(write(tmp_path, "", CHOICE))
    first, second = item.candidates
    decode = reader.tokenizer.decode
    assert (decode(first.context), decode(first.continuation)) == ("what is it ?", " a dog")
    assert decode(second.continuation) == " a cat"
    assert (item.answer, first.bytes, item.chance) == (1, 5, 0.5), "the space is not the answer's"
    assert first.image is not None
    np.testing.assert_array_equal(first.image.vector, np.arange(WIDTH, 2 * WIDTH))
    assert first.image.id == image_id(first.image.vector)


def test_distractors_minimal_pairs_and_winoground(reader: Reader, tmp_path: Path) -> None:
    (item,) = reader.distractors(write(tmp_path, CHOICE))
    decode = reader.tokenizer.decode
    assert item.candidates[0].context == ()
    assert item.candidates[0].continuation[-1] == EOS
    assert decode(item.candidates[0].continuation[:-1]) == "a dog"
    good = {"sentence_good": "a dog", "sentence_bad": "dog a", "UID": "order"}
    plain = {"sentence_good": "a cat", "sentence_bad": "cat a"}
    pairs = reader.minimal_pairs(write(tmp_path, good, plain))
    assert [uid for uid, _ in pairs] == ["order", ""]
    assert [decode(c.continuation) for c in pairs[0][1].candidates] == ["a dog", "dog a"]
    assert pairs[0][1].answer == 0
    ((a, b, c, d),) = reader.winoground(write(tmp_path, PAIR))
    assert [decode(x.continuation[:-1]) for x in (a, b, c, d)] == ["a dog", "a cat"] * 2
    assert a.image is b.image
    assert c.image is d.image
    assert c.image is not None
    np.testing.assert_array_equal(c.image.vector, np.ones(WIDTH))


BAD_CHOICES: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    (CHOICE | {"answer": 2}, "answer must be a number from 0 to 1, got 2"),
    (CHOICE | {"answer": True}, "answer must be"),
    (CHOICE | {"candidates": ["a dog"]}, "candidates must be a list of two"),
    (CHOICE | {"candidates": ["a dog", " "]}, "none of them empty"),
    (CHOICE | {"question": ""}, "question must be a text"),
    (CHOICE | {"image": "v.npy"}, 'image must be {"file"'),
    (CHOICE | {"image": {"file": "none.npy", "row": 0}}, "none.npy cannot be read"),
    (CHOICE | {"image": {"file": "v.npy", "row": 2}}, "row must be a number from 0 to 1, got 2"),
    (CHOICE | {"image": {"file": "v.npy"}}, "row must be a number"),
    (CHOICE | {"image": {"file": "one.npy", "row": 0}}, "leave row out"),
    (CHOICE | {"image": {"file": "wide.npy", "row": 0}}, "vectors of 6 would do"),
    (CHOICE | {"image": {"file": "whole.npy", "row": 0}}, "no array of floats"),
    (CHOICE | {"image": {"file": "nan.npy", "row": 0}}, "no vector of finite numbers"),
    (CHOICE | {"candidates": ["a dog", "a dog " * 30]}, "data.row_tokens allows 24"),
]


@pytest.mark.parametrize(("line", "words"), BAD_CHOICES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_line_is_named(reader: Reader, tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path, CHOICE, line)
    with pytest.raises(DataError) as told:
        reader.vqa(path)
    assert str(told.value).startswith(f"{path}:2: ")
    assert words in str(told.value)


def test_other_bad_files(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=":1: sentence_bad must be a text"):
        reader.minimal_pairs(write(tmp_path, {"sentence_good": "a"}))
    with pytest.raises(DataError, match=":1: UID must be a text"):
        reader.minimal_pairs(write(tmp_path, {"sentence_good": "a", "sentence_bad": "b", "UID": 3}))
    with pytest.raises(DataError, match=":1: image_1 must be"):
        reader.winoground(write(tmp_path, {k: v for k, v in PAIR.items() if k != "image_1"}))
    with pytest.raises(DataError, match="holds no line"):
        reader.vqa(write(tmp_path, ""))
    with pytest.raises(DataError, match="No such file"):
        reader.vqa(tmp_path / "none.jsonl")
    (tmp_path / "odd.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        reader.vqa(tmp_path / "odd.jsonl")

"""The tokenizer: determinism, round trip, word starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import memo
from shards.memo import fits
from shards.raw import open_raw
from shards.record import DataError
from shards.tokenizer import TextTokenizer, default_vocab_size, train_tokenizer
from tests.support.data import REAL
from tests.unit.shards.making import captions_of
from tools.make_demo_data import make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(captions_of(200), 512), encoding="utf-8")
    return TextTokenizer(path)


def test_training_is_deterministic_and_the_hash_is_the_file_s(tokenizer: TextTokenizer) -> None:
    again = train_tokenizer(captions_of(200), 512)
    assert tokenizer.sha256 == hashlib.sha256(again.encode()).hexdigest()
    assert 259 < tokenizer.vocab_size <= 512


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_any_text_round_trips_and_its_words_are_counted(tokenizer: TextTokenizer, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    encoded = tokenizer.encode_batch(texts)
    for number, text in enumerate(texts):
        here = slice(*encoded.offsets[number : number + 2])
        assert tokenizer.decode(encoded.tokens[here].tolist()) == text
        assert encoded.word_starts[here].sum() == len(text.split())
        assert encoded.tokens[here].size == 0 or encoded.tokens[here].min() > 2


def test_word_starts_lie_in_the_token_of_the_first_character(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode_batch(["zq  xw"])
    pieces = [tokenizer.decode([token]) for token in encoded.tokens.tolist()]
    assert "".join(pieces) == "zq  xw"
    at = [number for number, count in enumerate(encoded.word_starts.tolist()) if count]
    assert pieces[at[0]].startswith("z")
    assert "x" in pieces[at[1]]


def test_literal_specials_are_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode_batch(["<eos><pad>"]).tokens.min() > 2


@pytest.mark.parametrize(("words", "size"), [(0, 512), (4096, 512), (8192, 1024), (16383, 1024), (10**8, 16384)])
def test_default_vocab_size(words: int, size: int) -> None:
    assert default_vocab_size(words) == size


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vocab-size 100 is too small"):
        train_tokenizer(["a"], 100)
    with pytest.raises(DataError, match="No such file"):
        TextTokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="not a Hugging Face"):
        TextTokenizer(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a Hugging Face"):
        TextTokenizer(tmp_path / "bad.json")
    swapped = train_tokenizer(captions_of(9), 512).replace("<bos>", "<s>")
    (tmp_path / "other.json").write_text(swapped)
    with pytest.raises(DataError, match="<bos> is None"):
        TextTokenizer(tmp_path / "other.json")


def check_against_the_library(tokenizer: TextTokenizer, texts: list[str]) -> None:
    encoded, plain = tokenizer.encode_batch(texts), tokenizer._by_library(texts)
    assert encoded.offsets.tolist() == plain.offsets.tolist()
    assert encoded.tokens.tolist() == plain.tokens.tolist()
    assert encoded.word_starts.tolist() == plain.word_starts.tolist()
    assert (encoded.tokens.dtype, encoded.word_starts.dtype) == (plain.tokens.dtype, plain.word_starts.dtype)


WORDS = ["the", "'s", "'ll", "'", "42nd", "!?", "<eos>", "é", "日本", "e\u0301", "🙂", "\u017f", "x" * 70, "\0", ""]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\v", "\x1c", "\x85", "\xa0", "\u180e", "\u200b", "\u2003", "\u2028"]
PIECES = st.one_of(st.sampled_from(WORDS), st.sampled_from(SPACES), st.just(" "))


@settings(max_examples=400)
@given(st.lists(st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=30)), max_size=8))
def test_what_is_looked_up_equals_the_library(tokenizer: TextTokenizer, texts: list[str]) -> None:
    check_against_the_library(tokenizer, [text.encode("utf-8", "ignore").decode() for text in texts])


def test_any_space_between_any_words_is_looked_up_as_the_library_splits_it(tokenizer: TextTokenizer) -> None:
    parts = itertools.product(WORDS, ["", *SPACES], ["", *SPACES], WORDS)
    check_against_the_library(tokenizer, ["".join(part) for part in parts])


def test_every_kind_of_character_is_looked_up_as_the_library_splits_it(tokenizer: TextTokenizer) -> None:
    """Beside letters, digits, signs and blanks, in the first 12,544 characters and a sample of the others."""
    points = [*range(0x3100), *range(0x3100, 0x110000, 97)]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    check_against_the_library(tokenizer, [f"{c}a {c} b{c} 7{c}! 's{c}" for c in characters])


def test_real_texts_are_looked_up_as_the_library_splits_them(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Generated ones where ../shared/data is absent."""
    raw = REAL if REAL.is_dir() else tmp_path / "raw"
    if raw != REAL:
        make(raw, seed=0, images=300, words=20_000)
    captions = [str(caption) for pairs in open_raw(raw).pairs for caption in pairs.records()]
    check_against_the_library(tokenizer, captions)
    with zipfile.ZipFile(raw / "train_50M.zip") as archive:
        for name in archive.namelist():
            if name.endswith("/"):
                continue
            lines = archive.read(name).decode("utf-8")[:300_000].split("\n")
            check_against_the_library(tokenizer, ["\n".join(lines[at : at + 20]) for at in range(0, len(lines), 20)])


def test_a_full_memory_is_emptied(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "LIMIT", 20)
    for number in range(20):
        check_against_the_library(tokenizer, [f"w{number} x{number}", "the cat", f"y{number}\tz  z"])
    assert tokenizer._memo is not None
    assert len(tokenizer._memo._numbers) < 30


def test_only_a_plain_byte_level_bpe_is_looked_up() -> None:
    described = json.loads(train_tokenizer(captions_of(50), 300))
    assert fits(json.dumps(described))
    changes = (
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", described["pre_tokenizer"] | {"add_prefix_space": True}),
        ("model", described["model"] | {"dropout": 0.1}),
        ("added_tokens", [{"content": "dog", "special": False}]),
    )
    for name, value in changes:
        assert not fits(json.dumps(described | {name: value})), name

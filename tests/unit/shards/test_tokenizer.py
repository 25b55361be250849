"""The tokenizer: determinism, round trip, word starts."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.memo import fits
from shards.record import DataError
from shards.tokenizer import TextTokenizer, default_vocab_size, train_tokenizer
from tests.unit.shards.making import captions_of


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


PIECES = st.sampled_from(
    [
        "the",
        " cat",
        "'s",
        "'ll",
        "'",
        "  ",
        " ",
        "\n",
        "\t",
        "\r\n",
        "7",
        "42nd",
        "!?",
        "<eos>",
        "é",
        "日本",
        "\x1c",
        "\u2003",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=30)), min_size=1, max_size=8))
def test_what_is_looked_up_equals_the_library(tokenizer: TextTokenizer, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    encoded = tokenizer.encode_batch(texts)
    library = [e.ids for e in tokenizer.inner.encode_batch(texts, add_special_tokens=False)]
    found = [encoded.tokens[a:b].tolist() for a, b in pairwise(encoded.offsets.tolist())]
    assert found == library
    plain = tokenizer._by_library(texts)
    assert encoded.word_starts.tolist() == plain.word_starts.tolist()
    assert encoded.offsets.tolist() == plain.offsets.tolist()


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

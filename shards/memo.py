"""Byte-level BPE by memory: a chunk of text is given to the library once, and looked up afterwards.

A chunk is a word with the blank, tab or line's end before it. GPT-2's pre-tokenizer always begins a pre-token at a lone
one of them, and none goes on past the end of a word into the space after it: so a chunk's tokens depend
on nothing around it, and the library may see it alone. Texts with other white space, or with runs of it, and chunks
that are too long to keep are left to the library. Symbols: N texts, C chunks of all of them, K tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import tokenizers

MARK = "\0"  # begins the first chunk of a text
ODD_TEXT = "\v"
SPACES = ("\n", "\t")  # what may stand before a word in place of a blank
SPACE = re.compile(r"[\s\x1c-\x1f\x85\u180e\u200b-\u200f\u2060\ufeff]")  # what anyone may take for white space
LONGEST = 64  # characters of a chunk
LIMIT = 1 << 18  # chunks held
ODD, ODD_FIRST = range(2)  # the numbers of all chunks that are left to the library
IS_FIRST, IS_ODD = 1, 2
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def fits(tokenizer_json: str) -> bool:
    """Whether a tokenizer is a plain byte-level BPE, which alone this file may stand in for."""
    described = json.loads(tokenizer_json)
    model, splitter = described.get("model") or {}, described.get("pre_tokenizer") or {}
    plain = all(not model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    added = all(token.get("special") for token in described.get("added_tokens") or [])
    parts = [described.get(name) for name in ("normalizer", "post_processor", "truncation", "padding")]
    byte_level = {name: splitter.get(name) for name in BYTE_LEVEL} == BYTE_LEVEL
    return model.get("type") == "BPE" and plain and added and byte_level and parts == [None] * 4


class _Numbers(dict[str, int]):
    """The number of each chunk; new ones are numbered when they are asked for, and `new` lists them."""

    def __init__(self) -> None:
        self.new: list[str] = []
        self.count = 2

    def __missing__(self, chunk: str) -> int:
        first = chunk.startswith(MARK)
        word = chunk[1:] if first or chunk.startswith(SPACES) else chunk
        if len(chunk) > LONGEST or SPACE.search(word) or not (word or first):
            return ODD_FIRST if first else ODD
        self[chunk] = number = self.count
        self.new.append(chunk)
        self.count += 1
        return number


class Memo:
    """The chunks met so far and their tokens."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._clear()

    def _clear(self) -> None:
        self._numbers = _Numbers()
        self._tokens, self._used = np.zeros(1024, np.int64), 0
        self._table = np.zeros((1024, 3), np.int64)  # of a chunk: its first token, how many, which begins its word
        self._flags = np.zeros(1024, np.uint8)
        self._flags[[ODD, ODD_FIRST]] = IS_ODD, IS_ODD | IS_FIRST

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int64 [K], offsets int64 [N + 1] of texts, words that begin in each token uint8 [K], left out).

        Left out, int64: the texts that the library must encode; they have no tokens here.
        """
        joined = MARK + f" {MARK}".join(texts)
        if joined.count(MARK) != len(texts):
            joined = MARK + f" {MARK}".join([ODD_TEXT if MARK in text else text for text in texts])
        chunks = joined.replace("\n", " \n").replace("\t", " \t").split(" ")
        if len(self._numbers) > LIMIT:
            self._clear()
        met = np.fromiter(map(self._numbers.__getitem__, chunks), np.int64, len(chunks))
        if self._numbers.new:
            self._learn(self._numbers.new)
            self._numbers.new = []
        flags = self._flags[met]
        firsts = np.flatnonzero(flags & IS_FIRST)
        begins, counts, words = self._table[met].T
        odd = np.unique(np.searchsorted(firsts, np.flatnonzero(flags & IS_ODD), side="right") - 1)
        if len(odd):
            counts = counts.copy()
            for at, stop in zip(firsts[odd].tolist(), np.append(firsts, len(met))[odd + 1].tolist(), strict=True):
                counts[at:stop] = 0
        upto = np.cumsum(counts)
        starts = upto - counts
        at = np.repeat(begins - starts, counts)
        at += np.arange(len(at))
        word_starts = np.zeros(len(at), np.uint8)
        word_starts[(starts + words)[counts > 0]] = 1
        return self._tokens[at], np.append(starts[firsts], len(at)), word_starts, odd

    def _learn(self, chunks: list[str]) -> None:
        """Ask the library for chunks that were numbered, which are the last ones."""
        texts = [chunk[1:] if chunk[0] == MARK else chunk if chunk[0] in SPACES else " " + chunk for chunk in chunks]
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        counts = np.fromiter(map(len, encodings), np.int64, len(chunks))
        last = self._numbers.count
        first, used = last - len(chunks), self._used + int(counts.sum())
        self._tokens, self._table, self._flags = (
            _with_room(array, size) for array, size in ((self._tokens, used), (self._table, last), (self._flags, last))
        )
        self._tokens[self._used : used] = list(chain.from_iterable(e.ids for e in encodings))
        words = [_word_token(text, e.offsets) for text, e in zip(texts, encodings, strict=True)]
        begins = self._used + np.cumsum(counts) - counts
        self._table[first:last] = np.stack([begins, counts, words], axis=1)
        is_first = np.array([chunk[0] == MARK for chunk in chunks])
        self._flags[first:last] = IS_FIRST * is_first + IS_ODD * (np.array(words) < 0)
        self._used = used


def _word_token(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """The token in which the word of a chunk begins: the first that ends past its beginning; -1 where none does."""
    begin = 1 if text.startswith((" ", *SPACES)) else 0
    return next((at for at, (_, end) in enumerate(offsets) if end > begin), -1) if text else 0


def _with_room(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a larger copy that `size` items fit in."""
    if size <= len(array):
        return array
    larger = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger

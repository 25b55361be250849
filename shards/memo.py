"""Byte-level BPE by memory: each pre-token is given to the library once, and looked up afterwards.

A pre-token's tokens do not depend on what is around it, and texts repeat few of them. Symbols: N texts, X pre-tokens
of all of them, K tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import tokenizers

# the pattern of GPT-2's byte-level pre-tokenizer, for ASCII alone: Unicode's classes change with its versions
PRE_TOKEN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
UNSURE = re.compile(r"[^\t\n\r -~]")  # characters that implementations class differently
LIMIT = 1 << 18  # pre-tokens held
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


def can_encode(text: str) -> bool:
    """Whether a text holds only characters that every implementation splits alike."""
    return text.isascii() and UNSURE.search(text) is None


class Memo:
    """The pre-tokens met so far and their tokens."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._clear()

    def _clear(self) -> None:
        self._numbers: dict[str, int] = {}
        empty = np.zeros(0, np.int64)
        self._tokens, self._begins, self._counts = empty, empty, empty
        self._spaced = empty  # the token of the pre-token in which a word begins after a space, -1: none
        self._plain, self._ends_space = np.zeros(0, np.bool_), np.zeros(0, np.bool_)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int64 [K], tokens of each text int64 [N], words that begin in each token uint8 [K])."""
        pieces = [PRE_TOKEN.findall(text) for text in texts]
        if len(self._numbers) > LIMIT:
            self._clear()
        self._learn(pieces)
        lookup = self._numbers
        per_text = np.fromiter(map(len, pieces), np.int64, len(texts))
        met = np.fromiter(map(lookup.__getitem__, chain.from_iterable(pieces)), np.int64, int(per_text.sum()))
        counts = self._counts[met]
        ends = np.cumsum(counts)
        starts = ends - counts
        total = int(ends[-1]) if len(ends) else 0
        tokens = self._tokens[np.repeat(self._begins[met] - starts, counts) + np.arange(total)]
        after_space = np.ones(len(met), np.bool_)
        after_space[1:] = self._ends_space[met[:-1]]
        text_ends = np.cumsum(per_text)
        firsts = (text_ends - per_text)[per_text > 0]
        after_space[firsts] = True
        words = np.zeros(total, np.uint8)
        words[starts[self._plain[met] & after_space]] = 1
        spaced = self._spaced[met]
        words[(starts + spaced)[spaced >= 0]] = 1
        upto = np.concatenate([[0], ends])
        return tokens, upto[text_ends] - upto[text_ends - per_text], words

    def _learn(self, pieces: list[list[str]]) -> None:
        """Ask the library for the pre-tokens that are new."""
        new = sorted(set(chain.from_iterable(pieces)).difference(self._numbers))
        if not new:
            return
        encodings = self._inner.encode_batch(new, add_special_tokens=False)
        begun = len(self._tokens)
        counts = np.fromiter(map(len, encodings), np.int64, len(new))
        tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, int(counts.sum()))
        spaced = [
            next(at for at, (_, end) in enumerate(e.offsets) if end > 1)
            if text[0] == " " and not text.isspace()
            else -1
            for text, e in zip(new, encodings, strict=True)
        ]
        self._numbers.update(zip(new, range(len(self._numbers), len(self._numbers) + len(new)), strict=True))
        self._tokens = np.concatenate([self._tokens, tokens])
        self._begins = np.concatenate([self._begins, begun + np.cumsum(counts) - counts])
        self._counts = np.concatenate([self._counts, counts])
        self._spaced = np.concatenate([self._spaced, np.array(spaced, np.int64)])
        self._plain = np.concatenate([self._plain, [not text[0].isspace() for text in new]])
        self._ends_space = np.concatenate([self._ends_space, [text[-1].isspace() for text in new]])


def _first_word(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """The token of a pre-token in which a word begins after the pre-token's own space; -1 where none does."""
    if not text.startswith(" ") or text.isspace():
        return -1
    return next(at for at, (_, end) in enumerate(offsets) if end > 1)

"""Train, load and hash a byte-level BPE; encode texts together with where their words begin.

Symbols: N texts, K tokens of all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from shards.memo import Memo, fits
from shards.record import DataError

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
MIN_VOCAB, MAX_VOCAB = 512, 16_384
SMALLEST_VOCAB = 256 + len(SPECIALS)
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Encoded:
    """Tokens of N texts, without specials.

    tokens: int64 [K]; offsets: int64 [N + 1], text i owns tokens[offsets[i]:offsets[i + 1]];
    word_starts: uint8 [K], how many whitespace-separated words begin in the token.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    word_starts: np.ndarray


def default_vocab_size(words: int) -> int:
    """The largest power of two <= words / 8, between 512 and 16,384."""
    return min(MAX_VOCAB, max(MIN_VOCAB, 1 << max(0, (words // 8).bit_length() - 1)))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """The JSON of a byte-level BPE of at most `vocab_size` entries, trained on `texts`.

    The same texts in the same order give the same JSON. Raises DataError on a vocabulary too small to
    hold the 256 bytes and the three specials.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {len(SPECIALS)} specials need "
            f"at least {SMALLEST_VOCAB}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def token_texts(tokenizer_file: str) -> Callable[[int], str]:
    """What each token of a tokenizer's file stands for, as a person reads it."""
    inner = tokenizers.Tokenizer.from_str(tokenizer_file)
    return lambda token: inner.decode([token], skip_special_tokens=False)


class _Parsing:
    """Turns what a damaged tokenizer file raises into a DataError.

    The library raises `Exception` itself; matching that very type leaves every other error alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind in (Exception, UnicodeDecodeError):
            raise DataError(
                f"tokenizer {self._path} is not a Hugging Face tokenizer.json ({str(error)[:100]}): "
                "make a new one by leaving --tokenizer out"
            ) from None


class TextTokenizer:
    """A tokenizer file, ready to encode. `sha256` is that of the file's bytes."""

    def __init__(self, path: Path) -> None:
        """Load `path`; raises DataError when it is missing, damaged or lacks the specials at 0, 1, 2."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path}: {error.strerror}; name a tokenizer.json") from None
        with _Parsing(path):
            self.inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        self.sha256 = hashlib.sha256(data).hexdigest()
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        wrong = [f"{s} is {vocabulary.get(s)}" for i, s in enumerate(SPECIALS) if vocabulary.get(s) != i]
        if wrong:
            raise DataError(
                f"tokenizer {path} needs <pad> = 0, <bos> = 1, <eos> = 2, but {', '.join(wrong)}: "
                "use one that make_shards trained"
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True  # a literal "<eos>" in a text is text
        self._memo = Memo(self.inner) if fits(self.inner.to_str()) else None

    @property
    def token_dtype(self) -> np.dtype:
        """The dtype that token ids are stored in."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that hold no specials."""
        return self.inner.decode(list(tokens), skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Tokens of `texts` and the words that begin in each.

        A word that starts at character p belongs to the first token whose end offset is > p, so the
        word_starts of a text sum to len(text.split()). Raises DataError when a token begins 256 words.
        """
        if self._memo is None or not texts:
            return self._by_library(texts)
        tokens, offsets, word_starts, odd = self._memo.encode(texts)
        if not len(odd):
            return Encoded(tokens, offsets, word_starts)
        left_out: list[int] = odd.tolist()
        others = self._by_library([texts[at] for at in left_out])
        counts = np.diff(others.offsets)
        places = np.repeat(offsets[odd], counts)
        more = np.zeros(len(offsets), np.int64)
        more[odd + 1] = counts
        return Encoded(
            np.insert(tokens, places, others.tokens),
            offsets + np.cumsum(more),
            np.insert(word_starts, places, others.word_starts),
        )

    def _by_library(self, texts: Sequence[str]) -> Encoded:
        encodings = self.inner.encode_batch(list(texts), add_special_tokens=False)
        counts = np.fromiter((len(e) for e in encodings), dtype=np.int64, count=len(texts))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        total = int(offsets[-1])
        tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int64, count=total)
        ends = np.fromiter((o[1] for e in encodings for o in e.offsets), dtype=np.int64, count=total)
        starts = [[m.start() for m in WORD.finditer(text)] for text in texts]
        words = np.fromiter((len(s) for s in starts), dtype=np.int64, count=len(texts))
        begins = np.fromiter(chain.from_iterable(starts), dtype=np.int64, count=int(words.sum()))
        sizes = np.fromiter((len(text) + 1 for text in texts), dtype=np.int64, count=len(texts))
        bases = np.cumsum(sizes) - sizes
        at = np.searchsorted(ends + np.repeat(bases, counts), begins + np.repeat(bases, words), side="right")
        at = np.minimum(at, np.repeat(offsets[1:] - 1, words))
        per_token = np.bincount(at[at >= np.repeat(offsets[:-1], words)], minlength=total)
        if total and per_token.max() > 255:
            raise DataError("a token begins more than 255 words: use a tokenizer that splits at whitespace")
        return Encoded(tokens, offsets, per_token.astype(np.uint8))

"""The index beside a tar: `X.index.npz`, enough to train without parsing the tar.

An uncompressed .npz, that is a zip of plain .npy arrays, of which the long ones can be mapped. Symbols: N samples,
K tokens of all of them, V width of a vision vector.

    header         int64 [6]: format, tar bytes, N, K, V, token item size
    tokenizer      the sha256 of the tokenizer's file
    keys           bytes [N];  sources bytes [k], sorted;  source uint8 [N]: which of them
    text_offset    int64 [N], text_size int32 [N]: the text's place in the tar
    text_kind      uint8 [N]: 0 plain text, 1 JSON with the text in "caption" or "text"
    vector_offset  int64 [N] (-1: none), vector_size int32 [N]: the vector's place in the tar
    vector_kind    uint8 [N]: 0 none, 1 raw float16, 2 raw float32, 3 an .npy or .npz that must be decoded
    token_offsets  int64 [N + 1], tokens uint16 or uint32 [K], word_starts uint8 [K]
    words          int32 [N];  crc32 uint32 [N]: over the bytes of text and vector
    image_id       int64 [N]: 0 where there is no vector
"""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal import isal_zlib

from shards.npy import read_array, read_header
from shards.record import TEXT_FIELDS, VECTOR_SIZE, DataError
from shards.regions import is_shared, open_region
from shards.tokenizer import TextTokenizer

FORMAT = 2
PLAIN_TEXT, JSON_TEXT = range(2)
NO_VECTOR, RAW_FLOAT16, RAW_FLOAT32, ENCODED_VECTOR = range(4)
RAW_DTYPES = {RAW_FLOAT16: np.dtype("<f2"), RAW_FLOAT32: np.dtype("<f4")}
PER_SAMPLE = {
    "source": "u1",
    "text_offset": "<i8",
    "text_size": "<i4",
    "text_kind": "u1",
    "vector_offset": "<i8",
    "vector_size": "<i4",
    "vector_kind": "u1",
    "words": "<i4",
    "crc32": "<u4",
    "image_id": "<i8",
}
TOGETHER, TOGETHER_BYTES = 256, 4 << 20  # samples that are verified by one read, where they lie so close
COLUMNS = (*PER_SAMPLE, "token_offsets")  # what an open shard holds in memory
# what numpy and zipfile raise on files that are damaged, or are none of theirs
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, NotImplementedError, MemoryError, OverflowError, RecursionError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def index_path(tar: Path) -> Path:
    """The index of `tar`."""
    return tar.with_suffix(".index.npz")


@dataclass(frozen=True)
class Members:
    """Where the parts of n samples lie in a tar.

    keys and texts (n each); source int [n] into `sources`; columns: the other per-sample arrays but words.
    """

    keys: Sequence[bytes]
    texts: Sequence[str]
    sources: Sequence[str]
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class Counted:
    """What an index holds: samples, words and tokens of each source, and how many samples have how many tokens.

    lengths int64 [M, 3]: (number of the source in the sorted names of `sources`, tokens, samples).
    """

    sources: dict[str, dict[str, int]]
    lengths: np.ndarray

    def total(self, name: str) -> int:
        """The sum of "samples", "words" or "tokens" over the sources."""
        return sum(part[name] for part in self.sources.values())


@dataclass
class IndexBuilder:
    """Collects samples in tar order, tokenises them and writes the index."""

    tokenizer: TextTokenizer
    keys: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # sources as they were met
    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in PER_SAMPLE})
    tokens: list[np.ndarray] = field(default_factory=list)
    word_starts: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, members: Members) -> None:
        """Take in samples, in the order of the tar."""
        encoded = self.tokenizer.encode_batch(members.texts)
        self.keys.extend(members.keys)
        self.names += [name for name in members.sources if name not in self.names]
        numbers = np.array([self.names.index(name) for name in members.sources], np.int64)
        cumulative = np.concatenate([[0], np.cumsum(encoded.word_starts, dtype=np.int64)])
        values = {**members.columns, "words": np.diff(cumulative[encoded.offsets])}
        values["source"] = numbers[members.columns["source"]]
        for name, kind in PER_SAMPLE.items():
            self.columns[name].append(np.asarray(values[name]).astype(kind))
        self.tokens.append(encoded.tokens.astype(self.tokenizer.token_dtype))
        self.word_starts.append(encoded.word_starts)
        self.counts.append(np.diff(encoded.offsets))

    def write(self, target: Path, tar_bytes: int) -> Counted:
        """Write the index to `target`. Raises DataError when the samples have more than 256 sources."""
        if len(self.names) > 256:
            raise DataError(f"{target.name}: {len(self.names)} sources in one shard, at most 256 can be told apart")
        arrays = {name: _joined(parts, PER_SAMPLE[name]) for name, parts in self.columns.items()}
        names = sorted(self.names)
        place = np.array([names.index(name) for name in self.names] or [0], np.uint8)
        arrays["source"] = place[arrays["source"]]
        arrays["sources"] = np.array([name.encode("utf-8") for name in names], dtype=np.bytes_)
        arrays["keys"] = np.array(self.keys, dtype=np.bytes_)
        counts = _joined(self.counts, "<i8")
        arrays["token_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
        arrays["tokens"] = _joined(self.tokens, self.tokenizer.token_dtype.str)
        arrays["word_starts"] = _joined(self.word_starts, "u1")
        arrays["tokenizer"] = np.array(self.tokenizer.sha256.encode("ascii"), dtype="S64")
        tokens = arrays["tokens"]
        header = [FORMAT, tar_bytes, len(self), len(tokens), VECTOR_SIZE, tokens.itemsize]
        with target.open("wb") as stream:
            np.savez(stream, allow_pickle=False, header=np.array(header, dtype="<i8"), **arrays)
        return count_index(names, arrays["source"], counts, arrays["words"])


def _joined(parts: list[np.ndarray], kind: str) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *parts])


def count_sources(
    names: list[str], source: np.ndarray, tokens: np.ndarray, words: np.ndarray
) -> dict[str, dict[str, int]]:
    """The samples, words and tokens of each of `names` [k], of samples' source [N], tokens [N] and words [N]."""
    sums = [np.bincount(source, weights, minlength=len(names)).tolist() for weights in (None, words, tokens)]
    parts = zip(*sums, strict=True)  # sums of float64 are exact here: a shard is far from 2^53 tokens
    return {
        name: dict(zip(("samples", "words", "tokens"), map(int, part), strict=True))
        for name, part in zip(names, parts, strict=True)
    }


def count_index(names: list[str], source: np.ndarray, tokens: np.ndarray, words: np.ndarray) -> Counted:
    """The counts of samples of `names` [k] by source [N], tokens [N] and words [N]."""
    span = int(tokens.max(initial=0)) + 1
    codes, many = np.unique(source.astype(np.int64) * span + tokens, return_counts=True)
    lengths = np.stack([codes // span, codes % span, many], axis=1)
    return Counted(count_sources(names, source, tokens, words), lengths)


def load_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an index; raises DataError when the file or one of them is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _stored(archive, name) for name in names}
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def _stored(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return read_array(member)


def _damaged(path: Path, error: object) -> DataError:
    return DataError(f"index {path} is missing or damaged ({error}): make the shards again")


def read_index(path: Path) -> dict[str, np.ndarray]:
    """All columns of an index that training uses, with sources and tokenizer, checked against each other.

    Raises DataError when they do not fit together.
    """
    columns = load_columns(path, (*COLUMNS, "header", "tokenizer", "sources"))
    header = columns["header"]
    if header.shape != (6,) or header.dtype != np.int64 or header[0] != FORMAT or header[4] != VECTOR_SIZE:
        raise DataError(f"index {path} has another format: make the shards again")
    samples, tokens = int(header[2]), int(header[3])
    if header[5] not in (2, 4) or (header < 0).any():
        raise _damaged(path, "header is out of range")
    for name, kind in PER_SAMPLE.items():
        if columns[name].dtype != np.dtype(kind) or columns[name].shape != (samples,):
            raise _damaged(path, f"{name} is {columns[name].dtype} {columns[name].shape}")
    offsets = columns["token_offsets"]
    if offsets.dtype != np.int64 or offsets.shape != (samples + 1,) or offsets[0] != 0 or offsets[-1] != tokens:
        raise _damaged(path, "token_offsets do not fit the header")
    sources = columns["sources"]
    if (np.diff(offsets) < 0).any() or sources.dtype.kind != "S" or sources.ndim != 1:
        raise _damaged(path, "token_offsets or sources are out of range")
    if samples and int(columns["source"].max()) >= len(sources):
        raise _damaged(path, "source is out of range")
    for what in ("text", "vector"):
        start, size = columns[f"{what}_offset"], columns[f"{what}_size"]
        if (size < 0).any() or (start < -(what == "vector")).any() or (start + size > header[1]).any():
            raise _damaged(path, f"{what}_offset lies outside of the tar")
    if not _vectors_fit(columns):
        raise _damaged(path, "vector_kind does not fit vector_size")
    return columns


def _vectors_fit(columns: dict[str, np.ndarray]) -> bool:
    kind, size = columns["vector_kind"], columns["vector_size"]
    wanted = np.select([kind == k for k in (NO_VECTOR, *RAW_DTYPES)], [0, 2 * VECTOR_SIZE, 4 * VECTOR_SIZE], -1)
    raw = wanted >= 0
    return bool((kind <= ENCODED_VECTOR).all() and (size[raw] == wanted[raw]).all())


class ShardReader:
    """One open shard: columns in memory; data (the tar), token_bytes and word_start_bytes as regions of their files.

    All is closed when the reader is no longer used.
    """

    def __init__(self, tar: Path, tokenizer_hash: str | None = None, index: Path | None = None) -> None:
        """Open by the index; raises DataError when tar and index do not belong together."""
        self.tar, self.index = tar, index_path(tar) if index is None else index
        self.columns = read_index(self.index)
        header = self.columns["header"]
        _check_owner(tar, self.index, header, self.columns["tokenizer"], tokenizer_hash)
        self.sources = [name.decode("utf-8", "replace") for name in self.columns["sources"].tolist()]
        self.token_dtype = np.dtype(f"<u{int(header[5])}")
        count = int(header[3])
        tokens, starts = _places(self.index, {"tokens": (self.token_dtype, count), "word_starts": (np.uint8, count)})
        shared = is_shared(tar) or is_shared(self.index)
        self.data = open_region(self, tar, 0, int(header[1]), shared=shared)
        self.token_bytes = open_region(self, self.index, tokens, count * self.token_dtype.itemsize, shared=shared)
        self.word_start_bytes = open_region(self, self.index, starts, count, shared=shared)

    def __len__(self) -> int:
        return len(self.columns["words"])

    def key(self, sample: int) -> str:
        """The key of a sample of this shard."""
        return load_columns(self.index, ["keys"])["keys"][sample].decode("utf-8", "replace")

    def payloads(self, sample: int) -> tuple[bytes, bytes]:
        """The bytes of a sample's text and of its vector as they stand in the tar."""
        parts = []
        for what in ("text", "vector"):
            start = int(self.columns[f"{what}_offset"][sample])
            parts.append(bytes(self.data[start : start + int(self.columns[f"{what}_size"][sample])]))
        return parts[0], parts[1]

    def text(self, sample: int) -> str:
        """The text of a sample, read from the tar."""
        return parse_text(self.payloads(sample)[0], int(self.columns["text_kind"][sample]), self.tar.name)

    def sample_tokens(self, sample: int) -> np.ndarray:
        """The token ids of a sample, without specials."""
        low, high = (int(at) * self.token_dtype.itemsize for at in self.columns["token_offsets"][sample : sample + 2])
        return np.frombuffer(self.token_bytes[low:high], self.token_dtype)

    def sample_word_starts(self, sample: int) -> np.ndarray:
        """uint8: the words that begin in each token of a sample."""
        low, high = self.columns["token_offsets"][sample : sample + 2].tolist()
        return np.frombuffer(self.word_start_bytes[low:high], np.uint8)

    def vector(self, sample: int) -> np.ndarray | None:
        """The vector of a sample, float32 [V]; None when it has none."""
        kind = int(self.columns["vector_kind"][sample])
        if kind == NO_VECTOR:
            return None
        data = self.payloads(sample)[1]
        if kind in RAW_DTYPES:
            return np.frombuffer(data, RAW_DTYPES[kind]).astype(np.float32)
        return decode_vector(data, f"{self.tar.name}: {self.key(sample)}")

    def damaged(self) -> np.ndarray:
        """int64: the samples whose bytes in the tar no longer give their crc32."""
        columns = self.columns
        ends = [columns[f"{what}_offset"] + columns[f"{what}_size"] for what in ("text", "vector")]
        first = np.where(columns["vector_size"] > 0, columns["vector_offset"], columns["text_offset"])
        first, last = np.minimum(first, columns["text_offset"]), np.maximum(*ends)
        bad: list[int] = []
        with self.tar.open("rb", buffering=0) as stream:  # not through the map, whose pages would stay resident
            file = stream.fileno()
            for begin in range(0, len(self), TOGETHER):
                here = slice(begin, begin + TOGETHER)
                start, stop = int(first[here].min()), int(last[here].max())
                if stop - start <= TOGETHER_BYTES:
                    data = memoryview(os.pread(file, stop - start, start))  # of a tar that was cut, what is left
                    bad += self._damaged_among(here, lambda at, size, d=data, s=start: d[at - s : at - s + size])
                else:
                    bad += self._damaged_among(here, lambda at, size: os.pread(file, size, at))
        return np.array(bad, dtype=np.int64)

    def _damaged_among(self, here: slice, read: Callable[[int, int], bytes | memoryview]) -> list[int]:
        """The damaged ones of some samples; `read(first byte, bytes)` reads the tar."""
        names = ("text_offset", "text_size", "vector_offset", "vector_size", "crc32")
        bad = []
        rows = zip(*(self.columns[name][here].tolist() for name in names), strict=True)
        for sample, (text, text_size, vector, vector_size, expected) in enumerate(rows, here.start):
            crc = isal_zlib.crc32(read(text, text_size))
            if vector_size:
                crc = isal_zlib.crc32(read(vector, vector_size), crc)
            if crc != expected:
                bad.append(sample)
        return bad


def _places(index: Path, wanted: dict[str, tuple[object, int]]) -> list[int]:
    """Where the values of stored arrays begin in an index. Raises DataError unless each has the dtype and length."""
    places = []
    try:
        with zipfile.ZipFile(index) as archive, index.open("rb") as stream:
            for name, (dtype, count) in wanted.items():
                info = archive.getinfo(f"{name}.npy")
                with archive.open(info) as member:
                    shape, found, header_bytes = read_header(member)
                if info.compress_type != zipfile.ZIP_STORED or shape != (count,) or found != dtype:
                    raise _damaged(index, f"{name} is {found} {shape}, not stored {dtype} ({count},)")
                stream.seek(info.header_offset + 26)
                name_bytes, extra_bytes = np.frombuffer(stream.read(4), "<u2").tolist()
                places.append(info.header_offset + 30 + name_bytes + extra_bytes + header_bytes)
    except UNREADABLE as error:
        raise _damaged(index, error) from None
    return places


def parse_text(data: bytes, kind: int, where: str) -> str:
    """The text of a member's bytes; raises DataError when it is not UTF-8, or JSON without a text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start})") from None
    if kind == PLAIN_TEXT:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    fields = value if isinstance(value, dict) else {"text": value}
    for name in TEXT_FIELDS:
        if isinstance(fields.get(name), str):
            return fields[name]
    raise DataError(f"{where} holds no text: expected a string in {' or '.join(TEXT_FIELDS)}, found {sorted(fields)}")


def decode_vector(data: bytes, where: str) -> np.ndarray:
    """float32 [V] of the bytes of an .npy or .npz; raises DataError when it holds anything else. Unpickles nothing."""
    try:
        value = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(value, np.lib.npyio.NpzFile):
            with value:
                arrays = [value[name] for name in value.files]
            value = arrays[0] if len(arrays) == 1 else np.zeros(0)
    except UNREADABLE as error:
        raise DataError(f"{where}: the vector is no .npy or .npz array ({error})") from None
    if value.dtype.kind != "f" or value.size != VECTOR_SIZE:
        raise DataError(f"{where}: expected one vector of {VECTOR_SIZE} floats, found {value.dtype} {value.shape}")
    return value.reshape(VECTOR_SIZE).astype(np.float32)


def check_header(tar: Path, tokenizer_hash: str | None = None, index: Path | None = None) -> None:
    """Check cheaply that `tar` and its index are there and belong together and to the tokenizer.

    Raises DataError naming the file and the numbers otherwise.
    """
    index = index_path(tar) if index is None else index
    found = load_columns(index, ("header", "tokenizer"))
    if found["header"].shape != (6,) or found["header"][0] != FORMAT:
        raise DataError(f"index {index} has another format: make the shards again")
    _check_owner(tar, index, found["header"], found["tokenizer"], tokenizer_hash)


def _check_owner(tar: Path, index: Path, header: np.ndarray, tokenizer: np.ndarray, wanted: str | None) -> None:
    try:
        size = tar.stat().st_size
    except OSError as error:
        raise DataError(f"shard {tar}: {error.strerror}: get it again") from None
    if size != header[1]:
        raise DataError(
            f"shard {tar} is truncated or changed: {size} bytes, its index says {int(header[1])}: make the shards again"
        )
    stored = tokenizer.item().decode("ascii", "replace") if tokenizer.dtype.kind == "S" and tokenizer.size == 1 else ""
    if wanted is not None and stored != wanted:
        raise DataError(f"index {index} is of another tokenizer: make the shards again")

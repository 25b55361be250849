"""The index beside a tar: plain .npy arrays in `X.index/`, enough to train without parsing the tar.

Symbols: N samples, K tokens of all of them, V width of a vision vector.

    header.npy         int64 [7]: format, tar bytes, N, K, V, token item size, crc32 of the arrays below
    tokenizer.npy      the sha256 of the tokenizer's file
    keys.npy           bytes [N]
    text_offset.npy    int64 [N], text_size.npy int64 [N]: the text's place in the tar
    vector_offset.npy  int64 [N]: the place of the raw floats, -1 where there is none
    vector_bytes.npy   uint8 [N]: bytes a float (0 none, 2 float16, 4 float32)
    token_offsets.npy  int64 [N + 1], tokens.npy uint16 or uint32 [K], word_starts.npy uint8 [K]
    words.npy          int32 [N]
    crc32.npy          uint32 [N]: over text bytes + raw floats
    image_id.npy       int64 [N]: 0 where there is no vector
"""

from __future__ import annotations

import mmap
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.record import BLOCK_BYTES, VECTOR_SIZE, DataError, from_members, image_id, parse_npy
from shards.tokenizer import TextTokenizer

FORMAT = 1
TOKENIZE_BATCH = 2048
PER_SAMPLE = {
    "text_offset": "<i8",
    "text_size": "<i8",
    "vector_offset": "<i8",
    "vector_bytes": "u1",
    "words": "<i4",
    "crc32": "<u4",
    "image_id": "<i8",
}
ARRAYS = (*PER_SAMPLE, "keys", "token_offsets", "tokens", "word_starts", "tokenizer")


def index_path(tar: Path) -> Path:
    """The directory of the index of `tar`."""
    return tar.with_suffix(".index")


@dataclass(frozen=True)
class Members:
    """Where the parts of n samples lie in a tar: keys and texts (n each) and one list a column."""

    keys: Sequence[str]
    texts: Sequence[str]
    columns: dict[str, Sequence[int]]  # text_offset, text_size, vector_offset, vector_bytes, crc32, image_id


class IndexBuilder:
    """Collects samples in tar order, tokenises them and writes the index."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._keys: list[str] = []
        self._columns: dict[str, list[int]] = {name: [] for name in PER_SAMPLE}
        self._tokens: list[np.ndarray] = []
        self._word_starts: list[np.ndarray] = []
        self._counts: list[np.ndarray] = [np.zeros(1, np.int64)]

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, members: Members) -> None:
        """Take in samples, in the order of the tar."""
        encoded = self._tokenizer.encode_batch(members.texts)
        self._keys.extend(members.keys)
        for name, values in members.columns.items():
            self._columns[name].extend(values)
        cumulative = np.concatenate([[0], np.cumsum(encoded.word_starts, dtype=np.int64)])
        self._columns["words"].extend(np.diff(cumulative[encoded.offsets]).tolist())
        self._tokens.append(encoded.tokens.astype(self._tokenizer.token_dtype))
        self._word_starts.append(encoded.word_starts)
        self._counts.append(np.diff(encoded.offsets))

    def write(self, tar: Path) -> dict[str, int]:
        """Write the index of the finished `tar` atomically; returns its samples, words and tokens."""
        arrays = {name: np.array(self._columns[name], dtype=kind) for name, kind in PER_SAMPLE.items()}
        arrays["keys"] = np.array([key.encode("utf-8") for key in self._keys], dtype=np.bytes_)
        arrays["token_offsets"] = np.cumsum(np.concatenate(self._counts), dtype="<i8")
        empty = np.zeros(0, self._tokenizer.token_dtype)
        arrays["tokens"] = np.concatenate([empty, *self._tokens])
        arrays["word_starts"] = np.concatenate([np.zeros(0, np.uint8), *self._word_starts])
        arrays["tokenizer"] = np.array(self._tokenizer.sha256.encode("ascii"), dtype="S64")
        tokens = arrays["tokens"]
        header = [FORMAT, tar.stat().st_size, len(self), len(tokens), VECTOR_SIZE, tokens.itemsize]
        arrays["header"] = np.array([*header, arrays_crc(arrays)], dtype="<i8")
        final, part = index_path(tar), tar.with_suffix(".index.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name, values in arrays.items():
            np.save(part / f"{name}.npy", values, allow_pickle=False)
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
        return {"samples": len(self), "words": int(arrays["words"].sum()), "tokens": len(tokens)}


def arrays_crc(arrays: dict[str, np.ndarray]) -> int:
    """The crc32 over the bytes of all arrays of an index but its header."""
    crc = 0
    for name in ARRAYS:
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return crc


def _grouped(archive: tarfile.TarFile, tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Consecutive members of one key: (key, {extension: member}); only .txt and .npy are kept."""
    key, group, end = "", {}, 0
    for member in archive:
        end = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        name = f"{folder}/{stem}" if folder else stem
        if name != key:
            if group:
                yield key, group
            key, group = name, {}
        if extension in ("txt", "npy"):
            if extension in group:
                raise DataError(f"{tar.name}: member {member.name} occurs twice in its sample")
            group[extension] = member
    if group:
        yield key, group
    with tar.open("rb") as stream:
        stream.seek(end)
        closing = stream.read(BLOCK_BYTES)
    if len(closing) < BLOCK_BYTES or any(closing):
        raise DataError(f"{tar.name} is truncated or damaged at byte {end}: get the file again")


def _locate(archive: tarfile.TarFile, tar: Path, tokenizer: TextTokenizer, builder: IndexBuilder) -> None:
    """Stream the samples of an open tar into `builder`."""
    names = [name for name in PER_SAMPLE if name != "words"]
    keys: list[str] = []
    texts: list[str] = []
    columns: dict[str, list[int]] = {name: [] for name in names}

    def flush() -> None:
        if keys:
            builder.add(Members(keys, texts, columns))  # type: ignore[arg-type]
        for values in (keys, texts, *columns.values()):
            values.clear()

    for key, group in _grouped(archive, tar):
        payloads = {extension: _payload(archive, member) for extension, member in group.items()}
        sample = from_members(f"{tar.name}: {key}", payloads)
        row = [group["txt"].offset_data, group["txt"].size, -1, 0, zlib.crc32(payloads["txt"]), 0]
        if sample.vector is not None:
            dtype, start = parse_npy(payloads["npy"], f"{tar.name}: {key}.npy")
            crc = zlib.crc32(payloads["npy"][start:], row[4])
            row[2:] = [group["npy"].offset_data + start, dtype.itemsize, crc, image_id(sample.vector)]
        keys.append(key)
        texts.append(sample.text)
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
        if len(keys) == TOKENIZE_BATCH:
            flush()
    flush()


def _payload(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None  # regular files only
    return stream.read()


def build_index(tar: Path, tokenizer: TextTokenizer) -> dict[str, int]:
    """Make the index of any WebDataset tar of .txt and .npy members (PAX headers included).

    For a tar of our own writer the files are byte for byte those the writer left. Returns samples, words
    and tokens. Raises DataError on a tar that is missing, truncated or damaged, or holds a wrong member.
    """
    builder = IndexBuilder(tokenizer)
    try:
        with tarfile.open(tar, "r:") as archive:
            _locate(archive, tar, tokenizer, builder)
    except tarfile.TarError as error:
        raise DataError(f"{tar.name} is not a whole tar ({error}): get the file again") from None
    except OSError as error:
        raise DataError(f"{tar}: {error.strerror or error}") from None
    return builder.write(tar)


def load_array(directory: Path, name: str, mapped: bool = False) -> np.ndarray:
    """One array of an index; raises DataError when it is missing or damaged."""
    path = directory / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r" if mapped and path.stat().st_size else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"index {directory.name}/{name}.npy is missing or damaged ({error}): make the shards again"
        ) from None


class ShardReader:
    """One open shard: small columns in memory, the tar, tokens and word starts mapped."""

    def __init__(self, tar: Path, tokenizer_hash: str | None = None) -> None:
        """Open by the index; raises DataError when tar and index do not belong together."""
        self.tar = tar
        directory = index_path(tar)
        self._directory = directory
        check_header(tar, tokenizer_hash)
        columns = {name: load_array(directory, name) for name in (*PER_SAMPLE, "token_offsets")}
        self.columns = columns
        self.image_id, self.words, self.token_offsets = (
            columns["image_id"],
            columns["words"],
            columns["token_offsets"],
        )
        self.tokens = load_array(directory, "tokens", mapped=True)
        self.word_starts = load_array(directory, "word_starts", mapped=True)
        with tar.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.words)

    def key(self, sample: int) -> str:
        """The key of a sample of this shard."""
        return load_array(self._directory, "keys", mapped=True)[sample].decode("utf-8")

    def text(self, sample: int) -> str:
        """The text of a sample, read from the tar."""
        start = int(self.columns["text_offset"][sample])
        return self._map[start : start + int(self.columns["text_size"][sample])].decode("utf-8")

    def sample_tokens(self, sample: int) -> np.ndarray:
        """The token ids of a sample, without specials (a view of the map)."""
        return self.tokens[self.token_offsets[sample] : self.token_offsets[sample + 1]]

    def sample_word_starts(self, sample: int) -> np.ndarray:
        """uint8: the words that begin in each token of a sample."""
        return self.word_starts[self.token_offsets[sample] : self.token_offsets[sample + 1]]

    def copy_vector(self, sample: int, out: np.ndarray) -> bool:
        """Write the vector of a sample into `out` float32 [V]; False when it has none."""
        start, itemsize = int(self.columns["vector_offset"][sample]), self.columns["vector_bytes"][sample]
        if start < 0:
            return False
        kind = "<f2" if itemsize == 2 else "<f4"
        out[:] = np.frombuffer(self._map, dtype=kind, count=VECTOR_SIZE, offset=start)
        return True

    def damaged(self) -> np.ndarray:
        """int64: the samples whose bytes in the tar no longer give their crc32.

        Raises DataError when the index itself is damaged (its arrays' crc32 does not hold).
        """
        arrays = {name: load_array(self._directory, name) for name in ARRAYS}
        if arrays_crc(arrays) != int(load_array(self._directory, "header")[6]):
            raise DataError(f"index {self._directory.name} is damaged: make the shards again")
        columns = self.columns
        bad = []
        view = memoryview(self._map)
        table = zip(
            columns["text_offset"].tolist(),
            columns["text_size"].tolist(),
            columns["vector_offset"].tolist(),
            columns["vector_bytes"].tolist(),
            columns["crc32"].tolist(),
            strict=True,
        )
        for sample, (text, size, vector, itemsize, expected) in enumerate(table):
            crc = zlib.crc32(view[text : text + size])
            if vector >= 0:
                crc = zlib.crc32(view[vector : vector + VECTOR_SIZE * itemsize], crc)
            if crc != expected:
                bad.append(sample)
        return np.array(bad, dtype=np.int64)


def check_header(tar: Path, tokenizer_hash: str | None = None) -> None:
    """Check cheaply that `tar` and its index are there and belong together and to the tokenizer.

    Raises DataError naming the file and the numbers otherwise.
    """
    header = load_array(index_path(tar), "header")
    if header.shape != (7,) or header[0] != FORMAT or header[4] != VECTOR_SIZE:
        raise DataError(f"index {index_path(tar).name} has another format: make the shards again")
    try:
        size = tar.stat().st_size
    except OSError as error:
        raise DataError(f"shard {tar}: {error.strerror}: make the shards again") from None
    if size != header[1]:
        raise DataError(
            f"shard {tar.name} is truncated or changed: {size} bytes, its index says {int(header[1])}: "
            "make the shards again"
        )
    stored = load_array(index_path(tar), "tokenizer").item().decode("ascii", "replace")
    if tokenizer_hash is not None and stored != tokenizer_hash:
        raise DataError(f"index {index_path(tar).name} is of another tokenizer: make the shards again")

"""Samples -> the members of a WebDataset tar: `SOURCE-ROW.txt` and, for pairs, `SOURCE-ROW.npy`; ids of contents.

Headers are plain USTAR with mtime 0 and no owner, so that the same input gives the same bytes.
Symbols: N samples, M members, V width of a vision vector (768).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

VECTOR_SIZE = 768
BLOCK_BYTES = 512
VECTOR_DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
PICKLES = (".pth", ".pt", ".pkl", ".pickle")
TEXT_FIELDS = ("caption", "text")
MAX_SOURCE_LENGTH = 80
RESERVED_SOURCES = ("pairs", "text")


class DataError(ValueError):
    """Data a user handed in is missing, damaged or does not fit; one line that says what would do."""


@dataclass(frozen=True)
class Samples:
    """N captions with their vectors [N, V] in the dtype that shards store, or N text records (vectors None)."""

    keys: Sequence[bytes]
    texts: Sequence[bytes]  # UTF-8
    vectors: np.ndarray | None


def sanitise_source(name: str) -> str:
    """The name of a source as shards carry it: only letters, digits, `_` and `-`.

    Raises DataError when nothing usable is left, or when the name is one that mixes reserve.
    """
    source = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if not source.strip("_-") or len(source) > MAX_SOURCE_LENGTH:
        raise DataError(
            f"source name {name!r} cannot be used: give the raw file a name of 1 to {MAX_SOURCE_LENGTH} "
            "letters, digits, '_' or '-'"
        )
    if source in RESERVED_SOURCES:
        raise DataError(
            f"source name {name!r} is reserved (mixes use it for all sources of a kind): rename the raw file"
        )
    return source


def sample_key(source: str, row: int) -> bytes:
    """`SOURCE-ROW`, ROW zero-padded to 9 digits: the key WebDataset groups members by."""
    return b"%b-%09d" % (source.encode("ascii"), row)


def content_id(data: bytes | memoryview) -> int:
    """A hash (XXH3) of bytes as an int64 that is never 0."""
    number = xxhash.xxh3_64_intdigest(data)
    return (number if number < 1 << 63 else number - (1 << 64)) or 1


def image_id(vector: np.ndarray) -> int:
    """The id of an image: the hash of its vector [V], the same whether stored as float16 or float32."""
    return int(image_ids(np.asarray(vector).reshape(1, -1))[0])


def image_ids(vectors: np.ndarray) -> np.ndarray:
    """int64 [N]: the image id of each row of `vectors` [N, V].

    Hashed are the little-endian bytes of the float16 rounding, so that the id can be rebuilt from a float16 tar.
    Never 0, which means "no image".
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(vectors, dtype="<f2")
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, rounded), dtype=np.uint64, count=len(rounded))
    return np.where(hashes == 0, np.uint64(1), hashes).view(np.int64)


def text_ids(texts: Sequence[bytes]) -> np.ndarray:
    """int64 [N]: the ids of text records (UTF-8), which decide their split."""
    return np.array([content_id(text) for text in texts], dtype=np.int64)


def tar_headers(names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """uint8 [M, 512]: USTAR headers of regular files of `sizes` bytes: mode 0644, mtime 0, uid/gid 0, no owner."""
    assert max(map(len, names)) <= 100
    assert sizes.max() < 8**11
    headers = np.tile(_HEADER, (len(names), 1))
    headers[:, :100] = np.array(names, dtype="S100").view(np.uint8).reshape(-1, 100)
    headers[:, 124:135] = _octal(sizes, 11)
    sums = _HEADER[135:].sum(dtype=np.int64) + headers[:, :135].sum(axis=1, dtype=np.int64)
    headers[:, 148:154] = _octal(sums, 6)
    headers[:, 154:156] = 0, ord(" ")
    return headers


_HEADER = np.zeros(BLOCK_BYTES, np.uint8)
_FIELDS = {100: b"0000644", 108: b"0000000", 116: b"0000000", 136: b"0" * 11, 148: b" " * 8, 156: b"0"}
for _at, _text in _FIELDS.items():
    _HEADER[_at : _at + len(_text)] = np.frombuffer(_text, np.uint8)
_HEADER[257:265] = np.frombuffer(b"ustar\x0000", np.uint8)


def _octal(values: np.ndarray, digits: int) -> np.ndarray:
    """uint8 [M, digits]: each value in octal ASCII digits."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8)


def npy_header(dtype: np.dtype) -> bytes:
    """The header of an .npy file that holds one vector [V] of `dtype`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": (VECTOR_SIZE,)})
    return buffer.getvalue()


def tar_members(samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The members of samples, as they stand in a tar one after the other.

    Returns (bytes uint8 [size], where each text begins int64 [N], where the floats of each vector begin int64 [N]).
    """
    sizes = np.fromiter(map(len, samples.texts), np.int64, len(samples.texts))
    text_blocks = -(-sizes // BLOCK_BYTES)
    vectors = None if samples.vectors is None else _npy_files(samples.vectors)
    blocks = 1 + text_blocks + (0 if vectors is None else 1 + vectors.shape[1])
    begins = np.cumsum(blocks) - blocks
    data = np.zeros((int(blocks.sum()), BLOCK_BYTES), np.uint8)
    data[begins] = tar_headers([key + b".txt" for key in samples.keys], sizes)
    text_at = (begins + 1) * BLOCK_BYTES
    flat = data.reshape(-1)
    joined = np.frombuffer(b"".join(samples.texts), np.uint8)
    flat[np.repeat(text_at - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(joined))] = joined
    if samples.vectors is None or vectors is None:
        return flat, text_at, np.full(len(sizes), -1)
    at = begins + 1 + text_blocks
    header = len(npy_header(samples.vectors.dtype))
    size = header + samples.vectors[0].nbytes
    data[at] = tar_headers([key + b".npy" for key in samples.keys], np.full(len(sizes), size))
    data[at[:, None] + np.arange(1, 1 + vectors.shape[1])] = vectors
    return flat, text_at, (at + 1) * BLOCK_BYTES + header


def _npy_files(vectors: np.ndarray) -> np.ndarray:
    """uint8 [N, blocks, 512]: each vector as an .npy file, filled up to whole blocks."""
    header = np.frombuffer(npy_header(vectors.dtype), np.uint8)
    size = len(header) + vectors[0].nbytes
    blocks = -(-size // BLOCK_BYTES)
    files = np.zeros((len(vectors), blocks * BLOCK_BYTES), np.uint8)
    files[:, : len(header)] = header
    files[:, len(header) : size] = vectors.view(np.uint8)
    return files.reshape(-1, blocks, BLOCK_BYTES)

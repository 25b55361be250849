"""One sample <-> the members of a WebDataset tar: `SOURCE-ROW.txt` and, for pairs, `SOURCE-ROW.npy`.

Headers are plain USTAR with mtime 0 and no owner, so that the same input gives the same bytes.
Symbols: N samples, V width of a vision vector (768).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
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
class Sample:
    """A caption with its vector [V], or a text record (vector None)."""

    key: str
    text: str
    vector: np.ndarray | None


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


def sample_key(source: str, row: int) -> str:
    """`SOURCE-ROW`, ROW zero-padded to 9 digits: the key WebDataset groups members by."""
    return f"{source}-{row:09d}"


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
    return np.fromiter((content_id(row.data) for row in rounded), dtype=np.int64, count=len(rounded))


def text_id(text: str) -> int:
    """The id of a text record, which decides its split."""
    return content_id(text.encode("utf-8"))


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header block for a regular file of `size` bytes: mode 0644, mtime 0, uid/gid 0, no owner."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100
    assert size < 8**11
    head = encoded.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    tail = b"0" + bytes(100) + b"ustar\x0000"
    checksum = sum(head) + sum(tail) + 8 * 32
    return (head + b"%06o\0 " % checksum + tail).ljust(BLOCK_BYTES, b"\0")


def padding(size: int) -> bytes:
    """The zeros that fill a member of `size` bytes up to a whole block."""
    return bytes(-size % BLOCK_BYTES)


def npy_header(dtype: np.dtype) -> bytes:
    """The header of an .npy file that holds one vector [V] of `dtype`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": (VECTOR_SIZE,)})
    return buffer.getvalue()


def parse_npy(data: bytes, name: str) -> tuple[np.dtype, int]:
    """(dtype, bytes before the raw floats) of an .npy member that must hold one vector of V floats.

    Raises DataError naming the member when it is anything else; nothing is unpickled.
    """
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(buffer)
    except ValueError as error:
        raise DataError(f"{name}: not an .npy array ({error})") from None
    if dtype not in VECTOR_DTYPES.values() or int(np.prod(shape)) != VECTOR_SIZE:
        raise DataError(f"{name}: expected {VECTOR_SIZE} little-endian float16 or float32, found {dtype} {shape}")
    if len(data) != buffer.tell() + VECTOR_SIZE * dtype.itemsize:
        raise DataError(f"{name}: {len(data)} bytes do not match its own header {dtype} {shape}")
    return dtype, buffer.tell()


def to_members(sample: Sample, dtype: np.dtype) -> list[tuple[str, bytes]]:
    """The tar members (name, payload) of a sample, the vector stored as `dtype`."""
    members = [(f"{sample.key}.txt", sample.text.encode("utf-8"))]
    if sample.vector is not None:
        members.append((f"{sample.key}.npy", npy_header(dtype) + sample.vector.astype(dtype).tobytes()))
    return members


def from_members(key: str, members: Mapping[str, bytes]) -> Sample:
    """The sample of the payloads of `key` by extension ("txt", and "npy" for pairs).

    Raises DataError when the text is missing or not UTF-8, or the vector is not one of V floats.
    """
    if "txt" not in members:
        raise DataError(f"sample {key} has no .txt member")
    try:
        text = members["txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{key}.txt is not UTF-8 (byte {error.start})") from None
    if "npy" not in members:
        return Sample(key, text, None)
    dtype, start = parse_npy(members["npy"], f"{key}.npy")
    return Sample(key, text, np.frombuffer(members["npy"], dtype=dtype, offset=start))

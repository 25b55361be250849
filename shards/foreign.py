"""Indexes for any WebDataset tar: text from .txt, .caption or .json members, vectors from .npy or .npz.

PAX and GNU headers are read as well as USTAR. Nothing is unpickled.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal import isal_zlib

from shards.index import (
    ENCODED_VECTOR,
    JSON_TEXT,
    NO_VECTOR,
    PLAIN_TEXT,
    RAW_DTYPES,
    Counted,
    IndexBuilder,
    Members,
    decode_vector,
    index_path,
    parse_text,
)
from shards.record import BLOCK_BYTES, PICKLES, VECTOR_SIZE, DataError, image_id
from shards.tokenizer import TextTokenizer

TOKENIZE_BATCH = 2048
TEXT_KINDS = {"txt": PLAIN_TEXT, "caption": PLAIN_TEXT, "json": JSON_TEXT}
VECTOR_EXTENSIONS = ("npy", "npz")
KEY_OF_SOURCE = re.compile(r"(.+)-\d+")


@dataclass
class _Found:
    """Samples found so far and not yet handed to the builder."""

    keys: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)

    def flush(self, builder: IndexBuilder) -> None:
        if not self.keys:
            return
        names = sorted(set(self.sources))
        columns: dict[str, np.ndarray] = dict(zip(_COLUMNS, np.array(self.rows, np.int64).T, strict=True))
        columns["source"] = np.array([names.index(name) for name in self.sources])
        builder.add(Members(list(self.keys), list(self.texts), names, columns))
        for values in (self.keys, self.texts, self.sources, self.rows):
            values.clear()


_COLUMNS = ("text_offset", "text_size", "text_kind", "vector_offset", "vector_size", "vector_kind", "crc32", "image_id")


def build_index(tar: Path, tokenizer: TextTokenizer, target: Path | None = None) -> Counted:
    """Make the index of any WebDataset tar beside it, or at `target`.

    For a tar of our own writer the file is byte for byte the one the writer left. Raises DataError on a tar that is
    missing, truncated or damaged, or holds a member that cannot be used.
    """
    builder, found = IndexBuilder(tokenizer), _Found()
    try:
        with tarfile.open(tar, "r:") as archive:
            for key, group in _grouped(archive, tar):
                _note(archive, tar, key, group, found)
                if len(found.keys) == TOKENIZE_BATCH:
                    found.flush(builder)
        found.flush(builder)
    except tarfile.TarError as error:
        raise DataError(f"{tar} is not a whole tar ({error}): get the file again") from None
    except OSError as error:
        raise DataError(f"{tar}: {error.strerror or error}") from None
    final = index_path(tar) if target is None else target
    part = final.with_name(final.name + ".part")
    counted = builder.write(part, tar.stat().st_size)
    part.replace(final)
    return counted


def source_of(key: str, tar: Path) -> str:
    """The source of a sample: its key up to the last "-DIGITS", or the tar's name without digits at its end."""
    named = KEY_OF_SOURCE.fullmatch(key.rpartition("/")[2])
    return named[1] if named else re.sub(r"[-_.\d]+$", "", tar.stem) or tar.stem


def _grouped(archive: tarfile.TarFile, tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Consecutive members of one key: (key, {extension: member}); other extensions than ours are passed over."""
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
        extension = extension.lower()
        if f".{extension}".endswith(PICKLES):
            raise DataError(f"{tar}: {member.name} is a pickle, which can run code and is never opened: store .npy")
        if extension in (*TEXT_KINDS, *VECTOR_EXTENSIONS):
            if extension in group:
                raise DataError(f"{tar}: member {member.name} occurs twice in its sample")
            group[extension] = member
    if group:
        yield key, group
    with tar.open("rb") as stream:
        stream.seek(end)
        closing = stream.read(BLOCK_BYTES)
    if len(closing) < BLOCK_BYTES or any(closing):
        raise DataError(f"{tar} is truncated or damaged at byte {end}: get the file again")


def _note(archive: tarfile.TarFile, tar: Path, key: str, group: dict[str, tarfile.TarInfo], found: _Found) -> None:
    """Add one sample. Raises DataError when it has no text, or a text or vector that cannot be used."""
    extension = next((name for name in TEXT_KINDS if name in group), None)
    if extension is None:
        raise DataError(f"{tar}: sample {key} has no text: expected a member .txt, .caption or .json")
    member, kind = group[extension], TEXT_KINDS[extension]
    data = _payload(archive, member)
    text = parse_text(data, kind, f"{tar.name}: {member.name}")
    crc, image, place = isal_zlib.crc32(data), 0, (-1, 0, NO_VECTOR)
    text_place = (member.offset_data, len(data), kind)
    vectors = [group[name] for name in VECTOR_EXTENSIONS if name in group]
    if vectors:
        member = vectors[0]
        data = _payload(archive, member)
        image = image_id(decode_vector(data, f"{tar.name}: {member.name}"))
        start, size, stored = _locate_vector(data)
        crc = isal_zlib.crc32(data[start : start + size], crc)
        place = (member.offset_data + start, size, stored)
    found.keys.append(key.encode("utf-8", "replace"))
    found.texts.append(text)
    found.sources.append(source_of(key, tar))
    found.rows.append((*text_place, *place, crc, image))


def _locate_vector(data: bytes) -> tuple[int, int, int]:
    """(first byte, bytes, kind) of the vector in an .npy or .npz that decodes: raw floats where they lie there so."""
    stream = io.BytesIO(data)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(stream) as archive:
            info = archive.infolist()[0]
        if info.compress_type != zipfile.ZIP_STORED:
            return 0, len(data), ENCODED_VECTOR
        lengths = np.frombuffer(data, "<u2", count=2, offset=info.header_offset + 26)
        stream.seek(info.header_offset + 30 + int(lengths.sum()))
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = header(stream)
    for kind, raw in RAW_DTYPES.items():
        if dtype == raw:
            return stream.tell(), VECTOR_SIZE * raw.itemsize, kind
    return 0, len(data), ENCODED_VECTOR


def _payload(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None  # regular files only
    return stream.read()

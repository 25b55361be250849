"""Samples, ids and tar headers."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.record import (
    VECTOR_SIZE,
    DataError,
    Samples,
    image_id,
    image_ids,
    sample_key,
    sanitise_source,
    tar_headers,
    tar_members,
    text_ids,
)

MEMBERS = st.lists(
    st.tuples(st.text("abcXYZ019_-.", min_size=1, max_size=100), st.integers(0, 8**11 - 1)), min_size=1, max_size=5
)


@given(MEMBERS)
def test_headers_are_what_tarfile_writes(members: list[tuple[str, int]]) -> None:
    headers = tar_headers([name.encode() for name, _ in members], np.array([size for _, size in members]))
    for (name, size), header in zip(members, headers, strict=True):
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        read = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "strict")
        assert {**read.get_info(), "chksum": 0} == info.get_info()


@given(st.lists(st.one_of(st.text(max_size=80), st.text("é", min_size=250, max_size=1100)), min_size=1, max_size=6))
@pytest.mark.parametrize("dtype", [None, "<f2", "<f4"])
def test_members_are_what_tarfile_reads(dtype: str | None, texts: list[str]) -> None:
    keys = [sample_key("a", row) for row in range(len(texts))]
    vectors = None
    if dtype is not None:
        vectors = np.random.default_rng(0).standard_normal((len(texts), VECTOR_SIZE)).astype(dtype)
    data, text_at, vector_at = tar_members(Samples(keys, [text.encode() for text in texts], vectors))
    assert len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data.tobytes() + bytes(1024))) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert len(members) == len(texts) * (1 if vectors is None else 2)
    for row, text in enumerate(texts):
        key = keys[row].decode()
        assert members[f"{key}.txt"] == text.encode()
        assert data[text_at[row] :].tobytes().startswith(text.encode())
        if vectors is None:
            assert vector_at[row] == -1
        else:
            assert np.array_equal(np.load(io.BytesIO(members[f"{key}.npy"])), vectors[row])
            assert data[vector_at[row] : vector_at[row] + vectors[row].nbytes].tobytes() == vectors[row].tobytes()


def test_image_id_does_not_depend_on_the_stored_dtype() -> None:
    vector = np.random.default_rng(1).standard_normal(VECTOR_SIZE).astype("<f4")
    assert image_id(vector) == image_id(vector.astype("<f2")) == image_id(vector.astype("<f2").astype("<f4"))
    assert image_id(vector) != image_id(vector + 1)
    assert image_id(vector) != 0
    assert image_ids(np.stack([vector, vector + 1])).tolist() == [image_id(vector), image_id(vector + 1)]
    assert len(set(text_ids([b"a", b"b", b"a"]).tolist())) == 2


@pytest.mark.parametrize(("name", "source"), [("cc_3M", "cc_3M"), ("a.b c", "a_b_c"), ("x/../y", "x_y")])
def test_sources_are_sanitised(name: str, source: str) -> None:
    assert sanitise_source(name) == source


@pytest.mark.parametrize("name", ["", "...", "x" * 81, "pairs", "text"])
def test_unusable_source(name: str) -> None:
    with pytest.raises(DataError, match="source name"):
        sanitise_source(name)

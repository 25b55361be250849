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
    Sample,
    from_members,
    image_id,
    padding,
    parse_npy,
    sanitise_source,
    tar_header,
    text_id,
    to_members,
)


@given(st.text("abcXYZ019_-.", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_header_is_what_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    read = tarfile.TarInfo.frombuf(tar_header(name, size), "utf-8", "strict")
    assert {**read.get_info(), "chksum": 0} == info.get_info()


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_members_round_trip(dtype: str) -> None:
    vector = np.random.default_rng(0).standard_normal(VECTOR_SIZE).astype("<f4")
    members = to_members(Sample("a-000000001", "héllo\nworld", vector), np.dtype(dtype))
    back = from_members("a-000000001", {name.split(".")[1]: data for name, data in members})
    assert back.text == "héllo\nworld"
    assert back.vector is not None
    assert np.array_equal(back.vector, vector.astype(dtype))
    assert np.array_equal(np.load(io.BytesIO(members[1][1])), vector.astype(dtype))
    assert len(members[1][1] + padding(len(members[1][1]))) % 512 == 0


def test_image_id_does_not_depend_on_the_stored_dtype() -> None:
    vector = np.random.default_rng(1).standard_normal(VECTOR_SIZE).astype("<f4")
    assert image_id(vector) == image_id(vector.astype("<f2")) == image_id(vector.astype("<f2").astype("<f4"))
    assert image_id(vector) != image_id(vector + 1)
    assert image_id(vector) != 0
    assert text_id("a") != text_id("b")


@pytest.mark.parametrize(("name", "source"), [("cc_3M", "cc_3M"), ("a.b c", "a_b_c"), ("x/../y", "x_y")])
def test_sources_are_sanitised(name: str, source: str) -> None:
    assert sanitise_source(name) == source


@pytest.mark.parametrize("name", ["", "...", "x" * 81, "pairs", "text"])
def test_unusable_source(name: str) -> None:
    with pytest.raises(DataError, match="source name"):
        sanitise_source(name)


def test_wrong_members_are_refused() -> None:
    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()

    good = npy(np.zeros(VECTOR_SIZE, "<f4"))
    for bad in (b"no", npy(np.zeros(5, "<f4")), npy(np.zeros(VECTOR_SIZE)), good[:-1], npy(np.array([{}]))):
        with pytest.raises(DataError, match=r"k\.npy"):
            parse_npy(bad, "k.npy")
    with pytest.raises(DataError, match=r"no \.txt"):
        from_members("k", {"npy": good})
    with pytest.raises(DataError, match="not UTF-8"):
        from_members("k", {"txt": b"\xff"})

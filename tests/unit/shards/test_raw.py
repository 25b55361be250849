"""Raw files: what is found, what is refused, how text is cut."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.raw import TEXT_MEMBERS, Rejected, VectorFile, cut_records, open_raw, read_vectors
from shards.record import DataError
from tests.unit.shards.making import captions_of, vectors_of, write_pairs, write_zip

PIECES = st.sampled_from(
    ["a", "b c", " ", "\n", "\n\n", "\r\n", "\t", "\x85", "\u2028", "= = = H = = =", "w " * 300, "é"]
)


@given(st.lists(PIECES, max_size=40).map("".join))
def test_records_hold_every_word_in_order(text: str) -> None:
    records = [r for r in cut_records(text.encode().splitlines(keepends=True), "x") if isinstance(r, str)]
    assert " ".join(records).split() == text.split()
    for record in records:
        assert 0 < len(record.split()) <= 512
        lines = record.split("\n")
        assert all(line.strip() for line in lines)
        assert not any(line.strip() == "= = = H = = =" for line in lines[1:])
        assert lines[0] in text


def test_cuts_by_hand() -> None:
    text = "= = = T = = =\n\none two\nthree\n\nfour\n= = = U = = =\n" + "w " * 600 + "\nlast"
    records = list(cut_records(text.encode().splitlines(keepends=True), "x"))
    assert records[:3] == ["= = = T = = =\none two\nthree", "four", "= = = U = = ="]
    assert [len(str(r).split()) for r in records[3:]] == [512, 89]


def test_lines_that_are_not_utf8_are_rejected_with_their_number() -> None:
    records = list(cut_records([b"fine\n", b"b\xffd\n", b"more\n"], "x"))
    assert records == ["fine", Rejected("x", 1, "line 2 is not UTF-8 (byte 1)"), "more"]


def test_real_text_files_lose_no_word(raw_dir: Path) -> None:
    with zipfile.ZipFile(raw_dir / "train_50M.zip") as archive:
        for text in open_raw(raw_dir).texts:
            records = [r for r in text.records() if isinstance(r, str)]
            assert " ".join(records).split() == archive.read(text.member).decode().split()


def test_halves_read_as_one(tmp_path: Path) -> None:
    vectors = vectors_of(10, 10)
    write_pairs(tmp_path, "cc_3M", [{"caption": c} for c in captions_of(10)], vectors, cut=7)
    (pairs,) = open_raw(tmp_path).pairs
    rows = np.array([9, 0, 6, 7, 7])
    assert np.array_equal(pairs.vectors(rows), vectors[rows])
    assert list(pairs.records()) == captions_of(10)


@given(st.lists(st.integers(0, 11), max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_rows_of_any_order_and_number(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], sizes: list[int]
) -> None:
    vectors = vectors_of(20, sum(sizes))
    folder = tmp_path_factory.mktemp("vectors")
    parts = []
    for number, part in enumerate(np.split(vectors, np.cumsum(sizes)[:-1])):
        path = folder / f"{number}.npy"
        np.save(path, part)
        parts.append(VectorFile(path, path.stat().st_size - part.nbytes, len(part)))
    rows = np.array([row for row in wanted if row < len(vectors)], np.int64)
    assert np.array_equal(read_vectors(parts, rows), vectors[rows])


def test_a_vector_file_that_shrinks_is_told(tmp_path: Path) -> None:
    write_pairs(tmp_path, "cc", captions_of(4), vectors_of(4, 4))
    (pairs,) = open_raw(tmp_path).pairs
    os.truncate(tmp_path / "cc_dino_v2_states.npy", 5000)
    with pytest.raises(DataError, match=r"cc_dino_v2_states\.npy became shorter"):
        pairs.vectors(np.arange(4))


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        _ = [list(pairs.records()) for pairs in open_raw(directory).pairs]
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_and_misnamed_files(tmp_path: Path) -> None:
    refused(tmp_path / "none", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no raw data", "train_50M.zip")
    write_pairs(tmp_path / "a", "cc", captions_of(4), vectors_of(4, 4))
    (tmp_path / "a" / "cc_dino_v2_states.npy").rename(tmp_path / "a" / "cc_dino_v2_state.npy")
    refused(tmp_path / "a", "cc_dino_v2_states.npy is missing", "cc_captions.json is there", "cc_dino_v2_state.npy")
    write_pairs(tmp_path / "b", "cc", captions_of(4), vectors_of(4, 4))
    (tmp_path / "b" / "cc_captions.json").rename(tmp_path / "b" / "cc_caption.json")
    refused(tmp_path / "b", "cc_captions.json is missing", "cc_caption.json")
    write_pairs(tmp_path / "c", "cc", captions_of(4), vectors_of(4, 4), cut=2)
    (tmp_path / "c" / "cc_dino_v2_states_2of2.npy").unlink()
    refused(tmp_path / "c", "cc_dino_v2_states_2of2.npy is missing", "other half cc_dino_v2_states_1of2.npy")
    np.save(tmp_path / "c" / "cc_dino_v2_states.npy", vectors_of(4, 4))
    refused(tmp_path / "c", "both cc_dino_v2_states.npy and cc_dino_v2_states_1of2.npy")
    write_pairs(tmp_path / "d", "cc", captions_of(4), vectors_of(4, 4))
    (tmp_path / "d" / "train_50m.zip").write_bytes(b"")
    refused(tmp_path / "d", "train_50m.zip looks like raw data")
    write_pairs(tmp_path / "e", "childes", captions_of(4), vectors_of(4, 4))
    write_zip(tmp_path / "e", {})
    refused(tmp_path / "e", "two raw files", "'childes'")


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    write_pairs(tmp_path, "cc", captions_of(5), vectors_of(4, 4), cut=1)
    refused(tmp_path, "5 captions in cc_captions.json but 4 vectors", "1 in cc_dino_v2_states_1of2.npy + 3 in")
    path = tmp_path / "cc_dino_v2_states_2of2.npy"
    np.save(path, np.zeros((4, 512), "f4"))
    refused(tmp_path, "cc_dino_v2_states_2of2.npy has shape (4, 512)", "(N, 768)")
    np.save(path, np.zeros((4, 768), "f8"))
    refused(tmp_path, "has dtype <f8", "float32")
    np.save(path, np.array([{}]), allow_pickle=True)
    refused(tmp_path, "not a whole .npy file")
    np.save(path, np.asfortranarray(vectors_of(4, 4)))
    refused(tmp_path, "lies in Fortran order")
    np.save(path, vectors_of(4, 4))
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "cc_dino_v2_states_2of2.npy is not a whole .npy file")
    path.write_bytes(b"")
    refused(tmp_path, "cc_dino_v2_states_2of2.npy is not a whole .npy file")


@pytest.mark.parametrize("data", [b'["a", ', b"\xff\xfe\xfa", b'{"a": 1}', b"[]", b""])
def test_bad_captions_file(tmp_path: Path, data: bytes) -> None:
    write_pairs(tmp_path, "cc", captions_of(4), vectors_of(4, 4))
    (tmp_path / "cc_captions.json").write_bytes(data)
    refused(tmp_path, "cc_captions.json")


def test_bad_archives(tmp_path: Path) -> None:
    path = tmp_path / "train_50M.zip"
    path.write_bytes(b"PK no zip")
    refused(tmp_path, "train_50M.zip is not a whole zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/childes.train", "a")
        archive.writestr("x/bnc_spoken.txt", "a")
    refused(tmp_path, "lacks bnc_spoken.train", "bnc_spoken.txt")
    write_zip(tmp_path, {"childes": b"a b c d e f\n" * 500})
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("childes.train").header_offset + 30 + len("childes.train") + 10
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    (childes,) = [text for text in open_raw(tmp_path).texts if text.source == "childes"]
    with pytest.raises(DataError, match=r"childes\.train is damaged"):
        list(childes.records())


def test_only_pairs_or_only_text_will_do(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p", "cc", captions_of(4), vectors_of(4, 4))
    write_zip(tmp_path / "t", {}, folder="some/folder/")
    assert not open_raw(tmp_path / "p").texts
    assert [text.source for text in open_raw(tmp_path / "t").texts] == list(TEXT_MEMBERS)
    assert not open_raw(tmp_path / "t").generated
    (tmp_path / "t" / "GENERATED.md").write_text("x")
    assert open_raw(tmp_path / "t").generated
    assert json.loads((tmp_path / "p" / "cc_captions.json").read_text())

"""Indexes: rebuilt equal to written, foreign tars, damage."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.index import ShardReader, build_index, check_header, index_path
from shards.record import VECTOR_SIZE, DataError, image_id
from shards.tokenizer import TextTokenizer
from tests.unit.shards.making import tree


def first_tar(directory: Path, pattern: str, to: Path) -> tuple[Path, TextTokenizer]:
    tar = sorted(directory.glob(pattern))[0]
    shutil.copy(tar, to)
    shutil.copytree(index_path(tar), to / index_path(tar).name)
    return to / tar.name, TextTokenizer(directory / "tokenizer.json")


def test_rebuilt_index_is_byte_identical(shard_dir: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(shard_dir / "tokenizer.json")
    for tar in sorted(shard_dir.glob("*.tar")):
        (tmp_path / tar.name).hardlink_to(tar) if tar.stat().st_dev == tmp_path.stat().st_dev else shutil.copy(
            tar, tmp_path
        )
        build_index(tmp_path / tar.name, tokenizer)
        assert tree(index_path(tmp_path / tar.name)) == tree(index_path(tar)), tar.name


def test_foreign_tar_with_pax_headers_folders_and_other_members(small_dir: Path, tmp_path: Path) -> None:
    vector = np.random.default_rng(0).standard_normal((1, VECTOR_SIZE)).astype("<f4")
    buffer = io.BytesIO()
    np.save(buffer, vector)
    tar = tmp_path / "foreign.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("d/ü-1.jpg", b"x"), ("d/ü-1.npy", buffer.getvalue()), ("d/ü-1.txt", b"a b")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            archive.addfile(info, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("d/b.txt"), io.BytesIO())
    tokenizer = TextTokenizer(small_dir / "tokenizer.json")
    assert build_index(tar, tokenizer)["samples"] == 2
    reader = ShardReader(tar, tokenizer.sha256)
    out = np.zeros(VECTOR_SIZE, np.float32)
    assert reader.copy_vector(0, out)
    assert np.array_equal(out, vector[0])
    assert not reader.copy_vector(1, out)
    assert (reader.key(0), reader.text(0), reader.words.tolist()) == ("d/ü-1", "a b", [2, 0])
    assert reader.image_id.tolist() == [image_id(vector), 0]
    assert len(reader.damaged()) == 0


def test_truncated_and_damaged_tars_are_refused(small_dir: Path, tmp_path: Path) -> None:
    tar, tokenizer = first_tar(small_dir, "flickr-train*.tar", tmp_path)
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    damaged_header = bytearray(whole)
    damaged_header[members[4].offset + 3] ^= 1
    cuts = [whole[: members[5].offset], whole[: members[5].offset_data + 10], b"", b"nothing", bytes(damaged_header)]
    for data in cuts:
        tar.write_bytes(data)
        with pytest.raises(DataError, match=tar.name):
            build_index(tar, tokenizer)
        if len(data) != len(whole):
            with pytest.raises(DataError, match="truncated or changed"):
                check_header(tar)
    with pytest.raises(DataError, match="No such file"):
        build_index(tmp_path / "none.tar", tokenizer)


def test_damage_is_found_sample_by_sample_and_in_the_index(small_dir: Path, tmp_path: Path) -> None:
    tar, tokenizer = first_tar(small_dir, "flickr-train*.tar", tmp_path)
    reader = ShardReader(tar)
    data = bytearray(tar.read_bytes())
    data[int(reader.columns["vector_offset"][3]) + 100] ^= 4
    data[int(reader.columns["text_offset"][7])] ^= 1
    tar.write_bytes(bytes(data))
    assert ShardReader(tar).damaged().tolist() == [3, 7]
    with pytest.raises(DataError, match="another tokenizer"):
        ShardReader(tar, "0" * 64)
    tokens = index_path(tar) / "tokens.npy"
    flipped = bytearray(tokens.read_bytes())
    flipped[-1] ^= 1
    tokens.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="is damaged"):
        ShardReader(tar).damaged()
    tokens.write_bytes(bytes(flipped[:-100]))
    with pytest.raises(DataError, match=r"tokens\.npy is missing or damaged"):
        ShardReader(tar)
    assert build_index(tar, tokenizer)["samples"] == len(reader)

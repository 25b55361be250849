"""Indexes: rebuilt equal to written, foreign tars, damage."""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards import index as index_module
from shards.foreign import build_index
from shards.index import ShardReader, check_header, index_path
from shards.record import VECTOR_SIZE, DataError, image_id
from shards.tokenizer import TextTokenizer


def first_tar(directory: Path, pattern: str, to: Path) -> tuple[Path, TextTokenizer]:
    tar = sorted(directory.glob(pattern))[0]
    shutil.copy(tar, to)
    shutil.copy(index_path(tar), to)
    return to / tar.name, TextTokenizer(directory / "tokenizer.json")


@pytest.mark.slow
def test_rebuilt_index_is_byte_identical(shard_dir: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(shard_dir / "tokenizer.json")
    for tar in sorted(shard_dir.glob("*.tar")):
        (tmp_path / tar.name).hardlink_to(tar) if tar.stat().st_dev == tmp_path.stat().st_dev else shutil.copy(
            tar, tmp_path
        )
        build_index(tmp_path / tar.name, tokenizer)
        assert index_path(tmp_path / tar.name).read_bytes() == index_path(tar).read_bytes(), tar.name


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
    assert build_index(tar, tokenizer).total("samples") == 2
    reader = ShardReader(tar, tokenizer.sha256)
    found = reader.vector(0)
    assert found is not None
    assert np.array_equal(found, vector[0])
    assert reader.vector(1) is None
    assert (reader.key(0), reader.text(0), reader.columns["words"].tolist()) == ("d/ü-1", "a b", [2, 0])
    assert reader.columns["image_id"].tolist() == [image_id(vector), 0]
    assert [reader.sources[i] for i in reader.columns["source"].tolist()] == ["ü", "foreign"]
    assert len(reader.damaged()) == 0


def test_truncated_and_damaged_tars_are_refused(small_dir: Path, tmp_path: Path) -> None:
    tar, tokenizer = first_tar(small_dir, "pairs-train*.tar", tmp_path)
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


@pytest.mark.parametrize("together", [(256, 4 << 20), (3, 4 << 20), (3, 5000)])
def test_damage_is_found_however_many_samples_are_read_together(
    small_dir: Path, tmp_path: Path, together: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flipped bits at random places, and bytes that are gone while the shard is open."""
    monkeypatch.setattr(index_module, "TOGETHER", together[0])
    monkeypatch.setattr(index_module, "TOGETHER_BYTES", together[1])
    tar, _ = first_tar(small_dir, "pairs-train*.tar", tmp_path)
    whole, reader, rng = tar.read_bytes(), ShardReader(tar), np.random.default_rng(0)
    for _ in range(20):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=5).tolist():
            data[at] ^= 1 << int(rng.integers(8))
        tar.write_bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.3 else data)
        read = tar.read_bytes()
        wanted = []
        for sample in range(len(reader)):
            crc = 0
            for what in ("text", "vector"):
                start, size = (int(reader.columns[f"{what}_{name}"][sample]) for name in ("offset", "size"))
                crc = zlib.crc32(read[start : start + size], crc)
            if crc != reader.columns["crc32"][sample]:
                wanted.append(sample)
        assert reader.damaged().tolist() == wanted


def test_damage_is_found_sample_by_sample_and_in_the_index(small_dir: Path, tmp_path: Path) -> None:
    tar, tokenizer = first_tar(small_dir, "pairs-train*.tar", tmp_path)
    reader = ShardReader(tar)
    data = bytearray(tar.read_bytes())
    data[int(reader.columns["vector_offset"][3]) + 100] ^= 4
    data[int(reader.columns["text_offset"][7])] ^= 1
    tar.write_bytes(bytes(data))
    assert ShardReader(tar).damaged().tolist() == [3, 7]
    with pytest.raises(DataError, match="another tokenizer"):
        ShardReader(tar, "0" * 64)
    index = index_path(tar)
    whole = index.read_bytes()
    at = whole.find(b"words.npy") + 200
    index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match="is missing or damaged"):
        ShardReader(tar)
    index.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="is missing or damaged"):
        ShardReader(tar)
    assert build_index(tar, tokenizer).total("samples") == len(reader)


def webdataset_tar(tar: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as others write it."""
    with tarfile.open(tar, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return tar


def saved(save: Callable[..., None], *arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays)
    return buffer.getvalue()


def test_every_kind_of_text_and_vector_is_read(small_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((6, VECTOR_SIZE)).astype("<f2").astype("<f4")
    stored = {
        "npy": [saved(np.save, vectors[0].astype("<f2")), saved(np.save, vectors[1]), saved(np.save, vectors[2] * 1.0)],
        "npz": [saved(np.savez, vectors[3]), saved(np.savez_compressed, vectors[4])],
    }
    stored["npy"].append(saved(np.save, vectors[5].astype(">f4")))
    texts = {"txt": b"a b", "caption": b"c d", "json": b'{"caption": "e f", "width": 3}'}
    members, order = [], [("npy", 0), ("npy", 1), ("npy", 2), ("npz", 0), ("npz", 1), ("npy", 3)]
    for at, (kind, number) in enumerate(order):
        extension = list(texts)[at % 3]
        members += [(f"x-{at}.{extension}", texts[extension]), (f"x-{at}.{kind}", stored[kind][number])]
    tar = webdataset_tar(tmp_path / "theirs.tar", members)
    tokenizer = TextTokenizer(small_dir / "tokenizer.json")
    build_index(tar, tokenizer)
    reader = ShardReader(tar, tokenizer.sha256)
    assert reader.columns["vector_kind"].tolist() == [1, 2, 2, 2, 3, 3]
    assert [reader.text(at) for at in range(6)] == ["a b", "c d", "e f"] * 2
    for at in range(6):
        assert np.array_equal(reader.vector(at), vectors[at])  # type: ignore[arg-type]
    assert reader.columns["image_id"].tolist() == [image_id(vector) for vector in vectors]
    assert not len(reader.damaged())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x-0.pth", b"\x80\x04.", "is a pickle, which can run code"),
        ("x-0.npy", saved(np.save, np.zeros(3, "<f4")), "expected one vector of 768 floats"),
        ("x-0.npy", saved(np.save, np.array([{}])), "Object arrays cannot be loaded"),
        ("x-0.npz", b"PK nothing", "the vector is no .npy or .npz array"),
        ("x-0.txt", b"twice", "occurs twice in its sample"),
    ],
)
def test_members_that_cannot_be_used_are_named(
    name: str, data: bytes, message: str, small_dir: Path, tmp_path: Path
) -> None:
    tar = webdataset_tar(tmp_path / "theirs.tar", [("x-0.txt", b"a"), (name, data)])
    with pytest.raises(DataError, match=message) as refusal:
        build_index(tar, TextTokenizer(small_dir / "tokenizer.json"))
    assert tar.name in str(refusal.value)
    assert not list(tmp_path.glob("*.npz*"))

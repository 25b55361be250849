"""tools/check_shards.py: faults are named, and tars that others wrote train."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.index import ShardReader
from shards.loader import Loader, PhaseSpec, Shape, ShardSet
from shards.record import VECTOR_SIZE, image_id
from tests.support.runs import run_tool


def test_whole_shards_pass(tiny_shards: Path) -> None:
    done = run_tool("check_shards.py", tiny_shards)
    assert (done.returncode, done.stdout) == (0, "every shard is whole\n")


def test_each_damaged_sample_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    tar = next(shards.glob("pairs-train-*.tar"))
    reader = ShardReader(tar)
    content = bytearray(tar.read_bytes())
    for sample, column in ((2, "vector_offset"), (5, "text_offset")):
        content[int(reader.columns[column][sample])] ^= 1
    tar.write_bytes(content)
    next(shards.glob("text-train-*.index.npz")).unlink()
    (shards / "lengths.npy").write_bytes(b"")
    done = run_tool("check_shards.py", shards)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line for line in lines if "is damaged" in line] == [
        f"{tar}: sample {reader.key(sample)} is damaged" for sample in (2, 5)
    ]
    assert f"{shards / 'lengths.npy'}: its checksum is not the manifest's" in lines
    assert any(line.endswith(".index.npz: missing") for line in lines)
    assert lines[-1] == "4 fault(s)"


@pytest.mark.parametrize("what", ["empty", "no tokenizer"])
def test_a_folder_that_cannot_be_checked(what: str, tmp_path: Path) -> None:
    if what == "no tokenizer":
        (tmp_path / "a.tar").write_bytes(b"")
    arguments = [tmp_path, "--rebuild-index"] if what == "no tokenizer" else [tmp_path]
    done = run_tool("check_shards.py", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


def test_tars_that_others_wrote_train_unchanged(tiny_shards: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, VECTOR_SIZE)).astype("<f4")
    shards = tmp_path / "theirs"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"coco-{number}.tar", "w") as archive:
            for at in range(20):
                vector = io.BytesIO()
                np.save(vector, vectors[20 * number + at])
                members = {"caption": f"a dog number {at}".encode(), "npy": vector.getvalue(), "jpg": b"no picture"}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{20 * number + at:06d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    before = {tar.name: tar.read_bytes() for tar in shards.glob("*.tar")}
    done = run_tool("check_shards.py", shards, "--rebuild-index", "--tokenizer", tiny_shards / "tokenizer.json")
    assert done.returncode == 0, done.stderr
    assert {tar.name: tar.read_bytes() for tar in shards.glob("*.tar")} == before
    phases = [PhaseSpec("p", {"coco": 1}, epochs=1)]
    loader = Loader(ShardSet.open(shards), phases, seed=0, shape=Shape(8, 32), micro_batch=8, rank=0, world=1)
    ids = [i for _, (rows,) in loader for i in rows.image_ids[rows.valid].tolist()]
    assert sorted(ids) == sorted(image_id(vector) for vector in vectors)

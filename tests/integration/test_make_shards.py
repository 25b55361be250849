"""The tools as a person runs them, and the shards as stock WebDataset reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from shards.raw import open_raw
from shards.record import VECTOR_SIZE
from tests.unit.shards.making import REAL_RAW, tree

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "raw"
    assert run("make_demo_data.py", "--out", out, "--images", 400, "--words", 20_000).returncode == 0
    return out


@pytest.fixture(scope="module")
def converted(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(raw, shards): of the real raw files when they are there."""
    raw = REAL_RAW if REAL_RAW.is_dir() else demo
    print(f"raw data: {'the real test set' if raw == REAL_RAW else 'GENERATED'}")
    out = tmp_path_factory.mktemp("made") / "shards"
    done = run("make_shards.py", "--raw", raw, "--out", out, "--samples-per-shard", 1000)
    assert done.returncode == 0, done.stderr
    assert "manifest.json: written" in done.stdout
    return raw, out


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to the garbage collector
def test_stock_webdataset_reads_every_shard_and_finds_the_raw_contents(converted: tuple[Path, Path]) -> None:
    raw_dir, out = converted
    raw = open_raw(raw_dir)
    texts = {item.source: list(item.records()) for item in (*raw.pairs, *raw.texts)}
    vectors = {item.source: item.vectors(np.arange(len(item))).astype("<f2") for item in raw.pairs}
    seen: set[str] = set()
    for tar in sorted(out.glob("*.tar")):
        samples: Any = WebDataset(str(tar), shardshuffle=False, empty_check=False).decode()
        for sample in samples:
            source, row = sample["__key__"].rsplit("-", 1)
            assert sample["__key__"] not in seen
            seen.add(sample["__key__"])
            assert sample["txt"] == texts[source][int(row)]
            if source not in vectors:
                assert "npy" not in sample
            else:
                assert sample["npy"].dtype == np.float16
                assert np.array_equal(sample["npy"], vectors[source][int(row)])
    assert len(seen) == sum(map(len, texts.values()))


def test_tars_are_plain_and_anonymous(converted: tuple[Path, Path]) -> None:
    with tarfile.open(next(iter(sorted(converted[1].glob("*-train-*.tar"))))) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert not member.pax_headers


@pytest.mark.slow
def test_a_second_run_reuses_and_a_third_process_makes_the_same(converted: tuple[Path, Path], tmp_path: Path) -> None:
    raw, out = converted
    again = run("make_shards.py", "--raw", raw, "--out", out, "--samples-per-shard", 1000)
    assert (again.returncode, "already there" in again.stdout) == (0, True)
    run("make_shards.py", "--raw", raw, "--out", tmp_path / "new", "--samples-per-shard", 1000)
    assert tree(tmp_path / "new") == tree(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw", "/nowhere"], "raw directory /nowhere does not exist"),
        (["--vocab-size", "10"], "--vocab-size 10 is too small"),
        (["--validation-fraction", "2"], "--validation-fraction must be"),
        (["--tokenizer", "/nowhere.json"], "tokenizer /nowhere.json"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(demo: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("make_shards.py", "--raw", demo, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_demo_data_is_deterministic_reused_and_marked(demo: Path, tmp_path: Path) -> None:
    arguments = ["--images", 400, "--words", 20_000]
    assert run("make_demo_data.py", "--out", tmp_path / "b", *arguments).returncode == 0
    assert tree(tmp_path / "b") == tree(demo)
    assert "already there" in run("make_demo_data.py", "--out", demo, *arguments).stdout
    other = run("make_demo_data.py", "--out", demo, "--images", 50)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert run("make_demo_data.py", "--out", tmp_path / "c", "--images", 1).returncode == 2
    assert not (tmp_path / "c").exists()
    made = run("make_shards.py", "--raw", demo, "--out", tmp_path / "shards")
    assert "GENERATED" in made.stdout
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["generated"]


def test_demo_vectors_look_like_dinov2_and_explain_the_captions(demo: Path) -> None:
    (pairs,) = [pairs for pairs in open_raw(demo).pairs if pairs.source == "local_narr"]
    vectors = pairs.vectors(np.arange(len(pairs)))
    assert vectors.shape == (300, VECTOR_SIZE)
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(48, abs=0.5)
    assert vectors.std() == pytest.approx(1.74, abs=0.05)
    assert len(np.unique(vectors, axis=0)) == 100
    snowy = np.array(["snowy" in str(caption) for caption in pairs.records()])
    (large,) = [item for item in open_raw(demo).pairs if item.source == "cc_3M"]
    told = np.array(["snowy" in str(caption) for caption in large.records()])
    other = large.vectors(np.arange(len(large)))
    direction = other[told].mean(axis=0) - other[~told].mean(axis=0)
    scores = vectors @ direction
    assert scores[snowy].mean() > scores[~snowy].mean() + scores.std()

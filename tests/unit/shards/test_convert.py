"""Conversion: determinism, split, reuse, rejection, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shards import convert as convert_module
from shards.convert import in_validation
from shards.index import index_path, load_columns
from shards.raw import open_raw
from shards.record import DataError, image_ids
from shards.tokenizer import TextTokenizer
from shards.writer import Options
from tests.unit.shards.making import captions_of, make, small_raw, text_of, tree, vectors_of, write_pairs, write_zip


def test_two_conversions_give_the_same_bytes(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(small_raw_dir, tmp_path / "elsewhere")
    make(tmp_path / "elsewhere", tmp_path / "out", samples_per_shard=50)
    assert tree(tmp_path / "out") == tree(small_dir)
    make(small_raw_dir, tmp_path / "other", samples_per_shard=50, shuffle_seed=1)
    names = [name for name, data in tree(tmp_path / "other").items() if data != tree(small_dir).get(name)]
    assert any(name.startswith("flickr-train") for name in names)
    assert not any(name.startswith("childes") and name.endswith(".tar") for name in names)


def test_images_never_straddle_the_split(small_raw_dir: Path, small_dir: Path) -> None:
    manifest = json.loads((small_dir / "manifest.json").read_text())
    ids: dict[str, set[int]] = {"train": set(), "validation": set()}
    samples = 0
    for entry in manifest["shards"]:
        if entry["modality"] == "pairs":
            found = load_columns(index_path(small_dir / entry["file"]), ["image_id"])
            ids[entry["split"]] |= set(found["image_id"].tolist())
            samples += entry["samples"]
    assert not ids["train"] & ids["validation"]
    assert samples == sum(len(pairs) for pairs in open_raw(small_raw_dir).pairs)
    assert len(ids["train"] | ids["validation"]) == 66
    assert ids["validation"]


def test_split_fractions() -> None:
    ids = image_ids(vectors_of(3000, 3000))
    assert 0.04 < in_validation(ids, 0.05).mean() < 0.06
    assert not in_validation(ids, 0.0).any()


def test_manifest_tells_the_truth(small_raw_dir: Path, small_dir: Path) -> None:
    manifest = json.loads((small_dir / "manifest.json").read_text())
    totals = {
        name: sum(manifest["totals"][split][name] for split in manifest["totals"]) for name in ("words", "samples")
    }
    raw = open_raw(small_raw_dir)
    words = sum(len((pairs.caption(i) or "").split()) for pairs in raw.pairs for i in range(len(pairs)))
    records = [record for text in raw.texts for record in text.records() if isinstance(record, str)]
    assert totals["words"] == words + sum(len(record.split()) for record in records)
    assert totals["samples"] == sum(len(pairs) for pairs in raw.pairs) + len(records)
    tokenizer = TextTokenizer(small_dir / "tokenizer.json")
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert str(small_dir) not in (small_dir / "manifest.json").read_text()
    assert max(entry["samples"] for entry in manifest["shards"]) == 50
    assert (small_dir / "rejected.jsonl").read_text() == ""


def test_the_tokenizer_sees_the_train_split_only(small_raw_dir: Path, tmp_path: Path, small_dir: Path) -> None:
    seen: list[str] = []

    def spy(texts: object, size: int) -> str:
        seen.extend(texts)  # type: ignore[arg-type]
        return (small_dir / "tokenizer.json").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "train_tokenizer", spy)
        manifest = make(small_raw_dir, tmp_path / "out")
    assert len(seen) == manifest["totals"]["train"]["samples"]
    assert sum(len(text.split()) for text in seen) == manifest["totals"]["train"]["words"]


def test_reuse_refusal_and_force(small_raw_dir: Path, tmp_path: Path) -> None:
    raw = small_raw(tmp_path / "raw")
    out = tmp_path / "out"
    make(raw, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    make(raw, out)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="choose another --out, or pass --force"):
        make(raw, out, vocab_size=400)
    write_pairs(raw, "flickr", captions_of(180, 9), vectors_of(60, 180), cut=100)
    with pytest.raises(DataError, match="other raw files or options"):
        make(raw, out)
    make(raw, out, force=True)
    assert (out / "manifest.json").stat().st_mtime_ns != stamp
    next(out.glob("flickr-train*.tar")).unlink()
    with pytest.raises(DataError, match="is missing or changed: pass --force"):
        make(raw, out)
    make(raw, out, force=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("x")
    for force in (False, True):
        with pytest.raises(DataError, match="holds no shards of ours"):
            make(raw, foreign, force=force)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out", "raw"]


def test_a_given_tokenizer_is_used(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    manifest = make(small_raw_dir, tmp_path / "out", tokenizer=small_dir / "tokenizer.json", samples_per_shard=50)
    theirs, ours = tree(small_dir), tree(tmp_path / "out")
    assert {n for n in ours if ours[n] != theirs[n]} == {"manifest.json"}
    assert manifest["options"]["tokenizer"] == manifest["tokenizer"]["sha256"]


def test_bad_samples_are_rejected_listed_and_limited(tmp_path: Path) -> None:
    captions: list[object] = list(captions_of(40))
    captions[3], captions[4], captions[5], captions[6] = "  ", 7, {"text": "x"}, "\ud800"
    vectors = vectors_of(40, 40)
    vectors[10, 5], vectors[11, 6], vectors[12, 7] = np.nan, np.inf, 1e6
    write_pairs(tmp_path / "raw", "cc", captions, vectors)
    write_zip(tmp_path / "raw", {"childes": b"one two\n\nb\xffd line\n\nthree\n"})
    with pytest.raises(DataError, match=r"8 of 48 samples rejected, more than") as caught:
        make(tmp_path / "raw", tmp_path / "out")
    assert "mend the raw files or raise" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    manifest = make(tmp_path / "raw", tmp_path / "out", max_reject_fraction=0.2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["source"], line["row"]) for line in lines] == [
        *[("cc", row) for row in (3, 4, 5, 6, 10, 11, 12)],
        ("childes", 1),
    ]
    assert manifest["rejected"]["total"] == 8
    assert manifest["rejected"]["by_source"]["childes"] == {"not UTF-8": 1}
    assert manifest["rejected"]["by_source"]["cc"]["vector overflows float16: use --vector-dtype float32"] == 1
    wide = make(tmp_path / "raw", tmp_path / "wide", max_reject_fraction=0.2, vector_dtype="float32")
    assert wide["rejected"]["total"] == 7


def test_a_source_without_one_usable_sample_stops(tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw", "cc", captions_of(3), np.full((3, 768), np.nan, "<f4"))
    with pytest.raises(DataError, match="source cc has no usable sample"):
        make(tmp_path / "raw", tmp_path / "out", max_reject_fraction=1.0)
    write_zip(tmp_path / "text", {"childes": b"\n \n"})
    with pytest.raises(DataError, match="source childes has no usable sample"):
        make(tmp_path / "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(
    small_raw_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_write_texts", stop)
    with pytest.raises(KeyboardInterrupt):
        make(small_raw_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_conversion_are_cleared(small_raw_dir: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.part" / "x.index").mkdir(parents=True)
    (tmp_path / ".out.part" / "x.tar").write_text("half")
    make(small_raw_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "x.tar").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_text_or_only_pairs(tmp_path: Path) -> None:
    write_zip(tmp_path / "text", {"childes": text_of(3000).encode()})
    assert {e["modality"] for e in make(tmp_path / "text", tmp_path / "a")["shards"]} == {"text"}
    write_pairs(tmp_path / "pairs", "cc", captions_of(30), vectors_of(30, 30))
    (tmp_path / "pairs" / "GENERATED.md").write_text("made up")
    manifest = make(tmp_path / "pairs", tmp_path / "b")
    assert {e["modality"] for e in manifest["shards"]} == {"pairs"}
    assert manifest["generated"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard must be >= 1, got 0"),
        ({"validation_fraction": 1.0}, "--validation-fraction must be from 0 to below 1"),
        ({"validation_fraction": float("nan")}, "--validation-fraction"),
        ({"vector_dtype": "float64"}, "--vector-dtype must be float16 or float32, got float64"),
        ({"max_reject_fraction": -1}, "--max-reject-fraction"),
        ({"shuffle_seed": -1}, "--shuffle-seed"),
        ({"vocab_size": 500, "tokenizer": Path("x")}, "exclude each other"),
    ],
)
def test_options_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Options(**settings)

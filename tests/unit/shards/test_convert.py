"""Conversion: determinism, split, reuse, rejection, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import convert as convert_module
from shards.blocks import in_validation, rounding_error
from shards.convert import convert
from shards.division import Division
from shards.index import index_path, load_columns
from shards.raw import open_raw
from shards.record import DataError, image_ids
from shards.tokenizer import TextTokenizer
from shards.workplace import Part
from shards.writer import Options
from tests.unit.shards.making import (
    captions_of,
    make,
    silent,
    small_raw,
    text_of,
    tree,
    vectors_of,
    write_pairs,
    write_zip,
)


def test_two_conversions_give_the_same_bytes(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(small_raw_dir, tmp_path / "elsewhere")
    make(tmp_path / "elsewhere", tmp_path / "out", samples_per_shard=50)
    assert tree(tmp_path / "out") == tree(small_dir)
    make(small_raw_dir, tmp_path / "other", samples_per_shard=50, shuffle_seed=1)
    names = [name for name, data in tree(tmp_path / "other").items() if data != tree(small_dir).get(name)]
    assert {name.split("-")[0] for name in names if name.endswith(".tar")} == {"pairs", "text"}
    assert "tokenizer.json" not in names  # it is trained before anything is shuffled


def test_processes_and_parts_make_the_same_bytes(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    make(small_raw_dir, tmp_path / "two", samples_per_shard=50, jobs=2)
    assert tree(tmp_path / "two") == tree(small_dir)
    out = tmp_path / "parts"
    options = Options(samples_per_shard=50, validation_fraction=0.2)
    for number in (3, 1):
        done = convert(small_raw_dir, out, options, part=Part(number, 3), report=silent)
        assert done.manifest is None
        assert done.missing > 0
        assert not out.exists()
    assert convert(small_raw_dir, out, options, part=Part(2, 3), report=silent).manifest is not None
    assert tree(out) == tree(small_dir)
    assert not convert(small_raw_dir, out, options, part=Part(1, 3), report=silent).made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "two"]


def test_a_shard_holds_the_records_of_its_division_from_all_sources(small_raw_dir: Path, small_dir: Path) -> None:
    raw = open_raw(small_raw_dir)
    for modality, items in (("pairs", raw.pairs), ("text", raw.texts)):
        numbering = [f"{item.source}-{row:09d}" for item in items for row in range(len(list(item.records())))]
        division = Division(len(numbering), 50, 0, modality)
        mixed = 0
        for number in range(len(division)):
            block = [numbering[record] for record in division.block(number).tolist()]
            held = {}
            for split in ("train", "validation"):
                tar = small_dir / f"{modality}-{split}-{number:05d}.tar"
                if tar.exists():
                    held |= dict.fromkeys(k.decode() for k in load_columns(index_path(tar), ["keys"])["keys"].tolist())
                    sources = [name.decode() for name in load_columns(index_path(tar), ["sources"])["sources"].tolist()]
                    assert sources == sorted({key.rpartition("-")[0] for key in held} & set(sources))
                    mixed += len(sources) > 1
                    keys = load_columns(index_path(tar), ["keys"])["keys"].tolist()
                    assert keys == [key.encode() for key in block if key.encode() in set(keys)]  # the block's order
            assert set(held) == set(block)
        assert mixed > len(division)


def test_a_rejected_record_leaves_a_gap_and_moves_nothing(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(small_raw_dir, tmp_path / "raw")
    captions = json.loads((raw / "flickr_captions.json").read_text())
    captions[17] = ""
    (raw / "flickr_captions.json").write_text(json.dumps(captions))
    settings = {"samples_per_shard": 50, "tokenizer": small_dir / "tokenizer.json", "max_reject_fraction": 0.1}
    make(raw, tmp_path / "out", **settings)
    make(small_raw_dir, tmp_path / "whole", **settings)
    gone = []
    for tar in sorted((tmp_path / "whole").glob("*.tar")):
        keys = load_columns(index_path(tar), ["keys"])["keys"].tolist()
        left = load_columns(index_path(tmp_path / "out" / tar.name), ["keys"])["keys"].tolist()
        gone += [key for key in keys if key not in left]
        assert left == [key for key in keys if key in left]
    assert gone == [b"flickr-000000017"]


@given(st.lists(st.floats(-70_000, 70_000, width=32), min_size=1, max_size=40), st.floats(0, 40, width=32))
def test_the_largest_rounding_error_is_that_of_all_numbers(numbers: list[float], known: float) -> None:
    raw = np.array(numbers, "<f4").reshape(-1, 1)
    with np.errstate(over="ignore"):
        stored = raw.astype("<f2")
    faults = np.flatnonzero(~np.isfinite(stored[:, 0])).tolist()
    usable = np.setdiff1d(np.arange(len(raw)), faults)
    error = float(np.abs(raw[usable] - stored[usable].astype("<f4")).max(initial=0))
    assert rounding_error(raw, stored, faults, known) == max(error, known)
    assert rounding_error(raw, raw, [], known) == known


def test_the_manifest_tells_the_rounding_error(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    vectors = np.concatenate([pairs.vectors(np.arange(len(pairs))) for pairs in open_raw(small_raw_dir).pairs])
    error = float(np.abs(vectors - vectors.astype("<f2").astype("<f4")).max())
    assert json.loads((small_dir / "manifest.json").read_text())["rounding_error"] == error > 0
    assert make(small_raw_dir, tmp_path / "wide", vector_dtype="float32")["rounding_error"] == 0


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
    records = [r for item in (*raw.pairs, *raw.texts) for r in item.records() if isinstance(r, str)]
    assert totals["words"] == sum(len(record.split()) for record in records)
    assert totals["samples"] == len(records)
    tokenizer = TextTokenizer(small_dir / "tokenizer.json")
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert str(small_dir) not in (small_dir / "manifest.json").read_text()
    assert all(entry["samples"] <= 50 for entry in manifest["shards"])
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
    next(out.glob("pairs-train*.tar")).unlink()
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


@pytest.mark.parametrize("stage", ["read texts", "check", "train tokenizer", "write shards"])
def test_an_interrupted_conversion_goes_on(small_raw_dir: Path, small_dir: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(at: str, done: int, *_: object) -> None:
        if at == stage and (at != "write shards" or done > 100):
            raise KeyboardInterrupt

    out, options = tmp_path / "out", Options(samples_per_shard=50, validation_fraction=0.2)
    with pytest.raises(KeyboardInterrupt):
        convert(small_raw_dir, out, options, report=interrupt)
    assert not out.exists()
    begun: list[int] = []

    def note(at: str, done: int, *_: object) -> None:
        if at == "write shards":
            begun.append(done)

    convert(small_raw_dir, out, options, report=note, resume=True)
    assert tree(out) == tree(small_dir)
    assert (begun[0] > 50) == (stage == "write shards")  # finished blocks are not made again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_are_cleared_but_for_resume_of_the_same(small_raw_dir: Path, small_dir: Path, tmp_path: Path) -> None:
    part = tmp_path / ".out.part"
    for resume, fraction in ((False, 0.2), (True, 0.3)):
        (part / "set").mkdir(parents=True)
        (part / "state").mkdir()
        (part / "set" / "x.tar").write_text("half")
        (part / "state" / "identity.json").write_text("of something else")
        make(small_raw_dir, tmp_path / "out", force=True, resume=resume, validation_fraction=fraction)
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


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_parts_that_make_no_sense(text: str) -> None:
    with pytest.raises(DataError, match="--part"):
        Part.parse(text)
    assert Part.parse("2/3") == Part(2, 3)

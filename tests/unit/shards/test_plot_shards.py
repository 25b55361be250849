"""The table and the plots of a folder of shards tell what the shards hold."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shards.index import ShardReader
from shards.writer import read_manifest
from tests.unit.shards.making import captions_of, make, vectors_of, write_pairs
from tools.plot_shards import (
    CAPTION_LENGTHS,
    WORDS_PER_SOURCE,
    by_source,
    caption_lengths,
    closing_table,
    draw_plots,
    main,
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two sources of pairs."""
    folder = tmp_path_factory.mktemp("plots")
    write_pairs(folder / "raw", "flickr", captions_of(150), vectors_of(50, 150))
    write_pairs(folder / "raw", "cc", captions_of(40, 3), vectors_of(20, 40, 3))
    (folder / "raw" / "GENERATED.md").write_text("made up")
    make(folder / "raw", folder / "out", samples_per_shard=60)
    return folder / "out"


def test_sums_by_source_are_those_of_the_samples_and_of_the_manifest(small_dir: Path, mixed: Path) -> None:
    for directory in (small_dir, mixed):
        manifest = read_manifest(directory)
        expected: dict[tuple[str, str], list[int]] = {}
        for entry in manifest["shards"]:
            reader = ShardReader(directory / entry["file"])
            for sample in range(len(reader)):
                source = reader.sources[int(reader.columns["source"][sample])]
                line = expected.setdefault((source, entry["split"]), [0, 0, 0])
                line[0] += 1
                line[1] += len(reader.text(sample).split())
                line[2] += len(reader.sample_tokens(sample))
        found = by_source(manifest)
        assert {key: [line[n] for n in ("samples", "words", "tokens")] for key, line in found.items()} == expected
        for split, total in manifest["totals"].items():
            assert sum(line["bytes"] for (_, of), line in found.items() if of == split) == total["bytes"]
        assert all(line["bytes"] > 0 for line in found.values())


def test_caption_lengths_are_those_of_the_raw_captions(mixed: Path) -> None:
    found = caption_lengths(mixed, read_manifest(mixed))
    for source, captions in {"cc": captions_of(40, 3), "flickr": captions_of(150)}.items():
        assert found[source].tolist() == np.bincount([len(caption.split()) for caption in captions]).tolist()


def test_the_table_holds_a_line_a_source_and_split_and_says_what_is_generated(small_dir: Path, mixed: Path) -> None:
    for directory, generated in ((small_dir, False), (mixed, True)):
        manifest = read_manifest(directory)
        buffer = io.StringIO()
        Console(width=160, file=buffer).print(closing_table(manifest))
        text = buffer.getvalue()
        assert ("GENERATED data, not BabyLM" in text) == generated
        for (source, split), line in by_source(manifest).items():
            (row,) = [row for row in text.splitlines() if f" {source} " in row and f" {split} " in row]
            for value in line.values():
                assert f" {value:,} " in row
        assert f"{manifest['totals']['train']['tokens']:,}" in text


def test_plots_are_drawn_the_same_each_time_and_differ_with_the_data(
    small_dir: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    for number, source in enumerate((small_dir, mixed, mixed)):
        copy = tmp_path / str(number)
        shutil.copytree(source, copy)
        paths = draw_plots(copy)
        assert [path.name for path in paths] == [CAPTION_LENGTHS, WORDS_PER_SOURCE]
        for path in paths:
            with Image.open(path) as image:
                assert image.width > 1000
                assert len(np.unique(np.asarray(image.convert("L").resize((40, 40))))) > 5  # not a blank page
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[1] == drawn[2]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]
    assert main([str(tmp_path / "0")]) == 0
    assert capsys.readouterr().out.count(".png\n") == 2
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_without_pairs_only_the_words_are_drawn(tmp_path: Path, small_raw_dir: Path) -> None:
    (tmp_path / "raw").mkdir()
    shutil.copy(small_raw_dir / "train_50M.zip", tmp_path / "raw")
    make(tmp_path / "raw", tmp_path / "out")
    assert [path.name for path in draw_plots(tmp_path / "out")] == [WORDS_PER_SOURCE]
    assert not (tmp_path / "out" / CAPTION_LENGTHS).exists()

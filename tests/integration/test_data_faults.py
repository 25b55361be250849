"""Data that breaks while ranks train on it: masked and listed, or a stop of all ranks together with a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, read_lines
from shards.index import ShardReader
from tests.support.ranks import run_ranks, train_all
from tests.support.runs import newest, tiny_config

pytestmark = pytest.mark.slow

TEXT_STEPS = 4  # the first phase, which reads no pair


def pair_tars(shards: Path) -> list[Path]:
    entries = json.loads((shards / "manifest.json").read_text())["shards"]
    return [shards / e["file"] for e in entries if (e["modality"], e["split"]) == ("pairs", "train")]


def damage(shards: Path, samples: int) -> list[tuple[str, str]]:
    """Flip a bit in the vectors of the first samples; returns their (shard, key)."""
    tar = pair_tars(shards)[0]
    reader = ShardReader(tar)
    keys = [(tar.name, reader.key(sample)) for sample in range(samples)]
    offsets = reader.columns["vector_offset"][:samples].tolist()
    content = bytearray(tar.read_bytes())
    for offset in offsets:
        content[offset + 40] ^= 1
    tar.write_bytes(content)
    return keys


@pytest.fixture(scope="module")
def outcome(
    tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, str]], dict[str, list[tuple[str, str]]]]:
    """Three trainings on 2 ranks: a damaged sample, too many of them, shards that go away."""
    folder = tmp_path_factory.mktemp("faults")
    keys, cases = {}, {}
    for name, samples, loses in (("one", 1, False), ("many", 3, False), ("gone", 0, True)):
        shards = shutil.copytree(tiny_shards, folder / name)
        keys[name] = damage(shards, samples)
        lost = pair_tars(shards) if loses else []
        cases[name] = (tiny_config(folder / "recipes", shards, folder / "runs", name), lost)
    return folder / "runs", run_ranks(2, folder / "ranks", train_all, cases), keys


def test_one_damaged_sample_is_masked_counted_and_listed(outcome: tuple) -> None:
    runs, ended, keys = outcome
    assert [said["one"] for said in ended] == ["", ""]
    lines = list(read_lines(runs / "one" / METRICS_FILE))
    counted = [line["Data/Damaged_Samples"] for line in lines if "Data/Damaged_Samples" in line]
    assert counted[-1] == 1
    events = [line for line in read_lines(runs / "one" / EVENTS_FILE) if line["kind"] == "damaged_sample"]
    assert [(event["shard"], event["key"]) for event in events] == keys["one"]


def test_too_much_damage_stops_all_ranks_with_a_checkpoint(outcome: tuple) -> None:
    runs, ended, keys = outcome
    assert ended[0]["many"] == ended[1]["many"]
    assert "3 of" in ended[0]["many"]
    assert "more than data.damage_ceiling 0.0001" in ended[0]["many"]
    stopped = int(newest(runs / "many").name.removeprefix("step_"))
    assert 1 <= stopped <= TEXT_STEPS, "shards are opened ahead of the step that needs them, at most three steps"
    events = list(read_lines(runs / "many" / EVENTS_FILE))
    listed = [(e["shard"], e["key"]) for e in events if e["kind"] == "damaged_sample"]
    assert sorted(listed) == sorted(keys["many"])
    assert [e["problem"] for e in events if e["kind"] == "data_error"] == [ended[0]["many"]]


def test_shards_that_go_away_stop_all_ranks_with_a_checkpoint(outcome: tuple) -> None:
    runs, ended, _ = outcome
    assert ended[0]["gone"] == ended[1]["gone"]
    assert "No such file" in ended[0]["gone"]
    assert ".tar" in ended[0]["gone"]
    assert newest(runs / "gone").name == f"step_{TEXT_STEPS:08d}"

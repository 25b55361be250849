"""Trainings on shards of a server: the losses of a local training, and one end for all ranks where shards go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmar import train
from bitmar.config import Config
from bitmar.observability.records import EVENTS_FILE, read_lines
from tests.support.ranks import run_ranks, train_all
from tests.support.runs import ROOT, metrics, newest, recipe, tiny_config, write_recipe
from tests.support.servers import faulty_server

pytestmark = pytest.mark.slow

TEXT_STEPS = 4  # the first phase, which reads no pair
STEPS = 12


def pair_files(shards: Path) -> list[str]:
    """The tars and indexes of training pairs."""
    entries = json.loads((shards / "manifest.json").read_text())["shards"]
    wanted = [e for e in entries if (e["modality"], e["split"]) == ("pairs", "train")]
    return [name for entry in wanted for name in (entry["file"], entry["index"]["file"])]


@pytest.fixture(scope="module")
def outcome(
    tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[dict[str, str]], dict[str, list[int]], str]]:
    """Three trainings on 2 ranks: local; over HTTP, with a cache that is emptied; over HTTP, with shards that go."""
    folder = tmp_path_factory.mktemp("remote_training")
    served = shutil.copytree(tiny_shards, folder / "served")
    leaves = shutil.copytree(tiny_shards, served / "leaves")
    with faulty_server(served) as server:
        cases: dict[str, tuple[Config, list[Path]]] = {}
        lost = {"local": [], "http": [folder / "http"], "gone": [leaves / name for name in pair_files(tiny_shards)]}
        urls = {"local": str(tiny_shards), "http": server.url, "gone": f"{server.url}/leaves"}
        for name, url in urls.items():
            overrides = (f"data.shards={url}", f"data.cache_directory={folder / name}", f"training.max_steps={STEPS}")
            cases[name] = (tiny_config(folder / "recipes", tiny_shards, folder / "runs", name, *overrides), lost[name])
        ended = run_ranks(2, folder / "ranks", train_all, cases)
        asked = {name: server.starts(name) for name in pair_files(tiny_shards)}
        yield folder / "runs", ended, asked, server.url


def test_a_training_over_http_has_the_losses_of_a_local_one(outcome: tuple) -> None:
    runs, ended, asked, _ = outcome
    assert [said["http"] for said in ended] == ["", ""]
    local, remote = metrics(runs / "local"), metrics(runs / "http")
    assert len(local) >= STEPS
    assert remote == local
    assert all(starts == [0] for starts in asked.values()), "two ranks of a node download a file once"


def test_shards_that_leave_the_server_stop_all_ranks_with_a_checkpoint(outcome: tuple) -> None:
    runs, ended, _, url = outcome
    said = ended[0]["gone"]
    assert said == ended[1]["gone"]
    assert said.startswith(f"{url}/leaves/pairs-train-0000")
    assert "no such file (HTTP 404): check the address" in said
    assert "\n" not in said
    assert newest(runs / "gone").name == f"step_{TEXT_STEPS:08d}"
    events = list(read_lines(runs / "gone" / EVENTS_FILE))
    assert [e["problem"] for e in events if e["kind"] == "data_error"] == [said]


def refusal(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> str:
    """What a training that is refused says, on one line."""
    capsys.readouterr()
    assert train.main(["--config", str(path), *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_users_mistake_is_one_line(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_shards, tmp_path / "runs", "refused"))
    with faulty_server(tiny_shards) as server:
        cache = f"data.cache_directory={tmp_path / 'cache'}"
        said = refusal(capsys, path, f"data.shards={server.url}/none", cache)
        assert f"{server.url}/none/manifest.json: no such file (HTTP 404)" in said
        # A process of its own: this one may have had an engine, and builds no other.
        command = [sys.executable, "-m", "bitmar.train", "--config", str(path), f"data.shards={server.url}", cache]
        command.append("data.cache_gib=1e-5")
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean, check=False)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: data.cache_gib 1e-05 is too small"), done.stderr
        for url in ("pipe:cat x", "http://me:hidden@127.0.0.1/x", "s3://b/x?X-Amz-Signature=hidden", "ftp://x/y"):
            assert "hidden" not in refusal(capsys, path, f"data.shards={url}")
    assert not (tmp_path / "runs").exists()

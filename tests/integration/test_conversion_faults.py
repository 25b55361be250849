"""Conversions that are killed, crowded or out of disk: nothing is lost, and what goes on gives the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.disks import resize, small_disk
from tests.support.runs import ROOT, heed_interrupts, run_tool
from tests.unit.shards.making import captions_of, text_of, tree, vectors_of, write_pairs, write_zip

pytestmark = pytest.mark.slow

KILLS = 5
SETTINGS = ("--samples-per-shard", 100, "--vocab-size", 512, "--validation-fraction", 0.2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 pairs of two sources and text: dozens of blocks."""
    out = tmp_path_factory.mktemp("faults") / "raw"
    write_pairs(out, "cc_3M", captions_of(3000, 1), vectors_of(1000, 3000, 1), cut=2000)
    write_pairs(out, "local_narr", captions_of(1000, 2), vectors_of(300, 1000, 2))
    write_zip(out, {"childes": text_of(30_000, 3).encode(), "switchboard": text_of(30_000, 4).encode()})
    return out


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return tree(out)


def start(raw: Path, out: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_shards.py"),
        "--raw",
        raw,
        "--out",
        out,
        *SETTINGS,
        *arguments,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=heed_interrupts,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments(raw: Path, undisturbed: dict[str, bytes], tmp_path: Path, jobs: int) -> None:
    """kill -9 of the first process, again and again, each time a random while after the work began."""
    rng = random.Random(jobs)
    out, state = tmp_path / "shards", tmp_path / ".shards.part" / "state"
    for _ in range(KILLS):
        process = start(raw, out, "--jobs", jobs, "--resume")
        wait_for(state / "identity.json", process)
        time.sleep(rng.random() * 0.4)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, "processes of a killed conversion live on"
        if out.exists():  # it was faster, or killed while it drew: whole all the same, and the next one begins anew
            shards = {name: data for name, data in undisturbed.items() if not name.endswith(".png")}
            assert {name: data for name, data in tree(out).items() if not name.endswith(".png")} == shards
            shutil.rmtree(out)
    done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, "--jobs", jobs, "--resume")
    assert done.returncode == 0, done.stderr
    assert tree(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.timeout(300)
def test_two_into_one_folder(raw: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The second refuses, whole or part, and the first is not disturbed; the same part twice likewise."""
    out, state = tmp_path / "shards", tmp_path / ".shards.part" / "state"
    first = start(raw, out)
    wait_for(state / "part-1-of-1", first)  # made when it has its lock: until then the second may have it
    first.send_signal(signal.SIGSTOP)
    for arguments in ((), ("--resume",), ("--force",), ("--part", "1/2"), ("--shuffle-seed", 1)):
        second = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, *arguments)
        assert second.returncode == 2
        assert second.stderr == f"error: another conversion is writing to {out}: wait for it to end\n"
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert tree(out) == undisturbed
    part = start(raw, tmp_path / "parts", "--part", "1/2")
    wait_for(tmp_path / ".parts.part" / "state" / "part-1-of-2", part)
    part.send_signal(signal.SIGSTOP)
    again = run_tool("make_shards.py", "--raw", raw, "--out", tmp_path / "parts", *SETTINGS, "--part", "1/2")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "part 1/2 of" in again.stderr
    other = start(raw, tmp_path / "parts", "--part", "2/2")
    part.send_signal(signal.SIGCONT)
    for process in (part, other):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert tree(tmp_path / "parts") == undisturbed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk(raw: Path, undisturbed: dict[str, bytes], tmp_path: Path, jobs: int) -> None:
    """One line; with room made, --resume goes on."""
    with small_disk(tmp_path / "disk", "6m") as disk:
        out = disk / "shards"
        for _ in range(2):
            done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, "--jobs", jobs, "--resume")
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1, done.stderr
            assert "no space left: make room, then go on with --resume" in done.stderr
            assert not out.exists()
        resize(disk, "60m")
        done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, "--jobs", jobs, "--resume")
        assert done.returncode == 0, done.stderr
        assert tree(out) == undisturbed
        assert os.listdir(disk) == ["shards"]


@pytest.mark.timeout(300)
def test_a_process_that_is_killed_is_told(raw: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "shards"
    process = start(raw, out, "--jobs", 2)
    workers: list[psutil.Process] = []
    wait_for(tmp_path / ".shards.part" / "state" / "part-1-of-1" / "build", process)
    while not workers:  # the fork server's children
        assert process.poll() is None, process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in family if child.parent() != psutil.Process(process.pid)]
    workers[0].kill()
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.count("\n") == 1, errors
    assert "ended from outside" in errors
    assert list((tmp_path / ".shards.part").rglob("identity.json"))  # what is done is kept
    done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, "--jobs", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert tree(out) == undisturbed


@pytest.mark.timeout(300)
def test_ctrl_c_keeps_what_is_done(raw: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "shards"
    process = start(raw, out, "--jobs", 2)
    wait_for(tmp_path / ".shards.part" / "state" / "block-pairs-00000.json", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == f"error: interrupted; {out} is not made, the same command with --resume goes on\n"
    done = run_tool("make_shards.py", "--raw", raw, "--out", out, *SETTINGS, "--resume")
    assert done.returncode == 0, done.stderr
    assert tree(out) == undisturbed

"""launch/supervise.py: what it restarts and what it does not, and runs over hosts that come and go."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bitmar.config import load_config
from bitmar.engine.world import World
from bitmar.observability.records import EVENTS_FILE, read_lines
from bitmar.train import train
from tests.integration.hosts import Network, wait_for_ssh
from tests.support.launches import GONE_WITHIN_S, end, pdsh_below, start, steps_logged, write_demo_recipe
from tests.support.processes import WITHIN_S, processes_of, wait_for
from tests.support.ranks import run_ranks
from tests.support.runs import (
    ROOT,
    STEPS,
    checkpoint_tensors,
    differing,
    heed_interrupts,
    metrics,
    newest,
    recipe,
    write_recipe,
)

pytestmark = pytest.mark.slow

SUPERVISE = [sys.executable, str(ROOT / "launch" / "supervise.py")]
HOST_STEPS = 20
# the supervised command of the tests without a training: ends with the codes that it is given, one a start
CODES = """
import pathlib, sys
folder, codes = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
start = len(list(folder.glob("start*")))
(folder / f"start{start}").write_text(" ".join(sys.argv))
print(f"this is start {start}")
if "checkpoints" in sys.argv:
    made = folder / "runs" / "tiny" / "checkpoints" / f"step_{start:08d}"
    made.mkdir(parents=True)
    (made / "state.json").write_text("{}")
    if start == len(codes) - 1:
        (folder / "runs" / "tiny" / "summary.json").write_text('{"step": %d}' % start)
sys.exit(int(codes[start]))
"""


def supervise(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SUPERVISE, *arguments], capture_output=True, text=True, check=False, timeout=WITHIN_S)


def coded(folder: Path, codes: str, *more: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return supervise("--backoff", "0.01", *options, "--", sys.executable, "-c", CODES, str(folder), codes, *more)


def starts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("start*"))]


@pytest.mark.parametrize(
    ("codes", "code", "count"),
    [("0", 0, 1), ("1,247,0", 0, 3), ("2", 2, 1), ("1,2", 2, 2), ("75", 75, 1), ("1,130", 130, 2), ("143", 143, 1)],
)
def test_what_is_started_again_and_what_is_not(codes: str, code: int, count: int, tmp_path: Path) -> None:
    done = coded(tmp_path, codes)
    assert done.returncode == code, done.stderr
    assert len(starts(tmp_path)) == count


def test_giving_up_tells_what_failed(tmp_path: Path) -> None:
    done = coded(tmp_path, "1,3,3,3,0", options=("--max-restarts", "2"))
    assert done.returncode == 1
    assert len(starts(tmp_path)) == 3
    report = done.stderr[done.stderr.index("giving up after 2 restarts") :]
    assert "exit code 3: 2 times, exit code 1: 1 times" in report
    assert "| this is start 2" in report


def test_progress_gives_new_restarts_and_the_run_keeps_the_log(tmp_path: Path) -> None:
    """Every start leaves a further checkpoint, so five failures pass where two in a row would not."""
    values = recipe(tmp_path / "shards", tmp_path / "runs", "tiny")
    path = write_recipe(tmp_path / "tiny.yaml", values)
    more = ("--config", str(path), "--resume", "elsewhere", "checkpoints")
    done = coded(tmp_path, "1,1,0,1,1,0", *more, options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    said = starts(tmp_path)
    assert "--resume elsewhere" in said[0]  # the user's own, but only once: it would go back each time
    assert all("--resume auto" in line for line in said[1:])
    log = (tmp_path / "runs" / "tiny" / "supervise.log").read_text()
    assert log.count("restart 1 of 1 in") == 5
    assert log.count("exit code 0, but the run has not come to its end") == 1  # as DeepSpeed's launcher may say
    assert "checkpoint of step 4" in log
    assert log.rstrip().endswith("done")


def test_a_mistake_is_told_before_anything_starts(tmp_path: Path) -> None:
    values = recipe(tmp_path / "shards", tmp_path / "runs", "tiny")
    path = write_recipe(tmp_path / "tiny.yaml", values)
    (tmp_path / "hosts").write_text("one slots=1\ntwo\n")
    done = coded(tmp_path, "0", "--config", str(path), "--hostfile", str(tmp_path / "hosts"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {tmp_path}/hosts:2: expected `host slots=N` with N > 0, got 'two'"]
    assert starts(tmp_path) == []
    assert supervise("--max-restarts", "2").returncode == 2


def train_straight(world: World, path: str, runs: str, name: str) -> None:
    train(load_config(Path(path), [f"run.directory={runs}", f"run.name={name}"]), world)


def test_a_killed_rank_costs_no_bit_and_term_stops_all(tmp_path: Path, tiny_shards: Path) -> None:
    """One process: kill -9 in the middle, TERM after the restart, and the same command again to the end."""
    values = recipe(tiny_shards, tmp_path / "runs", "kept")
    path = write_recipe(tmp_path / "tiny.yaml", values)
    run_ranks(1, tmp_path / "ranks", train_straight, str(path), str(tmp_path / "straight"), "kept")
    command = [*SUPERVISE, "--backoff", "0.1", "--", sys.executable, "-m", "bitmar.train", "--config", str(path)]
    run = tmp_path / "runs" / "kept"

    def begin() -> subprocess.Popen[bytes]:
        with (tmp_path / "said").open("ab") as said:
            return subprocess.Popen(
                command, stdout=said, stderr=said, cwd=ROOT, start_new_session=True, preexec_fn=heed_interrupts
            )

    def trainers() -> list[psutil.Process]:
        return [
            p for p in processes_of(str(path)) if "bitmar.train" in p.cmdline() and "supervise" not in p.cmdline()[1]
        ]

    process = begin()
    try:
        assert wait_for(lambda: steps_logged(run) >= 6)
        (victim,) = trainers()
        victim.kill()
        assert wait_for(lambda: any(p.pid != victim.pid for p in trainers()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) in (75, 143)
        assert processes_of(str(path)) == []
        process = begin()
        assert process.wait(WITHIN_S) == 0, (tmp_path / "said").read_text()
    finally:
        end(process, str(path))
    log = (run / "supervise.log").read_text()
    assert "exit code 137" in log
    straight = newest(tmp_path / "straight" / "kept")
    assert newest(run).name == straight.name == f"step_{STEPS:08d}"
    assert differing(checkpoint_tensors(newest(run)), checkpoint_tensors(straight)) == []


@pytest.fixture(scope="module")
def path(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe; its folder takes the runs."""
    return write_demo_recipe(tmp_path_factory.mktemp("supervised"), HOST_STEPS)


def test_a_lost_host_is_left_out_and_taken_back(net: Network, path: Path) -> None:
    """3 hosts, one is lost; 2 go on; it comes back, a rank is killed, and 3 finish: the curve of 3 undisturbed."""
    run_ranks(3, path.parent / "ranks", train_straight, str(path), str(path.parent / "straight"), "hosts")
    run, said = path.parent / "runs" / "hosts", path.parent / "said"
    hostfile = net.hostfile(path.parent / "three")
    multinode = ("bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(path), "run.name=hosts")
    process = start(net, said, *SUPERVISE, "--backoff", "0.1", "--", *multinode)

    def worlds() -> list[int]:
        events = list(read_lines(run / EVENTS_FILE)) if (run / EVENTS_FILE).is_file() else []
        return [line["world"] for line in events if line["kind"] == "start"]

    try:
        assert wait_for(lambda: steps_logged(run) >= 6), said.read_text()
        net.hosts[2].lose()
        assert wait_for(lambda: worlds() == [3, 2] and steps_logged(run) >= 10), said.read_text()
        net.hosts[2].start()
        wait_for_ssh(net, net.hosts[2:])
        net.hosts[1].ranks()[0].kill()
        assert process.wait(WITHIN_S) == 0, said.read_text()
    finally:
        end(process, str(path.parent))
    assert worlds() == [3, 2, 3]
    assert "host 10.77.0.13 is left out: " in (run / "supervise.log").read_text()
    one, other = (
        [line for line in metrics(folder) if "Training/Loss" in line]
        for folder in (run, path.parent / "straight" / "hosts")
    )
    assert [line["Training/Step"] for line in one] == list(range(1, HOST_STEPS + 1))
    for name in ("Training/Words", "Data/Padding_Efficiency"):  # the same rows in the same order
        assert [line[name] for line in one] == [line[name] for line in other]
    worst = max(abs(a["Training/Loss"] - b["Training/Loss"]) for a, b in zip(one, other, strict=True))
    assert worst <= 5e-3, worst


def test_deepspeed_itself_is_supervised_and_ends_with_the_supervisor(net: Network, path: Path) -> None:
    """The plain launcher: pdsh is killed (which it hides behind exit code 0), then the supervisor, both by kill -9."""
    run, said = path.parent / "runs" / "plain", path.parent / "said-plain"
    hostfile = net.hostfile(path.parent / "two", 2)
    variables = path.parent / "deepspeed_env"
    variables.write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\n")
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), "--no_ssh_check"]
    deepspeed += ["--master_addr", net.hosts[0].name, "--module", "bitmar.train", "--config", str(path)]
    more = ("run.name=plain", "phases.1.steps=100000")
    environment = {"DS_ENV_FILE": str(variables)}
    process = start(net, said, *SUPERVISE, "--backoff", "0.1", "--", *deepspeed, *more, **environment)
    try:
        assert wait_for(lambda: steps_logged(run) >= 1), said.read_text()
        first = {rank.pid for rank in net.ranks()}
        pdsh_below(process).kill()
        assert wait_for(lambda: not first & {rank.pid for rank in net.ranks()}, GONE_WITHIN_S)
        assert wait_for(lambda: len({rank.pid for rank in net.ranks()} - first) == 2), said.read_text()
        time.sleep(3)  # in the middle of whatever it is doing
        process.kill()
        assert wait_for(lambda: not processes_of(str(path.parent)), GONE_WITHIN_S)
        assert net.ranks() == []
    finally:
        end(process, str(path.parent))
    assert json.loads((run / "events.jsonl").read_text().splitlines()[0])["kind"] == "start"

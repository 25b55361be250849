"""Runs over several hosts through launch/multinode.sh: DeepSpeed's launcher, pdsh, ssh and gloo between namespaces."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from bitmar.config import load_config
from bitmar.engine.world import World
from bitmar.train import train
from tests.integration.hosts import Network, wait_for_ssh
from tests.support.launches import GONE_WITHIN_S, end, start, steps_logged, write_demo_recipe
from tests.support.processes import WITHIN_S, processes_of, wait_for
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, checkpoint_tensors, differing, metrics, newest, recipe, write_recipe

pytestmark = pytest.mark.slow

STEPS = 16
FEW = 3  # steps where the network is bad


def train_reference(world: World, path: str, runs: str) -> None:
    train(load_config(Path(path), [f"run.directory={runs}", "run.name=reference"]), world)


@pytest.fixture(scope="module")
def path(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe; its folder takes the runs."""
    return write_demo_recipe(tmp_path_factory.mktemp("multinode"), STEPS)


@pytest.fixture(scope="module")
def reference(path: Path) -> Path:
    """The run's folder of 2 ranks of one host, undisturbed."""
    runs = path.parent / "reference"
    run_ranks(2, path.parent / "ranks", train_reference, str(path), str(runs))
    return runs / "reference"


def multinode(net: Network, hostfile: Path, recipe: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(recipe), *more]
    return subprocess.run(
        net.inside(*command),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=net.environment(),
        timeout=WITHIN_S,
    )


def test_two_hosts_train_what_two_ranks_of_one_host_train(net: Network, path: Path, reference: Path) -> None:
    hostfile = net.hostfile(path.parent / "two", 2)
    done = multinode(net, hostfile, path, "run.name=two", "phases.0.mix={pairs: 1.0}")
    assert done.returncode == 0, done.stdout + done.stderr
    run = path.parent / "runs" / "two"
    assert metrics(run) == metrics(reference)
    assert differing(checkpoint_tensors(newest(run)), checkpoint_tensors(newest(reference))) == []
    assert json.loads((run / "summary.json").read_text())["step"] == STEPS
    assert "2 rank(s)" in done.stdout
    assert wait_for(lambda: not processes_of(str(path.parent)), GONE_WITHIN_S)


def test_a_slow_network_that_loses_packets_changes_nothing(net: Network, path: Path, tiny_shards: Path) -> None:
    """50 ms each way and 1 % loss. A small model under ZeRO-0: such a network carries some 200 KB a second, and a
    checkpoint of the other stages gathers one parameter after the other."""
    values = recipe(tiny_shards, path.parent / "runs", "slow", stage=0)
    values["training"]["max_steps"] = FEW
    values["validation"]["max_samples"] = 8
    tiny = write_recipe(path.parent / "tiny.yaml", values)
    run_ranks(2, path.parent / "ranks", train_reference, str(tiny), str(path.parent / "fast"))
    hostfile = net.hostfile(path.parent / "two", 2)
    with net.bad_cable(net.hosts[1], delay_ms=50, loss_percent=1):
        done = multinode(net, hostfile, tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for_ssh(net, net.hosts[1:2])
    assert len(metrics(path.parent / "runs" / "slow")) > FEW
    assert metrics(path.parent / "runs" / "slow") == metrics(path.parent / "fast" / "reference")


@pytest.mark.parametrize(
    ("hostfile", "said"),
    [
        ("10.77.0.11 slots=1\n10.77.0.12\n", ":2: expected `host slots=N` with N > 0, got '10.77.0.12'"),
        ("10.77.0.11 slots=0\n", ":1: expected `host slots=N`"),
        ("10.77.0.11 slots=1\n10.77.0.11 slots=1\n", ":2: host 10.77.0.11 stands there twice"),
        ("# nobody\n\n", "names no host"),
        ("10.77.0.11 slots=1\n10.77.0.99 slots=1\n", "host 10.77.0.99 does not answer over ssh"),
        ("10.77.0.11 slots=5\n", "training.global_batch 24 is not divided by training.micro_batch 4 x 5 ranks"),
    ],
    ids=["no slots", "slots=0", "twice", "empty", "unreachable", "does not divide"],
)
def test_a_wrong_hostfile_is_one_clear_line(hostfile: str, said: str, net: Network, path: Path) -> None:
    file = path.parent / "wrong"
    file.write_text(hostfile)
    done = multinode(net, file, path, "run.name=wrong")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (path.parent / "runs" / "wrong").exists()


def test_what_is_wrong_with_a_host_is_one_line_each(net: Network, path: Path) -> None:
    """A host that does not see the data, one without the repository, and a port in use on the first."""
    shards = path.parent / "shards"
    hostfile = net.hostfile(path.parent / "three")
    listener = ["python3", "-c", "import socket,time; s=socket.create_server(('',29417)); print(1,flush=True); "
                "time.sleep(600)"]  # fmt: skip
    taken = subprocess.Popen(["ip", "netns", "exec", net.hosts[0].namespace, *listener], stdout=subprocess.PIPE)
    assert taken.stdout is not None
    taken.stdout.readline()
    net.hosts[1].hide(shards)
    net.hosts[2].hide(ROOT / "launch")
    try:
        absent = multinode(net, hostfile, path)
        net.hosts[2].show(ROOT / "launch")
        busy = multinode(net, hostfile, path, "--port", "29417")
    finally:
        net.hosts[1].show(shards)
        taken.kill()
        taken.wait()
        taken.stdout.close()
    assert (absent.returncode, busy.returncode) == (2, 2)
    assert "host 10.77.0.13: " in absent.stderr
    assert len(absent.stderr.splitlines()) == 1
    assert busy.stderr.splitlines() == [
        f"error: host 10.77.0.12 cannot read {shards}/manifest.json",
        "error: port 29417 is in use on host 10.77.0.11; leave --port out to take a free one",
    ]


def test_term_ends_the_ranks_on_all_hosts(net: Network, path: Path) -> None:
    said = path.parent / "said-term"
    hostfile = net.hostfile(path.parent / "two", 2)
    endless = ("phases.1.steps=100000", "run.name=term")
    process = start(
        net, said, "bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(path), *endless
    )
    try:
        assert wait_for(lambda: steps_logged(path.parent / "runs" / "term") >= 2), said.read_text()
        assert [len(host.ranks()) for host in net.hosts] == [1, 1, 0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 75, said.read_text()
        assert wait_for(lambda: not processes_of(str(path.parent)), GONE_WITHIN_S)
    finally:
        end(process, str(path.parent))


@pytest.mark.parametrize("victim", ["multinode", "deepspeed"])
def test_killed_launchers_leave_nothing_on_any_host(victim: str, net: Network, path: Path) -> None:
    """kill -9 of multinode.sh or of DeepSpeed's runner below it; test_supervise.py kills pdsh and the supervisor."""
    said = path.parent / f"said-{victim}"
    hostfile = net.hostfile(path.parent / "two", 2)
    endless = ("phases.1.steps=100000", f"run.name=killed-{victim}")
    process = start(
        net, said, "bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(path), *endless
    )
    try:
        assert wait_for(lambda: steps_logged(path.parent / "runs" / f"killed-{victim}") >= 1), said.read_text()
        killed = psutil.Process(process.pid)
        if victim == "deepspeed":
            below = killed.children(recursive=True)
            (killed,) = [p for p in below if "deepspeed.launcher.runner" in p.cmdline()]
        killed.kill()
        ended = time.monotonic()
        code = process.wait(WITHIN_S)
        assert code not in (0, 2)
        assert wait_for(lambda: not processes_of(str(path.parent)), GONE_WITHIN_S - (time.monotonic() - ended))
        assert net.ranks() == []
    finally:
        end(process, str(path.parent))


def test_a_rank_that_stands_still_is_named_and_both_hosts_are_cleared(net: Network, path: Path) -> None:
    said = path.parent / "said-still"
    hostfile = net.hostfile(path.parent / "two", 2)
    more = ("phases.1.steps=100000", "run.name=still", "faults.hang_timeout_s=10")
    process = start(net, said, "bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(path), *more)
    try:
        assert wait_for(lambda: steps_logged(path.parent / "runs" / "still") >= 1), said.read_text()
        (rank,) = net.hosts[1].ranks()
        rank.suspend()
        assert process.wait(WITHIN_S) not in (0, 2)
        assert "rank 1 does not answer" in said.read_text()
        assert wait_for(lambda: not processes_of(str(path.parent)), GONE_WITHIN_S)
    finally:
        end(process, str(path.parent))

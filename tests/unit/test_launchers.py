"""The parts of launch/ that need no host: hostfiles, what is quoted and handed on, which hosts and words are used."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from bitmar.config import load_config
from launch.commands import read_command
from launch.guard import Guarded, follow, session_processes
from launch.hosts import (
    Facts,
    Host,
    HostError,
    Question,
    clear_left_overs,
    digests,
    free_port,
    objections,
    own_stamp,
    read_hostfile,
)
from launch.multinode import rank_environment, read_environment_files, remote_quote
from launch.supervise import usable

RECIPE = "launch/recipes/demo.yaml"
HOSTS = [Host("one", 1), Host("two", 1)]


def facts(address: str, interface: str | None = "eth0") -> Facts:
    return Facts("stamp", {}, address, interface, 0, 29500, None)


def test_a_hostfile_is_read_and_every_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# hosts\n\nnode-1.example.org slots=8  # the first\n10.0.0.2\tslots=4\n")
    assert read_hostfile(path) == [Host("node-1.example.org", 8), Host("10.0.0.2", 4)]
    path.write_text("one slots=2\ntwo slots=two\n-oProxyCommand=x slots=1\none slots=3\n")
    with pytest.raises(HostError) as raised:
        read_hostfile(path)
    assert [line.split(": ")[0] for line in str(raised.value).splitlines()] == [f"{path}:{n}" for n in (2, 3, 4)]
    with pytest.raises(HostError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "absent")


def test_quoted_arguments_pass_a_shell_and_deepspeed_unchanged() -> None:
    """DeepSpeed puts what holds a blank between double quotes, and pdsh replaces %h: neither may stand there."""
    arguments = ["a.b=c", "x={y: [1, 2]}", "a b", "$HOME", "`id`", 'q"q', "it's", "%h%n", "a;b&c|d>e", "ä", "\\", ""]
    quoted = [remote_quote(argument) for argument in arguments]
    assert not any(c in word for word in quoted for c in " %")
    line = "printf '%s\\0' " + " ".join(quoted)
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == arguments


def test_ranks_get_what_they_need_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=INFO\nSOME_API_KEY=hidden\nEXTRA=a=b\n")
    own = {
        "NCCL_DEBUG": "WARN",
        "NCCL_TOKEN": "hidden",
        "HOME": "x",
        "WANDB_API_KEY": "hidden",
        "WANDB_SERVICE": "3-1-tcp-127.0.0.1-1-hidden",
        "WANDB_MODE": "offline",
        "WANDB_ENTITY": "team",
    }
    found = rank_environment(own, True, HOSTS, {"one": facts("10.0.0.1"), "two": facts("10.0.0.2")})
    assert found == {
        "NCCL_DEBUG": "WARN",
        "EXTRA": "a=b",
        "WANDB_MODE": "offline",
        "WANDB_ENTITY": "team",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    (tmp_path / ".deepspeed_env").write_text("A=1\nnonsense\n")
    with pytest.raises(HostError, match=r"\.deepspeed_env:2: expected NAME=value"):
        read_environment_files()


@pytest.mark.parametrize(
    ("two", "message"),
    [
        (facts("10.0.0.2", "ens3"), "network interfaces differ .one: eth0, two: ens3.; set NCCL_SOCKET_IFNAME"),
        (facts("127.0.0.1", "lo"), "host two is this machine's loopback"),
    ],
    ids=["interfaces", "loopback"],
)
def test_hosts_that_cannot_reach_each_other_are_told(
    two: Facts, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    both = {"one": facts("10.0.0.1"), "two": two}
    with pytest.raises(HostError, match=message):
        rank_environment({}, False, HOSTS, both)
    chosen = rank_environment({"NCCL_SOCKET_IFNAME": "eth,ens"}, False, HOSTS, both)
    assert chosen["NCCL_SOCKET_IFNAME"] == "eth,ens"
    with pytest.raises(HostError, match="NCCL_X cannot be handed"):
        rank_environment({"NCCL_X": "$(id)", "NCCL_SOCKET_IFNAME": "e"}, False, HOSTS, both)


def test_what_speaks_against_a_host_is_a_line_each() -> None:
    question = Question(files=(RECIPE, "README.md"), run_folder="runs/demo")
    same = Facts(own_stamp(), digests(question), "10.0.0.1", "eth0", 2, 29500, None)
    hosts = [Host("one", 2), Host("two", 2)]
    assert objections(hosts, {"one": same, "two": same}, question, cpu=False) == []
    changed = dataclasses.replace(
        same, stamp="other", digests={RECIPE: "0", "README.md": None}, gpus=1, other_launch="process 7"
    )
    assert objections(hosts, {"one": same, "two": changed}, question, cpu=False) == [
        "host two has other packages than this one; run launch/local.sh there once",
        f"host two has another {RECIPE} than the others",
        "host two cannot read README.md",
        "host two has 1 GPUs, the hostfile asks for 2",
        "host two is training runs/demo already (process 7)",
    ]


def test_left_overs_of_a_launch_are_ended_and_another_launch_is_told() -> None:
    """A rank that is left from before a restart goes; a rank that another launch has here stays, and is named."""
    line = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)", "bitmar.train"]
    run_folder = f"/runs/{secrets.token_hex(4)}"
    environment = {"RANK": "0", "WORLD_SIZE": "2", "BITMAR_RUN": run_folder, "BITMAR_LAUNCH": "first"}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()
        assert clear_left_overs(run_folder, "second", within_s=0) == f"process {rank.pid}, started by another launch"
        assert rank.poll() is None
        assert clear_left_overs(run_folder, "first") is None
        assert rank.wait() == -signal.SIGKILL


def test_the_most_ranks_that_divide_the_batch_are_used(tmp_path: Path) -> None:
    values = yaml.safe_load(Path(RECIPE).read_text())
    values["training"] |= {"global_batch": 96, "micro_batch": 8}
    values["model"]["contrastive_group"] = 16  # two ranks' rows: an odd number of ranks does not do
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    three = [Host("a", 3), Host("b", 3), Host("c", 3)]
    assert usable(three, config) == [Host("a", 3), Host("b", 3)]
    assert usable(three[:1], config) == [Host("a", 2)]
    assert usable([Host("a", 1)], config) == []
    assert usable(three, None) == three


def test_a_deepspeed_command_gets_hosts_watch_and_resume(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    given = ["deepspeed", f"--hostfile={hosts}", "--module", "bitmar.train", "--config", RECIPE]
    command = read_command([*given, "run.name=mine", "checkpoint.resume=never"])
    assert command.run_folder == Path("runs/mine").resolve()
    left = tmp_path / "left"
    first, later = command.words(True, left), command.words(False, left)
    assert first[:2] == later[:2] == ["deepspeed", "--force_multi"]
    assert f"--hostfile={left}" in first
    assert f"--hostfile={left}" in later
    assert first[-1] == "checkpoint.resume=never"
    assert later[-2:] == ["--resume", "auto"]
    assert "checkpoint.resume=never" not in later
    assert read_command(["bash", "launch/local.sh", "demo", "2"]).run_folder == Path("runs/demo").resolve()
    other = read_command(["sleep", "1"])
    assert other.words(False, None) == ["sleep", "1"]
    with pytest.raises(HostError, match="--no_ssh"):
        read_command([*given, "--no_ssh"])


def test_a_port_in_use_is_told_from_a_free_one() -> None:
    port = free_port("127.0.0.1", None)
    assert port is not None
    assert free_port("127.0.0.1", port) == port
    with subprocess.Popen(
        [sys.executable, "-c", f"import socket; s = socket.create_server(('', {port})); print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        assert free_port("127.0.0.1", port) is None
        listener.communicate(b"\n")


STARTER = """
import os, sys, time
from launch.guard import Guarded
guarded = Guarded(["bash", "-c", "set -m; sleep 600 & sleep 600 & echo $! >$0; wait", sys.argv[1]], os.environ)
time.sleep(600)
"""


@pytest.mark.parametrize("ended", ["killed", "end"])
def test_a_guarded_command_ends_with_its_starter(ended: str, tmp_path: Path) -> None:
    """All of its process groups: by kill -9 of the process that started it, and when that says so."""
    told = tmp_path / "pid"
    if ended == "killed":
        with subprocess.Popen([sys.executable, "-c", STARTER, str(told)]) as starter:
            pid = wait_for_pid(told)
            starter.kill()
    else:
        line = "set -m; sleep 600 & sleep 600 & echo $! >$0; wait"
        guarded = Guarded(["bash", "-c", line, str(told)], {"PATH": "/usr/bin:/bin"})
        pid = wait_for_pid(told)
        guarded.end()
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_following_a_command_ends_with_it_though_its_child_goes_on_writing() -> None:
    """DeepSpeed's runner may be killed while pdsh, its child, still passes on what the ranks log."""
    child = "import time\nwhile True: print('step', flush=True); time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('last')"
    guarded = Guarded([sys.executable, "-c", parent], os.environ, piped=True)
    try:
        said = [item[1] for item in follow(guarded) if item is not None]
        assert guarded.process.returncode == 0
        assert "last\n" in said
        assert session_processes(guarded.process.pid) != [], "the child has ended: nothing was tested"
    finally:
        guarded.end()


def test_every_line_of_a_command_is_passed_on() -> None:
    guarded = Guarded([sys.executable, "-c", "for i in range(20_000): print(i)"], os.environ, piped=True)
    said = [item[1] for item in follow(guarded) if item is not None]
    guarded.end()
    assert said == [f"{i}\n" for i in range(20_000)]


def wait_for_pid(path: Path) -> int:
    until = time.monotonic() + 60
    while not path.is_file() or not path.read_text().strip():
        assert time.monotonic() < until
        time.sleep(0.05)
    return int(path.read_text())

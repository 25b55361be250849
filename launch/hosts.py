"""Hosts of a run over several nodes: the hostfile, what each host says of itself over ssh, and what speaks against it.

`python -m launch.hosts QUESTION` is what a host is asked to run: it prints its Facts as one JSON line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.guard import environment_of, is_rank, living

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".venv/.requirements.sha256"
LINE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.:-]*)\s+slots=([1-9][0-9]*)")
CONNECT_TIMEOUT_S = 8
ANSWER_TIMEOUT_S = 60.0  # of a host that lets us in: Python may start slowly from a network file system
PROBES = 64  # ssh connections at a time
LAUNCH_ENDS_WITHIN_S = 12.0  # a launch whose launcher has gone
SSH_FAILED = 255
LAUNCH_ID, RUN_FOLDER = "BITMAR_LAUNCH", "BITMAR_RUN"  # in the environment of every rank of a launch


class HostError(ValueError):
    """Hosts that cannot be used as asked; the message is one line a problem and names host or line."""


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


@dataclass(frozen=True)
class Question:
    """What a host is asked: paths are the launching host's, and must be there too."""

    files: tuple[str, ...] = ()  # whose content must be the same everywhere
    shards: str | None = None  # local folder of shards
    run_folder: str = ""
    launch_id: str = ""
    port: int | None = None  # None: find a free one


@dataclass(frozen=True)
class Facts:
    """What a host says. `digests` by file, None where it cannot be read."""

    stamp: str
    digests: dict[str, str | None]
    address: str  # at which the launching host reached it
    interface: str | None  # the network interface of that address
    gpus: int
    port: int | None  # one that is free; None where the one asked for is in use
    other_launch: str | None  # another launch of the same run that is alive there


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of `host slots=N` lines; blank lines and # comments are left out. Raises HostError, a line a problem."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise HostError(f"hostfile {path} cannot be read: {reason}") from None
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            problems.append(f"{path}:{number}: expected `host slots=N` with N > 0, got {line.strip()!r}")
        elif match[1] in hosts:
            problems.append(f"{path}:{number}: host {match[1]} stands there twice")
        else:
            hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts and not problems:
        problems.append(f"hostfile {path} names no host")
    if problems:
        raise HostError("\n".join(problems))
    return list(hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")


def ssh_options() -> list[str]:
    """The user's own (PDSH_SSH_ARGS_APPEND, where ssh takes the first of two), then ours."""
    own = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    ours = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": 10,  # a host that does not answer for 30 s is lost
        "ServerAliveCountMax": 3,
    }
    return own + [part for name, value in ours.items() for part in ("-o", f"{name}={value}")]


def over_ssh(host: str, command: str, timeout_s: float = ANSWER_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run a shell command on a host; exit code 255 where it does not answer, with the reason in stderr."""
    line = ["ssh", *ssh_options(), host, command]
    try:
        return subprocess.run(
            line, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(line, SSH_FAILED, "", f"no answer within {timeout_s:g} s")


def on_all(hosts: Sequence[str], command: str, timeout_s: float) -> list[subprocess.CompletedProcess[str]]:
    """The command on every host at the same time."""
    with ThreadPoolExecutor(max(1, min(PROBES, len(hosts)))) as pool:
        return list(pool.map(lambda host: over_ssh(host, command, timeout_s), hosts))


def answering(hosts: Sequence[Host]) -> tuple[list[Host], dict[str, str]]:
    """(hosts that let us in, why the others do not)."""
    replies = on_all([host.name for host in hosts], "true", CONNECT_TIMEOUT_S + 4)
    silent = {h.name: why_silent(r) for h, r in zip(hosts, replies, strict=True) if r.returncode != 0}
    return [host for host in hosts if host.name not in silent], silent


def why_silent(reply: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in reply.stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
    return lines[-1] if lines else f"ssh ended with exit code {reply.returncode}"


def ask(hosts: Sequence[Host], question: Question) -> dict[str, Facts]:
    """Every host's facts. Raises HostError with a line for each host that has none to give."""
    python = f"{ROOT}/.venv/bin/python"
    asked = shlex.quote(json.dumps(dataclasses.asdict(question)))
    command = (
        f"cd {shlex.quote(str(ROOT))} 2>/dev/null || {{ echo 'the repository is not at {ROOT} there' >&2; exit 3; }}; "
        f"[ -x {python} ] || {{ echo 'there is no {python}: run launch/local.sh there once' >&2; exit 3; }}; "
        f"exec {python} -m launch.hosts {asked}"
    )
    replies = on_all([host.name for host in hosts], command, ANSWER_TIMEOUT_S)
    facts, problems = {}, []
    for host, reply in zip(hosts, replies, strict=True):
        if reply.returncode == SSH_FAILED:
            problems.append(f"host {host.name} does not answer over ssh: {why_silent(reply)}")
        elif reply.returncode != 0:
            problems.append(f"host {host.name}: {why_silent(reply)}")
        else:
            facts[host.name] = Facts(**json.loads(reply.stdout.splitlines()[-1]))
    if problems:
        raise HostError("\n".join(problems))
    return facts


def objections(hosts: Sequence[Host], facts: dict[str, Facts], question: Question, cpu: bool) -> list[str]:
    """What speaks against each host, compared with this one: a line a problem.

    A file that this one cannot read (it may have no access to the data) is compared with the first host's.
    """
    first = facts[hosts[0].name].digests
    own = {name: digest or first.get(name) for name, digest in digests(question).items()}
    stamp = own_stamp()
    found = []
    for host in hosts:
        have = facts[host.name]
        if have.stamp != stamp:
            found.append(f"host {host.name} has other packages than this one; run launch/local.sh there once")
        for name, digest in own.items():
            if have.digests.get(name) is None:
                found.append(f"host {host.name} cannot read {name}")
            elif have.digests[name] != digest:
                found.append(f"host {host.name} has another {name} than the others")
        if not cpu and have.gpus < host.slots:
            found.append(f"host {host.name} has {have.gpus} GPUs, the hostfile asks for {host.slots}")
        if have.other_launch is not None:
            found.append(f"host {host.name} is training {question.run_folder} already ({have.other_launch})")
    return found


def digests(question: Question) -> dict[str, str | None]:
    """Content hashes of the files that every host must have; the manifest stands for the shards."""
    names = list(question.files)
    if question.shards is not None:
        names.append(str(Path(question.shards) / "manifest.json"))
    return {name: _digest(ROOT / name) for name in names}


def own_stamp() -> str:
    try:
        return (ROOT / STAMP).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return ""


def gpu_count() -> int:
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])


def stop_ranks_command(launch_id: str) -> str:
    """Shell command that sends TERM to the ranks of a launch on the host where it runs; fails where there is none."""
    return (
        f"found=; for id in $(grep -lzx {LAUNCH_ID}={shlex.quote(launch_id)} /proc/[0-9]*/environ | cut -d/ -f3); do "
        "grep -qzx 'RANK=[0-9]*' /proc/$id/environ && grep -qzx 'bitmar[.]train' /proc/$id/cmdline && "
        'kill -TERM $id && found=1; done 2>/dev/null; [ -n "$found" ]'
    )


def own_facts(question: Question) -> Facts:
    """This host's answer; ends what an earlier start of the same launch has left behind here."""
    address = os.environ.get("SSH_CONNECTION", "127.0.0.1 0 127.0.0.1 0").split()[2]
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(a.address == address for a in addresses)]
    return Facts(
        stamp=own_stamp(),
        digests=digests(question),
        address=address,
        interface=names[0] if names else None,
        gpus=gpu_count(),
        port=free_port(address, question.port),
        other_launch=clear_left_overs(question.run_folder, question.launch_id),
    )


def free_port(address: str, wanted: int | None) -> int | None:
    """`wanted` where it is free on this address, or any that is; None where `wanted` is in use."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", wanted or 0))
        except OSError:
            return None
        return probe.getsockname()[1]


def clear_left_overs(run_folder: str, launch_id: str, within_s: float = LAUNCH_ENDS_WITHIN_S) -> str | None:
    """End what a lost connection has left here of this launch (a supervisor keeps its id over restarts).

    Returns what another launch of the same run has alive here, None for nothing. One whose launcher was killed just
    now is given the time that it has to end.
    """
    until = time.monotonic() + within_s
    while (other := _clear(run_folder, launch_id)) is not None and time.monotonic() < until:
        time.sleep(0.2)
    return None if other is None else f"process {other}, started by another launch"


def _clear(run_folder: str, launch_id: str) -> int | None:
    """One look at this host's processes: kills those of this launch, returns a rank of another one of the run."""
    other = None
    for process in living():
        environment = environment_of(process)
        if not run_folder or environment.get(RUN_FOLDER) != run_folder or process.pid == os.getpid():
            continue
        if environment.get(LAUNCH_ID) == launch_id:
            with contextlib.suppress(psutil.Error):
                process.kill()
        elif is_rank(process):
            other = process.pid
    return other


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def answer(text: str) -> None:
    raw = json.loads(text)
    question = Question(**(raw | {"files": tuple(raw["files"])}))
    print(json.dumps(dataclasses.asdict(own_facts(question))))


if __name__ == "__main__":
    answer(sys.argv[1])

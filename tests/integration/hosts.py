"""Hosts out of network namespaces: each has an interface eth0, an sshd with throw-away keys, and mounts of its own.

A further namespace holds the bridge that joins them; what starts a run runs there, as on a machine beside the hosts.
So nothing of it is seen outside, and several test runs do not meet. Processes and the host name are those of this
machine.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import shell_environment
from tests.support.runs import cannot_run

CABLE = Path(__file__).resolve().parents[1] / "support" / "cable.py"
SSHD = "/usr/sbin/sshd"
START_WITHIN_S = 30.0  # a guard against a hang
NUMBER = itertools.count()


@dataclass
class TestHost:
    """One host; `name` is its address, `namespace` and `port` what it is made of."""

    __test__ = False

    name: str
    namespace: str
    port: str  # the bridge's end of its cable
    switch: str
    folder: Path
    sshd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Plug it in and start its sshd."""
        self.plug(True)
        with (self.folder / f"{self.namespace}.log").open("ab") as log:
            command = ["ip", "netns", "exec", self.namespace, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def plug(self, on: bool) -> None:
        """Set its link up or down."""
        run("ip", "-n", self.switch, "link", "set", self.port, "up" if on else "down")

    def processes(self) -> list[int]:
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace).split()]

    def ranks(self) -> list[psutil.Process]:
        """Its processes that train."""
        found = []
        for pid in self.processes():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if "bitmar.train" in process.cmdline() and "RANK" in process.environ():
                    found.append(process)
        return found

    def lose(self) -> None:
        """Cut the link, then kill all that runs on it: nothing of it says goodbye."""
        self.plug(False)
        self.kill()

    def kill(self) -> None:
        for _ in range(100):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.sshd is not None:
            self.sshd.wait()
            self.sshd = None

    def hide(self, folder: Path) -> None:
        """Put an empty file system over a folder, for what is started on this host from now on."""
        assert self.sshd is not None
        run("nsenter", "-t", str(self.sshd.pid), "-m", "mount", "-t", "tmpfs", "tmpfs", str(folder))

    def show(self, folder: Path) -> None:
        assert self.sshd is not None
        run("nsenter", "-t", str(self.sshd.pid), "-m", "umount", str(folder))


@dataclass
class Network:
    """Hosts and the namespace beside them in which `command` lines run, with ssh access to all."""

    switch: str
    hosts: list[TestHost]
    folder: Path

    def environment(self) -> dict[str, str]:
        """As a person's shell has it who reaches the hosts; a host that is silent for 6 s counts as lost."""
        ssh = f"-F {self.folder}/ssh_config -o ServerAliveInterval=2 -o ConnectTimeout=4"
        return shell_environment() | {"PDSH_SSH_ARGS_APPEND": ssh, "PYTHONUNBUFFERED": "1"}

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.switch, *command]

    def hostfile(self, path: Path, count: int | None = None) -> Path:
        path.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts[:count]))
        return path

    @contextmanager
    def bad_cable(self, host: TestHost, delay_ms: int, loss_percent: float) -> Iterator[None]:
        """Both ways, what passes between a host and the others comes late, and some of it never."""
        run("ip", "-n", self.switch, "link", "del", host.port)
        command = [sys.executable, str(CABLE), self.switch, host.port, host.namespace, "eth0"]
        with subprocess.Popen([*command, str(delay_ms), str(loss_percent)], stdout=subprocess.PIPE) as cable:
            try:
                assert cable.stdout is not None
                assert cable.stdout.readline() == b"connected\n"
                _plug_in(host)
                yield
            finally:
                cable.kill()  # its devices go with it
        _connect(host)

    def ranks(self) -> list[psutil.Process]:
        return [process for host in self.hosts for process in host.ranks()]


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def refuse(reason: str) -> None:
    """Skip, or in CI fail, where hosts cannot be made."""
    cannot_run(f"hosts cannot be made out of network namespaces here: {reason}")


@contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """`count` hosts at 10.77.0.11, .12, ..., all up. Needs root, iproute2, openssh-server and pdsh."""
    missing = [
        name for name in ("ip", "tc", "nsenter", "ssh", "ssh-keygen", "pdsh", SSHD) if shutil.which(name) is None
    ]
    if os.geteuid() != 0 or missing:
        refuse(f"{', '.join(missing)} missing" if missing else "only root may")
    name = f"bitmar-{os.getpid()}-{next(NUMBER)}"
    names = [f"{name}-switch", *(f"{name}-host{i}" for i in range(count))]
    tried = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        refuse(tried.stderr.strip())
    hosts: list[TestHost] = []
    try:
        _lay_bridge(names[0])
        _write_keys(folder)
        for i, namespace in enumerate(names[1:]):
            run("ip", "netns", "add", namespace)
            hosts.append(TestHost(f"10.77.0.{11 + i}", namespace, f"port{i}", names[0], folder))
            _connect(hosts[-1])
            hosts[-1].start()
        made = Network(names[0], hosts, folder)
        for host in hosts:
            _wait_for_ssh(made, host)
        yield made
    finally:
        for namespace in names:
            for pid in run("ip", "netns", "pids", namespace, check=False).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", namespace, check=False)
        for host in hosts:
            if host.sshd is not None:
                host.sshd.wait()


def _lay_bridge(switch: str) -> None:
    run("ip", "-n", switch, "link", "set", "lo", "up")
    run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
    run("ip", "-n", switch, "addr", "add", "10.77.0.1/24", "dev", "bridge0")
    run("ip", "-n", switch, "link", "set", "bridge0", "up")


def _connect(host: TestHost) -> None:
    """A good cable."""
    ends = ("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    run("ip", "-n", host.switch, *ends)
    _plug_in(host)


def _plug_in(host: TestHost) -> None:
    """One end of a cable belongs to the bridge, the other gets the host's address."""
    run("ip", "-n", host.switch, "link", "set", host.port, "master", "bridge0", "up")
    run("ip", "-n", host.namespace, "link", "set", "lo", "up")
    run("ip", "-n", host.namespace, "addr", "add", f"{host.name}/24", "dev", "eth0")
    mac = f"02:00:0a:4d:00:{int(host.name.rpartition('.')[2]):02x}"  # of either cable: others remember it
    run("ip", "-n", host.namespace, "link", "set", "eth0", "address", mac, "up")


def _write_keys(folder: Path) -> None:
    """Keys and settings for sshd and ssh; nothing of the user's own is read or written."""
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; the service makes it where it runs
    for key in ("host_key", "user_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    _write(
        folder / "sshd_config",
        *(f"HostKey {folder}/host_key", f"AuthorizedKeysFile {folder}/authorized_keys", "PermitRootLogin yes"),
        *("StrictModes no", "UsePAM no", "PasswordAuthentication no", "PidFile none", "MaxStartups 100"),
    )
    _write(
        folder / "ssh_config",
        *("Host *", f"IdentityFile {folder}/user_key", "IdentitiesOnly yes", "StrictHostKeyChecking no"),
        *("UserKnownHostsFile /dev/null", "LogLevel ERROR"),
    )


def _write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")


def wait_for_ssh(network: Network, hosts: Sequence[TestHost]) -> None:
    for host in hosts:
        _wait_for_ssh(network, host)


def _wait_for_ssh(network: Network, host: TestHost) -> None:
    command = network.inside("ssh", "-F", str(network.folder / "ssh_config"), host.name, "true")
    until = time.monotonic() + START_WITHIN_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        assert time.monotonic() < until, f"{host.name}: {done.stderr}"
        time.sleep(0.2)

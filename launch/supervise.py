"""Keep a run going: start its command again when it fails, on the hosts that answer, until it is done.

python launch/supervise.py [--max-restarts 20] [--backoff 5] [--max-backoff 300] -- COMMAND...

COMMAND starts a training: launch/multinode.sh, launch/local.sh, deepspeed --module bitmar.train, torchrun or python -m.
Exit code: 0 the run is done, 2 a mistake of the user's, 75 or 128 + signal: it was asked to stop, 1: given up.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.config import Config, ConfigError
from launch.commands import Command, read_command
from launch.guard import Guarded, StopRequests, follow
from launch.hosts import LAUNCH_ID, Host, HostError, answering, read_hostfile, write_hostfile
from launch.multinode import HostFailures, recorded_code, recording_pdsh

USER_ERROR, STOPPED = 2, 75
ASKED_TO_STOP = (STOPPED, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)
STOP_GRACE_S = 120.0  # longer than that of multinode.py, which it may wait for
LAST_LINES = 30  # of the command's output, for the report


@dataclass(frozen=True)
class Failure:
    when: str
    code: int
    hosts: str
    seconds: float
    step: int | None  # of the newest checkpoint afterwards


@dataclass
class Journal:
    """Tells on standard error, and in supervise.log of the run's folder once the run has made that."""

    folder: Path | None
    waiting: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)
        self.waiting.append(f"{now()} {text}\n")
        if self.folder is not None and self.folder.is_dir():
            try:
                with (self.folder / "supervise.log").open("a", encoding="utf-8") as file:
                    file.writelines(self.waiting)
            except OSError as error:  # a full disk must not end what could go on
                print(f"supervise: supervise.log cannot be written: {error.strerror}", file=sys.stderr)
            self.waiting.clear()


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def newest_step(run_folder: Path | None) -> int | None:
    """Step of the run's newest whole checkpoint."""
    if run_folder is None:
        return None
    whole = (path for path in (run_folder / "checkpoints").glob("step_*") if (path / "state.json").is_file())
    return max((int(path.name.removeprefix("step_")) for path in whole), default=None)


def came_to_its_end(run_folder: Path | None) -> bool:
    """Whether summary.json tells of the newest checkpoint. True also where the folder cannot be seen from here.

    DeepSpeed's launchers exit with 0 when what they started was killed, so their 0 alone proves nothing.
    """
    if run_folder is None or not run_folder.is_dir():
        return True
    try:
        step = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return False
    return newest_step(run_folder) in (None, step)


def usable(hosts: Sequence[Host], config: Config | None) -> list[Host]:
    """The most ranks on these hosts that divide the recipe's batch; the last hosts give up slots. Empty: none do."""
    for total in range(sum(host.slots for host in hosts), 0, -1):
        try:
            if config is not None:
                config.check_world(total)
        except ConfigError:
            continue
        chosen, left = [], total
        for host in hosts:
            if left > 0:
                chosen.append(Host(host.name, min(host.slots, left)))
                left -= chosen[-1].slots
        return chosen
    return []


class Supervisor:
    """One supervised command. `run` returns the exit code."""

    def __init__(self, command: Command, max_restarts: int, backoff_s: float, max_backoff_s: float) -> None:
        self.command = command
        self.max_restarts, self.backoff_s, self.max_backoff_s = max_restarts, backoff_s, max_backoff_s
        self.journal = Journal(command.run_folder)
        self.stop = StopRequests()
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.failures: list[Failure] = []
        self.restarts = 0  # since the last progress
        self.environment = dict(os.environ) | {LAUNCH_ID: os.environ.get(LAUNCH_ID) or secrets.token_hex(6)}

    def run(self) -> int:
        first = True
        while True:
            before, started = newest_step(self.command.run_folder), time.monotonic()
            code, hosts = self.attempt(first)
            if code == 0 or code in ASKED_TO_STOP or self.stop.signals:
                self.journal.tell("done" if code == 0 else f"stopped (exit code {code}); not started again")
                return code
            if code == USER_ERROR and not self.hosts_went(hosts):
                self.journal.tell("the command was refused (exit code 2); starting it again would not help")
                return code
            first = False
            after = newest_step(self.command.run_folder)
            names = " ".join(f"{host.name}:{host.slots}" for host in hosts) or "-"
            self.failures.append(Failure(now(), code, names, time.monotonic() - started, after))
            self.restarts = 0 if after is not None and after != before else self.restarts
            if self.restarts >= self.max_restarts:
                self.journal.tell(self.report())
                return 1
            self.restarts += 1
            wait_s = min(self.max_backoff_s, self.backoff_s * 2 ** (self.restarts - 1))
            at = "no checkpoint yet" if after is None else f"checkpoint of step {after}"
            self.journal.tell(f"exit code {code}, {at}; restart {self.restarts} of {self.max_restarts} in {wait_s:g} s")
            if not self.wait(wait_s):
                return 128 + self.stop.signals[0]

    def attempt(self, first: bool) -> tuple[int, list[Host]]:
        """Start the command and stay until it ends: (exit code, the hosts it ran on)."""
        with tempfile.TemporaryDirectory(prefix="bitmar-supervise-") as name:
            hosts, hostfile = self.choose_hosts(Path(name))
            if self.command.hostfile is not None and not hosts:
                return 1, []
            words = self.command.words(first, hostfile)
            environment = dict(self.environment)
            if self.command.is_deepspeed and hostfile is not None:
                environment |= recording_pdsh(Path(name))
            self.journal.tell("starting: " + " ".join(words))
            try:
                guarded = Guarded(words, environment, piped=True)
            except OSError as error:
                self.journal.tell(f"{words[0]} cannot be started: {error.strerror}")
                return USER_ERROR, hosts
            code = self.follow(guarded)
            if code == 0 and self.command.is_deepspeed and hostfile is not None:
                recorded = recorded_code(Path(name))
                code = 1 if recorded is None else recorded
            if code == 0 and not came_to_its_end(self.command.run_folder):
                self.journal.tell("exit code 0, but the run has not come to its end")
                code = 1
            return code, hosts

    def choose_hosts(self, folder: Path) -> tuple[list[Host], Path | None]:
        """(hosts that answer and divide the batch, a hostfile of them). Raises HostError for a wrong hostfile."""
        if self.command.hostfile is None:
            return [], None
        listed = read_hostfile(self.command.hostfile)
        found, silent = answering(listed)
        for name, reason in silent.items():
            self.journal.tell(f"host {name} is left out: {reason}")
        chosen = usable(found, self.command.config)
        if not chosen:
            self.journal.tell(f"no number of ranks of the {len(found)} hosts that answer divides the recipe's batch")
        elif silent or chosen != listed:
            self.journal.tell("hosts: " + ", ".join(f"{host.name} slots={host.slots}" for host in chosen))
        write_hostfile(folder / "hostfile", chosen)
        return chosen, folder / "hostfile"

    def hosts_went(self, hosts: Sequence[Host]) -> bool:
        """Whether a host was lost between our question and the start, which is then no mistake of the user's."""
        return bool(answering(hosts)[1]) if hosts else False

    def follow(self, guarded: Guarded) -> int:
        """Pass on what the command writes and the signals that come; its exit code, 128 + signal where one ended it."""
        deadline: float | None = None
        failures = HostFailures()
        for item in follow(guarded):
            if item is not None:
                stream, line = item
                if self.command.is_deepspeed:  # multinode.sh sees to it itself
                    failures.note(line)
                self.last_lines.append(line)
                print(line, end="", file=stream, flush=True)
            if self.stop.signals and deadline is None:
                deadline = time.monotonic() + STOP_GRACE_S
                guarded.ask_to_stop()
            late = deadline is not None and time.monotonic() > deadline
            if late or len(self.stop.signals) > 1 or failures.overdue():
                guarded.end()
        guarded.end()
        code = guarded.process.returncode
        code = 128 - code if code < 0 else code
        if self.stop.signals and code not in (0, STOPPED):
            return 128 + self.stop.signals[0]
        return code

    def wait(self, seconds: float) -> bool:
        """Whether the time passed without a signal that asks to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop.signals:
            time.sleep(0.1)
        return not self.stop.signals

    def report(self) -> str:
        """What failed, when and how often, and the last lines that were written."""
        counts = Counter(failure.code for failure in self.failures)
        often = ", ".join(f"exit code {code}: {count} times" for code, count in counts.most_common())
        lines = [f"giving up after {self.restarts} restarts without a new checkpoint ({often})"]
        for f in self.failures[-(self.max_restarts + 1) :]:
            step = "none" if f.step is None else str(f.step)
            lines.append(f"  {f.when} exit code {f.code} after {f.seconds:.0f} s, hosts {f.hosts}, checkpoint {step}")
        lines += ["  last lines of its output:"] + ["  | " + line.rstrip("\n") for line in self.last_lines]
        return "\n".join(lines)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(our options, the command after --)."""
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        description=(__doc__ or "").split("\n\n")[0],
        usage="supervise.py [--max-restarts N] [--backoff S] [--max-backoff S] -- COMMAND...",
    )
    parser.add_argument("--max-restarts", type=int, default=20, help="in a row without a new checkpoint (20)")
    parser.add_argument("--backoff", type=float, default=5.0, help="seconds before the first restart, then doubled (5)")
    parser.add_argument("--max-backoff", type=float, default=300.0, help="seconds between restarts at most (300)")
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    known = parser.parse_args(arguments[:split])
    command = list(arguments[split + 1 :])
    if not command:
        parser.error("give the command after --")
    if known.max_restarts < 0 or known.backoff < 0 or known.max_backoff < 0:
        parser.error("--max-restarts, --backoff and --max-backoff must be >= 0")
    return known, command


def main(arguments: Sequence[str] | None = None) -> int:
    known, words = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        command = read_command(words)
        return Supervisor(command, known.max_restarts, known.backoff, known.max_backoff).run()
    except (ConfigError, HostError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

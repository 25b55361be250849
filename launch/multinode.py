"""Start a run on the hosts of a hostfile through DeepSpeed's launcher over pdsh; used by launch/multinode.sh.

Every host is asked first (launch/hosts.py); what speaks against it is one line. What ranks need from the environment
goes through a file of its own that DeepSpeed reads in place of .deepspeed_env; keys never do.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitmar.config import Config, ConfigError, load_config
from launch.guard import Guarded, StopRequests, follow
from launch.hosts import (
    LAUNCH_ID,
    ROOT,
    RUN_FOLDER,
    Facts,
    Host,
    HostError,
    Question,
    ask,
    objections,
    on_all,
    read_hostfile,
    ssh_options,
    stop_ranks_command,
)

USER_ERROR, STOPPED = 2, 75
HOST_GRACE_S = 20.0  # for the other hosts once one has failed: their ranks may still tell why
STOP_GRACE_S = 90.0  # for a checkpoint, once the ranks were asked to stop
STOP_TIMEOUT_S = 15.0
FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_", "MKL_", "FI_")
FORWARDED += ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP")
FORWARDED += ("WANDB_RUN_ID", "WANDB_TAGS", "WANDB_NOTES")
FORWARDED += ("DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "MPLBACKEND", "CUDA_DEVICE_MAX_CONNECTIONS")
SECRET = re.compile(r"(^|_)(API|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
UNQUOTABLE = re.compile(r'["`$\\\n]')  # DeepSpeed puts values between double quotes of a shell
CHATTER = re.compile(r"^[^ ]+: \[[^]]*\] \[INFO\] \[launch\.py:")  # of DeepSpeed's launcher on each host
ENDED = re.compile(r"^pdsh@[^:]+: ([^:]+): ssh exited with exit code (\d+)")


class HostFailures:
    """Hosts whose part has failed, as pdsh tells on its standard error. `codes`: exit codes by host."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self._first: float | None = None

    def note(self, line: str) -> None:
        ended = ENDED.match(line)
        if ended:
            self.codes[ended[1]] = int(ended[2])
            self._first = self._first or time.monotonic()

    def overdue(self) -> bool:
        """Whether the other hosts have had their time: a lost host's peers may wait for it for half an hour."""
        return self._first is not None and time.monotonic() > self._first + HOST_GRACE_S


@dataclass(frozen=True)
class Launch:
    """What is started: hosts in rank order, and the values that reach their ranks."""

    hosts: list[Host]
    config: Config
    arguments: list[str]  # of bitmar.train
    environment: dict[str, str]
    address: str  # of rank 0's host
    port: int
    launch_id: str


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/multinode.sh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hostfile", type=Path, required=True, help="lines of `host slots=N`")
    parser.add_argument("--config", required=True, help="recipe: a file, or the name of one in launch/recipes")
    parser.add_argument("--ds", help="file of ds_configs (engine.ds_config)")
    parser.add_argument("--resume", help="auto, never or a checkpoint's folder (checkpoint.resume)")
    parser.add_argument("--port", type=int, help="TCP port on the first host (default: one that is free)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args(arguments)


def prepare(known: argparse.Namespace, environment: Mapping[str, str]) -> Launch:
    """Check recipe and hosts. Raises ConfigError or HostError."""
    hosts = read_hostfile(known.hostfile)
    recipe = known.config
    if not Path(recipe).exists() and Path(f"launch/recipes/{recipe}.yaml").exists():
        recipe = f"launch/recipes/{recipe}.yaml"
    overrides = [*known.overrides, *([f"engine.ds_config={known.ds}"] if known.ds else [])]
    config = load_config(Path(recipe), overrides)
    config.check_world(sum(host.slots for host in hosts))
    launch_id = environment.get(LAUNCH_ID) or secrets.token_hex(6)
    question = Question(
        files=(recipe, config.engine.ds_config),
        shards=None if "://" in config.data.shards else config.data.shards,
        run_folder=str(config.run_directory.resolve()),
        launch_id=launch_id,
        port=known.port,
    )
    facts = ask(hosts, question)
    cpu = environment.get("DS_ACCELERATOR") == "cpu" or not any(have.gpus for have in facts.values())
    problems = objections(hosts, facts, question, cpu)
    port = facts[hosts[0].name].port
    if port is None:
        problems.append(f"port {known.port} is in use on host {hosts[0].name}; leave --port out to take a free one")
    if problems or port is None:
        raise HostError("\n".join(problems))
    resume = ["--resume", known.resume] if known.resume else []
    return Launch(
        hosts=hosts,
        config=config,
        arguments=["--config", recipe, *resume, *overrides],
        environment=rank_environment(environment, cpu, hosts, facts)
        | {LAUNCH_ID: launch_id, RUN_FOLDER: question.run_folder},
        address=facts[hosts[0].name].address,
        port=port,
        launch_id=launch_id,
    )


def rank_environment(
    environment: Mapping[str, str], cpu: bool, hosts: Sequence[Host], facts: Mapping[str, Facts]
) -> dict[str, str]:
    """What must reach the ranks: the user's own values first, then the network interface. Raises HostError."""
    values = read_environment_files() | {k: v for k, v in environment.items() if k.startswith(FORWARDED)}
    values = {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"} | values
    if cpu:
        values["DS_ACCELERATOR"] = "cpu"
    for name in [name for name in values if SECRET.search(name)]:
        del values[name]  # it would stand in command lines and logs of every host
    for name, value in values.items():
        if UNQUOTABLE.search(value):
            raise HostError(f"the environment's {name} cannot be handed to other hosts: it holds one of \" ` $ \\")
    name = "GLOO_SOCKET_IFNAME" if cpu else "NCCL_SOCKET_IFNAME"
    if len(hosts) > 1 and name not in values:
        reached = {host.name: facts[host.name].address for host in hosts}
        looped = [host for host, address in reached.items() if address.startswith("127.") or address == "::1"]
        if looped:
            raise HostError(f"host {looped[0]} is this machine's loopback; name it as the other hosts reach it")
        interfaces = {host.name: facts[host.name].interface for host in hosts}
        if len(set(interfaces.values())) > 1 or None in interfaces.values():
            seen = ", ".join(f"{host}: {interface or 'none'}" for host, interface in interfaces.items())
            raise HostError(f"the hosts' network interfaces differ ({seen}); set {name} to what fits them all")
        values[name] = str(interfaces[hosts[0].name])
    return values


def read_environment_files() -> dict[str, str]:
    """The user's own .deepspeed_env files, which the generated file stands in for: NAME=value lines."""
    values = {}
    for folder in (Path("~").expanduser(), Path()):
        try:
            lines = (folder / ".deepspeed_env").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            continue
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, equals, value = text.partition("=")
            if not equals or not name.isidentifier():
                raise HostError(
                    f"{folder / '.deepspeed_env'}:{number}: expected NAME=value, got {text.split('=')[0]!r}"
                )
            values[name] = value
    return values


def remote_quote(argument: str) -> str:
    """One word for a host's bash, without a blank (DeepSpeed splits there) and without % (pdsh's placeholders)."""
    if re.fullmatch(r"[\w@+=:,./-]+", argument, re.ASCII):
        return argument
    letters = (c if re.fullmatch(r"[\w@+=:,./-]", c, re.ASCII) else _escaped(c) for c in argument)
    return f"$'{''.join(letters)}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def deepspeed_command(launch: Launch, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(command of DeepSpeed's launcher, its environment); `folder` takes the files that it reads."""
    hostfile, variables = folder / "hosts", folder / "environment"
    hostfile.write_text("".join(f"{h.name} slots={h.slots}\n" for h in launch.hosts), encoding="utf-8")
    variables.write_text("".join(f"{k}={v}\n" for k, v in sorted(launch.environment.items())), encoding="utf-8")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    command += ["--hostfile", str(hostfile), "--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
    command += ["--venv_script", f"{ROOT}/launch/remote.sh"]
    command += ["--master_addr", launch.address, "--master_port", str(launch.port)]
    command += ["--module", "bitmar.train", *map(remote_quote, launch.arguments)]
    environment = dict(os.environ) | {k: v for k, v in launch.environment.items() if k == "DS_ACCELERATOR"}
    environment["DS_ENV_FILE"] = str(variables)
    return command, environment | recording_pdsh(folder)


def recording_pdsh(folder: Path) -> dict[str, str]:
    """Variables that make DeepSpeed call pdsh through a script which notes pdsh's exit code in `folder`/code.

    DeepSpeed's launcher exits with 0 when pdsh is killed; without the note that would pass for a finished run.
    """
    pdsh = shutil.which("pdsh")
    if pdsh is None or shutil.which("ssh") is None:
        raise HostError(f"{'pdsh' if pdsh is None else 'ssh'} is not installed; on Debian: apt-get install pdsh "
                        "openssh-client")  # fmt: skip
    (folder / "bin").mkdir()
    script = folder / "bin" / "pdsh"
    script.write_text(f'#!/bin/sh\n{pdsh} "$@"\ncode=$?\necho $code >{folder}/code\nexit $code\n', encoding="utf-8")
    script.chmod(0o755)
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": f"{folder}/bin:{path}", "PDSH_SSH_ARGS_APPEND": " ".join(ssh_options())}


def recorded_code(folder: Path) -> int | None:
    """pdsh's exit code: the largest of the hosts' codes; None where it did not end by itself."""
    try:
        return int((folder / "code").read_text())
    except (OSError, ValueError):
        return None


def run(launch: Launch, folder: Path, stop: StopRequests) -> int:
    """Start the run and stay until it has ended on every host. Returns its exit code."""
    guarded = Guarded(*deepspeed_command(launch, folder), piped=True)
    failures = HostFailures()
    deadline: float | None = None
    for item in follow(guarded):
        if item is not None:
            stream, line = item
            failures.note(line)
            if not CHATTER.match(line):
                print(line, end="", file=stream, flush=True)
        if stop.signals and deadline is None:
            print("stopping: the ranks are asked to save; once more ends them at once", file=sys.stderr, flush=True)
            deadline = time.monotonic() + (STOP_GRACE_S if ask_to_stop(launch) else 0.0)
        if len(stop.signals) > 1 or (deadline is not None and time.monotonic() > deadline) or failures.overdue():
            guarded.end()
    guarded.end()
    code = recorded_code(folder)
    if code is None:
        code = max(failures.codes.values(), default=1)
    if stop.signals and code != STOPPED:
        return 128 + stop.signals[0]
    for host, number in failures.codes.items() if code not in (USER_ERROR, STOPPED) else ():
        print(f"error: host {host}: {meaning(number)}", file=sys.stderr)
    return code


def ask_to_stop(launch: Launch) -> bool:
    """TERM to all ranks on all hosts at the same time. Whether any was there."""
    command = stop_ranks_command(launch.launch_id)
    replies = on_all([host.name for host in launch.hosts], command, STOP_TIMEOUT_S)
    return any(reply.returncode == 0 for reply in replies)


def meaning(code: int) -> str:
    if code == 255:
        return "the connection was lost, or ssh could not start the run there"
    return f"the run ended there with exit code {code}"


def main(arguments: Sequence[str] | None = None) -> int:
    stop = StopRequests()
    known = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="bitmar-launch-") as name:
        try:
            launch = prepare(known, os.environ)
            if " " in str(ROOT):
                raise HostError(
                    f"the repository's path holds a blank, which DeepSpeed's launcher cannot pass on: {ROOT}"
                )
            if stop.signals:
                return 128 + stop.signals[0]
            return run(launch, Path(name), stop)
        except (ConfigError, HostError) as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

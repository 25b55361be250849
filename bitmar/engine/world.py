"""The processes of a run: who this rank is, its device, and the few collectives the trainer uses.

Every sum over ranks is taken from gathered values in rank order, so it has the same bits on every rank.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitmar.config import ConfigError
from bitmar.engine.cores import allowed_cores, bind, machine, share

# rank 0 tells of an error that all ranks meet; a rank that lives on after this tells its own
OTHER_RANK_WAIT_S = 5.0
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # over gloo, for what no device has a part in; None: the default group

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack equal-shaped tensors of all ranks: [...] -> [ranks, ...], the same on every rank."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(parts, flat)
        return torch.stack([p.view(tensor.dtype).reshape(tensor.shape) for p in parts])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, added in rank order."""
        if self.size == 1:
            return tensor
        parts = self.gather(tensor)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank (small picklable objects made by the trainer itself)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set, the same on every rank."""
        return self.agree(int(flag)) != 0

    def agree(self, bits: int) -> int:
        """The bitwise or of all ranks' `bits`, the same on every rank. No device is waited for."""
        if self.size == 1:
            return bits
        box = torch.tensor([bits])
        dist.all_reduce(box, op=dist.ReduceOp.BOR, group=self.control)
        return int(box.item())

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank (small picklable objects made by the trainer itself)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def raise_together(self, problem: str | None, kind: type[Exception]) -> None:
        """Raise `kind(problem)` on every rank where rank 0 has a problem, so that none waits for a rank that left."""
        problem = self.broadcast_object(problem)
        if problem is not None:
            raise kind(problem)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def free_port() -> int:
    """A TCP port that was free a moment ago on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_world(timeout_s: int = 1800, threads: int | None = None, bind_to_cores: bool = True) -> World:
    """Join the process group that the launcher's environment describes; alone without a launcher.

    `threads`: CPU threads of this rank, None for cores divided by the ranks of the machine. `bind_to_cores`: a rank
    that computes on the CPU, and what it starts, stays on its share of the machine's cores, where its threads fit in.
    Raises ConfigError when the environment names only a part of the group, or a port that is taken.
    """
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(f"the launcher's environment lacks {', '.join(missing)}; start with deepspeed or alone")
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_rank = int(env.get("LOCAL_RANK", "0"))
    local_size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(size))))
    cuda = torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if not dist.is_initialized():
        if env["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        _form_group("nccl" if cuda else "gloo", rank, size, timedelta(seconds=timeout_s))
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if cuda and size > 1 else None
    assert not isinstance(control, int), "a rank of the world belongs to a group of all ranks"
    world = World(rank, size, local_rank, local_size, device, control)
    if not cuda:
        _take_cores(world, threads, bind_to_cores)
    return world


def _take_cores(world: World, threads: int | None, bind_to_cores: bool) -> None:
    """Set the threads of a rank that computes on the CPU, and its cores."""
    told = world.gather_objects((machine(), allowed_cores()))
    here = [rank for rank, (place, _) in enumerate(told) if place == machine()]
    shares = share([told[rank][1] for rank in here])
    threads = threads or max(1, min(len(cores) for cores in shares))
    torch.set_num_threads(threads)
    mine = shares[here.index(world.rank)]
    if bind_to_cores and len(mine) >= threads:
        bind(mine)


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed: a step frees and allocates the same tensors again, and pages that have
    gone back to the system come again zeroed, one fault each (a tenth of a step's CPU time). Nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _form_group(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ConfigError(f"port {port} is in use on this host; give deepspeed another --master_port") from None


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone, not that this one failed."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's clean-up. All is written and closed by now, and a library's thread that
    still runs may abort a process that has done its work ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(problem: str) -> None:
    """One line on standard error: from rank 0, and from another rank that is the only one to fail."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHER_RANK_WAIT_S)
    print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{problem}", file=sys.stderr, flush=True)

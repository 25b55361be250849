"""A bad cable between two network namespaces: frames come late, and some never. As tc's netem, which many kernels lack.

python cable.py NAMESPACE DEVICE NAMESPACE DEVICE DELAY_MS LOSS_PERCENT
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
FRAME_BYTES = 65_536
BURST = 64  # frames read from one end before the other has its turn


def open_end(namespace: str, device: str) -> int:
    """A new network device of that namespace, whose frames this process reads and writes."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0) != 0:
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(handle)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def carry(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    """Hand frames from each end to the other, for ever."""
    chance = random.Random(0)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: deque[tuple[float, int, bytes]] = deque()  # (when it arrives, where, frame), in order of arrival
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, (), (), wait_s)[0]:
            for _ in range(BURST):
                try:
                    frame = os.read(end, FRAME_BYTES)
                except OSError:  # none left, or the device is down
                    break
                if chance.random() >= loss:
                    under_way.append((time.monotonic() + delay_s, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            try:
                os.write(end, frame)
            except OSError:  # that end is full or down: lost, as on any cable
                continue


def main(arguments: list[str]) -> None:
    one, one_device, two, two_device, delay_ms, loss_percent = arguments
    ends = open_end(one, one_device), open_end(two, two_device)
    print("connected", flush=True)
    carry(ends, float(delay_ms) / 1000, float(loss_percent) / 100)


if __name__ == "__main__":
    main(sys.argv[1:])

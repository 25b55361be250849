"""The compiled products of bitmar/model/kernel.cpp: built once a host, where there is a C++ compiler.

Shapes: N tokens, I inputs, O outputs, S sections, or columns so far; B rows, n new columns, C columns that are held,
H heads, E numbers a head, D width.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import BFloat16, Bool, Float, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_S = 120.0
A_BYTE = 4  # weights in it
OFF = "BITMAR_NO_KERNEL"  # in the environment: the plain PyTorch way


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "sections")),
        *((name, ctypes.c_int64) for name in ("count", "inputs", "outputs")),
    )


class _Span(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "count", "begin", "capacity")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "allowed")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Weight) for name in ("qkv", "output", "gate_up", "down")),
        *((n, ctypes.c_void_p) for n in ("attention_norm", "sub_norm", "feed_forward_norm", "hidden_norm", "mask")),
        *((name, ctypes.c_int64) for name in ("heads", "width", "sub_norm_count")),
    )


@dataclass(frozen=True)
class KernelWeight:
    """A packed weight as the kernel takes it."""

    packed: UInt8[Tensor, "O B"]
    scale: Float[Tensor, "S"]
    sections: tuple[int, ...]
    inputs: int

    @functools.cached_property
    def pointers(self) -> _Weight:
        """Of these tensors, which live as long. Raises ValueError for what the kernel would read past."""
        bytes_a_row, count = -(-self.inputs // A_BYTE), len(self.sections)
        packed = _address(self.packed, (sum(self.sections), bytes_a_row), torch.uint8)
        scale = _address(self.scale, (count,), torch.float32)
        rows = ctypes.addressof(self._rows)
        return _Weight(packed, scale, rows, count, self.inputs, len(self.packed))

    @functools.cached_property
    def _rows(self) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(self.sections))(*self.sections)


def _address(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Raises ValueError unless it is such a tensor, contiguous and on the CPU."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"the kernel takes a contiguous {dtype} tensor of {list(shape)} on the CPU, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


@dataclass(frozen=True)
class KernelBlock:
    """A text block as the kernel takes it."""

    weights: tuple[KernelWeight, KernelWeight, KernelWeight, KernelWeight]  # qkv, output, gate and up, down
    gains: tuple[Tensor, Tensor, Tensor, Tensor]  # of the norms: attention, sub-norm, feed-forward, its hidden
    mask: Float[Tensor, "I"] | None
    heads: int
    width: int  # of a head
    sub_norm_count: int

    @functools.cached_property
    def pointers(self) -> _Block:
        weights, gains = (w.pointers for w in self.weights), (g.data_ptr() for g in self.gains)
        mask = None if self.mask is None else self.mask.data_ptr()
        return _Block(*weights, *gains, mask, self.heads, self.width, self.sub_norm_count)


class Kernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._bitlinear, self._bf16_linear, self._block = library.bitlinear, library.bf16_linear, library.block
        self._bitlinear.argtypes = [ctypes.POINTER(_Weight), pointer, number, pointer]
        self._bf16_linear.argtypes = [pointer, number, number, pointer, number, pointer]
        self._block.argtypes = [ctypes.POINTER(_Block), ctypes.POINTER(_Span), pointer, pointer, pointer]
        self._bitlinear.restype = self._bf16_linear.restype = self._block.restype = None

    def bitlinear(self, x: Float[Tensor, "N I"], weight: KernelWeight) -> Float[Tensor, "N O"]:
        """BitLinear with its weight packed in 2 bits; the same bits as in PyTorch."""
        x = x.detach().contiguous()
        y = x.new_empty(len(x), len(weight.packed))
        given = _address(x, (len(x), weight.inputs), torch.float32)
        self._bitlinear(weight.pointers, given, len(x), y.data_ptr())
        return y

    def bf16_linear(self, x: Float[Tensor, "N I"], weight: BFloat16[Tensor, "O I"]) -> Float[Tensor, "N O"]:
        """x W^T in fp32, whatever the order of the sums."""
        x = x.detach().contiguous()
        y = x.new_empty(len(x), len(weight))
        given = _address(x, (len(x), weight.shape[1]), torch.float32)
        table = _address(weight, tuple(weight.shape), torch.bfloat16)
        self._bf16_linear(given, *x.shape, table, len(weight), y.data_ptr())
        return y

    def block(
        self,
        x: Float[Tensor, "B n D"],
        block: KernelBlock,
        angles: tuple[Float[Tensor, "B 1 n E"], Float[Tensor, "B 1 n E"]],
        allowed: Bool[Tensor, "B 1 n S"],
        kept: tuple[Float[Tensor, "B H C E"], Float[Tensor, "B H C E"]],
    ) -> Float[Tensor, "B n D"]:
        """A causal block over new columns; `kept` keys and values, of which these are the last, take theirs.

        Attention and norms are in fp64. `angles`: cosines and sines.
        """
        y = x.detach().contiguous().clone()
        rows, _, count, columns = allowed.shape
        capacity = kept[0].shape[2]
        if columns > capacity:
            raise ValueError(f"{columns} columns are more than the {capacity} that are held")
        may = allowed.contiguous()
        turned = (_address(angle, (rows, 1, count, block.width), torch.float32) for angle in angles)
        span = _Span(
            *(rows, count, columns - count, capacity), *turned, _address(may, tuple(allowed.shape), torch.bool)
        )
        held = (_address(t, (rows, block.heads, capacity, block.width), torch.float32) for t in kept)
        self._block(block.pointers, span, _address(y, (rows, count, block.weights[0].inputs), torch.float32), *held)
        return y


def processor() -> str:
    """What this host's processor can do: code for another may kill a process."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {able}"


@functools.cache
def kernel() -> Kernel | None:
    """None where there is no compiler, or where it fails, which is said once."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or os.environ.get(OFF):
        return None
    try:
        return Kernel(ctypes.CDLL(str(built(compiler))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        warnings.warn(f"no compiled kernel, packed models run in PyTorch: {said.strip()[:200]}", stacklevel=2)
        return None


def built(compiler: str) -> Path:
    """The library, compiled where it is not there yet for such a processor."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "bitmar" / "kernels"
    told = [compiler, *FLAGS, processor(), SOURCE.read_text(encoding="utf-8")]
    library = cache / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.partial")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        partial.replace(library)  # two processes may build at once; either's will do
    return library

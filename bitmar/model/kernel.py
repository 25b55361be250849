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

from jaxtyping import BFloat16, Bool, Float, Int, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
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
    sections: Int[Tensor, "S"]
    inputs: int

    @functools.cached_property
    def pointers(self) -> _Weight:
        """Of these tensors, which must be contiguous and live as long."""
        addresses = (t.data_ptr() for t in (self.packed, self.scale, self.sections))
        return _Weight(*addresses, len(self.sections), self.inputs, len(self.packed))


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
        self._bitlinear(weight.pointers, x.data_ptr(), len(x), y.data_ptr())
        return y

    def bf16_linear(self, x: Float[Tensor, "N I"], weight: BFloat16[Tensor, "O I"]) -> Float[Tensor, "N O"]:
        """x W^T in fp32, whatever the order of the sums."""
        x = x.detach().contiguous()
        y = x.new_empty(len(x), len(weight))
        self._bf16_linear(x.data_ptr(), *x.shape, weight.data_ptr(), len(weight), y.data_ptr())
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
        rows, count, columns = allowed.shape[0], allowed.shape[2], allowed.shape[3]
        turned = [angle.expand(rows, -1, -1, -1).contiguous() for angle in angles]
        may = allowed.contiguous()
        addresses = (*(t.data_ptr() for t in turned), may.data_ptr())
        span = _Span(rows, count, columns - count, kept[0].shape[2], *addresses)
        self._block(block.pointers, span, y.data_ptr(), kept[0].data_ptr(), kept[1].data_ptr())
        return y


@functools.cache
def kernel() -> Kernel | None:
    """None where there is no compiler, or where it fails, which is said once."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or os.environ.get(OFF):
        return None
    try:
        return Kernel(ctypes.CDLL(str(built(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        warnings.warn(f"no compiled kernel, packed models run in PyTorch: {said.strip()[:200]}", stacklevel=2)
        return None


def built(compiler: str) -> Path:
    """The library, compiled where it is not there yet; for this host, whose processor it is made for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitmar" / "kernels" / platform.node()
    told = [compiler, *FLAGS, platform.machine(), SOURCE.read_text(encoding="utf-8")]
    library = cache / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.partial")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True, capture_output=True, text=True)
        partial.replace(library)  # two processes may build at once; either's will do
    return library

"""The compiled products of bitmar/model/kernel.cpp: built once a host, where there is a C++ compiler.

Shapes: N tokens, I inputs, O outputs, S sections.
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
from pathlib import Path

from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
OFF = "BITMAR_NO_KERNEL"  # in the environment: the plain PyTorch way


class Kernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._bitlinear, self._bf16_linear = library.bitlinear, library.bf16_linear
        self._bitlinear.argtypes = [pointer, number, number, pointer, number, pointer, pointer, number, pointer]
        self._bf16_linear.argtypes = [pointer, number, number, pointer, number, pointer]
        self._bitlinear.restype = self._bf16_linear.restype = None

    def bitlinear(
        self,
        x: Float[Tensor, "N I"],
        packed: UInt8[Tensor, "O B"],
        scale: Float[Tensor, "S"],
        sections: Int[Tensor, "S"],
    ) -> Float[Tensor, "N O"]:
        """BitLinear with its weight packed in 2 bits; the same bits as in PyTorch."""
        x = x.detach().contiguous()
        y = x.new_empty(len(x), len(packed))
        sizes = (x.data_ptr(), *x.shape, packed.data_ptr(), len(packed))
        self._bitlinear(*sizes, scale.data_ptr(), sections.data_ptr(), len(sections), y.data_ptr())
        return y

    def bf16_linear(self, x: Float[Tensor, "N I"], weight: BFloat16[Tensor, "O I"]) -> Float[Tensor, "N O"]:
        """x W^T in fp32, whatever the order of the sums."""
        x = x.detach().contiguous()
        y = x.new_empty(len(x), len(weight))
        self._bf16_linear(x.data_ptr(), *x.shape, weight.data_ptr(), len(weight), y.data_ptr())
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

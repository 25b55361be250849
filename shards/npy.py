"""Arrays in the .npy format as numpy writes them, read without Python's parser.

numpy's own reader parses headers with `ast`, which CPython 3.11 gets wrong in threads: it raises SystemError
("AST constructor recursion depth mismatch", CPython issue 106905) now and then where two threads parse at once.
"""

from __future__ import annotations

import re
from typing import IO

import numpy as np

SHAPE = rb"\(((?:\d{1,18}, ?)*(?:\d{1,18})?)\)"
HEADER = re.compile(rb"\{'descr': '([<>|=][biufS]\d{1,9})', 'fortran_order': False, 'shape': " + SHAPE + rb", \} *\n")
LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}  # by what an array begins with


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes of the header) of the array that begins here. Raises ValueError on anything else."""
    width = LENGTH_BYTES.get(stream.read(8))
    if width is None:
        raise ValueError("no .npy array")
    length = int.from_bytes(stream.read(width), "little")
    found = HEADER.fullmatch(stream.read(length))
    if found is None:
        raise ValueError("the header of an .npy array is not as numpy writes it")
    shape = tuple(int(size) for size in found[2].replace(b",", b" ").split())
    try:
        return shape, np.dtype(found[1].decode("ascii")), 8 + width + length
    except TypeError as error:  # such as "f3"
        raise ValueError(str(error)) from None


def read_array(stream: IO[bytes]) -> np.ndarray:
    """The array that begins here and ends with the stream. Raises ValueError on anything else."""
    shape, dtype, _ = read_header(stream)
    return np.frombuffer(bytearray(stream.read()), dtype).reshape(shape)

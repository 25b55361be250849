"""The .npy reader against numpy's own, and in many threads at once."""

from __future__ import annotations

import gc
import io
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.npy import read_array, read_header


@given(
    st.sampled_from(["<i8", "<u2", "|u1", "<f2", "<f4", ">i4", "|S7", "|b1"]), st.lists(st.integers(0, 5), max_size=3)
)
def test_what_numpy_writes_is_read(dtype: str, shape: list[int]) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, values)
    buffer.seek(0)
    read = read_array(buffer)
    assert (read.dtype, read.shape) == (values.dtype, values.shape)
    assert read.tobytes() == values.tobytes()
    buffer.seek(0)
    _, _, header_bytes = read_header(buffer)
    assert buffer.tell() == header_bytes == len(buffer.getvalue()) - values.nbytes


@pytest.mark.parametrize("value", [np.zeros((2, 3), order="F"), np.array([{}, None]), np.zeros(2, "i4,f4")])
def test_other_arrays_are_refused(value: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    for data in (buffer.getvalue(), b"", b"\x93NUMPY\x01\x00", buffer.getvalue()[1:]):
        with pytest.raises(ValueError, match=r"npy array"):
            read_array(io.BytesIO(data))


def test_arrays_that_are_cut_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(10))
    with pytest.raises(ValueError, match=r"reshape|buffer size"):
        read_array(io.BytesIO(buffer.getvalue()[:-3]))
    with pytest.raises(ValueError, match=r"reshape"):
        read_array(io.BytesIO(buffer.getvalue()[:-8]))


def test_threads_read_at_once() -> None:
    """In threads of other depths, switched inside of a collection of garbage: numpy's own reader fails at each run."""
    buffer = io.BytesIO()
    np.save(buffer, np.arange(10))
    failed: list[BaseException] = []

    def read(deeper: int) -> None:
        if deeper:
            return read(deeper - 1)
        try:
            for _ in range(500):
                assert read_array(io.BytesIO(buffer.getvalue()))[9] == 9
        except BaseException as error:
            failed.append(error)
        return None

    def collecting(*_: object) -> None:
        sum(range(1000))

    threads = [threading.Thread(target=read, args=(8 * number,)) for number in range(4)]
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(5)
        gc.callbacks.append(collecting)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
    assert failed == []

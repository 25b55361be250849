"""Lists of captions as a stream: equal to json, damage told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import captions
from shards.captions import read_captions
from shards.record import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ELEMENTS = st.one_of(st.text(), st.builds(lambda text, more: {"caption": text, "x": more}, VALUES, VALUES), VALUES)


def read(path: Path) -> list[str | None]:
    return list(itertools.chain.from_iterable(read_captions(path)))


def expected(value: object) -> str | None:
    value = value.get("caption") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


@given(
    st.lists(ELEMENTS, min_size=1, max_size=12),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    elements: list[object],
    indent: int | str | None,
    ascii_only: bool,
    mark: bool,
    chunk: int,
) -> None:
    """Whatever the elements, the spaces, the encoding and where the file is cut while it is read."""
    path = tmp_path_factory.mktemp("json") / "x_captions.json"
    text = json.dumps(elements, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "CHUNK_BYTES", chunk)
        if not ascii_only and any("\ud800" <= c <= "\udfff" for c in text):
            with pytest.raises(DataError, match="not valid JSON"):
                read(path)
        else:
            assert read(path) == [expected(value) for value in elements]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON value"),
        (b"[]", "holds no captions"),
        (b'{"a": 1}', "found dict"),
        (b"3", "found int"),
        (b'["a"', "ends after 1 elements"),
        (b'["a",', "ends after 1 elements"),
        (b'["a", ', "ends after 1 elements"),
        (b'["a", "b', "element 2: Unterminated string"),
        (b'["a" "b"]', "no comma after element 1"),
        (b'["a",]', "element 2: no JSON value"),
        (b'["a"] x', "something follows the list"),
        (b'["\xff"]', "utf-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x_captions.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "x_captions.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endless_element_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_ELEMENT_CHARACTERS", 1 << 21)
    path = tmp_path / "x_captions.json"
    path.write_bytes(b'["' + b"a" * (1 << 24))
    with pytest.raises(DataError, match="Unterminated string"):
        read(path)

"""Lists of files to download: read back as written, and every mistake told with its line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from shards.record import DataError
from tools import fetch_babylm
from tools.file_list import KEYS, FileList, RemoteFile, parse_file_list, read_file_list

PATH = Path("list.yaml")
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}\.(json|npy|zip)", fullmatch=True).filter(
    lambda name: name != "fetched.json"
)
ADDRESSES = st.from_regex(r"https?://[a-z]{1,8}\.org(:[1-9][0-9]{1,3})?/[a-z0-9_./-]{0,12}(\?zip=)?", fullmatch=True)
FILES = st.builds(
    RemoteFile,
    name=NAMES,
    url=st.none() | ADDRESSES,
    zip_url=st.none() | ADDRESSES,
    bytes=st.none() | st.integers(0, 1 << 50),
    sha256=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    page=st.none() | ADDRESSES,
    by_name=st.booleans(),
)
LISTS = st.lists(FILES, min_size=1, max_size=5, unique_by=lambda file: file.name)


def written(files: list[RemoteFile]) -> str:
    plain = {file.name: {key: value for key, value in asdict(file).items() if key != "name"} for file in files}
    return yaml.safe_dump(plain, sort_keys=False)


def refusal(text: str) -> str:
    """The one line that a text is refused with."""
    with pytest.raises(DataError) as caught:
        parse_file_list(text, PATH)
    message = str(caught.value)
    assert "\n" not in message
    return message


@given(LISTS)
def test_read_back(files: list[RemoteFile]) -> None:
    assert parse_file_list(written(files), PATH) == FileList(PATH, tuple(files))


@given(LISTS, st.data())
def test_choice(files: list[RemoteFile], data: st.DataObject) -> None:
    """By name, each once; without names all that are not by_name; a name that is not there tells the others."""
    listed, known = FileList(PATH, tuple(files)), [file.name for file in files]
    names = data.draw(st.lists(st.sampled_from(known), min_size=1))
    chosen = [file.name for file in listed.choose(names)]
    assert (set(chosen), len(chosen)) == (set(names), len(set(names)))
    assert listed.choose([]) == [file for file in files if not file.by_name]
    with pytest.raises(DataError, match="no file 'other'") as caught:
        listed.choose([*names, "other"])
    assert all(name in str(caught.value) for name in known)


@given(LISTS, st.data())
def test_an_unknown_key_is_told_with_its_line(files: list[RemoteFile], data: st.DataObject) -> None:
    lines = written(files).splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("  ")]
    place = data.draw(st.sampled_from(places))
    lines.insert(place, "  md5: abc")
    message = refusal("\n".join(lines))
    assert message.startswith(f"list.yaml, line {place + 1}: ")
    assert ".md5 is not known" in message
    assert all(key in message for key in KEYS)


@given(st.text() | LISTS.map(written).flatmap(lambda text: st.sampled_from(range(len(text))).map(lambda n: text[:n])))
@example("a: &a [*a]")
@example("a: {url: !!python/object/apply:os.getcwd []}")
@example("a: {bytes: 0x, url: 2026-99-99}")
@example("[" * 1000)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    told = ""
    try:
        parse_file_list(text, PATH)
    except DataError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("- a", "line 1: the list must be a mapping"),
        ("a: b", "line 1: a must be a mapping"),
        ("a:\n  url: null\nb:\n  bytes: many", "line 4: b.bytes must be a number of bytes, or null, got 'many'"),
        ("a: {bytes: -1}", "got -1"),
        ("a: {bytes: true}", "got True"),
        ("a: {sha256: ABC}", "64 hexadecimal digits"),
        (f"a: {{sha256: {'0' * 64}}}", "in quotes"),
        ("a: {by_name: 1}", "true or false"),
        ("a: {url: [x]}", "single value"),
        ("a: {url: ftp://host/x}", "must begin with https"),
        ("a: {url: 'https:///x'}", "name a host"),
        ("a: {url: 'https://host/a b'}", "must be an address"),
        ("a:\n  url: null\na: {}", "line 3: a is there twice"),
        ("a: {url: null, url: null}", "url is there twice"),
        ("a/b: {}", "is no name for a file"),
        (".hidden: {}", "is no name for a file"),
        ("fetched.json: {}", "is no name for a file"),
        ("a: {url: 'x", "is not YAML"),
    ],
)
def test_mistakes(text: str, told: str) -> None:
    assert told in refusal(text)


@pytest.mark.parametrize("key", ["url", "zip_url", "page"])
@pytest.mark.parametrize(
    "address",
    [
        "https://user:hush5ecret@host/file",
        "https://hush5ecret@host/file",
        "https://user:hush/5ecret@host/file",
        "https://host/file?X-Amz-Signature=hush5ecret",
        "https://host/file?token=hush5ecret&download=1",
        "https://host/file#hush5ecret",
        "s3://hush5ecret:x@bucket/file",
    ],
)
def test_credentials_are_refused_and_not_repeated(key: str, address: str) -> None:
    message = refusal(f"a: {{{key}: '{address}'}}")
    assert message.startswith(f"list.yaml, line 1: a.{key}")
    assert "5ecret" not in message
    assert "hush" not in message


def test_the_list_of_the_repository() -> None:
    """It reads, and what is downloaded by default is what the conversion wants."""
    chosen = {file.name for file in read_file_list(fetch_babylm.LIST).choose([])}
    halves = {f"cc_3M_dino_v2_states_{part}of2.npy" for part in (1, 2)}
    assert chosen == halves | {
        "cc_3M_captions.json",
        "local_narr_captions.json",
        "local_narr_dino_v2_states.npy",
        "train_50M.zip",
    }


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--list prints every file and needs no folder; mistakes are one line and exit code 2."""
    path, out = tmp_path / "files.yaml", tmp_path / "out"
    path.write_text("a.npy: {url: https://host/a, bytes: 12}\nb.npy: {page: https://host/}\nc.npy: {by_name: true}\n")
    assert fetch_babylm.main(["--files", str(path), "--list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in listed] == [
        ["a.npy", "12", "https://host/a"],
        ["b.npy", "?", "no"],
        ["c.npy", "?", "no"],
    ]
    assert not out.exists()
    for arguments, told in (
        (["d.npy"], "has no file 'd.npy'; it has a.npy, b.npy, c.npy"),
        (["b.npy"], f"b.npy: {path} has no address for it: look at https://host/ and put it under b.npy.url"),
        (["c.npy"], f"c.npy: {path} has no address for it: put it under c.npy.url"),
        (["--files", str(tmp_path / "none.yaml")], "No such file"),
    ):
        assert fetch_babylm.main(["--files", str(path), "--out", str(out), *arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert (errors.count("\n"), told in errors) == (1, True), errors

"""tools/fetch_babylm.py against a server that breaks off, lies and changes: whole files, or one line and exit 2."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.disks import resize, small_disk
from tests.support.file_server import Fault, FileServer, Served, file_server
from tests.support.runs import ROOT, heed_interrupts, make_shards, run_tool

pytestmark = pytest.mark.slow

MIB = 1 << 20
NAME = "a_captions.json"
BIG, OTHER = random.Random(1).randbytes(5 * MIB + 123), random.Random(2).randbytes(5 * MIB + 123)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def arguments(folder: Path, files: dict[str, dict[str, Any]], *more: object) -> list[str]:
    """Of the tool, for a list of these files; everything lies in `folder`."""
    path = folder / "files.yaml"
    path.write_text(yaml.safe_dump(files), encoding="utf-8")
    return list(map(str, ("--files", path, "--out", folder / "raw", *more)))


def fetch(folder: Path, files: dict[str, dict[str, Any]], *more: object) -> subprocess.CompletedProcess[str]:
    return run_tool("fetch_babylm.py", *arguments(folder, files, *more))


def start(folder: Path, files: dict[str, dict[str, Any]], *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "fetch_babylm.py"), *arguments(folder, files, *more)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heed_interrupts
    )


def whole(done: subprocess.CompletedProcess[str], folder: Path, data: bytes, name: str = NAME) -> None:
    """The run ended well: the file is there, remembered, and nothing but locks is left over."""
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "raw" / name).read_bytes() == data
    remembered = json.loads((folder / "raw" / "fetched.json").read_text())
    assert remembered[name] == {"bytes": len(data), "sha256": sha256(data)}
    left = {path.name for path in (folder / "raw" / ".fetch").iterdir() if path.suffix != ".lock"}
    assert left <= {f"{name}.wrong"}


def refused(done: subprocess.CompletedProcess[str], folder: Path, *told: str, name: str = NAME) -> None:
    """The run ended with one line, and nothing has the name of the file."""
    assert done.returncode == 2, done.stdout
    assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: "), done.stderr
    assert all(text in done.stderr for text in told), done.stderr
    assert not (folder / "raw" / name).exists()


def ranges(server: FileServer) -> list[str | None]:
    return [answer.range for answer in server.answers]


def part(folder: Path, name: str = NAME) -> Path:
    return folder / "raw" / ".fetch" / f"{name}.part"


def test_downloaded_once(server: FileServer, tmp_path: Path) -> None:
    """Sizes and sums not known are printed and remembered; a second run asks the server for nothing."""
    server.files["x"] = Served(BIG)
    files = {NAME: {"url": server.url("x"), "bytes": None, "sha256": None}}
    done = fetch(tmp_path, files)
    whole(done, tmp_path, BIG)
    assert f"{NAME}: {len(BIG)} bytes, sha256 {sha256(BIG)} (remembered in fetched.json)" in done.stdout
    for more in ((), ("--verify",)):
        again = fetch(tmp_path, files, *more)
        whole(again, tmp_path, BIG)
        assert f"{NAME}: already here" in again.stdout
    assert len(server.answers) == 1


def test_raw_files_that_convert(server: FileServer, tiny_raw: Path, tmp_path: Path) -> None:
    """What comes, by its own address or out of a packed folder, is what tools/make_shards.py takes."""
    packed, files = io.BytesIO(), {}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(tiny_raw.iterdir()):
            in_zip = path.suffix != ".json"
            if in_zip:
                archive.write(path, f"multimodal/{path.name}")
            else:
                server.files[path.name] = Served(path.read_bytes())
            key, url = ("zip_url", "folder/?zip=") if in_zip else ("url", f"to/{path.name}")
            files[path.name] = {key: server.url(url), "sha256": sha256(path.read_bytes())}
    server.files["folder/"] = Served(packed.getvalue(), chunked=True, tag=None)
    done = fetch(tmp_path, files)
    for path in tiny_raw.iterdir():
        whole(done, tmp_path, path.read_bytes(), path.name)
    assert [answer.path for answer in server.answers].count("/folder/?zip=") == 1
    make_shards(tmp_path / "raw", tmp_path / "shards")


@pytest.mark.parametrize(
    ("path", "faults", "offsets"),
    [
        ("x", [Fault(cut=MIB), Fault(status=500)], [MIB, MIB]),
        ("to/x", [Fault(cut=MIB), Fault(cut=2 * MIB)], [MIB, 3 * MIB]),
    ],
    ids=["direct", "redirected"],
)
def test_broken_off(server: FileServer, tmp_path: Path, path: str, faults: list[Fault], offsets: list[int]) -> None:
    """Every attempt asks for what is missing only, of the state that is here."""
    server.files["x"] = Served(BIG, faults=faults)
    whole(fetch(tmp_path, {NAME: {"url": server.url(path), "sha256": sha256(BIG)}}), tmp_path, BIG)
    answers = [answer for answer in server.answers if answer.path == "/x"]
    assert [answer.range for answer in answers] == [None, *(f"bytes={offset}-" for offset in offsets)]
    assert [answer.if_range for answer in answers] == [None, '"1"', '"1"']
    assert sum(answer.sent for answer in answers) == len(BIG)


def test_no_ranges(server: FileServer, tmp_path: Path) -> None:
    """A server that ignores Range sends the whole again, which replaces what was here."""
    server.files["x"] = Served(BIG, ranges=False, faults=[Fault(cut=MIB)])
    whole(fetch(tmp_path, {NAME: {"url": server.url("x")}}), tmp_path, BIG)
    assert [answer.sent for answer in server.answers] == [MIB, len(BIG)]


@pytest.mark.parametrize("known", [True, False])
def test_not_there(server: FileServer, tmp_path: Path, known: bool) -> None:
    """404 ends a file at once; the others come all the same."""
    server.files["x"] = Served(BIG)
    files: dict[str, dict[str, Any]] = {"0.npy": {"url": server.url("none") if known else None}}
    done = fetch(tmp_path, {**files, NAME: {"url": server.url("x")}})
    told = (server.url("none"), "HTTP 404") if known else ("files.yaml has no address for it",)
    refused(done, tmp_path, "0.npy: ", *told, name="0.npy")
    assert (tmp_path / "raw" / NAME).read_bytes() == BIG
    assert len(server.answers) == 1 + known


@pytest.mark.parametrize("fault", [Fault(declare=len(BIG) + 9), Fault(cut=0), Fault(status=503)])
def test_never_whole(server: FileServer, tmp_path: Path, fault: Fault) -> None:
    """More promised than sent, nothing sent, nothing but failures: attempts end, with the address."""
    server.files["x"] = Served(BIG, ranges=False, faults=[fault] * 2)
    refused(fetch(tmp_path, {NAME: {"url": server.url("x")}}, "--attempts", 2), tmp_path, NAME, server.url("x"))
    assert len(server.answers) == 2


def test_stalled(server: FileServer, tmp_path: Path) -> None:
    """A server that sends nothing for too long is asked again for the rest."""
    server.files["x"] = Served(BIG, faults=[Fault(hold=MIB)])
    whole(fetch(tmp_path, {NAME: {"url": server.url("x")}}, "--timeout-s", 2), tmp_path, BIG)
    assert ranges(server) == [None, f"bytes={MIB}-"]


def test_another_size(server: FileServer, tmp_path: Path) -> None:
    """The list's size against a server that declares, or sends, another one."""
    files = {NAME: {"url": server.url("x"), "bytes": len(BIG)}}
    for served in (Served(BIG[:-1]), Served(BIG + b"x"), Served(BIG, faults=[Fault(declare=len(BIG) - 5)] * 2)):
        server.files["x"] = served
        refused(fetch(tmp_path, files, "--attempts", 2), tmp_path, str(len(BIG)), server.url("x"))
    server.files["x"] = Served(BIG + b"x", chunked=True)
    refused(fetch(tmp_path, files, "--attempts", 1), tmp_path, f"more than the {len(BIG)} bytes expected")


@pytest.mark.parametrize("between_runs", [False, True])
@pytest.mark.parametrize(
    ("tag", "if_range"), [('"1"', True), ('"1"', False), ('W/"1"', True), (None, True)], ids=lambda value: str(value)
)
def test_changed_between_tries(
    server: FileServer, tmp_path: Path, tag: str | None, if_range: bool, between_runs: bool
) -> None:
    """Two states of a file are never glued together, also where nothing (usable) tells the server's states apart."""
    files = {NAME: {"url": server.url("x")}}
    after = Served(OTHER, tag and tag.replace("1", "2"), if_range=if_range)
    server.files["x"] = Served(BIG, tag, if_range=if_range, faults=[Fault(cut=2 * MIB, then=after)])
    if between_runs:
        refused(fetch(tmp_path, files, "--attempts", 1), tmp_path, NAME, "connection broke")
        assert part(tmp_path).read_bytes() == BIG[: 2 * MIB]
    whole(fetch(tmp_path, files), tmp_path, OTHER)
    assert len(server.answers) >= 2


def test_another_address(server: FileServer, tmp_path: Path) -> None:
    """What came from one address is not continued from another."""
    server.files |= {"x": Served(BIG, faults=[Fault(cut=MIB)]), "y": Served(OTHER)}
    refused(fetch(tmp_path, {NAME: {"url": server.url("x")}}, "--attempts", 1), tmp_path, NAME)
    part(tmp_path, "b.npy").write_bytes(BIG)  # whole, and from nobody knows where
    files = {name: {"url": server.url("y"), "bytes": len(OTHER)} for name in (NAME, "b.npy")}
    done = fetch(tmp_path, files)
    for name in files:
        whole(done, tmp_path, OTHER, name)
    assert ranges(server) == [None, None, None]


def test_dates_tell_states_apart(server: FileServer, tmp_path: Path) -> None:
    """Where a server has no strong ETag, the date of the file does."""
    days = [f"Fri, 0{day} Mar 2024 10:00:00 GMT" for day in (1, 2)]
    after = Served(OTHER, 'W/"2"', days[1])
    server.files["x"] = Served(BIG, 'W/"1"', days[0], faults=[Fault(cut=MIB), Fault(cut=MIB, then=after)])
    whole(fetch(tmp_path, {NAME: {"url": server.url("x")}}), tmp_path, OTHER)
    assert [(answer.range, answer.if_range) for answer in server.answers] == [
        (None, None),
        (f"bytes={MIB}-", days[0]),
        (f"bytes={2 * MIB}-", days[0]),
    ]


def test_corrupt_bytes(server: FileServer, tmp_path: Path) -> None:
    """A wrong checksum names both, and the file is moved out of the way."""
    server.files["x"] = Served(OTHER)
    files = {NAME: {"url": server.url("x"), "sha256": sha256(BIG)}}
    wrong = tmp_path / "raw" / ".fetch" / f"{NAME}.wrong"
    refused(fetch(tmp_path, files), tmp_path, sha256(BIG), sha256(OTHER), f"moved to {wrong}")
    assert wrong.read_bytes() == OTHER
    server.files["x"] = Served(BIG)
    whole(fetch(tmp_path, files), tmp_path, BIG)


def test_a_part_that_is_damaged(server: FileServer, tmp_path: Path) -> None:
    """Where a continued download has the wrong checksum, it starts over once."""
    server.files["x"] = Served(BIG, faults=[Fault(cut=MIB)])
    files = {NAME: {"url": server.url("x"), "sha256": sha256(BIG)}}
    refused(fetch(tmp_path, files, "--attempts", 1), tmp_path, NAME)
    part(tmp_path).write_bytes(OTHER[:MIB])
    whole(fetch(tmp_path, files), tmp_path, BIG)
    assert ranges(server) == [None, f"bytes={MIB}-", None]


def test_remembered(server: FileServer, tmp_path: Path) -> None:
    """A file that comes again, or lies there, must be the one that came first."""
    path, files = tmp_path / "raw" / NAME, {NAME: {"url": server.url("x")}}
    server.files["x"] = Served(BIG)
    whole(fetch(tmp_path, files), tmp_path, BIG)
    path.write_bytes(OTHER)
    assert fetch(tmp_path, files).returncode == 0  # of the same size, and not read
    refused(fetch(tmp_path, files, "--verify"), tmp_path, sha256(BIG), sha256(OTHER), "fetched.json")
    whole(fetch(tmp_path, files), tmp_path, BIG)
    path.write_bytes(BIG[:-1])
    refused(fetch(tmp_path, files), tmp_path, f"{len(BIG) - 1} bytes, expected {len(BIG)}")
    server.files["x"] = Served(OTHER)
    refused(fetch(tmp_path, files), tmp_path, sha256(BIG), sha256(OTHER), "fetched.json")
    other = {NAME: {"url": server.url("x"), "sha256": sha256(OTHER)}}
    whole(fetch(tmp_path, other), tmp_path, OTHER)  # the list has the last word
    refused(fetch(tmp_path, {NAME: {"sha256": sha256(BIG)}}), tmp_path, sha256(BIG), sha256(OTHER), "the list says")
    (tmp_path / "raw" / "fetched.json").write_text('{"a": 1}')
    refused(fetch(tmp_path, files), tmp_path, "fetched.json is damaged: remove it")


def test_put_there_by_hand(server: FileServer, tmp_path: Path) -> None:
    path, files = tmp_path / "raw" / NAME, {NAME: {"url": server.url("x")}}
    path.parent.mkdir()
    path.write_bytes(BIG)
    done = fetch(tmp_path, files)
    whole(done, tmp_path, BIG)
    assert "not compared with anything" in done.stdout
    (tmp_path / "raw" / "fetched.json").unlink()
    whole(fetch(tmp_path, {NAME: {"sha256": sha256(BIG)}}), tmp_path, BIG)
    (tmp_path / "raw" / "fetched.json").unlink()
    refused(fetch(tmp_path, {NAME: {"sha256": sha256(OTHER)}}), tmp_path, sha256(BIG), sha256(OTHER))
    assert not server.answers


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted(server: FileServer, tmp_path: Path, how: signal.Signals) -> None:
    """What came before kill -9 or Ctrl-C is kept, and the next run fetches the rest only."""
    files = {NAME: {"url": server.url("x"), "sha256": sha256(BIG)}}
    server.files["x"] = Served(BIG, faults=[Fault(hold=4 * MIB)])
    process = start(tmp_path, files)
    wait_for_bytes(part(tmp_path), 2 * MIB, process)
    process.send_signal(how)
    _, errors = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "error: interrupted; what came is kept, the same command goes on\n"
    server.go_on.set()
    have = part(tmp_path).stat().st_size
    assert not (tmp_path / "raw" / NAME).exists()
    whole(fetch(tmp_path, files), tmp_path, BIG)
    assert (server.answers[1].range, server.answers[1].status) == (f"bytes={have}-", 206)
    assert server.answers[1].sent == len(BIG) - have


def wait_for_bytes(path: Path, size: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or path.stat().st_size < size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_two_runs_into_one_folder(server: FileServer, tmp_path: Path) -> None:
    """The second refuses a file that the first downloads, takes others, and the first is not disturbed."""
    server.files |= {"x": Served(BIG, faults=[Fault(hold=2 * MIB)]), "y": Served(OTHER)}
    files = {NAME: {"url": server.url("x")}, "b.npy": {"url": server.url("y")}}
    first = start(tmp_path, files, NAME)
    assert server.holding.wait(60)
    second = fetch(tmp_path, files)
    refused(second, tmp_path, f"{NAME}: another run downloads it into {tmp_path / 'raw'}: wait for it")
    server.go_on.set()
    _, errors = first.communicate()
    assert (first.returncode, errors) == (0, "")
    done = fetch(tmp_path, files)
    whole(done, tmp_path, BIG)
    whole(done, tmp_path, OTHER, "b.npy")
    assert len(server.answers) == 2


def test_a_full_disk(server: FileServer, tmp_path: Path) -> None:
    """One line; with room made, the same command goes on."""
    server.files["x"] = Served(BIG)
    with small_disk(tmp_path / "disk", "3m") as disk:
        files = {NAME: {"url": server.url("x"), "sha256": sha256(BIG)}}
        refused(fetch(disk, files), disk, "no space left: make room, then the same command goes on")
        have = part(disk).stat().st_size
        assert have > MIB
        resize(disk, "9m")
        whole(fetch(disk, files), disk, BIG)
        assert ranges(server)[1:] == [f"bytes={have}-"]


def test_no_folder(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a file")
    refused_at = fetch(tmp_path, {NAME: {"url": server.url("x")}})
    assert (refused_at.returncode, refused_at.stderr.count("\n")) == (2, 1), refused_at.stderr


def packed(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_files_of_a_zip(server: FileServer, tmp_path: Path) -> None:
    """One download serves every file of a zip, also of a later run; it goes when all are here."""
    server.files["z"] = Served(packed({"in/" + NAME: BIG, "b.npy": OTHER, "README": b"x"}), chunked=True)
    files = {name: {"zip_url": server.url("z")} for name in (NAME, "b.npy")}
    first = fetch(tmp_path, files, NAME)
    assert (first.returncode, first.stderr) == (0, "")
    assert "is kept for b.npy" in first.stdout
    done = fetch(tmp_path, files)
    whole(done, tmp_path, BIG)
    whole(done, tmp_path, OTHER, "b.npy")
    assert len(server.answers) == 1


def test_zips_that_are_wrong(server: FileServer, tmp_path: Path) -> None:
    """None, without the file, damaged, or with another file than listed: one line, nothing has the name."""
    good, files = packed({NAME: BIG}), {NAME: {"zip_url": server.url("z")}}
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    work = tmp_path / "raw" / ".fetch"
    for data, told in (
        (BIG, "sent no whole zip"),
        (good[:-30], "sent no whole zip"),
        (bytes(damaged), "is damaged (Bad CRC-32"),
        (packed({"other": BIG}), "holds it 0 times, not once; it has other;"),
    ):
        server.files["z"] = Served(data, chunked=True)
        refused(fetch(tmp_path, files), tmp_path, NAME if "CRC" in told else "", told)
        for archive in work.glob("*.zip"):
            archive.unlink()
    server.files["z"] = Served(good, chunked=True)
    listed = {NAME: {**files[NAME], "sha256": sha256(OTHER)}}
    for _ in range(2):  # the zip stays, so that a corrected list needs no other download
        refused(fetch(tmp_path, listed), tmp_path, f"its sha256 in the zip is {sha256(BIG)}, expected {sha256(OTHER)}")
    before = len(server.answers)
    done = fetch(tmp_path, files)
    assert (done.returncode, len(server.answers)) == (0, before)
    assert (tmp_path / "raw" / NAME).read_bytes() == BIG

"""BabyLM's raw files -> validated records, lazily.

A raw directory holds `NAME_captions.json` with `NAME_dino_v2_states.npy` (or `_1of2` and `_2of2`), and/or
`train_50M.zip` with six text files. Row i of the vectors belongs to caption i. Symbols: N pairs, V width.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from shards.captions import read_captions
from shards.index import UNREADABLE
from shards.record import VECTOR_SIZE, DataError, sanitise_source

TEXT_ARCHIVE = "train_50M.zip"
TEXT_MEMBERS = ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard")
GENERATED_MARK = "GENERATED.md"
CAPTIONS_SUFFIX, VECTORS_SUFFIX = "_captions.json", "_dino_v2_states"
MAX_RECORD_WORDS = 512
VECTOR_BYTES = 4 * VECTOR_SIZE
HEADING = re.compile(r"\s*= = = .*= = =\s*")
WORD = re.compile(r"\S+")
BUFFER_BYTES = 1 << 20
BATCH = 4096
NOT_WAITING: int = getattr(os, "RWF_NOWAIT", 0)  # Linux has it


@dataclass(frozen=True)
class Rejected:
    """A raw sample that was left out: its source, row (or record number) and why."""

    source: str
    row: int
    reason: str


@dataclass(frozen=True)
class VectorFile:
    """An .npy file of float32 vectors: how many, and where in the file they begin."""

    path: Path
    begin: int
    rows: int


@dataclass(frozen=True)
class RawPairs:
    """The captions and vectors of one NAME. Neither is held in memory."""

    source: str
    captions: Path
    parts: tuple[VectorFile, ...]

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.captions, *(part.path for part in self.parts))

    def records(self) -> Iterator[str | Rejected]:
        """Stream the captions one by one; else as `batches`."""
        return itertools.chain.from_iterable(self.batches())

    def batches(self) -> Iterator[Sequence[str | Rejected]]:
        """Stream the captions in order, some thousands at a time, an unusable one as Rejected.

        Raises DataError when the file is damaged or does not hold as many captions as there are vectors.
        """
        rows, vectors = 0, len(self)
        for captions in read_captions(self.captions):
            checked = map(self._checked, range(rows, rows + len(captions)), captions)
            batch = captions if are_usable(captions) else list(checked)
            yield batch[: max(0, vectors - rows)]
            rows += len(batch)
        if rows != vectors:
            counted = " + ".join(f"{part.rows} in {part.path.name}" for part in self.parts)
            raise DataError(
                f"{self.captions.parent}: {rows} captions in {self.captions.name} but {vectors} vectors "
                f"({counted}): row i must belong to caption i, get the files that belong together"
            )

    def _checked(self, row: int, caption: str | None) -> str | Rejected:
        fault = caption_fault(caption)
        return caption if fault is None and caption is not None else Rejected(self.source, row, fault or "")

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), V]: the vectors of `rows` across the concatenated parts."""
        return read_vectors(self.parts, rows)


def read_vectors(parts: Sequence[VectorFile], rows: np.ndarray) -> np.ndarray:
    """float32 [len(rows), V]: the vectors of `rows` across the concatenated parts.

    Read, not mapped: mapped pages would count as this process's memory, and a file that shrinks would kill it. What is
    not in memory is asked for all at once, so that the disk can fetch it in its own order.
    Raises DataError when a file is shorter than it was.
    """
    out = np.empty((len(rows), VECTOR_SIZE), dtype="<f4")
    into = memoryview(out.reshape(-1).view(np.uint8).data)
    for part, inside, places in _by_part(parts, rows):
        breaks = np.flatnonzero((np.diff(inside) != 1) | (np.diff(places) != 1)) + 1
        lows = np.concatenate([[0], breaks])  # runs of rows that follow each other here and there
        sizes = np.diff(lows, append=len(inside)) * VECTOR_BYTES
        begins = places[lows] * VECTOR_BYTES
        targets = [into[begin:end] for begin, end in zip(begins.tolist(), (begins + sizes).tolist(), strict=True)]
        offsets = (part.begin + inside[lows] * VECTOR_BYTES).tolist()
        with part.path.open("rb", buffering=0) as stream:
            _read_runs(stream.fileno(), list(zip(targets, offsets, strict=True)), part.path)
    return out


def _read_runs(file: int, runs: list[tuple[memoryview, int]], path: Path) -> None:
    """Fill each target from its offset. Raises DataError at the file's end."""
    runs = runs[_read_cached(file, runs) :]
    if hasattr(os, "posix_fadvise"):
        for target, offset in runs:
            os.posix_fadvise(file, offset, len(target), os.POSIX_FADV_WILLNEED)
    for target, offset in runs:
        while len(target):
            count = os.preadv(file, [target], offset)  # may give less
            if count == 0:
                raise DataError(f"{path} became shorter while it was read: get the file again")
            target, offset = target[count:], offset + count


def _read_cached(file: int, runs: list[tuple[memoryview, int]]) -> int:
    """Fill targets as long as their bytes are in memory; returns how many. 0 where the file system cannot tell."""
    done = 0
    if NOT_WAITING:
        with contextlib.suppress(OSError):
            for target, offset in runs:
                if os.preadv(file, [target], offset, NOT_WAITING) != len(target):
                    break
                done += 1
    return done


def _by_part(parts: Sequence[VectorFile], rows: np.ndarray) -> Iterator[tuple[VectorFile, np.ndarray, np.ndarray]]:
    """(part, its own rows in ascending order, their places in `rows`) of the parts that hold any."""
    order = np.argsort(rows, kind="stable")
    begins = np.cumsum([0, *(part.rows for part in parts)])
    cuts = np.searchsorted(rows[order], begins).tolist()
    for part, begin, low, high in zip(parts, begins.tolist(), cuts, cuts[1:], strict=False):
        if high > low:
            yield part, rows[order[low:high]] - begin, order[low:high]


def are_usable(captions: list[str | None]) -> TypeGuard[list[str]]:
    """Whether caption_fault finds nothing in any of them."""
    try:
        return all(map(str.strip, captions)) and "".join(captions).encode("utf-8") is not None  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        return False


def caption_fault(caption: str | None) -> str | None:
    """Why a caption cannot be used, None when it can."""
    if caption is None:
        return "caption is not a string"
    if not caption.strip():
        return "caption is empty"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        return "caption is not valid Unicode (lone surrogate)"
    return None


@dataclass(frozen=True)
class RawText:
    """One text file inside the archive."""

    source: str
    archive: Path
    member: str

    def batches(self) -> Iterator[list[str | Rejected]]:
        """Stream the records some thousands at a time; else as `records`."""
        pending = self.records()
        while batch := list(itertools.islice(pending, BATCH)):
            yield batch

    def records(self) -> Iterator[str | Rejected]:
        """Stream the records of the file in order; a line that is not UTF-8 comes as Rejected.

        Raises DataError when the archive is damaged.
        """
        try:
            with zipfile.ZipFile(self.archive) as archive, archive.open(self.member) as stream:
                assert isinstance(stream, io.BufferedIOBase)  # ZipExtFile is one, though typed as IO[bytes]
                yield from cut_records(io.BufferedReader(stream, BUFFER_BYTES), self.source)  # type: ignore[arg-type]
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise DataError(f"{self.archive.name}: {self.member} is damaged ({error}): get the archive again") from None


def cut_records(lines: Iterable[bytes], source: str) -> Iterator[str | Rejected]:
    """Cut lines of UTF-8 into records of at most 512 consecutive words, verbatim, joined with newlines.

    Blank lines end a record; a heading (`= = = X = = =`) begins one and keeps what follows it, past blank
    lines. Lines stay whole unless longer than 512 words. Words of all records sum to those of the lines.
    """
    pending: list[str] = []
    count, record, after_heading = 0, 0, False
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            fault = Rejected(source, record + bool(pending), f"line {number} is not UTF-8 (byte {error.start})")
            line = ""
        else:
            fault = None
        words = len(line.split())
        heading = words > 0 and HEADING.fullmatch(line) is not None
        full = count + words > MAX_RECORD_WORDS
        if pending and (fault or heading or full or (words == 0 and not after_heading)):
            yield "\n".join(pending)
            pending, count, record = [], 0, record + 1
        if fault:
            yield fault
            record += 1
        if words:
            *whole, (line, words) = cut_line(line, words)
            for piece, _ in whole:
                yield piece
                record += 1
            pending.append(line)
            count += words
        after_heading = heading or (after_heading and words == 0 and not fault)
    if pending:
        yield "\n".join(pending)


def cut_line(line: str, words: int) -> list[tuple[str, int]]:
    """Pieces of at most 512 words of a line, each with its words; a line that fits stays as it is."""
    if words <= MAX_RECORD_WORDS:
        return [(line, words)]
    spans = [match.span() for match in WORD.finditer(line)]
    pieces = []
    for start in range(0, len(spans), MAX_RECORD_WORDS):
        piece = spans[start : start + MAX_RECORD_WORDS]
        pieces.append((line[piece[0][0] : piece[-1][1]], len(piece)))
    return pieces


@dataclass(frozen=True)
class RawSet:
    """All raw data of a directory, sources sorted by name."""

    pairs: tuple[RawPairs, ...]
    texts: tuple[RawText, ...]
    files: tuple[Path, ...]
    generated: bool


def open_raw(directory: Path) -> RawSet:
    """Find and check the raw files of `directory` (names, shapes, counts; not yet every sample).

    Raises DataError naming the file, the numbers and what would do.
    """
    if not directory.is_dir():
        raise DataError(f"raw directory {directory} does not exist: name the folder of the raw files")
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pairs = tuple(_open_pairs(directory, name, names) for name in _pair_names(names))
    texts = _open_texts(directory, names)
    if not pairs and not texts:
        raise DataError(
            f"no raw data in {directory}: looked for NAME{CAPTIONS_SUFFIX} with NAME{VECTORS_SUFFIX}.npy (or "
            f"_1of2.npy and _2of2.npy), and for {TEXT_ARCHIVE}; files: {', '.join(names[:20]) or 'none'}"
        )
    _refuse_misnamed(directory, names)
    sources = [item.source for item in (*pairs, *texts)]
    twice = sorted({source for source in sources if sources.count(source) > 1})
    if twice:
        raise DataError(f"two raw files in {directory} give the source name {twice[0]!r}: rename one of them")
    files = [path for item in pairs for path in item.files]
    if texts:
        files.append(directory / TEXT_ARCHIVE)
    return RawSet(pairs, texts, tuple(files), GENERATED_MARK in names)


def _pair_names(names: list[str]) -> list[str]:
    vectors = re.compile(rf"(.+){VECTORS_SUFFIX}(_[12]of2)?\.npy")
    found = {name.removesuffix(CAPTIONS_SUFFIX) for name in names if name.endswith(CAPTIONS_SUFFIX)}
    found |= {match[1] for name in names if (match := vectors.fullmatch(name))}
    return sorted(found - {""})


def _refuse_misnamed(directory: Path, names: list[str]) -> None:
    """Refuse files that look like raw data under a name that would be passed over in silence."""
    known = re.compile(rf".+{CAPTIONS_SUFFIX}|.+{VECTORS_SUFFIX}(_[12]of2)?\.npy|{re.escape(TEXT_ARCHIVE)}")
    for name in names:
        low = name.lower()
        suspect = (
            (low.endswith(".json") and "caption" in low)
            or (low.endswith(".npy") and ("dino" in low or "states" in low))
            or (low.endswith(".zip") and "train" in low and TEXT_ARCHIVE not in names)
        )
        if suspect and not known.fullmatch(name):
            raise DataError(
                f"{directory / name} looks like raw data but has another name than NAME{CAPTIONS_SUFFIX}, "
                f"NAME{VECTORS_SUFFIX}.npy (or _1of2, _2of2) or {TEXT_ARCHIVE}: rename it or move it away"
            )


def _missing(directory: Path, wanted: str, because: str, names: list[str]) -> DataError:
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    hint = f"names like it there: {', '.join(near)}" if near else "nothing there has a name like it"
    return DataError(f"{directory / wanted} is missing ({because}); {hint}: add or rename the file")


def _open_pairs(directory: Path, name: str, names: list[str]) -> RawPairs:
    """The pairs of one NAME, counts and shapes checked."""
    captions_name = name + CAPTIONS_SUFFIX
    single = f"{name}{VECTORS_SUFFIX}.npy"
    halves = [f"{name}{VECTORS_SUFFIX}_{part}of2.npy" for part in (1, 2)]
    present = [half for half in halves if half in names]
    if captions_name not in names:
        have = single if single in names else present[0]
        raise _missing(directory, captions_name, f"{have} is there", names)
    if single in names and present:
        raise DataError(f"{directory}: both {single} and {present[0]} are there: keep one or the other")
    if single not in names and not present:
        others = [other for other in names if other != captions_name]
        reason = f"{captions_name} is there; {halves[0]} and {halves[1]} would do as well"
        raise _missing(directory, single, reason, others)
    if len(present) == 1:
        absent = halves[1] if present[0] == halves[0] else halves[0]
        raise _missing(directory, absent, f"its other half {present[0]} is there", names)
    parts = tuple(_open_vectors(directory / vectors) for vectors in present or [single])
    return RawPairs(sanitise_source(name), directory / captions_name, parts)


def _open_vectors(path: Path) -> VectorFile:
    """The place and number of the vectors of a file, from its header and size."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(f"{path} is not a whole .npy file ({error}): get the file again") from None
    if not isinstance(vectors, np.memmap):
        raise DataError(f"{path} is an .npz archive: expected a plain .npy array")
    if vectors.ndim != 2 or vectors.shape[1] != VECTOR_SIZE:
        raise DataError(f"{path} has shape {vectors.shape}: expected (N, {VECTOR_SIZE}), one DINOv2 vector a caption")
    if vectors.dtype != np.dtype("<f4"):
        raise DataError(
            f"{path} has dtype {vectors.dtype.str}: expected little-endian float32, convert it with "
            "numpy.save(NEW, numpy.load(OLD).astype('<f4'))"
        )
    if not vectors.flags.c_contiguous:
        raise DataError(
            f"{path} lies in Fortran order: convert it with numpy.save(NEW, numpy.ascontiguousarray(numpy.load(OLD)))"
        )
    return VectorFile(path, vectors.offset, len(vectors))


def _open_texts(directory: Path, names: list[str]) -> tuple[RawText, ...]:
    """The six text files of the archive, wherever inside it they lie; empty when there is no archive."""
    if TEXT_ARCHIVE not in names:
        return ()
    path = directory / TEXT_ARCHIVE
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole zip ({error}): get the archive again") from None
    entries = [e for e in entries if not e.filename.startswith("__MACOSX/")]
    texts = []
    for stem in TEXT_MEMBERS:
        wanted = f"{stem}.train"
        found = [entry for entry in entries if entry.filename.rpartition("/")[2] == wanted]
        if not found:
            inside = [entry.filename for entry in entries]
            near = difflib.get_close_matches(wanted, inside, n=3, cutoff=0.5) or inside[:8]
            raise DataError(f"{path} lacks {wanted}; names inside it: {', '.join(near) or 'none'}")
        if len(found) > 1:
            raise DataError(f"{path} holds {wanted} {len(found)} times: keep one")
        if found[0].flag_bits & 1:
            raise DataError(f"{path} is encrypted: unpack it and pack it again without a password")
        texts.append(RawText(sanitise_source(stem), path, found[0].filename))
    return tuple(texts)

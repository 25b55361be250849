"""BabyLM's raw files -> validated records, lazily.

A raw directory holds `NAME_captions.json` with `NAME_dino_v2_states.npy` (or `_1of2` and `_2of2`), and/or
`train_50M.zip` with six text files. Row i of the vectors belongs to caption i. Symbols: N pairs, V width.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.record import VECTOR_SIZE, DataError, image_ids, sanitise_source

TEXT_ARCHIVE = "train_50M.zip"
TEXT_MEMBERS = ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard")
GENERATED_MARK = "GENERATED.md"
CAPTIONS_SUFFIX, VECTORS_SUFFIX = "_captions.json", "_dino_v2_states"
MAX_RECORD_WORDS = 512
SCAN_ROWS = 2048
HEADING = re.compile(r"\s*= = = .*= = =\s*")
WORD = re.compile(r"\S+")
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Rejected:
    """A raw sample that was left out: its source, row (or record number) and why."""

    source: str
    row: int
    reason: str


@dataclass(frozen=True)
class RawPairs:
    """The captions and vectors of one NAME; vectors are mapped, not read."""

    source: str
    captions: list[object]
    parts: tuple[np.ndarray, ...]
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, row: int) -> str | None:
        """The caption of a row, None when it is not a string."""
        value = self.captions[row]
        if isinstance(value, dict):
            value = value.get("caption")
        return value if isinstance(value, str) else None

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), V]: the vectors of `rows` across the concatenated parts."""
        out = np.empty((len(rows), VECTOR_SIZE), dtype=np.float32)
        start = 0
        for part in self.parts:
            here = (rows >= start) & (rows < start + len(part))
            out[here] = part[rows[here] - start]
            start += len(part)
        return out


def scan_pairs(pairs: RawPairs, dtype: np.dtype) -> Iterator[tuple[np.ndarray, list[Rejected]]]:
    """Check all pairs against storing vectors as `dtype`, a block of rows at a time.

    Yields (image ids int64 [n], rejected rows) for consecutive blocks.
    """
    for start in range(0, len(pairs), SCAN_ROWS):
        rows = np.arange(start, min(start + SCAN_ROWS, len(pairs)))
        vectors = pairs.vectors(rows)
        finite = np.all(np.isfinite(vectors), axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            fits = np.all(np.isfinite(vectors.astype(dtype)), axis=1)
        rejected = []
        for at, row in enumerate(rows.tolist()):
            reason = caption_fault(pairs.caption(row))
            if reason is None and not finite[at]:
                reason = "vector holds NaN or infinity"
            if reason is None and not fits[at]:
                reason = "vector overflows float16: use --vector-dtype float32"
            if reason is not None:
                rejected.append(Rejected(pairs.source, row, reason))
        yield image_ids(vectors), rejected


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
    vector_names = present or [single]
    captions = _load_captions(directory / captions_name)
    parts = tuple(_load_vectors(directory / vector_name) for vector_name in vector_names)
    total = sum(len(part) for part in parts)
    if total != len(captions):
        counted = " + ".join(f"{len(p)} in {n}" for p, n in zip(parts, vector_names, strict=True))
        raise DataError(
            f"{name}: {len(captions)} captions in {captions_name} but {total} vectors ({counted}): "
            "row i must belong to caption i, get the files that belong together"
        )
    files = (directory / captions_name, *(directory / vector_name for vector_name in vector_names))
    return RawPairs(sanitise_source(name), captions, parts, files)


def _load_captions(path: Path) -> list[object]:
    try:
        captions = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): get the file again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not isinstance(captions, list) or not captions:
        raise DataError(
            f'{path} holds no captions: expected a JSON list of strings or of {{"caption": ...}} objects, '
            f"found {'an empty list' if captions == [] else type(captions).__name__}"
        )
    return captions


def _load_vectors(path: Path) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole .npy file ({error}): get the file again") from None
    if not isinstance(vectors, np.ndarray):
        raise DataError(f"{path} is an .npz archive: expected a plain .npy array")
    if vectors.ndim != 2 or vectors.shape[1] != VECTOR_SIZE:
        raise DataError(f"{path} has shape {vectors.shape}: expected (N, {VECTOR_SIZE}), one DINOv2 vector a caption")
    if vectors.dtype != np.dtype("<f4"):
        raise DataError(
            f"{path} has dtype {vectors.dtype.str}: expected little-endian float32, convert it with "
            "numpy.save(NEW, numpy.load(OLD).astype('<f4'))"
        )
    return vectors


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

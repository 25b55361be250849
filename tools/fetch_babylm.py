"""Download BabyLM's official files (captions, DINOv2 vectors, text), by the addresses in a list that you can edit.

A broken download goes on where it stopped: give the same command again. Exit code 0: the files are there, whole and
checked. 2: one of them is not, and a line says why. 130: interrupted.
"""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from shards import transfer
from shards.record import DataError
from tools.fetching import Folder
from tools.file_list import FileList, RemoteFile, read_file_list
from tools.progress import Bars

LIST = Path(__file__).with_name("babylm_files.yaml")
BACK_OFF_S = 1.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files to download; default: all that training needs")
    parser.add_argument("--files", type=Path, default=LIST, help="the list of addresses (YAML); default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the raw files; made where it is missing")
    parser.add_argument("--list", action="store_true", help="print name, bytes and address of each file, and stop")
    parser.add_argument("--verify", action="store_true", help="read files again that are there, and compare checksums")
    parser.add_argument("--attempts", type=int, default=6, metavar="N", help="tries without progress")
    parser.add_argument("--timeout-s", type=float, default=60.0, metavar="S", help="for a server's next bytes")
    args = parser.parse_args(arguments)
    if args.out is None and not args.list:
        parser.error("--out DIR is needed")
    if args.attempts < 1 or args.timeout_s <= 0:
        parser.error("--attempts must be at least 1 and --timeout-s more than 0")
    return args


def show(files: FileList, console: Console) -> None:
    """The list: name, bytes, address."""
    width = max((len(file.name) for file in files.files), default=0)
    for file in files.files:
        size = "?" if file.bytes is None else str(file.bytes)
        address = file.url or (f"in {file.zip_url}" if file.zip_url else "no address")
        say(console, f"{file.name:<{width}}  {size:>12}  {address}{'  (by name only)' if file.by_name else ''}")


def fetch_all(folder: Folder, files: FileList, chosen: Sequence[RemoteFile], verify: bool, console: Console) -> int:
    """Have every chosen file, or say on stderr why not; returns how many are not there. Raises OSError."""
    missing = 0
    for file in chosen:
        try:
            say(console, folder.fetch(file, files.path, verify))
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            missing += 1
    return missing


def tidy(folder: Folder, files: FileList, out: Path, console: Console) -> None:
    """Remove zips whose files are all here; say which others are kept."""
    for url in dict.fromkeys(file.zip_url for file in files.files if file.zip_url and not file.url):
        archive = folder.zip_of(url)
        if not archive.exists():
            continue
        wanted = [file.name for file in files.files if file.zip_url == url and not (out / file.name).exists()]
        if wanted:
            say(console, f"{archive} is kept for {', '.join(wanted)}: remove it if you do not want them")
        else:
            archive.unlink()


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def explain(error: OSError, out: Path) -> str:
    """One line that says what would do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{out}: no space left: make room, then the same command goes on"
    return f"{error.filename or out}: {error.strerror or error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the downloads; returns 0, 2 when a file is not there in the end, 130 after Ctrl-C."""
    args = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        files = read_file_list(args.files)
        chosen = files.choose(args.names)
        if args.list:
            show(files, console)
            return 0
        retry = transfer.Retry(args.attempts, BACK_OFF_S, args.timeout_s)
        with closing(transfer.connect("https", args.timeout_s)) as source, Bars(console) as bars:
            folder = Folder(args.out, source, retry, bars.report)
            missing = fetch_all(folder, files, chosen, args.verify, console)
            tidy(folder, files, args.out, console)
        return 2 if missing else 0
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {explain(error, args.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The interrupt can fall between making fsspec's coroutine and handing it over; its loss is what is wanted.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        print("error: interrupted; what came is kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

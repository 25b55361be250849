"""Arrays on their way to the run's folder and to pictures: written by a thread, drawn by a process of its own.

The training thread hands over small arrays and goes on. What lies in the folder is all that the drawing process
(bitmar/observability/drawer.py) gets, so that pictures can be made again at any time:

    plots/data/memory.npys, quantization.npys    records one after the other (`append`), one a log
    plots/data/latents.npz, cross_modal.npz       the last of their kind
    attention_analysis/                           of the heads, see bitmar/observability/head_analysis.py

Without pictures only attention_analysis/ is written.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitmar.observability.drawer import Drawer
from bitmar.observability.head_analysis import FOLDER, Arrays, HeadAnalysis, analyse, remove_after
from bitmar.watch_config import AttentionAnalysisConfig

if TYPE_CHECKING:
    from bitmar.observability.probes import Caption

WAIT_S = 120.0  # for the last pictures, when a run ends
DRAW_S = 3600.0  # for all of them while it goes on: the drawing process gets what training leaves of the cores
STOP_S = 5.0  # for what the thread still holds, when a run ends before its end
PICTURE_FOLDERS = ("plots", FOLDER)  # in the run's, each drawn at a cadence of its own


def append(path: Path, record: Mapping[str, np.ndarray]) -> None:
    """Append a record: its names, then each array, in numpy's own format."""
    with path.open("ab") as file:
        np.save(file, np.array(list(record), dtype=np.str_), allow_pickle=False)
        for array in record.values():
            np.save(file, array, allow_pickle=False)


def read_records(path: Path) -> Iterator[Arrays]:
    """The records of a file in order, without one that a kill has cut short; none where there is no file.

    Where a resumed run has gone back, the records after that step are left out.
    """
    records: list[Arrays] = []
    if path.exists():
        with path.open("rb") as file:
            while (record := _next(file)) is not None:
                while records and int(records[-1]["step"]) >= int(record["step"]):
                    records.pop()
                records.append(record)
    yield from records


def cut_torn(path: Path) -> None:
    """Cut off a record that a kill has left unfinished: those appended after it could not be read."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = 0
        while _next(file) is not None:
            whole = file.tell()
        file.truncate(whole)


def _next(file: object) -> Arrays | None:
    try:
        names = np.load(file, allow_pickle=False)  # type: ignore[arg-type]
        return {str(name): np.load(file, allow_pickle=False) for name in names}  # type: ignore[arg-type]
    except (EOFError, ValueError):
        return None


class Board:
    """Takes arrays from the training thread of rank 0."""

    def __init__(
        self,
        run_dir: Path,
        decode: Callable[[int], str],
        matrices: tuple[str, ...],
        step: int = 0,
        makes_pictures: bool = True,
    ) -> None:
        """`step`: where the run goes on. Where an earlier start had gone further, what it left of later steps in
        attention_analysis/ is removed, so that it is not taken for this run's."""
        self.makes_pictures = makes_pictures
        self._run_dir = run_dir.resolve()  # the drawing process has another working directory
        self._decode, self._matrices = decode, matrices
        self._data, self._analysis = self._run_dir / "plots" / "data", self._run_dir / FOLDER
        self._wishes = 0
        self._last_wish: dict[str, int] = {}  # for a folder
        self._drawer: Drawer | None = None
        self._stopped = False
        self._mended: set[Path] = set()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._drawn: queue.SimpleQueue[tuple[int, Path]] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._showing = threading.Lock()
        self.go_back(step)
        self._thread = threading.Thread(target=self._serve, name="board", daemon=True)
        self._thread.start()

    def take(self, step: int, arrays: Arrays, memory: Arrays | None) -> None:
        """What a log tells beside its numbers, for pictures."""
        self._put_picture(lambda: self._write(step, arrays, memory))

    def take_heads(self, step: int, arrays: Arrays, config: AttentionAnalysisConfig, caption: Caption | None) -> None:
        """What a log tells of attention heads, and what they attend to in a caption, where that is kept."""
        self._work.put(lambda: self._write_heads(step, analyse(arrays, config, caption)))

    def go_back(self, step: int) -> None:
        """Forget what attention_analysis/ has of steps later than `step`, which are trained again."""
        self._work.put(lambda: self._remove_after(step))

    def take_captions(self, step: int, tokens: np.ndarray, weights: np.ndarray) -> None:
        """Cross-modal attention of probe captions: tokens int [N, T] (0 is padding), weights [N, T, P]."""
        self._put_picture(lambda: self._write_captions(step, tokens, weights))

    def take_latents(self, step: int, values: Arrays) -> None:
        """Coordinates of latents in two dimensions, with the sources they are of."""
        self._put_picture(lambda: self._write_last("latents", {"step": np.array(step), **values}))

    def draw(self, step: int, folders: Sequence[str] = PICTURE_FOLDERS) -> None:
        """Have the pictures of some folders made from what has been taken. While one drawing goes on, only the last
        wish for a folder is kept."""
        self._wishes += 1
        wish = self._wishes
        self._last_wish |= dict.fromkeys(folders, wish)
        self._put_picture(lambda: self._draw(step, [name for name in folders if self._last_wish[name] == wish]))

    def pictures(self) -> Iterator[tuple[int, Path]]:
        """(step, file) of the pictures that have become ready since the last call; none is removed meanwhile."""
        with self._showing:
            while not self._drawn.empty():
                step, path = self._drawn.get()
                if path.is_file():
                    yield step, path

    def problems(self) -> Iterator[str]:
        """What went wrong since the last call."""
        while not self._problems.empty():
            yield self._problems.get()

    def wait(self, within_s: float) -> bool:
        """Whether what was handed over is written and drawn, waiting so long for it."""
        done = threading.Event()
        self._work.put(done.set)
        return done.wait(within_s)

    def stop(self) -> None:
        """End a drawing that goes on, and the thread once it has written what it holds. Nothing where it is closed."""
        self._stopped = True
        drawer = self._drawer  # the thread may be done with it meanwhile
        if drawer is not None:
            drawer.kill()
        self._work.put(None)
        self._thread.join(STOP_S)

    def close(self) -> None:
        """Wait, within bounds, for what was handed over."""
        self._work.put(None)
        self._thread.join(WAIT_S)
        if self._thread.is_alive():
            self._problems.put(f"pictures: not ready within {WAIT_S:.0f} s of the run's end")

    def _put_picture(self, task: Callable[[], None]) -> None:
        if self.makes_pictures:
            self._work.put(task)

    def _serve(self) -> None:
        while (task := self._work.get()) is not None:
            try:
                task()
            except Exception as error:  # whatever it is, training and its log do not depend on it
                self._problems.put(f"pictures: {type(error).__name__}: {error}")
        self._end_drawer()

    def _write(self, step: int, arrays: Arrays, memory: Arrays | None) -> None:
        self._make_folder()
        if memory is not None:
            self._append("memory", {"step": np.array(step), **memory})
        names = {name.rpartition("_")[2].lower(): array for name, array in arrays.items() if "/Matrix_" in name}
        if names:
            record = {"step": np.array(step), "matrices": np.array(self._matrices), **names}
            self._append("quantization", record)

    def _write_heads(self, step: int, analysis: HeadAnalysis | None) -> None:
        if analysis is None:
            return
        self._analysis.mkdir(exist_ok=True)
        for name, values in analysis.files(step, self._decode):
            self._replace(self._analysis / name, values)

    def _remove_after(self, step: int) -> None:
        with self._showing:
            remove_after(self._analysis, step)

    def _make_folder(self) -> None:
        """In the run's folder, which is not made anew where someone has taken it away."""
        self._data.parent.mkdir(exist_ok=True)
        self._data.mkdir(exist_ok=True)

    def _append(self, name: str, record: Arrays) -> None:
        path = self._data / f"{name}.npys"
        if path not in self._mended:
            cut_torn(path)
            self._mended.add(path)
        append(path, record)

    def _write_captions(self, step: int, tokens: np.ndarray, weights: np.ndarray) -> None:
        words = np.array([[self._decode(int(t)) if t else "" for t in row] for row in tokens], dtype=np.str_)
        self._write_last("cross_modal", {"step": np.array(step), "words": words, "tokens": tokens, "weights": weights})

    def _write_last(self, name: str, values: Arrays) -> None:
        self._make_folder()
        self._replace(self._data / f"{name}.npz", values)

    def _replace(self, path: Path, values: Arrays | np.ndarray) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            if isinstance(values, np.ndarray):
                np.save(file, values, allow_pickle=False)
            else:
                np.savez_compressed(file, **values)  # type: ignore[arg-type]
        temporary.replace(path)

    def _end_drawer(self) -> None:
        if self._drawer is not None:
            self._drawer.close(STOP_S)
            self._drawer = None

    def _draw(self, step: int, folders: Sequence[str]) -> None:
        if self._stopped or not folders:
            return
        if self._drawer is not None and not self._drawer.works:  # after a drawing that failed, or killed while it slept
            self._end_drawer()
        if self._drawer is None:
            self._drawer = Drawer(self._run_dir)
        if self._stopped:  # meanwhile
            return
        try:
            paths, wrong = self._drawer.draw(folders, DRAW_S)
        except Exception:
            self._end_drawer()  # what it says would be taken for an answer to the next wish
            raise
        for path in paths:
            self._drawn.put((step, path))
        if wrong and not self._stopped:
            self._problems.put(f"pictures: {wrong}")

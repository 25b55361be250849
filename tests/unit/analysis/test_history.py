"""What training leaves in attention_analysis/, whole, torn, and of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitmar.analysis.history import LeftOut, read_history
from bitmar.observability.run_folder import read_npz
from tests.support.picture_runs import Size, write_heads

RNG = np.random.default_rng(0)


def save(folder: Path, number: int, **arrays: np.ndarray) -> Path:
    path = folder / f"heads_step_{number}.npz"
    np.savez_compressed(path, **({"step": np.array(number)} | arrays))  # type: ignore[arg-type]
    return path


def test_a_run_s_files_are_read_in_the_order_of_their_steps(tmp_path: Path) -> None:
    (tmp_path / "attention_analysis").mkdir()
    for step in (100, 5, 20):
        write_heads(tmp_path, Size(), step, RNG)
    history = read_history(tmp_path / "attention_analysis")
    assert history.steps.tolist() == [5, 20, 100]
    assert list(history.figures) == ["encoder", "decoder", "cross_modal", "memory"]
    for place, step in enumerate((5, 20, 100)):
        arrays = np.load(tmp_path / "attention_analysis" / f"heads_step_{step}.npz")
        for kind, name in (("encoder", "Encoder"), ("cross_modal", "CrossModal"), ("memory", "Memory")):
            for figure in ("Importance", "Entropy", "Concentration"):
                np.testing.assert_array_equal(history.figures[kind][figure][place], arrays[f"{name}_{figure}"])
    assert history.left_out == ()


def test_what_is_missing_or_not_finite_was_not_measured(tmp_path: Path) -> None:
    save(tmp_path, 1, Encoder_Importance=np.array([[1.0, np.inf], [np.nan, 2.0]]))
    save(tmp_path, 2, Encoder_Entropy=np.array([[1, 2], [3, 4]]))
    figures = read_history(tmp_path).figures["encoder"]
    np.testing.assert_array_equal(figures["Importance"], [[[1, np.nan], [np.nan, 2]], np.full((2, 2), np.nan)])
    np.testing.assert_array_equal(figures["Entropy"], [np.full((2, 2), np.nan), [[1, 2], [3, 4]]])


def test_a_torn_file_is_named_wherever_it_is_torn(tmp_path: Path) -> None:
    save(tmp_path, 1, Encoder_Importance=np.ones((2, 2)))
    torn = save(tmp_path, 2, Encoder_Importance=np.ones((2, 2)))
    whole = torn.read_bytes()
    for length in range(0, len(whole), 7):
        torn.write_bytes(whole[:length])
        history = read_history(tmp_path)
        assert history.steps.tolist() == [1]
        assert history.left_out == (LeftOut("heads_step_2.npz", "cut short, damaged or not readable"),)


def test_a_flipped_bit_anywhere_ends_no_program(tmp_path: Path) -> None:
    path = save(tmp_path, 1, Encoder_Importance=np.ones((2, 2)))
    whole = path.read_bytes()
    damaged = 0
    for place in range(len(whole)):
        for bit in (1, 32):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            damaged += read_npz(path) is None
    assert damaged > len(whole) / 2  # the others are times, and flags that say nothing of the content


class Pickled:
    pass


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"step": np.array(3)}, "tells another step"),
        ({"step": np.array([2, 2])}, "tells another step"),
        ({"step": np.array("2")}, "tells another step"),
        ({"Encoder_Importance": np.ones(4)}, "Encoder_Importance is no array of numbers"),
        ({"Encoder_Importance": np.ones((0, 4))}, "Encoder_Importance is no array of numbers"),
        ({"Encoder_Importance": np.full((2, 2), "x")}, "Encoder_Importance is no array of numbers"),
        ({"Encoder_Importance": np.full((2, 2), Pickled())}, "not readable"),
        ({"Encoder_Entropy": np.ones((2, 3))}, "figures of encoder heads have different shapes"),
        (
            {"Encoder_Importance": np.ones((3, 3)), "Encoder_Entropy": np.ones((3, 3))},
            "another number of encoder heads",
        ),
    ],
)
def test_a_file_of_other_content_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], why: str) -> None:
    good = {"Encoder_Importance": np.ones((2, 2)), "Encoder_Entropy": np.ones((2, 2))}
    save(tmp_path, 1, **good)
    save(tmp_path, 2, **(good | arrays))
    save(tmp_path, 3, **good)
    history = read_history(tmp_path)
    assert history.steps.tolist() == [1, 3]
    (left,) = history.left_out
    assert left.file == "heads_step_2.npz"
    assert why in left.why


def test_the_last_whole_file_says_how_many_heads_there_are(tmp_path: Path) -> None:
    for step, heads in ((1, 3), (2, 2), (3, 2)):
        save(tmp_path, step, Memory_Importance=np.ones((1, heads)))
    save(tmp_path, 4, Encoder_Importance=np.ones((2, 2)))
    history = read_history(tmp_path)
    assert history.steps.tolist() == [2, 3, 4]
    assert history.left_out == (LeftOut("heads_step_1.npz", "another number of memory heads than later files"),)


@pytest.mark.parametrize("name", ["heads_step_.npz", "heads_step_x.npz", "heads_step_007.npz", "heads_step_1.5.npz"])
def test_a_name_without_a_step_is_told(tmp_path: Path, name: str) -> None:
    save(tmp_path, 7, Encoder_Importance=np.ones((2, 2)))
    (tmp_path / name).write_bytes((tmp_path / "heads_step_7.npz").read_bytes())
    (tmp_path / "heads_step_9.tmp").write_bytes(b"what a kill leaves of a write")
    (tmp_path / "heads_step_8.npz").mkdir()
    history = read_history(tmp_path)
    assert history.steps.tolist() == [7]
    assert {left.file: left.why for left in history.left_out} == {
        name: "its name gives no step",
        "heads_step_8.npz": "cut short, damaged or not readable",
    }


def test_a_directory_of_something_else_says_what_to_give(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "attention_analysis").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    cases = {
        tmp_path / "none": "none does not exist",
        tmp_path / "file": "file is not a directory",
        run / "attention_analysis": "is empty: the run has not measured its attention heads yet",
        tmp_path: "holds no heads_step_STEP.npz; give a run's attention_analysis directory",
    }
    for directory, says in cases.items():
        with pytest.raises(ValueError, match=says):
            read_history(directory)
    path = save(run / "attention_analysis", 1, Encoder_Importance=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"holds no heads_step_STEP\.npz; give .*/run/attention_analysis"):
        read_history(run)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"none of its 1 files can be used, such as heads_step_1\.npz: cut short"):
        read_history(path.parent)

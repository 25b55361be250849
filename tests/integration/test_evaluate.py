"""tools/evaluate.py and tools/vqa.py on a run of 20 steps, as a user runs them; one rank and two; mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from bitmar.engine.progress import checkpoint_directories
from bitmar.engine.world import World, free_port
from bitmar.evaluation import recall
from bitmar.evaluation.suite import TASKS, references_of
from bitmar.export.model_card import model_card
from bitmar.loading import load_trained
from shards.loader import ShardSet, ValidationSet
from shards.record import DataError
from tests.support.processes import shell_environment
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, STEPS, metrics
from tools import demo_app, evaluate, export, vqa
from tools import recall as recall_tool
from tools.ranks import together

pytestmark = pytest.mark.slow

SAMPLES = 24  # of the recipe's validation
WIDTH = 768


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def questions(items: int = 5) -> list[dict[str, Any]]:
    def image(row: int) -> dict[str, Any]:
        return {"file": "vectors.npy", "row": row}

    texts = ["a dog", "two cats", "the sea"]
    return [{"image": image(n), "question": "what is it?", "candidates": texts, "answer": n % 3} for n in range(items)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL files of every kind, and their vectors."""
    folder = tmp_path_factory.mktemp("items")
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32))
    np.save(folder / "wide.npy", np.zeros((5, WIDTH + 1), np.float32))
    write_lines(folder / "vqa.jsonl", questions())
    good = [
        {"sentence_good": f"the dog {n} runs", "sentence_bad": f"dog the {n} run", "UID": "ab"[n % 2]} for n in range(6)
    ]
    write_lines(folder / "blimp.jsonl", good)
    pairs = [
        {"image_0": {"file": "vectors.npy", "row": n}, "image_1": {"file": "vectors.npy", "row": n + 1}} for n in (0, 2)
    ]
    texts = {"caption_0": "a dog by the sea", "caption_1": "the sea by a dog"}
    write_lines(folder / "winoground.jsonl", [pair | texts for pair in pairs])
    return folder


def flags(brief_run: Path, files: Path, out: Path) -> list[str]:
    named = {"minimal_pairs": "blimp", "vqa": "vqa", "winoground": "winoground"}
    given = [part for task, name in named.items() for part in (f"--{task}", str(files / f"{name}.jsonl"))]
    return ["--checkpoint", str(brief_run), *given, "--max_samples", str(SAMPLES), "--threads", "1", "--out", str(out)]


def on_ranks(arguments: Sequence[Sequence[str]]) -> tuple[list[int], list[tuple[str, str]]]:
    """(exit codes, what was said on stdout and stderr) of evaluate.py on as many ranks, each with its own arguments."""
    port, size, ranks = str(free_port()), str(len(arguments)), []
    for rank, given in enumerate(arguments):
        where = {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_SIZE": size}
        group = shell_environment(**where, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
        command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *given, f"--local_rank={rank}"]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=group, stdout=-1, stderr=-1, text=True))
    said = [rank.communicate(timeout=300) for rank in ranks]
    return [rank.returncode for rank in ranks], said


@pytest.fixture(scope="module")
def told(brief_run: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], str]]:
    """(the JSON, what was printed) of one rank and of two."""
    folder, results = tmp_path_factory.mktemp("scores"), []
    for size in (1, 2):
        out = folder / f"{size}.json"
        codes, said = on_ranks([flags(brief_run, files, out)] * size)
        assert codes == [0] * size, said
        assert all(text == "" for text, _ in said[1:]), "rank 0 alone tells"
        results.append((json.loads(out.read_text()), said[0][0]))
        assert out.with_suffix(".png").is_file()
    assert imread(folder / "1.png").shape[1] == 1200
    return results


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{score['task']}: {score['name']}": score for score in result["scores"]}


def test_two_ranks_give_the_scores_of_one(told: list[tuple[dict[str, Any], str]]) -> None:
    one, two = (by_name(result) for result, _ in told)
    assert one.keys() == two.keys()
    assert [result["ranks"] for result, _ in told] == [1, 2]
    for name, score in one.items():
        for part in ("value", "low", "high", "chance"):
            expected = score[part] if score[part] is None else pytest.approx(score[part], rel=1e-6, abs=1e-6)
            assert two[name][part] == expected, name
        assert two[name]["count"] == score["count"]


def test_every_task_has_scores_with_intervals(told: list[tuple[dict[str, Any], str]]) -> None:
    (result, printed), _ = told
    names = {score["task"].lower().replace(" ", "_") for score in result["scores"]}
    assert names == TASKS.keys() == result["tasks"].keys()
    for name, score in by_name(result).items():
        if score["low"] is not None:
            assert score["low"] <= score["value"] <= score["high"] or "BLEU" in name, name
        else:
            facts = ("distinct", "length of references", "slots in use")
            assert score["unit"] == "weight" or any(fact in name for fact in facts), name
        assert score["name"] in " ".join(printed.split()), name
    found = by_name(result)
    assert found["minimal pairs: accuracy"]["count"] == 6
    assert found["minimal pairs: accuracy, a"]["count"] == 3
    assert found["VQA: accuracy"]["chance"] == pytest.approx(1 / 3)
    assert found["Winoground: group score"]["count"] == 2
    assert found["distractors: accuracy"]["chance"] == pytest.approx(1 / 8)
    made = {name for name, task in result["tasks"].items() if task["generated"]}
    assert made == TASKS.keys() - {"minimal_pairs", "vqa", "winoground"}
    assert Path(result["tasks"]["vqa"]["data"]).name == "vqa.jsonl"


def test_scores_are_those_of_the_training_s_own_validation(
    told: list[tuple[dict[str, Any], str]], brief_run: Path
) -> None:
    found = by_name(told[0][0])
    logged = [line for line in metrics(brief_run) if "Validation/Loss_Unrounded" in line]
    assert [line["Training/Step"] for line in logged] == [10, STEPS]
    names = {
        "Loss": "perplexity: loss, right vision, memory on",
        "Perplexity": "perplexity: perplexity, right vision, memory on",
        "Token_Accuracy": "perplexity: token accuracy, right vision, memory on",
        "Loss_Shuffled_Vision": "perplexity: loss, permuted vision, memory on",
        "Loss_No_Vision": "perplexity: loss, no vision, memory on",
        "Memory_Gain": "perplexity: gain of the memory",
        "Memory_Gain_Shuffled": "perplexity: gain of the memory over a mixed-up one",
        "Loss_Text": "perplexity: loss, text, memory on",
        "Loss_Unrounded": "quantization: loss, weights and activations unrounded",
        "Rounding_Cost": "quantization: what rounding costs",
        "Image_To_Text_R5": "retrieval: image to text R@5",
        "Text_To_Image_R10": "retrieval: text to image R@10",
        "Text_To_Image_Median_Rank": "retrieval: text to image median rank",
    }
    for metric, name in names.items():
        assert logged[-1][f"Validation/{metric}"] == pytest.approx(found[name]["value"], rel=1e-4, abs=1e-4), metric


def test_training_leaves_its_scores_behind(brief_run: Path) -> None:
    written = sorted(path.name for path in (brief_run / "evaluation").iterdir())
    assert written == ["step_10.json", "step_20.json"]
    result = json.loads((brief_run / "evaluation" / "step_20.json").read_text())
    assert result["step"] == STEPS
    assert result["words"] == metrics(brief_run)[-1].get("Training/Words", result["words"])
    assert {score["task"] for score in result["scores"]} == {"perplexity", "quantization", "retrieval"}


def test_vqa_answers_every_question(
    brief_run: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    data = str(files / "vqa.jsonl")
    code = vqa.main(
        ["--checkpoint", str(brief_run), "--data", data, "--memory", "off", "--out", str(out), "--threads", "1"]
    )
    assert code == 0
    assert "accuracy without the image" in capsys.readouterr().out
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["item"] for answer in answers] == [1, 2, 3, 4, 5]
    for answer in answers:
        assert answer["chosen"] == int(np.argmax(answer["log_probabilities"]))
        assert len(answer["log_probabilities"]) == 3


def test_mistakes_are_one_line(
    brief_run: Path, files: Path, tmp_path: Path, other_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(brief_run, tmp_path / "damaged")
    (checkpoint_directories(tmp_path / "damaged")[0] / "parameters-00000.safetensors").write_bytes(b"x")
    wide = [questions()[0], questions()[1] | {"image": {"file": "wide.npy", "row": 0}}]
    write_lines(files / "wide.jsonl", wide)
    checkpoint = ["--checkpoint", str(brief_run)]
    cases = [
        ([*checkpoint, "--tasks", "perplexity,poetry"], "unknown task 'poetry'; there are perplexity, "),
        ([*checkpoint, "--tasks", "vqa"], "task vqa needs a file: --vqa"),
        ([*checkpoint, "--tasks", "perplexity", "--shards", str(other_shards)], "another tokenizer"),
        ([*checkpoint, "--tasks", "retrieval", "--shards", str(tmp_path)], str(tmp_path)),
        (
            [*checkpoint, "--tasks", "vqa", "--vqa", str(files / "wide.jsonl")],
            "wide.jsonl:2: image: wide.npy has shape",
        ),
        ([*checkpoint, "--tasks", "perplexity", "--max_samples", "0"], "--max_samples"),
        (["--checkpoint", str(tmp_path / "damaged"), "--tasks", "retrieval"], "parameters-00000.safetensors"),
        (["--checkpoint", str(tmp_path)], "neither a run's folder"),
        ([*checkpoint, "--tasks", "perplexity", "--out", str(tmp_path)], "Is a directory"),
        ([*checkpoint, "--tasks", "perplexity", "--out", str(tmp_path / "x.png")], "x.png"),
    ]
    for arguments, words in cases:
        given = ["--threads", "1", "--out", str(tmp_path / "out.json"), *arguments]
        assert evaluate.main(given) == 2, arguments
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert words in said.err
    assert not (tmp_path / "out.json").exists()


def test_a_later_task_leaves_the_scores_of_others(
    brief_run: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of training, too; a card shows all."""
    run = shutil.copytree(brief_run, tmp_path / "run")
    path = run / "evaluation" / "step_20.json"
    before = json.loads(path.read_text())
    pairs = files / "blimp.jsonl"
    asked = ["--checkpoint", str(run), "--tasks", "minimal_pairs", "--minimal_pairs", str(pairs), "--threads", "1"]
    assert evaluate.main(asked) == 0
    printed = capsys.readouterr().out
    assert "beside scores that it held already: perplexity, quantization, retrieval" in printed
    after = json.loads(path.read_text())
    assert after["scores"][: len(before["scores"])] == before["scores"]
    assert {name: task["data"] for name, task in after["tasks"].items()} == {
        name: task["data"] for name, task in before["tasks"].items()
    } | {"minimal_pairs": str(pairs)}
    card = model_card(load_trained(run), "none", [])
    assert "| minimal pairs: accuracy |" in card
    assert "| retrieval: image to text R@5 |" in card


def test_an_image_with_most_captions_leaves_permuted_vision_out(
    brief_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--checkpoint", str(brief_run), "--tasks", "perplexity", "--max_samples", "1", "--threads", "1"]
    assert evaluate.main([*asked, "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    note = "permuted vision is left out: one image has more than half of the captions"
    assert result["tasks"]["perplexity"]["notes"] == [note]
    assert note in capsys.readouterr().out
    names = by_name(result)
    assert "perplexity: loss, no vision, memory off" in names
    assert not any("permuted" in name for name in names)


def test_references_are_all_captions_of_an_image(tiny_shards: Path) -> None:
    shards = ShardSet.open(tiny_shards)

    def captions(most: int) -> ValidationSet:
        return ValidationSet(shards, modality="pairs", micro_batch=4, row_tokens=32, max_samples=most, rank=0, world=1)

    few, every = captions(SAMPLES), captions(10_000)
    images = np.unique(few.image_ids)
    found = references_of(images, every)
    for image, texts in zip(images, found, strict=True):
        assert sorted(texts) == sorted(every.text(n) for n in range(every.samples) if every.image_ids[n] == image)
    assert sum(map(len, found)) > few.samples, "more than those that were drawn"


def test_the_memory_is_asked_for_pairs_of_a_few_captions(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def noted(*arguments: Any, **named: Any) -> ValidationSet:
        made = ValidationSet(*arguments, **named)
        drawn.append(made.samples)
        return made

    monkeypatch.setattr(recall, "ValidationSet", noted)
    assert len(recall.held_out_pairs(ShardSet.open(tiny_shards), 2, 32)) == 2
    assert drawn == [16]


def test_an_exported_directory(
    brief_run: Path,
    tiny_shards: Path,
    other_shards: Path,
    told: list[tuple[dict[str, Any], str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "exported"
    assert export.main(["hf", "--checkpoint", str(brief_run), "--out", str(out)]) == 0
    files = sorted(path.name for path in out.iterdir())
    capsys.readouterr()
    mistakes = [
        (evaluate.main, [], "give --shards and --out"),
        (evaluate.main, ["--shards", str(tiny_shards)], "give --out"),
        (recall_tool.main, [], "give --shards and --out"),
        (recall_tool.main, ["--shards", str(other_shards), "--out", str(tmp_path)], "have another tokenizer than"),
        (demo_app.main, ["--shards", str(other_shards)], "have another tokenizer than"),
    ]
    for tool, arguments, words in mistakes:
        assert tool(["--checkpoint", str(out), *arguments]) == 2, words
        said = capsys.readouterr()
        assert (said.out, said.err[:7], said.err.count("\n")) == ("", "error: ", 1)
        assert words in said.err
    place = tmp_path / "scores.json"
    asked = ["--tasks", "retrieval", "--shards", str(tiny_shards), "--out", str(place), "--threads", "1"]
    assert evaluate.main(["--checkpoint", str(out), *asked]) == 0
    expected = by_name(told[0][0])
    for name, score in by_name(json.loads(place.read_text())).items():
        assert score["value"] == pytest.approx(expected[name]["value"], abs=1e-6), name
    assert sorted(path.name for path in out.iterdir()) == files


def test_a_rank_that_fails_alone_ends_all(brief_run: Path, files: Path, tmp_path: Path) -> None:
    """Rank 1 has another file, of which a line is damaged; rank 0 is in the task's sum meanwhile."""
    damaged = tmp_path / "blimp.jsonl"
    damaged.write_text((files / "blimp.jsonl").read_text() + "{")
    asked = ["--checkpoint", str(brief_run), "--tasks", "minimal_pairs", "--out", str(tmp_path / "out.json")]
    pairs = [[*asked, "--threads", "1", "--minimal_pairs", str(path)] for path in (files / "blimp.jsonl", damaged)]
    codes, said = on_ranks(pairs)
    assert codes == [2, 2], said
    for out, told in said:
        assert out == ""
        assert told.startswith(f"error: rank 1: {damaged}:7: not JSON")
        assert told.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def fail_somewhere(world: World) -> list[str]:
    """What each rank is told where one has failed before an exchange, behind all, or none has."""
    told = []
    for failing, after in ((1, False), (0, True), (None, False)):

        def work(shared: World, failing: int | None = failing, after: bool = after) -> None:
            if shared.rank == failing and not after:
                raise DataError("early")
            assert int(shared.sum(torch.tensor(shared.rank + 1))) == 3
            if shared.rank == failing:
                raise FileNotFoundError("late")

        try:
            together(world, work)
            told.append("")
        except (ValueError, OSError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_each_rank_is_told_of_a_failure(tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, fail_somewhere)
    assert first == ["OtherRankError: rank 1: early", "FileNotFoundError: late", ""]
    assert second == ["DataError: early", "OtherRankError: rank 0: late", ""]

"""The tools that look at the heads of a trained model, as a user runs them on a run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors import safe_open

from bitmar.analysis.heads import training_captions
from bitmar.analysis.patterns import FIGURES, attention_of, visualize_attention
from bitmar.batch import Batch
from bitmar.config import ConfigError
from bitmar.engine.fragments import read_state, write_state
from bitmar.engine.progress import checkpoint_directories
from bitmar.export.packed import load_packed
from bitmar.loading import load_trained
from tests.support.exports import assert_same_model
from tests.support.runs import run_tool
from tools import attention_patterns, export, head_types

pytestmark = pytest.mark.slow

TEXT = "a dog by the sea"
DOTS_AN_INCH = 150


@pytest.fixture(scope="module")
def run(brief_run: Path) -> Path:
    """With a part of it pruned, in the folder beside it."""
    out = brief_run.parent / "pruned"
    done = run_tool("edit_heads.py", "--checkpoint", brief_run, "--prune", "L1H0", "--out", out)
    assert done.returncode == 0, done.stderr
    return brief_run


def test_patterns_of_a_text(run: Path, tmp_path: Path) -> None:
    done = run_tool("attention_patterns.py", "--checkpoint", run, "--text", TEXT, "--name", "dog", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = [f"dog_attention_{part}.png" for part in FIGURES]
    assert done.stdout.split() == [str(tmp_path / name) for name in names]
    for name in names:
        height, width, _ = imread(tmp_path / name).shape
        assert width == 8 * DOTS_AN_INCH
        assert height > 2 * DOTS_AN_INCH


def test_patterns_are_the_models_attention(run: Path) -> None:
    loaded = load_trained(checkpoint_directories(run)[0])
    vector = np.random.default_rng(0).normal(size=768).astype(np.float32)
    with_image, without = attention_of(loaded, TEXT, vector), attention_of(loaded, TEXT)
    assert "".join(without.words[1:]) == TEXT
    kinds = [layer.kind for layer in with_image.layers]
    assert kinds == ["encoder"] * 2 + ["decoder"] * 2 + ["cross_modal", "memory"]
    assert [layer.kind for layer in without.layers] == ["encoder"] * 2 + ["decoder"] * 2 + ["memory"]
    length = len(without.words)
    for layer in with_image.layers:
        assert layer.weights.shape[1] == length
        if layer.kind != "memory":
            np.testing.assert_allclose(layer.weights.sum(-1), 1, rtol=1e-5)
        if layer.kind in ("encoder", "decoder"):
            assert (np.triu(layer.weights, 1) == 0).all(), "no token attends to a later one"
    first = without.layers[0].weights
    np.testing.assert_array_equal(attention_of(loaded, TEXT + " side").layers[0].weights[:, :length, :length], first)


def test_patterns_of_other_kinds_and_of_pruned_models(run: Path, tmp_path: Path) -> None:
    vector = np.zeros(768, np.float32)
    for kind in ("cross_modal", "memory"):
        paths = visualize_attention(TEXT, kind, run, vector, kind, tmp_path)
        assert all(path.is_file() for path in paths)
    paths = visualize_attention(TEXT, "pruned", run.parent / "pruned", out=tmp_path)
    assert all(path.is_file() for path in paths)
    with pytest.raises(ConfigError, match="give its vector"):
        visualize_attention(TEXT, "none", run, attention_type="cross_modal", out=tmp_path)


def test_lofit(run: Path, tmp_path: Path) -> None:
    few = ("--samples", 32, "--steps", 12, "--top_k", 4)
    done = run_tool("lofit_heads.py", "--checkpoint", run, *few, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "lofit.json").read_text())
    assert len(told["ranking"]) == 2 * 2 + 2 * 2 + 2 + 1
    assert told["top"] == [name for name, _ in told["ranking"][:4]]
    assert [number for _, number in told["ranking"]] == sorted((n for _, n in told["ranking"]), reverse=True)
    tops = {kind: np.load(tmp_path / f"top_heads_{kind}.npy", allow_pickle=False) for kind in ("encoder", "decoder")}
    for kind, places in tops.items():
        assert [f"{kind}.L{layer}H{head}" for layer, head in places] == [n for n in told["top"] if n.startswith(kind)]
    with safe_open(tmp_path / "lofit.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {name for name in names if name.startswith("offset.")} == {f"offset.{head}" for head in told["top"]}
        assert sum(name.startswith("scale.") for name in names) == len(told["ranking"])
    again = run_tool("lofit_heads.py", "--checkpoint", run, *few, "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "lofit.json").read_text()) == told, again.stderr


def test_lofit_trains_on_captions_of_the_training_split(tiny_shards: Path) -> None:
    batches = training_captions(tiny_shards, 24, 32, seed=1)
    assert len(batches) == 2
    assert all(bool(batch.has_vision[batch.valid].all()) for batch in batches)


def test_types_and_importance(run: Path, tmp_path: Path) -> None:
    done = run_tool("head_types.py", "--checkpoint", run.parent / "pruned", "--samples", 16, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    types = json.loads((tmp_path / "head_types.json").read_text())
    assert [head["head"] for head in types[:3]] == ["encoder.L0H0", "encoder.L0H1", "encoder.L1H1"]
    assert types[-1]["head"] == "memory.L0H0"
    assert all(head["type"] for head in types)
    assert (tmp_path / "head_types.png").is_file()
    assert "| encoder.L1H1 |" in (tmp_path / "head_types.md").read_text()
    done = run_tool("head_importance.py", "--checkpoint", run, "--samples", 16, "--draws", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "head_importance.json").read_text())
    assert set(told["rankings"]) == {"gate gradient", "entropy"}
    assert len(told["rankings"]["entropy"]) == 2 * 2 + 2 * 2 + 2
    assert len(told["check"]["random"]) == 3
    assert told["check"]["heads"] == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("attention_patterns.py", ["--text", "", "--name", "x"], "the text has 0 tokens"),
        ("attention_patterns.py", ["--text", "a " * 99, "--name", "x"], "1 to 31 would do"),
        ("attention_patterns.py", ["--text", "a", "--name", "a/b"], "beginning of a file's name"),
        ("attention_patterns.py", ["--text", "a", "--name", "x", "--vector", "none.npy"], "none.npy"),
        ("lofit_heads.py", ["--data", "nowhere"], "nowhere"),
        ("head_types.py", ["--data", "nowhere"], "nowhere"),
        ("head_importance.py", ["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, tool: str, arguments: list[str], words: str) -> None:
    done = run_tool(tool, "--checkpoint", run, *arguments, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_vectors_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    for name, vector in (("wide", np.zeros(5, np.float32)), ("nan", np.full(768, np.nan, np.float32))):
        np.save(tmp_path / f"{name}.npy", vector)
        arguments = ("--text", TEXT, "--name", "x", "--vector", tmp_path / f"{name}.npy", "--out", tmp_path)
        done = run_tool("attention_patterns.py", "--checkpoint", run, *arguments)
        assert done.returncode == 2
        assert "768 finite numbers would do" in done.stderr


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_a_run_is_exported_in_packed_form(run: Path, tmp_path: Path, bits: str) -> None:
    for name in ("run", "pruned"):
        out = tmp_path / f"{name}.safetensors"
        done = run_tool("export.py", "packed", "--checkpoint", run.parent / name, "--out", out, "--bits", bits)
        assert done.returncode == 0, done.stderr
        loaded = load_trained(run.parent / name)
        packed, memory = load_packed(out)
        assert packed.config == loaded.config.model
        assert torch.equal(memory.image_ids, loaded.memory.image_ids)
        batch = Batch.of_text(torch.arange(3, 20)[None], 768)
        with torch.no_grad():
            difference = packed(batch, memory).loss - loaded.model(batch, loaded.memory).loss
        assert abs(float(difference)) < 0.05 * 17, "norms, gates and the embedding are rounded to bf16"
    done = run_tool("export.py", "packed", "--checkpoint", tmp_path, "--out", out)
    assert done.returncode == 2
    assert "neither a run's folder" in done.stderr


def write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_run_is_exported_for_hugging_face(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = {"task": "choice", "name": "blimp", "value": 0.625, "low": 0.5, "high": 0.75, "chance": 0.5}
    runs = {name: shutil.copytree(run.parent / name, tmp_path / "runs" / name) for name in ("run", "pruned")}
    write(runs["run"] / "evaluation" / "step_20.json", {"scores": [score]})
    write(runs["run"] / "evaluation" / "step_5.json", {"scores": [score | {"name": "of an earlier checkpoint"}]})
    for name, folder in runs.items():
        out = tmp_path / name
        assert export.main(["hf", "--checkpoint", str(folder), "--out", str(out)]) == 0
        assert f'api.upload_folder(repo_id=repo, folder_path="{out}", revision="main")' in capsys.readouterr().out
        assert_same_model(out, folder)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "The data is GENERATED" in card
        assert "| local_narr |" in card
        assert str(tmp_path) not in card
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| Validation/Loss |" in card
    assert "| choice: blimp | 0.6250 | 0.5000 to 0.7500 | 0.5000 |" in card
    assert "earlier checkpoint" not in card
    again = run_tool("export.py", "hf", "--checkpoint", run, "--out", tmp_path / "run")
    assert again.returncode == 2
    assert "holds something already" in again.stderr


def test_tools_read_exported_directories(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    assert export.main(["hf", "--checkpoint", str(run.parent / "pruned"), "--out", str(out)]) == 0
    of_text = ["--checkpoint", str(out), "--text", TEXT, "--name", "x", "--out", str(tmp_path)]
    assert attention_patterns.main(of_text) == 0
    assert all((tmp_path / f"x_attention_{part}.png").is_file() for part in FIGURES)
    one, other = (attention_of(load_trained(path), TEXT) for path in (out, run.parent / "pruned"))
    assert one.words == other.words
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        np.testing.assert_array_equal(mine.weights, theirs.weights)
    assert head_types.main(["--checkpoint", str(out)]) == 2
    assert "say which with --data" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes(b"damaged")
    assert attention_patterns.main(of_text) == 2
    assert "no exported model that can be read" in capsys.readouterr().err


def test_milestones_are_exported_as_babylms_revisions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    newest, first = checkpoint_directories(copy)
    for directory, words in ((first, [1_000_000]), (newest, [2_000_000, 10_000_000, 12_345])):
        state = read_state(directory)
        state["keep"]["milestone_words"] = words
        write_state(directory, state)

    def exported(out: Path, words: str) -> int:
        return export.main(["hf", "--checkpoint", str(copy), "--out", str(out), "--words", words])

    assert exported(tmp_path / "one", "1M") == 0
    assert_same_model(tmp_path / "one", first)
    assert exported(tmp_path / "all", "all") == 0
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {"chck_1M", "chck_2M", "chck_10M", "main"}
    assert_same_model(tmp_path / "all" / "chck_1M", first)
    assert_same_model(tmp_path / "all" / "chck_10M", newest)
    told = capsys.readouterr().out
    for name in names - {"main"}:
        assert f'api.create_branch(repo, branch="{name}", exist_ok=True)' in told
    mistakes = (("20M", "it has 1M, 2M, 10M"), ("11M", "no revision for 11,000,000 words"), ("x", "such as 10M"))
    for words, said in mistakes:
        assert exported(tmp_path / "none", words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

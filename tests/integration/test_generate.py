"""The tools that generate text and ask the memory, on a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from bitmar.evaluation.recall import held_out_pairs
from bitmar.generation.episodes import pair_batch
from bitmar.generation.generate import generate
from bitmar.generation.sampling import Sampling
from bitmar.loading import load_trained
from bitmar.model.memory import MemoryState
from shards.loader import ShardSet
from shards.tokenizer import BOS, TextTokenizer
from tests.support.runs import run_tool
from tools import export
from tools import generate as generate_tool
from tools import recall as recall_tool

pytestmark = pytest.mark.slow

CAPTION = "a dog by the sea"


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    np.save(tmp_path / "image.npy", np.random.default_rng(1).normal(size=768).astype(np.float32))
    return tmp_path / "image.npy"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    code = generate_tool.main(list(map(str, arguments)))
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out.splitlines()


def held_values(memory: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(memory["values"][memory["written"]])


def test_a_text_as_a_user_asks_for_it(brief_run: Path, vector: Path) -> None:
    done = run_tool(
        "generate.py", "--checkpoint", brief_run, "--vector", vector, "--prompt", "a dog", "--memory", "off"
    )
    assert done.returncode == 0, done.stderr
    loaded = load_trained(brief_run)
    tokenizer, config = TextTokenizer(loaded.tokenizer), loaded.config
    prompt = [BOS, *tokenizer.encode_batch(["a dog"]).tokens.tolist()]
    empty = MemoryState.empty(config.model.memory_size, config.model.episode_dim)
    image = torch.from_numpy(np.load(vector))[None]
    (text,) = generate(loaded.model, empty, [prompt], image, Sampling(), config.data.row_tokens)
    assert done.stdout == f"a dog{tokenizer.decode(text.tokens)}\n"


def test_drawn_texts_are_those_of_their_seeds(
    brief_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "two.npy", np.random.default_rng(1).normal(size=(2, 768)))
    drawn = ("--checkpoint", brief_run, "--temperature", 1.5, "--max_tokens", 5)
    four = printed(capsys, *drawn, "--vector", tmp_path / "two.npy", "--count", 2, "--seed", 7)
    assert len(four) == 4
    assert printed(capsys, *drawn, "--vector", tmp_path / "two.npy", "--count", 2, "--seed", 7) == four
    assert len(set(printed(capsys, *drawn, "--count", 4))) > 1
    assert len(printed(capsys, "--checkpoint", brief_run, "--beams", 3, "--max_tokens", 4)) == 1


def test_a_pair_is_remembered_in_a_file(
    brief_run: Path, vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--checkpoint", brief_run, "--vector", vector)
    written = tmp_path / "memory.safetensors"
    printed(capsys, *asked, "--prompt", CAPTION, "--memory", "off", "--write_episode", written)
    memory = load_file(written)
    assert int(memory["written"].sum()) == 1
    (mine,) = held_values(memory)
    loaded = load_trained(brief_run)
    tokens = [BOS, *TextTokenizer(loaded.tokenizer).encode_batch([CAPTION]).tokens.tolist()]
    with torch.no_grad():
        episode = loaded.model(pair_batch([tokens], torch.from_numpy(np.load(vector))[None]), loaded.memory).episodes[0]
    torch.testing.assert_close(mine, episode, rtol=1e-5, atol=1e-5)
    assert len(printed(capsys, *asked, "--memory", written)) == 1


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_packed_files_speak_too(
    brief_run: Path, vector: Path, tmp_path: Path, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert export.main(["packed", "--checkpoint", str(brief_run), "--out", str(out), "--bits", bits]) == 0
    capsys.readouterr()
    (text,) = printed(capsys, "--checkpoint", out, "--vector", vector, "--prompt", CAPTION, "--max_tokens", 4)
    assert text.startswith(CAPTION)
    (tmp_path / "small.tokenizer.json").unlink()
    assert generate_tool.main(["--checkpoint", str(out)]) == 2
    assert "small.tokenizer.json" in capsys.readouterr().err


MISTAKES = {
    "no checkpoint": (("--checkpoint", "nowhere"), "neither a run's folder"),
    "prompt too long": (("--prompt", "dog " * 60), "this model was trained on rows of 32"),
    "long pair": (("--prompt", "dog " * 60, "--vector", "VECTOR", "--write_episode", "m"), "trained on rows of 32"),
    "narrow vector": (("--vector", "NARROW"), "of 768 finite numbers"),
    "no vector": (("--vector", "none.npy"), "none.npy"),
    "no memory": (("--memory", "none.safetensors"), "holds no memory"),
    "half a pair": (("--write_episode", "m.safetensors", "--prompt", "a dog"), "needs one --vector and a --prompt"),
    "temperature": (("--temperature", "-1"), "temperature must be >= 0"),
    "seed": (("--seed", str(2**40)), "seed"),
    "count": (("--count", "0"), "--count must be > 0"),
}


@pytest.mark.parametrize(("arguments", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(
    brief_run: Path,
    vector: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros(700, np.float32))
    paths = {"VECTOR": str(vector), "NARROW": str(tmp_path / "narrow.npy")}
    given = [paths.get(argument, argument) for argument in arguments]
    code = generate_tool.main(["--checkpoint", str(brief_run), *given])
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert told.err.startswith("error: ")
    assert says in told.err
    assert told.err.count("\n") == 1


def test_recall(brief_run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--checkpoint", str(brief_run), "--shards", str(tiny_shards), "--out", str(tmp_path)]
    assert recall_tool.main([*asked, "--pairs", "6"]) == 0
    assert "6 pairs shown once each to an empty memory of 7 slots" in capsys.readouterr().out
    told = json.loads((tmp_path / "recall.json").read_text())
    for cue in ("image", "text"):
        assert told["recall"][cue]["memory off"]["value"] == pytest.approx(1 / 6)
        assert list(told["by stored"][cue]) == ["1", "2", "4", "6"]
        assert told["by stored"][cue]["1"]["value"] == 1
        left = told["forgetting"][cue]
        assert left["0"]["held"] == 6
        assert left["0"]["slots used"] == 6
        last = list(left.values())[-1]
        assert last["slots used"] == 7
        assert last["held"] < 6
    assert imread(tmp_path / "recall.png").shape[1] == 1200
    pairs = held_out_pairs(ShardSet.open(str(tiny_shards)), 1000, 32)
    assert len({tuple(vector.tolist()) for vector in pairs.vectors}) == len(pairs)
    assert recall_tool.main([*asked, "--pairs", str(len(pairs))]) == 2
    assert "needs as many other images" in capsys.readouterr().err

"""The pictures of a run together: which are made, of what size, and what a folder may lack."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bitmar.config import Config, DataConfig, PhaseConfig, WandbConfig, dump_config
from bitmar.observability.board import append, read_records
from bitmar.observability.plots import PICTURES, draw_plots, main, write_plots
from bitmar.observability.records import JsonlSink, truncate_metrics_after
from bitmar.observability.run_folder import is_generated, read_settings
from tests.support.picture_runs import CAPTION, Size, head_pictures, write_captions, write_run
from tests.support.picture_runs import PICTURES as ALL
from tests.support.runs import ROOT

TOUCH = 3.0  # pixels by which the boxes of two lines may overlap: none is as high as its letters
OWN_KEYS = {
    "plot_losses": {"losses", "throughput", "schedule"},
    "plot_gradients": {"gradients"},
    "plot_memory_usage": {"memory_usage", "memory_timeline", "memory_reads"},
    "plot_attention_heatmaps": {"attention_distribution", "head_importance", "importance_timeline"},
    "plot_quantization_dist": {"weights", "flips"},
    "log_attention_maps": {"cross_modal"},
    "log_feature_pca": {"latents"},
}


def test_a_process_that_draws_needs_no_torch() -> None:
    """Whose import takes a second of a core that training wants."""
    code = "import sys, bitmar.observability.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def stems(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def files(step: int) -> list[str]:
    """All pictures of a run whose last analysis is of `step`."""
    return [f"plots/{name}.png" for name in ALL] + [f"attention_analysis/{name}.png" for name in head_pictures(step)]


def plots(run_dir: Path) -> list[str]:
    return stems(write_plots(run_dir, ("plots",)))


def set_keys(run_dir: Path, **keys: bool) -> None:
    (run_dir / "config.yaml").write_text(json.dumps({"wandb": keys}), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("slots", [37, 5, 512])
def test_every_picture_decodes_and_is_not_blank(tmp_path: Path, slots: int) -> None:
    write_run(tmp_path, Size(slots=slots))
    paths = write_plots(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == files(60)
    for path in paths:
        image = imread(path)[..., :3]
        assert image.shape[1] == 1200  # 8 inches at 150 DPI
        assert 400 < image.shape[0] <= 2400
        below_title = image[150:]
        assert below_title.std() > 0.05, path
        assert np.mean(below_title < 0.9) > 0.01, path
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_title_names_run_step_and_generated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, title, **options: titles.append(title))
    run_dir = write_run(tmp_path / "my $run$ of 漢", Size(logs=150))
    write_plots(run_dir)
    assert len(titles) == len(files(1500)) - 1  # one of them lies in both folders
    assert all(title.endswith("\nmy $run$ of \\u6f22, step 1,500 (generated data)") for title in titles)
    titles.clear()
    (run_dir / "summary.json").write_text('{"data": "given"}', encoding="utf-8")
    assert plots(run_dir) == list(ALL)
    assert len(titles) == len(ALL)
    assert not any("generated" in title for title in titles)


LARGE = Size(slots=512, layers=12, heads=12, vision_tokens=49, captions=100, sources=8, samples=500)
LEAST = Size(slots=1, logs=1, layers=1, heads=1, vision_tokens=2, captions=1, sources=1, samples=2, top=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [
        Size(),
        LARGE,
        LEAST,
        dataclasses.replace(LARGE, slots=20_000, every=2_000_000, factor=1e6),
        dataclasses.replace(LARGE, logs=80, layers=101, heads=3, factor=1e-6),
        *(Size(top=top, heads=7) for top in (2, 3, 4, 5)),
    ],
)
def test_no_text_lies_on_another_or_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Size) -> None:
    """Of the texts that are drawn, whatever they measure: the pictures leave fixed room for them."""
    drawn: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def noted(text: Text, renderer: RendererBase) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", noted)
    write_run(tmp_path, size, caption=tuple(" " + "wide" * 5 if i % 2 else word for i, word in enumerate(3 * CAPTION)))
    noticed = 0
    for path in draw_plots(tmp_path):
        noticed += len(drawn)
        high, wide = imread(path).shape[:2]
        for text, box in drawn:
            assert min(box.x0, box.y0, wide - box.x1, high - box.y1) >= 0, (path.name, text, box)
        for (text, box), (other, its) in itertools.combinations(drawn, 2):
            across = min(box.x1, its.x1) - max(box.x0, its.x0)
            along = min(box.y1, its.y1) - max(box.y0, its.y0)
            assert min(across, along) <= TOUCH, (path.name, text, other, across, along)
        drawn.clear()
    assert noticed > 100


@pytest.mark.slow
def test_a_short_large_run(tmp_path: Path) -> None:
    assert plots(write_run(tmp_path, dataclasses.replace(LARGE, logs=2))) == list(ALL)


def test_the_least_run_has_no_heatmap_of_single_heads(tmp_path: Path) -> None:
    assert plots(write_run(tmp_path, LEAST)) == [name for name in ALL if name != "head_importance"]


def test_a_picture_has_the_key_that_turns_it_off(tmp_path: Path) -> None:
    assert {name for names in OWN_KEYS.values() for name in names} == set(ALL) == set(PICTURES)
    known = {key for key, _ in PICTURES.values()}
    assert known == set(OWN_KEYS)
    assert all(getattr(WandbConfig(), key) is True for key in known)
    write_run(tmp_path)
    for key, names in OWN_KEYS.items():
        set_keys(tmp_path, **{other: other == key for other in OWN_KEYS})
        assert set(plots(tmp_path)) == names


def test_the_key_of_heat_maps_is_that_of_heads_too(tmp_path: Path) -> None:
    """What heads attend to has a key of its own, save_head_patterns."""
    write_run(tmp_path, Size(logs=2))
    set_keys(tmp_path, plot_attention_heatmaps=False)
    drawn = write_plots(tmp_path, ("attention_analysis",))
    assert stems(drawn) == [name for name in head_pictures(20) if name.startswith("head_patterns")]


def test_heads_are_drawn_of_the_last_analysis(tmp_path: Path) -> None:
    write_run(tmp_path, Size(logs=3))
    for path in (tmp_path / "attention_analysis").glob("*_step_30.*"):
        path.unlink()
    drawn = write_plots(tmp_path, ("attention_analysis",))
    assert stems(drawn) == [name for name in head_pictures(20) if not name.startswith("head_patterns")]


def test_no_picture_where_none_is_wished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    set_keys(tmp_path, create_plots=False)
    assert write_plots(tmp_path) == []
    main([str(tmp_path)])
    told = capsys.readouterr()
    assert (told.out, "create_plots: false" in told.err) == ("", True)


@pytest.mark.parametrize("content", [None, "", "wandb: [1, 2", "- a list", "wandb: text\nphases: 3", "phases: [1, {}]"])
def test_settings_that_cannot_be_read_are_defaults(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    settings = read_settings(tmp_path)
    assert settings.are_on(OWN_KEYS)
    assert settings.phases in ((), ("phase 1", "phase 2"))


def test_settings_are_those_of_a_resolved_recipe(tmp_path: Path) -> None:
    phases = tuple(PhaseConfig(name, {"text": 1.0}, {"lm": 1.0}, steps=4) for name in ("text", "later"))
    config = Config(data=DataConfig(shards="none"), phases=phases, wandb=WandbConfig(plot_losses=False))
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    settings = read_settings(tmp_path)
    assert settings.phases == ("text", "later")
    assert [settings.are_on([key]) for key in ("plot_losses", "plot_gradients")] == [False, True]


def test_the_last_start_tells_of_generated_data(tmp_path: Path) -> None:
    assert is_generated(tmp_path) is False
    sink = JsonlSink(tmp_path)
    sink.event("start", step=0)  # of an older trainer
    assert is_generated(tmp_path) is False
    sink.event("start", step=0, data="given")
    sink.event("start", step=4, data="generated")
    sink.event("checkpoint", step=4)
    sink.close()
    assert is_generated(tmp_path) is True
    (tmp_path / "summary.json").write_text("[]", encoding="utf-8")
    assert is_generated(tmp_path) is True


def test_one_log_is_enough_and_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics to plot"):
        write_plots(tmp_path)
    sink = JsonlSink(tmp_path)
    sink.log(0, {"Training/Loss": math.nan, "Gradients/Total_Norm": 0.0, "Gradients/Encoder_Norm": 0.0})
    sink.close()
    assert plots(tmp_path) == ["losses", "throughput", "schedule"]  # they say what was not logged


@pytest.mark.slow
def test_half_of_any_file_is_left_out(tmp_path: Path) -> None:
    """Cut at many places, as kills do: never an exception, and the other pictures are there."""
    write_run(tmp_path, Size(logs=2))
    written = sorted([*(tmp_path / "plots" / "data").iterdir(), *(tmp_path / "attention_analysis").iterdir()])
    whole = {path: path.read_bytes() for path in written}
    for share in (0.0, 0.01, 0.4, 0.9, 0.999):
        for path, content in whole.items():
            path.write_bytes(content[: int(share * len(content))])
        drawn = stems(write_plots(tmp_path))
        assert {"losses", "throughput", "schedule", "gradients", "flips"} <= set(drawn)
        assert not {"latents", "cross_modal", "head_importance"} & set(drawn)
        assert ("weights" in drawn) == (share > 0.5)  # the record before the torn one


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    write_run(tmp_path, Size(logs=2))
    for path in (tmp_path / "plots" / "data").glob("*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **{k: np.full_like(v, np.nan) if v.dtype.kind == "f" else v for k, v in arrays.items()})
    for path in (tmp_path / "attention_analysis").glob("*.npz"):
        np.savez(path, **{k: v * np.nan if v.dtype.kind == "f" else v for k, v in np.load(path).items()})
    for name in ("memory", "quantization"):
        path = tmp_path / "plots" / "data" / f"{name}.npys"
        records = list(read_records(path))
        path.unlink()
        for record in records:
            append(path, {k: v * np.nan if v.dtype.kind == "f" else v for k, v in record.items()})
    assert write_plots(tmp_path, ("attention_analysis",)) == []
    drawn = plots(tmp_path)
    assert not {"latents", "cross_modal", "head_importance", "attention_distribution", "weights"} & set(drawn)
    assert {"losses", "memory_usage", "memory_reads"} <= set(drawn)


def test_data_of_steps_that_a_resumed_run_has_left_is_not_shown(tmp_path: Path) -> None:
    write_run(tmp_path, Size(logs=6))
    assert truncate_metrics_after(tmp_path / "metrics.jsonl", 25) > 0
    drawn = plots(tmp_path)
    assert not {"latents", "cross_modal", "memory_usage"} & set(drawn)  # of step 60; no slot was written by step 20
    assert {"weights", "head_importance"} <= set(drawn)


@pytest.mark.slow
def test_words_of_any_script(tmp_path: Path) -> None:
    """Warnings are errors here: one of a glyph that the font lacks would fail."""
    words = (
        "<bos>",
        " ﬁsh",
        "🐎",
        " שלום",
        " مرحبا",
        "漢字",
        "\ufffd",
        " ",
        "\n",
        "\x00a",
        " $x$",
        "e\u0301",
        "\u200b",
        "x" * 40,
    )
    write_run(tmp_path, Size(logs=1))
    write_captions(tmp_path, Size(logs=1), np.random.default_rng(0), words)
    assert "cross_modal" in plots(tmp_path)


@pytest.mark.slow
def test_command_line_prints_each_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, Size(logs=2))
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in files(20)]
    main([str(tmp_path), "--folders", "attention_analysis"])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in files(20)[len(ALL) :]]

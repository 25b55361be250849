"""Loader and validation set: contents, exactly once, any world, resume, damage."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.index import index_path, load_columns
from shards.loader import CacheOptions, Loader, LoaderState, PhaseSpec, Rows, Shape, ShardSet, ValidationSet, even_ends
from shards.raw import open_raw
from shards.record import DataError, image_ids
from shards.tokenizer import BOS, EOS, TextTokenizer
from tests.unit.shards.making import make, vectors_of, write_pairs

BOTH = [PhaseSpec("both", {"pairs": 1, "text": 1}, epochs=1)]


def load(shards: ShardSet, phases: list[PhaseSpec] = BOTH, **settings: object) -> Loader:
    chosen = {"seed": 1, "global_batch": 8, "micro_batch": 8, "row_tokens": 32, "rank": 0, "world": 1, **settings}
    names = ("global_batch", "row_tokens", "partitions", "window_shards")
    shape = Shape(**{name: chosen.pop(name) for name in names if name in chosen})  # type: ignore[arg-type]
    return Loader(shards, phases, shape=shape, **chosen)  # type: ignore[arg-type]


def stacked(micro: list[Rows], name: str) -> np.ndarray:
    return np.concatenate([getattr(rows, name) for rows in micro])


def test_pairs_hold_what_the_raw_files_hold(raw_dir: Path, shard_dir: Path) -> None:
    shards = ShardSet.open(shard_dir)
    tokenizer = TextTokenizer(shard_dir / "tokenizer.json")
    known: dict[tuple[str, int], int] = {}
    vectors: dict[int, np.ndarray] = {}
    for pairs in open_raw(raw_dir).pairs:
        raw = pairs.vectors(np.arange(len(pairs)))
        for row, (identity, caption) in enumerate(zip(image_ids(raw).tolist(), pairs.records(), strict=True)):
            key = (str(caption), identity)
            known[key] = known.get(key, 0) + 1
            vectors[identity] = raw[row].astype("<f2").astype("<f4")
    loader = load(shards, [PhaseSpec("p", {"pairs": 1}, epochs=1)], row_tokens=128, global_batch=64)
    count = 0
    for _, micro in loader:
        for rows in micro:
            assert not rows.packed
            for at in np.flatnonzero(rows.valid):
                targets = rows.targets[at][rows.targets[at] >= 0].tolist()
                assert (targets[-1], rows.tokens[at, 0]) == (EOS, BOS)
                assert rows.tokens[at, 1 : len(targets)].tolist() == targets[:-1]
                text, identity = tokenizer.decode(targets[:-1]), int(rows.image_ids[at])
                known[text, identity] -= 1
                assert rows.words[at] == len(text.split())
                assert np.array_equal(rows.vision[at], vectors[identity])
                count += 1
    assert min(known.values()) == 0
    train = [e for e in shards.manifest["shards"] if e["split"] == "train" and e["modality"] == "pairs"]
    assert count == sum(entry["samples"] for entry in train)


@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 33, 200]))
def test_any_world_trains_the_same_targets_exactly_once(
    small_set: ShardSet, world: int, accumulation: int, micro_batch: int, row_tokens: int
) -> None:
    size = world * accumulation * micro_batch
    whole = load(small_set, global_batch=size, micro_batch=size, row_tokens=row_tokens)
    ranks = [
        list(load(small_set, global_batch=size, micro_batch=micro_batch, row_tokens=row_tokens, rank=r, world=world))
        for r in range(world)
    ]
    words = targets = 0
    for step, (state, (rows,)) in enumerate(whole):
        assert state == LoaderState(0, step)
        parts = [ranks[r][step][1][k] for k in range(accumulation) for r in range(world)]
        for name in ("tokens", "targets", "segments", "positions", "vision", "image_ids", "words", "rows", "valid"):
            assert np.array_equal(stacked(parts, name), getattr(rows, name)), name
        assert rows.rows.tolist() == [step * size + at for at in range(size)]
        assert ((rows.targets >= 0) == (rows.segments > 0)).all()
        assert ((rows.targets >= 0).any(axis=1) == rows.valid).all()
        assert (rows.has_vision == (rows.valid & (rows.modality == "pairs"))).all()
        words += int(rows.words.sum())
        targets += int((rows.targets >= 0).sum())
    totals = small_set.manifest["totals"]["train"]
    assert words == small_set.words("train") == totals["words"]
    assert targets == totals["tokens"] + totals["samples"]
    assert all(len(items) == whole.order.steps(0) for items in ranks)


def test_packed_text_restarts_positions_and_stays_in_its_records(small_set: ShardSet) -> None:
    text = [PhaseSpec("t", {"text": 1}, epochs=1)]
    packed = False
    tokens: list[int] = []
    for _, (rows,) in load(small_set, text, row_tokens=64):
        packed |= rows.packed
        for at in range(8):
            for segment in range(1, int(rows.segments[at].max()) + 1):
                here = rows.segments[at] == segment
                assert rows.positions[at][here].tolist() == list(range(int(here.sum())))
                assert rows.tokens[at][here][1:].tolist() == rows.targets[at][here][:-1].tolist()
                assert (rows.tokens[at][here][1:] != BOS).all()
                assert (rows.targets[at][here][:-1] != EOS).all()
            tokens += rows.targets[at][rows.targets[at] >= 0].tolist()
    assert packed
    entries = [e for e in small_set.manifest["shards"] if e["split"] == "train" and e["modality"] == "text"]
    assert tokens.count(EOS) == sum(entry["samples"] for entry in entries)


def test_packed_captions_keep_their_images(raw_dir: Path, shard_dir: Path) -> None:
    """Each slot holds one whole caption with the vector and the words that the raw files give it."""
    shards, tokenizer = ShardSet.open(shard_dir), TextTokenizer(shard_dir / "tokenizer.json")
    known: dict[tuple[str, int], int] = {}
    vectors: dict[int, np.ndarray] = {}
    for pairs in open_raw(raw_dir).pairs:
        raw = pairs.vectors(np.arange(len(pairs)))
        for row, (identity, caption) in enumerate(zip(image_ids(raw).tolist(), pairs.records(), strict=True)):
            known[str(caption), identity] = known.get((str(caption), identity), 0) + 1
            vectors[identity] = raw[row].astype("<f2").astype("<f4")
    loader = load(shards, [PhaseSpec("p", {"pairs": 1}, epochs=1)], row_tokens=128, pack_captions=True)
    count = 0
    for _, (rows,) in loader:
        assert rows.packed
        assert len(rows.has_vision) == len(rows.rows) * rows.slots
        for row in range(len(rows.rows)):
            words = 0
            for slot in range(rows.slots):
                place, here = row * rows.slots + slot, rows.segments[row] == slot + 1
                assert rows.has_vision[place] == here.any()
                if not here.any():
                    assert not rows.vision[place].any()
                    assert rows.image_ids[place] == 0
                    continue
                targets, identity = rows.targets[row][here].tolist(), int(rows.image_ids[place])
                assert np.ptp(np.flatnonzero(here)) == len(targets) - 1
                assert rows.positions[row][here].tolist() == list(range(len(targets)))
                assert (rows.tokens[row][here].tolist(), targets[-1]) == ([BOS, *targets[:-1]], EOS)
                text = tokenizer.decode(targets[:-1])
                known[text, identity] -= 1
                assert np.array_equal(rows.vision[place], vectors[identity])
                words += len(text.split())
                count += 1
            assert rows.words[row] == words
    assert min(known.values()) == 0
    train = [e for e in shards.manifest["shards"] if e["split"] == "train" and e["modality"] == "pairs"]
    assert count == sum(entry["samples"] for entry in train)


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 33, 200]))
def test_any_world_trains_the_same_packed_captions(
    small_set: ShardSet, world: int, accumulation: int, micro_batch: int, row_tokens: int
) -> None:
    size = world * accumulation * micro_batch
    chosen = {"global_batch": size, "row_tokens": row_tokens, "pack_captions": True}
    whole = list(load(small_set, micro_batch=size, **chosen))
    ranks = [list(load(small_set, micro_batch=micro_batch, rank=r, world=world, **chosen)) for r in range(world)]
    for step, (_, (rows,)) in enumerate(whole):
        parts = [ranks[r][step][1][k] for k in range(accumulation) for r in range(world)]
        assert {part.slots for part in parts} == {rows.slots}, "shapes depend on the world"
        for name in (
            "tokens",
            "targets",
            "segments",
            "positions",
            "vision",
            "has_vision",
            "image_ids",
            "words",
            "rows",
        ):
            assert np.array_equal(stacked(parts, name), getattr(rows, name)), name
        assert sum(part.samples for part in parts) == rows.samples
    totals = small_set.manifest["totals"]["train"]
    assert sum(int(rows.words.sum()) for _, (rows,) in whole) == totals["words"]
    assert sum(int((rows.targets >= 0).sum()) for _, (rows,) in whole) == totals["tokens"] + totals["samples"]
    at = whole[len(whole) // 2][0]
    rest = load(small_set, micro_batch=size, state=at, **chosen)
    for (state, (rows,)), (old, (expected,)) in zip(rest, whole[len(whole) // 2 :], strict=True):
        assert state == old
        assert np.array_equal(rows.tokens, expected.tokens)


def test_resume_anywhere_continues_the_same(small_set: ShardSet) -> None:
    phases = [
        PhaseSpec("a", {"text": 1}, steps=9),
        PhaseSpec("b", {"flickr": 2, "text": 1}, steps=14),
        PhaseSpec("c", {"pairs": 1}, epochs=1.2),
    ]
    whole = list(load(small_set, phases))
    assert [item[0].phase for item in whole] == sorted(item[0].phase for item in whole)
    for at in (0, 1, 8, 9, 17, 23, len(whole) - 1):
        rest = list(load(small_set, phases, state=whole[at][0]))
        assert len(rest) == len(whole) - at
        for (state, micro), (old_state, old) in zip(rest, whole[at:], strict=True):
            assert state == old_state
            for name in ("tokens", "targets", "vision", "rows"):
                assert np.array_equal(stacked(micro, name), stacked(old, name))
    last = whole[-1][0]
    assert list(load(small_set, phases, state=LoaderState(last.phase, last.position + 1))) == []
    assert list(load(small_set, phases, state=LoaderState(3, 0))) == []
    assert whole[9][1][0].rows[0] == 1 << 40


def test_numbers_that_do_not_fit(small_set: ShardSet) -> None:
    with pytest.raises(ValueError, match="global_batch 8 must be a multiple of micro_batch 3 x world 2"):
        load(small_set, micro_batch=3, world=2)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        load(small_set, micro_batch=4, world=2, rank=2)
    with pytest.raises(ValueError, match="past the phase"):
        load(small_set, state=LoaderState(0, 10**6))
    with pytest.raises(ValueError, match="outside of the 1 phases"):
        load(small_set, state=LoaderState(2, 0))


def prefetchers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_closing_the_iterator_ends_its_thread(small_set: ShardSet) -> None:
    before = prefetchers()
    iterator = iter(load(small_set))
    next(iterator)
    assert prefetchers() == before + 1
    iterator.close()  # type: ignore[attr-defined]
    assert prefetchers() == before


@pytest.mark.timeout(60)
def test_a_failing_thread_raises_in_the_consumer(small_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = load(small_set)
    monkeypatch.setattr(loader, "step_rows", lambda state: 1 // (3 - state.position))
    with pytest.raises(ZeroDivisionError):
        list(loader)
    assert loader.wait_seconds >= 0


def damaged_copy(small_dir: Path, to: Path, flips: list[tuple[str, str, int]]) -> ShardSet:
    """A copy of the shards with one bit flipped in (tar, column, sample)."""
    shutil.copytree(small_dir, to)
    for tar, column, sample in flips:
        at = int(load_columns(index_path(to / tar), [column])[column][sample])
        data = bytearray((to / tar).read_bytes())
        data[at + 1] ^= 1
        (to / tar).write_bytes(bytes(data))
    return ShardSet.open(to)


@pytest.mark.parametrize("column", ["vector_offset", "text_offset"])
def test_a_damaged_pair_is_masked_and_shifts_nothing(small_dir: Path, tmp_path: Path, column: str) -> None:
    shards = damaged_copy(small_dir, tmp_path / "copy", [("pairs-train-00001.tar", column, 5)])
    loader = load(shards)
    masked = 0
    for (_, (rows,)), (_, (whole,)) in zip(loader, load(ShardSet.open(small_dir)), strict=True):
        lost = whole.valid & ~rows.valid
        masked += int(lost.sum())
        assert (rows.targets[lost] == -100).all()
        assert not rows.vision[lost].any()
        assert not rows.has_vision[lost].any()
        assert not rows.words[lost].any()
        assert np.array_equal(rows.targets[~lost], whole.targets[~lost])
    assert masked == 1
    ((tar, key),) = loader.damaged
    assert tar == "pairs-train-00001.tar"
    assert key.startswith("flickr-")


def test_a_damaged_caption_is_masked_inside_its_row(small_dir: Path, tmp_path: Path) -> None:
    shards = damaged_copy(small_dir, tmp_path / "copy", [("pairs-train-00001.tar", "vector_offset", 5)])
    loader = load(shards, row_tokens=64, pack_captions=True)
    masked = 0
    whole_loader = load(ShardSet.open(small_dir), row_tokens=64, pack_captions=True)
    for (_, (rows,)), (_, (whole,)) in zip(loader, whole_loader, strict=True):
        lost = (whole.segments > 0) & (rows.segments == 0)
        masked += whole.samples - rows.samples
        assert (rows.targets[lost] == -100).all()
        gone = whole.has_vision & ~rows.has_vision
        assert not rows.vision[gone].any()
        for name in ("targets", "segments", "positions"):
            assert np.array_equal(getattr(rows, name)[~lost], getattr(whole, name)[~lost])
        assert np.array_equal(rows.vision[~gone], whole.vision[~gone])
    assert masked == 1
    assert len(loader.damaged) == 1


def test_damaged_text_is_masked_inside_its_rows(small_dir: Path, tmp_path: Path) -> None:
    shards = damaged_copy(small_dir, tmp_path / "copy", [("text-train-00000.tar", "text_offset", 0)])
    loader = load(shards)
    lost = sum(int((rows.targets >= 0).sum()) for _, (rows,) in loader)
    whole = sum(int((rows.targets >= 0).sum()) for _, (rows,) in load(ShardSet.open(small_dir)))
    offsets = load_columns(index_path(small_dir / "text-train-00000.tar"), ["token_offsets"])["token_offsets"]
    assert whole - lost == offsets[1] + 1
    assert len(loader.damaged) == 1


@pytest.mark.timeout(60)
def test_too_much_damage_stops_the_run(small_dir: Path, tmp_path: Path) -> None:
    flips = [("pairs-train-00001.tar", "text_offset", sample) for sample in (1, 2)]
    loader = load(damaged_copy(small_dir, tmp_path / "copy", flips))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of \d+ samples are damaged .*flickr-.* in pairs-train-00001"):
            list(loader)


def test_directories_that_are_not_whole(small_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"make shards with tools/make_shards\.py"):
        ShardSet.open(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="is not a manifest"):
        ShardSet.open(tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"a": ')
    with pytest.raises(DataError, match="is damaged"):
        ShardSet.open(tmp_path / "foreign")
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    tar = copy / "pairs-train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"pairs-train-00000\.tar is truncated or changed"):
        ShardSet.open(copy)
    tar.unlink()
    with pytest.raises(DataError, match=r"pairs-train-00000\.tar: No such file"):
        ShardSet.open(copy)
    shutil.copy(small_dir / tar.name, tar)
    index = index_path(tar)
    index.unlink()
    with pytest.raises(DataError, match=r"pairs-train-00000\.index\.npz: No such file"):
        ShardSet.open(copy)
    shutil.copy(small_dir / index.name, index)
    (copy / "lengths.npy").write_bytes(b"0")
    with pytest.raises(DataError, match=r"lengths\.npy is not the one of the manifest"):
        ShardSet.open(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file"):
        ShardSet.open(copy)


def test_an_index_of_another_set_is_refused(small_dir: Path, tmp_path: Path) -> None:
    """Of the size that the manifest says, and fitting its tar: only what it counts gives it away."""
    copy = shutil.copytree(small_dir, tmp_path / "copy")
    index = index_path(copy / "pairs-train-00001.tar")
    with np.load(index) as stored:
        arrays = dict(stored)
    arrays["words"][[0, 1]] += np.array([1, 0], np.int32)
    with index.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    with pytest.raises(DataError, match=r"pairs-train-00001\.index\.npz does not hold the samples, words and tokens"):
        list(load(ShardSet.open(copy), [PhaseSpec("p", {"flickr": 1}, epochs=1)]))


def test_partitions_give_each_rank_a_run_of_rows(small_set: ShardSet) -> None:
    """Two partitions on one rank and on two give the same rows, and a rank of two reads its own shards only."""
    pairs = [PhaseSpec("p", {"flickr": 1}, epochs=1)]
    settings = {"global_batch": 8, "micro_batch": 4, "partitions": 2, "window_shards": 1}
    whole = list(load(small_set, pairs, **settings))
    ranks = [list(load(small_set, pairs, **settings, rank=r, world=2)) for r in range(2)]
    for step, (_, micro) in enumerate(whole):
        parts = [rows for ranked in ranks for rows in ranked[step][1]]
        for name in ("rows", "words", "image_ids"):
            assert np.array_equal(stacked(parts, name), stacked(micro, name)), name
    words = sum(int(rows.words.sum()) for _, micro in whole for rows in micro)
    entries = [e for e in small_set.manifest["shards"] if e["split"] == "train" and "flickr" in e["sources"]]
    assert words == sum(entry["sources"]["flickr"]["words"] for entry in entries)


@pytest.mark.timeout(60)
def test_a_shard_deleted_while_training_is_named(small_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_dir, tmp_path / "copy")
    loader = load(ShardSet.open(copy), [PhaseSpec("p", {"flickr": 1}, epochs=3)], window_shards=1)
    (copy / "pairs-train-00001.tar").unlink()
    with pytest.raises(DataError, match=r"pairs-train-00001\.tar: No such file"):
        list(loader)


@pytest.mark.parametrize("limit", [None, 2_000_000])
def test_shards_of_a_server_are_read_as_local_ones(small_dir: Path, tmp_path: Path, limit: int | None) -> None:
    """Over HTTP, also where the cache holds only a part of the set at a time."""
    handler = partial(SilentHandler, directory=str(small_dir))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        remote = ShardSet.open(url, CacheOptions(tmp_path / "cache", limit, back_off_s=0.01))
        pairs = [PhaseSpec("p", {"flickr": 1}, epochs=2)]
        settings = {"window_shards": 1}
        whole = list(load(ShardSet.open(small_dir), pairs, **settings))
        for (_, got), (_, wanted) in zip(load(remote, pairs, **settings), whole, strict=True):
            for name in ("tokens", "targets", "vision", "rows"):
                assert np.array_equal(stacked(got, name), stacked(wanted, name))
        remote.readers.close()
        remote.store.close()
        server.shutdown()


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def validation(shards: ShardSet, modality: str, **settings: object) -> ValidationSet:
    chosen = {"micro_batch": 4, "row_tokens": 32, "max_samples": 1000, "rank": 0, "world": 1, **settings}
    return ValidationSet(shards, modality=modality, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("modality", ["pairs", "text"])
@pytest.mark.parametrize("world", [1, 3])
def test_validation_holds_the_split_once(small_set: ShardSet, modality: str, world: int) -> None:
    ranks = [validation(small_set, modality, rank=r, world=world) for r in range(world)]
    entries = [e for e in small_set.manifest["shards"] if e["split"] == "validation" and e["modality"] == modality]
    batches = [rows for ranked in ranks for rows in ranked.batches()]
    assert len({len(ranked) for ranked in ranks}) == 1
    assert len(batches) == world * len(ranks[0])
    assert sum(int(rows.words.sum()) for rows in batches) == sum(e["words"] for e in entries)
    expected = sum(e["tokens"] + e["samples"] for e in entries)
    assert sum(int((rows.targets >= 0).sum()) for rows in batches) == expected
    assert len({at for rows in batches for at in rows.rows.tolist()}) == 4 * len(batches)
    assert not any(rows.packed for rows in batches)


@pytest.mark.parametrize(("world", "micro_batch", "samples"), [(1, 4, 1000), (2, 4, 1000), (3, 4, 1000), (5, 1, 3)])
def test_even_positions_are_other_shares_of_the_same_rows(
    small_set: ShardSet, world: int, micro_batch: int, samples: int
) -> None:
    """A pass on every rank: one that has no row gets a masked one."""

    def passes(even: str) -> list[tuple[Rows, ...]]:
        of = {"micro_batch": micro_batch, "max_samples": samples, "world": world, "even": even}
        ranks = [validation(small_set, "pairs", rank=rank, **of).batches() for rank in range(world)]
        return list(zip(*ranks, strict=True))

    counts: list[list[int]] = []
    for rows, positions in zip(passes("rows"), passes("positions"), strict=True):
        lengths, same = (np.concatenate([(b.segments[b.valid] > 0).sum(1) for b in of]) for of in (rows, positions))
        assert np.array_equal(lengths, same)
        numbers, same = (np.concatenate([batch.rows[batch.valid] for batch in of]) for of in (rows, positions))
        assert np.array_equal(numbers, same)
        counts.append([int(batch.valid.sum()) for batch in positions])
        assert counts[-1] == np.diff(even_ends(lengths, world), prepend=0).tolist()
        assert [batch.tokens.shape for batch in positions if not batch.valid.any()] == [(1, 1)] * counts[-1].count(0)
    assert any(len(set(ranks)) > 1 for ranks in counts) == (world > 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted), st.integers(1, 5))
def test_no_other_runs_are_smaller(lengths: list[int], parts: int) -> None:
    def largest(ends: Sequence[int]) -> int:
        return max((end - begin) * lengths[end - 1] for begin, end in itertools.pairwise([0, *ends]) if end > begin)

    ends = even_ends(np.array(lengths), parts)
    assert ends == sorted(ends)
    assert (len(ends), ends[-1]) == (parts, len(lengths))
    others = itertools.combinations_with_replacement(range(len(lengths) + 1), parts - 1)
    assert largest(ends) == min(largest([*inner, len(lengths)]) for inner in others)


def test_max_samples_chooses_whole_samples_always_the_same(small_set: ShardSet) -> None:
    few = validation(small_set, "pairs", max_samples=7)
    assert few.samples == 7
    again = validation(small_set, "pairs", max_samples=7, micro_batch=2)
    first, second = [[rows.image_ids[rows.valid] for rows in chosen.batches()] for chosen in (few, again)]
    assert np.array_equal(np.concatenate(first), np.concatenate(second))


@settings(max_examples=20)
@given(st.integers(8, 40))
def test_permuted_vision_is_never_of_the_same_image(small_set: ShardSet, max_samples: int) -> None:
    pool = validation(small_set, "pairs", max_samples=max_samples, row_tokens=200)
    ids = np.concatenate([rows.image_ids[rows.valid] for rows in pool.batches()])
    assert pool.is_permutable == (2 * np.unique(ids, return_counts=True)[1].max() <= len(ids))
    if not pool.is_permutable:
        with pytest.raises(DataError, match="more than half"):
            next(pool.batches("permuted"))
        return
    pairs = list(zip(pool.batches("right"), pool.batches("permuted"), strict=True))
    seen: list[int] = []
    for right, permuted in pairs:
        assert np.array_equal(right.image_ids, permuted.image_ids)
        assert np.array_equal(right.targets, permuted.targets)
        assert np.array_equal(right.has_vision, permuted.has_vision)
        own, other = image_ids(right.vision[right.valid]), image_ids(permuted.vision[permuted.valid])
        assert np.array_equal(own, right.image_ids[right.valid])
        assert (own != other).all()
        seen += other.tolist()
    rightful = [i for right, _ in pairs for i in right.image_ids[right.valid].tolist()]
    assert sorted(seen) == sorted(rightful)


def test_validation_that_cannot_be(small_set: ShardSet, tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw", "one", ["a b"] * 40, vectors_of(2, 40))
    make(tmp_path / "raw", tmp_path / "out", validation_fraction=0.999)
    shards = ShardSet.open(tmp_path / "out")
    with pytest.raises(DataError, match="holds no text"):
        validation(shards, "text")
    lopsided = validation(shards, "pairs", max_samples=1)
    with pytest.raises(DataError, match="more than half"):
        list(lopsided.batches("permuted"))
    with pytest.raises(DataError, match="text has no vectors"):
        list(validation(small_set, "text").batches("permuted"))
    with pytest.raises(ValueError, match='even must be "rows" or "positions", got \'tokens\''):
        validation(small_set, "pairs", even="tokens")
    with pytest.raises(ValueError, match="max_samples must be >= 1, got 0"):
        validation(small_set, "pairs", max_samples=0)


def test_damaged_validation_samples_are_left_out(small_dir: Path, tmp_path: Path) -> None:
    tar = "pairs-validation-00000.tar"
    shards = damaged_copy(small_dir, tmp_path / "copy", [(tar, "vector_offset", 2)])
    whole = validation(ShardSet.open(small_dir), "pairs")
    assert validation(shards, "pairs").samples == whole.samples - 1

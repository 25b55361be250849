"""Order: every position exactly once, whatever the shards, windows, partitions and worlds; pure; well mixed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.bins import pack_lengths
from shards.buckets import length_buckets
from shards.corpus import Corpus, RowPlan, ShardLengths, chunk_rows
from shards.order import Order, PhaseSpec
from shards.streams import Shape

SOURCES = (("cc", "pairs"), ("childes", "text"), ("flickr", "pairs"), ("wiki", "text"))


class Data:
    """Shards of samples of random lengths whose word starts are known; sources of a modality are mixed."""

    def __init__(self, pair_shards: list[int], text_shards: list[int], longest: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.tokens: list[np.ndarray] = []
        self.starts: list[list[np.ndarray]] = []
        self.source: list[np.ndarray] = []
        for sizes, sources in ((pair_shards, (0, 2)), (text_shards, (1, 3))):
            for size in sizes:
                self.tokens.append(rng.integers(1, longest + 1, size=size))
                self.starts.append([rng.integers(0, 3, size=n) for n in self.tokens[-1].tolist()])
                self.source.append(rng.choice(sources, size=size))
        self.opened: list[int] = []

    def lengths(self, shard: int) -> ShardLengths:
        self.opened.append(shard)
        starts = self.starts[shard]

        def before(samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
            pairs = zip(samples.tolist(), counts.tolist(), strict=True)
            return np.array([starts[s][:c].sum() for s, c in pairs], dtype=np.int64)

        words = np.array([s.sum() for s in starts], dtype=np.int32)
        return ShardLengths(self.tokens[shard].astype(np.int32), words, self.source[shard], before)

    def corpus(self) -> Corpus:
        entries, counts = [], []
        for shard, (tokens, source) in enumerate(zip(self.tokens, self.source, strict=True)):
            for number in np.unique(source).tolist():
                mine = np.flatnonzero(source == number)
                words = sum(int(self.starts[shard][s].sum()) for s in mine.tolist())
                lengths, many = np.unique(tokens[mine], return_counts=True)
                counts += [(len(entries), n, m) for n, m in zip(lengths.tolist(), many.tolist(), strict=True)]
                entries.append((shard, number, len(mine), words, int(tokens[mine].sum())))
        shard, source, samples, words, tokens = np.array(entries).T
        return Corpus(SOURCES, shard, source, samples, words, tokens, np.array(counts), self.lengths)

    def positions(self, *sources: int) -> list[tuple[int, int, int]]:
        """(shard, sample, position) of all samples of `sources`, sorted."""
        return [
            (shard, sample, position)
            for shard, tokens in enumerate(self.tokens)
            for sample, n in enumerate(tokens.tolist())
            if self.source[shard][sample] in sources
            for position in range(n + 1)
        ]

    def words(self) -> int:
        return sum(int(s.sum()) for shard in self.starts for s in shard)

    def words_of(self, plan: RowPlan) -> int:
        return sum(int(self.starts[s][i][a : a + n].sum()) for s, i, a, n in spans(plan))


def spans(plan: RowPlan) -> list[tuple[int, int, int, int]]:
    columns = (plan.shards, plan.samples, plan.starts, plan.lengths)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def positions_of(plan: RowPlan) -> list[tuple[int, int, int]]:
    return [(s, i, start + at) for s, i, start, length in spans(plan) for at in range(length)]


def row_lengths(plan: RowPlan) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(plan.lengths)])[plan.row_offsets])


def whole(order: Order, phase: int, step: int) -> RowPlan:
    return order.plan(phase, step, 0, order.shape.global_batch)


def same(a: RowPlan, b: RowPlan) -> bool:
    names = ("row_offsets", "shards", "samples", "starts", "lengths")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    return equal and (a.stream, a.row_tokens, a.packed) == (b.stream, b.row_tokens, b.packed)


def joined(plans: list[RowPlan]) -> RowPlan:
    """The plan of rows that were asked for slice by slice."""
    offsets, filled = [np.zeros(1, np.int64)], 0
    for plan in plans:
        offsets.append(plan.row_offsets[1:] + filled)
        filled += len(plan.shards)
    columns = {n: np.concatenate([getattr(p, n) for p in plans]) for n in ("shards", "samples", "starts", "lengths")}
    return dataclasses.replace(plans[0], row_offsets=np.concatenate(offsets), **columns)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Data, Shape, int]:
    partitions = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 20), min_size=partitions, max_size=9)
    seed = draw(st.integers(0, 9))
    data = Data(draw(sizes), draw(sizes), draw(st.integers(1, 40)), seed)
    share, window = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return data, Shape(partitions * share, draw(st.integers(2, 24)), partitions, window), seed


@settings(max_examples=120)
@given(shapes(), st.booleans())
def test_an_epoch_trains_every_position_exactly_once(case: tuple[Data, Shape, int], pack: bool) -> None:
    data, shape, seed = case
    phase = PhaseSpec("p", {"pairs": 1, "text": 1}, epochs=1)
    order = Order(data.corpus(), [phase], seed=seed, shape=shape, pack_captions=pack)
    seen: list[tuple[int, int, int]] = []
    words = 0
    for step in range(order.steps(0)):
        plan = whole(order, 0, step)
        rows = row_lengths(plan)
        assert len(rows) == shape.global_batch
        assert 0 < rows.max() <= plan.row_tokens <= shape.row_tokens
        kinds = {SOURCES[int(data.source[s][i])][1] for s, i, _, _ in spans(plan)}
        assert kinds == {plan.modality}
        assert plan.packed == (pack or plan.modality == "text")
        if not plan.packed:
            assert np.diff(plan.row_offsets).max() == 1
        seen += positions_of(plan)
        words += data.words_of(plan)
    assert sorted(seen) == data.positions(0, 1, 2, 3)
    assert words == order.words(0) == data.words()
    assert {order.passes()[name] for name in {SOURCES[i][0] for s in data.source for i in s.tolist()}} == {1}


@settings(max_examples=60)
@given(shapes(), st.integers(1, 8), st.data())
def test_slices_of_any_world_make_the_same_global_batch(
    case: tuple[Data, Shape, int], pieces: int, draw: st.DataObject
) -> None:
    data, shape, seed = case
    phases = [PhaseSpec("p", {"pairs": 1, "text": 1}, epochs=2)]
    order = Order(data.corpus(), phases, seed=seed, shape=shape)
    step = draw.draw(st.integers(0, order.steps(0) - 1))
    size = shape.global_batch
    cuts = sorted({0, size, *draw.draw(st.lists(st.integers(0, size), max_size=pieces))})
    other = Order(data.corpus(), phases, seed=seed, shape=shape)  # has not seen the steps before
    parts = [other.plan(0, step, a, b - a) for a, b in pairwise(cuts)]
    assert {part.row_tokens for part in parts} == {whole(order, 0, step).row_tokens}
    assert same(joined(parts), whole(order, 0, step))


@settings(max_examples=60)
@given(shapes(), st.data())
def test_a_partition_gives_its_own_rows_from_its_own_shards(case: tuple[Data, Shape, int], draw: st.DataObject) -> None:
    data, shape, seed = case
    corpus = data.corpus()
    order = Order(corpus, [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=seed, shape=shape)
    parts = corpus.partitions("pairs", shape.partitions)
    assert sorted(np.concatenate(parts).tolist()) == [s for s, kind in enumerate(data.source) if kind[0] in (0, 2)]
    step = draw.draw(st.integers(0, order.steps(0) - 1))
    for number, part in enumerate(parts):
        data.opened.clear()
        plan = order.plan(0, step, number * shape.share, shape.share)
        assert set(plan.shards.tolist()) <= set(part.tolist())
        assert set(data.opened) <= set(part.tolist()), "it opened a shard of another partition"
        ahead = order.ahead(0, step, number * shape.share, shape.share)
        assert set(ahead) <= set(part.tolist())


@settings(max_examples=60)
@given(shapes(), st.booleans(), st.data())
def test_words_before_a_batch_against_a_count(case: tuple[Data, Shape, int], pack: bool, draw: st.DataObject) -> None:
    data, shape, seed = case
    corpus = data.corpus()
    longer = Order(corpus, [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=seed, shape=shape, pack_captions=pack)
    counts = np.cumsum([data.words_of(whole(longer, 0, step)) for step in range(longer.steps(0))])
    limit = draw.draw(st.integers(int(counts[0]), int(counts[-1])).filter(lambda n: n > 0))
    order = Order(corpus, [PhaseSpec("p", {"pairs": 1}, words=limit)], seed=seed, shape=shape, pack_captions=pack)
    expected = int(np.searchsorted(counts, limit, side="right"))
    if limit == counts[-1]:  # a whole epoch, and wordless batches of the next
        assert order.steps(0) >= longer.steps(0)
    else:
        assert order.steps(0) == expected
        assert order.words(0) == counts[expected - 1] <= limit


def test_windows_keep_reading_local() -> None:
    data = Data([30] * 40, [], 12, 0)
    shape = Shape(8, 16, window_shards=4)
    order = Order(data.corpus(), [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=0, shape=shape)
    first_seen: dict[int, int] = {}
    last_seen: dict[int, int] = {}
    for step in range(order.steps(0)):
        plan = whole(order, 0, step)
        ahead = order.ahead(0, step, 0, 8)
        assert len(ahead) == 8
        for shard in plan.shards.tolist():
            first_seen.setdefault(shard, step)
            last_seen[shard] = step
    spread = [last_seen[shard] - first_seen[shard] for shard in first_seen]
    assert max(spread) <= 3 * order.steps(0) // 10, "a shard is needed in three of ten windows at most"
    data.opened.clear()
    fresh = Order(data.corpus(), [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=0, shape=shape)
    fresh.plan(0, order.steps(0) // 2, 0, 8)
    assert len(set(data.opened)) <= 12, "one batch opens a window, and those before it that its rows waited in"


def test_the_shuffle_mixes_sources_and_shards() -> None:
    """Runs of one shard are as short as in a uniform shuffle of the window; every epoch is another order."""
    data = Data([500] * 8, [], 12, 0)
    order = Order(data.corpus(), [PhaseSpec("p", {"pairs": 1}, epochs=2)], seed=0, shape=Shape(16, 16, window_shards=8))
    per_epoch = order.steps(0) // 2
    shards = np.concatenate([whole(order, 0, step).shards for step in range(per_epoch)])
    equal = np.mean(shards[1:] == shards[:-1])
    expected = 1 / 8
    assert abs(equal - expected) < 5 * np.sqrt(expected * (1 - expected) / len(shards)), equal
    # the mean place of each shard's samples is the middle of the epoch: standard error 1 / sqrt(12 * 500)
    places = [np.flatnonzero(shards == shard).mean() / len(shards) for shard in range(8)]
    assert np.abs(np.array(places) - 0.5).max() < 5 / np.sqrt(12 * 500)
    again = np.concatenate([whole(order, 0, step).samples for step in range(per_epoch, 2 * per_epoch)])
    before = np.concatenate([whole(order, 0, step).samples for step in range(per_epoch)])
    assert np.mean(again == before) < 0.02


def test_captions_fill_their_rows() -> None:
    """Lengths spread as those of real captions (a mean of 13 tokens): few slots are padding."""
    data = Data([1000] * 3, [], 1, 0)
    rng = np.random.default_rng(0)
    data.tokens = [np.clip(rng.poisson(12, size=1000), 3, 60) for _ in range(3)]
    data.starts = [[np.ones(n, np.int64) for n in tokens.tolist()] for tokens in data.tokens]
    order = Order(data.corpus(), [PhaseSpec("p", {"pairs": 1}, epochs=1)], seed=0, shape=Shape(32, 64))
    plans = [whole(order, 0, step) for step in range(order.steps(0))]
    slots = sum(32 * plan.row_tokens for plan in plans)
    assert sum(int(plan.lengths.sum()) for plan in plans) / slots > 0.95


@settings(max_examples=80)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 90))
def test_rows_of_packed_lengths_hold_each_caption_once(lengths: list[int], width: int) -> None:
    values, counts = np.unique(lengths, return_counts=True)
    templates = pack_lengths(values.tolist(), counts.tolist(), width)
    placed = sorted(length for row, many in templates for length in row * many)
    assert placed == sorted(lengths)
    assert all(many > 0 and 0 < sum(row) <= width for row, many in templates)
    rows = sum(many for _, many in templates)
    assert rows <= max(1, 2 * -(-sum(lengths) // width)), "rows are less than half full"


def test_packed_captions_fill_their_rows() -> None:
    rng = np.random.default_rng(0)
    values, counts = np.unique(np.clip(rng.poisson(15, size=3000), 4, 60), return_counts=True)
    for width, least in ((64, 0.975), (256, 0.985)):
        rows = sum(many for _, many in pack_lengths(values.tolist(), counts.tolist(), width))
        assert (values * counts).sum() / (rows * width) > least


@settings(max_examples=60)
@given(shapes())
def test_a_packed_caption_is_cut_only_where_longer_than_a_row(case: tuple[Data, Shape, int]) -> None:
    data, shape, seed = case
    phases = [PhaseSpec("p", {"pairs": 1}, epochs=2)]
    order = Order(data.corpus(), phases, seed=seed, shape=shape, pack_captions=True)
    width = shape.row_tokens
    for step in range(order.steps(0)):
        plan = whole(order, 0, step)
        assert np.diff(plan.row_offsets).max() <= plan.slots
        for shard, sample, start, length in spans(plan):
            positions = int(data.tokens[shard][sample]) + 1
            assert start % width == 0
            assert length == min(width, positions - start)
        cut = shape.global_batch // 2
        slices = [(0, cut), (cut, shape.global_batch - cut)]
        parts = [order.plan(0, step, first, count) for first, count in slices if count]
        assert same(joined(parts), plan), "the rows depend on who asks"
        assert {part.slots for part in parts} == {plan.slots}


@settings(max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 60), st.integers(2, 30))
def test_chunks_and_buckets(lengths: list[int], least: int, width: int) -> None:
    record, start, length = chunk_rows(np.array(lengths), width)
    expected = [(r, s, min(width, n - s)) for r, n in enumerate(lengths) for s in range(0, n, width)]
    assert list(zip(record.tolist(), start.tolist(), length.tolist(), strict=True)) == expected
    bucket_of = length_buckets(np.bincount(length), least)
    assert (np.diff(bucket_of) >= 0).all()
    sizes = np.bincount(bucket_of[length])
    assert len(sizes) == 1 or sizes.min() >= least


def make_order(phases: list[PhaseSpec], seed: int = 3, batch: int = 4) -> tuple[Data, Order]:
    data = Data([20, 30, 20], [10, 10, 10], 20, 1)
    return data, Order(data.corpus(), phases, seed=seed, shape=Shape(batch, 16, window_shards=2))


def test_a_step_depends_on_nothing_asked_before() -> None:
    phases = [
        PhaseSpec("a", {"text": 1}, epochs=2),
        PhaseSpec("b", {"pairs": 1, "text": 1}, words=900),
        PhaseSpec("c", {"flickr": 3, "childes": 1}, steps=90),
    ]
    _, order = make_order(phases)
    asked = [(phase, step) for phase in range(3) for step in range(order.steps(phase))]
    plans = [whole(order, *at) for at in asked]
    _, again = make_order(phases)
    for number in np.random.default_rng(0).permutation(len(asked))[:150]:
        assert same(whole(again, *asked[number]), plans[number])
    _, other = make_order(phases, seed=4)
    assert not all(same(whole(other, *at), plan) for at, plan in zip(asked, plans, strict=True))
    per_epoch = order.steps(0) // 2
    assert not all(same(whole(order, 0, s), whole(order, 0, s + per_epoch)) for s in range(per_epoch))


def test_a_phase_in_words_stops_before_the_batch_that_would_pass_it() -> None:
    data, order = make_order([PhaseSpec("w", {"pairs": 1, "text": 1}, words=2500)])
    longer = make_order([PhaseSpec("w", {"pairs": 1, "text": 1}, epochs=9)])[1]
    total = sum(data.words_of(whole(order, 0, step)) for step in range(order.steps(0)))
    assert total == order.words(0) <= 2500
    assert total + data.words_of(whole(longer, 0, order.steps(0))) > 2500
    assert all(same(whole(order, 0, step), whole(longer, 0, step)) for step in range(order.steps(0)))
    exact = make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=2 * data.words())])[1]
    assert exact.passes() == dict.fromkeys(["cc", "flickr", "childes", "wiki"], 2)


def test_a_phase_in_steps_draws_by_weight_and_wraps() -> None:
    data, order = make_order([PhaseSpec("s", {"flickr": 3, "childes": 1}, steps=400)])
    plans = [whole(order, 0, step) for step in range(400)]
    drawn = sum(plan.stream == "flickr" for plan in plans)
    assert 260 < drawn < 340
    assert sum(data.words_of(plan) for plan in plans) == order.words(0)
    flickr = [at for plan in plans if plan.stream == "flickr" for at in positions_of(plan)]
    assert set(flickr) == set(data.positions(2))
    times = np.unique([f"{at}" for at in flickr], return_counts=True)[1]
    assert times.max() - times.min() <= 1
    assert order.passes()["flickr"] == times.max()
    assert order.passes()["cc"] == 0


def test_fractions_of_epochs() -> None:
    _, order = make_order([PhaseSpec("a", {"text": 1}, epochs=1.5), PhaseSpec("b", {"text": 1}, epochs=0.5)])
    assert order.steps(0) == pytest.approx(
        1.5 * make_order([PhaseSpec("a", {"text": 1}, epochs=1)])[1].steps(0), abs=0.5
    )
    assert order.passes()["wiki"] == 3
    with pytest.raises(IndexError, match="asked for step"):
        whole(order, 0, order.steps(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mix": {"text": 1}}, "exactly one of epochs, words, steps, got none"),
        ({"mix": {"text": 1}, "epochs": 1, "steps": 2}, "exactly one"),
        ({"mix": {"text": 1}, "epochs": 0}, "epochs must be > 0, got 0"),
        ({"mix": {"text": 1}, "epochs": float("nan")}, "epochs must be > 0, got nan"),
        ({"mix": {}, "steps": 1}, "weights > 0"),
        ({"mix": {"text": -1.0}, "steps": 1}, "weights > 0"),
        ({"mix": {"text": 2, "pairs": 1}, "epochs": 1}, "unequal weights"),
        ({"mix": {"texts": 1}, "epochs": 1}, "mix names 'texts', but the shards hold only cc, childes"),
        ({"mix": {"text": 1, "wiki": 1}, "epochs": 1}, "mix names 'wiki' twice"),
        ({"mix": {"text": 1}, "words": 1}, "less than its first global batch"),
    ],
)
def test_phases_that_make_no_sense(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_order([PhaseSpec("p", **fields)])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 16), "global_batch must be >= 1, got 0"),
        ((4, 1), "row_tokens must be >= 2, got 1"),
        ((6, 16, 4), "global_batch 6 must be a multiple of partitions 4"),
        ((4, 16, 1, 0), "window_shards must be >= 1, got 0"),
        ((8, 16, 4), "partitions 4 need at least as many shards of text, but there are 3"),
    ],
)
def test_shapes_that_make_no_sense(shape: tuple[int, ...], message: str) -> None:
    data = Data([5] * 4, [5] * 3, 9, 0)
    with pytest.raises(ValueError, match=message):
        Order(data.corpus(), [PhaseSpec("p", {"text": 1}, epochs=1)], seed=0, shape=Shape(*shape))


def test_phases_draw_their_own_orders() -> None:
    _, order = make_order([PhaseSpec("a", {"pairs": 1}, epochs=1), PhaseSpec("b", {"pairs": 1}, epochs=1)])
    assert not all(same(whole(order, 0, step), whole(order, 1, step)) for step in range(order.steps(0)))


def test_words_that_fit_a_batch_exactly_take_it() -> None:
    data, order = make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, epochs=1)])
    held = sum(data.words_of(whole(order, 0, step)) for step in range(5))
    assert make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=held)])[1].steps(0) == 5
    assert make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=held - 1)])[1].steps(0) == 4

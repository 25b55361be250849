"""Order: every position exactly once, against brute force, and pure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import GlobalBatchPlan, Lengths, Order, PhaseSpec, Stream, chunk_rows, length_buckets

SOURCES = (("cc", "pairs"), ("flickr", "pairs"), ("childes", "text"), ("wiki", "text"))


class Data:
    """Samples of random lengths whose word starts are known."""

    def __init__(self, counts: tuple[int, int, int, int], longest: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, longest + 1, size=sum(counts))
        self.starts = [rng.integers(0, 3, size=n) for n in tokens.tolist()]
        words = np.array([s.sum() for s in self.starts], dtype=np.int32)
        source = np.repeat(np.arange(4), counts)
        self.lengths = Lengths(SOURCES, tokens.astype(np.int32), words, source, self.words_before)

    def words_before(self, samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
        pairs = zip(samples.tolist(), counts.tolist(), strict=True)
        return np.array([self.starts[s][:c].sum() for s, c in pairs], dtype=np.int64)

    def words_of(self, plan: GlobalBatchPlan) -> int:
        spans = zip(plan.samples.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
        return sum(int(self.starts[s][a : a + n].sum()) for s, a, n in spans)


def positions_of(plan: GlobalBatchPlan) -> list[tuple[int, int]]:
    spans = zip(plan.samples.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    return [(sample, start + at) for sample, start, length in spans for at in range(length)]


COUNTS = st.tuples(*[st.integers(1, 25)] * 4)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 40), st.integers(0, 9), st.integers(1, 12), st.integers(2, 24))
def test_an_epoch_trains_every_position_exactly_once(
    counts: tuple[int, int, int, int], longest: int, seed: int, batch: int, width: int
) -> None:
    data = Data(counts, longest, seed)
    order = Order(
        data.lengths,
        [PhaseSpec("p", {"pairs": 1, "text": 1}, epochs=1)],
        seed=seed,
        global_batch=batch,
        row_tokens=width,
    )
    seen: list[tuple[int, int]] = []
    words = 0
    for step in range(order.steps(0)):
        plan = order.batch(0, step)
        rows = np.diff(np.concatenate([[0], np.cumsum(plan.lengths)])[plan.row_offsets])
        assert len(rows) == batch
        assert rows.max() == plan.row_tokens <= width
        kinds = {SOURCES[int(data.lengths.source[s])][1] for s in plan.samples}
        assert kinds == {plan.modality}
        if plan.modality == "pairs":
            assert np.diff(plan.row_offsets).max() == 1
        seen += positions_of(plan)
        words += data.words_of(plan)
    assert sorted(seen) == [(s, p) for s, n in enumerate(data.lengths.tokens.tolist()) for p in range(n + 1)]
    assert words == order.words(0) == data.lengths.words.sum()
    assert set(order.passes().values()) == {1}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 9), st.integers(1, 6), st.integers(2, 24))
def test_text_rows_against_brute_force(count: int, longest: int, seed: int, batch: int, width: int) -> None:
    data = Data((1, 1, count, 1), longest, seed)
    stream = Stream("childes", "text", np.arange(2, 2 + count), data.lengths, shape=(batch, width))
    epoch = stream.epoch(np.random.default_rng(seed))
    permuted = np.random.default_rng(seed).permutation(np.arange(2, 2 + count)).tolist()
    tape = [(s, p) for s in permuted for p in range(int(data.lengths.tokens[s]) + 1)]
    assert stream.batches == -(-len(tape) // (batch * width))
    for number in range(stream.batches):
        plan = stream.batch(epoch, number)
        flat = positions_of(plan)
        assert flat == tape[number * batch * width : (number + 1) * batch * width]
        cuts = np.concatenate([[0], np.cumsum(plan.lengths)])[plan.row_offsets]
        assert cuts.tolist() == [min(row * width, len(flat)) for row in range(batch + 1)]
        assert epoch.words[number] == data.words_of(plan)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 8), st.integers(2, 30))
def test_chunks_and_buckets(lengths: list[int], batch: int, width: int) -> None:
    record, start, length = chunk_rows(np.array(lengths), width)
    expected = [(r, s, min(width, n - s)) for r, n in enumerate(lengths) for s in range(0, n, width)]
    assert list(zip(record.tolist(), start.tolist(), length.tolist(), strict=True)) == expected
    bucket_of = length_buckets(length, batch)
    assert (np.diff(bucket_of) >= 0).all()
    sizes = np.bincount(bucket_of[length])
    assert len(sizes) == 1 or sizes.min() >= 8 * batch


def make_order(phases: list[PhaseSpec], seed: int = 3, batch: int = 4) -> tuple[Data, Order]:
    data = Data((40, 30, 20, 10), 20, 1)
    return data, Order(data.lengths, phases, seed=seed, global_batch=batch, row_tokens=16)


def same(a: GlobalBatchPlan, b: GlobalBatchPlan) -> bool:
    return (
        a.stream == b.stream
        and np.array_equal(a.samples, b.samples)
        and np.array_equal(a.starts, b.starts)
        and np.array_equal(a.lengths, b.lengths)
        and np.array_equal(a.row_offsets, b.row_offsets)
    )


def test_a_step_depends_on_nothing_asked_before() -> None:
    phases = [
        PhaseSpec("a", {"text": 1}, epochs=2),
        PhaseSpec("b", {"pairs": 1, "text": 1}, words=900),
        PhaseSpec("c", {"flickr": 3, "childes": 1}, steps=90),
    ]
    _, order = make_order(phases)
    asked = [(phase, step) for phase in range(3) for step in range(order.steps(phase))]
    plans = [order.batch(*at) for at in asked]
    _, again = make_order(phases)
    for number in np.random.default_rng(0).permutation(len(asked))[:150]:
        assert same(again.batch(*asked[number]), plans[number])
    _, other = make_order(phases, seed=4)
    assert not all(same(other.batch(*at), plan) for at, plan in zip(asked, plans, strict=True))
    per_epoch = order.steps(0) // 2
    assert not all(same(order.batch(0, s), order.batch(0, s + per_epoch)) for s in range(per_epoch))


def test_a_phase_in_words_stops_before_the_batch_that_would_pass_it() -> None:
    data, order = make_order([PhaseSpec("w", {"pairs": 1, "text": 1}, words=2500)])
    longer = make_order([PhaseSpec("w", {"pairs": 1, "text": 1}, epochs=9)])[1]
    total = sum(data.words_of(order.batch(0, step)) for step in range(order.steps(0)))
    assert total == order.words(0) <= 2500
    assert total + data.words_of(longer.batch(0, order.steps(0))) > 2500
    assert all(same(order.batch(0, step), longer.batch(0, step)) for step in range(order.steps(0)))
    exact = make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=2 * int(data.lengths.words.sum()))])[1]
    assert exact.passes() == dict.fromkeys(["cc", "flickr", "childes", "wiki"], 2)


def test_a_phase_in_steps_draws_by_weight_and_wraps() -> None:
    data, order = make_order([PhaseSpec("s", {"flickr": 3, "childes": 1}, steps=400)])
    plans = [order.batch(0, step) for step in range(400)]
    drawn = sum(plan.stream == "flickr" for plan in plans)
    assert 260 < drawn < 340
    assert sum(data.words_of(plan) for plan in plans) == order.words(0)
    flickr = [at for plan in plans if plan.stream == "flickr" for at in positions_of(plan)]
    times = np.unique([s * 1000 + p for s, p in flickr], return_counts=True)[1]
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
        order.batch(0, order.steps(0))


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


def test_phases_draw_their_own_orders() -> None:
    _, order = make_order([PhaseSpec("a", {"pairs": 1}, epochs=1), PhaseSpec("b", {"pairs": 1}, epochs=1)])
    assert not all(same(order.batch(0, step), order.batch(1, step)) for step in range(order.steps(0)))


def test_words_that_fit_a_batch_exactly_take_it() -> None:
    whole = make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, epochs=1)])
    held = sum(whole[0].words_of(whole[1].batch(0, step)) for step in range(5))
    assert make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=held)])[1].steps(0) == 5
    assert make_order([PhaseSpec("w", {"text": 1, "pairs": 1}, words=held - 1)])[1].steps(0) == 4

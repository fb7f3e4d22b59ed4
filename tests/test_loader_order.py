"""The order of an epoch, as index arithmetic: no file is read here."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.loader.buckets import batch_lengths, bucket_of, choose_lengths, round_up
from scjax.loader.order import Order, default_block, default_lanes, permutation, random_bits, run_rows
from scjax.loader.weights import Weights

LENGTHS = np.random.default_rng(0).lognormal(6.0, 0.5, 1_000_000).astype(np.int64)


def lengths(rows):
    return LENGTHS[rows]


def epoch_of(order, epoch=0):
    """int64[steps, B]"""
    return np.stack([order.rows(epoch, step, lengths) for step in range(order.steps_per_epoch)])


def lane_by_lane(order, epoch=0):
    """The same, faster."""
    lanes = [order.lane_rows(epoch, lane, lengths) for lane in range(order.lanes)]
    return np.stack(lanes, axis=1).reshape(order.steps_per_epoch, -1)


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    first = draw(st.sampled_from([0, 1000]))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return Order(
        parts=tuple((first + sum(sizes[:i]), n) for i, n in enumerate(sizes)),
        batch_size=lanes * draw(st.integers(1, 4)),
        lanes=lanes,
        window=draw(st.integers(1, 60)),
        block=draw(st.integers(1, 40)),
        seed=draw(st.integers(-5, 5)),
        shuffle=draw(st.booleans()),
        group_lengths=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_every_row_comes_once_and_filler_only_at_the_end(order, epoch):
    batches = epoch_of(order, epoch)
    np.testing.assert_array_equal(batches, lane_by_lane(order, epoch))
    rows = batches[batches >= 0]
    first = order.parts[0][0]
    np.testing.assert_array_equal(np.sort(rows), np.arange(first, first + order.n_rows))
    assert (batches[:-1] >= 0).all()
    assert batches.size - rows.size < order.batch_size


@settings(max_examples=40, deadline=None)
@given(order=orders())
def test_lanes_own_slices_of_one_sequence_and_windows_tile_them(order):
    """A batch is r rows of each lane, and no row of a lane is handed out before its window."""
    sequence = [row for lane in range(order.lanes) for row in _stream(order, lane)]
    assert sorted(sequence) == list(range(order.parts[0][0], order.parts[0][0] + order.n_rows))
    batches = epoch_of(order).reshape(-1, order.lanes, order.rows_per_lane)
    for lane in range(order.lanes):
        stream, at = _stream(order, lane), 0
        low, high = (lane * order.n_rows // order.lanes, (lane + 1) * order.n_rows // order.lanes)
        assert len(stream) == high - low
        for window in range(int(order.windows_at(order.steps_per_epoch - 1)[lane]) + 1):
            start, stop = order.window_steps(lane, window)
            handed = batches[start:stop, lane].ravel()
            handed = handed[handed >= 0]
            assert sorted(handed) == sorted(stream[at : at + len(handed)])
            at += len(handed)
        assert at == len(stream)


def _runs(order, lane, epoch=0):
    last = int(order.windows_at(order.steps_per_epoch - 1)[lane])
    return [run for window in range(last + 1) for run in order.runs(epoch, lane, window)]


def _stream(order, lane, epoch=0):
    return [row for first, n in _runs(order, lane, epoch) for row in range(first, first + n)]


def test_runs_are_blocks_of_neighbours():
    order = Order(((0, 5000), (5000, 3000)), batch_size=32, lanes=8, window=500, block=100)
    runs = [run for lane in range(8) for w in range(3) for run in order.runs(0, lane, w)]
    assert max(n for _, n in runs) <= 100
    assert all(first // 100 == (first + n - 1) // 100 for first, n in runs)
    assert all((first < 5000) == (first + n <= 5000) for first, n in runs)


# ---- what an order depends on


def test_epochs_seeds_and_corpora_have_unrelated_orders():
    make = lambda **changes: Order(((0, 3000),), batch_size=64, lanes=16, block=16, **changes)  # noqa: E731
    first = make().rows(0, 0)
    np.testing.assert_array_equal(first, make().rows(0, 0))
    others = [
        make().rows(1, 0),
        make(seed=1).rows(0, 0),
        make(seed=1).rows(1, 0),
        make(salt="other").rows(0, 0),
    ]
    for other in others:
        assert len(np.intersect1d(first, other)) < 16
    assert not np.array_equal(make().rows(1, 0), make(seed=1).rows(0, 0))  # never seed + epoch


def test_random_bits_are_those_of_the_format():
    """Written down: a saved cursor must mean the same cells in every later version."""
    assert random_bits("rows", "m", 0, 1, n=2).tolist() == RANDOM_BITS
    assert permutation("blocks", "m", 3, 0, n=8).tolist() == PERMUTATION


def test_the_order_is_that_of_the_format():
    """Likewise, of whole epochs: blocks, lanes, windows, weights."""
    found = {}
    for name, changes in (
        ("plain", {}),
        ("grouped", {"group_lengths": True}),
        ("stored", {"shuffle": False}),
    ):
        order = Order(((0, 700), (900, 300)), 24, 8, window=40, block=16, seed=3, salt="m", **changes)
        found[name] = hashlib.sha256(epoch_of(order, 2).astype("<i8").tobytes()).hexdigest()[:12]
    codes = np.arange(1000) // 7 % 5 - 1
    for level in ("row", "block"):
        spec = {"set": 0.3, "type": {"a": 2.0, None: 0.3, "c": 1.0}}
        columns = dict.fromkeys(spec, ["a", "b", "c", "d"])
        weights = Weights(
            ((0, 700), (900, 300)),
            16,
            spec,
            columns,
            lambda _, p, a, b: codes[700 * p + a : 700 * p + b],
            level=level,
        )
        order = Order(((0, 700), (900, 300)), 24, 8, window=40, block=16, seed=3, salt="m", weights=weights)
        found[level] = hashlib.sha256(epoch_of(order, 2).astype("<i8").tobytes()).hexdigest()[:12]
    assert found == ORDERS


ORDERS = {
    "plain": "692c9a275e24",
    "grouped": "0406bf4a14de",
    "stored": "8dbcda8087a5",
    "row": "e1b732fd97f5",
    "block": "3b08bd6d6df0",
}
RANDOM_BITS = [7176514353830059092, 662351919018068347]
PERMUTATION = [7, 6, 3, 2, 5, 4, 1, 0]


def test_a_step_needs_none_before_it():
    order = Order(((0, 100_000),), batch_size=64, lanes=16, window=256, group_lengths=True)
    asked = []

    def watched(rows):
        asked.append(len(rows))
        return LENGTHS[rows]

    costs = []
    for step in (200, 800, 1400):
        asked.clear()
        order.rows(7, step, watched)
        costs.append((len(asked), sum(asked)))
    assert costs == [(16, 16 * 256)] * 3


def test_unshuffled_single_lane_is_row_order():
    order = Order(((10, 30), (40, 15)), batch_size=8, lanes=1, window=16, block=7, shuffle=False)
    batches = epoch_of(order).ravel()
    np.testing.assert_array_equal(batches[:45], np.arange(10, 55))
    assert (batches[45:] == -1).all()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_refills_are_spread_over_the_steps_for_every_host(processes):
    order = Order(((0, 256 * 4096),), batch_size=1024, lanes=256, window=1024)
    each = 256 // processes
    windows = np.stack([order.windows_at(step) for step in range(300, 300 + 512)])
    begin = np.diff(windows, axis=0)  # [steps, lanes]
    for process in range(processes):
        refills = begin[:, process * each : (process + 1) * each].sum(1)
        per_step = each / order.steps_per_window
        assert refills.sum() == pytest.approx(511 * per_step, abs=each / 8)
        assert refills.max() <= np.ceil(per_step) + 1


def test_small_corpora_get_smaller_blocks():
    assert default_block(10**8, 256, 140) == 1024
    assert default_block(500_000, 256, 140) == 512
    assert default_block(5000, 64, 140) == 512
    assert default_block(5000, 64, 5) == 16
    assert default_block(10**8, 64, 140, in_source_order=True) == 64
    assert default_block(5000, 64, 140, in_source_order=True) == 16


def test_lanes_by_default():
    assert [default_lanes(b) for b in (1, 7, 48, 64, 96, 1024, 1536)] == [1, 1, 16, 64, 32, 64, 64]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lanes": 5}, r"lanes=5 does not divide batch_size=64; the default would be 64"),
        ({"batch_size": 0}, r"batch_size must be at least 1, not 0"),
        ({"window": 0}, r"window must be at least 1"),
        ({"parts": ()}, r"no cells"),
    ],
)
def test_sizes_that_make_no_order(changes, message):
    with pytest.raises(ValueError, match=message):
        Order(**{"parts": ((0, 100),), "batch_size": 64, "lanes": 4} | changes)


def test_steps_outside_the_epoch():
    order = Order(((0, 100),), batch_size=64, lanes=4)
    with pytest.raises(ValueError, match="step 2 is outside the epoch's 2 steps"):
        order.rows(0, 2)


# ---- grouping by length


def grouped(group_lengths, **changes):
    sizes = {"parts": ((0, 100_000),), "batch_size": 256, "lanes": 64, "window": 256, "block": 64}
    return Order(**sizes | changes, group_lengths=group_lengths)


def test_groups_hold_rows_of_similar_length():
    spread = []
    for group_lengths in (False, True):
        order = grouped(group_lengths)
        steps = range(100, 228)  # whole windows
        spread.append(np.mean([LENGTHS[order.rows(0, s, lengths)].std() for s in steps]))
    assert spread[1] < 0.35 * spread[0]


def test_lengths_come_in_random_turns_which_change_with_the_epoch():
    order = grouped(True)
    mean = np.array([[LENGTHS[order.rows(e, s, lengths)].mean() for s in range(100, 164)] for e in (0, 1)])
    neighbours = [np.corrcoef(m[:-1], m[1:])[0, 1] for m in mean]
    assert np.abs(neighbours).max() < 0.35
    assert abs(np.corrcoef(mean)[0, 1]) < 0.35
    assert np.corrcoef(mean[0], np.arange(64))[0, 1] < 0.35


def test_grouping_saves_padding_with_few_buckets():
    padded = {}
    for group_lengths in (False, True):
        order = grouped(group_lengths)
        sample = batch_lengths(LENGTHS[:50_000], order)
        buckets = choose_lengths(sample, round_up(LENGTHS[:100_000].max()), 3)
        widths = [bucket_of(LENGTHS[order.rows(0, s, lengths)].max(), buckets) for s in range(100, 228)]
        padded[group_lengths] = np.mean(widths)
    assert padded[True] < 0.6 * padded[False]


@settings(max_examples=50, deadline=None)
@given(
    longest=st.lists(st.integers(1, 1500), min_size=1, max_size=60),
    extra=st.integers(0, 300),
    n_buckets=st.integers(1, 4),
)
def test_bucket_lengths_are_the_best_there_are(longest, extra, n_buckets):
    longest = np.array(longest)
    top = round_up(int(longest.max()) + extra)
    chosen = choose_lengths(longest, top, n_buckets)
    assert chosen[-1] == top and len(chosen) <= n_buckets
    assert list(chosen) == sorted(set(chosen)) and all(c % 64 == 0 for c in chosen)
    cost = lambda buckets: sum(bucket_of(x, buckets) for x in longest)  # noqa: E731
    rng = np.random.default_rng(top)
    options = np.arange(64, top, 64)
    for _ in range(20 if len(options) else 0):
        other = sorted(rng.choice(options, min(n_buckets - 1, len(options)), replace=False).tolist())
        assert cost(chosen) <= cost([*other, top])


def test_a_top_bucket_need_not_be_a_multiple_of_64():
    assert choose_lengths(np.array([100, 100, 1200]), 1200, 2) == (128, 1200)
    assert choose_lengths(np.array([30]), 50, 3) == (50,)
    assert bucket_of(129, (128, 1200)) == 1200 and bucket_of(128, (128, 1200)) == 128
    with pytest.raises(ValueError, match="n_buckets must be at least 1"):
        choose_lengths(np.array([30]), 50, 0)


# ---- how well cells are mixed


def composition_variance(order, labels):
    """Variance of the share of each label in a batch, over what independent draws would give."""
    batches = lane_by_lane(order)[:-1]
    share = np.stack([(labels[batches] == k).mean(1) for k in range(labels.max() + 1)])
    p = np.bincount(labels) / len(labels)
    return ((share - p[:, None]) ** 2).mean(1).sum() / ((p * (1 - p)).sum() / order.batch_size)


@pytest.mark.parametrize("n_studies, batch_size", [(30, 1024), (600, 1024), (600, 256)])
def test_batches_mix_studies_as_well_as_independent_draws(n_studies, batch_size):
    """With the defaults, cells shuffled on disk or not, few large studies or many small ones."""
    n, rng = 300_000, np.random.default_rng(0)
    size = rng.lognormal(0, 1, n_studies)
    stored = np.sort(rng.choice(n_studies, n, p=size / size.sum()))  # study after study
    parts = tuple((first, min(2**16, n - first)) for first in range(0, n, 2**16))
    lanes = default_lanes(batch_size)
    for codes, in_source_order, most in ((stored, True, 1.6), (rng.permutation(stored), False, 1.1)):
        block = default_block(n, lanes, 140, in_source_order)
        assert composition_variance(Order(parts, batch_size, lanes, block=block), codes) < most
    one_lane = Order(parts, batch_size, lanes=1, window=16_384, block=1024)
    assert composition_variance(one_lane, stored) > 3  # what lanes are for


def test_a_lane_owns_another_slice_in_every_epoch():
    order = Order(((0, 64_000),), batch_size=64, lanes=16, block=50)
    first = [run_rows(order.runs(epoch, 0, 3)).min() // 4000 for epoch in range(12)]
    assert len(set(first)) >= 6


def test_cells_that_were_appended_are_in_every_batch_alike():
    """Two builds, each shuffled, one after the other: blocks of a thousand rows are enough."""
    n = 400_000
    origin = (np.arange(n) >= 300_000).astype(int)
    order = Order(((0, 300_000), (300_000, 100_000)), batch_size=1024, lanes=64, block=1024)
    assert composition_variance(order, origin) < 1


def test_every_window_samples_the_whole_slice_of_its_lane():
    n, lanes = 2**20, 16
    order = Order(((0, n),), batch_size=64, lanes=lanes, block=64)
    for lane in (0, 7):
        for window in range(2, 40):
            rows = run_rows(order.runs(0, lane, window))
            turn = np.bincount(rows * 64 // n, minlength=64)  # a lane's slice is 4 to 5 of these 64ths
            assert 4 <= (turn > 0).sum() <= 5
            assert np.sort(turn)[-4:].min() >= 128


@settings(max_examples=30, deadline=None)
@given(order=orders(), epoch=st.integers(0, 2))
def test_pieces_are_of_one_block_and_no_more_than_they_need_be(order, epoch):
    """Every block is whole, but for one cut a lane of its own and one where its slice begins."""
    runs = [run for lane in range(order.lanes) for run in _runs(order, lane, epoch)]
    blocks = sum(-(-n // order.block) for _, n in order.parts)
    windows = int((order.windows_at(order.steps_per_epoch - 1) + 1).sum())
    assert len(runs) <= blocks + windows + 2 * order.lanes


def test_windows_hold_whole_blocks():
    order = Order(((0, 2**18), (2**18, 2**18)), batch_size=1024, lanes=64)
    runs = [run for lane in range(64) for run in _runs(order, lane)]
    whole = sum(n == 1024 for _, n in runs)
    assert whole >= 512 - 2 * 64 and len(runs) <= whole + 5 * 64

"""How often which cell is drawn in a weighted epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.loader.order import Order
from scjax.loader.weights import Weights, describe

NAMES = ["a", "b", "c", "d"]


class Cells:
    """Label codes in memory, in parts."""

    def __init__(self, sizes, seed=0, kinds=(4, 3), in_order=False, unknown=True):
        rng = np.random.default_rng(seed)
        n = sum(sizes)
        self.codes = {}
        for name, k in zip(("set", "type"), kinds, strict=True):
            p = rng.dirichlet(np.full(k + 1, 0.7))
            if not unknown:
                p[0] = 0
            self.codes[name] = rng.choice(k + 1, n, p=p / p.sum()) - 1
        if in_order:
            self.codes["set"].sort()
        self.columns = {name: NAMES[:k] for name, k in zip(("set", "type"), kinds, strict=True)}
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.parts = tuple((int(first) + 1000, n) for first, n in zip(self.starts, sizes, strict=False))
        self.read = []

    def get(self, column, part, first, last):
        self.read.append(last - first)
        return self.codes[column][self.starts[part] + first : self.starts[part] + last]

    def weights(self, spec, block=16, **options):
        return Weights(self.parts, block, spec, self.columns, self.get, **options)


def expected(cells, spec, draws):
    """float [rows]: expected draws of each row, the plain way."""
    weight = np.ones(len(cells.codes["set"]))
    for column, how in spec.items():
        codes = cells.codes[column] + 1
        n = np.bincount(codes, minlength=len(cells.columns[column]) + 1)
        if isinstance(how, dict):
            shares = np.array([how.get(name, 0.0) for name in [None, *cells.columns[column]]])
            factor = shares / np.maximum(n, 1)
        else:
            factor = np.maximum(n, 1.0) ** (how - 1)
        weight *= factor[codes]
    return weight / weight.sum() * draws


def drawn(weights, epoch):
    """int [rows]: draws of each row, and of each block."""
    rows = [weights.row_draws(epoch, block) for block in range(len(weights.block_draws(epoch)))]
    assert [int(row.sum()) for row in rows] == weights.block_draws(epoch).tolist()
    return np.concatenate(rows)


@st.composite
def weighted(draw):
    sizes = draw(st.lists(st.integers(1, 120), min_size=1, max_size=4))
    cells = Cells(sizes, draw(st.integers(0, 99)), in_order=draw(st.booleans()))
    alpha = st.floats(0, 1)
    there = [name for name in NAMES if name in {NAMES[k] for k in cells.codes["set"] if k >= 0}]
    shares = st.dictionaries(st.sampled_from([*there, None]), st.floats(0.01, 5), min_size=1)
    spec = {}
    if draw(st.booleans()):
        spec["type"] = draw(alpha)
    how = draw(st.one_of(alpha, shares)) if there else draw(alpha)
    if isinstance(how, dict) and None in how and not (cells.codes["set"] < 0).any():
        del how[None]
    if not isinstance(how, dict) or how:
        spec["set"] = how
    options = {
        "draws": draw(st.one_of(st.none(), st.integers(1, 900))),
        "start": draw(st.integers(0, 2**64 - 1)),
    }
    return cells, spec, draw(st.integers(1, 40)), options


@settings(max_examples=150, deadline=None)
@given(case=weighted(), epoch=st.integers(0, 10**6))
def test_an_epoch_is_exactly_d_draws_and_a_row_comes_floor_or_ceiling(case, epoch):
    cells, spec, block, options = case
    weights = cells.weights(spec, block, level="row", **options)
    n = drawn(weights, epoch)
    due = expected(cells, spec, weights.draws)
    assert n.sum() == weights.draws == (options["draws"] or len(n))
    assert (n >= np.floor(due - 1e-6)).all() and (n <= np.ceil(due + 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(case=weighted(), epoch=st.integers(0, 10**6))
def test_blocks_come_floor_or_ceiling_in_bunches(case, epoch):
    cells, spec, block, options = case
    weights = cells.weights(spec, block, level="block", **options)
    due, n = expected(cells, spec, weights.draws), drawn(weights, epoch)
    assert n.sum() == weights.draws
    assert not n[due == 0].any()
    bunches = max(1, round(weights.draws / block))
    edges = np.cumsum([0, *weights._sizes])
    for low, high, draws in zip(edges[:-1], edges[1:], weights.block_draws(epoch), strict=True):
        per_block = due[low:high].sum() * bunches / weights.draws
        least, most = np.floor(per_block - 1e-6), np.ceil(per_block + 1e-6)
        size = weights.draws / bunches
        assert least * np.floor(size) <= draws <= most * np.ceil(size)
        if draws:  # the rows of a block come floor or ceiling of what the block came
            share = due[low:high] / due[low:high].sum() * draws
            assert (n[low:high] >= np.floor(share - 1e-6)).all() and (
                n[low:high] <= np.ceil(share + 1e-6)
            ).all()


@pytest.mark.parametrize("draws", [None, 60])
@pytest.mark.parametrize("level, epochs", [("row", 600), ("block", 2000)])
def test_in_the_long_run_every_row_comes_as_often_as_it_is_due(level, epochs, draws):
    cells, spec = Cells([170, 60], seed=3), {"set": 0.3, "type": {"a": 1.0, "b": 4.0, None: 0.5}}
    weights = cells.weights(spec, 16, level=level, draws=draws, start=12345)
    n = sum(drawn(weights, epoch) for epoch in range(epochs))
    due = expected(cells, spec, weights.draws) * epochs
    off = 3 if level == "row" else 100  # some rows are due 9,000 times
    assert (np.abs(n - due) < off).all()


def test_a_rare_row_comes_at_even_distances():
    cells = Cells([400], unknown=False)
    weights = cells.weights({}, level="row", draws=80)  # each row in every fifth epoch
    n = np.stack([drawn(weights, epoch) for epoch in range(200)])
    for row in n.T[::7]:
        gaps = np.diff(np.flatnonzero(row))
        assert gaps.min() >= 3 and gaps.max() <= 8  # three distances, those of the golden ratio


def test_a_temperature_of_one_is_every_cell_once():
    cells = Cells([170, 61])
    for level in ("row", "auto"):
        weights = cells.weights({"set": 1, "type": 1.0}, level=level)
        assert weights.level == "row"
        assert (drawn(weights, 5) == 1).all()


def test_a_temperature_of_zero_draws_all_categories_alike_the_unknown_among_them():
    cells = Cells([3000, 1000], seed=1)
    n = drawn(cells.weights({"set": 0}, draws=5000, level="row"), 0)
    per_category = np.bincount(cells.codes["set"] + 1, n)
    assert len(per_category) == 5 and np.abs(per_category - 1000).max() < 50
    assert per_category.sum() == 5000


def test_shares_leave_out_what_they_do_not_name():
    cells = Cells([3000, 1000], seed=1)
    n = drawn(cells.weights({"set": {"b": 3, "a": 1}}, level="row"), 3)
    assert np.abs(np.bincount(cells.codes["set"] + 1, n) - [0, 1000, 3000, 0, 0]).max() < 50
    n = drawn(cells.weights({"set": {None: 1, "a": 1, "b": 0}}, level="row"), 3)
    assert np.abs(np.bincount(cells.codes["set"] + 1, n) - [2000, 2000, 0, 0, 0]).max() < 50


def test_a_block_of_small_weight_is_taken_whole_in_some_epochs():
    """Three quarters of the corpus are one data set, stored apart; two data sets are to come alike."""
    cells = Cells([4096], unknown=False)
    cells.codes["set"] = np.repeat([0, 1], [3072, 1024])
    weights = cells.weights({"set": 0}, 64)
    assert weights.level == "block" and weights.purity == 1
    whole = np.zeros(64, int)
    for epoch in range(30):
        blocks = weights.block_draws(epoch)
        assert set(blocks.tolist()) <= {0, 64, 128} and blocks.sum() == 4096
        whole += blocks > 0
        for block in (0, 63):
            assert len(set(weights.row_draws(epoch, block).tolist())) == 1
    assert whole[:48].min() >= 18 and whole[:48].max() <= 22  # of 30 epochs, where 20 are due
    assert (whole[48:] == 30).all()


def test_the_level_is_chosen_by_what_the_blocks_are_like():
    stored, mixed = Cells([6000], seed=1, in_order=True), Cells([6000], seed=1)
    assert stored.weights({"set": 0}, 32).level == "block"
    assert mixed.weights({"set": 0}, 32).level == "row"
    assert mixed.weights({"set": 0}, 32).purity < 0.9 < stored.weights({"set": 0.2}, 32).purity
    assert stored.weights({"set": 0}, 32, level="row").level == "row"
    assert (
        mixed.weights({}, 32, draws=1000).level == "block"
    )  # a sixth of the corpus an epoch, in whole blocks


def test_nothing_overflows_in_a_corpus_of_the_greatest_size():
    """2**32 draws of few cells, some of which hardly weigh anything."""
    cells = Cells([500], seed=2, unknown=False)
    spec = {"set": {"a": 1e-9, "b": 1.0, "c": 1e-3}}
    for level in ("row", "block"):
        weights = cells.weights(spec, 8, draws=2**32, level=level)
        blocks = weights.block_draws(10**6)
        assert blocks.sum() == 2**32 and blocks.min() >= 0
        n, due = drawn(weights, 10**6), expected(cells, spec, 2**32)
        assert n.sum() == 2**32
        np.testing.assert_allclose(n, due, rtol=1e-6, atol=16 if level == "block" else 1.5)


def test_what_a_window_draws_is_found_without_reading_other_blocks():
    cells = Cells([5000, 5000], seed=4)
    order = Order(cells.parts, 32, 8, window=64, block=100, weights=cells.weights({"set": 0.3}, 100))
    costs = []
    for epoch, step in [(0, 5), (0, 300), (10**9, 77)]:
        cells.read.clear()
        order.rows(epoch, step)
        costs.append(sum(cells.read))
    assert max(costs) <= 8 * 3 * 100  # a window of 64 draws lies in three blocks of about 100 at most


def test_copies_of_a_row_are_spread_over_its_window():
    cells = Cells([2000], unknown=False)
    cells.codes["set"] = (np.arange(2000) % 50 == 0).astype(np.int64)  # one row in fifty, 16 times as often
    weights = cells.weights({"set": {"a": 49 * 40, "b": 16 * 40}}, 128, level="row")
    order = Order(cells.parts, 64, 8, window=512, block=128, weights=weights)
    for lane in range(8):
        for window in range(int(order.windows_at(order.steps_per_epoch - 1)[lane]) + 1):
            rows = order.lane_rows(0, lane)[slice(*order.window_steps(lane, window))]
            steps = len(rows)
            for row in np.unique(rows[rows >= 0]):
                at = np.flatnonzero((rows == row).any(1))
                copies = int((rows == row).sum())
                if 1 < copies <= steps / 2:
                    assert len(at) == copies  # never two in a batch
                    assert np.diff(at).min() >= 0.4 * steps / copies - 2


@pytest.mark.parametrize(
    "spec, options, error, message",
    [
        ({"tissue": 0.5}, {}, KeyError, r"no label column 'tissue'; it has \['set', 'type'\]"),
        ({"set": 1.5}, {}, ValueError, "'set' has 1.5; a temperature is a number from 0"),
        ({"set": -0.1}, {}, ValueError, "'set' has -0.1"),
        ({"set": True}, {}, ValueError, "'set' has True"),
        ({"set": float("nan")}, {}, ValueError, "'set' has nan"),
        ({"set": "0.5"}, {}, ValueError, "'set' has '0.5'"),
        ({"set": {"z": 1}}, {}, KeyError, r"'set' of here has no category 'z'; it has \['a', 'b'"),
        ({"set": {"a": -1}}, {}, ValueError, "the share of 'a' in 'set' is -1"),
        ({"set": {"a": float("inf")}}, {}, ValueError, "the share of 'a' in 'set' is inf"),
        ({"set": {"a": 0}}, {}, ValueError, "all shares of 'set' are 0"),
        ({"set": {"d": 1}}, {}, ValueError, "here has no cell with set 'd' to draw"),
        ({"set": {"a": 1}, "type": {"c": 1}}, {}, ValueError, "no cell of here is left"),
        ({"set": 0.5}, {"level": "cell"}, ValueError, "weight_level='cell': there are auto, row, block"),
        ({"set": 0.5}, {"draws": 0}, ValueError, "epoch_cells must be from 1 to 4294967296, not 0"),
    ],
)
def test_weights_that_cannot_be(spec, options, error, message):
    cells = Cells([50], unknown=False)
    cells.codes["set"], cells.codes["type"] = np.arange(50) % 3, (np.arange(50) % 3 > 0).astype(int) * 2
    with pytest.raises(error, match=message):
        cells.weights(spec, where="here", **options)


def test_too_many_combinations_are_refused():
    cells = Cells([50])
    cells.columns = {name: [str(i) for i in range(3000)] for name in cells.columns}
    with pytest.raises(ValueError, match="set x type has 9,006,001 combinations"):
        cells.weights({"set": 0.5, "type": 0.5})


def test_a_weighting_as_text():
    assert describe(None) is None
    assert (
        describe({"b": 1, "a": {"x": 2}})
        == describe({"a": {"x": 2.0}, "b": 1.0})
        == '{"a": {"x": 2.0}, "b": 1.0}'
    )
    long = [describe({"type": {f"category {i}": i + extra for i in range(50)}}) for extra in (0, 1)]
    assert long[0] != long[1] and max(map(len, long)) < 130

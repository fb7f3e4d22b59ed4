"""What the order promises, for random corpora, settings, hosts and kill points; see scjax/loader/order.py."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import assert_same, build, join, take, two_studies
from test_weights import Cells, expected

from scjax.corpus.reader import PartReader
from scjax.loader import Loader
from scjax.loader.order import Order

LENGTHS = np.random.default_rng(0).integers(1, 900, 10_000)


@st.composite
def orders(draw, weighted=None, max_examples=60):
    """(order, the labels of its cells, weights as asked for)"""
    sizes = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    cells = Cells(sizes, draw(st.integers(0, 99)), in_order=draw(st.booleans()))
    lanes, block = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 40))
    seed, weights, spec = draw(st.integers(-5, 5)), None, {}
    if draw(st.booleans()) if weighted is None else weighted:
        spec = draw(
            st.sampled_from([{}, {"set": 0.0}, {"set": 0.5, "type": 0.2}, {"type": {None: 1.0}}, {"type": 1}])
        )
        if any(isinstance(how, dict) for how in spec.values()) and (cells.codes["type"] >= 0).all():
            spec = {}
        draws = draw(st.one_of(st.none(), st.integers(1, 700)))
        level = draw(st.sampled_from(["row", "block", "auto"]))
        start = draw(st.integers(0, 2**64 - 1))
        weights = cells.weights(spec, block, level=level, draws=draws, start=start)
    order = Order(
        parts=cells.parts,
        batch_size=lanes * draw(st.integers(1, 4)),
        lanes=lanes,
        window=draw(st.integers(1, 60)),
        block=block,
        seed=seed,
        shuffle=draw(st.booleans()),
        group_lengths=draw(st.booleans()),
        weights=weights,
        skip=draw(st.sampled_from([1, 5, 100])),
    )
    return order, cells, spec


def lengths(rows):
    return LENGTHS[rows]


def epoch_of(order, epoch):
    """int64 [steps, B], by the definition."""
    return np.stack([order.rows(epoch, step, lengths) for step in range(order.steps_per_epoch)])


@settings(max_examples=80, deadline=None)
@given(case=orders(), epoch=st.integers(0, 10**6))
def test_an_epoch_has_the_steps_that_it_needs_and_filler_in_the_last_only(case, epoch):
    order, _, _ = case
    batches = epoch_of(order, epoch)
    D = order.weights.draws if order.weights else order.n_rows
    assert len(batches) == -(-D // order.batch_size)
    assert (batches >= 0).sum() == D
    assert (batches[:-1] >= 0).all()
    per_lane = (batches >= 0).reshape(len(batches), order.lanes, -1).sum((0, 2))
    assert per_lane.tolist() == [
        (v + 1) * D // order.lanes - v * D // order.lanes for v in range(order.lanes)
    ]


@settings(max_examples=60, deadline=None)
@given(case=orders(weighted=False), epoch=st.integers(0, 10**6))
def test_without_weights_no_cell_comes_twice_and_none_is_missing(case, epoch):
    order, _, _ = case
    for each in (epoch, epoch + 1):
        rows = epoch_of(order, each)
        np.testing.assert_array_equal(np.sort(rows[rows >= 0]), order.parts[0][0] + np.arange(order.n_rows))


@settings(max_examples=80, deadline=None)
@given(case=orders(weighted=True), epoch=st.integers(0, 10**6))
def test_with_weights_an_epoch_hands_out_what_they_say(case, epoch):
    order, cells, spec = case
    rows = epoch_of(order, epoch)
    handed = np.bincount(rows[rows >= 0] - order.parts[0][0], minlength=order.n_rows)
    blocks = range(len(order.weights.block_draws(epoch)))
    drawn = np.concatenate([order.weights.row_draws(epoch, block) for block in blocks])
    np.testing.assert_array_equal(handed, drawn)
    if order.weights.level == "row":
        due = expected(cells, spec, order.weights.draws)
        assert (handed >= np.floor(due - 1e-6)).all() and (handed <= np.ceil(due + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(case=orders(), epoch=st.integers(0, 1000), data=st.data())
def test_a_window_hands_out_of_what_it_reads_and_reads_no_more_than_it_must(case, epoch, data):
    order, _, _ = case
    lane = data.draw(st.integers(0, order.lanes - 1))
    window = data.draw(st.integers(0, int(order.windows_at(order.steps_per_epoch - 1)[lane])))
    runs, picks = order.runs(epoch, lane, window), order.picks(epoch, lane, window)
    read = np.concatenate([np.arange(first, first + n) for first, n in runs] or [np.empty(0, int)])
    assert all(n > 0 for _, n in runs)
    ends = {first + n for first, n in order.parts}
    for first, n in runs:  # a run lies in one part
        assert not any(first < end < first + n for end in ends)
    if order.weights is None:
        assert picks is None
        return
    assert (np.diff(picks) >= 0).all()
    used = np.unique(picks)
    np.testing.assert_array_less(-1, used)
    at = 0
    for _, n in runs:  # both ends of a run are used, and no stretch that is skipped is longer than allowed
        mine = used[(used >= at) & (used < at + n)] - at
        assert mine[0] == 0 and mine[-1] == n - 1
        assert np.diff(mine).max(initial=1) <= order.skip
        at += n
    assert at == len(read)


@settings(max_examples=40, deadline=None)
@given(case=orders(), data=st.data())
def test_a_step_is_the_same_whatever_was_asked_before(case, data):
    order, cells, _ = case
    other = Order(**{name: getattr(order, name) for name in order.__dataclass_fields__})
    asked = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), min_size=1, max_size=6))
    whole = {}
    for epoch, step in asked:
        if epoch not in whole:
            whole[epoch] = epoch_of(order, epoch)
        step %= order.steps_per_epoch
        np.testing.assert_array_equal(other.rows(epoch, step, lengths), whole[epoch][step])


# ---- the same, through the loader, from the disk


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    return build(two_studies(), out, labels=["cell_type", "donor"], validation=0.15)


@st.composite
def loaders(draw):
    lanes = draw(st.sampled_from([2, 4, 8, 16]))
    options = {
        "batch_size": lanes * draw(st.integers(1, 8)),
        "lanes": lanes,
        "window": draw(st.integers(1, 120)),
        "block": draw(st.one_of(st.none(), st.integers(1, 100))),
        "seed": draw(st.integers(0, 9)),
        "group_lengths": draw(st.booleans()),
        "max_genes": draw(st.sampled_from([None, 60])),
        "labels": draw(st.sampled_from([None, (), ("donor",)])),
        "weights": draw(
            st.sampled_from(
                [None, {"dataset": 0}, {"dataset": {"second": 3, "first": 1}, "cell_type": 0.5}, {"donor": 1}]
            )
        ),
        "weight_level": draw(st.sampled_from(["auto", "row", "block"])),
        "epoch_cells": draw(st.sampled_from([None, None, 333, 2000])),
        "prefetch": draw(st.sampled_from([0, 2])),
    }
    hosts = [h for h in (1, 2, 4, 8, 16) if lanes % h == 0]
    return options, draw(st.sampled_from(hosts)), draw(st.sampled_from(hosts))


SLOW = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@settings(max_examples=20, **SLOW)
@given(case=loaders(), kill=st.floats(0, 2.5))
def test_a_run_that_was_killed_goes_on_to_the_bit_on_any_number_of_hosts(corpus, case, kill):
    """Batches up to the kill on some hosts, from the saved cursor on others: those of one host that never
    stopped, over the end of an epoch as well, and the cells that the order says."""
    options, before, after = case
    options = {"corpus": corpus} | options
    alone = Loader(**options)
    stop = int(kill * alone.steps_per_epoch)
    n = 3
    iterator = iter(alone)
    if stop:
        iterator.set_state(
            iterator.get_state()
            | {
                "step": max(0, stop - n) % alone.steps_per_epoch,
                "epoch": max(0, stop - n) // alone.steps_per_epoch,
            }
        )
    whole = [next(iterator) for _ in range(min(n, stop) + n)]
    iterator.close()

    first = [Loader(**options, process_index=h, process_count=before) for h in range(before)]
    start = max(0, stop - n)
    state = first[0].state(*divmod(start, alone.steps_per_epoch))
    shares, saved = [], []
    for loader in first:
        running = iter(loader)
        running.set_state(state)
        shares.append([next(running) for _ in range(stop - start)])
        saved.append(json.loads(json.dumps(running.get_state())))
        running.close()
    assert all(each == saved[0] for each in saved)
    second = [Loader(**options, process_index=h, process_count=after) for h in range(after)]
    rest = [take(loader, n, saved[0]) for loader in second]
    found = [join([share[i] for share in shares]) for i in range(stop - start)]
    found += [join([share[i] for share in rest]) for i in range(n)]
    assert len(found) == len(whole)
    for step, (a, b) in enumerate(zip(whole, found, strict=True), start):
        assert_same(a, b)
        epoch, within = divmod(step, alone.steps_per_epoch)
        rows = alone.order.rows(epoch, within, lambda rows: _genes(corpus, rows))
        np.testing.assert_array_equal(np.where(b.weight > 0, b.row.astype(np.int64), -1), rows)


def _genes(corpus, rows):
    return np.concatenate([part.nnz_per_cell for part in corpus.parts])[rows]


@settings(max_examples=10, **SLOW)
@given(case=loaders(), epoch=st.integers(0, 50))
def test_a_weighted_epoch_has_as_many_cells_of_each_label_as_it_should(corpus, case, epoch):
    options, _, _ = case
    options |= {"labels": ("dataset", "donor"), "corpus": corpus}
    loader = Loader(**options)
    state = loader.state(epoch, 0)
    batches = take(loader, loader.steps_per_epoch, state)
    codes = np.concatenate([batch.label["dataset"][batch.weight > 0] for batch in batches])
    D = options["epoch_cells"] or sum(part.n_cells for part in loader.parts)
    assert len(codes) == D == (loader.order.n_draws)
    if options["weights"] and "dataset" in options["weights"] and len(options["weights"]) == 1:
        most = 0.08 if loader.order.weights.level == "row" else 0.25
        assert abs((codes == 0).mean() - 0.5) < most


@pytest.mark.parametrize("weights", [None, {"dataset": 0.2, "cell_type": 0.5}])
def test_a_seek_costs_a_window_a_lane_wherever_it_goes(corpus, monkeypatch, weights):
    """What is read, of counts and of the index, does not grow with the step or the epoch."""
    spans, columns = [], []
    read, column = PartReader.read_spans, PartReader.column

    def watched(reader, of, *out):
        spans.append(len(of))
        return read(reader, of, *out)

    def watched_column(reader, name, first=0, last=None):
        columns.append(last - first)
        return column(reader, name, first, last)

    monkeypatch.setattr(PartReader, "read_spans", watched)
    monkeypatch.setattr(PartReader, "column", watched_column)
    monkeypatch.setattr("scjax.loader.pipeline.READ_AHEAD", 0)
    loader = Loader(corpus, 8, lanes=4, window=32, block=32, prefetch=0, weights=weights)
    costs = []
    for epoch, step in [(0, 20), (0, 80), (5, 100), (10**6, 20)]:
        spans.clear()
        columns.clear()
        take(loader, 1, loader.state(epoch, step))
        costs.append((sum(spans), sum(columns)))
    # at most the windows of four lanes and those that come next; the rows of a window are in few blocks
    assert max(spans for spans, _ in costs) <= 8 * 4
    assert max(rows for _, rows in costs) <= 8 * 3 * 32 * 10
    assert max(rows for _, rows in costs) <= 3 * min(rows for _, rows in costs)


def test_epochs_of_some_cells_come_round_to_all(corpus):
    """epoch_cells without weights: over as many epochs as it takes, every cell about once."""
    n = sum(part.n_cells for part in corpus.split("train"))
    loader = Loader(corpus, 32, epoch_cells=n // 4, block=16, epochs=40, labels=())
    assert loader.order.weights.level == "block" and loader.over_read < 2
    rows = np.concatenate([batch.row[batch.weight > 0] for batch in iter(loader)])
    times = np.bincount(rows)[
        np.concatenate([np.arange(p.first_row, p.first_row + p.n_cells) for p in loader.parts])
    ]
    assert len(rows) == 40 * (n // 4)
    assert times.min() >= 7 and times.max() <= 13


# ---- arguments


@pytest.mark.parametrize(
    "saved, changed, message",
    [
        ({}, {"weights": {"dataset": 0.5}}, r"""weights was None and is '{"dataset": 0.5}'"""),
        ({"weights": {"dataset": 0.5}}, {}, r"""weights was '{"dataset": 0.5}' and is None"""),
        ({"weights": {"dataset": 0.5}}, {"weights": {"dataset": 0.4}}, "weights was"),
        (
            {"weights": {"donor": 0}},
            {"weights": {"donor": 0}, "epoch_cells": 900},
            "epoch_cells was .* and is 900",
        ),
        (
            {"weights": {"donor": 0}, "weight_level": "row"},
            {"weights": {"donor": 0}, "weight_level": "block"},
            "weight_level was 'row' and is 'block'",
        ),
    ],
)
def test_a_cursor_of_other_weights_is_refused(corpus, saved, changed, message):
    state = Loader(corpus, 64, **saved).state(0, 3)
    assert len(json.dumps(state)) < 600
    iterator = iter(Loader(corpus, 64, **changed))
    with pytest.raises(ValueError, match=f"saved with other settings.*{message}"):
        iterator.set_state(state)
    iterator.close()


def test_weights_that_read_much_for_little_are_warned_about(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("scjax.loader.loader._SMALL", 0)
    coarse = build(two_studies(), tmp_path / "c", labels=["donor"], inner=2**13, shard=2**13)
    few = {"donor": {coarse.columns["donor"][0]: 1}}
    n = int((coarse.obs["donor"].cat.codes == 0).sum())
    with pytest.warns(UserWarning, match=r'cells are decoded for each one .*; weight_level="block" draws wh'):
        loader = Loader(coarse, 64, lanes=4, block=256, weights=few, epoch_cells=n // 4, weight_level="row")
    assert loader.over_read > 8
    assert Loader(coarse, 64, lanes=4, block=256, weights={"donor": 0.5}).over_read < 2
    assert 1 <= Loader(corpus, 64, block=64).over_read < 3
    with pytest.raises(ValueError, match="weights is 0.5; it maps label columns to"):
        Loader(corpus, 64, weights=0.5)
    with pytest.raises(ValueError, match="weights of the column 'donor': 'x' is not a number"):
        Loader(corpus, 64, weights={"donor": {corpus.columns["donor"][0]: "x"}})
    with pytest.raises(KeyError, match=r"split 'train' of .*corpus has no label column 'tissue'"):
        Loader(corpus, 64, weights={"tissue": 1})


def test_too_many_processes_are_told_how_to_have_more_lanes(corpus):
    with pytest.raises(ValueError, match=r"process_count=128 does not divide lanes=64 .*; pass lanes=128$"):
        Loader(corpus, 1024, process_count=128)
    assert Loader(corpus, 1024, process_count=128, lanes=128).local_batch_size == 8
    with pytest.raises(ValueError, match=r"a batch_size that 48 divides could have them"):
        Loader(corpus, 1024, process_count=48)

"""The loader end to end on a corpus on disk: which cells, on which host, and where a cursor continues."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import assert_same, build, join, take, two_studies

from scjax.corpus.reader import PartReader
from scjax.genes import Vocabulary
from scjax.loader import Loader


@pytest.fixture(scope="module")
def studies():
    return two_studies()


@pytest.fixture(scope="module")
def corpus(studies, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    return build(studies, out, labels=["cell_type", "donor"], validation=0.15)


# ---- what is in a batch


@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_hold_the_cells_of_the_source(corpus, studies, split):
    assert len({part.x_dtype for part in corpus.parts}) == 2
    genes = {name: corpus.vocabulary.match(study.var).ids for name, study in studies.items()}
    counts = {name: study.X.toarray() for name, study in studies.items()}
    obs = corpus.read(slice(None)).obs
    seen = 0
    loader = Loader(corpus, 32, split=split, window=16, seed=4)
    for batch in take(loader, loader.steps_per_epoch):
        real = np.flatnonzero(batch.weight)
        origin = obs.iloc[batch.row[real]]
        origin = zip(real, origin["scjax_dataset"], origin["scjax_source_row"], strict=True)
        for i, name, source_row in origin:
            expected, found = np.zeros((2, len(corpus.vocabulary)))
            expected[genes[name]] = counts[name][source_row]
            n = batch.n_genes[i]
            found[batch.gene_id[i, :n]] = batch.count[i, :n]
            np.testing.assert_array_equal(found, expected)
            assert n == (expected > 0).sum() and (batch.gene_id[i, n:] == -1).all()
            assert not batch.count[i, n:].any() and batch.depth[i] == expected.sum()
            for column in ("cell_type", "donor"):
                label = studies[name].obs[column].iloc[source_row]
                assert corpus.columns[column][batch.label[column][i]] == label
            assert corpus.columns["dataset"][batch.label["dataset"][i]] == name
            seen += 1
    assert seen == sum(part.n_cells for part in corpus.split(split))


def test_filler_rows_are_empty(corpus):
    loader = Loader(corpus, 256, epochs=1)
    last = list(iter(loader))[-1]
    filler = last.weight == 0
    assert filler.sum() == -sum(part.n_cells for part in loader.parts) % 256
    assert (last.gene_id[filler] == -1).all() and not last.count[filler].any()
    for field in ("depth", "n_genes", "row"):
        assert not getattr(last, field)[filler].any()
    assert all((codes[filler] == -1).all() for codes in last.label.values())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_cell_comes_once_an_epoch(corpus, data):
    lanes = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    settings = {
        "batch_size": lanes * data.draw(st.integers(1, 8)),
        "lanes": lanes,
        "window": data.draw(st.integers(1, 200)),
        "block": data.draw(st.one_of(st.none(), st.integers(1, 100))),
        "seed": data.draw(st.integers(0, 9)),
        "group_lengths": data.draw(st.booleans()),
        "split": data.draw(st.sampled_from(["train", "validation"])),
        "labels": (),
        "prefetch": 0,
    }
    hosts = data.draw(st.sampled_from([h for h in (1, 2, 4) if lanes % h == 0]))
    rows = []
    for host in range(hosts):
        loader = Loader(corpus, process_index=host, process_count=hosts, epochs=1, **settings)
        batches = list(iter(loader))
        assert len(batches) == loader.steps_per_epoch
        rows += [batch.row[batch.weight > 0] for batch in batches]
    rows = np.sort(np.concatenate(rows))
    first = corpus.split(settings["split"])[0].first_row
    np.testing.assert_array_equal(rows, np.arange(first, first + len(rows)))
    assert len(rows) == sum(part.n_cells for part in corpus.split(settings["split"]))


@pytest.mark.parametrize("group_lengths", [False, True])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(corpus, group_lengths):
    options = {"lanes": 16, "window": 24, "group_lengths": group_lengths, "max_genes": 200, "seed": 3}
    alone = Loader(corpus, 48, **options)
    n = alone.steps_per_epoch + 3  # over the end of the epoch
    expected = take(alone, n)
    assert {batch.shape[1] for batch in expected} <= set(alone.bucket_lengths)
    assert not group_lengths or len({batch.shape[1] for batch in expected}) > 1
    for hosts in (2, 4, 16):
        shares = [
            take(Loader(corpus, 48, process_index=h, process_count=hosts, **options), n) for h in range(hosts)
        ]
        for step in range(n):
            parts = [share[step] for share in shares]
            assert {part.shape for part in parts} == {(48 // hosts, expected[step].shape[1])}
            assert_same(join(parts), expected[step])


def test_no_host_reads_cells_of_another(corpus, monkeypatch):
    elements = []
    read = PartReader.read_spans

    def watched(reader, spans, *out):
        elements.append(sum(high - low for low, high in spans))
        return read(reader, spans, *out)

    monkeypatch.setattr(PartReader, "read_spans", watched)
    for host in range(4):
        list(iter(Loader(corpus, 64, process_index=host, process_count=4, epochs=1, window=8)))
    assert sum(elements) == sum(part.nnz for part in corpus.split("train"))


# ---- the cursor


@pytest.mark.parametrize("group_lengths", [False, True])
@pytest.mark.parametrize("hosts", [1, 2])
def test_seeking_is_iterating(corpus, group_lengths, hosts):
    options = {"window": 16, "lanes": 8, "group_lengths": group_lengths, "max_genes": 100, "seed": 1}
    loader = Loader(corpus, 40, **options)
    n = 2 * loader.steps_per_epoch + 5
    iterator, batches, states = iter(loader), [], []
    for _ in range(n):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    iterator.close()
    for start in (0, 1, 7, loader.steps_per_epoch - 1, loader.steps_per_epoch, n - 4):
        state = json.loads(json.dumps(states[start]))
        shares = [
            take(Loader(corpus, 40, process_index=h, process_count=hosts, **options), 4, state)
            for h in range(hosts)
        ]
        for ahead in range(4):
            assert_same(join([share[ahead] for share in shares]), batches[start + ahead])


def test_an_iterator_can_go_back(corpus):
    iterator = iter(Loader(corpus, 32, window=32))
    state = iterator.get_state()
    first = [next(iterator) for _ in range(5)]
    iterator.set_state(state)
    assert iterator.get_state() == state
    for batch in first:
        assert_same(next(iterator), batch)
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_the_state_is_that_of_the_batch_handed_out(corpus, prefetch):
    loader = Loader(corpus, 128, prefetch=prefetch)
    iterator = iter(loader)
    for n in range(2 * loader.steps_per_epoch):
        state = iterator.get_state()
        assert (state["epoch"], state["step"]) == divmod(n, loader.steps_per_epoch)
        next(iterator)
    iterator.close()
    assert len(json.dumps(state)) < 500


def test_a_seek_reads_one_window_per_lane_wherever_it_goes(corpus, monkeypatch):
    rows = []
    span = PartReader.row_span

    def watched(reader, first, last):
        rows.append(last - first)
        return span(reader, first, last)

    monkeypatch.setattr(PartReader, "row_span", watched)
    monkeypatch.setattr("scjax.loader.pipeline.READ_AHEAD", 0)
    loader = Loader(corpus, 8, lanes=4, window=32, prefetch=0)
    state, costs = iter(loader).get_state(), []
    for epoch, step in [(0, 20), (0, 80), (5, 100), (1000, 20)]:
        rows.clear()
        take(loader, 1, state | {"epoch": epoch, "step": step})
        costs.append(sum(rows))
    # four lanes; and, unless it was closed before that began, the window that comes next
    assert set(costs) <= {4 * 32, 5 * 32}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 128}, "batch_size was 64 and is 128"),
        ({"lanes": 32}, "lanes was 64 and is 32"),
        ({"window": 8}, "window was 16 and is 8"),
        ({"block": 8}, "block was 16 and is 8"),
        ({"split": "validation"}, "split was 'train' and is 'validation'"),
        ({"group_lengths": True}, "group_lengths was False and is True"),
        ({"max_genes": 50}, "max_genes was None and is 50"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"n_buckets": 1}, r"bucket_lengths was \[.*\] and is \[\d+\]"),
    ],
)
def test_a_cursor_of_other_settings_is_refused(corpus, changed, message):
    state = iter(Loader(corpus, 64)).get_state()
    iterator = iter(Loader(corpus, **{"batch_size": 64} | changed))
    with pytest.raises(ValueError, match=f"saved with other settings.*{message}"):
        iterator.set_state(state)
    assert iterator.get_state()["step"] == 0
    next(iterator)  # and it still works
    iterator.close()


def test_a_cursor_of_another_corpus_or_of_nothing_is_refused(corpus, studies, tmp_path):
    other = build({"first": studies["first"]}, tmp_path / "c", labels=[])
    state = iter(Loader(other, 64)).get_state()
    iterator = iter(Loader(corpus, 64))
    with pytest.raises(ValueError, match=f"manifest was '{other.manifest_id}' and is '{corpus.manifest_id}'"):
        iterator.set_state(state)
    own = iterator.get_state()
    for bad, message in [
        ({"next_index": 40}, "not a data cursor of this version"),
        (own | {"format": "scjax-loader-9"}, "not a data cursor of this version"),
        (own | {"step": 10_000}, "step 10000 of an epoch of"),
        (own | {"epoch": -1}, "epoch -1 and step 0"),
        (own | {"step": None}, "step None"),
    ]:
        with pytest.raises(ValueError, match=message):
            iterator.set_state(bad)


def test_grain_checkpoints_through_orbax(corpus, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    iterator = iter(Loader(corpus, 64, window=16))
    for _ in range(4):
        next(iterator)
    params = {"w": np.arange(3.0)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(
            4,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), data=grain.checkpoint.CheckpointSave(iterator)
            ),
        )
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(3)]
        restored = iter(Loader(corpus, 64, window=16))
        manager.restore(
            4,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params), data=grain.checkpoint.CheckpointRestore(restored)
            ),
        )
    for batch in expected:
        assert_same(next(restored), batch)
    iterator.close()
    restored.close()


# ---- arguments


def test_labels_can_be_chosen(corpus):
    assert set(take(Loader(corpus, 32), 1)[0].label) == {"dataset", "cell_type", "donor"}
    assert take(Loader(corpus, 32, labels=()), 1)[0].label == {}
    assert list(take(Loader(corpus, 32, labels=["donor"]), 1)[0].label) == ["donor"]
    with pytest.raises(KeyError, match=r"no label column 'tissue'.*'dataset'"):
        Loader(corpus, 32, labels=["tissue"])


def test_genes_of_another_vocabulary(corpus):
    ids = corpus.vocabulary.ids
    other = Vocabulary([ids[5], "ENSG99999999999", *ids[100:200]])
    new_id = {ids.index(gene): i for i, gene in enumerate(other.ids) if gene in ids}
    plain, mapped = Loader(corpus, 32), Loader(corpus, 32, vocabulary=other)
    for a, b in zip(take(plain, 3), take(mapped, 3), strict=True):
        np.testing.assert_array_equal(a.row, b.row)
        np.testing.assert_array_equal(a.depth, b.depth)
        for i in range(32):
            slots = [k for k in range(a.n_genes[i]) if int(a.gene_id[i, k]) in new_id]
            n = b.n_genes[i]
            assert b.gene_id[i, :n].tolist() == [new_id[int(a.gene_id[i, k])] for k in slots]
            assert b.count[i, :n].tolist() == a.count[i, slots].tolist()
    with pytest.raises(ValueError, match="vocabulary was .* and is"):
        iter(mapped).set_state(iter(plain).get_state())
    with pytest.raises(ValueError, match="0 of the 1 genes asked for"):
        Loader(corpus, 32, vocabulary=Vocabulary(["ENSG99999999999"]))


def test_a_gene_list_may_hold_symbols_and_must_mostly_match(corpus):
    symbols = corpus.vocabulary.symbols[10:40]
    ids = corpus.vocabulary.ids[10:40]
    by_symbol, by_id = (take(Loader(corpus, 32, vocabulary=Vocabulary(names)), 2) for names in (symbols, ids))
    for a, b in zip(by_symbol, by_id, strict=True):
        np.testing.assert_array_equal(a.gene_id, b.gene_id)
    with pytest.raises(ValueError, match="1 of the 10 genes asked for"):
        Loader(corpus, 32, vocabulary=Vocabulary([ids[0], *(f"ENSG8{i:010d}" for i in range(9))]))


@pytest.mark.parametrize("group_lengths", [False, True])
def test_a_small_vocabulary_makes_narrow_batches(corpus, monkeypatch, group_lengths):
    """Widths follow the genes that are kept, alike on all hosts; uncounted, a bound takes their place."""
    few = Vocabulary(corpus.vocabulary.ids[::9])
    options = {"vocabulary": few, "group_lengths": group_lengths, "n_buckets": 8}
    loader = Loader(corpus, 32, **options)
    whole = take(loader, loader.steps_per_epoch)
    assert max(loader.bucket_lengths) < min(Loader(corpus, 32).bucket_lengths)
    kept = [(corpus.read(batch.row).X[:, ::9] > 0).sum(1) for batch in whole]
    for batch, n in zip(whole, kept, strict=True):
        used = batch.weight > 0
        np.testing.assert_array_equal(batch.n_genes[used], np.asarray(n).ravel()[used])
        assert batch.shape[1] == min(
            length for length in loader.bucket_lengths if length >= batch.n_genes.max()
        )
    halves = [take(Loader(corpus, 32, **options, process_index=i, process_count=2), 5) for i in range(2)]
    for batch, first, second in zip(whole, *halves, strict=False):
        np.testing.assert_array_equal(batch.gene_id, np.concatenate([first.gene_id, second.gene_id]))
    monkeypatch.setattr("scjax.loader.genes.COUNTED", 0)
    uncounted = Loader(corpus, 32, vocabulary=few)
    nnz = uncounted.parts[0].column("nnz", 5, 95)
    np.testing.assert_array_equal(uncounted.genes_of(0, 5, 95, nnz), np.minimum(nnz, len(few)))
    bounded = take(uncounted, 3)
    for a, b in zip(bounded, take(Loader(corpus, 32, vocabulary=few, n_buckets=1), 3), strict=True):
        np.testing.assert_array_equal(a.row, b.row)
        np.testing.assert_array_equal(a.n_genes, b.n_genes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"process_count": 3}, "process_count=3 does not divide lanes=64"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not one of 2"),
        ({"lanes": 5}, "lanes=5 does not divide batch_size=64"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_genes": 0}, "max_genes must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"n_buckets": 0}, "n_buckets must be at least 1"),
        ({"split": "test"}, "'test'"),
    ],
)
def test_bad_arguments(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(corpus, **{"batch_size": 64} | options)


def test_a_split_without_cells(studies, tmp_path):
    whole = build({"first": studies["first"]}, tmp_path / "c", labels=[])
    with pytest.raises(ValueError, match="no cells in split 'validation'"):
        Loader(whole, 64, split="validation")


def test_epochs_end(corpus):
    loader = Loader(corpus, 256, epochs=2)
    iterator = iter(loader)
    assert len(list(iterator)) == 2 * loader.steps_per_epoch
    with pytest.raises(StopIteration):
        next(iterator)
    again = iter(loader)
    again.set_state(iterator.get_state())
    with pytest.raises(StopIteration):
        next(again)

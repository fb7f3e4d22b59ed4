"""Several corpora as one."""

import json

import anndata as ad
import numpy as np
import pytest
from loading import assert_same, build, join, study, take

import scjax.corpus
from scjax.corpus import Corpus, Mixture, open_corpus
from scjax.genes import Vocabulary
from scjax.loader import Loader


def half(adata: ad.AnnData, genes: slice) -> ad.AnnData:
    """Some of the genes, and the cells that express one of them."""
    adata = adata[:, genes]
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three corpora: two vocabularies that overlap, labels that the third lacks, data sets named alike."""
    root = tmp_path_factory.mktemp("members")
    a, b, c = study(500, 0), half(study(300, 1), slice(100, 300)), half(study(200, 2), slice(0, 250))
    b.obs["cell_type"] = b.obs["cell_type"].cat.rename_categories(lambda name: f"{name}, b")
    b.obs["cell_type"] = b.obs["cell_type"].astype(str).where(np.arange(len(b)) % 3 > 0, "type0")
    return {
        "a": build({"x": a, "y": study(150, 3)}, root / "a", labels=["cell_type", "donor"], validation=0.2),
        "b": build({"x": b}, root / "b", labels=["cell_type", "donor"], validation=0.2),
        "c": build({"z": c}, root / "c", labels=["donor"]),
    }


@pytest.fixture(scope="module")
def mixture(members):
    return Mixture(members)


def test_a_mixture_has_the_cells_labels_and_genes_of_all(mixture, members):
    assert len(mixture) == sum(map(len, members.values()))
    assert mixture.datasets == mixture.columns["dataset"] == ["a/x", "y", "b/x", "z"]
    assert mixture.columns["corpus"] == ["a", "b", "c"]
    assert set(mixture.vocabulary.ids) == set(members["a"].vocabulary.ids) >= set(members["b"].vocabulary.ids)
    obs, start = mixture.obs, 0
    for name, corpus in members.items():
        mine, there = obs.iloc[start : start + len(corpus)], corpus.obs
        assert (mine["corpus"] == name).all()
        for column in there:
            if column != "dataset":
                assert mine[column].astype(object).tolist() == there[column].astype(object).tolist()
        assert [d.removeprefix(f"{name}/") for d in mine["dataset"]] == there["dataset"].tolist()
        start += len(corpus)
    assert obs["cell_type"].iloc[-1:].isna().all()  # c has no cell types
    rows = [p.first_row for p in mixture.parts]
    assert rows == np.concatenate([[0], np.cumsum([p.n_cells for p in mixture.parts])])[:-1].tolist()


def test_reading_gives_the_cells_of_the_members_in_the_order_asked_for(mixture, members):
    rows = np.random.default_rng(0).permutation(len(mixture))[:120]
    found = mixture.read(rows)
    starts = np.cumsum([0, *map(len, members.values())])
    for i, row in enumerate(rows):
        k = int(np.searchsorted(starts, row, side="right")) - 1
        name = list(members)[k]
        there = members[name].read([row - starts[k]])
        expected = there.to_df().iloc[0]
        got = found.to_df().iloc[i]
        assert (got[expected.index] == expected).all() and got.sum() == expected.sum()
        assert found.obs["corpus"].iloc[i] == name
    assert mixture.read([]).shape == (0, len(mixture.vocabulary))
    assert mixture.read(np.arange(len(mixture)) < 3).n_obs == 3
    for bad, message in [([len(mixture)], "row 1"), (np.ones(3, bool), "a mask of 3 over a mixture")]:
        with pytest.raises(IndexError, match=message):
            mixture.read(bad)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("own", [False, True])
def test_batches_hold_the_cells_of_all_members(mixture, split, own):
    """Genes by the vocabulary of the mixture, or one that is asked for; labels by the mixture's columns."""
    vocabulary = Vocabulary(mixture.vocabulary.ids[40:280][::-1]) if own else mixture.vocabulary
    loader = Loader(mixture, 32, split=split, window=16, vocabulary=vocabulary if own else None, epochs=1)
    assert len(loader.luts) == len({part.vocabulary.hash for part in mixture.split(split)}) > 1
    obs, seen = mixture.obs, []
    for batch in iter(loader):
        real = np.flatnonzero(batch.weight)
        counts = mixture.read(batch.row[real]).to_df()
        for i, (_, cell) in zip(real, counts.iterrows(), strict=True):
            cell = cell[cell > 0]
            cell = cell[[gene in vocabulary for gene in cell.index]]
            n = batch.n_genes[i]
            got = dict(
                zip([vocabulary.ids[g] for g in batch.gene_id[i, :n]], batch.count[i, :n], strict=True)
            )
            assert got == cell.to_dict()
        for column, codes in batch.label.items():
            expected = obs[column].iloc[batch.row[real]].cat.codes.to_numpy()
            np.testing.assert_array_equal(codes[real], expected)
        seen.append(batch.row[real])
    assert set(batch.label) == {"corpus", "dataset", "cell_type", "donor"}
    rows = [np.arange(p.first_row, p.first_row + p.n_cells) for p in mixture.split(split)]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.concatenate(rows))


def test_shares_are_those_of_training_and_of_the_cursor(members):
    mixture = Mixture(members, shares={"b": 3, "a": 1})
    loader = Loader(mixture, 32, epochs=4, labels=["corpus"])
    codes = np.concatenate([batch.label["corpus"][batch.weight > 0] for batch in iter(loader)])
    share = np.bincount(codes, minlength=3) / len(codes)
    np.testing.assert_allclose(share, [0.25, 0.75, 0], atol=0.03)
    held_out = Loader(mixture, 32, split="validation", epochs=1, labels=())
    assert held_out.order.weights is None
    state = loader.state(1, 3)
    assert json.loads(json.dumps(state)) == state
    with pytest.raises(ValueError, match="manifest was .* and is .*weights was"):
        Loader(Mixture(members, shares={"b": 2, "a": 1}), 32, labels=()).position(state)
    with pytest.raises(ValueError, match="'corpus' are given twice"):
        Loader(mixture, 32, weights={"corpus": 0})
    both = Loader(mixture, 32, weights={"dataset": 0})
    assert set(both._weights) == {"corpus", "dataset"}


def test_every_batch_is_a_mixture(mixture):
    """Corpora lie one after the other, yet come in their proportions all the time."""
    loader = Loader(mixture, 64, labels=["corpus"])
    size = np.bincount(np.concatenate([p.codes("corpus") for p in mixture.split("train")]))
    for batch in take(loader, loader.steps_per_epoch - 1):
        share = np.bincount(batch.label["corpus"], minlength=3)
        np.testing.assert_allclose(share, 64 * size / size.sum(), atol=6)


def test_a_mixture_on_several_hosts_and_from_a_cursor(mixture):
    options = {
        "window": 16,
        "lanes": 8,
        "max_genes": 60,
        "weights": {"corpus": 0.3, "dataset": 0.5},
        "seed": 2,
    }
    alone = take(Loader(mixture, 40, **options), 12)
    shares = [Loader(mixture, 40, **options, process_index=h, process_count=4) for h in range(4)]
    state = Loader(mixture, 40, **options).state(0, 5)
    shares = [take(loader, 7, state) for loader in shares]
    for step in range(7):
        assert_same(join([share[step] for share in shares]), alone[5 + step])


def test_the_id_depends_on_members_shares_and_genes(members):
    ids = {
        Mixture(members).manifest_id,
        Mixture(members, {"a": 1, "b": 1}).manifest_id,
        Mixture(members, {"a": 1, "b": 2}).manifest_id,
        Mixture({"a": members["a"], "b": members["b"]}).manifest_id,
        Mixture({"b": members["b"], "a": members["a"]}).manifest_id,
        Mixture({"one": members["a"], "b": members["b"]}).manifest_id,
        Mixture(members, vocabulary=Vocabulary(members["a"].vocabulary.ids[:200])).manifest_id,
    }
    assert len(ids) == 7
    assert Mixture(members).manifest_id == Mixture(dict(members)).manifest_id


def test_measured_genes_and_statistics(mixture, members):
    table, names = mixture.measured_table(), mixture.vocabulary.ids
    assert table.shape == (4, len(names))
    there = members["b"].measured("x")
    ids = np.array(members["b"].vocabulary.ids)[there]
    assert {names[i] for i in np.flatnonzero(table[2])} == set(ids)
    np.testing.assert_array_equal(mixture.measured("b/x"), table[2])
    with pytest.raises(KeyError, match=r"no data set 'x'; there are: a/x, y, b/x, z"):
        mixture.measured("x")
    with pytest.raises(IndexError, match="there are 4"):
        mixture.measured(4)

    found = mixture.statistics(progress=False)
    train = np.concatenate([np.arange(p.first_row, p.first_row + p.n_cells) for p in mixture.split("train")])
    cells = mixture.read(train)
    depth = np.concatenate([part.total for part in mixture.split("train")])
    x = cells.X.toarray() * (1e4 / depth)[:, None]
    np.testing.assert_array_equal(found.n_detected, (x > 0).sum(0))
    np.testing.assert_allclose(found.mean, x.sum(0) / found.n_cells, rtol=1e-5)
    true = np.array([np.median(column[column > 0]) for column in x.T])
    assert np.corrcoef(np.log(found.median), np.log(true))[0, 1] > 0.98
    alone = Mixture({"a": members["a"]}).statistics(progress=False).median
    np.testing.assert_allclose(alone, members["a"].statistics(progress=False).median, rtol=1e-12)


def test_opening_one_or_several(members, tmp_path):
    a, b = members["a"], members["b"]
    assert isinstance(open_corpus(a.path), Corpus)
    assert open_corpus(f"{a.path}@{a.manifest_id}").manifest_id == a.manifest_id
    with pytest.raises(FileNotFoundError, match="no manifest 'abcdef'"):
        open_corpus(f"{a.path}@abcdef")
    odd = tmp_path / "corpus@home"
    odd.symlink_to(a.path)
    assert len(open_corpus(odd)) == len(a)
    both = open_corpus([a.path, f"{b.path}@{b.manifest_id}"], shares={"a": 1, "b": 1})
    assert list(both.members) == ["a", "b"] and both.shares == {"a": 1.0, "b": 1.0}
    assert str(a.path) in both.path and str(b.path) in both.path
    with pytest.raises(ValueError, match="shares and a vocabulary are for several corpora"):
        open_corpus(a.path, shares={"a": 1})
    assert scjax.corpus.Mixture is Mixture


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda m: Mixture([]), ValueError, "a mixture of no corpora"),
        (lambda m: Mixture([m["a"], m["a"]]), ValueError, "is in the mixture twice"),
        (
            lambda m: Mixture(m, {"d": 1}),
            KeyError,
            r"no corpus 'd' in the mixture; there are \['a', 'b', 'c'\]",
        ),
        (lambda m: Mixture(m, {"a": -1}), ValueError, "shares: 'a' has -1"),
        (lambda m: Mixture(m, {"a": 0}), ValueError, "all are 0"),
        (lambda m: Mixture(m).split("test"), ValueError, "there are train and validation"),
        (
            lambda m: Mixture(m).parts[0].codes("tissue"),
            KeyError,
            "no label column 'tissue'; there are: cell_type",
        ),
        (
            lambda m: Loader(Mixture(m), 32, vocabulary=Vocabulary(["nothing"])),
            ValueError,
            "0 of the 1 genes",
        ),
    ],
)
def test_mixtures_that_cannot_be(members, make, error, message):
    with pytest.raises(error, match=message):
        make(members)


def test_members_of_one_folder_name_are_told_apart(members, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus").symlink_to(members["a" if name == "one" else "b"].path)
    mixture = open_corpus([tmp_path / "one" / "corpus", tmp_path / "two" / "corpus"])
    assert list(mixture.members) == ["one/corpus", "two/corpus"]


def test_a_label_called_corpus_is_in_the_way(tmp_path):
    cells = study(100, 0)
    cells.obs["corpus"] = "mine"
    corpus = build({"x": cells}, tmp_path / "c", labels=["corpus"])
    with pytest.raises(ValueError, match=r"has a label column 'corpus'; in a mixture"):
        Mixture([corpus])

"""Probes during training: they order planted embeddings, leave the run as it is, and are written down."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import runs
from synthetic import synthetic_adata

import scjax
from scjax.train import effective_rank, masked_gap, read_labels, read_model

CONFIG, PROBED = "tests/tiny_config.py", "tests/probed_config.py"


# ----------------------------------------------------------------- by hand
@pytest.fixture(scope="module")
def cells():
    """(label, donor, rng) of 400 cells of 4 types and 6 donors."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 4, 400), rng.integers(0, 6, 400), rng


def test_reading_labels_orders_embeddings(cells):
    label, donor, rng = cells
    truth = np.eye(4)[label]
    near = (truth + 0.3 * rng.normal(size=truth.shape)).astype(np.float32)
    far = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    noise = rng.normal(size=truth.shape).astype(np.float32)
    for probe in ("probe/logistic_macro_f1", "probe/knn_macro_f1"):
        good, fair, chance = (read_labels(X, label, donor)[probe] for X in (near, far, noise))
        assert good > 0.9 > fair > 0.4 > 0.35 > chance


def test_donors_are_not_on_both_sides(cells):
    """A label of donors that carries no signal: cells of the same donor give it away, others do not."""
    _, donor, rng = cells
    label = np.array([0, 1, 0, 1, 1, 0])[donor]
    X = (np.eye(6)[donor] + 0.1 * rng.normal(size=(400, 6))).astype(np.float32)
    name = "probe/logistic_macro_f1"
    assert read_labels(X, label, None)[name] > 0.95
    assert read_labels(X, label, donor)[name] < 0.65


def test_labels_that_cannot_be_read(cells):
    label, donor, rng = cells
    X = rng.normal(size=(400, 3)).astype(np.float32)
    assert read_labels(X, np.full(400, -1), donor) == {}
    assert read_labels(X, np.zeros(400, int), donor) == {}
    assert read_labels(X, (donor > 2).astype(int), (donor > 2).astype(int)) == {}  # confounded
    rare = np.where(np.arange(400) < 9, 7, label)  # nine cells of a label are too few
    assert read_labels(X, rare, donor) == read_labels(X[9:], label[9:], donor[9:])
    assert read_labels(X, label, np.zeros(400, int)) == read_labels(X, label, None)  # one group: over cells


def test_effective_rank():
    rng = np.random.default_rng(1)
    assert effective_rank(np.eye(8)) == pytest.approx(8)
    assert effective_rank(np.ones((100, 8)) + 1e-6 * rng.normal(size=(100, 8))) < 1.01
    one_of_two = np.zeros((4, 2))
    one_of_two[:, 0] = 3
    assert effective_rank(one_of_two) == pytest.approx(1)
    values = np.diag([2.0, 1.0, 1.0])  # shares 1/2, 1/4, 1/4: entropy 1.5 ln 2
    assert effective_rank(values) == pytest.approx(2**1.5)


def test_masked_gap():
    assert masked_gap({"validation/masked_mse": 0.2, "validation/gene_mean_mse": 0.5}) == {
        "validation/masked_gap": pytest.approx(0.3)
    }
    assert (
        masked_gap({"validation/masked_ce": 5.0, "validation/frequency_ce": 4.0})["validation/masked_gap"]
        == -1
    )
    assert masked_gap({"validation/loss": 1.0}) == {}


# ----------------------------------------------------------------- in a run
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of 160 training and 140 validation cells of four donors."""
    directory = tmp_path_factory.mktemp("probe")
    adata = synthetic_adata(300, 48)
    labels = ["cell_type", "donor"]
    out = directory / "corpus"
    scjax.build_corpus([adata], out, names=["s"], labels=labels, validation=0.45, progress=False)
    return directory


def options(place, **more):
    return {"cache": place / "cache", "data__corpus": place / "corpus", **more}


@pytest.fixture(scope="module")
def probed(place):
    output = runs.pretrain(PROBED, place / "probed", **options(place))
    assert "probe: cell_type of up to 2,000 validation cells, folds over donor" in output
    return place / "probed"


def probes(workdir):
    return [line for line in runs.metrics(workdir) if any(name.startswith("probe/") for name in line)]


def test_a_run_writes_its_probes(probed):
    lines = probes(probed)
    assert [line["step"] for line in lines] == [0, 8, 16]
    names = {"step", "probe/logistic_macro_f1", "probe/knn_macro_f1", "probe/effective_rank"}
    for line in lines:
        assert set(line) == names and 1 <= line["probe/effective_rank"] <= 16
        assert 0 < line["probe/knn_macro_f1"] <= 1
    validated = [line for line in runs.metrics(probed) if "validation/masked_mse" in line]
    assert [line["step"] for line in validated] == [8, 16]
    for line in validated:
        gap = line["validation/gene_mean_mse"] - line["validation/masked_mse"]
        assert line["validation/masked_gap"] == pytest.approx(gap)


def test_probes_do_not_change_the_run(place, probed):
    plain = place / "plain"
    runs.pretrain(CONFIG, plain, **options(place))
    assert not probes(plain)
    assert [line for line in runs.metrics(probed) if line not in probes(probed)] == runs.metrics(plain)
    a, b = read_model(plain), read_model(probed)
    jax.tree.map(np.testing.assert_array_equal, a["params"], b["params"])
    jax.tree.map(np.testing.assert_array_equal, a["buffers"], b["buffers"])


def test_probes_are_those_of_the_saved_model(place, probed):
    """The last line, computed again from the checkpoint through ``scjax.load``."""
    from scjax.corpus import Corpus

    corpus = Corpus.open(place / "corpus")
    first = corpus.split("validation")[0].first_row
    adata = corpus.read(slice(first, len(corpus)))
    vectors = scjax.load(probed).embed(adata)
    again = read_labels(
        vectors, adata.obs["cell_type"].cat.codes.to_numpy(), adata.obs["donor"].cat.codes.to_numpy()
    )
    last = probes(probed)[-1]
    assert last["probe/effective_rank"] == pytest.approx(effective_rank(vectors), rel=1e-3)
    for name, value in again.items():
        assert last[name] == pytest.approx(value, abs=0.03)


def test_two_processes_give_the_probes_of_one(place, probed):
    workdir, port = place / "two", runs.free_port()
    both = [runs.start(PROBED, workdir, devices=2, process=(i, 2, port), **options(place)) for i in range(2)]
    runs.finish(*both, workdir=workdir)
    mine, theirs = probes(workdir), probes(probed)
    assert [line["step"] for line in mine] == [0, 8, 16]
    for a, b in zip(mine, theirs, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=0.05, rel=1e-2), name


def test_what_cannot_be_probed_is_said(place, tmp_path):
    for more, told in (
        ({"train__probe_every": 0}, "train.probe_every is 0; it must be at least 1"),
        (
            {"validation__probe_group": "clinic"},
            "validation.probe_group is 'clinic'; the corpus has",
        ),
    ):
        workdir = tmp_path / told[6:12]
        assert told in runs.pretrain(PROBED, workdir, succeed=False, **options(place, **more))
    scjax.build_corpus([synthetic_adata(60, 48)], tmp_path / "none", names=["s"], progress=False)
    more = {**options(place), "data__corpus": tmp_path / "none"}
    output = runs.pretrain(PROBED, tmp_path / "without", succeed=False, **more)
    assert "train.probe_every needs validation cells" in output

"""Diagnostics without labels, masked values against means of genes, and whether a cell stands for itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import synthetic_adata
from test_models import TINY

from scjax import api, models
from scjax.eval import diagnostics, invariance, masked_error
from scjax.eval.baselines import Expression
from scjax.eval.diagnostics import depth_pcr, diagnose, effective_rank, uniformity
from scjax.eval.invariance import ALONE, project
from scjax.eval.masked import BASELINES
from scjax.genes import Vocabulary
from scjax.nn import initialise


def value(results, model, metric, **where):
    rows = [r for r in results.rows if r["model_id"] == model and r["metric"] == metric and not r["versus"]]
    rows = [r for r in rows if all(r[k] == v for k, v in where.items())]
    assert len(rows) == 1, rows
    return rows[0]["value"]


def levels(results):
    return {gate.level for gate in results.gates()}


# ------------------------------------------------------------ diagnostics
def test_effective_rank_by_hand():
    assert effective_rank(np.eye(6)) == pytest.approx(6)
    assert effective_rank(np.diag([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)  # entropy of 1/2, 1/4, 1/4
    X = np.random.default_rng(0).normal(size=(40, 7))
    assert effective_rank(X) == pytest.approx(effective_rank(X.T)) == pytest.approx(effective_rank(5 * X))
    assert effective_rank(np.ones((50, 9)) + 1e-7) == pytest.approx(1)


def test_uniformity_by_hand():
    pair = np.array([[1.0, 0.0], [0.0, 3.0]])  # at a distance of √2 on the circle
    assert uniformity(pair) == pytest.approx(-4)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0)
    X = np.random.default_rng(0).normal(size=(300, 5))
    Z = X / np.linalg.norm(X, axis=1, keepdims=True)
    d = ((Z[:, None] - Z) ** 2).sum(-1)[~np.eye(300, dtype=bool)]
    assert uniformity(X) == pytest.approx(np.log(np.exp(-2 * d).mean()))


def test_depth_pcr_is_the_regression_on_all_components():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(0)
    depth = rng.normal(size=200)
    X = np.outer(depth, [1.0, 0.5, 0, 0, 0]) + rng.normal(size=(200, 5))
    pca = PCA().fit(X)
    Z, share = pca.transform(X), pca.explained_variance_ratio_
    d = depth[:, None]
    r2 = [LinearRegression().fit(d, Z[:, j]).score(d, Z[:, j]) for j in range(5)]
    assert depth_pcr(X, depth) == pytest.approx(share @ r2, abs=1e-9)
    assert 0.2 < depth_pcr(X, depth) < 0.5 and depth_pcr(X, rng.normal(size=200)) < 0.05


@pytest.fixture(scope="module")
def cells():
    adata = synthetic_adata(300, 120)
    rng = np.random.default_rng(1)
    adata.obsm["X_good"] = project(adata, 16).astype(np.float32)
    depth = np.log(np.asarray(adata.X.sum(1)))
    adata.obsm["X_deep"] = (depth * rng.normal(size=(1, 16)) + 0.05 * rng.normal(size=(300, 16))).astype("f4")
    adata.obsm["X_flat"] = (1 + 1e-4 * rng.normal(size=(300, 16))).astype(np.float32)
    adata.obsm["X_random"] = rng.normal(size=(300, 16)).astype(np.float32)
    return adata


def test_diagnostics_order_planted_representations(cells):
    found = diagnostics(
        cells,
        ["X_good", "X_deep", "X_flat"],
        group_key="donor",
        controls={"random_init": "X_random"},
        n_boot=50,
    )
    rank = {
        m: value(found, m, "effective_rank") for m in ("noise", "X_good", "X_deep", "X_flat", "collapsed")
    }
    assert 14 < rank["noise"] <= 16 and rank["noise"] > rank["X_good"] > 3 > rank["X_deep"]
    assert 1 <= rank["X_flat"] < rank["collapsed"] < 1.2  # a collapsed model is below the control for it
    r2 = {m: value(found, m, "depth_r2") for m in ("depth_only", "X_deep", "X_good", "noise")}
    assert r2["depth_only"] > 0.99 and r2["X_deep"] > 0.9 > r2["X_good"] > r2["noise"] and r2["noise"] < 0.1
    assert value(found, "X_deep", "depth_pcr") > 0.9 > value(found, "X_good", "depth_pcr")
    failed = [g.message for g in found.gates() if g.level == "fail"]
    assert len(failed) == 1 and "X_flat" in failed[0] and "not better than collapsed" in failed[0]
    assert not [r for r in found.rows if r["versus"]]  # a rank is nothing to be ahead in
    (row,) = [r for r in found.rows if r["model_id"] == "X_deep" and r["metric"] == "depth_r2"]
    assert (
        row["ci_low"] < row["value"] < row["ci_high"] and row["split_scheme"] == "each group held out in turn"
    )


def test_depth_is_not_read_across_donors():
    """Depth that differs between donors only: known donors give it away, others do not."""
    rng = np.random.default_rng(0)
    donor = rng.integers(0, 12, 360)
    depth = np.exp(8 + rng.normal(size=12)[donor] + 0.05 * rng.normal(size=360))
    X = np.eye(12)[donor] + 0.05 * rng.normal(size=(360, 12))
    leaky, honest = (diagnose(X, depth, groups, n_boot=20) for groups in (None, donor))
    assert value(leaky, "embedding", "depth_r2") > 0.9 > 0.2 > value(honest, "embedding", "depth_r2")
    (row,) = [r for r in honest.rows if r["metric"] == "depth_r2"]
    assert row["ci_method"] == "percentile bootstrap over groups" and row["n_groups"] == 12


def test_diagnostics_refuse_what_is_broken(cells):
    X = np.random.default_rng(0).normal(size=(50, 4))
    with pytest.raises(ValueError, match="hold NaN"):
        diagnose(np.where(np.arange(50)[:, None] == 3, np.nan, X))
    with pytest.raises(ValueError, match="is constant"):
        diagnose(np.ones((50, 4)))
    with pytest.raises(ValueError, match="at least 10"):
        diagnose(X[:9])
    with pytest.raises(ValueError, match="1 values that are not positive"):
        diagnose(X, np.arange(50.0))
    with pytest.raises(ValueError, match="only one group"):
        diagnose(X, np.ones(50) + np.arange(50), np.full(50, "a"))
    with pytest.raises(KeyError, match="obsm has no 'X_other'"):
        diagnostics(cells, ["X_other"])


def test_without_counts_the_depth_is_skipped(cells):
    normalised = cells.copy()
    normalised.X.data = normalised.X.data / 3
    found = diagnostics(normalised, "X_good", n_boot=0)
    skipped = {r["metric"] for r in found.rows if r["model_id"] == "X_good" and r["status"] == "skipped"}
    assert skipped == {"depth_r2"} and value(found, "X_good", "effective_rank") > 1


# ----------------------------------------------------------------- masked
@pytest.fixture(scope="module")
def masked():
    """(truth, mask, predictions): log expression, 20 % hidden."""
    adata = synthetic_adata(300, 60)
    truth = Expression(adata.X, list(adata.var_names)).log.toarray()
    rng = np.random.default_rng(0)
    label = adata.obs["cell_type"].cat.codes.to_numpy()
    typed = np.stack([truth[label == k].mean(0) for k in range(4)])[label]
    return truth, rng.random(truth.shape) < 0.2, typed, rng.normal(truth.mean(), truth.std(), truth.shape)


def test_masked_values_are_ordered(masked):
    truth, mask, typed, noise = masked
    found = masked_error(truth, {"good": typed, "noise": noise}, mask, twins={"good": "noise"}, n_boot=100)
    gain = {
        m: value(found, m, "masked_gain")
        for m in ("oracle", "good", *BASELINES, "global_mean", "shuffled", "noise")
    }
    assert gain["oracle"] > 0.99 > gain["good"] > max(gain[b] for b in BASELINES) + 0.1
    assert gain["gene_mean"] == 0 and abs(gain["gene_mean_x_size"]) < 0.05
    assert max(gain["global_mean"], gain["shuffled"], gain["noise"]) < -0.2
    rho = {m: value(found, m, "feature_spearman") for m in ("oracle", "good", "gene_mean", "noise")}
    assert rho["oracle"] > 0.95 > rho["good"] > 0.2 > abs(rho["noise"]) and rho["gene_mean"] == 0
    assert levels(found) <= {"pass", "note"}
    differences = {r["versus"]: r for r in found.rows if r["versus"] and r["metric"] == "masked_gain"}
    assert set(differences) == {max(BASELINES, key=lambda b: gain[b]), "noise"}
    assert all(r["ci_low"] > 0 and r["p_value"] < 0.05 for r in differences.values())
    worse = masked_error(truth, {"bad": noise}, mask, n_boot=20)
    assert "fail" in levels(worse)


def test_masked_numbers_by_hand(masked):
    truth, mask, typed, _ = masked
    found = masked_error(truth, {"good": typed}, mask, n_boot=0)
    error = (typed - truth)[mask] ** 2
    zero = truth[mask] == 0
    assert value(found, "good", "masked_mse") == pytest.approx(error.mean())
    assert value(found, "good", "mse_zero") == pytest.approx(error[zero].mean())
    assert value(found, "good", "mse_nonzero") == pytest.approx(error[~zero].mean())
    mean = np.array([truth[~mask[:, g], g].mean() for g in range(truth.shape[1])])
    by_mean = (np.broadcast_to(mean, truth.shape) - truth)[mask] ** 2
    assert value(found, "good", "masked_gain") == pytest.approx(1 - error.mean() / by_mean.mean())
    size = np.where(mask, 0, truth).sum(1) / (~mask @ mean)
    sized = ((size[:, None] * mean - truth)[mask] ** 2).mean()
    assert value(found, "gene_mean_x_size", "masked_mse") == pytest.approx(sized)
    from scipy.stats import spearmanr

    r = [spearmanr(typed[mask[:, g], g], truth[mask[:, g], g]).statistic for g in range(truth.shape[1])]
    assert value(found, "good", "feature_spearman") == pytest.approx(np.median(r))


def test_masking_expressed_entries_only_tells_the_baselines_too(masked):
    """A model told that nothing masked is zero beats the plain mean without knowing anything else."""
    truth, mask, _, _ = masked
    expressed = mask & (truth > 0)
    used = ~expressed & (truth > 0)
    knows_only_that = np.broadcast_to((truth * used).sum(0) / used.sum(0), truth.shape)
    found = masked_error(truth, {"model": knows_only_that}, expressed, n_boot=20)
    assert value(found, "model", "masked_gain") == pytest.approx(0, abs=1e-6)
    assert found.facts["gene_means"].startswith("expressed") and found.facts["zeros_among_masked"] == 0
    assert not [r for r in found.rows if r["metric"] == "mse_zero"]


def test_size_factors_explain_counts():
    """On counts, a model that knows depth alone beats the means of genes, not those times size factors."""
    rng = np.random.default_rng(3)
    depth, mean = rng.lognormal(0, 1, 200), rng.lognormal(0, 1, 50)
    truth = rng.poisson(5 * depth[:, None] * mean)
    mask = rng.random(truth.shape) < 0.3
    found = masked_error(truth, {"depth": 5 * depth[:, None] * mean}, mask, n_boot=100)
    assert (
        value(found, "depth", "masked_gain") > 0.8 and value(found, "gene_mean_x_size", "masked_gain") > 0.8
    )
    (row,) = [r for r in found.rows if r["versus"] and r["metric"] == "masked_gain"]
    assert row["versus"] == "gene_mean_x_size" and abs(row["value"]) < 0.03


def test_masked_with_training_cells_groups_and_other_inputs(masked):
    import pandas as pd
    import scipy.sparse as sp

    truth, mask, typed, _ = masked
    donor = np.arange(300) % 12
    plain = masked_error(truth, {"a": typed}, mask, n_boot=0)
    given = {"a": pd.DataFrame(typed), "b": sp.csr_matrix(typed)}
    found = masked_error(sp.csr_matrix(truth), given, mask, train=truth[:100] + 1, groups=donor, n_boot=30)
    assert value(found, "a", "masked_mse") == pytest.approx(value(found, "b", "masked_mse"))
    assert value(found, "gene_mean", "masked_mse") > value(plain, "gene_mean", "masked_mse")
    row = next(r for r in found.rows if r["metric"] == "masked_gain" and r["model_id"] == "a")
    assert row["ci_method"] == "percentile bootstrap over groups" and row["n_groups"] == 12


def test_masked_refuses_what_is_broken(masked):
    truth, mask, typed, _ = masked
    hole = typed.copy()
    cell, gene = (int(i[0]) for i in np.nonzero(mask))
    hole[cell, gene] = np.nan
    names = [f"G{i}" for i in range(truth.shape[1])]
    with pytest.raises(ValueError, match=rf"1 entries to score are NaN.*cell {cell}, gene 'G{gene}'"):
        masked_error(truth, {"m": hole}, mask, genes=names)
    for bad, told in (
        ({"truth": truth, "predictions": {"m": typed[:-1]}, "mask": mask}, r"predictions\['m'\] has shape"),
        ({"truth": truth, "predictions": {"m": typed}, "mask": mask[:, 1:]}, "mask has shape"),
        ({"truth": truth, "predictions": {"m": typed}, "mask": np.zeros_like(mask)}, "nothing is masked"),
        (
            {"truth": truth, "predictions": {"gene_mean": typed}, "mask": mask},
            "the name 'gene_mean' is taken",
        ),
        ({"truth": truth, "predictions": {}, "mask": mask}, "no predictions to score"),
        (
            {"truth": truth, "predictions": {"m": typed}, "mask": mask, "train": truth[:, 1:]},
            "train has 59 genes",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            masked_error(**bad)
    with pytest.raises(KeyError, match="twins names 'x'"):
        masked_error(truth, {"m": typed}, mask, twins={"m": "x"})


# ------------------------------------------------------------- invariance
@pytest.fixture(scope="module")
def some():
    adata = synthetic_adata(60, 80)
    adata.layers["counts"] = adata.X.copy()
    return adata


def alone(adata):
    return project(adata)


def by_position(adata):
    X = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    return np.log1p(X[:, :16])


def batch_normalised(adata):
    X = project(adata)
    return (X - X.mean(0)) / (X.std(0) + 1)


def per_rank_of_cell(adata):
    return project(adata) + np.arange(adata.n_obs)[:, None] / 30


def drifting(adata, calls=[0]):  # noqa: B006
    calls[0] += 1
    return project(adata) + 0.01 * calls[0]


def sparse_only(adata):
    return project(adata) * (1 if adata.X.format == "csr" else 2)


BROKEN = {  # what is wrong -> the variations that must see it
    by_position: {"genes", "zero genes"},
    batch_normalised: {"alone"},
    per_rank_of_cell: {"alone", "order"},
    drifting: {"repeat"},
    sparse_only: {"storage"},
}


def test_what_depends_on_the_cell_alone_passes(some):
    before = some.copy()
    found = invariance(
        alone, some, name="mine", precision={"bfloat16": lambda a: alone(a).astype(np.float16)}
    )
    assert value(found, "mine", "excess") < 1 and levels(found) <= {"pass", "note"}
    assert value(found, "oracle", "excess") < 0.1 and value(found, "batch_centred", "excess") > 100
    assert 0 < value(found, "mine", "deviation", setting="bfloat16") < 0.01
    assert (some.X != before.X).nnz == 0 and list(some.var_names) == list(before.var_names)


@pytest.mark.parametrize("embed", BROKEN, ids=lambda f: f.__name__)
def test_each_fault_is_seen_by_its_variation(some, embed):
    found = invariance(embed, some, name="mine")
    over = {
        r["setting"]
        for r in found.rows
        if r["model_id"] == "mine" and r["metric"] == "deviation"
        if r["status"] == "skipped" or r["value"] > found.facts["tolerance"][r["setting"]]
    }
    assert BROKEN[embed] <= over
    assert "fail" in levels(found)


def test_a_variation_that_raises_is_a_failure_not_a_crash(some):
    def picky(adata):
        if adata.n_obs == 1:
            raise ValueError("batches of one cell are not supported")
        return project(adata)

    found = invariance(picky, some, name="mine")
    (row,) = [r for r in found.rows if r["model_id"] == "mine" and r["setting"] == "alone"]
    assert row["status"] == "skipped" and "batches of one" in row["note"]
    assert any(g.level == "fail" and "batches of one" in g.message for g in found.gates())


def test_invariance_refuses_what_it_cannot_judge(some):
    with pytest.raises(ValueError, match="at least 16"):
        invariance(alone, some[:ALONE].copy())
    with pytest.raises(ValueError, match="is constant"):
        invariance(lambda a: np.ones((a.n_obs, 3)), some)
    with pytest.raises(ValueError, match="hold NaN"):
        invariance(lambda a: np.full((a.n_obs, 3), np.nan), some)


@pytest.mark.parametrize("system", sorted(models.SYSTEMS))
def test_models_of_ours_are_invariant(some, system):
    """Every system before training, through the face that users take."""
    genes = Vocabulary(list(some.var["ensembl_id"]), list(some.var_names))
    state = initialise(models.build(system, TINY[system], len(genes), 0))
    model = api.Model(system, TINY[system], genes, **state, step=0, path=Path("nowhere"))
    found = invariance(model, some, name=system, n_cells=24)
    failed = [g.message for g in found.gates() if g.level == "fail"]
    assert not failed and value(found, system, "excess") < 1

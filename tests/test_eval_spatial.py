"""Spatial evaluation: planted tissue, blocks that do not leak, Moran's I, imputation, refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge

from scjax.eval import regression, space
from scjax.eval.annotation import annotation
from scjax.eval.imputation import imputation
from scjax.eval.results import Results
from scjax.eval.schema import MEAN
from scjax.eval.spatial import spatial
from scjax.eval.splits import Fold
from scjax.eval.tasks import TASKS

N_GENES = 24


def tissue(n_sections: int = 3, n: int = 130, seed: int = 0) -> ad.AnnData:
    """Sections with three regions side by side, a mixture of three types in each, counts that follow both."""
    rng = np.random.default_rng(seed)
    biology = np.random.default_rng(1)
    profile = biology.lognormal(1, 1, (3, N_GENES)) * np.where(
        np.arange(N_GENES) % 3 == np.arange(3)[:, None], 3, 1
    )
    gradient = biology.normal(size=N_GENES) * 0.8
    section = np.repeat(np.arange(n_sections), n)
    xy = rng.uniform(0, 9, (len(section), 2))
    region = (xy[:, 0] // 3).astype(int)
    own = rng.random(len(section)) < 0.7
    kind = np.where(own, region, rng.integers(3, size=len(section)))
    mean = profile[kind] * np.exp(gradient * (xy[:, :1] - 4.5) / 4.5)
    depth = rng.lognormal(np.log(150), 0.3, len(section))
    expected = mean / mean.sum(1, keepdims=True) * depth[:, None]
    adata = ad.AnnData(rng.poisson(expected).astype(np.float32))
    adata.obs_names = [f"c{i}" for i in range(len(section))]
    adata.var_names = [f"g{i}" for i in range(N_GENES)]
    adata.obs["section"] = [f"s{i}" for i in section]
    adata.obs["region"] = [f"r{i}" for i in region]
    adata.obs["cell_type"] = [f"t{i}" for i in kind]
    adata.obsm["spatial"] = xy
    told = np.column_stack([np.eye(3)[region], np.eye(3)[kind]]) * 2
    adata.obsm["X_good"] = told + 0.6 * rng.normal(size=told.shape)
    adata.obsm["X_weak"] = told + 3 * rng.normal(size=told.shape)
    draws = rng.poisson(expected, (40, *expected.shape))
    adata.obsm["expected"] = np.mean(np.log1p(draws / draws.sum(2, keepdims=True) * 1e4), axis=0)
    return adata


@pytest.fixture(scope="module")
def sections() -> ad.AnnData:
    return tissue()


@pytest.fixture(scope="module")
def scored(sections: ad.AnnData) -> Results:
    return spatial(
        sections,
        ["X_good"],
        region_key="region",
        label_key="cell_type",
        section_key="section",
        controls={"random_init": "X_weak"},
        n_boot=60,
        dataset="planted",
    )


def value(results: Results, model: str, metric: str, **fields: str) -> float:
    """The one value of a metric over all sections."""
    rows = [r for r in results.rows if r["model_id"] == model and r["metric"] == metric and not r["versus"]]
    rows = [r for r in rows if not r["label"] and r["group"] in ("", MEAN)]
    if any(r["group"] == MEAN for r in rows):
        rows = [r for r in rows if r["group"] == MEAN]
    rows = [r for r in rows if all(r[k] == v for k, v in fields.items())]
    assert len(rows) == 1, rows
    return rows[0]["value"]


# ------------------------------------------------------------------------------------- planted truth


@pytest.mark.parametrize("head", ["logistic", "knn"])
def test_regions_order_oracle_good_weak_noise(scored, head):
    order = [
        value(scored, m, "macro_f1", task="spatial/niche", head=head)
        for m in ("oracle", "X_good", "random_init")
    ]
    blind = max(value(scored, m, "macro_f1", head=head) for m in ("noise", "depth_only"))
    assert order[0] > 0.99 and order[0] > order[1] > order[2] > blind, (order, blind)
    assert value(scored, "majority", "macro_f1") < 0.3
    assert value(scored, "coordinates", "macro_f1") > 0.9  # regions lie alike in every section


def test_composition_orders_oracle_good_mean_noise(scored):
    found = {m: value(scored, m, "composition_r2") for m in ("oracle", "X_good", "random_init", "train_mean")}
    assert found["oracle"] > 0.95 > found["X_good"] > found["random_init"] > found["train_mean"] == 0
    assert value(scored, "noise", "composition_r2") < 0.02
    assert value(scored, "X_good", "composition_r2") > value(scored, "cell_type_only", "composition_r2") > 0.1
    for metric in ("composition_jsd", "composition_mae"):
        assert (
            value(scored, "oracle", metric)
            < value(scored, "X_good", metric)
            < value(scored, "train_mean", metric)
        )


def test_controls_are_always_there_and_differences_are_paired(scored):
    for task, control in (("spatial/niche", "majority"), ("spatial/composition", "train_mean")):
        of = {r["model_id"]: r["model_kind"] for r in scored.rows if r["task"] == task}
        expected = {
            "pca": "baseline",
            "cell_type_only": "baseline",
            "coordinates": "control",
            "oracle": "oracle",
        }
        expected |= {
            "depth_only": "control",
            "noise": "control",
            control: "control",
            "random_init": "control",
        }
        assert expected.items() <= of.items()
        roles = {r["versus_role"] for r in scored.rows if r["task"] == task and r["versus"]}
        assert len(roles) == 2
    assert not [g for g in scored.gates() if g.level == "fail"]
    assert "SPATIAL NICHES" in scored.to_text()
    assert {r["dataset"] for r in scored.rows} == {"planted"}


def test_results_survive_a_file_and_a_second_run(scored, sections, tmp_path):
    scored.to_jsonl(tmp_path / "r.jsonl")
    assert Results.read(tmp_path / "r.jsonl").rows == scored.rows
    again = spatial(
        sections[:, :], ["X_good"], region_key="region", section_key="section", n_boot=0, heads=("knn",)
    )
    assert value(again, "X_good", "macro_f1") == value(scored, "X_good", "macro_f1", head="knn")
    assert {r["n_boot"] for r in again.rows} == {0}


def test_pictures_of_two_sections(scored):
    panels = [p for p in scored.panels if p["panel"] == "sections"]
    assert len(panels) == 2
    for p in panels:
        assert {"X_good", "pca", "cell_type_only"} <= set(p["predicted"])
        assert len(p["xy"]) == len(p["truth"]) == len(p["predicted"]["pca"]) <= 1500


# ----------------------------------------------------------------------------------- blocks and leaks


def test_a_representation_of_the_position_gains_nothing_from_adjacency_under_block_splits():
    blocks, cells = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0, 8, (1200, 2))
        patch = rng.integers(2, size=64)  # a label at random for each of 8 x 8 fields, four to a block
        label = patch[xy[:, 0].astype(int) * 8 + xy[:, 1].astype(int)]
        adata = ad.AnnData(rng.poisson(2, (1200, 5)).astype(np.float32))
        adata.obs["region"] = np.where(label, "a", "b")
        adata.obsm["spatial"] = xy
        knots = rng.uniform(0, 8, (200, 2))
        adata.obsm["X"] = np.exp(-((xy[:, None] - knots) ** 2).sum(2) / 0.5) + 1e-6
        found = spatial(adata, ["X"], region_key="region", n_boot=0, heads=("knn",))
        assert "contiguous blocks" in found.facts["split_scheme"]
        blocks.append(value(found, "X", "accuracy"))
        leaky = annotation(adata.obsm["X"], adata.obs["region"], heads=("knn",), n_boot=0)
        cells.append(next(r["value"] for r in leaky.rows if r["metric"] == "accuracy"))
    assert np.mean(cells) > 0.8 and np.mean(blocks) < 0.58, (cells, blocks)


def test_blocks_are_contiguous_equal_and_within_sections(sections):
    place = space.locate(sections, "spatial", "section")
    assert place.held_out == "section" and len(place.unit_names) == 3
    size = np.bincount(place.block)
    assert size.min() >= 20 and size.max() - size.min() <= 1
    for b in range(len(size)):
        at = place.block == b
        assert len(np.unique(place.section[at])) == 1
        low, high = place.xy[at].min(0), place.xy[at].max(0)
        inside = ((place.xy >= low) & (place.xy <= high)).all(1) & (place.section == place.section[at][0])
        assert inside.sum() == at.sum()  # nobody else lies in its box


def test_the_margin_leaves_no_training_cell_beside_a_held_out_one(sections):
    one = sections[sections.obs["section"] == "s0"].copy()
    place = space.locate(one, "spatial")
    test, rest = np.flatnonzero(place.unit == 0), np.flatnonzero(place.unit > 0)
    kept = place.away_from(rest, test)
    gap = np.linalg.norm(place.xy[kept][:, None] - place.xy[test], axis=2).min()
    assert 0 < len(kept) < len(rest) and gap > space.MARGIN * space.spacing(place.xy)
    whole = space.locate(sections, "spatial", "section")
    assert whole.away_from(rest, test) is rest  # other sections lie nowhere near


def test_neighbours_stay_within_their_section(sections):
    place = space.locate(sections, "spatial", "section")
    distance, index = space.neighbours(place.xy, place.section, 6)
    assert (place.section[index] == place.section[:, None]).all()
    assert (index != np.arange(len(index))[:, None]).all() and (np.diff(distance, axis=1) >= 0).all()
    shares = space.composition(place.section, 3, index)
    np.testing.assert_allclose(shares, np.eye(3)[place.section])


def test_density_is_scored_for_cells_and_not_for_grids(sections, scored):
    assert np.isfinite(value(scored, "X_good", "density_r2"))
    grid = sections[:121].copy()
    grid.obsm["spatial"] = np.stack(np.meshgrid(np.arange(11), np.arange(11)), -1).reshape(-1, 2)
    found = spatial(grid, ["X_good"], label_key="cell_type", n_boot=0)
    assert "density_r2" not in {r["metric"] for r in found.rows} and "grid" in found.facts["density"]


# ------------------------------------------------------------------------------------------ Moran's I


def test_morans_i_agrees_with_scanpy():
    sc = pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    xy = rng.uniform(size=(200, 2))
    graph = space.graph(space.neighbours(xy, np.zeros(200, int), 7)[1])
    values = np.column_stack(
        [xy[:, 0], np.sin(6 * xy[:, 1]), rng.normal(size=(200, 2)), rng.poisson(0.3, 200)]
    )
    np.testing.assert_allclose(space.morans_i(values, graph), sc.metrics.morans_i(graph, values.T), atol=1e-6)


def test_morans_i_of_patterns_that_are_known():
    x = np.arange(40)
    graph = space.graph(np.stack([(x - 1) % 40, (x + 1) % 40], 1))  # a ring
    values = np.column_stack([(-1.0) ** x, np.cos(2 * np.pi * x / 40), np.full(40, 0.1)])
    np.testing.assert_allclose(space.morans_i(values, graph), [-1, np.cos(2 * np.pi / 40), 0], atol=1e-12)


# ----------------------------------------------------------------------------------------- imputation


def truth_of(adata: ad.AnnData) -> np.ndarray:
    X = np.asarray(adata.X, np.float64)
    return np.log1p(X * (1e4 / X.sum(1, keepdims=True)))  # in this order: ranks hang on equal values


HELD_OUT = [f"g{i}" for i in range(12)]


def predicted(adata: ad.AnnData, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    X = adata.obsm["expected"] + noise * rng.normal(size=adata.shape)
    return pd.DataFrame(X, adata.obs_names, adata.var_names)


@pytest.fixture(scope="module")
def imputed(sections) -> Results:
    good = predicted(sections, 0.3)
    given = {
        "good": good,
        "shuffled rows and columns": good.iloc[::-1, ::-1],
        "inflated": good.mean() + 4 * (good - good.mean()),
        "weak": predicted(sections, 2.0),
        "perfect": predicted(sections),
    }
    return imputation(
        sections, given, genes=HELD_OUT, section_key="section", n_boot=60, twins={"good": "weak"}
    )


def test_imputation_orders_ceiling_good_weak_mean(imputed):
    r = {
        m: value(imputed, m, "feature_pearson")
        for m in ("half_split", "good", "random_init", "pca", "gene_mean")
    }
    assert r["half_split"] > r["good"] > r["random_init"] > r["gene_mean"] == 0
    assert r["pca"] > value(imputed, "depth_only", "feature_pearson")
    error = {m: value(imputed, m, "feature_nrmse") for m in ("half_split", "good", "gene_mean", "noise")}
    assert error["half_split"] < error["good"] < error["gene_mean"] < error["noise"]
    assert abs(value(imputed, "noise", "feature_pearson")) < 0.1


def test_the_ceiling_is_near_where_a_perfect_prediction_arrives(imputed):
    for metric in ("feature_pearson", "feature_nrmse"):  # logarithms of counts make it an estimate
        assert value(imputed, "half_split", metric) == pytest.approx(
            value(imputed, "perfect", metric), abs=0.08
        )


def test_the_ceiling_is_exact_where_values_add_up():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(40_000, 2)) * [1.0, 0.5]
    first, second = (signal / 2 + rng.normal(size=signal.shape) / np.sqrt(2) for _ in range(2))
    parts, one = {"": np.arange(len(signal))}, np.ones((1, len(signal)))
    best = regression.per_feature(first + second, signal, parts, one)
    found = regression.ceiling(first, second, parts, one)
    for metric in ("feature_pearson", "feature_nrmse"):
        np.testing.assert_allclose(found[metric], best[metric], atol=0.01)


def test_predictions_are_aligned_by_name_and_inflation_gains_nothing(imputed):
    for metric in ("feature_pearson", "feature_spearman", "feature_nrmse", "moran_r", "moran_mae"):
        assert value(imputed, "shuffled rows and columns", metric) == value(imputed, "good", metric)
    assert value(imputed, "inflated", "feature_pearson") <= value(imputed, "good", "feature_pearson") + 1e-9
    assert value(imputed, "inflated", "moran_r") <= value(imputed, "good", "moran_r") + 1e-9
    assert value(imputed, "inflated", "feature_nrmse") > 2 * value(imputed, "good", "feature_nrmse")


def test_spatial_pattern_is_lost_by_noise_and_kept_by_a_good_prediction(imputed):
    kept = {m: value(imputed, m, "moran_r") for m in ("perfect", "good", "gene_mean", "noise")}
    assert min(kept["perfect"], kept["good"]) > 0.4 > kept["noise"] and kept["gene_mean"] == 0
    twin = [r for r in imputed.rows if r["versus"] == "random_init" and r["metric"] == "feature_pearson"]
    assert len(twin) == 1 and twin[0]["ci_low"] > 0 and twin[0]["p_holm"] is not None


def test_values_per_gene_are_those_of_scipy(imputed, sections):
    rows = sections.obs["section"].to_numpy()
    t, g = truth_of(sections), predicted(sections, 0.3).to_numpy()
    for metric, reference in (("feature_pearson", pearsonr), ("feature_spearman", spearmanr)):
        found = [
            r["value"]
            for r in imputed.rows
            if r["model_id"] == "good" and r["metric"] == metric and r["label"]
        ]
        expected = [
            np.mean([reference(t[rows == s, i], g[rows == s, i]).statistic for s in ("s0", "s1", "s2")])
            for i in range(12)
        ]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert value(imputed, "good", metric) == pytest.approx(np.median(expected), abs=1e-6)


def test_embeddings_are_read_in_the_same_folds_of_one_section(sections):
    one = sections[sections.obs["section"] == "s0"].copy()
    found = imputation(
        one, genes=HELD_OUT[:4], embeddings=["X_good", "X_weak"], n_boot=50, twins={"X_good": "X_weak"}
    )
    assert value(found, "X_good", "feature_pearson") > value(found, "random_init", "feature_pearson")
    # means of folds differ; pooled over folds they would correlate negatively with the truth
    assert value(found, "gene_mean", "feature_pearson") == 0
    assert {r["n_boot"] for r in found.rows} == {0}
    assert "contiguous block" in found.facts["split_scheme"] and "left out" in found.facts["split_scheme"]
    assert "too few genes" in next(r["note"] for r in found.rows if r["metric"] == "feature_pearson")


def test_wide_noise_predicts_nothing_of_cells_that_were_held_out(sections):
    noisy = sections.copy()
    noisy.obsm["X_noise"] = np.random.default_rng(0).normal(size=(noisy.n_obs, 300))
    found = imputation(noisy, genes=HELD_OUT, embeddings=["X_noise"], section_key="section", n_boot=0)
    assert abs(value(found, "X_noise", "feature_pearson")) < 0.1
    plan = [Fold(np.arange(10, 30), np.arange(10)), Fold(np.arange(10), np.arange(10, 30))]
    given = []

    def remember(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        given.append((set(train), set(test)))
        return np.zeros((len(test), 2))

    regression.cross_predict(remember, plan, (30, 2))
    assert len(given) == 2 and not any(train & test for train, test in given)


def test_ridge_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for n, d in ((60, 8), (30, 50)):
        X, W = rng.normal(2, 3, (n, d)), rng.normal(size=(d, 3))
        Y = X @ W + rng.normal(size=(n, 3))
        model, alpha = regression.ridge(X, Y, None, 0)
        Z = (X - X.mean(0)) / X.std(0)
        reference = Ridge(alpha).fit(Z, Y)
        np.testing.assert_allclose(model(X), reference.predict(Z), atol=1e-8)
    noise, strongest = regression.ridge(rng.normal(size=(80, 5)), rng.normal(size=(80, 2)), None, 0)
    assert strongest >= 10 * 80 / 1000  # nothing to learn: a strong penalty is chosen


# -------------------------------------------------------------------------------------------- refusals


def broken(what: str) -> tuple[ad.AnnData, dict]:
    a, also = tissue(3, 60), {"region_key": "region", "section_key": "section"}
    if what == "no coordinates":
        del a.obsm["spatial"]
    elif what == "nan coordinates":
        a.obsm["spatial"][3] = np.nan
    elif what == "wrong shape":
        a.obsm["spatial"] = a.obsm["spatial"][:, :1]
    elif what == "stacked sections":
        a.obsm["spatial"][60:120] = a.obsm["spatial"][:60]
        also = {"region_key": "region"}
    elif what == "nan embedding":
        a.obsm["X_good"][0, 0] = np.inf
    elif what == "constant embedding":
        a.obsm["X_good"] = np.ones((180, 3))
    elif what == "one region":
        a.obs["region"] = "r"
    elif what == "region is section":
        a.obs["region"] = a.obs["section"]
    elif what == "torn section":
        a.obs["donor"] = np.arange(180) % 2
        a.obs["donor"] = a.obs["donor"].astype(str)
        also["group_key"] = "donor"
    elif what == "small section":
        a.obs["section"] = np.where(np.arange(180) < 5, "tiny", "s0")
    elif what == "no such column":
        also["region_key"] = "niche"
    elif what == "nothing asked":
        also = {}
    elif what == "few cells":
        a, also = a[:70].copy(), {"region_key": "region"}
    return a, also


REFUSALS = {
    "no coordinates": (KeyError, "obsm has no 'spatial'; it holds"),
    "nan coordinates": (ValueError, "no finite coordinates; drop them"),
    "wrong shape": (ValueError, "2 or 3 coordinates"),
    "stacked sections": (ValueError, "section_key"),
    "nan embedding": (ValueError, "NaN or infinite"),
    "constant embedding": (ValueError, "constant"),
    "one region": (ValueError, "fewer than two labels"),
    "region is section": (ValueError, "confounded|single label"),
    "torn section": (ValueError, "whole sections"),
    "small section": (ValueError, "at least 20 are needed"),
    "no such column": (KeyError, "columns that could serve"),
    "nothing asked": (ValueError, "region_key .* or label_key"),
    "few cells": (ValueError, "at least 4 are needed"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused_with_what_to_do(what):
    adata, also = broken(what)
    error, text = REFUSALS[what]
    with pytest.raises(error, match=text):
        spatial(adata, ["X_good"], n_boot=0, **also)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda p: p.iloc[1:], KeyError, "1 of 180 cells are not among the rows"),
        (lambda p: p.drop(columns="g0"), KeyError, "1 of 12 features are not among the columns"),
        (lambda p: p.mask(p == p.iloc[3, 3]), ValueError, "NaN or infinite"),
        (lambda p: np.expm1(p), ValueError, "log1p of counts per ten thousand"),
        (lambda p: np.rint(p), ValueError, "raw counts"),
        (lambda p: p.to_numpy(), TypeError, "DataFrame or AnnData"),
    ],
    ids=["cell missing", "gene missing", "nan", "not logged", "counts", "no names"],
)
def test_predictions_that_cannot_be_scored_are_refused(change, error, text):
    adata = tissue(3, 60)
    with pytest.raises(error, match=text):
        imputation(adata, {"m": change(predicted(adata))}, genes=HELD_OUT, section_key="section", n_boot=0)


@pytest.mark.parametrize(
    ("also", "error", "text"),
    [
        ({"genes": ["g0", "nope"]}, KeyError, "nope.* named alike"),
        ({"genes": []}, ValueError, "no genes to predict"),
        ({"genes": HELD_OUT, "predictions": None}, ValueError, "nothing to score"),
        ({"genes": [f"g{i}" for i in range(N_GENES)]}, ValueError, "at least two must be left"),
        ({"genes": HELD_OUT, "twins": {"m": "x"}}, KeyError, "twins names 'x'"),
    ],
    ids=["unknown gene", "no genes", "nothing", "all genes", "twin"],
)
def test_imputation_refuses(also, error, text):
    adata = tissue(3, 60)
    with pytest.raises(error, match=text):
        imputation(
            adata, **{"predictions": {"m": predicted(adata)}, "section_key": "section", "n_boot": 0} | also
        )


def test_every_headline_metric_of_the_tables_is_scored(scored, imputed):
    for task in ("spatial/niche", "spatial/composition", "spatial/imputation"):
        results = imputed if task.endswith("imputation") else scored
        assert set(TASKS[task].headline) <= {r["metric"] for r in results.rows if r["task"] == task}
        assert set(TASKS[task].blind) <= {r["model_id"] for r in results.rows if r["task"] == task}

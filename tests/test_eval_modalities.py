"""Matching of modalities and prediction of one from another: planted pairs, chance, traps, refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.cross_decomposition import CCA

from scjax.eval import joint_space
from scjax.eval.modalities import matching, modality_prediction
from scjax.eval.results import Results
from scjax.eval.schema import MEAN
from scjax.eval.splits import Fold, folds
from scjax.eval.tasks import TASKS

N_GENES, N_PROTEINS = 60, 12


def paired(n: int = 240, n_groups: int = 3, seed: int = 0) -> ad.AnnData:
    """Cells with RNA and protein counts that share six factors, and joint spaces of falling quality."""
    rng, biology = np.random.default_rng(seed), np.random.default_rng(1)
    kind = rng.integers(3, size=n)
    factors = rng.normal(size=(n, 6)) + 2 * np.eye(3, 6)[kind]
    genes = np.exp(0.5 * factors @ biology.normal(size=(6, N_GENES)) + 1)
    proteins = np.exp(0.4 * factors @ biology.normal(size=(6, N_PROTEINS)) + 3)
    rna_depth, protein_depth = rng.lognormal(0, 0.4, (2, n, 1))
    adata = ad.AnnData(rng.poisson(genes * rna_depth).astype(np.float32))
    adata.obs_names = [f"c{i}" for i in range(n)]
    adata.var_names = [f"g{i}" for i in range(N_GENES)]
    adata.obs["cell_type"] = [f"t{i}" for i in kind]
    adata.obs["donor"] = [f"d{i}" for i in rng.integers(n_groups, size=n)]
    counts = rng.poisson(proteins * protein_depth)
    adata.obsm["protein"] = pd.DataFrame(counts, adata.obs_names, [f"p{i}" for i in range(N_PROTEINS)])
    adata.obsm["factors"] = factors
    log = np.log1p(proteins)
    adata.obsm["expected"] = log - log.mean(1, keepdims=True)
    return adata


def joints(adata: ad.AnnData, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng, z = np.random.default_rng(seed), adata.obsm["factors"]
    return {m: (z, z + s * rng.normal(size=z.shape)) for m, s in (("good", 0.5), ("weak", 3.0))}


def value(results: Results, model: str, metric: str) -> float:
    """The one value of a metric over all groups."""
    rows = [r for r in results.rows if r["model_id"] == model and r["metric"] == metric and not r["versus"]]
    rows = [r for r in rows if not r["label"] and r["group"] in ("", MEAN)]
    assert len(rows) == 1, rows
    return rows[0]["value"]


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return paired()


@pytest.fixture(scope="module")
def matched(cells) -> Results:
    return matching(
        cells,
        "protein",
        joints(cells),
        label_key="cell_type",
        group_key="donor",
        twins={"good": "weak"},
        n_boot=60,
        dataset="planted",
    )


# ------------------------------------------------------------------------------------------- matching


def test_matching_orders_oracle_good_weak_noise(matched):
    found = [value(matched, m, "foscttm") for m in ("oracle", "good", "random_init", "noise")]
    assert found[0] < 0.01 and sorted(found) == found and found[3] == pytest.approx(0.5, abs=0.06)
    for metric in ("recall_at_1", "recall_at_10", "transfer_f1"):
        chain = [value(matched, m, metric) for m in ("good", "random_init", "noise")]
        assert chain[0] > chain[1] > chain[2], (metric, chain)
    assert value(matched, "noise", "transfer_f1") < 0.45 < 0.8 < value(matched, "oracle", "recall_at_1")
    assert value(matched, "cca", "foscttm") < 0.35 < value(matched, "depth_only", "foscttm")
    assert value(matched, "noise", "recall_at_10") == pytest.approx(10 / 50, abs=0.05)


def test_baselines_controls_and_differences_are_always_there(matched):
    kinds = {r["model_id"]: r["model_kind"] for r in matched.rows}
    assert kinds == {
        "good": "model",
        "random_init": "control",
        "cca": "baseline",
        "depth_only": "control",
        "noise": "control",
        "oracle": "oracle",
    }
    apart = {
        r["versus"]: r
        for r in matched.rows
        if r["versus"] and r["metric"] == "foscttm" and r["group"] == MEAN
    }
    assert set(apart) == {"cca", "random_init"} and all(r["ci_high"] < 0 for r in apart.values())
    assert not [g for g in matched.gates() if g.level == "fail"]
    assert {r["group"] for r in matched.rows} == {"d0", "d1", "d2", MEAN}


def test_foscttm_is_the_share_of_other_halves_that_are_closer():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 4))
    distance = np.linalg.norm(a[:, None] - b, axis=2)
    true = np.diag(distance)
    there = ((distance < true[:, None]).sum(1) / 29).mean()
    back = ((distance < true).sum(0) / 29).mean()
    everyone = np.arange(30)
    found = joint_space.scores([(a, b)], [Fold(everyone, everyone)], [everyone], [])
    assert found["foscttm"].mean() == pytest.approx((there + back) / 2, abs=1e-12)


def test_ties_count_half_whatever_their_order():
    a = np.zeros((40, 2))
    everyone = np.arange(40)
    draws = joint_space.pools([everyone], 20, 0)
    found = joint_space.scores([(a, a)], [Fold(everyone, everyone)], [everyone], draws)
    np.testing.assert_allclose(found["foscttm"], 0.5)
    np.testing.assert_allclose(found["recall_at_1"], 1 / 20)
    np.testing.assert_allclose(found["recall_at_10"], 10 / 20)


def test_recall_does_not_fall_with_the_number_of_cells():
    recall = {}
    for n in (150, 600):
        z = np.random.default_rng(n).normal(size=(n, 4))
        noisy = z + np.random.default_rng(n + 1).normal(size=z.shape)
        plan = folds(n, None, 0, n_folds=2)[0]
        sets = joint_space.candidates(plan, None)
        found = joint_space.scores([(z, noisy)] * 2, plan, sets, joint_space.pools(sets, 50, 0))
        recall[n] = found["recall_at_1"].mean()
        assert np.isfinite(found["recall_at_10"]).all()
    assert recall[150] == pytest.approx(recall[600], abs=0.06)


def test_pools_have_one_size_and_score_every_cell_five_times():
    sets = [np.arange(0, 130), np.arange(130, 170), np.arange(170, 220)]
    draws = joint_space.pools(sets, 50, 0)
    times = np.zeros(220, int)
    for members, scored in draws:
        assert len(members) == len(np.unique(members)) == 50
        assert any(np.isin(members, s).all() for s in sets)
        np.add.at(times, members[scored], 1)
    assert set(times[:130]) == set(times[170:]) == {5} and set(times[130:170]) == {0}


def test_telling_groups_apart_is_not_matching(cells):
    donor = np.eye(3)[cells.obs["donor"].str[1:].astype(int)] * 50
    rng = np.random.default_rng(0)
    half = [donor + rng.normal(size=donor.shape) for _ in range(2)]
    found = matching(cells, "protein", {"batch": tuple(half)}, group_key="donor", n_boot=30)
    assert value(found, "batch", "foscttm") == pytest.approx(0.5, abs=0.05)
    by_cells = matching(cells, "protein", {"batch": tuple(half)}, n_boot=30)
    assert value(by_cells, "batch", "foscttm") < 0.3  # what it would have seemed to be
    said = [g.message for g in by_cells.gates() if "split over CELLS" in g.message]
    assert len(said) == 1 and said[0].startswith("Matching of modalities was split over CELLS")


def test_candidates_share_a_group_where_folds_hold_several():
    many = paired(360, n_groups=9)
    donor = np.eye(9)[many.obs["donor"].str[1:].astype(int)] * 50
    rng = np.random.default_rng(0)
    half = tuple(donor + rng.normal(size=donor.shape) for _ in range(2))
    found = matching(many, "protein", {"batch": half}, group_key="donor", pool=20, n_boot=0)
    assert value(found, "batch", "foscttm") == pytest.approx(0.5, abs=0.05)


def test_matching_by_depth_alone_is_shown_beside_the_model():
    rng = np.random.default_rng(0)
    depth = rng.lognormal(5, 0.7, 200)
    adata = ad.AnnData(rng.poisson(np.outer(depth / 50, np.ones(30))).astype(np.float32))
    adata.obsm["protein"] = rng.poisson(np.outer(depth / 10, np.ones(8)))
    x = np.log(depth)[:, None]
    found = matching(adata, "protein", {"m": (x, x + 0.05 * rng.normal(size=x.shape))}, n_boot=30)
    assert value(found, "depth_only", "foscttm") < 0.15 < 0.4 < value(found, "cca", "foscttm")


def test_canonical_correlation_is_that_of_scikit_learn_and_learns_nothing_from_noise(cells):
    z = np.random.default_rng(0).normal(size=(300, 3))
    rng = np.random.default_rng(1)
    x, y = (
        z @ rng.normal(size=(3, 6)) + rng.normal(size=(300, 6)),
        z @ rng.normal(size=(3, 5)) + rng.normal(size=(300, 5)),
    )
    train = np.arange(200)
    first, second = joint_space.canonical(lambda t: x, lambda t: y)(train)
    model = CCA(3, max_iter=5000, tol=1e-12).fit(x[train], y[train])
    u, v = model.transform(x, y)
    for i in range(3):
        ours = [np.corrcoef(first[rows, i], second[rows, i])[0, 1] for rows in (train, np.arange(200, 300))]
        theirs = [np.corrcoef(u[rows, i], v[rows, i])[0, 1] for rows in (train, np.arange(200, 300))]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    blank = cells.copy()
    blank.obsm["protein"] = rng.poisson(20, (cells.n_obs, 30))
    found = matching(blank, "protein", joints(blank), n_boot=0)
    assert value(found, "cca", "foscttm") == pytest.approx(0.5, abs=0.06)


def test_a_joint_space_may_fit_itself_on_the_training_cells(cells):
    log = np.log1p(cells.obsm["protein"].to_numpy(float))
    seen = []

    def remembering(train: np.ndarray) -> np.ndarray:
        seen.append(set(train))
        return cells.obsm["factors"]

    fitted = joint_space.canonical(remembering, joint_space.components(log))
    found = matching(cells, "protein", {"m": fitted}, n_boot=30)
    assert value(found, "m", "foscttm") < value(found, "cca", "foscttm")
    assert len(seen) == 4 and all(len(s) == 180 for s in seen)
    with pytest.raises(ValueError, match="1 and 2 dimensions"):
        matching(cells, "protein", {"m": lambda train: (np.eye(240, 1), np.eye(240, 2))}, n_boot=0)


def test_many_groups_are_resampled_as_groups():
    many = paired(600, n_groups=12)
    found = matching(many, "protein", joints(many), group_key="donor", pool=10, n_boot=60)
    mean = next(r for r in found.rows if r["model_id"] == "good" and r["group"] == MEAN)
    assert mean["ci_method"] == "percentile bootstrap over groups" and mean["n_groups"] == 12
    assert mean["ci_low"] < mean["value"] < mean["ci_high"]
    also = modality_prediction(many, "protein", {"m": expected(many)}, group_key="donor", n_boot=60)
    row = next(
        r for r in also.rows if r["model_id"] == "m" and r["metric"] == "feature_pearson" and not r["label"]
    )
    assert (
        row["ci_method"] == "percentile bootstrap over groups"
        and row["ci_low"] < row["value"] < row["ci_high"]
    )


# ----------------------------------------------------------------------------------------- prediction


def expected(adata: ad.AnnData, noise: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    X = adata.obsm["expected"] + noise * rng.normal(size=(adata.n_obs, N_PROTEINS))
    return pd.DataFrame(X, adata.obs_names, [f"p{i}" for i in range(N_PROTEINS)])


@pytest.fixture(scope="module")
def predicted(cells) -> Results:
    good = expected(cells, 0.3)
    given = {
        "perfect": expected(cells),
        "good": good,
        "weak": expected(cells, 2.0),
        "turned": good.iloc[::-1, ::-1],
        "inflated": good.mean() + 4 * (good - good.mean()),
    }
    return modality_prediction(
        cells, "protein", given, embeddings=["factors"], group_key="donor", twins={"good": "weak"}, n_boot=60
    )


def test_prediction_orders_ceiling_good_weak_mean_noise(predicted):
    r = {
        m: value(predicted, m, "feature_pearson")
        for m in ("half_split", "good", "random_init", "feature_mean")
    }
    assert r["half_split"] > r["good"] > r["random_init"] > r["feature_mean"] == 0
    error = [
        value(predicted, m, "feature_nrmse")
        for m in ("half_split", "good", "feature_mean", "noise", "random_init")
    ]
    assert error == sorted(error)
    assert value(predicted, "perfect", "feature_pearson") == pytest.approx(r["half_split"], abs=0.04)
    assert value(predicted, "factors", "feature_pearson") > value(predicted, "pca", "feature_pearson") > 0.5
    assert abs(value(predicted, "depth_only", "feature_pearson")) < 0.35


def test_prediction_is_aligned_by_name_and_inflation_gains_nothing(predicted):
    for metric in ("feature_pearson", "feature_spearman", "feature_nrmse"):
        assert value(predicted, "turned", metric) == value(predicted, "good", metric)
    assert (
        value(predicted, "inflated", "feature_pearson") <= value(predicted, "good", "feature_pearson") + 1e-9
    )
    assert value(predicted, "inflated", "feature_nrmse") > 2 * value(predicted, "good", "feature_nrmse")
    twin = [r for r in predicted.rows if r["versus"] == "random_init" and r["metric"] == "feature_pearson"]
    assert len(twin) == 1 and twin[0]["ci_low"] > 0


def test_values_per_feature_are_those_of_scipy(predicted, cells):
    log = np.log1p(cells.obsm["protein"].to_numpy())
    t, g = log - log.mean(1, keepdims=True), expected(cells, 0.3).to_numpy()
    donor = cells.obs["donor"].to_numpy()
    for metric, reference in (("feature_pearson", pearsonr), ("feature_spearman", spearmanr)):
        found = [
            r["value"]
            for r in predicted.rows
            if r["model_id"] == "good" and r["metric"] == metric and r["label"]
        ]
        by_hand = [
            np.mean([reference(t[donor == d, i], g[donor == d, i]).statistic for d in ("d0", "d1", "d2")])
            for i in range(N_PROTEINS)
        ]
        np.testing.assert_allclose(found, by_hand, atol=1e-9)


def test_values_that_are_not_counts_are_taken_as_they_are(cells):
    table = expected(cells, 0.5)
    found = modality_prediction(cells, table, embeddings=["factors"], n_boot=0)
    models = {r["model_id"] for r in found.rows}
    assert "oracle" in models and "half_split" not in models and "as given" in found.facts["second"]
    assert value(found, "oracle", "feature_pearson") > value(found, "factors", "feature_pearson") > 0.5


def test_without_counts_of_the_first_modality_baselines_are_marked_as_skipped(cells):
    bare = ad.AnnData(np.log1p(cells.X) + 0.5, obs=cells.obs, obsm=dict(cells.obsm))
    for found in (
        modality_prediction(bare, "protein", embeddings=["factors"], n_boot=0),
        matching(bare, "protein", joints(bare), n_boot=0),
    ):
        skipped = {r["model_id"] for r in found.rows if r["status"] == "skipped"}
        assert "depth_only" in skipped and {"pca", "cca"} & skipped
        assert all("counts=" in r["note"] for r in found.rows if r["status"] == "skipped")


def test_results_survive_a_file(matched, predicted, tmp_path):
    for results in (matched, predicted):
        results.to_jsonl(tmp_path / "r.jsonl")
        assert Results.read(tmp_path / "r.jsonl").rows == results.rows
        assert results.to_text()
    for task, results in (("modalities/matching", matched), ("modalities/prediction", predicted)):
        assert set(TASKS[task].headline) <= {r["metric"] for r in results.rows}
        assert set(TASKS[task].blind) <= {r["model_id"] for r in results.rows}


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("also", "error", "text"),
    [
        ({"embeddings": {}}, ValueError, "give {name"),
        ({"embeddings": {"m": np.ones((240, 2))}}, ValueError, "two halves"),
        (
            {"embeddings": {"m": (np.eye(240, 3) + 1, np.eye(240, 4) + 1)}},
            ValueError,
            "must lie in one space",
        ),
        ({"embeddings": {"m": ("factors", np.eye(239, 6) + 1)}}, ValueError, "239 rows for 240 cells"),
        ({"embeddings": {"m": ("factors", "nope")}}, KeyError, "obsm has no 'nope'; it holds"),
        ({"embeddings": {"m": ("factors", np.full((240, 6), np.nan))}}, ValueError, "NaN or infinite"),
        ({"embeddings": {"m": ("factors", np.ones((240, 6)))}}, ValueError, "constant"),
        ({"second": "adt"}, KeyError, "obsm has no 'adt'"),
        ({"pool": 200}, ValueError, "lower pool"),
        ({"pool": 200, "group_key": "donor"}, ValueError, "lower pool"),
        ({"group_key": "patient"}, KeyError, "columns that could serve"),
        ({"label_key": "type"}, KeyError, "columns that could serve"),
        ({"twins": {"m": "good"}}, KeyError, "twins names 'm'"),
    ],
)
def test_matching_refuses(cells, also, error, text):
    with pytest.raises(error, match=text):
        matching(cells, **{"second": "protein", "embeddings": joints(cells), "n_boot": 0} | also)


@pytest.mark.parametrize(
    ("also", "error", "text"),
    [
        ({"predictions": None}, ValueError, "nothing to score"),
        ({"change": lambda p: p.iloc[2:]}, KeyError, "2 of 240 cells are not among the rows"),
        ({"change": lambda p: p.rename(columns={"p1": "CD3"})}, KeyError, "named alike"),
        ({"change": lambda p: p.mask(p == p.iloc[3, 3])}, ValueError, "NaN or infinite"),
        ({"change": lambda p: np.rint(np.exp(p + 3))}, ValueError, "centred log ratios"),
        ({"change": lambda p: p * 100}, ValueError, "another scale"),
        ({"embeddings": ["nope"]}, KeyError, "obsm has no 'nope'"),
        ({"second": pd.DataFrame(np.ones((240, 3)))}, KeyError, "240 of 240 cells are not among the rows"),
    ],
)
def test_prediction_refuses(cells, also, error, text):
    change = also.get("change", lambda p: p)
    given = {"second": "protein", "predictions": {"m": change(expected(cells))}, "n_boot": 0} | also
    with pytest.raises(error, match=text):
        modality_prediction(cells, **{k: v for k, v in given.items() if k != "change"})


def test_a_broken_second_modality_is_refused(cells):
    for change, text in (
        (lambda p: p.mask(p == p.iloc[0, 0]), "NaN or infinite"),
        (lambda p: p * 0.0, "varies"),
    ):
        broken = cells.copy()
        broken.obsm["protein"] = change(cells.obsm["protein"].astype(float))
        with pytest.raises(ValueError, match=text):
            modality_prediction(broken, "protein", {"m": expected(cells)}, n_boot=0)
    lone = cells.copy()
    lone.obs["donor"] = np.where(np.arange(240) < 3, np.nan, 1.0)
    with pytest.raises(ValueError, match="have no group"):
        modality_prediction(lone, "protein", {"m": expected(cells)}, group_key="donor", n_boot=0)
    lone.obs["donor"] = "one"
    with pytest.raises(ValueError, match="only one group"):
        modality_prediction(lone, "protein", {"m": expected(cells)}, group_key="donor", n_boot=0)

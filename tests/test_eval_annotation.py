"""Annotation: planted truth, folds that keep groups whole, few labels, unseen types, ontologies, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from planted import planted, score
from synthetic import synthetic_adata

import scjax.eval
from scjax.eval import few_shot, ontology, probes, splits, stats, unseen
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.checks import select
from scjax.eval.schema import MEAN


def test_annotation_orders_embeddings_by_their_quality():
    X, label, group, _ = planted()
    for head in ("logistic", "knn"):
        f1 = {
            name: score(scjax.eval.annotation(x, label, group, n_boot=0), "macro_f1", head=head, group=MEAN)
            for name, x in X.items()
        }
        assert f1["oracle"] == 1 and f1["oracle"] > f1["good"] > f1["weak"] > f1["noise"] + 0.05, f1
        assert f1["noise"] < 0.4


def test_a_label_without_signal_scores_high_over_cells_and_near_chance_over_donors():
    donor = np.repeat(np.arange(12), 30)
    disease = np.array(["case", "control"])[donor % 2]  # a property of the donor, with no effect on any cell
    over_cells, over_donors = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(12, 10))[donor] * 1.5 + rng.normal(size=(360, 10))
        cells = scjax.eval.annotation(X, disease, n_boot=0)
        donors = scjax.eval.annotation(X, disease, donor, n_boot=0)
        over_cells.append(score(cells, "accuracy", head="knn"))
        over_donors.append(score(donors, "accuracy", head="knn", group=MEAN))
        assert "CELLS" in cells.rows[0]["split_scheme"] and "CELLS" not in donors.rows[0]["split_scheme"]
    assert np.mean(over_cells) > 0.85 and np.mean(over_donors) < 0.65


def test_few_groups_are_each_held_out_and_reported_apart():
    X, label, group, _ = planted(n_groups=2)
    found = scjax.eval.annotation(X["good"], label, group, n_boot=50)
    rows = {r["group"]: r for r in found.rows if r["metric"] == "macro_f1" and r["head"] == "knn"}
    assert set(rows) == {"g0", "g1", MEAN}
    assert rows[MEAN]["value"] == pytest.approx((rows["g0"]["value"] + rows["g1"]["value"]) / 2)
    assert rows["g0"]["n_cells"] + rows["g1"]["n_cells"] == 360
    assert (
        "cells of the held-out group" in rows["g0"]["ci_method"]
        and "fewer than 10" in rows[MEAN]["ci_method"]
    )


def test_many_groups_are_resampled_as_groups():
    X, label, group, _ = planted(n_groups=12)
    found = scjax.eval.annotation(X["weak"], label, group, heads=("knn",), n_boot=200)
    mean = next(r for r in found.rows if r["metric"] == "accuracy" and r["group"] == MEAN)
    assert (
        mean["ci_method"] == "percentile bootstrap over groups"
        and "5-fold over groups" in mean["split_scheme"]
    )
    per_group = [r["value"] for r in found.rows if r["metric"] == "accuracy" and r["group"] != MEAN]
    half = 1.96 * np.std(per_group) / np.sqrt(12)
    assert mean["ci_high"] - mean["ci_low"] == pytest.approx(2 * half, rel=0.35)


def test_baselines_are_fitted_on_the_training_groups_alone():
    adata = synthetic_adata(200)
    counts, genes = find_counts(adata)
    train = np.flatnonzero(adata.obs["study"] == "study0")
    test = np.flatnonzero(adata.obs["study"] == "study1")
    other = counts.toarray()
    other[test] = other[test][:, ::-1]  # other cells to predict, same cells to learn from
    one, two = Expression(counts, genes), Expression(other, genes)
    for made in ("pca", "hvg", "depth"):
        np.testing.assert_allclose(
            getattr(one, made)(train)[train], getattr(two, made)(train)[train], atol=1e-5
        )
    asked = []

    def spy(rows: np.ndarray) -> np.ndarray:
        asked.append(set(rows))
        return one.pca(rows)

    scjax.eval.annotation(spy, adata.obs["cell_type"], adata.obs["study"], heads=("knn",), n_boot=0)
    assert sorted(asked, key=len) == sorted([set(train), set(test)], key=len)


def test_a_label_absent_from_training_is_reported():
    X, label, group, _ = planted(n_groups=2)
    keep = ~((label == "t3") & (group == "g0"))
    found = scjax.eval.annotation(X["oracle"][keep], label[keep], group[keep], heads=("knn",), n_boot=0)
    assert found.facts["unseen_labels"] == {"g1": ["t3"]}
    assert score(found, "macro_f1", group="g1") < 0.8
    assert score(found, "macro_f1_seen", group="g1") > score(found, "macro_f1", group="g1") + 0.1


def test_the_majority_class_looks_good_in_accuracy_alone():
    label = np.repeat(["a", "b", "c"], [900, 90, 10])
    found = scjax.eval.annotation(None, label, np.tile(["g0", "g1"], 500), heads=("majority",), n_boot=0)
    assert score(found, "accuracy", group=MEAN) == pytest.approx(0.9)
    assert score(found, "macro_f1", group=MEAN) == pytest.approx(0.316, abs=0.001)

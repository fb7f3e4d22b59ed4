"""Annotation: planted truth, folds that keep groups whole, few labels, unseen types, ontologies, refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from planted import planted, score
from sklearn.neighbors import KNeighborsClassifier
from synthetic import synthetic_adata

import scjax.eval
from scjax.eval import few_shot, probes, splits, stats, unseen
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.checks import select
from scjax.eval.schema import MEAN


def test_annotation_orders_embeddings_by_their_quality():
    X, label, group, _ = planted()
    for head in ("logistic", "knn", "mlp"):
        f1 = {
            name: score(
                scjax.eval.annotation(x, label, group, heads=(head,), n_boot=0),
                "macro_f1",
                head=head,
                group=MEAN,
            )
            for name, x in X.items()
        }
        assert f1["oracle"] == 1 and f1["oracle"] > f1["good"] > f1["weak"] > f1["noise"] + 0.05, f1
        assert f1["noise"] < 0.4


def test_a_label_without_signal_scores_high_over_cells_and_near_chance_over_donors():
    donor = np.repeat(np.arange(12), 30)
    disease = np.array(["case", "control"])[donor % 2]  # a property of the donor, with no effect on any cell
    over_cells, over_donors, probed = [], [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(12, 10))[donor] * 1.5 + rng.normal(size=(360, 10))
        cells = scjax.eval.annotation(X, disease, heads=("knn", "logistic"), n_boot=0)
        donors = scjax.eval.annotation(X, disease, donor, heads=("knn", "logistic"), n_boot=0)
        over_cells.append(score(cells, "accuracy", head="knn"))
        over_donors.append(score(donors, "accuracy", head="knn", group=MEAN))
        assert "CELLS" in cells.rows[0]["split_scheme"] and "CELLS" not in donors.rows[0]["split_scheme"]
        probed.append(score(donors, "accuracy", head="logistic", group=MEAN))
    assert np.mean(over_cells) > 0.85 and np.mean(over_donors) < 0.65 and np.mean(probed) < 0.65


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


# -------------------------------------------------------------------------------- folds and choices


def test_folds_keep_groups_whole_and_say_when_there_are_none():
    group = np.repeat(np.arange(8), 10)
    label = np.tile([0, 1], 40)
    for y in (None, label):
        found, scheme = splits.folds(80, group, 0, label=y)
        assert "5-fold over groups" in scheme and len(found) == 5
        assert sorted(np.concatenate([f.test for f in found])) == list(range(80))
        for train, test in found:
            assert not set(group[train]) & set(group[test])
    assert splits.folds(20, group[:20], 0)[1] == "each group held out in turn"
    assert splits.folds(20, None, 0, unit="genes")[1] == "5-fold over GENES, not groups"
    with pytest.raises(ValueError, match="only one group.*no groups to split over spots"):
        splits.folds(10, group[:10], 0, unit="spots")
    with pytest.raises(ValueError, match="3 rows cannot be split into 5 folds"):
        splits.folds(3, None, 0)


def test_hyper_parameters_are_chosen_by_groups_of_the_training_fold():
    label, group = np.tile([0, 1], 60), np.repeat(np.arange(6), 20)
    for train, test in splits.inner(label, group, 0):
        assert not set(group[train]) & set(group[test])
    lone = splits.inner(label[:20], group[:20], 0)
    assert len(lone) == 3 and all(len(set(label[f.train])) == 2 for f in lone)
    assert splits.inner(np.array([0, 1]), None, 0) == []


@pytest.mark.parametrize("head", ["logistic", "knn", "mlp"])
def test_a_probe_never_looks_at_the_cells_it_is_tested_on(head):
    X, label, group, _ = planted(n=240, n_groups=4)
    cells = select(label, group)
    fold = splits.split(cells, 0)[0][0]
    one, note = probes.HEADS[head](X["weak"], cells, fold, 0)
    other = select(np.where(np.isin(np.arange(240), fold.test), np.roll(label, 1), label), group)
    moved = X["weak"].copy()
    moved[fold.test[1:]] *= 50
    two, same = probes.HEADS[head](moved, other, fold, 0)
    assert note == same
    np.testing.assert_allclose(one[0], two[0], atol=1e-6)


def test_the_k_chosen_is_the_best_of_the_inner_folds():
    X, label, group, _ = planted(n=360, n_groups=4)
    chosen = set()
    for name in ("good", "weak"):
        cells = select(label, group)
        for fold in splits.split(cells, 0)[0]:
            Z, y = X[name][fold.train], cells.label[fold.train]
            total = dict.fromkeys(probes.K_GRID, 0.0)
            for fit, check in splits.inner(y, cells.group[fold.train], 0):
                for k in total:
                    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: 1 / d)
                    guess = model.fit(Z[fit], y[fit]).predict(Z[check])
                    total[k] += sklearn.metrics.f1_score(y[check], guess, average="macro")
            best = max(total, key=lambda k: total[k])
            assert probes.knn(X[name], cells, fold, 0)[1] == f"k={best}"
            chosen.add(best)
    assert len(chosen) > 1


def test_votes_are_those_of_scikit_learn():
    X, label, *_ = planted(n=120)
    X["weak"][5] = X["weak"][100]  # at no distance
    train, test = X["weak"][:90], X["weak"][90:]
    classes, code = np.unique(label[:90], return_inverse=True)
    model = KNeighborsClassifier(15, metric="cosine", weights=lambda d: 1 / np.maximum(d, 1e-12))
    expected = model.fit(train, code).predict_proba(test)
    distances, indices = probes.near(train, test, 15)
    np.testing.assert_allclose(probes.votes(distances, code[indices], len(classes)), expected, atol=1e-6)


# -------------------------------------------------------------------------------- calibration


def test_calibration_curves_are_those_of_the_scores():
    X, label, group, _ = planted()
    found = scjax.eval.annotation(X["weak"], label, group, n_boot=0)
    panels = [p for p in found.panels if p["panel"] == "calibration"]
    assert {(p["head"], p["group"]) for p in panels} == {
        (h, g) for h in ("logistic", "knn", "mlp") for g in ("g0", "g1", "g2")
    }
    for p in panels:
        n, confidence, accuracy = (np.array(p[k]) for k in ("n", "confidence", "accuracy"))
        ece = np.abs(confidence - accuracy) @ n / n.sum()
        assert ece == pytest.approx(score(found, "ece", head=p["head"], group=p["group"]), abs=1e-3)
        hits = accuracy @ n / n.sum()
        assert hits == pytest.approx(score(found, "accuracy", head=p["head"], group=p["group"]), abs=1e-3)


# -------------------------------------------------------------------------------- few labels


def few(X, label, group=None, **options) -> dict[str, float]:
    found = few_shot.few_shot(X, label, group, n_boot=0, **options)
    place = MEAN if group is not None else "all cells"
    return {r["setting"]: r["value"] for r in found.rows if r["metric"] == "macro_f1" and r["group"] == place}


def test_more_labels_and_better_embeddings_score_higher():
    X, label, group, _ = planted(n=480)
    curve = {name: list(few(x, label, group).values()) for name, x in X.items()}
    for at in range(4):
        assert curve["oracle"][at] >= curve["good"][at] > curve["weak"][at] > curve["noise"][at], curve
    assert curve["weak"][0] < curve["weak"][1] < curve["weak"][3]
    assert curve["oracle"][3] > 0.99 and max(curve["noise"]) < 0.35


def test_few_labels_are_drawn_from_training_groups_and_say_what_was_short(monkeypatch):
    X, label, group, _ = planted(n=300)
    label = np.where((label == "t3") & (np.arange(300) % 3 > 0), "t2", label)
    assert pd.crosstab(label, group).to_numpy().sum(1).min() < 50
    seen = []

    def spy(train, y, test):
        seen.append((len(y), {tuple(x) for x in train}, {tuple(x) for x in test}))
        return np.full(len(test), y[0])

    monkeypatch.setattr(few_shot, "_guess", spy)
    found = few_shot.few_shot(X["good"], label, group, budgets=(1, 50), n_boot=0)
    assert len(seen) == 3 * 2 * 5
    assert all(not train & test for _, train, test in seen)
    assert {n for n, *_ in seen if n < 10} == {4}
    notes = {r["setting"]: r["note"] for r in found.rows}
    assert "fewer" not in notes["1 per label"] and "fewer cells than asked for of" in notes["50 per label"]
    assert "t3" in notes["50 per label"] and "t2" not in notes["50 per label"]


def test_few_cells_in_many_dimensions_are_solved_exactly():
    rng = np.random.default_rng(0)
    X, y, new = rng.normal(size=(12, 80)) / 9, np.arange(12) % 3, rng.normal(size=(50, 80)) / 9
    plain = probes.fit_logistic(X, y, few_shot.C).predict(new)
    assert (few_shot._guess(X, y, new) == plain).mean() > 0.97


def test_intervals_of_few_labels_hold_the_spread_of_the_draws():
    X, label, group, _ = planted(n=480)
    found = few_shot.few_shot(X["weak"], label, group, budgets=(1, 50), n_boot=80)
    rows = {r["setting"]: r for r in found.rows if r["metric"] == "macro_f1" and r["group"] == MEAN}
    width = {s: r["ci_high"] - r["ci_low"] for s, r in rows.items()}
    assert width["1 per label"] > width["50 per label"] > 0
    assert all(r["ci_low"] < r["value"] < r["ci_high"] and "draws" in r["ci_method"] for r in rows.values())


# -------------------------------------------------------------------------------- unseen types


def test_cells_of_a_new_type_stand_out_the_more_the_better_the_embedding():
    X, label, group, _ = planted(n=400)
    auroc = {}
    for name, x in X.items():
        found = unseen.unseen(x, label, group, n_boot=0, name=name)
        for head in unseen.HEADS:
            auroc[head, name] = score(found, "auroc", head=head, group=MEAN, task="annotation/unseen")
    assert auroc["logistic", "good"] > auroc["logistic", "noise"] + 0.1  # far from all, it may be sure of one
    for head in ("knn", "mahalanobis"):
        assert auroc[head, "oracle"] > 0.99, auroc
        assert (
            auroc[head, "oracle"] >= auroc[head, "good"] > auroc[head, "weak"] > auroc[head, "noise"] - 0.02
        )
    assert all(auroc[head, "noise"] == pytest.approx(0.5, abs=0.06) for head in unseen.HEADS)


def test_the_held_out_type_is_no_part_of_training(monkeypatch):
    X, label, group, _ = planted(n=300)
    seen = []
    real = unseen._novelty

    def spy(Z, codes, train, test):
        seen.append((set(codes[train]), set(codes[test]), set(group[train]), set(group[test])))
        return real(Z, codes, train, test)

    monkeypatch.setattr(unseen, "_novelty", spy)
    found = unseen.unseen(X["good"], label, group, n_boot=20)
    assert len(seen) == 3 * 4 and found.facts["held_out_types"] == ["t0", "t1", "t2", "t3"]
    for known, tested, groups, held_out in seen:
        assert len(tested - known) == 1 and not groups & held_out
    rows = [r for r in found.rows if r["metric"] == "auroc" and r["head"] == "knn" and r["group"] == MEAN]
    per_type = {r["label"]: r["value"] for r in rows}
    assert per_type.pop("") == pytest.approx(np.mean(list(per_type.values()))) and len(per_type) == 4
    assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in rows)


def test_types_that_cannot_be_held_out_are_refused_or_left_out():
    X, label, group, _ = planted(n=200)
    with pytest.raises(ValueError, match="three labels.*leave the task"):
        unseen.unseen(X["good"], np.where(label == "t0", "a", "b"), group)
    kept = (label != "t3") | (group == "g0")
    found = unseen.unseen(X["good"][kept], label[kept], group[kept], n_boot=0)
    groups = {r["group"] for r in found.rows if r["label"] == "t3"}
    value = {r["head"]: r["value"] for r in found.rows if r["label"] == "t3" and r["metric"] == "auroc"}
    assert groups == {MEAN} and value["knn"] > 0.9  # of the one group that has it


def test_without_groups_few_labels_and_unseen_types_are_split_over_cells_and_say_so():
    X, label, *_ = planted(n=200)
    for found in (
        few_shot.few_shot(X["good"], label, n_boot=20),
        unseen.unseen(X["good"], label, n_boot=20),
    ):
        rows = [r for r in found.rows if not r["label"]]
        assert {r["group"] for r in rows} == {"all cells"} and "CELLS" in rows[0]["split_scheme"]
        assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in rows)
        assert len({(r["metric"], r["head"], r["setting"]) for r in rows}) == len(rows)


def test_two_labels_leave_unseen_types_out_of_a_run():
    X, label, group, _ = planted(n=150)
    obs = pd.DataFrame({"cell_type": label, "donor": group}, [f"c{i}" for i in range(150)])
    adata = ad.AnnData(obsm={"X_model": X["good"]}, obs=obs)
    adata.obs["half"] = np.where(np.isin(label, ["t0", "t1"]), "a", "b")
    tasks = {
        key: scjax.eval.run(adata, "X_model", label_key=key, group_key="donor", n_boot=0, maps=False).facts[
            "tasks"
        ]
        for key in ("cell_type", "half")
    }
    assert set(tasks["cell_type"]) - set(tasks["half"]) == {"annotation/unseen"}


def test_rankings_equal_scikit_learn_under_any_weights_and_any_order_of_ties():
    rng = np.random.default_rng(0)
    positive = rng.random(120) < 0.3
    value = np.round(rng.normal(size=120) + positive)  # many ties
    weights = stats.resample(120, 1, 0, "test")
    order = rng.permutation(120)
    found = stats.ranking(value, positive, weights)
    moved = stats.ranking(value[order], positive[order], weights[:, order])
    for w, at in ((weights[0], 0),):
        again, truth = np.repeat(value, w), np.repeat(positive, w)
        assert found["auroc"][at] == pytest.approx(sklearn.metrics.roc_auc_score(truth, again))
        precision = sklearn.metrics.average_precision_score(truth, again)
        assert found["average_precision"][at] == pytest.approx(precision, abs=1e-6)
    for metric in found:
        np.testing.assert_allclose(found[metric], moved[metric], atol=1e-6)
    alone = stats.ranking(value, np.zeros(120, bool), weights)
    assert all(np.isnan(v).all() for v in alone.values())


def test_an_unknown_head_is_answered_with_those_there_are():
    X, label, group, _ = planted(n=120)
    with pytest.raises(ValueError, match="unknown head 'forest'; there are: logistic, knn, mlp, majority"):
        scjax.eval.annotation(X["good"], label, group, heads=("forest",))

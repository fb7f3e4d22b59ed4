"""Evaluation: planted truth, the traps that give plausible numbers on broken input, intervals, refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from planted import planted, score
from synthetic import synthetic_adata

import scjax.eval
from scjax.eval import stats
from scjax.eval.checks import stratified
from scjax.eval.schema import MEAN

# -------------------------------------------------------------------------------- imports


def test_importing_brings_in_neither_jax_nor_flax_nor_the_optional_packages():
    optional = ["scanpy", "scib_metrics", "umap", "matplotlib", "jinja2", "igraph"]
    code = (
        "import sys, anndata; before = set(sys.modules);"  # which brings Dask in where it is, and that jinja2
        "import scjax.eval; from scjax.eval import figures, report;"
        f"print([m for m in ['jax', 'flax', *{optional}] if m in set(sys.modules) - before]);"
        "print(sorted(m for m in sys.modules if m.startswith('scjax') and not m.startswith('scjax.eval')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['scjax']"]


@pytest.fixture
def without_extra(monkeypatch):
    for module in ("scanpy", "scib_metrics", "umap", "matplotlib", "jinja2", "igraph"):
        monkeypatch.setitem(sys.modules, module, None)


def test_without_the_extra_packages_scores_are_there_and_gaps_are_named(without_extra, tmp_path):
    adata = embedded(150)
    results = scjax.eval.run(adata, ["X_good"], batch_key="batch", group_key="study", n_boot=20, kbet=True)
    frame = results.to_frame()
    skipped = frame[frame["status"] == "skipped"]
    assert set(zip(skipped["task"], skipped["metric"], strict=True)) == {
        ("clustering", "nmi"),
        ("integration", "kbet"),
    }
    assert skipped["note"].str.contains("scjax\\[eval\\]").all()
    assert score(results, "nmi", head="kmeans", model_id="X_good") > score(
        results, "nmi", head="kmeans", model_id="noise"
    )
    assert [p["status"] for p in results.panels if p["panel"] == "map"] == ["skipped"]
    assert any("k-means" in line for line in results.to_text().splitlines())
    with pytest.raises(ImportError, match="jinja2"):
        results.report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- scores


def test_macro_f1_averages_over_the_classes_of_the_test_cells_only():
    truth = np.repeat([0, 1], 90)
    guess = truth.copy()
    guess[:10] = 2  # a class that no test cell has
    found = stats.classification(truth, guess, np.ones(3, bool), np.ones((1, 180), np.uint8))
    expected = sklearn.metrics.f1_score(truth, guess, labels=[0, 1], average="macro")
    assert found["macro_f1"][0] == pytest.approx(expected)
    assert expected > 0.9 > sklearn.metrics.f1_score(truth, guess, average="macro")
    assert found["out_of_set_rate"][0] == pytest.approx(10 / 180)
    assert found["balanced_accuracy"][0] == pytest.approx((80 / 90 + 1) / 2)


def test_scores_of_tables_equal_scikit_learn_under_any_weights():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(4, size=80), rng.integers(5, size=80)
    weights = stats.resample(80, 5, 0, "test")
    labels = range(4)
    found = stats.classification(truth, guess, np.ones(5, bool), weights)
    clusters = stats.agreement(truth, guess, weights[:1])
    for b, w in enumerate(weights):
        again, guessed = np.repeat(truth, w), np.repeat(guess, w)
        f1 = sklearn.metrics.f1_score(again, guessed, labels=labels, average="macro", zero_division=0)
        assert found["macro_f1"][b] == pytest.approx(f1)
        assert found["accuracy"][b] == pytest.approx((again == guessed).mean())
    assert clusters["ari"][0] == pytest.approx(sklearn.metrics.adjusted_rand_score(truth, guess))
    assert clusters["nmi"][0] == pytest.approx(sklearn.metrics.normalized_mutual_info_score(truth, guess))
    values = rng.normal(size=80)
    for b, w in enumerate(weights):
        assert stats.median(values, weights)[b] == pytest.approx(np.median(np.repeat(values, w)))
        assert stats.mean(values, weights)[b] == pytest.approx(np.repeat(values, w).mean())


def test_calibration_error_of_honest_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    correct = rng.random(20_000) < confidence
    assert stats.calibration_error(confidence, correct) < 0.02
    assert stats.calibration_error(np.full(20_000, 0.99), correct) == pytest.approx(0.24, abs=0.02)


# -------------------------------------------------------------------------------- intervals


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered, n, hit_rate = [], 150, np.array([0.9, 0.6, 0.7])
    everyone = np.repeat([0, 1, 2], 200_000)
    answers = np.where(rng.random(600_000) < hit_rate[everyone], everyone, (everyone + 1) % 3)
    truth = sklearn.metrics.f1_score(everyone, answers, average="macro")
    for draw in range(150):
        at = rng.integers(600_000, size=n)
        weights = stats.resample(n, 300, draw, "coverage")
        found = stats.classification(everyone[at], answers[at], np.ones(3, bool), weights)["macro_f1"]
        low, high = stats.interval(found)
        covered.append(low <= truth <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_resamples_are_the_same_for_all_and_differ_between_groups():
    assert (stats.resample(50, 4, 1, "a") == stats.resample(50, 4, 1, "a")).all()
    assert (stats.resample(50, 4, 1, "a") != stats.resample(50, 4, 1, "b")).any()
    assert (stats.resample(50, 4, 1, "a").sum(1) == 50).all() and (
        stats.resample(50, 4, 1, "a")[0] == 1
    ).all()


# -------------------------------------------------------------------------------- refusals


def embedded(n: int = 240, **obsm: np.ndarray) -> ad.AnnData:
    """Synthetic cells with a good embedding, a random one, and whatever else is given."""
    adata = synthetic_adata(n)
    rng = np.random.default_rng(1)
    centre = np.eye(4, 8)[adata.obs["cell_type"].cat.codes]
    adata.obsm["X_good"] = (3 * centre + rng.normal(size=(n, 8))).astype(np.float32)
    adata.obsm["X_noise"] = rng.normal(size=(n, 8)).astype(np.float32)
    for key, X in obsm.items():
        adata.obsm[key] = X
    return adata


def bad_embedding(kind: str) -> np.ndarray:
    X = np.random.default_rng(0).normal(size=(240, 5))
    if kind == "nan":
        X[17, 2] = np.nan
    elif kind == "infinite":
        X[17, 2] = np.inf
    elif kind == "zero":
        X[17] = 0
    elif kind == "constant":
        X[:] = X[0]
    return X


@pytest.mark.parametrize(
    ("kind", "message"),
    [("nan", "1 of 240 cells.*NaN.*row 17 \\(cell17\\)"), ("infinite", "infinite.*row 17"),
     ("zero", "all-zero vector.*row 17"), ("constant", "X_bad.*constant")],
)  # fmt: skip
def test_broken_embeddings_are_refused_by_name(kind, message):
    with pytest.raises(ValueError, match=message):
        scjax.eval.run(embedded(X_bad=bad_embedding(kind)), ["X_good", "X_bad"], n_boot=0)
    label, batch = np.tile(["a", "b"], 120), np.repeat(["x", "y"], 120)
    for task in (scjax.eval.annotation, scjax.eval.clustering):
        with pytest.raises(ValueError, match="embedding"):
            task(bad_embedding(kind), label)
    with pytest.raises(ValueError, match="embedding"):
        scjax.eval.integration(bad_embedding(kind), label, batch)


def test_keys_that_are_not_there_are_answered_with_those_that_are():
    adata = embedded(60)
    with pytest.raises(KeyError, match="celltype.*cell_type, batch, donor, study"):
        scjax.eval.run(adata, ["X_good"], label_key="celltype")
    with pytest.raises(KeyError, match="X_missing.*X_good, X_noise"):
        scjax.eval.run(adata, ["X_missing"])
    with pytest.raises(KeyError, match="group column 'lab'"):
        scjax.eval.run(adata, ["X_good"], group_key="lab")
    with pytest.raises(KeyError, match="counts='spliced'.*X"):
        scjax.eval.run(adata, ["X_good"], counts="spliced")
    with pytest.raises(KeyError, match="not one of the embeddings"):
        scjax.eval.run(adata, ["X_good"], controls={"random_init": {"X_other": "X_noise"}})
    with pytest.raises(ValueError, match="unknown task 'cluster'; there are: annotation"):
        scjax.eval.run(adata, ["X_good"], ["cluster"])
    with pytest.raises(ValueError, match="integration.*batch_key"):
        scjax.eval.run(adata, ["X_good"], ["integration"])
    with pytest.raises(ValueError, match="'pca' is taken"):
        scjax.eval.run(adata, ["X_good"], controls={"pca": "X_noise"})
    with pytest.raises(ValueError, match="no embeddings"):
        scjax.eval.run(adata, [])


def test_labels_groups_and_batches_that_cannot_be_used_are_refused():
    X, label, group, batch = planted()
    x = X["good"]
    with pytest.raises(ValueError, match="359 rows for 360 cells|360 rows for 359 cells"):
        scjax.eval.annotation(x, label[1:])
    with pytest.raises(ValueError, match="group has 359 values"):
        scjax.eval.annotation(x, label, group[1:])
    with pytest.raises(ValueError, match="fewer than two labels"):
        scjax.eval.annotation(x, np.repeat("t", 360))
    with pytest.raises(ValueError, match="only one group is left \\('g'\\)"):
        scjax.eval.annotation(x, label, np.repeat("g", 360))
    with pytest.raises(ValueError, match="confounded"):
        scjax.eval.annotation(x, label, np.char.add("donor of ", label))
    with pytest.raises(ValueError, match="single label to train on"):
        scjax.eval.annotation(x, np.where(group == "g0", label, "t9"), np.where(group == "g0", "g0", "g1"))
    with pytest.raises(ValueError, match="only one batch"):
        scjax.eval.integration(x, label, np.repeat("b", 360))
    with pytest.raises(ValueError, match="confounded with the labels"):
        scjax.eval.integration(x, label, np.where(np.isin(label, ["t0", "t1"]), "b0", "b1"))


def test_cells_without_label_and_rare_labels_are_left_out_and_counted():
    adata = embedded(200)
    label = adata.obs["cell_type"].astype(object).to_numpy(copy=True)
    label[:3], label[3:5], label[5], label[6:10] = np.nan, "Unknown", " unlabelled", "rare"
    adata.obs["cell_type"] = label
    results = scjax.eval.run(adata, ["X_good"], ["annotation"], n_boot=0)
    assert results.facts["dropped"] == {"no label": 6, "label 'rare' has fewer than 10 cells": 4}
    assert results.facts["n_cells"] == 190 and sum(results.facts["labels"].values()) == 190


def test_stratified_samples_lose_no_stratum():
    strata = np.repeat([0, 1, 2], [900, 95, 5])
    at = stratified(strata, 100, seed=0)
    assert np.bincount(strata[at]).tolist() == [90, 10, 5] and (np.diff(at) > 0).all()
    assert (at == stratified(strata, 100, seed=0)).all() and len(stratified(strata, 1000, 0)) == 1000


# -------------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def results() -> scjax.eval.Results:
    adata = embedded()
    controls = {"random_init": "X_noise", "shuffled": "X_shuffled"}
    adata.obsm["X_shuffled"] = np.random.default_rng(0).permutation(adata.obsm["X_good"])
    return scjax.eval.run(
        adata, ["X_good"], batch_key="batch", group_key="study", controls=controls, n_boot=100
    )


def test_a_run_holds_every_control_and_says_what_it_is(results):
    frame = results.to_frame()
    kinds = frame.drop_duplicates("model_id").set_index("model_id")["model_kind"].to_dict()
    assert kinds == {
        **{
            "X_good": "model",
            "random_init": "control",
            "shuffled": "baseline",
            "pca": "baseline",
            "hvg": "baseline",
        },
        **{
            "depth_only": "control",
            "noise": "control",
            "majority": "control",
            "collapsed": "control",
            "oracle": "oracle",
        },
    }
    gaps = frame[frame["status"] != "ok"]  # every type lies in every batch
    assert set(gaps["metric"]) <= {"isolated_labels"}, gaps
    headline = {"group": MEAN, "head": "logistic"}
    assert score(results, "macro_f1", model_id="X_good", **headline) > 0.9
    assert score(results, "macro_f1", model_id="pca", **headline) > 0.9
    for blind in ("noise", "depth_only", "random_init", "shuffled"):
        assert score(results, "macro_f1", model_id=blind, **headline) < 0.7, blind
    facts = results.facts
    assert facts["groups"].keys() == {"study0", "study1"} and facts["twins"] == {"X_good": "random_init"}
    assert facts["versions"]["numpy"] == np.__version__ and facts["seed"] == 0


def test_models_are_compared_with_their_twin_and_the_best_simple_baseline(results):
    frame = results.to_frame()
    rows = frame[frame["versus"].ne("") & frame["metric"].eq("macro_f1") & frame["head"].eq("logistic")]
    assert set(rows["group"]) == {"study0", "study1", MEAN}
    twin = rows[rows["versus_role"] == "random-initialised twin"]
    assert (twin["ci_low"] > 0).all() and (twin["versus"] == "random_init").all()
    simple = [
        score(results, "macro_f1", model_id=m, group=MEAN, head="logistic")
        for m in ("pca", "hvg", "depth_only")
    ]
    best = rows[rows["versus_role"].eq("best simple baseline") & rows["group"].eq(MEAN)].iloc[0]
    assert best["versus"] == ("pca", "hvg", "depth_only")[int(np.argmax(simple))]
    own = score(results, "macro_f1", model_id="X_good", group=MEAN, head="logistic")
    assert best["value"] == pytest.approx(own - max(simple))


def test_tables_and_text_show_values_with_intervals(results):
    table = results.table()
    assert table.index.get_level_values("representation")[:2].tolist() == ["X_good", "random_init"]
    column = "macro-F1, logistic regression: mean of groups"
    assert table.loc["X_good", column].iloc[0].count("[") == 1
    per_group = results.table("annotation")
    assert "macro-F1, logistic regression: on study0" in per_group
    shown = per_group.index.get_level_values("representation")
    assert per_group.loc["majority", column].iloc[0] and "collapsed" not in shown
    with pytest.raises(KeyError, match="grn.*annotation, .*clustering, integration"):
        results.table("grn")
    text = str(results)
    for part in (
        "ANNOTATION",
        "CLUSTERING",
        "INTEGRATION",
        "PAIRED DIFFERENCES",
        "GATES",
        "X_good - random_init",
    ):
        assert part in text
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True, file=io.StringIO())
    console.print(results)
    assert "paired differences" in console.export_text() and "X_good" in results._repr_html_()
    console.print(results.brief())
    brief = console.export_text()
    assert "Annotation: X_good is ahead of its random-initialised twin" in brief
    assert "paired differences" not in brief and "PASS" not in brief and "NOTE" not in brief


def test_results_are_read_back_as_they_were(results, tmp_path):
    path = tmp_path / "results.jsonl"
    results.to_jsonl(path)
    again = scjax.eval.Results.read(path)
    pd.testing.assert_frame_equal(again.to_frame(), results.to_frame())
    assert (
        again.facts == results.facts and again.panels == results.panels and again.gates() == results.gates()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    scores = pd.read_json(path, lines=True).query("record == 'score'")
    assert len(scores) == len(results.rows)

    lines = path.read_text().splitlines()
    for content, message in (
        ("\n".join([*lines[:3], lines[3][:40]]), "line 4: not a record"),
        ("\n".join(lines[1:]), "not complete"),
        ("[1]", "line 1: not a record"),
        (json.dumps({"record": "score", "schema_version": "99"}), "line 1: schema version '99'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            scjax.eval.Results.read(path)


def test_the_same_run_gives_the_same_numbers(results):
    adata = embedded()
    controls = {"random_init": "X_noise"}
    again = scjax.eval.run(
        adata, ["X_good"], ["annotation"], group_key="study", controls=controls, n_boot=100
    )
    one = {tuple(r.values()) for r in again.rows if r["model_id"] in ("X_good", "random_init", "pca")}
    assert one and one <= {tuple(r.values()) for r in results.rows}


def test_gates_shout_when_noise_or_the_twin_is_as_good():
    adata = embedded(160, X_model=np.random.default_rng(5).normal(size=(160, 8)))
    tasks = ["annotation", "integration"]
    found = scjax.eval.run(
        adata,
        ["X_model"],
        tasks,
        batch_key="batch",
        group_key="study",
        controls={"random_init": "X_good"},
        n_boot=50,
    )
    failed = [g.message for g in found.gates() if g.level == "fail"]
    assert any("Annotation" in m and "is not better than" in m for m in failed)
    assert any("Annotation" in m and "is not ahead of its random-initialised twin" in m for m in failed)
    assert any("Integration" in m and "is not ahead of its random-initialised twin" in m for m in failed)
    assert "[fail]" in str(found)


def test_gates_pass_a_good_model_and_warn_of_what_is_missing(results):
    levels = {g.level for g in results.gates()}
    assert "fail" not in levels and "pass" in levels
    assert any("Only 2 groups" in g.message for g in results.gates())
    bare = scjax.eval.run(embedded(160), "X_good", "annotation", n_boot=0)
    cautions = [g.message for g in bare.gates() if g.level == "caution"]
    assert any("CELLS, not groups" in m for m in cautions) and any(
        "No random-initialised twin" in m for m in cautions
    )


def test_without_raw_counts_the_baselines_are_skipped_and_missed():
    adata = embedded(160)
    adata.X = adata.X * 0.5
    found = scjax.eval.run(adata, ["X_good"], ["annotation"], group_key="study", n_boot=0)
    skipped = [r for r in found.rows if r["status"] == "skipped"]
    assert {r["model_id"] for r in skipped} == {"pca", "hvg", "depth_only"}
    assert all("raw counts" in r["note"] and "counts=" in r["note"] for r in skipped)
    assert any("skipped for pca, hvg, depth_only" in g.message for g in found.gates() if g.level == "caution")
    with pytest.raises(ValueError, match="counts='X' does not hold raw counts"):
        scjax.eval.run(adata, ["X_good"], counts="X")
    adata.layers["umi"] = synthetic_adata(160).X
    found = scjax.eval.run(adata, ["X_good"], ["annotation"], group_key="study", counts="umi", n_boot=0)
    assert score(found, "macro_f1", model_id="pca", head="logistic", group=MEAN) > 0.8


def test_large_data_are_sampled_and_several_models_have_their_own_twins():
    adata = embedded(300)
    adata.obsm["X_other"] = adata.obsm["X_good"][:, ::-1].copy()
    twins = {"X_good": "X_noise", "X_other": "X_zero"}
    adata.obsm["X_zero"] = np.random.default_rng(9).normal(size=(300, 3))
    found = scjax.eval.run(
        adata,
        list(twins),
        ["annotation"],
        group_key="donor",
        controls={"random_init": twins},
        max_cells=150,
        n_boot=20,
    )
    assert 140 <= found.facts["n_cells"] <= 170 and found.facts["n_cells_labelled"] == 300
    against = {
        (r["model_id"], r["versus"]) for r in found.rows if r["versus_role"] == "random-initialised twin"
    }
    assert against == {("X_good", "random_init of X_good"), ("X_other", "random_init of X_other")}


def test_progress_is_shown_when_asked(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    scjax.eval.run(embedded(120), ["X_good"], ["annotation"], n_boot=0, maps=False, progress=True)
    assert "evaluating: annotation, X_good" in capsys.readouterr().err

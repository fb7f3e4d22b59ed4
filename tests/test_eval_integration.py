"""Integration and clustering: planted truth, agreement with published packages, refusals and reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import planted, score

import scjax.eval
from scjax.eval import environment, stats
from scjax.eval.clustering import _score
from scjax.eval.integration import AXES
from scjax.eval.tasks import TASKS

GOLDEN = Path(__file__).parent / "golden" / "eval_scib.npz"  # made by the script beside it


def test_clustering_orders_embeddings_by_their_quality():
    X, label, *_ = planted()
    nmi = {name: scjax.eval.clustering(x, label, n_boot=0) for name, x in X.items()}
    for head, setting in (("leiden", "resolution 1.0"), ("leiden", "sweep mean"), ("kmeans", "")):
        value = {name: score(r, "nmi", head=head, setting=setting) for name, r in nmi.items()}
        assert value["oracle"] > value["good"] > value["weak"] > value["noise"], (head, setting, value)
    best = score(nmi["good"], "nmi", setting="best NMI (oracle)")
    assert best >= score(nmi["good"], "nmi", setting="resolution 1.0")


def test_integration_keeps_biology_and_mixing_apart():
    X, label, _, batch = planted()
    shift = np.where(batch == "b0", 4.0, 0.0)[:, None]
    pre = X["good"] + shift * np.eye(1, 12, 11)
    found = {
        name: scjax.eval.integration(x, label, batch, pre=pre, n_boot=0)
        for name, x in {**X, "pre": pre}.items()
    }
    bio, mixing = ({n: score(r, axis) for n, r in found.items()} for axis in ("bio", "batch"))
    assert bio["oracle"] > bio["good"] > bio["weak"] > bio["noise"]
    assert mixing["noise"] > 0.7 > mixing["pre"]  # noise mixes perfectly: why the axes are never summed
    assert mixing["good"] > mixing["pre"] + 0.2
    assert score(found["good"], "pcr") > 0.9 and score(found["pre"], "pcr") == 0
    per_label = [r for r in found["good"].rows if r["metric"] == "cilisi" and r["label"]]
    assert {r["label"] for r in per_label} == {"t0", "t1", "t2", "t3"}
    assert score(found["good"], "cilisi") == pytest.approx(np.mean([r["value"] for r in per_label]))


def test_without_a_batch_effect_its_removal_is_undefined():
    X, label, *_ = planted()
    batch = np.array(["b0", "b1"])[pd.Series(label).groupby(label).cumcount() % 2]
    found = scjax.eval.integration(X["good"], label, batch, pre=X["oracle"], n_boot=0)
    pcr = next(r for r in found.rows if r["metric"] == "pcr")
    assert pcr["status"] == "nan" and pcr["value"] is None and "before integration" in pcr["note"]
    assert "pcr" not in next(r for r in found.rows if r["metric"] == "batch")["note"]


def test_measures_equal_those_of_scib_metrics_and_scikit_learn():
    golden = np.load(GOLDEN)
    expected = dict(zip(golden["names"].tolist(), golden["values"].tolist(), strict=True))
    assert any(v.startswith("scib-metrics==") for v in golden["versions"])
    y, one = golden["label"], np.ones((1, 150), np.uint8)
    found = scjax.eval.integration(golden["after"], y, golden["batch"], pre=golden["before"], n_boot=0)
    shared = [m for metrics in AXES.values() for m in metrics if not m.startswith("kmeans")]
    mine = {m: score(found, m) for m in [*shared, "silhouette_batch"]}
    guessed = stats.classification(y, golden["guess"], np.ones(3, bool), one)
    mine |= {m: v[0] for m, v in guessed.items() if m in expected}
    mine |= {m: v[0] for m, v in stats.agreement(y, golden["clusters"], one).items()}
    mine |= {m: v[0] for m, v in stats.ranking(golden["score"], y == 1, one).items()}
    mine["ami"] = _score(y, golden["clusters"], one)["ami"][0]
    assert mine.keys() == expected.keys()
    for metric, value in expected.items():
        assert mine[metric] == pytest.approx(value, abs=1e-6), metric


@pytest.mark.parity
def test_the_packages_still_give_the_values_we_hold_ourselves_to(tmp_path):
    fresh = tmp_path / "fresh.npz"
    subprocess.run([sys.executable, GOLDEN.with_suffix(".py"), fresh], check=True)
    golden, again = np.load(GOLDEN), np.load(fresh)
    assert golden["names"].tolist() == again["names"].tolist()
    for name, old, new in zip(golden["names"], golden["values"], again["values"], strict=True):
        assert new == pytest.approx(old, abs=1e-6), (name, golden["versions"], again["versions"])


@pytest.mark.slow
def test_kbet_is_there_when_asked_for():
    X, label, _, batch = planted(120, n_types=2)
    mixed = scjax.eval.integration(X["good"], label, batch, n_boot=0, kbet=True)
    apart = X["good"] + np.where(batch == "b0", 9, 0)[:, None]
    assert (
        score(mixed, "kbet")
        > 0.5
        > score(scjax.eval.integration(apart, label, batch, n_boot=0, kbet=True), "kbet")
    )


def test_importing_scib_metrics_leaves_the_environment_as_it_was(monkeypatch):
    pytest.importorskip("scib_metrics")
    for before in (None, "true"):
        for name in [m for m in sys.modules if m.startswith("scib_metrics")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
        if before is not None:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", before)
        assert environment.missing("scib_metrics") == ""
        assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == before


def test_agreement_intervals_hold_their_value_even_for_noise():
    X, label, *_ = planted()
    found = scjax.eval.clustering(X["noise"], label, n_boot=300)
    rows = [r for r in found.rows if r["metric"] in ("nmi", "ari") and r["ci_low"] is not None]
    assert rows and all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in rows)


def axes(results: scjax.eval.Results) -> tuple[float, float]:
    return score(results, "bio"), score(results, "batch")


def test_noise_mixes_best_and_does_not_win():
    X, label, _, batch = planted(n=400, n_groups=4)
    X["model"] = X["good"] + np.where(batch == "b0", 4.0, 0.0)[:, None] * np.eye(1, 12, 11)
    found = {n: axes(scjax.eval.integration(X[n], label, batch, n_boot=0)) for n in ("model", "noise")}
    assert found["noise"][1] > found["model"][1] + 0.05  # which is why the axes are never summed
    assert found["model"][0] > found["noise"][0] + 0.2
    task = TASKS["integration"]
    assert task.leading[0].metric == "bio" and "noise" in task.blind


def test_isolated_labels_are_those_of_the_fewest_batches():
    X, label, _, batch = planted()
    even = scjax.eval.integration(X["good"], label, batch, n_boot=0)
    row = next(r for r in even.rows if r["metric"] == "isolated_labels")
    assert row["status"] == "nan" and "none is isolated" in row["note"]
    batch = np.where(label == "t0", "b0", batch)
    X["buried"] = X["good"].copy()
    X["buried"][label == "t0"] = X["good"][np.random.default_rng(0).permutation(360)][label == "t0"]
    value = {n: score(scjax.eval.integration(X[n], label, batch, n_boot=0), "isolated_labels")
             for n in ("oracle", "good", "buried")}  # fmt: skip
    assert value["oracle"] > value["good"] > value["buried"] + 0.1


def test_what_random_batches_would_score_stands_beside_ilisi():
    X, label, _, batch = planted()
    found = scjax.eval.integration(X["good"], label, batch, n_boot=0)
    row = next(r for r in found.rows if r["metric"] == "ilisi")
    null = float(row["note"].rsplit(" ", 1)[1])
    assert 0.8 < null < 1 and 0 < null - row["value"] < 0.08  # types differ a little in their batches
    assert score(found, "batch") == pytest.approx(
        np.mean([score(found, m) for m in ("bras", "ilisi", "cilisi", "graph_connectivity")])
    )


def test_large_data_are_scored_in_repeated_samples():
    X, label, _, batch = planted(n=500)
    whole = scjax.eval.integration(X["good"], label, batch, n_boot=50)
    parts = scjax.eval.integration(X["good"], label, batch, n_boot=50, max_cells=150, repeats=4)
    assert whole.facts["integration_samples"] == 1 and parts.facts["integration_samples"] == 4
    first = scjax.eval.integration(X["good"], label, batch, n_boot=50, max_cells=150, repeats=1)
    rows = [next(r for r in f.rows if r["metric"] == "graph_connectivity") for f in (whole, first, parts)]
    assert [r["ci_low"] is None for r in rows] == [
        True,
        True,
        False,
    ]  # its spread over samples is its interval
    bio = [next(r for r in f.rows if r["metric"] == "bio") for f in (whole, first, parts)]
    assert all(r["ci_low"] < r["value"] < r["ci_high"] for r in bio)
    assert bio[2]["ci_high"] - bio[2]["ci_low"] < bio[1]["ci_high"] - bio[1]["ci_low"]
    assert bio[2]["value"] != bio[1]["value"] and "4 samples" in bio[2]["ci_method"]
    again = scjax.eval.integration(X["good"], label, batch, n_boot=50, max_cells=150, repeats=4)
    assert [r["value"] for r in again.rows] == [r["value"] for r in parts.rows]


def test_clusterings_of_large_data_are_repeated_too():
    X, label, *_ = planted(n=400)
    found = scjax.eval.clustering(X["good"], label, n_boot=20, max_cells=150, repeats=3)
    ami = next(r for r in found.rows if r["metric"] == "ami" and r["head"] == "kmeans")
    assert ami["ci_low"] <= ami["value"] <= ami["ci_high"] and found.facts["clustering_samples"] == 3
    assert score(found, "nmi", setting="resolution 1.0") > 0.5


def test_samples_average_to_their_mean_and_their_interval_narrows_with_their_number():
    rng = np.random.default_rng(0)
    draws = [np.append(m, m + 0.1 * rng.normal(size=2000)) for m in rng.normal(size=5) * 0.1]
    whole = stats.over_repeats(draws, 2000, 0, "test")
    assert whole[0] == pytest.approx(np.mean([d[0] for d in draws]))
    between = np.std([d[0] for d in draws])
    assert np.std(whole[1:]) == pytest.approx(np.hypot(0.1, between) / np.sqrt(5), rel=0.15)
    same = [np.append(m, m + 0.1 * draws[0][1:]) for m in (1.0, 2.0)]  # one set of cells, scored twice
    shared = stats.over_repeats(same, 2000, 0, "test", same_cells=True)
    assert np.corrcoef(shared[1:] - np.round(shared[1:] * 2) / 2, draws[0][1:])[0, 1] > 0.9
    assert (stats.over_repeats(draws[:1], 2000, 0, "test") == draws[0]).all()
    undefined = np.array([np.nan])
    assert np.isnan(stats.over_repeats([undefined, undefined], 10, 0, "test")).all()
    assert stats.over_repeats([undefined, *draws[1:]], 2000, 0, "test")[0] == pytest.approx(
        np.mean([d[0] for d in draws[1:]])
    )


@pytest.mark.parametrize("kind", ["nan", "constant", "single batch", "confounded", "other cells"])
def test_what_published_metrics_score_as_if_it_were_sound_is_refused(kind):
    X, label, _, batch = planted(n=200)
    X, message = X["good"], "embedding"
    if kind == "nan":
        X[7, 3], message = np.nan, "1 of 200 cells hold NaN.*row 7"
    elif kind == "constant":
        X[:], message = X[0], "constant"
    elif kind == "single batch":
        batch, message = np.repeat("b", 200), "only one batch.*leave the task 'integration' out"
    elif kind == "confounded":
        batch, message = np.char.add("b", label), "confounded.*leave the task 'integration' out"
    else:
        cells = [f"c{i}" for i in range(200)]
        label, batch = pd.Series(label, cells), pd.Series(batch, cells[::-1])
        message = "labels and batch name different cells: row 0 is 'c0' in labels and 'c199' in batch"
    with pytest.raises(ValueError, match=message):
        scjax.eval.integration(X, label, batch, n_boot=0)

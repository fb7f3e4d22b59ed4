"""Paired differences: sign, pairing, the direction of a metric, p-values and their correction."""

from __future__ import annotations

import numpy as np
import pytest

import scjax.eval
from scjax.eval import stats, tables, verdict
from scjax.eval.compare import conclude
from scjax.eval.results import Results
from scjax.eval.schema import MEAN

from test_eval import planted  # isort: skip


def scored(*pairs: tuple[str, str, np.ndarray], label: np.ndarray, group: np.ndarray) -> Results:
    """Annotation by neighbours of (name, kind, features)."""
    results = Results()
    for name, kind, X in pairs:
        about = {"name": name, "kind": kind, "heads": ("knn",), "n_boot": 400}
        results.extend(scjax.eval.annotation(X, label, group, **about))
    return results


def test_paired_differences_have_the_right_sign_and_use_the_pairing():
    X, label, group, _ = planted(n=240, better=1.1)
    worse = X["better"] + 0.7 * np.random.default_rng(1).normal(size=X["better"].shape)
    models = [("better", "model", X["better"]), ("noise", "model", X["noise"])]
    results = scored(*models, ("worse", "baseline", worse), label=label, group=group)
    frame = conclude(results, {"better": "noise", "noise": "better"}).to_frame()
    mean = frame[frame["metric"].eq("macro_f1") & frame["group"].eq(MEAN)].set_index(["model_id", "versus"])
    assert mean.loc[("better", "noise"), "ci_low"] > 0 > mean.loc[("noise", "better"), "ci_high"]
    assert mean.loc[("better", "noise"), "value"] == pytest.approx(-mean.loc[("noise", "better"), "value"])
    assert set(mean.loc[mean["versus_role"] == verdict.BEST].index.get_level_values(1)) == {"worse"}
    width = mean["ci_high"] - mean["ci_low"]
    alone = np.hypot(width["better", ""], width["worse", ""])
    assert width["better", "worse"] < 0.9 * alone  # errors are shared, so pairing helps
    assert set(frame.loc[frame["versus"].ne(""), "group"]) == {"g0", "g1", "g2", MEAN}
    assert (mean.loc[("better", "noise"), ["p_value", "p_holm"]] < 0.05).all()


def test_a_model_does_not_differ_from_its_copy():
    X, label, group, _ = planted(n=120)
    copies = (("one", "model", X["good"]), ("same", "baseline", X["good"]))
    results = conclude(scored(*copies, label=label, group=group))
    found = [r for r in results.rows if r["versus"]]
    assert found and all(r["value"] == r["ci_low"] == r["ci_high"] == 0 and r["p_value"] == 1 for r in found)


def rows(metric: str, **values: np.ndarray) -> Results:
    results = Results()
    for name, score in values.items():
        kind = "baseline" if name.startswith("pca") else "model"
        results.add(score, task="integration", model_id=name, model_kind=kind, metric=metric)
    return results


def test_the_partner_is_the_best_baseline_and_there_is_none_without_resamples():
    score = 0.5 + 0.01 * np.random.default_rng(0).normal(size=101)
    results = conclude(rows("bio", m=score, pca=score - 0.1, pca2=score - 0.05))
    (difference,) = [r for r in results.rows if r["versus"]]
    assert difference["versus"] == "pca2" and difference["value"] == pytest.approx(0.05)
    assert not [r for r in conclude(rows("bio", m=score[:1], pca=score[:1])).rows if r["versus"]]


@pytest.mark.parametrize(("direction", "state"), [("max", "ahead"), ("min", "behind")])
def test_ahead_means_better_whichever_way_the_metric_points(direction, state):
    difference = {"value": 0.2, "ci_low": 0.1, "ci_high": 0.3, "direction": direction}
    assert verdict.state(difference) == state
    value, low, high = tables.advantage(difference)
    assert low <= value <= high and (value > 0) == (state == "ahead")


def test_holm_corrects_step_down():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(stats.holm([])) == 0


def test_p_values_are_uniform_without_an_effect():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        x = rng.normal(size=60)
        p.append(stats.p_value(stats.mean(x, stats.resample(60, 199, rng.integers(1e9), "p"))))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.1 and 0.4 < np.mean(p) < 0.6


def test_a_correction_counts_every_model_of_the_task():
    rng = np.random.default_rng(0)
    pca = rng.normal(0.5, 0.01, 1001)
    many = {f"m{i}": pca + rng.normal(0.02, 0.01, 1001) for i in range(8)}
    few = conclude(rows("bio", m0=many["m0"], pca=pca)).to_frame()
    all_ = conclude(rows("bio", **many, pca=pca)).to_frame()
    one = few[few["versus"].ne("")].iloc[0]
    same = all_[all_["versus"].ne("") & all_["model_id"].eq("m0")].iloc[0]
    assert one["p_holm"] == one["p_value"] == same["p_value"] < same["p_holm"]


def test_rows_are_written_compressed_and_as_parquet(tmp_path):
    import pandas as pd

    results = conclude(rows("bio", m=np.array([0.7, 0.69, 0.71]), pca=np.array([0.6, 0.61, 0.59])))
    results.facts = {"dataset": "d"}
    results.to_jsonl(tmp_path / "r.jsonl.gz")
    assert (tmp_path / "r.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert Results.read(tmp_path / "r.jsonl.gz").rows == results.rows
    results.to_parquet(tmp_path / "r.parquet")
    back = pd.read_parquet(tmp_path / "r.parquet")
    assert list(back) == list(results.to_frame()) and back["value"].tolist() == [0.7, 0.6, pytest.approx(0.1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl.gz", "r.parquet"]

"""Perturbation prediction: planted effects, predictions that try to game the measures, splits, refusals."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scjax.eval
from scjax.eval import perturbation_metrics as measure
from scjax.eval.perturbation_data import Condition, Keys, lognormalise, perturbation_split, study

N_GENES, N_CELLS, N_PERTURBED = 80, 26, 16
GENES = [f"G{i}" for i in range(N_GENES)]
TRAIN = GENES[:5]
TEST = GENES[5:N_PERTURBED]
GOLDEN = Path(__file__).parent / "golden" / "eval_cell_eval.npz"


@functools.cache
def world(size: float = 1.0) -> dict[str, np.ndarray]:
    """Base expression, a shared effect and effects of single genes that follow from their embeddings."""
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(N_GENES, 3))
    own = 0.35 * embedding @ rng.normal(size=(3, N_GENES)) + rng.normal(0, 0.1, (N_GENES, N_GENES))
    return {
        "base": rng.gamma(1.0, 6.0, N_GENES) + 1,
        "effect": size * (rng.normal(0, 0.4, N_GENES) + own),
        "embedding": embedding,
    }


def draw(names: list[str], n: int, seed: int, size: float = 1.0, shift: float = 0.0) -> ad.AnnData:
    """n cells of each perturbation (counts); effects of combinations add up."""
    rng, w = np.random.default_rng(seed), world(size)
    label = np.repeat(names, n)
    effect = {"control": np.zeros(N_GENES)}
    effect |= {p: sum(w["effect"][GENES.index(g)] for g in p.split("+")) for p in set(names) - {"control"}}
    tilt = shift * np.sin(np.arange(N_GENES))
    rate = w["base"] * np.exp(np.stack([effect[p] for p in label]) + tilt)
    counts = rng.poisson(rate * rng.lognormal(0, 0.2, len(label))[:, None]).astype(np.float32)
    obs = pd.DataFrame({"perturbation": label}, index=[f"c{seed}_{i}" for i in range(len(label))])
    return ad.AnnData(counts, obs, pd.DataFrame(index=GENES))


@functools.cache
def real() -> ad.AnnData:
    return ad.concat([draw(GENES[:N_PERTURBED], N_CELLS, 0), draw(["control"], 80, 1)])


@functools.cache
def fresh(n: int = 150) -> ad.AnnData:
    """Other cells of the same perturbations, on the scale of predictions."""
    cells = draw(["control", *GENES[:N_PERTURBED]], n, 2)
    cells.X = lognormalise(cells.X)
    return cells


def profiles() -> dict[str, pd.DataFrame]:
    """Predicted means of falling quality, with the control cells that they start from."""
    rng = np.random.default_rng(3)
    mean = (
        pd.DataFrame(fresh().X.toarray(), columns=GENES)
        .groupby(fresh().obs["perturbation"].to_numpy())
        .mean()
    )
    control, truth = mean.loc["control"], mean.loc[TEST]
    blind = pd.DataFrame([mean.loc[TRAIN].mean()] * len(TEST), index=TEST)
    predicted = {
        "truth": truth,
        "good": truth + rng.normal(0, 0.25, truth.shape),
        "blind": blind,
        "guess": blind * 0 + control + rng.normal(0, 0.3, truth.shape),
    }
    start = control.to_frame("control").T
    return {name: pd.concat([p, start]) for name, p in predicted.items()}


def run(predictions, **keywords):
    keywords = {"train": TRAIN, "n_boot": 0} | keywords
    return scjax.eval.perturbation(keywords.pop("cells", real()), predictions, **keywords)


def values(results, metric: str, setting: str = "") -> dict[str, float]:
    """Model → its value (one track)."""
    frame = results.to_frame()
    frame = frame[frame["metric"].eq(metric) & frame["label"].eq("") & frame["versus"].eq("")]
    frame = frame[frame["setting"].eq(setting)]
    assert frame["track"].nunique() <= 1
    return dict(zip(frame["model_id"], frame["value"], strict=True))


@functools.cache
def planted():
    return run(profiles(), n_boot=100)


# ------------------------------------------------------------------------------- planted truth


def test_predictions_are_ordered_by_their_quality_in_every_family():
    r = planted()
    for metric in ("pearson_delta", "de_auprc", "cosine_delta", "pearson_top20"):
        v = values(r, metric)
        assert v["truth"] > v["good"] > v["blind"] > v["guess"], (metric, v)
    for metric in ("rmse", "mae", "wmse", "edistance", "mmd"):
        v = values(r, metric)
        assert v["truth"] < v["good"] and v["truth"] < v["blind"] < v["guess"], (metric, v)
    for metric in ("pearson_systema", "discrimination", "discrimination_l1", "discrimination_l2"):
        v = values(r, metric)
        assert v["truth"] >= v["good"] > max(v["blind"], v["guess"]) + 0.1, (metric, v)
    frame = r.to_frame()
    assert set(frame.loc[frame["status"] != "ok", "metric"]) <= {"calibrated"}


def test_a_prediction_that_is_blind_to_the_perturbation_is_shown_at_its_floor():
    r = planted()
    assert values(r, "pearson_delta")["blind"] > 0.3  # what looks like success
    assert abs(values(r, "pearson_systema")["blind"]) < 0.2
    assert abs(values(r, "discrimination")["blind"] - 0.5) < 0.15
    for metric in ("pearson_delta", "pearson_systema", "rmse", "discrimination"):
        v = values(r, "calibrated", metric)
        assert v["train_mean"] == 0 and v["half_split"] == 1
        assert v["truth"] > 0.7 > 0.25 > abs(v["blind"]), (metric, v)
    alike = values(r, "similarity")
    assert alike["train_mean"] == pytest.approx(1) and alike["half_split"] < 0.9


def test_differences_to_the_best_simple_predictor_have_intervals_and_corrected_p():
    frame = planted().to_frame()
    found = frame[frame["versus"].ne("") & frame["metric"].eq("pearson_delta")].set_index("model_id")
    assert found.loc["truth", "ci_low"] > 0 and found.loc["guess", "ci_high"] < 0
    assert (found["p_holm"] >= found["p_value"]).all() and found["p_holm"].notna().all()
    alone = frame[frame["label"].ne("") & frame["model_id"].eq("good") & frame["metric"].eq("rmse")]
    assert set(alone["label"]) == set(TEST)
    row = frame[frame["model_id"].eq("good") & frame["metric"].eq("rmse") & frame["label"].eq("")].iloc[0]
    assert row["value"] == pytest.approx(alone["value"].mean()) and row["direction"] == "min"


def test_results_are_written_read_and_gated(tmp_path):
    r = planted()
    r.to_jsonl(tmp_path / "r.jsonl")
    again = scjax.eval.Results.read(tmp_path / "r.jsonl")
    assert len(again.rows) == len(r.rows) and again.panels == r.panels
    panel = next(p for p in r.panels if p["panel"] == "effects")
    assert panel["names"] == sorted(TEST) and len(panel["effect"]) == len(panel["baseline"]) == len(TEST)
    failed = [g.message for g in r.gates() if g.level == "fail"]
    assert any("guess" in m for m in failed) and not any("truth" in m or "good" in m for m in failed)
    assert "PERTURBATION" in str(r).upper()


# ------------------------------------------------------------------------------- gaming


def scaled(factor: float) -> dict[str, pd.DataFrame]:
    control = pd.DataFrame(fresh().X.toarray(), columns=GENES)[
        fresh().obs["perturbation"].eq("control").to_numpy()
    ]
    return {n: control.mean() + factor * (p - control.mean()) for n, p in profiles().items() if n != "guess"}


@pytest.mark.parametrize("factor", [5.0, 2.0])
def test_exaggerated_effects_score_no_better(factor):
    plain, loud = run(scaled(1.0)), run(scaled(factor))
    for metric, sign in [
        ("pearson_delta", 1), ("pearson_systema", 1), ("discrimination", 1), ("discrimination_l1", 1),
        ("discrimination_l2", 1), ("de_auprc", 1), ("de_overlap", 1), ("de_direction", 1), ("rmse", -1),
        ("mae", -1), ("wmse", -1), ("edistance", -1), ("mmd", -1),
    ]:  # fmt: skip
        before, after = values(plain, metric), values(loud, metric)
        for name in ("truth", "good", "blind"):
            # a blind effect is the same for all, so its ranks only wander when it grows
            room = 0.1 if name == "blind" and "disc" in metric else 0.02
            assert sign * (after[name] - before[name]) < room, (metric, name)
    assert values(loud, "rmse")["truth"] > 1.5 * values(plain, "rmse")["truth"]


@pytest.mark.parametrize("change", [lambda p: 5 * p, np.log1p, np.expm1, lambda p: p / 5])
def test_another_scale_is_refused(change):
    with pytest.raises(ValueError, match="not on the scale of the truth.*log1p of counts"):
        run({"good": change(profiles()["good"])})


def test_counts_and_differences_in_place_of_expression_are_refused():
    counts = draw(TEST, 5, 4)
    with pytest.raises(ValueError, match="whole numbers"):
        run({"m": counts})
    p = profiles()
    with pytest.raises(ValueError, match="not on the scale"):
        run({"m": p["good"] - p["blind"]})


def test_inflated_variance_scores_no_better():
    rng = np.random.default_rng(5)
    cells = fresh()[fresh().obs["perturbation"].isin(TEST)].copy()
    cells.X = cells.X.toarray()
    wide = cells.copy()
    for p in TEST:
        at = wide.obs["perturbation"].eq(p).to_numpy()
        noise = rng.normal(0, 1.5, wide.X[at].shape)
        wide.X[at] += (noise - noise.mean(0)).astype(np.float32)
    r = run({"honest": cells, "wide": wide})
    for metric in ("pearson_delta", "rmse", "discrimination", "de_auprc"):
        v = values(r, metric)
        assert v["wide"] == pytest.approx(v["honest"], abs=1e-4), metric
    for metric in ("edistance", "mmd", "variance_error"):
        v = values(r, metric)
        assert v["wide"] > 2 * max(v["honest"], 0.02), (metric, v)
    assert values(r, "de_recall")["wide"] <= values(r, "de_recall")["honest"]


def test_effects_of_truth_and_prediction_do_not_share_control_noise():
    """Perturbations without any effect: a shared control mean would correlate every prediction with them."""
    cells = ad.concat([draw(GENES[:12], 40, 6, size=0.0), draw(["control"], 40, 7)])
    v = values(run({}, cells=cells), "pearson_delta")
    assert abs(v["train_mean"]) < 0.2, v
    data = study(cells, Keys("perturbation", "control"), None, TRAIN, None, 0)
    ours, theirs = data.control[""]
    assert not set(ours) & set(theirs) and len(ours) == len(theirs) == 20
    D = np.stack([data.centroid(Condition(g)) for g in GENES[:12]])
    shared = D[:5].mean(0) - data.mean(ours), D[6] - data.mean(ours)
    assert measure.pearson(*[d[None] for d in shared])[0, 0] > 0.4  # what it would have been


# ------------------------------------------------------------------------------- simple predictors


def test_gene_embeddings_that_know_the_effects_beat_their_twin_and_random():
    rng = np.random.default_rng(8)
    tables = {
        "knows": pd.DataFrame(world()["embedding"], index=GENES),
        "untrained": pd.DataFrame(rng.normal(size=(N_GENES, 3)), index=GENES),
    }
    r = run({}, train=None, gene_embeddings=tables, twins={"knows": "untrained"}, n_boot=100)
    v, kinds = (
        values(r, "pearson_systema"),
        dict(zip(*r.to_frame()[["model_id", "model_kind"]].T.to_numpy(), strict=True)),
    )
    for method in ("linear", "kernel ridge", "nearest", "linear G+P"):
        assert v[f"{method}(knows)"] > v[f"{method}(random_init)"], (method, v)
        assert kinds[f"{method}(knows)"] == "model" and kinds[f"{method}(random_init)"] == "control"
    assert v["linear(knows)"] > v["linear(random)"] + 0.2 and kinds["linear(random)"] == "control"
    frame = r.to_frame()
    twin = frame[frame["versus"].eq("linear(random_init)") & frame["metric"].eq("pearson_systema")]
    assert len(twin) == 1 and twin["ci_low"].iloc[0] > 0
    beside = run({"m": profiles()["good"]}, gene_embeddings={"knows": tables["knows"]}).to_frame()
    assert set(beside.loc[beside["model_id"].eq("nearest(knows)"), "model_kind"]) == {"baseline"}
    strange = {"strange": tables["knows"].add_prefix("d").set_axis([f"ENSG{i}" for i in range(N_GENES)])}
    rows = [r for r in run({}, gene_embeddings=strange).rows if r["status"] == "skipped"]
    assert [r["model_id"] for r in rows] == ["linear(strange)"] and "must hold their names" in rows[0]["note"]
    rival = run({}, gene_embeddings=tables, baselines=["untrained"]).to_frame()
    assert set(rival.loc[rival["model_id"].eq("linear(untrained)"), "model_kind"]) == {"baseline"}


def test_what_is_held_out_in_turn_is_never_learnt_from():
    data = study(doubles(), Keys("perturbation", "control"), None, None, None, 0)
    assert sorted(data.test) == sorted(data.rows) and len(data.folds) == len(data.rows)
    for fold in data.folds:
        (held,) = fold.test
        assert held not in fold.train
        if len(held.parts) == 1:
            assert not any(held.perturbation in c.parts for c in fold.train)
    in_lines = study(lines(), Keys("perturbation", "control", "line"), None, None, None, 0)
    assert len(in_lines.folds) == 5
    for fold in in_lines.folds:
        assert not {c.context for c in fold.test} & {c.context for c in fold.train}


@functools.cache
def doubles() -> ad.AnnData:
    names = [*GENES[:8], "G0+G1", "G3+G2", "G4+ctrl", "G0+G7", "G6+G7"]
    known = [n.replace("G4+ctrl", "G9") for n in names]
    cells = ad.concat([draw(known, 20, 9), draw(["control"], 60, 10)])
    return cells


def test_combinations_are_told_apart_by_what_was_seen_and_additive_answers_those_it_can():
    r = run({}, cells=doubles(), train=[*GENES[:6], "G9"])
    frame = r.to_frame()
    tracks = frame[frame["label"].ne("")].groupby("track")["label"].agg(set).to_dict()
    assert tracks == {
        "2 genes, 2 seen": {"G0+G1", "G2+G3"},
        "2 genes, 1 seen": {"G0+G7"},
        "2 genes, 0 seen": {"G6+G7"},
        "unseen gene": {"G6", "G7"},
    }
    assert set(frame.loc[frame["model_id"].eq("additive"), "track"]) == {"2 genes, 2 seen"}
    two = frame[frame["track"].eq("2 genes, 2 seen") & frame["label"].eq("") & frame["metric"].eq("rmse")]
    rmse = dict(zip(two["model_id"], two["value"], strict=True))
    assert rmse["additive"] < min(rmse["train_mean"], rmse["matching_mean"], rmse["no_change"])
    method = two.loc[two["model_id"].eq("additive"), "ci_method"].iloc[0]
    assert method == "" and r.facts["n_test"]["unseen gene"] == 2  # n_boot=0: no interval


def test_names_of_one_perturbation_are_one():
    keys = Keys("perturbation", "control")
    assert keys.canonical("KLF1+ctrl") == keys.canonical(" KLF1") == "KLF1"
    assert keys.canonical("B+A") == "A+B" and keys.canonical("ctrl") == "control"
    assert Keys("perturbation", "control", kind="chemical").canonical("B+A") == "B+A"


@functools.cache
def lines() -> ad.AnnData:
    parts = {
        line: ad.concat(
            [draw(GENES[:3], 15, 20 + i, shift=i / 2), draw(["control"], 40, 30 + i, shift=i / 2)]
        )
        for i, line in enumerate(("a", "b", "c", "d", "e"))
    }
    return ad.concat(parts, label="line", index_unique="-")


def test_contexts_are_held_out_in_turn_with_intervals_over_cells():
    cells = lines()[lines().obs["perturbation"].isin(["G0", "control"])].copy()
    r = run({}, cells=cells, train=None, context_key="line", kind="environmental", n_boot=60)
    assert r.facts["split_scheme"] == "each context held out in turn"
    frame = r.to_frame()
    assert set(frame["track"]) == {"unseen context"} and not frame["metric"].isin(["pearson_systema"]).any()
    row = frame[
        frame["model_id"].eq("train_mean") & frame["metric"].eq("pearson_delta") & frame["label"].eq("")
    ]
    row = row[row["setting"].eq("")].iloc[0]
    assert row["ci_low"] < row["value"] < row["ci_high"] and "real cells" in row["ci_method"]
    assert {"nearest(control profile)", "linear(control profile)"} <= set(frame["model_id"])
    assert row["value"] > 0.5


def test_seen_contexts_have_a_mean_of_their_own_which_is_then_the_floor():
    cells = lines()
    train = {line: ["G0", "G1"] for line in "abcd"}
    r = run({}, cells=cells, train=train, context_key="line")
    frame = r.to_frame()
    assert set(frame["track"]) == {"unseen gene", "unseen context", "unseen gene in an unseen context"}
    assert r.facts["floor"] == {
        "unseen gene": "context_mean",
        "unseen context": "train_mean",
        "unseen gene in an unseen context": "train_mean",
    }


def test_doses_between_seen_ones_take_the_nearest():
    cells = ad.concat([draw([g], 15, 40 + i) for i, g in enumerate(GENES[:4])] + [draw(["control"], 40, 50)])
    cells.obs["drug"] = np.where(cells.obs["perturbation"] == "control", "DMSO", "x")
    cells.obs["dose"] = cells.obs["perturbation"].map({"G0": 1, "G1": 10, "G2": 100, "G3": 12, "control": 0})
    cells.obs["fit"] = ~cells.obs["dose"].isin([12])
    keywords = {"perturbation_key": "drug", "control": "DMSO", "dose_key": "dose", "kind": "chemical"}
    r = run({}, cells=cells, train="fit", **keywords)
    frame = r.to_frame()
    assert set(frame["track"]) == {"unseen dose"}
    assert set(frame.loc[frame["label"].ne(""), "label"]) == {"x at 12"}
    data = study(cells, Keys("drug", "DMSO", None, "dose", "chemical"), None, "fit", None, 0)
    expected = data.centroid(Condition("x", "10")) - data.base("")
    true = data.centroid(Condition("x", "12")) - data.mean(data.control[""][0])
    assert values(r, "pearson_delta")["nearest(dose)"] == pytest.approx(
        measure.pearson(true[None], expected[None])[0, 0]
    )


# ------------------------------------------------------------------------------- splits


def test_a_split_keeps_unseen_genes_out_of_training_and_half_of_the_controls():
    obs = doubles().obs
    train = perturbation_split(obs, "perturbation", "control", seed=3)
    keys = Keys("perturbation", "control")
    seen = {g for n in obs["perturbation"][train] if n != "control" for g in keys.canonical(n).split("+")}
    held = {keys.canonical(n) for n in obs["perturbation"][~train]} - {"control"}
    unseen = {n for n in held if "+" not in n}
    assert len(unseen) == 2 and not unseen & seen
    assert train[obs["perturbation"] == "control"].sum() == 30
    cells = doubles().copy()
    cells.obs["fit"] = train
    r = run({}, cells=cells, train="fit")
    assert r.facts["controls_held_out"] is True
    data = study(cells, keys, None, "fit", None, 0)
    assert (
        cells.obs["fit"].iloc[data.control[""][1]].all()
        and not cells.obs["fit"].iloc[data.control[""][0]].any()
    )


def test_splits_by_combination_context_and_family():
    train = perturbation_split(doubles().obs, "perturbation", "control", "combination", fraction=0.5)
    held = set(doubles().obs["perturbation"][~train]) - {"control"}
    assert len(held) == 2 and all("+" in h for h in held)
    obs = lines().obs
    train = perturbation_split(obs, "perturbation", "control", "context", context_key="line", fraction=0.4)
    perturbed = obs["perturbation"] != "control"
    assert obs["line"][~train & perturbed].nunique() == 2
    assert not set(obs["line"][~train & perturbed]) & set(obs["line"][train & perturbed])
    families = {g: f"family {i // 4}" for i, g in enumerate(GENES)}
    obs = real().obs
    train = perturbation_split(obs, "perturbation", "control", families=families)
    held = set(obs["perturbation"][~train]) - {"control"}
    assert len(held) == 4 and len({families[h] for h in held}) == 1
    with pytest.raises(ValueError, match="needs perturbations of several genes"):
        perturbation_split(obs, "perturbation", "control", "combination")


# ------------------------------------------------------------------------------- refusals


def test_what_is_missing_is_named():
    good = profiles()["good"]
    with pytest.raises(
        ValueError, match=r"no control cells: none is called 'ctl' \(there are: .*name the unperturbed"
    ):
        run({"m": good}, control="ctl")
    with pytest.raises(ValueError, match="lacks 1 of 11 held-out conditions, the first 'G5'"):
        run({"m": good.drop(index="G5")})
    with pytest.raises(ValueError, match="0 gene names in common.*use the var_names"):
        run({"m": good.set_axis([f"ENSG{i}" for i in range(N_GENES)], axis=1)})
    with pytest.raises(KeyError, match="perturbation column 'gene' is not in obs"):
        run({"m": good.rename_axis("gene")}, perturbation_key="gene")
    with pytest.raises(ValueError, match="NaN or infinite"):
        run({"m": good.mask(good > good.max().max() - 1e-9)})
    with pytest.raises(ValueError, match="index has 1 levels; needed: perturbation, line"):
        run({"m": good}, cells=lines(), train=None, context_key="line")
    with pytest.raises(KeyError, match="train= names 'XYZ'"):
        run({"m": good}, train=["XYZ"])
    with pytest.raises(ValueError, match="leaves no perturbation held out"):
        run({"m": good}, train=GENES[:N_PERTURBED])
    with pytest.raises(ValueError, match="no perturbation left for training"):
        run({"m": good}, train=[])
    with pytest.raises(ValueError, match="'train_mean' is taken"):
        run({"train_mean": good})
    with pytest.raises(KeyError, match="twins names 'other'"):
        run({"m": good}, twins={"m": "other"})
    with pytest.raises(TypeError, match="AnnData or a DataFrame"):
        run({"m": good.to_numpy()})
    cells = draw(TEST, 3, 4)
    cells.X = lognormalise(cells.X)
    with pytest.raises(KeyError, match="prediction 'm' has no obs column 'perturbation'"):
        run({"m": ad.AnnData(cells.X, var=cells.var)})
    few = real()[np.r_[0 : N_CELLS * 7, real().n_obs - 12 : real().n_obs]].copy()
    with pytest.raises(ValueError, match="12 control cells; at least 20 are needed"):
        run({}, cells=few)
    logged = real().copy()
    logged.X = lognormalise(logged.X)
    with pytest.raises(ValueError, match="raw counts"):
        run({}, cells=logged)
    mixed = real().copy()
    mixed.obs["fit"] = np.arange(mixed.n_obs) % 2 == 0
    with pytest.raises(ValueError, match="in training and held out.*split by perturbation"):
        run({}, cells=mixed, train="fit")
    twice = pd.DataFrame(np.ones((2, 2)), index=["G0", "G0"])
    with pytest.raises(ValueError, match="several rows for 'G0'"):
        run({}, gene_embeddings={"e": twice})


def test_cells_without_a_perturbation_are_dropped_and_counted():
    cells = real().copy()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(object)
    cells.obs.iloc[:3, 0] = [np.nan, "", "unknown"]
    r = run({}, cells=cells)
    assert r.facts["dropped"] == {"no perturbation or context named": 3}


# ------------------------------------------------------------------------------- measures


def test_unbiased_distances_of_one_distribution_are_nil_whatever_the_number_of_cells():
    rng = np.random.default_rng(11)
    for n in (20, 100):
        found = []
        for _ in range(40):
            x, y = rng.normal(size=(2, n, 30))
            found.append((measure.energy_distance(x, y), measure.mmd(x, y, 7.0)))
        assert np.all(np.abs(np.mean(found, axis=0)) < 3 * np.std(found, axis=0) / np.sqrt(40))
    x, y = rng.normal(size=(2, 30, 5))
    assert measure.energy_distance(x, y + 2) > 1 and measure.mmd(x, y + 2, 2.0) > 0.1


def test_ties_share_their_rank_and_a_constant_says_nothing():
    assert measure.rank_score(np.zeros(5), 0) == pytest.approx(0.6)
    assert measure.rank_score(np.array([0.0, 1, 2, 3]), 0) == 1
    assert measure.rank_score(np.array([3.0, 1, 2, 0]), 0) == pytest.approx(0.25)
    assert values(planted(), "discrimination")["no_change"] == pytest.approx((11 + 1) / 22)
    x = np.random.default_rng(0).normal(size=(1, 9))
    assert measure.pearson(x, np.ones((1, 9)))[0, 0] == 0 == measure.cosine(x, np.zeros((1, 9)))[0, 0]
    assert measure.pearson(x, 3 * x + 1)[0, 0] == pytest.approx(1)


def test_the_gene_aimed_at_does_not_count_for_discrimination():
    """Predictions that change nothing but their own gene know nothing of the effects."""
    control = real().X[real().obs["perturbation"].eq("control").to_numpy()]
    base = np.asarray(lognormalise(control).mean(0)).ravel()
    data = study(real(), Keys("perturbation", "control"), None, TRAIN, None, 0)
    own = pd.DataFrame([data.base("")] * len(TEST), index=TEST, columns=GENES)
    for gene in TEST:
        own.loc[gene, gene] += 3 * np.sign(world()["effect"][GENES.index(gene), GENES.index(gene)])
    assert values(run({"own": own}), "discrimination")["own"] == pytest.approx(12 / 22)
    assert base.shape == (N_GENES,)


def test_measures_agree_with_cell_eval():
    golden = dict(np.load(GOLDEN))
    assert any(v.startswith("cell-eval==") for v in golden["versions"])
    for name, ours in by_us(golden).items():
        np.testing.assert_allclose(ours, golden[f"score_{name}"], atol=1e-6, err_msg=name)


def by_us(g: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The measures that cell-eval has too, on its input."""
    names = [str(n) for n in dict.fromkeys(g["names"]) if n != "control"]
    R, P = (
        {n: g[s][g["names"] == n].astype(np.float64) for n in (*names, "control")}
        for s in ("real", "predicted")
    )
    mean = [np.stack([side[n].mean(0) for n in names]) for side in (R, P)]
    delta = [m - side["control"].mean(0) for m, side in zip(mean, (R, P), strict=True)]
    de = [{n: measure.differential(side[n], side["control"]) for n in names} for side in (R, P)]
    out: dict[str, list[float]] = {}

    def both(name, function, sides):
        out[name] = [float(function(sides[0][[i]], sides[1][[i]])[0, 0]) for i in range(len(names))]

    both("pearson_delta", measure.pearson, delta)
    both("mae", measure.mae, mean)
    both("mae_delta", measure.mae, delta)
    both("mse", lambda a, b: measure.rmse(a, b) ** 2, mean)
    both("mse_delta", lambda a, b: measure.rmse(a, b) ** 2, delta)
    rank = {"l1": measure.mae, "l2": measure.rmse, "cosine": lambda a, b: 1 - measure.cosine(a, b)}
    for metric, distance in rank.items():
        keep = [g["genes"] != n for n in names]
        out[f"discrimination_score_{metric}"] = [
            float(measure.rank_score(distance(delta[0][:, k], delta[1][[i]][:, k])[:, 0], i))
            for i, k in enumerate(keep)
        ]
    pairs = [(de[0][n], de[1][n]) for n in names]
    out["overlap_at_N"] = [measure.de_overlap(r, p.effect, p.significant) for r, p in pairs]
    out["precision_at_N"] = [measure.de_precision(r, p) for r, p in pairs]
    out["de_sig_genes_recall"] = [measure.de_recall(r, p) for r, p in pairs]
    out["de_direction_match"] = [measure.de_direction(r, p.effect) for r, p in pairs]
    out["de_spearman_lfc_sig"] = [measure.de_spearman(r, p.effect) for r, p in pairs]
    out["pr_auc"] = [measure.de_auprc(r, -np.log10(p.q.clip(1e-10, 1))) for r, p in pairs]
    return out


@pytest.mark.parity
def test_golden_values_are_what_cell_eval_gives_now(monkeypatch):
    pytest.importorskip("cell_eval")
    monkeypatch.syspath_prepend(str(GOLDEN.parent))
    fresh_values = sys.modules.get("eval_cell_eval") or __import__("eval_cell_eval")
    golden, now = dict(np.load(GOLDEN)), fresh_values.made()
    assert set(golden) == set(now)
    for name, value in now.items():
        if name.startswith("score_"):
            np.testing.assert_allclose(golden[name], value, atol=1e-6, err_msg=name)

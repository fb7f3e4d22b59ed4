"""Regulatory networks: planted edges, the traps of pairs (ties, popularity, direction, hubs), refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import average_precision_score

import scjax.eval
from scjax.eval import stats
from scjax.eval.ranking import Ranking
from scjax.eval.regulation import similarity

T, G = 16, 80
GENES = [f"G{i}" for i in range(G)]
TFS = GENES[:T]  # regulators are genes too


def planted(seed=0):
    """True edges with signs, and cells in which targets follow their regulators."""
    rng = np.random.default_rng(seed)
    popularity = rng.gamma(0.7, 1, (T, 1)) * rng.gamma(0.7, 1, (1, G))
    edge = rng.random((T, G)) < np.minimum(0.12 * popularity, 0.7)
    edge |= rng.random((T, G)) < 0.05
    edge[np.arange(T), np.arange(T)] = False
    sign = np.where(edge, rng.choice([1, -1], (T, G)), 0)
    i, j = np.nonzero(edge)
    truth = pd.DataFrame({"tf": [GENES[a] for a in i], "target": [GENES[b] for b in j], "sign": sign[i, j]})
    activity = rng.normal(size=(120, T))
    rate = 1.2 + 0.35 * activity @ sign
    rate[:, :T] = 1.2 + activity
    X = rng.poisson(np.exp(np.clip(rate, -3, 3)))
    cells = ad.AnnData(sp.csr_matrix(X.astype(np.float32)), var=pd.DataFrame(index=GENES))
    return edge, sign, truth, cells


def scores(edge, sign, seed=1):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=edge.shape)
    tables = {"good": sign + 0.45 * noise, "weak": sign + 1.1 * noise, "noise": rng.normal(size=edge.shape)}
    tables["untrained"] = rng.normal(size=edge.shape)
    return {name: pd.DataFrame(v, index=TFS, columns=GENES) for name, v in tables.items()}


def value(results, metric, **fields):
    """Model → value of a metric."""
    frame = results.to_frame()
    rows = frame[frame["metric"].eq(metric) & frame["label"].eq("") & frame["versus"].eq("")]
    for name, wanted in ({"task": "network", "setting": "directed"} | fields).items():
        rows = rows[rows[name].eq(wanted)]
    assert not rows["model_id"].duplicated().any()
    return dict(zip(rows["model_id"], rows["value"], strict=True))


@pytest.fixture(scope="module")
def world():
    return planted()


@pytest.fixture(scope="module")
def scored(world):
    edge, sign, truth, cells = world
    about = {"expression": cells, "signed": ["good", "weak", "noise"], "twins": {"good": "untrained"}}
    return scjax.eval.network(scores(edge, sign), truth, **about, n_boot=80)


# -------------------------------------------------------------------------------- planted truth


@pytest.mark.parametrize("metric", ["average_precision", "auprc_ratio", "epr", "tf_ap", "edge_direction"])
def test_scores_are_ordered_by_what_they_know_of_pairs(scored, metric):
    found = value(scored, metric)
    assert found["oracle"] > found["good"] > found["weak"] > max(found["noise"], found["random"]), found
    chance = {"auprc_ratio": 1, "epr": 1, "edge_direction": 0.5}.get(metric)
    if chance is not None:
        assert abs(found["random"] - chance) < 0.5 * chance, found
    if metric in ("average_precision", "tf_ap"):
        assert found["oracle"] == 1


def test_either_way_and_sign_are_scored_too(scored):
    either = value(scored, "auprc_ratio", setting="undirected")
    assert either["oracle"] > either["good"] > either["weak"] > either["noise"]
    sign = value(scored, "auroc", task="network/sign", setting="")
    assert (
        sign["oracle"] == 1 > sign["good"] > sign["weak"] > sign["noise"] and abs(sign["random"] - 0.5) < 0.15
    )
    assert sign["pearson"] > 0.7 and abs(sign["regulator_sign"] - 0.5) < 0.2  # signs were drawn pair by pair
    assert "degree" not in sign and "popularity" not in sign


def test_rivals_find_what_they_can(scored, world):
    ratio = value(scored, "auprc_ratio")
    assert ratio["pearson"] > 1.5 and ratio["spearman"] > 1.5  # targets do follow their regulators
    assert ratio["degree"] > 1.3 > ratio["expression_level"]  # edges do follow degrees
    assert abs(value(scored, "edge_direction")["pearson"] - 0.5) < 1e-9  # a symmetric score has no direction
    frame = scored.to_frame()
    kinds = dict(zip(frame["model_id"], frame["model_kind"], strict=True))
    assert all(
        kinds[b] == "baseline" for b in ("pearson", "spearman", "degree", "popularity", "expression_level")
    )
    assert kinds["random_init"] == kinds["random"] == "control" and "untrained" not in kinds


def test_degrees_are_never_those_of_the_pair_itself():
    """Edges that follow nothing: degrees that held the pair would be above chance."""
    rng = np.random.default_rng(3)
    edge = rng.random((T, G)) < 0.06
    edge[np.arange(T), np.arange(T)] = False
    i, j = np.nonzero(edge)
    truth = pd.DataFrame({"source": np.array(GENES)[i], "target": np.array(GENES)[j]})
    table = pd.DataFrame(rng.normal(size=(T, G)), index=TFS, columns=GENES)
    ratio = value(scjax.eval.network({"m": table}, truth, n_boot=0), "auprc_ratio")
    own = edge.sum(1, keepdims=True) * edge.sum(0)
    pair = ~np.eye(T, G, dtype=bool)
    assert average_precision_score(edge[pair], own[pair]) / edge[pair].mean() > 1.6
    assert ratio["degree"] < 1.3


def test_differences_gates_and_facts(scored, world):
    edge, _, truth, _ = world
    frame = scored.to_frame()
    versus = frame[frame["versus"].ne("") & frame["model_id"].eq("good") & frame["metric"].eq("auprc_ratio")]
    assert set(versus["versus_role"]) == {"best simple baseline", "random-initialised twin"}
    assert (versus.loc[versus["versus"].eq("random_init"), "ci_low"] > 0).all()
    assert set(versus["versus"]) == {"random_init", "spearman"}
    assert (versus["p_holm"] >= versus["p_value"]).all()
    assert (
        frame.query("label == '' and versus == ''")["ci_method"]
        .isin(["percentile bootstrap over regulators"])
        .all()
    )
    space = scored.facts["universe"]["truth"]
    assert (space["regulators"], space["edges"]) == (len(set(truth["tf"])), len(truth))
    assert space["pairs"] == space["regulators"] * space["targets"] - space["regulators"]
    assert np.isclose(space["prevalence"], space["edges"] / space["pairs"], atol=1e-6)
    assert any(g.level == "fail" and "noise" in g.message for g in failed_by_noise(world).gates())
    assert not [g for g in scored.gates() if g.level == "fail" and "good" in g.message]
    assert "Regulatory networks" in scored.to_text()
    curve = next(p for p in scored.panels if p["model_id"] == "good")
    assert curve["panel"] == "pr_curve" and np.isclose(curve["prevalence"], space["prevalence"], atol=1e-6)


def failed_by_noise(world):
    """A model that knows the reverse of the truth."""
    edge, _, truth, cells = world
    table = pd.DataFrame(np.random.default_rng(0).random((T, G)) - edge, index=TFS, columns=GENES)
    results = scjax.eval.network({"noise": table}, truth, expression=cells, n_boot=0)
    return results


# -------------------------------------------------------------------------------- traps


def test_values_agree_with_scikit_learn_whatever_the_order(world, scored):
    edge, sign, truth, cells = world
    pair = ~np.eye(T, G, dtype=bool)
    table = scores(edge, sign)["weak"].round(1)  # with ties
    expected = average_precision_score(edge[pair], table.to_numpy()[pair])
    rng = np.random.default_rng(0)
    for _ in range(2):
        shuffled = table.sample(frac=1, random_state=rng.integers(99)).sample(
            frac=1, axis=1, random_state=rng.integers(99)
        )
        order = truth.sample(frac=1, random_state=rng.integers(99))
        results = scjax.eval.network({"m": shuffled}, order, universe=GENES, n_boot=0)
        assert value(results, "average_precision")["m"] == pytest.approx(expected, abs=1e-6)
    each = [average_precision_score(edge[t][pair[t]], table.to_numpy()[t][pair[t]]) for t in range(T)]
    enough = edge.sum(1) >= 5
    assert value(results, "tf_ap")["m"] == pytest.approx(np.array(each)[enough].mean(), abs=1e-6)


def test_precision_resampled_by_regulator_is_that_of_the_pairs_drawn():
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(6), 50)
    truth, score = rng.random(300) < 0.1, rng.normal(size=300).round(1)
    weights = stats.resample(6, 15, 0, "x")
    ranking = Ranking(score, truth, unit, 6)
    for w, precision, early, share in zip(
        weights,
        ranking.average_precision(weights),
        ranking.early_precision(weights),
        ranking.prevalence(weights),
        strict=True,
    ):
        t, s = np.repeat(truth, w[unit]), np.repeat(score, w[unit])
        assert precision == pytest.approx(average_precision_score(t, s), abs=1e-6)
        assert early == pytest.approx(beeline(s, t) / t.mean(), abs=1e-6)
        assert share == t.mean()


def beeline(score, truth):
    """Early precision as BEELINE words it: edges at or above the K-th, or the least that is not zero."""
    K = int(truth.sum())
    ranked = np.sort(score)[::-1]
    chosen = score >= ranked[K - 1]
    return truth[chosen].mean()


def test_early_precision_does_not_reach_into_pairs_that_were_not_predicted():
    score = np.zeros(1000)
    truth = np.zeros(1000, bool)
    truth[:100] = True
    score[[0, 1, 2, 500]] = [4, 3, 2, 1]  # four predicted, three of them right, a hundred to be found
    one = np.ones((1, 1), np.uint8)
    found = Ranking(score, truth, np.zeros(1000, int), 1).early_precision(one, floor=0.0)[0]
    assert found == pytest.approx((3 / 4) / 0.1)


def test_a_list_of_edges_is_the_matrix_it_stands_for(world):
    edge, sign, truth, _ = world
    full = scores(edge, sign)["good"].abs()
    sparse = full.where(full > 0.8, 0.0)
    edges = sparse.stack().reset_index()
    edges.columns = ["TF", "target", "importance"]
    edges = edges[edges["importance"] > 0]
    one = scjax.eval.network({"m": sparse}, truth, universe=GENES, n_boot=20)
    two = scjax.eval.network({"m": edges}, truth, universe=GENES, n_boot=20)
    for metric in ("average_precision", "epr", "tf_ap"):
        assert value(one, metric)["m"] == pytest.approx(value(two, metric)["m"], abs=1e-9)
    assert "not scored, ranked last" in two.to_frame().query("model_id == 'm'")["note"].iloc[0]


def test_one_hub_cannot_carry_the_mean_over_regulators(world):
    """A score that only knows which regulator has many targets: above chance pooled, at chance for each."""
    edge, _, truth, _ = world
    rng = np.random.default_rng(0)
    table = pd.DataFrame(edge.sum(1, keepdims=True) + 0.01 * rng.random((T, G)), index=TFS, columns=GENES)
    results = scjax.eval.network({"hub": table}, truth, universe=GENES, n_boot=0)
    assert value(results, "auprc_ratio")["hub"] > 1.5
    each = value(results, "tf_ap")
    assert abs(each["hub"] - each["random"]) < 0.08 < 0.3 < each["oracle"]


def test_few_regulators_resample_targets_and_say_so(world):
    edge, sign, truth, cells = world
    few = truth[truth["tf"].isin(TFS[:4])]
    results = scjax.eval.network(scores(edge, sign), {"few": few}, expression=cells, n_boot=30)
    rows = results.to_frame().query("metric == 'auprc_ratio' and versus == ''")
    assert rows["ci_method"].str.contains("targets \\(fewer than 10").all() and set(rows["track"]) == {"few"}
    assert set(results.to_frame().query("metric == 'tf_ap'")["label"]) <= {"", *TFS[:4]}


def test_without_expression_its_rivals_are_skipped_and_said_so(world):
    edge, sign, truth, _ = world
    results = scjax.eval.network(scores(edge, sign), truth, n_boot=0)
    frame = results.to_frame()
    assert set(frame.query("status == 'skipped'")["model_id"]) == {
        "pearson",
        "spearman",
        "popularity",
        "expression_level",
    }
    assert {"degree", "random", "oracle"} <= set(frame.query("status == 'ok'")["model_id"])


def test_only_expressed_genes_are_in_the_universe(world):
    edge, sign, truth, cells = world
    X = cells.X.toarray()
    X[5:, 40:] = 0
    results = scjax.eval.network(
        {"m": scores(edge, sign)["good"]},
        truth,
        expression=ad.AnnData(sp.csr_matrix(X), var=cells.var),
        n_boot=0,
    )
    assert results.facts["universe"]["truth"]["targets"] == 40
    assert results.facts["universe"]["truth"]["edges outside"] == edge[:, 40:].sum()


def test_similarity_of_gene_embeddings_is_a_symmetric_score():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(G, 5)), index=GENES)
    found = similarity(table, [*TFS, "absent"], GENES)
    assert found.shape == (T, G) and np.allclose(np.diag(found), 1)
    assert np.allclose(found.iloc[:, :T], found.iloc[:, :T].T) and found.to_numpy().min() < 0


# -------------------------------------------------------------------------------- bad input


def wrong(edge, sign, truth, cells):
    good = scores(edge, sign)["good"]
    edges = good.stack().reset_index(name="score").set_axis(["source", "target", "score"], axis=1)
    return {
        "no scores were given": {"scores": {}},
        "is a ndarray|are a ndarray": {"scores": {"m": good.to_numpy()}},
        "values are NaN or infinite": {"scores": {"m": good.where(good < 1)}},
        "are constant": {"scores": {"m": good * 0}},
        "regulator 'G0' is there twice": {"scores": {"m": pd.concat([good, good.iloc[:1]])}},
        "the edge G0 → G0 is there twice": {"scores": {"m": pd.concat([edges, edges.iloc[:1]])}},
        "neither a matrix of numbers nor edges": {"scores": {"m": good.astype(str)}},
        "edges need a third column": {"scores": {"m": edges[["source", "target"]]}},
        "upper and lower case": {"scores": {"m": good.rename(str.lower)}},
        "targets: only 0": {"scores": {"m": good}, "universe": ["X", "Y"]},
        "are not among those of expression": {"scores": {"m": good}, "universe": ["X"], "expression": cells},
        "edges of two are needed": {"scores": {"m": good}, "truth": truth[:4]},
        "needs two columns": {"scores": {"m": good}, "truth": truth[["tf"]]},
        "is taken": {"scores": {"degree": good}},
        "signed: 'u' is not one of the scores": {"scores": {"m": good}, "signed": ["u"]},
        "neither X nor layer": {
            "scores": {"m": good},
            "expression": ad.AnnData(cells.X * 0.5, var=cells.var),
        },
    }


@pytest.mark.parametrize("message", wrong(*planted()))
def test_input_that_cannot_be_scored_is_refused_with_the_reason(world, message):
    arguments = {"truth": world[2]} | wrong(*world)[message]
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        scjax.eval.network(arguments.pop("scores"), arguments.pop("truth"), n_boot=0, **arguments)

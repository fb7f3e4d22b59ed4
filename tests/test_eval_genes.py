"""Gene function: planted properties and sets, families kept whole, baselines, refusals; gene lists, edges."""

from __future__ import annotations

import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import average_precision_score, roc_auc_score

import scjax.eval
from scjax.eval import stats
from scjax.eval.gene_sets import contrast, edges, family_codes, read_edges, read_gmt, read_lists, stem
from scjax.eval.ranking import Ranking, fmax

N = 240
GENES = [f"G{chr(65 + i // 26)}{chr(65 + i % 26)}{chr(65 + i % 7)}X" for i in range(N)]
FAMILY = {g: f"f{i // 4}" for i, g in enumerate(GENES)}


def planted(seed=0, n_sets=4):
    """A property and sets that follow hidden traits of genes, and tables that know them more or less."""
    rng = np.random.default_rng(seed)
    trait = rng.normal(size=(N, 6))
    label = dict(zip(GENES, (trait[:, 0] + 0.3 * rng.normal(size=N) > 0.3).astype(int), strict=True))
    sets = {f"set{j}": [GENES[i] for i in np.argsort(-trait[:, 1 + j])[:30]] for j in range(n_sets)}
    good = trait + 0.4 * rng.normal(size=trait.shape)
    weak = trait + 2.5 * rng.normal(size=trait.shape)
    tables = {"good": good, "weak": weak, "noise": rng.normal(size=trait.shape)}
    tables["untrained"] = rng.normal(size=trait.shape)
    return {k: pd.DataFrame(v, index=GENES) for k, v in tables.items()}, label, {"sets": sets}


def counts(level=None, seed=0, n=60):
    rng = np.random.default_rng(seed)
    level = rng.gamma(1.0, 1.0, N) if level is None else level
    X = rng.poisson(level * rng.gamma(5, 0.2, (n, 1)))
    return ad.AnnData(sp.csr_matrix(X.astype(np.float32)), var=pd.DataFrame(index=GENES))


def values(results, metric, **fields):
    """Model → value of a metric."""
    frame = results.to_frame()
    rows = frame[frame["metric"].eq(metric) & frame["label"].eq("") & frame["versus"].eq("")]
    for name, value in fields.items():
        rows = rows[rows[name].eq(value)]
    assert not rows["model_id"].duplicated().any()
    return dict(zip(rows["model_id"], rows["value"], strict=True))


@pytest.fixture(scope="module")
def scored():
    tables, label, sets = planted()
    return scjax.eval.genes(
        tables,
        {"trait": label},
        collections=sets,
        families=FAMILY,
        expression=counts(),
        twins={"good": "untrained"},
        repeats=2,
        n_boot=60,
    )


# -------------------------------------------------------------------------------- planted truth


@pytest.mark.parametrize("head", ["logistic", "ridge"])
def test_properties_order_tables_by_what_they_know(scored, head):
    auroc = values(scored, "auroc", head=head)
    assert auroc["oracle"] > 0.99 > auroc["good"] > auroc["weak"] + 0.05, auroc
    assert auroc["weak"] > max(auroc["noise"], auroc["random"], auroc["expression_level"]), auroc
    assert all(abs(auroc[blind] - 0.5) < 0.12 for blind in ("noise", "random", "expression_level", "pca"))


def test_sets_order_tables_by_what_they_know(scored):
    for metric in ("macro_ap", "micro_ap", "fmax"):
        value = values(scored, metric, task="genes/sets", head="ridge")
        assert value["oracle"] > value["good"] > value["weak"] > max(value["noise"], value["random"]), value
    of_sets = scored.to_frame().query("label != '' and model_id == 'good'")
    assert len(of_sets) == 4
    macro = values(scored, "macro_ap", head="ridge")["good"]
    assert np.isclose(of_sets["value"].mean(), macro)


def test_frequency_is_chance_whatever_the_sizes_of_families():
    tables, label, _ = planted()
    families = {g: "big" if i < 70 else f"f{i // 3}" for i, g in enumerate(GENES)}
    results = scjax.eval.genes({"m": tables["good"]}, {"t": label}, families=families, n_boot=0, repeats=1)
    assert values(results, "auroc", head="frequency") == {"frequency": 0.5}


def test_frequency_is_chance_and_its_precision_the_prevalence(scored):
    _, label, _ = planted()
    assert values(scored, "auroc", head="frequency") == {"frequency": 0.5}
    prevalence = np.mean(list(label.values()))
    assert np.isclose(values(scored, "average_precision", head="frequency")["frequency"], prevalence)
    curves = [p for p in scored.panels if p["panel"] == "pr_curve" and p["track"] == "trait"]
    assert {p["prevalence"] for p in curves} == {prevalence}
    assert all(len(p["recall"]) == len(p["precision"]) <= 200 for p in scored.panels)


def test_differences_intervals_and_controls_are_there(scored):
    frame = scored.to_frame()
    versus = frame[frame["versus"].ne("") & frame["model_id"].eq("good") & frame["metric"].eq("auroc")]
    assert set(versus["versus_role"]) == {"best simple baseline", "random-initialised twin"}
    twin = versus[versus["versus"].eq("random_init") & versus["head"].eq("logistic")].iloc[0]
    assert twin["ci_low"] > 0 and twin["p_value"] < 0.05 <= twin["p_holm"]
    kinds = dict(zip(frame["model_id"], frame["model_kind"], strict=True))
    assert (
        kinds["random_init"] == kinds["random"] == kinds["frequency"] == "control"
        and kinds["oracle"] == "oracle"
    )
    assert kinds["pca"] == kinds["coexpression"] == kinds["expression_level"] == "baseline"
    assert frame["ci_method"].str.contains("gene families").any()
    assert not [g for g in scored.gates() if g.level == "fail" and "good" in g.message]
    assert "Gene properties" in scored.to_text()


def test_relatives_in_training_do_not_help():
    """A table that only knows families, a property that only families share: nothing can be learnt."""
    rng = np.random.default_rng(1)
    family = np.arange(N) // 4
    table = pd.DataFrame(rng.normal(size=(N // 4, 60))[family] + 0.05 * rng.normal(size=(N, 60)), index=GENES)
    label = dict(zip(GENES, rng.integers(2, size=N // 4)[family], strict=True))
    about = {"repeats": 2, "n_boot": 0}
    kept = scjax.eval.genes({"m": table}, {"t": label}, families=FAMILY, **about)
    split = scjax.eval.genes({"m": table}, {"t": label}, families={g: g for g in GENES}, **about)
    assert abs(values(kept, "auroc", head="logistic")["m"] - 0.5) < 0.12
    assert values(split, "auroc", head="logistic")["m"] > 0.9


def test_a_property_that_follows_expression_is_found_by_the_expression_level():
    rng = np.random.default_rng(2)
    level = rng.gamma(1.0, 1.0, N)
    tables, *_ = planted()
    label = dict(zip(GENES, (level > 0.7).astype(int), strict=True))
    results = scjax.eval.genes(
        {"good": tables["good"]},
        {"t": label},
        families=FAMILY,
        expression=counts(level),
        n_boot=20,
        repeats=1,
    )
    auroc = values(results, "auroc", head="logistic")
    assert auroc["expression_level"] > 0.95 > auroc["good"] + 0.2
    difference = results.to_frame().query("versus == 'expression_level' and metric == 'auroc'")
    assert len(difference) and (difference["ci_high"] < 0).all()


def test_without_expression_its_baselines_are_skipped_and_said_so():
    tables, label, _ = planted()
    results = scjax.eval.genes({"good": tables["good"]}, {"t": label}, families=FAMILY, n_boot=0, repeats=1)
    frame = results.to_frame()
    skipped = frame[frame["status"].eq("skipped")]
    assert set(skipped["model_id"]) == {"expression_level", "pca", "coexpression"}
    assert any(g.level == "caution" and "expression" in g.message for g in results.gates())


def test_every_table_is_scored_on_the_same_genes():
    tables, label, _ = planted()
    part = {"good": tables["good"], "weak": tables["weak"].iloc[:200]}
    results = scjax.eval.genes(part, {"t": label}, families=FAMILY, n_boot=0, repeats=1)
    assert set(results.to_frame().query("status == 'ok'")["n_cells"]) == {200}
    assert results.facts["coverage"]["t"] == {"genes": 240, "good": 240, "weak": 200}


# -------------------------------------------------------------------------------- rankings


def test_precision_agrees_with_scikit_learn_under_every_resample():
    rng = np.random.default_rng(0)
    truth, unit = rng.random(300) < 0.2, rng.integers(12, size=300)
    weights = stats.resample(12, 20, 0, "x")
    for score in (rng.normal(size=300), rng.integers(4, size=300).astype(float), np.zeros(300)):
        found = Ranking(score, truth, unit, 12).average_precision(weights)
        expected = [average_precision_score(truth, score, sample_weight=w[unit]) for w in weights]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        other = stats.ranking(score, truth, weights[:, unit])
        np.testing.assert_allclose(stats.centred(found), other["average_precision"], atol=1e-6)
        assert np.isclose(other["auroc"][0], roc_auc_score(truth, score), atol=1e-6)


def test_the_order_of_ties_does_not_move_precision():
    """The cumulative sum that is often written instead moves from chance to a multiple of it."""
    rng = np.random.default_rng(0)
    n = 20_000
    truth = rng.random(n) < 0.02
    score = np.where(rng.random(n) < 0.01, rng.random(n), 0.0)  # a sparse score that knows nothing
    one = np.ones((1, 1), np.uint8)
    by_order, by_rank = [], []
    for order in (np.argsort(truth, kind="stable"), np.argsort(~truth, kind="stable")):
        s, t = score[order], truth[order]
        hits = t[np.argsort(-s, kind="stable")]
        by_order.append((hits * hits.cumsum() / np.arange(1, n + 1)).sum() / hits.sum())
        ranking = Ranking(s, t, np.zeros(n, int), 1)
        by_rank.append((ranking.average_precision(one)[0], ranking.early_precision(one, 0.0)[0]))
    assert by_order[1] > 10 * by_order[0]
    assert by_rank[0] == by_rank[1]
    assert abs(by_rank[0][0] - truth.mean()) < 0.002


def test_fmax_is_that_of_the_best_threshold():
    y = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    one = np.ones((1, 4), np.uint8)
    assert fmax(y.astype(float), y, one)[0] == 1
    # every set for every annotated gene: precision (1/2 + 1 + 1/2) / 3, recall 1
    assert np.isclose(fmax(np.full(y.shape, 0.5), y, one)[0], 2 * (2 / 3) / (2 / 3 + 1))


# -------------------------------------------------------------------------------- bad input


def wrong(tables, label, sets):
    good = tables["good"]
    return {
        "is a ndarray": {"tables": {"m": good.to_numpy()}, "labels": {"t": label}},
        "NaN or infinite values, the first 'GAAAX'": {
            "tables": {"m": good.drop("GAAAX").reindex(GENES)},
            "labels": {"t": label},
        },
        "constant": {"tables": {"m": good * 0}, "labels": {"t": label}},
        "there twice": {"tables": {"m": pd.concat([good, good.iloc[:1]])}, "labels": {"t": label}},
        "upper and lower case": {"tables": {"m": good.rename(str.lower)}, "labels": {"t": label}},
        "Ensembl ids, the other symbols": {
            "tables": {"m": good.set_axis([f"ENSG{i:011d}" for i in range(N)])},
            "labels": {"t": label},
        },
        "0 or 1 is needed": {"tables": {"m": good}, "labels": {"t": {**label, GENES[0]: 2}}},
        "10 of each are needed": {"tables": {"m": good}, "labels": {"t": dict.fromkeys(GENES, 0)}},
        "nothing to predict": {"tables": {"m": good}},
        "gene families; at least 5": {
            "tables": {"m": good},
            "labels": {"t": label},
            "families": {g: i // 80 for i, g in enumerate(GENES)},
        },
        "none of the genes is among them": {
            "tables": {"m": good},
            "labels": {"t": label},
            "families": {"x": 1},
        },
        "none of 1 sets": {
            "tables": {"m": good},
            "collections": {"c": {"s": GENES[:3]}},
            "background": GENES,
        },
        "no gene tables": {"tables": {}, "labels": {"t": label}},
        "is taken": {"tables": {"pca": good}, "labels": {"t": label}},
        "not one of the tables": {"tables": {"m": good}, "labels": {"t": label}, "twins": {"m": "u"}},
        "none is left to be judged": {"tables": {"m": good}, "labels": {"t": label}, "baselines": ["m"]},
    }


@pytest.mark.parametrize("message", wrong(*planted()))
def test_input_that_cannot_be_scored_is_refused_with_the_reason(message):
    arguments = wrong(*planted())[message]
    tables = arguments.pop("tables")
    labels = arguments.pop("labels", None)
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        scjax.eval.genes(tables, labels, **{"families": FAMILY, "n_boot": 0, "repeats": 1} | arguments)


def test_genes_without_a_label_are_left_out_and_counted():
    tables, label, _ = planted()
    label = {**label, GENES[0]: None, GENES[1]: float("nan")}
    results = scjax.eval.genes({"m": tables["good"]}, {"t": label}, families=FAMILY, n_boot=0, repeats=1)
    assert results.facts["dropped"] == {"t: no label": 2}
    assert set(results.to_frame().query("status == 'ok'")["n_cells"]) == {N - 2}


# -------------------------------------------------------------------------------- files


def test_gene_sets_lists_and_edges_are_read(tmp_path):
    with gzip.open(tmp_path / "a.gmt.gz", "wt") as file:
        file.write("GO:1\trepair\tA\tB\tB\nPATH\thttp://x\tC\n")
    assert read_gmt(tmp_path / "a.gmt.gz") == {"GO:1 repair": ["A", "B"], "PATH": ["C"]}
    (tmp_path / "bad.gmt").write_text("GO:1\trepair\tA\nGO:2\n")
    with pytest.raises(ValueError, match="line 2"):
        read_gmt(tmp_path / "bad.gmt")
    (tmp_path / "l.tsv").write_text("list\tsymbol\nk\tA\nk\tNA\ng\tB\n")
    assert read_lists(tmp_path / "l.tsv") == {"k": ["A", "NA"], "g": ["B"]}
    with pytest.raises(KeyError, match="no column 'set'.*list, symbol"):
        read_lists(tmp_path / "l.tsv", name="set")
    (tmp_path / "e.csv").write_text("tf,target,sign\nT,A,+\nT,A,-\nT,B,repression\nT,T,1\nT,C,\n")
    assert read_edges(tmp_path / "e.csv").to_numpy().tolist() == [
        ["T", "A", 0],
        ["T", "B", -1],
        ["T", "C", 0],
    ]
    assert contrast(["A", "B", "C"], ["C", "D"]) == {"A": 1, "B": 1, "D": 0}


def test_signs_as_in_omnipath_and_signs_that_mean_nothing():
    table = pd.DataFrame(
        {"source": ["T"] * 3, "target": ["A", "B", "C"], "is_stimulation": [True, True, False]}
        | {"is_inhibition": [False, True, True]}
    )
    assert edges(table)["sign"].tolist() == [1, 0, -1]
    with pytest.raises(ValueError, match="'perhaps' is neither"):
        edges(pd.DataFrame({"tf": ["T"], "target": ["A"], "sign": ["perhaps"]}))
    with pytest.raises(ValueError, match="gene names are needed"):
        edges(pd.DataFrame({"tf": [1], "target": [2]}))


def test_families_by_spelling():
    pairs = [
        ("FOXP3", "FOXA1"),
        ("RPL3", "RPL27A"),
        ("HLA-A", "HLA-DRB1"),
        ("KCNA1", "KCNB2"),
        ("TP53", "TP63"),
    ]
    assert all(stem(a) == stem(b) for a, b in pairs)
    assert stem("C1orf112") != stem("C2orf3") and stem("RPL3") != stem("RPS3") and stem("7SK")
    codes, how = family_codes(["A", "B", "C", "D"], {"A": "x", "B": "x"})
    assert codes[0] == codes[1] and len(set(codes)) == 3 and "given" in how

"""Gene function: what linear heads read off a table of gene embeddings, in gene families not seen before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import sklearn
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.extmath import randomized_svd

from scjax.eval import checks, environment, regression, splits, stats
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.compare import finish
from scjax.eval.gene_sets import family_codes, gene_table, in_common
from scjax.eval.progress import each
from scjax.eval.ranking import Ranking, fmax
from scjax.eval.representations import twin_names
from scjax.eval.results import Results

PROPERTY, SETS = "genes/property", "genes/sets"
N_COMPONENTS, MAX_CELLS = 50, 3000
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EXPRESSION = ("expression_level", "pca", "coexpression")


@environment.one_thread
def genes(
    tables: Mapping[str, pd.DataFrame],
    labels: Mapping[str, Mapping[str, Any] | pd.Series] | None = None,
    *,
    collections: Mapping[str, Mapping[str, Iterable[str]]] | None = None,
    background: Iterable[str] | None = None,
    families: Mapping[str, Any] | pd.Series | None = None,
    expression: ad.AnnData | None = None,
    counts: str | None = None,
    baselines: Sequence[str] = (),
    twins: Mapping[str, str] | None = None,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
    repeats: int = 4,
    min_genes: int = 10,
    max_sets: int = 100,
    n_boot: int = 1000,
    seed: int = 0,
) -> Results:
    """Score gene embeddings by what linear heads read off them: properties of genes, membership in gene sets.

    All tables are scored on the same genes, those that every one of them (and the expression data) has. Genes
    of one family are never on both sides of a split; penalties are chosen by folds within the training genes.
    Beside the tables given stand ``expression_level`` (mean and detection rate), ``pca`` (of the gene x cell
    matrix), ``coexpression`` (leading eigenvectors of the correlation of genes), ``random`` (normal
    deviates), ``frequency`` (how common the label is in training) and ``oracle`` (the labels with jitter).

    Args:
        tables: name → gene embeddings, a DataFrame [genes, dimensions] indexed by gene.
        labels: property → gene → 0 or 1; genes with a missing value are left out.
        collections: collection → gene set → its genes, as :func:`scjax.eval.gene_sets.read_gmt` reads them.
        background: genes among which the sets are to be told apart; None: those in any set of the collection.
        families: gene → family. None: guessed from symbols, which lumps and parts some genes wrongly.
        expression: cells with raw counts from which the baselines are made; without it they are skipped.
        counts: where its raw counts are ("X", "raw" or a layer); None: wherever integers are found.
        baselines: names of tables that are rivals and not models (text embeddings, gene2vec, ...).
        twins: model → the table of the same architecture before training, called "random_init" in the rows.
        repeats: how often the five folds are drawn anew. Property scores are means over repeats; predictions
            of set membership are averaged.
        min_genes: sets (and each side of a property) with fewer genes in common are left out (refused).
        max_sets: of larger collections so many sets are drawn at random.
        n_boot: resamples of gene families, predictions kept, behind the 95 % percentile intervals.

    Returns:
        Rows of the tasks "genes/property" (AUROC, average precision) and "genes/sets" (macro and micro
        average precision, protein-centric Fmax of Radivojac et al. 2013, average precision per set), a track
        a property or collection; precision-recall curves as panels.

    Raises:
        ValueError: tables, labels or families cannot be used; too few genes or families in common.
        KeyError: ``baselines`` or ``twins`` name a table that is not there.
    """
    started = time.perf_counter()
    if not labels and not collections:
        raise ValueError(
            "nothing to predict: give labels (property → gene → 0/1) or collections of gene sets"
        )
    named = {name: gene_table(table, name) for name, table in tables.items()}
    kinds = _kinds(named, baselines, twins or {})
    known_as = {(twins or {})[model]: name for model, name in twin_names(twins or {}).items()}
    named = {known_as.get(name, name): table for name, table in named.items()}
    kinds = {known_as.get(name, name): kind for name, kind in kinds.items()}
    twins = {model: known_as[twin] for model, twin in (twins or {}).items()}
    wanted = {name: _binary(values, name) for name, values in (labels or {}).items()}
    rivals: Any = None
    if expression is not None:
        X, symbols = find_counts(expression, counts)
        rivals = Expression(X, symbols, seed)
        if (twice := pd.Index(symbols)).has_duplicates:
            raise ValueError(f"expression: gene {twice[twice.duplicated()][0]!r} is there twice in var_names")
    out = Results()
    facts: dict[str, Any] = {}

    def universe(of: Sequence[str], what: str, least: int) -> list[str]:
        """Genes among ``of`` that every table has."""
        common = list(of)
        sides = dict(named) if rivals is None else {**named, "expression": pd.DataFrame(index=rivals.genes)}
        facts.setdefault("coverage", {})[what] = {
            "genes": len(common),
            **{name: len(in_common(of, side.index, f"{what}, {name}", 1)) for name, side in sides.items()},
        }
        for name, side in sides.items():
            common = in_common(common, side.index, f"{what}: gene table {name!r}", least)
        return common

    for track, label in wanted.items():
        common = universe(list(label.index), track, 2 * min_genes)
        y = label.loc[common].to_numpy(bool)[:, None]
        if min(y.sum(), (~y).sum()) < min_genes:
            raise ValueError(
                f"{track}: of {len(y)} genes in all tables {int(y.sum())} are labelled 1 and "
                f"{int((~y).sum())} 0; {min_genes} of each are needed"
            )
        features = _features(named, kinds, common, y, rivals, repeats, seed)
        _score(out, PROPERTY, track, common, y, [track], features, families, repeats, n_boot, seed)
    for track, sets in (collections or {}).items():
        all_genes = background if background is not None else (g for s in sets.values() for g in s)
        common = universe(sorted({str(g) for g in all_genes}), track, 2 * min_genes)
        names, y = _memberships(sets, common, track, min_genes, max_sets, seed)
        facts.setdefault("sets", {})[track] = {"scored": len(names), "given": len(sets), "genes": len(common)}
        features = _features(named, kinds, common, y, rivals, repeats, seed)
        _score(out, SETS, track, common, y, names, features, families, repeats, n_boot, seed)
    if rivals is None:
        note = "expression data were not given (expression=): the simplest rivals are missing"
        for task in dict.fromkeys(r["task"] for r in out.rows):
            for name in EXPRESSION:
                metric = "auroc" if task == PROPERTY else "macro_ap"
                out.skip(task=task, model_id=name, model_kind="baseline", metric=metric, note=note)
    out.facts |= facts
    return finish(
        out,
        twins,
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        seed=seed,
        n_boot=n_boot,
        repeats=repeats,
        tables={name: list(table.shape) for name, table in named.items()},
        n_cells=0 if expression is None else expression.n_obs,
        dropped={k: int(v) for k, v in _dropped(labels or {}).items()},
        split_scheme=out.rows[0]["split_scheme"],
    )


# ------------------------------------------------------------------------------------------------ input


def _kinds(named: Mapping[str, Any], baselines: Sequence[str], twins: Mapping[str, str]) -> dict[str, str]:
    """Kind of each table given."""
    if not named:
        raise ValueError("no gene tables were given")
    for role, names in (("baselines", baselines), ("twins", [*twins, *twins.values()])):
        if unknown := [n for n in names if n not in named]:
            raise KeyError(f"{role}: {unknown[0]!r} is not one of the tables {', '.join(named)}")
    if taken := {*EXPRESSION, "random", "frequency", "oracle"} & set(named):
        raise ValueError(f"the name {sorted(taken)[0]!r} is taken by a table that is made here; rename yours")
    kinds = dict.fromkeys(named, "model") | dict.fromkeys(baselines, "baseline")
    kinds |= dict.fromkeys(twins.values(), "control")
    if "model" not in kinds.values():
        raise ValueError("every table is a baseline or a twin; none is left to be judged")
    return kinds


def _binary(values: Any, track: str) -> pd.Series:
    """Labels as a Series of 0.0 and 1.0 by gene, missing values left out."""
    series = pd.Series(values, dtype=object).dropna()
    if series.index.has_duplicates:
        raise ValueError(f"{track}: gene {series.index[series.index.duplicated()][0]!r} is labelled twice")
    number = pd.to_numeric(series, errors="coerce").astype(float)
    if len(odd := series[~number.isin((0, 1))]):
        raise ValueError(f"{track}: gene {odd.index[0]!r} is labelled {odd.iloc[0]!r}; 0 or 1 is needed")
    return number.set_axis(number.index.astype(str))


def _dropped(labels: Mapping[str, Any]) -> dict[str, int]:
    missing = {
        f"{track}: no label": pd.Series(values, dtype=object).isna().sum() for track, values in labels.items()
    }
    return {k: v for k, v in missing.items() if v}


def _memberships(
    sets: Mapping[str, Iterable[str]], common: Sequence[str], track: str, least: int, most: int, seed: int
) -> tuple[list[str], np.ndarray]:
    """Names of the sets to score and bool[genes, sets]."""
    position = {g: i for i, g in enumerate(common)}
    members = {name: sorted({position[g] for g in of if g in position}) for name, of in sets.items()}
    usable = [name for name, of in members.items() if least <= len(of) <= len(common) // 2]
    if not usable:
        raise ValueError(
            f"{track}: none of {len(sets)} sets has at least {least} and at most half of the {len(common)} "
            "genes that all tables have; give other sets or a smaller min_genes"
        )
    if len(usable) > most:
        chosen = np.random.default_rng([seed, 5]).choice(len(usable), most, replace=False)
        usable = [usable[i] for i in np.sort(chosen)]
    y = np.zeros((len(common), len(usable)), bool)
    for j, name in enumerate(usable):
        y[members[name], j] = True
    return usable, y


# ------------------------------------------------------------------------------------------------ rivals


def _features(
    named: Mapping[str, pd.DataFrame],
    kinds: Mapping[str, str],
    common: Sequence[str],
    y: np.ndarray,
    expression: Expression | None,
    repeats: int,
    seed: int,
) -> dict[str, tuple[str, np.ndarray]]:
    """Name → kind and features of the common genes, models first; "random" has new ones for every repeat."""
    rng = np.random.default_rng([seed, 6])
    order = ("model", "control", "baseline")
    out = {
        name: (kinds[name], checks.matrix(named[name].loc[common], name, len(common), zero_rows=True))
        for name in sorted(named, key=lambda n: order.index(kinds[n]))
    }
    width = next(iter(out.values()))[1].shape[1]
    if expression is not None:
        at = pd.Index(expression.genes).get_indexer(list(common))
        out |= {name: ("baseline", X[at]) for name, X in expression_tables(expression, at, seed).items()}
    out["random"] = ("control", rng.normal(size=(repeats, len(common), width)).astype(np.float32))
    out["frequency"] = ("control", np.zeros((len(common), 0), np.float32))
    out["oracle"] = ("oracle", (y + 0.05 * rng.normal(size=y.shape)).astype(np.float32))
    return out


def expression_tables(expression: Expression, at: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Tables [all genes, dimensions] made of log1p counts-per-10,000, no labels looked at.

    "expression_level": mean, detection rate and their square roots (heads are linear). "pca": principal
    components of the gene x cell matrix of the genes ``at``. "coexpression": eigenvectors of their
    correlation matrix, scaled by the roots of the eigenvalues. Rows of other genes are zero.
    """
    rng = np.random.default_rng([seed, 7])
    cells = np.arange(expression.log.shape[0])
    if len(cells) > MAX_CELLS:
        cells = np.sort(rng.choice(cells, MAX_CELLS, replace=False))
    log = expression.log[cells][:, at].toarray()
    level = np.stack([log.mean(0), (log > 0).mean(0)], 1)
    spread = log.std(0)
    n = min(N_COMPONENTS, *(s - 1 for s in log.shape))
    centred = log.T - log.T.mean(0)  # genes are the samples
    left, size, _ = randomized_svd(centred, n, random_state=seed)
    standard = (log - log.mean(0)) / np.where(spread > 0, spread, 1)
    _, scale, right = randomized_svd(standard, n, random_state=seed)
    made = {
        "expression_level": np.hstack([level, np.sqrt(level)]),
        "pca": left * size,
        "coexpression": right.T * (scale / np.sqrt(len(log))),
    }
    tables = {}
    for name, X in made.items():
        tables[name] = np.zeros((len(expression.genes), X.shape[1]), np.float32)
        tables[name][at] = X
    return tables


# ------------------------------------------------------------------------------------------------ heads


@dataclass(frozen=True)
class Split:
    """A fold over genes: families to train on and to test on, and inner folds by which C is chosen."""

    train: np.ndarray
    test: np.ndarray
    family: np.ndarray  # of the training genes
    inner: list[splits.Fold]
    seed: int


def _split(y: np.ndarray, family: np.ndarray, seed: int, what: str) -> list[Split]:
    """Five folds that keep families whole; stratified for a single label."""
    n = min(len(np.unique(family[y.any(1)])), len(np.unique(family[~y.all(1)])))
    if n < splits.N_FOLDS:
        raise ValueError(
            f"{what}: its genes, or those without it, lie in {n} gene families; at least {splits.N_FOLDS} "
            "are needed to hold families out (give finer families, or more genes)"
        )
    label = y[:, 0].astype(int) if y.shape[1] == 1 else None
    out = []
    for train, test in splits.folds(len(y), family, seed, label=label, unit="genes")[0]:
        if label is not None and len(np.unique(label[train])) < 2:
            raise ValueError(f"{what}: one gene family holds all genes of one class; it cannot be held out")
        inner = [] if label is None else splits.inner(label[train], family[train], seed)
        out.append(Split(train, test, family[train], inner, seed))
    return out


def logistic(X: np.ndarray, y: np.ndarray, fold: Split) -> np.ndarray:
    """Decision values [test genes, 1] of class-balanced logistic regression; C by AUROC in inner folds."""
    scaler = StandardScaler().fit(X[fold.train])
    Z, t = scaler.transform(X[fold.train]), y[fold.train, 0]

    def model(C: float) -> LogisticRegression:
        return LogisticRegression(C=C, class_weight="balanced", max_iter=300, tol=1e-3)

    scores = np.zeros(len(C_GRID))
    for fit, check in fold.inner:
        if len(np.unique(t[check])) == 2:
            guesses = [model(C).fit(Z[fit], t[fit]).decision_function(Z[check]) for C in C_GRID]
            scores += [roc_auc_score(t[check], guess) for guess in guesses]
    best = model(C_GRID[int(np.argmax(scores))]).fit(Z, t)
    return best.decision_function(scaler.transform(X[fold.test]))[:, None]


def ridge(X: np.ndarray, y: np.ndarray, fold: Split) -> np.ndarray:
    """Predictions [test genes, labels] of ridge regression on 0/1 labels; one penalty by inner folds."""
    predict, _ = regression.ridge(X[fold.train], y[fold.train].astype(float), fold.family, fold.seed)
    return predict(X[fold.test])


def frequency(X: np.ndarray, y: np.ndarray, fold: Split) -> np.ndarray:
    """How common each label is among the training genes, whatever the gene."""
    return np.tile(y[fold.train].mean(0), (len(fold.test), 1))


HEADS: dict[str, Callable[[np.ndarray, np.ndarray, Split], np.ndarray]] = {
    "logistic": logistic,
    "ridge": ridge,
}


# ------------------------------------------------------------------------------------------------ scores


def _score(
    out: Results,
    task: str,
    track: str,
    common: Sequence[str],
    y: np.ndarray,
    names: Sequence[str],
    features: Mapping[str, tuple[str, np.ndarray]],
    families: Any,
    repeats: int,
    n_boot: int,
    seed: int,
) -> None:
    """Add the scores of every table under the same folds and resamples."""
    family, how = family_codes(common, families)
    n_families = int(family.max()) + 1
    drawn = [_split(y, family, seed + r, track) for r in range(repeats)]
    unit, over = (
        (family, "gene families")
        if n_families >= stats.FEW_GROUPS
        else (np.arange(len(y)), "genes (few families)")
    )
    weights = stats.resample(int(unit.max()) + 1, n_boot, seed, f"{task}/{track}")
    about: dict[str, Any] = {
        "task": task,
        "track": track,
        "n_cells": len(common),
        "n_groups": n_families,
        "split_scheme": f"{repeats} x {splits.N_FOLDS}-fold over gene families, {how}",
        "ci_method": f"percentile bootstrap over {over}, predictions kept",
        "metric_impl": f"scjax.eval; heads scikit-learn=={sklearn.__version__}",
    }
    for name in each(features, task):
        kind, X = features[name]
        heads = HEADS if X.shape[-1] else {"frequency": frequency}
        for head, fit in heads.items():
            if task == SETS and head == "logistic":
                continue
            raw, ranks = np.zeros((repeats, *y.shape)), np.zeros((repeats, *y.shape))
            for r, parts in enumerate(drawn):
                for fold in parts:
                    guess = fit(X[r] if X.ndim == 3 else X, y, fold)
                    raw[r, fold.test] = guess
                    # Ranked within the fold: models of different folds have offsets of their own.
                    ranks[r, fold.test] = (rankdata(guess.round(12), axis=0) - 0.5) / len(guess)
            row = {**about, "model_id": name, "model_kind": kind, "head": head}
            if task == PROPERTY:
                found = [stats.ranking(s[:, 0], y[:, 0], weights[:, unit]) for s in ranks]
                for metric in ("auroc", "average_precision"):
                    out.add(np.mean([f[metric] for f in found], axis=0), metric=metric, **row)
                curve = Ranking(ranks[0, :, 0], y[:, 0], unit, weights.shape[1])
            else:
                curve = _sets(out, row, raw.mean(0), ranks.mean(0), y, names, unit, weights)
            if head in ("logistic", "frequency") or task == SETS:
                panel = {
                    "panel": "pr_curve",
                    "task": task,
                    "track": track,
                    "model_id": name,
                    "model_kind": kind,
                }
                out.panels.append(panel | curve.curve())


def _sets(
    out: Results,
    row: Mapping[str, Any],
    raw: np.ndarray,
    ranks: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    unit: np.ndarray,
    weights: np.ndarray,
) -> Ranking:
    """Scores of a collection; returns the pooled ranking of all pairs of gene and set."""
    of_sets = []
    for j, name in enumerate(names):
        score = Ranking(ranks[:, j], y[:, j], unit, weights.shape[1]).average_precision(weights)
        of_sets.append(np.nan_to_num(score))  # a resample without any gene of the set finds nothing
        out.add(score[:1], metric="average_precision", label=name, **{**row, "n_cells": int(y[:, j].sum())})
    out.add(stats.centred(np.mean(of_sets, axis=0)), metric="macro_ap", **row)
    pooled = Ranking(raw.ravel().round(12), y.ravel(), np.repeat(unit, y.shape[1]), weights.shape[1])
    out.add(stats.centred(pooled.average_precision(weights)), metric="micro_ap", **row)
    out.add(stats.centred(fmax(raw, y, weights[:, unit])), metric="fmax", **row)
    return pooled

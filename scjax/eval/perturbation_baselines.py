"""Simple predictors of perturbation effects, fitted on the training perturbations alone.

A model has to beat the best of them. Effects are differences of mean log1p expression from the control half
that predictions start from. Hyper-parameters are chosen by cross-validation among training perturbations.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from scjax.eval.perturbation_data import Condition, Fold, Study

COMPONENTS = 10  # of the training effects; Ahlmann-Eltze et al. 2025 use as many
ALPHAS = tuple(np.logspace(-1, 4, 11))
NEIGHBOURS = (1, 3, 5, 10)
RANDOM = "random"
Effects = dict[Condition, np.ndarray]


@dataclass
class Predictor:
    """Predicted effects by condition (those it can answer), and single cells where there are any.

    ``start``: by context, the control profile that effects are differences from, where it is not that of the
    study's control cells.
    """

    kind: str
    effect: Effects = field(default_factory=dict)
    cells: Callable[[Condition], np.ndarray] | None = None
    start: dict[str, np.ndarray] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class _Training:
    """What a fold teaches: conditions, their effects and the mean to which predictors fall back."""

    study: Study
    fold: Fold
    effect: np.ndarray  # float64[conditions, genes]

    def mean(self, condition: Condition) -> np.ndarray:
        """Mean effect of the training perturbations in this context, or in all where it is new."""
        here = [i for i, c in enumerate(self.fold.train) if c.context == condition.context]
        return self.effect[here].mean(0) if len(here) > 1 else self.effect.mean(0)

    def parts(self, condition: Condition) -> tuple[str, ...]:
        return condition.parts if self.study.keys.kind == "genetic" else (condition.perturbation,)


def predictors(
    study: Study, fold: Fold, tables: Mapping[str, pd.DataFrame], tables_kind: Mapping[str, str], seed: int
) -> dict[str, Predictor]:
    """All simple predictors of a fold by name; those that cannot answer a condition leave it out.

    ``tables``: numeric descriptions [gene or compound × d] of what is perturbed. Each gives four predictors:
    linear (a ridge regression from its rows to the leading components of the training effects), linear G+P
    (the same with its rows of the measured genes in place of components: the bilinear model of Ahlmann-Eltze
    et al. 2025), nearest and kernel ridge. ``tables_kind``: model_kind of each table's predictors.
    """
    base = {c.context: study.base(c.context) for c in [*fold.train, *fold.test]}
    effect = np.stack([study.centroid(c) - base[c.context] for c in fold.train])
    known = _Training(study, fold, effect)
    n_cells = np.array([len(study.rows[c]) for c in fold.train], float)
    contexts = {c.context for c in fold.train}
    rng = np.random.default_rng([seed, 5, zlib.crc32(str(fold.test[0]).encode())])
    out = {
        "no_change": {c: np.zeros(len(study.genes)) for c in fold.test},
        "train_mean": dict.fromkeys(fold.test, effect.mean(0)),
        "train_mean_cells": dict.fromkeys(fold.test, n_cells @ effect / n_cells.sum()),
        "matching_mean": {c: _matching(known, c) for c in fold.test},
        "additive": _additive(known),
        "nearest(dose)": _nearest_dose(known),
    }
    if len(contexts) > 1:
        out["context_mean"] = {c: known.mean(c) for c in fold.test if c.context in contexts}
        out |= _across_contexts(known, base)
    made = {name: Predictor("baseline", effects) for name, effects in out.items()}
    noise = {c: effect.std(0) * rng.normal(size=effect.shape[1]) for c in fold.test}
    made["noise"] = Predictor("control", noise)
    names = sorted({p for c in [*fold.train, *fold.test] for p in known.parts(c)})
    draw = np.random.default_rng([seed, 6]).normal(size=(len(names), COMPONENTS))
    for name, table, kind in [
        *((n, t, tables_kind.get(n, "baseline")) for n, t in tables.items()),
        (RANDOM, pd.DataFrame(draw, index=names), "control"),
        ("pca", _loadings(known), "baseline"),
    ]:
        found = _from_table(known, table, only_linear=name == RANDOM, with_genes=name not in (RANDOM, "pca"))
        for method, effects in found.items():
            made[f"{method}({name})"] = Predictor(kind, effects)
    return made


def _matching(known: _Training, condition: Condition) -> np.ndarray:
    """Mean effect of the training conditions that share a gene (or the perturbation) with this one (Systema's
    matching mean), or the training mean.
    """
    parts = set(known.parts(condition))
    match = [i for i, c in enumerate(known.fold.train) if parts & set(known.parts(c))]
    here = [i for i in match if known.fold.train[i].context == condition.context]
    return known.effect[here or match].mean(0) if match else known.mean(condition)


def _additive(known: _Training) -> Effects:
    """Sum of the effects of the single genes, for combinations of which all were seen alone."""
    out = {}
    for condition in known.fold.test:
        parts = known.parts(condition)
        singles = [
            [
                i
                for i, c in enumerate(known.fold.train)
                if c.perturbation == p and c.context == condition.context
            ]
            or [i for i, c in enumerate(known.fold.train) if c.perturbation == p]
            for p in parts
        ]
        if len(parts) > 1 and all(singles):
            out[condition] = np.sum([known.effect[s].mean(0) for s in singles], axis=0)
    return out


def _nearest_dose(known: _Training) -> Effects:
    """Effect of the same perturbation at the nearest dose (in ratio) seen in this context."""
    out = {}
    for condition in known.fold.test:
        same = [
            (abs(np.log(_dose(c) / _dose(condition))), i)
            for i, c in enumerate(known.fold.train)
            if (c.perturbation, c.context) == (condition.perturbation, condition.context)
            and _dose(c) > 0
            and _dose(condition) > 0
        ]
        if same:
            out[condition] = known.effect[min(same)[1]]
    return out


def _dose(condition: Condition) -> float:
    try:
        return float(condition.dose)
    except ValueError:
        return np.nan


def _across_contexts(known: _Training, base: Mapping[str, np.ndarray]) -> dict[str, Effects]:
    """The same perturbation in other contexts: in the one with the most similar control cells, and a ridge
    regression on the components of the control profiles.
    """
    nearest: Effects = {}
    ridge: Effects = {}
    seen = sorted({c.context for c in known.fold.train})
    centre = np.mean([base[s] for s in seen], axis=0)
    for condition in known.fold.test:
        same = [i for i, c in enumerate(known.fold.train) if c.perturbation == condition.perturbation]
        if condition.context in seen or not same:
            continue
        profiles = np.stack([base[known.fold.train[i].context] - centre for i in same])
        own = base[condition.context] - centre
        likeness = profiles @ own / np.maximum(np.linalg.norm(profiles, axis=1), 1e-9)
        nearest[condition] = known.effect[same[int(likeness.argmax())]]
        if len(same) > 3:
            axes = np.linalg.svd(profiles - profiles.mean(0), full_matrices=False)[2][: len(same) - 2]
            scaled = StandardScaler().fit(profiles @ axes.T)
            fitted = _ridge(scaled.transform(profiles @ axes.T), known.effect[same])
            ridge[condition] = fitted(scaled.transform(own[None] @ axes.T))[0]
    return {"nearest(control profile)": nearest, "linear(control profile)": ridge}


def _components(effect: np.ndarray) -> np.ndarray:
    """Orthonormal axes [k, genes] of the leading components of effects [n, genes]."""
    return np.linalg.svd(effect, full_matrices=False)[2][: min(COMPONENTS, max(len(effect) - 1, 1))]


def _loadings(known: _Training) -> pd.DataFrame:
    """Measured genes by their loadings on the components of the training effects."""
    centred = known.effect - known.effect.mean(0)
    return pd.DataFrame(_components(centred).T, index=known.study.genes)


def _from_table(
    known: _Training, table: pd.DataFrame, only_linear: bool, with_genes: bool
) -> dict[str, Effects]:
    """Predictors from a description of what is perturbed; a combination is the sum of its genes' rows.

    A held-out perturbation that the table does not know gets the training mean, which is what such a model
    can say about it.
    """
    rows = dict(zip(table.index.astype(str), table.to_numpy(np.float64), strict=True))

    def describe(condition: Condition) -> np.ndarray | None:
        found = [rows[p] for p in known.parts(condition) if p in rows]
        return np.sum(found, axis=0) if found else None

    train = [(i, f) for i, c in enumerate(known.fold.train) if (f := describe(c)) is not None]
    test = [(c, f) for c in known.fold.test if (f := describe(c)) is not None]
    distinct = {known.fold.train[i].perturbation for i, _ in train}
    if len(distinct) < 4:
        return {}
    at = [i for i, _ in train]
    scaled = StandardScaler().fit(np.stack([f for _, f in train]))
    P = scaled.transform(np.stack([f for _, f in train]))
    Q = scaled.transform(np.stack([f for _, f in test])) if test else np.zeros((0, P.shape[1]))
    mean = np.stack([known.mean(known.fold.train[i]) for i in at])
    rest = known.effect[at] - mean
    axes = _components(rest)
    scores = rest @ axes.T
    methods: dict[str, Callable[[], np.ndarray]] = {"linear": lambda: _ridge(P, scores)(Q) @ axes}
    if with_genes and (genes := _gene_rows(known.study.genes, rows)) is not None:
        inner = np.linalg.solve(genes.T @ genes + 0.1 * np.eye(genes.shape[1]), genes.T)
        methods["linear G+P"] = lambda: _ridge(P, rest @ inner.T)(Q) @ genes.T
    if not only_linear:
        methods["nearest"] = lambda: _nearest(P, Q, rest)
        methods["kernel ridge"] = lambda: _kernel_ridge(P, scores)(Q) @ axes
    out = {}
    for method, predict in methods.items():
        answers = dict(zip([c for c, _ in test], predict(), strict=True)) if test else {}
        out[method] = {c: known.mean(c) + answers.get(c, 0) for c in known.fold.test}
    return out


def _gene_rows(genes: Sequence[str], rows: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The table's rows of the measured genes, standardised, zero for those it lacks; None below a half."""
    have = [i for i, g in enumerate(genes) if g in rows]
    if 2 * len(have) < len(genes):
        return None
    values = StandardScaler().fit_transform(np.stack([rows[genes[i]] for i in have]))
    out = np.zeros((len(genes), values.shape[1]))
    out[have] = values
    return out


def _ridge(P: np.ndarray, Y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression, its penalty chosen by leave-one-out."""
    return RidgeCV(ALPHAS).fit(P, Y).predict


def _kernel_ridge(P: np.ndarray, Y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Kernel ridge regression (Gaussian), penalty and width chosen by cross-validation."""
    grid = {"alpha": [0.1, 1.0, 10.0], "gamma": [g / P.shape[1] for g in (0.1, 1.0)]}
    centre = Y.mean(0)
    search = GridSearchCV(
        KernelRidge(kernel="rbf"), grid, cv=min(5, len(P)), scoring="neg_mean_squared_error"
    )
    fitted = search.fit(P, Y - centre)
    return lambda Q: fitted.predict(Q) + centre


def _nearest(P: np.ndarray, Q: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Mean of the k training effects with the most similar description (cosine); k by leave-one-out."""
    own, asked = (X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12) for X in (P, Q))
    likeness = own @ own.T
    np.fill_diagonal(likeness, -np.inf)

    def mean_of(similar: np.ndarray, k: int) -> np.ndarray:
        return Y[np.argsort(-similar, axis=1, kind="stable")[:, :k]].mean(1)

    allowed = [k for k in NEIGHBOURS if k < len(P)]
    k = min(allowed, key=lambda k: float(((mean_of(likeness, k) - Y) ** 2).mean()))
    return mean_of(asked @ own.T, k)

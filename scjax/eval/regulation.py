"""Pairs of regulator and target: the universe they are judged in, scores laid over it, rivals that ignore
pairs or merely correlate genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from scjax.eval import gene_sets
from scjax.eval.baselines import Expression

N_FOLDS, MIN_EDGES, MAX_CELLS = 5, 10, 3000
N_DRAWS = 5  # of random scores, whose results are averaged


@dataclass
class Universe:
    """The pairs that every score is judged on: regulators x targets, nothing with itself."""

    regulators: list[str]
    targets: list[str]
    truth: np.ndarray  # bool[regulators, targets]
    sign: np.ndarray  # int[regulators, targets], 0 where there is no edge or its sign is not known
    pair: np.ndarray = field(init=False)  # bool[regulators, targets]
    as_target: np.ndarray = field(init=False)  # int[regulators]: place among the targets, −1 if it has none
    as_regulator: np.ndarray = field(init=False)  # int[targets], likewise

    def __post_init__(self) -> None:
        self.as_target = pd.Index(self.targets).get_indexer(self.regulators)
        self.as_regulator = pd.Index(self.regulators).get_indexer(self.targets)
        self.pair = np.ones(self.truth.shape, bool)
        own = np.flatnonzero(self.as_target >= 0)
        self.pair[own, self.as_target[own]] = False

    def either_way(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Score, truth, regulator, target of unordered pairs: the larger of both directions if both exist."""
        i, j = np.nonzero(self.pair)
        back = self.as_regulator[j]
        both = (back >= 0) & (self.as_target[i] >= 0)
        best, known = score[i, j].copy(), self.truth[i, j].copy()
        i2, j2 = back[both], self.as_target[i[both]]
        best[both] = np.maximum(best[both], score[i2, j2])
        known[both] |= self.truth[i2, j2]
        keep = ~both | (i < back)
        return best[keep], known[keep], i[keep], j[keep]


@dataclass
class Scores:
    """One line of the tables: scores of all pairs of a universe."""

    name: str
    kind: str
    strength: np.ndarray  # float[regulators, targets], finite; random ones [draws, regulators, targets]
    signed: np.ndarray | None = None  # the same with a sign: above zero activates
    floor: float = -np.inf  # pairs at this score were not predicted
    note: str = ""


# ------------------------------------------------------------------------------------------------ universe


def targets(
    matrices: Mapping[str, pd.DataFrame],
    expression: Expression | None,
    universe: Iterable[str] | None,
    least: float,
) -> list[str]:
    """The genes of the universe: as given, or detected in this share of the cells, or in every matrix."""
    if universe is not None:
        genes = list(dict.fromkeys(str(g) for g in universe))
        held = set(genes if expression is None else expression.genes)
        if absent := [g for g in genes if g not in held]:
            raise ValueError(
                f"universe: {len(absent)} of {len(genes)} genes are not among those of expression, the first "
                f"{absent[0]!r}; give genes that were measured"
            )
        return genes
    if expression is not None:
        detected = np.bincount(expression.counts.indices, minlength=len(expression.genes))
        detected = detected / expression.counts.shape[0]
        return [g for g, share in zip(expression.genes, detected, strict=True) if share >= least]
    first, *others = matrices.values()
    return [g for g in first.columns if all(g in m.columns for m in others)]


def universe(edges: pd.DataFrame, genes: Sequence[str], track: str) -> Universe:
    """Regulators with a known target x genes."""
    for side, column in (("targets", "target"), ("regulators", "source")):
        gene_sets.in_common(list(edges[column].unique()), genes, f"{track}: {side}", 1)
    held = edges[edges["source"].isin(set(genes)) & edges["target"].isin(set(genes))]
    if len(held) < MIN_EDGES or held["source"].nunique() < 2:
        raise ValueError(
            f"{track}: {len(held)} edges of {held['source'].nunique()} regulators lie among the {len(genes)} "
            f"genes of the universe; {MIN_EDGES} edges of two are needed (a smaller min_detection? other "
            "names?)"
        )
    regulators = list(dict.fromkeys(held["source"]))
    i, j = pd.Index(regulators).get_indexer(held["source"]), pd.Index(genes).get_indexer(held["target"])
    known, sign = np.zeros((len(regulators), len(genes)), bool), np.zeros((len(regulators), len(genes)), int)
    known[i, j], sign[i, j] = True, held["sign"]
    return Universe(regulators, list(genes), known, sign)


# ------------------------------------------------------------------------------------------------ scores


def matrix(table: Any, name: str) -> pd.DataFrame:
    """Scores as a matrix [regulators, targets], NaN where a list of edges has no such pair.

    A list of edges has columns ``source`` and ``target``, or names in its first two columns.
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"scores {name!r} are a {type(table).__name__}; a DataFrame is needed: a matrix of regulators x "
            "targets, or edges with columns source, target, score"
        )
    numeric = [pd.api.types.is_numeric_dtype(t) for t in table.dtypes]
    named = {"source", "target"} <= set(table.columns)
    if named or numeric[:3] == [False, False, True]:
        ends = ["source", "target"] if named else list(table.columns[:2])
        value = "score" if "score" in table else next((c for c in table if c not in ends), None)
        if value is None or not pd.api.types.is_numeric_dtype(table[value]):
            raise ValueError(f"scores {name!r}: edges need a third column with the score, a number")
        _finite(table[[value]].to_numpy(float), name)
        if (twice := table.duplicated(ends)).any():
            edge = " → ".join(map(str, table.loc[twice, ends].iloc[0]))
            raise ValueError(f"scores {name!r}: the edge {edge} is there twice")
        table = table.astype(dict.fromkeys(ends, str)).pivot(index=ends[0], columns=ends[1], values=value)
    else:
        if not table.size or not all(numeric):
            raise ValueError(
                f"scores {name!r}: neither a matrix of numbers nor edges with columns source, target, score"
            )
        _finite(table.to_numpy(float), name)
        for side, index in (("regulator", table.index), ("target", table.columns)):
            if index.has_duplicates:
                raise ValueError(f"scores {name!r}: {side} {index[index.duplicated()][0]!r} is there twice")
    rows, columns = table.index.astype(str), table.columns.astype(str)
    return pd.DataFrame(table.to_numpy(float), index=rows, columns=columns)


def _finite(values: np.ndarray, name: str) -> None:
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"scores {name!r}: {bad} values are NaN or infinite; give scores as a list of edges and leave "
            "out the pairs that have none"
        )


def align(matrix: pd.DataFrame, name: str, kind: str, space: Universe, signed: bool) -> Scores:
    """The scores of a model in the universe; pairs that it lacks come last."""
    gene_sets.in_common(space.regulators, matrix.index, f"scores {name!r}, regulators", 1)
    gene_sets.in_common(space.targets, matrix.columns, f"scores {name!r}, targets", 1)
    values = matrix.reindex(index=space.regulators, columns=space.targets).to_numpy(float)
    absent = np.isnan(values)
    strength = np.abs(values) if signed else values
    known = strength[~absent & space.pair]
    share = (absent & space.pair).sum() / space.pair.sum()
    if not len(known) or (not share and (known == known[0]).all()):
        raise ValueError(f"scores {name!r} are constant, or absent, on all pairs of the universe")
    floor = known.min() - 1 if known.min() < 0 else -1.0
    return Scores(
        name,
        kind,
        np.where(absent, floor, strength),
        np.where(absent, 0.0, values) if signed else None,
        # zeros of scores that are never negative are pairs that were not predicted
        max(floor, 0.0) if known.min() >= 0 else floor,
        f"{share:.1%} of pairs not scored, ranked last" if share else "",
    )


def similarity(table: pd.DataFrame, regulators: Sequence[str], targets: Sequence[str]) -> pd.DataFrame:
    """Cosine of centred gene embeddings as a score of pairs, a matrix [regulators, targets] of the genes it
    has. It is symmetric: it cannot tell a regulator from its target.
    """
    X = gene_sets.gene_table(table, "table")
    X = X - X.mean()
    size = np.sqrt((X**2).sum(axis=1))
    X = X.div(size.where(size > 0, np.inf), axis=0)
    rows = gene_sets.in_common(regulators, X.index, "table: regulators", 1)
    columns = gene_sets.in_common(targets, X.index, "table: targets", 1)
    return X.loc[rows] @ X.loc[columns].T


# ------------------------------------------------------------------------------------------------ rivals


def rivals(space: Universe, expression: Expression | None, seed: int) -> list[Scores]:
    """The scores that every model is held against."""
    rng = np.random.default_rng([seed, 8])
    incoming, outgoing = _degrees(space.truth, rng)
    degree = (incoming + 0.5) * (outgoing + 0.5)
    out = [Scores("degree", "baseline", degree, note="knows other edges of the truth")]
    if expression is not None:
        cells = np.arange(expression.log.shape[0])
        if len(cells) > MAX_CELLS:
            cells = np.sort(rng.choice(cells, MAX_CELLS, replace=False))
        at = pd.Index(expression.genes).get_indexer(space.targets)
        log = expression.log[cells][:, at].toarray()
        mean, of = log.mean(0), space.as_target
        ranked = rankdata(log, axis=0).astype(np.float32)
        for name, values in (("pearson", log), ("spearman", ranked)):
            r = _correlation(values[:, of], values)
            out.append(Scores(name, "baseline", np.abs(r), r))
        note = "knows how many other targets each regulator has"
        out.append(Scores("popularity", "baseline", mean * (outgoing + 0.5), note=note))
        out.append(Scores("expression_level", "baseline", np.outer(mean[of], mean)))
    by_sign = _other_signs(space.sign, rng)
    out.append(Scores("regulator_sign", "baseline", np.abs(by_sign), by_sign))
    noise = rng.normal(size=(N_DRAWS, *space.truth.shape))
    out.append(Scores("random", "control", noise, noise))
    jitter = 0.5 * rng.random(space.truth.shape)
    out.append(Scores("oracle", "oracle", space.truth + jitter, space.sign + jitter))
    return out


def _degrees(truth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Known regulators of each target and known targets of each regulator, [regulators, targets] both.

    Counted for each pair on the folds that hold neither its regulator (for the former) nor its target (for
    the latter), so that no pair is told of itself.
    """
    by_regulator = rng.permutation(len(truth)) % N_FOLDS
    by_target = rng.permutation(truth.shape[1]) % N_FOLDS
    incoming = np.stack([truth[by_regulator != f].sum(0) for f in range(N_FOLDS)])[by_regulator]
    outgoing = np.stack([truth[:, by_target != f].sum(1) for f in range(N_FOLDS)])[by_target].T
    return incoming, outgoing


def _other_signs(sign: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sum of the signs of each regulator's edges to targets of other folds, over their number + 1."""
    by_target = rng.permutation(sign.shape[1]) % N_FOLDS
    parts = [sign[:, by_target != f] for f in range(N_FOLDS)]
    return np.stack([p.sum(1) / ((p != 0).sum(1) + 1) for p in parts])[by_target].T


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of the columns of x and y; 0 where one does not vary."""

    def standard(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(0, dtype=np.float64).astype(np.float32)
        size = np.sqrt((centred**2).sum(0, dtype=np.float64))
        return centred / np.where(size > 0, size, np.inf).astype(np.float32)

    return (standard(x).T @ standard(y)).astype(float)

"""Masked values: how much more does a model know of hidden entries than the mean of each gene?

The pretraining objective itself, beside predictors that know nothing of the cell. A masked error alone says
nothing: on zero-inflated data the mean of each gene is hard to beat, and more than one published model hardly
did (Kedzierska et al. 2025).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy
import scipy.sparse as sp
from scipy.stats import rankdata

from scjax.eval import checks, stats
from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.results import Results

BASELINES = ("gene_mean", "gene_mean_x_size")
MIN_CELLS = 10  # masked entries that a gene needs for a correlation over cells
RESERVED = {*BASELINES, "global_mean", "shuffled", "oracle"}


@one_thread
def masked_error(
    truth: Any,
    predictions: Mapping[str, Any],
    mask: Any,
    *,
    train: Any = None,
    groups: Any = None,
    genes: Sequence[str] | None = None,
    twins: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Score predictions of masked entries beside the means of genes, on whatever scale the model was trained.

    Always scored beside them: ``gene_mean``; ``gene_mean_x_size`` (times the size factor of the cell, from
    its visible entries); controls ``global_mean`` (one number) and ``shuffled`` (the true values of the gene,
    dealt out to other cells at random); ``oracle`` (truth with 1 % jitter).

    Metrics: "masked_gain", the share of the squared error of ``gene_mean`` that is gone (1: perfect, 0: no
    better, negative: worse); "masked_mse"; "mse_zero" and "mse_nonzero" over entries that are truly zero or
    not; "feature_spearman", the median over genes of the rank correlation *across cells* of masked entries.
    (Across the genes of a cell, the mean of each gene already correlates highly.)

    Args:
        truth: [cells, genes], dense or sparse, on one scale (log1p CP10K, binned, …) with the predictions.
        predictions: name → [cells, genes]; only masked entries are read.
        mask: bool [cells, genes], the entries that were hidden from the model. All others count as visible.
        train: [cells', genes] values of training cells, on the same scale, from which means of genes are
            estimated. None: from the visible entries of ``truth``.
        groups: donor or study of each cell; resampled instead of cells from ten on.
        genes: names, for messages.
        twins: name of a model → name of its random-initialised twin among the predictions.
        n_boot: resamples behind the 95 % intervals: of cells or groups, and of genes for the rank
            correlation.

    Where only expressed entries are masked, as many models do, a model may know that what is masked is not
    zero; means are then those of expressed entries, so that the baselines know it too.

    Raises:
        ValueError: shapes that differ, nothing masked, nothing visible, values that are not finite.
    """
    started = time.perf_counter()
    truth = _dense(truth, "truth")
    hidden = _dense(mask, "mask").astype(bool)
    if hidden.shape != truth.shape:
        raise ValueError(f"mask has shape {hidden.shape}, truth {truth.shape}")
    if not hidden.any() or hidden.all():
        raise ValueError(f"{'nothing' if not hidden.any() else 'everything'} is masked; some entries must be")
    if clash := RESERVED & set(predictions):
        raise ValueError(f"predictions: the name {sorted(clash)[0]!r} is taken")
    given = {name: _dense(p, f"predictions[{name!r}]") for name, p in predictions.items()}
    if not given:
        raise ValueError("no predictions to score; give {name: array [cells, genes]}")
    for name, p in given.items():
        if p.shape != truth.shape:
            raise ValueError(f"predictions[{name!r}] has shape {p.shape}, truth {truth.shape}")
        _finite(p, hidden, f"predictions[{name!r}]", genes)
    _finite(truth, np.ones_like(hidden), "truth", genes)
    twins = dict(twins or {})
    if unknown := {*twins, *twins.values()} - set(given):
        raise KeyError(
            f"twins names {sorted(unknown)[0]!r}, which is not among the predictions {list(given)}"
        )

    cell, gene = np.nonzero(hidden)
    y = truth[cell, gene].astype(np.float64)
    expressed_only = not (y == 0).any()
    values = _simple(truth, hidden, None if train is None else _dense(train, "train"), expressed_only)
    rng = np.random.default_rng([seed, 7])
    guesses: dict[str, tuple[str, np.ndarray]] = {
        name: ("control" if name in twins.values() else "model", p[cell, gene]) for name, p in given.items()
    }
    guesses |= {name: ("baseline", values[name][cell, gene]) for name in BASELINES}
    guesses["global_mean"] = ("control", np.full(len(y), values["global_mean"]))
    guesses["shuffled"] = ("control", _dealt(y, gene, rng))
    guesses["oracle"] = ("oracle", y * (1 + 0.01 * rng.normal(size=len(y))))

    unit, n_groups, unit_name = cell, 0, "cells"
    if groups is not None:
        codes, names = checks.encode(groups, "groups", len(truth))
        if (codes < 0).any():
            raise ValueError(f"{int((codes < 0).sum())} cells have no group; drop them or give no groups")
        n_groups = len(names)
        if n_groups >= stats.FEW_GROUPS:
            unit, unit_name = codes[cell], "groups"
    score = _Scorer(y, unit, gene, n_boot, seed)
    results = Results()
    for name, (kind, guess) in guesses.items():
        about = {
            "task": "masked",
            "model_id": name,
            "model_kind": kind,
            "n_groups": n_groups,
        }
        for metric, (value, n) in score(guess, guesses["gene_mean"][1]).items():
            over = "genes" if metric == "feature_spearman" else unit_name
            results.add(
                value,
                **about,
                metric=metric,
                n_cells=n,
                ci_method=f"percentile bootstrap over {over}",
                metric_impl=f"scipy=={scipy.__version__}" if over == "genes" else "",
            )
    source = "training cells" if train is not None else "visible entries of the cells that are scored"
    return finish(
        results,
        twins,
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells=len(np.unique(cell)),
        n_genes=len(np.unique(gene)),
        n_masked=len(y),
        zeros_among_masked=round(float((y == 0).mean()), 4),
        gene_means=f"{'expressed ' if expressed_only else ''}{source}",
        dropped={},
        n_groups=n_groups,
        split_scheme="entries hidden from the model",
        n_boot=n_boot,
        seed=seed,
    )


def _dense(X: Any, name: str) -> np.ndarray:
    X = X.to_numpy() if isinstance(X, pd.DataFrame) else X
    X = X.toarray() if sp.issparse(X) else np.asarray(X)
    if X.ndim != 2 or X.dtype.kind not in "biuf":
        raise ValueError(f"{name} has shape {X.shape} of {X.dtype}; numbers [cells, genes] are needed")
    return X


def _finite(X: np.ndarray, where: np.ndarray, name: str, genes: Sequence[str] | None) -> None:
    bad = where & ~np.isfinite(X)
    if bad.any():
        cell, gene = (int(i[0]) for i in np.nonzero(bad))
        called = f"gene {gene}" if genes is None else f"gene {genes[gene]!r}"
        raise ValueError(
            f"{name}: {int(bad.sum())} entries to score are NaN or infinite; the first is cell "
            f"{cell}, {called}"
        )


def _simple(
    truth: np.ndarray, hidden: np.ndarray, train: np.ndarray | None, expressed_only: bool
) -> dict[str, Any]:
    """Predictions [cells, genes] of the means of genes with and without size factors; the overall mean."""
    truth = truth.astype(np.float64)
    visible = ~hidden & (truth != 0) if expressed_only else ~hidden
    source, used = truth, visible
    if train is not None:
        if train.shape[1] != truth.shape[1]:
            raise ValueError(f"train has {train.shape[1]} genes, truth {truth.shape[1]}")
        source = train.astype(np.float64)
        used = source != 0 if expressed_only else np.ones(source.shape, bool)
    n = used.sum(0)
    if not n.any():
        raise ValueError("no visible entry to take the means of genes from; give train=")
    total = np.where(used, source, 0).sum(0)
    overall = total.sum() / n.sum()
    mean = np.where(n > 0, total / np.maximum(n, 1), overall)
    expected = visible @ mean
    size = np.where(visible, truth, 0).sum(1) / np.where(expected != 0, expected, 1)
    size = np.where(visible.any(1) & (expected != 0), size, 1.0)
    return {
        "gene_mean": np.broadcast_to(mean, truth.shape),
        "gene_mean_x_size": size[:, None] * mean,
        "global_mean": overall,
    }


def _dealt(y: np.ndarray, gene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The values of each gene in random order."""
    mixed = np.lexsort((rng.random(len(y)), gene))
    out = np.empty_like(y)
    out[np.argsort(gene, kind="stable")] = y[mixed]
    return out


class _Scorer:
    """Scores of guesses at the masked entries, all under the same resamples.

    y, unit, gene: of each masked entry its true value, what is resampled (cell or group), its gene.
    """

    def __init__(self, y: np.ndarray, unit: np.ndarray, gene: np.ndarray, n_boot: int, seed: int):
        self.y = y
        units, self.unit = np.unique(unit, return_inverse=True)
        self.weights = stats.resample(len(units), n_boot, seed, "masked").astype(np.float64)
        order = np.argsort(gene, kind="stable")
        pieces = np.split(order, np.flatnonzero(np.diff(gene[order])) + 1)
        self.genes = [p for p in pieces if len(p) >= MIN_CELLS and np.ptp(y[p]) > 0]
        self.ranks = [rankdata(y[p]) for p in self.genes]
        self.gene_weights = stats.resample(len(self.genes), n_boot, seed, "masked/genes")

    def __call__(self, guess: np.ndarray, gene_mean: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
        """metric → (score, entries or genes that it is over)."""
        y = self.y
        wrong, by_mean = (guess - y) ** 2, (gene_mean - y) ** 2
        everything, zero = np.ones(len(y), bool), y == 0
        out = {}
        for metric, of in (("masked_mse", everything), ("mse_zero", zero), ("mse_nonzero", ~zero)):
            if of.any():
                out[metric] = self._sum(wrong, of) / self._sum(np.ones(len(y)), of), int(of.sum())
        gain = 1 - self._sum(wrong, everything) / self._sum(by_mean, everything)
        out = {"masked_gain": (gain, len(y)), **out}
        if self.genes:
            pairs = zip(self.genes, self.ranks, strict=True)
            r = np.array([_correlation(rankdata(guess[p]), ranks) for p, ranks in pairs])
            out["feature_spearman"] = stats.median(r, self.gene_weights), len(r)
        return out

    def _sum(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Sum over the entries, for each resample; NaN where a resample holds none of them."""
        n = self.weights.shape[1]
        held = self.weights @ np.bincount(self.unit[of], minlength=n)
        total = self.weights @ np.bincount(self.unit[of], values[of], minlength=n)
        return np.where(held > 0, total, np.nan)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson; 0 where a is constant: it does not order the cells."""
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else 0.0

"""Perturbation prediction: predicted against real effects of perturbations that were held out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import sklearn

from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.perturbation_baselines import Predictor, predictors
from scjax.eval.perturbation_data import Condition, Fold, Keys, Kind, Study, study
from scjax.eval.perturbation_scores import score
from scjax.eval.progress import each
from scjax.eval.representations import twin_names
from scjax.eval.results import Results

SCALE = (2 / 3, 3 / 2)  # by how much predicted profiles may differ from control cells in their largest genes
METHODS = ("linear", "linear G+P", "nearest", "kernel ridge")


@one_thread
def perturbation(
    real: ad.AnnData,
    predictions: Mapping[str, ad.AnnData | pd.DataFrame],
    *,
    perturbation_key: str = "perturbation",
    control: str = "control",
    context_key: str | None = None,
    dose_key: str | None = None,
    train: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    gene_embeddings: Mapping[str, pd.DataFrame] | None = None,
    kind: Kind = "genetic",
    twins: Mapping[str, str] | None = None,
    baselines: Sequence[str] = (),
    counts: str | None = None,
    dataset: str = "",
    n_boot: int = 1000,
    seed: int = 0,
    pretrain_overlap: str = "unknown",
) -> Results:
    """Score predicted effects of held-out perturbations beside everything simple that could predict them.

    Expression is log1p of counts per ten thousand, made here from the raw counts of ``real``; predictions
    must be on that scale and are refused otherwise. An effect is a mean minus that of control cells; truth
    and prediction have different halves of the control cells, since a shared half correlates them.

    Beside ``predictions`` the suite always scores no_change, train_mean (of conditions; train_mean_cells: of
    cells), context_mean, matching_mean, additive (combinations), nearest and linear predictors across
    contexts and doses, linear, nearest and kernel-ridge predictors from components of the training effects
    and from each of ``gene_embeddings``; the controls noise, shuffled (truth of another held-out condition)
    and linear(random); and the ceiling half_split (half of the real cells against the other half). What
    cannot answer a kind of novelty is left out there.

    Args:
        real: cells with raw counts, perturbed and control.
        predictions: by model, predicted cells as AnnData with the same obs columns, or mean profiles as a
            DataFrame [condition × gene] whose index holds the perturbation (levels: perturbation, dose,
            context, as far as their keys are given). Rows of the control are what the model starts from: its
            effects are differences from them, or from our control cells where there are none. May be empty:
            then the gene embeddings are the models.
        perturbation_key, control: obs column, and the value of unperturbed cells in it. Genes of a
            combination are joined by "+".
        context_key: obs column of the cell line, cell type or donor; effects are within contexts.
        dose_key: obs column of the dose.
        train: what predictors may learn from: an obs column, True for training cells (as from
            ``perturbation_split``; control cells marked False are the truth's half); or the training
            perturbations; or those by context. None: each context is held out in turn, or, without contexts,
            each perturbation (predictions then come from models trained so).
        gene_embeddings: tables [gene or compound × d] by name, which describe what is perturbed.
        kind: "genetic" (names are genes, whose own expression does not count for discrimination), "chemical"
            or "environmental".
        twins: model → name of its random-initialised twin, among the predictions or gene embeddings.
        baselines: further rivals among the predictions or gene embeddings, not models under test.
        counts: where raw counts are: a layer, "X" or "raw".
        dataset: name of the data in rows.
        n_boot: resamples behind 95 % intervals: of held-out conditions, or of cells where there are fewer
            than ten of them.
        pretrain_overlap: whether pretraining saw these cells.

    Returns:
        Rows per kind of novelty (``track``) and, under ``label``, per condition.

    Raises:
        KeyError, ValueError: columns, control cells, predictions or genes are missing, or on another scale.
    """
    started = time.perf_counter()
    keys = Keys(perturbation_key, control, context_key, dose_key, kind)
    twins, tables = dict(twins or {}), dict(gene_embeddings or {})
    _check_names(predictions, tables, [*twins, *twins.values()], baselines)
    known_as = {twins[model]: name for model, name in twin_names(twins).items()}
    given = {known_as.get(n, n): _Given(n, p, keys) for n, p in predictions.items()}
    genes = set.intersection(*(set(g.genes) for g in given.values())) if given else None
    data = study(real, keys, genes, train, counts, seed)
    kinds = dict.fromkeys(tables, "baseline" if given else "model") | dict.fromkeys(predictions, "model")
    kinds |= dict.fromkeys(baselines, "baseline") | dict.fromkeys(known_as, "control")
    answers = {name: g.predictor(kinds[g.name], data) for name, g in given.items()}
    of_table = {known_as.get(n, n): kinds[n] for n in tables}
    tables = {known_as.get(n, n): t.set_axis(t.index.astype(str)) for n, t in tables.items()}
    for fold in data.folds:
        for name, found in predictors(data, fold, tables, of_table, seed).items():
            answers.setdefault(name, Predictor(found.kind)).effect.update(found.effect)
    for name, table in tables.items():
        known = sum(any(p in table.index for p in (*c.parts, c.perturbation)) for c in data.test)
        for method in METHODS:
            if (full := f"{method}({name})") in answers:
                answers[full].note = f"the table knows {known} of {len(data.test)} held-out conditions"
    about = {
        "task": "perturbation",
        "split_scheme": _scheme(train, data),
        "metric_impl": f"scjax.eval; scikit-learn=={sklearn.__version__}",
    }
    tracks: dict[str, list[tuple[Condition, Fold]]] = {}
    for fold in data.folds:
        for c in fold.test:
            tracks.setdefault(data.track(c, fold.train), []).append((c, fold))
    out = Results()
    for track in each(sorted(tracks), "perturbation"):
        score(out, data, track, tracks[track], answers, about, n_boot, seed)
    for name in tables:
        if f"linear({name})" not in answers:
            why = (
                "the table describes fewer than four training perturbations (its index must hold their names)"
            )
            row = {**about, "model_id": f"linear({name})", "model_kind": of_table[name]}
            out.skip(why, **row, track=sorted(tracks)[0], metric="pearson_delta")
    pairs = twin_names(twins)
    pairs |= {f"{m}({a})": f"{m}({b})" for a, b in pairs.items() for m in METHODS}
    pairs = {a: b for a, b in pairs.items() if a in answers and b in answers}
    return finish(
        out,
        pairs,
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        tasks=["perturbation"],
        n_cells=int(sum(map(len, data.rows.values()))),
        n_control={c or "all": len(a) + len(b) for c, (a, b) in data.control.items()},
        controls_held_out=data.controls_held_out,
        n_genes=len(data.genes),
        dropped=data.dropped,
        split_scheme=about["split_scheme"],
        kind=kind,
        n_train=sorted({len(f.train) for f in data.folds}),
        n_test={track: len(asked) for track, asked in tracks.items()},
        seed=seed,
        n_boot=n_boot,
    )


def _scheme(train: Any, data: Study) -> str:
    if train is None:
        return f"each {'context' if len(data.control) > 1 else 'perturbation'} held out in turn"
    how = f"obs[{train!r}]" if isinstance(train, str) else "as listed"
    return f"perturbations held out ({how})"


def _check_names(
    predictions: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    twins: Sequence[str],
    baselines: Sequence[str],
) -> None:
    fixed = {
        "no_change", "train_mean", "train_mean_cells", "context_mean", "matching_mean", "additive", "noise",
        "shuffled", "half_split",
    }  # fmt: skip
    if clash := fixed & set(predictions) or {"random", "pca"} & set(tables) or set(predictions) & set(tables):
        raise ValueError(
            f"the name {sorted(clash)[0]!r} is taken by a baseline or given twice; choose another"
        )
    for role, names in (("twins", twins), ("baselines", baselines)):
        if absent := [n for n in names if n not in predictions and n not in tables]:
            raise KeyError(f"{role} names {absent[0]!r}, which is neither a prediction nor a gene embedding")
    for name, table in tables.items():
        if not isinstance(table, pd.DataFrame) or not len(table) or not table.shape[1]:
            raise ValueError(f"gene embedding {name!r} must be a DataFrame [gene × d]")
        if not np.isfinite(table.to_numpy(np.float64)).all():
            raise ValueError(f"gene embedding {name!r} holds NaN or infinite values")
        if table.index.has_duplicates:
            twice = table.index[table.index.duplicated()][0]
            raise ValueError(f"gene embedding {name!r} has several rows for {twice!r}; keep one")


class _Given:
    """A prediction as its owner gave it: rows of cells or of means."""

    def __init__(self, name: str, prediction: ad.AnnData | pd.DataFrame, keys: Keys):
        self.name = name
        if isinstance(prediction, pd.DataFrame):
            levels = prediction.index.nlevels
            if levels != len(keys.all):
                raise ValueError(
                    f"prediction {name!r}: its index has {levels} levels; needed: {', '.join(keys.all)}"
                )
            obs = prediction.index.to_frame(index=False)
            named = set(obs.columns) == set(keys.all)
            obs.columns = obs.columns if named else pd.Index(keys.all)
            self.X: Any = prediction.to_numpy(np.float64)
            self.genes = [str(g) for g in prediction.columns]
        elif isinstance(prediction, ad.AnnData):
            obs = prediction.obs
            if absent := [k for k in keys.all if k not in obs]:
                raise KeyError(
                    f"prediction {name!r} has no obs column {absent[0]!r}; it has: {', '.join(obs)}"
                )
            if prediction.X is None:
                raise ValueError(f"prediction {name!r} has no X")
            self.X = prediction.X if not sp.issparse(prediction.X) else sp.csr_matrix(prediction.X)
            self.genes = [str(g) for g in prediction.var_names]
        else:
            kind = type(prediction).__name__
            raise TypeError(f"prediction {name!r} is a {kind}; an AnnData or a DataFrame is needed")
        values = self.X.data if sp.issparse(self.X) else np.asarray(self.X)
        if not np.isfinite(values).all():
            raise ValueError(f"prediction {name!r} holds NaN or infinite values")
        if len(set(self.genes)) < len(self.genes):
            raise ValueError(f"prediction {name!r} has gene names that occur twice")
        self.whole = bool(values.size and (values == np.rint(values)).all() and values.max() > 1)
        self.rows: dict[Condition, list[int]] = {}
        for i, c in enumerate(keys.conditions(obs)):
            if c is not None:
                self.rows.setdefault(c, []).append(i)

    def predictor(self, kind: str, data: Study) -> Predictor:
        """Predicted effects of the held-out conditions; cells, where there are several for each."""
        if absent := [c for c in data.test if c not in self.rows]:
            raise ValueError(
                f"prediction {self.name!r} lacks {len(absent)} of {len(data.test)} held-out conditions, the "
                f"first {str(absent[0])!r}; predict every one (only what is held out is scored)"
            )
        at = {g: i for i, g in enumerate(self.genes)}
        columns = np.array([at[g] for g in data.genes])

        def cells(c: Condition) -> np.ndarray:
            block = self.X[np.array(self.rows[c])][:, columns]
            return np.asarray(block.toarray() if sp.issparse(block) else block, np.float64)

        mean = {c: cells(c).mean(0) for c in data.test}
        self._check_scale(mean, data)
        control = {k: Condition(data.keys.control, "", k) for k in data.control}
        start = {k: cells(c).mean(0) for k, c in control.items() if c in self.rows}
        effect = {c: mean[c] - start.get(c.context, data.base(c.context)) for c in data.test}
        single = min(len(self.rows[c]) for c in data.test) < 3
        return Predictor(kind, effect, None if single else cells, start)

    def _check_scale(self, mean: Mapping[Condition, np.ndarray], data: Study) -> None:
        """Refuse profiles that cannot be log1p of counts per ten thousand of such cells.

        The most expressed genes of a perturbed cell are those of a control cell, so their sums agree on one
        scale; raw counts, a second logarithm, differences instead of profiles, or a factor show here.
        """
        control = np.mean([data.base(c) for c in data.control], axis=0)
        top = np.argsort(-control, kind="stable")[: max(len(control) // 20, 20)]
        ratio = np.mean([m[top].sum() for m in mean.values()]) / control[top].sum()
        if self.whole:
            what = "holds whole numbers, as counts do"
        elif not SCALE[0] < ratio < SCALE[1]:
            what = (
                f"is {ratio:.2g} times the control cells in their {len(top)} most expressed genes (a factor, "
                "another logarithm or size factor, or differences instead of expression?)"
            )
        else:
            return
        raise ValueError(
            f"prediction {self.name!r} is not on the scale of the truth: it {what}; give expression as "
            "log1p of counts per ten thousand (scanpy: normalize_total(target_sum=1e4), log1p)"
        )

"""Scores of all predictors of one kind of novelty, under the same resamples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import TruncatedSVD

from scjax.eval import perturbation_metrics as measure
from scjax.eval import stats
from scjax.eval.perturbation_baselines import Predictor
from scjax.eval.perturbation_data import Condition, Fold, Study
from scjax.eval.results import Results
from scjax.eval.tasks import TASKS

EXPRESSED = 1000  # genes with the highest expression in control cells, over which errors are taken
CANDIDATES = 100  # real conditions among which a predicted one is looked for
TEST_CELLS = 300  # of each side of a test of differential expression
SAMPLE, DRAWS, AXES = 100, 5, 50  # cells, draws and components for distances between distributions
CHUNK = 50  # resamples of cells at a time
FAST = ("pearson_delta", "pearson_systema", "rmse", "discrimination")  # calibrated, and resampled over cells
AXIS = {
    **dict.fromkeys(("pearson_delta", "pearson_systema", "pearson_top20", "cosine_delta"), "direction"),
    **dict.fromkeys(("rmse", "mae", "wmse"), "error"),
    **dict.fromkeys(("discrimination", "discrimination_l1", "discrimination_l2"), "discrimination"),
    **dict.fromkeys(
        ("de_auprc", "de_overlap", "de_direction", "de_spearman", "de_precision", "de_recall"), "de"
    ),
    **dict.fromkeys(("edistance", "mmd"), "distribution"),
    **dict.fromkeys(("variance_error", "similarity"), "coverage"),
}


class _Track:
    """The held-out conditions of one kind of novelty and what their scores need."""

    def __init__(self, data: Study, asked: Sequence[tuple[Condition, Fold]], seed: int):
        self.data, self.conditions, self.seed = data, [c for c, _ in asked], seed
        self.rng = np.random.default_rng([seed, 7])
        self.base = {k: data.base(k) for k in {c.context for c in self.conditions}}
        self.control = {k: data.mean(data.control[k][0]) for k in self.base}
        self.expressed = {k: np.argsort(-b, kind="stable")[:EXPRESSED] for k, b in self.base.items()}
        self.reference = [
            self._reference(c, f) for c, f in asked
        ]  # mean effect; whether seen in this context
        everyone = data.test  # candidates do not depend on the kind of novelty
        self.candidates = [self._candidates(c, everyone) for c in self.conditions]
        order = {c: self.rng.permutation(data.rows[c]) for c in dict.fromkeys(everyone)}
        self.order = order
        self.halves = {c: (r[: len(r) // 2], r[len(r) // 2 :]) for c, r in order.items()}
        self.ceiling = Predictor(
            "oracle",
            {c: data.mean(self.halves[c][1]) - self.base[c.context] for c in self.conditions},
            lambda c: data.cells(self.halves[c][1]),
        )
        self.needed = list(dict.fromkeys([*self.conditions, *(j for c in self.candidates for j in c)]))

    def _reference(self, condition: Condition, fold: Fold) -> tuple[np.ndarray, bool] | None:
        """Mean of the training conditions' centroids (Systema, Vinas Torne et al. 2025), moved to this
        context where it has none; None where training holds one perturbation only.
        """
        here = [c for c in fold.train if c.context == condition.context]
        of = here if len({c.perturbation for c in here}) > 1 else fold.train
        if len({c.perturbation for c in of}) < 2:
            return None
        effects = [self.data.centroid(c) - self.data.base(c.context) for c in of]
        return np.mean(effects, axis=0), of is here

    def _candidates(self, condition: Condition, everyone: Sequence[Condition]) -> list[Condition]:
        """The condition itself first, then others of its context: the same for all predictors."""
        others = [c for c in everyone if c.context == condition.context and c != condition]
        if len(others) >= CANDIDATES:
            others = [others[i] for i in self.rng.choice(len(others), CANDIDATES - 1, replace=False)]
        return [condition, *others]

    def profiles(
        self,
        predictors: Sequence[Predictor],
        truth: Mapping[Condition, np.ndarray],
        control: Mapping[str, np.ndarray],
        full: bool = False,
    ) -> dict[str, np.ndarray]:
        """Scores [B, conditions, predictors] against true mean profiles [B, genes] and control
        means [B, genes]; ``full``: also the measures that are not resampled over cells.
        """
        shape = (len(next(iter(truth.values()))), len(self.conditions), len(predictors))
        out = {m: np.full(shape, np.nan) for m in FAST}
        if full:
            extra = (
                "cosine_delta", "pearson_top20", "mae", "wmse", "discrimination_l1", "discrimination_l2",
            )  # fmt: skip
            out |= {m: np.full(shape, np.nan) for m in extra}
        for i, c in enumerate(self.conditions):
            M = np.stack([p.effect[c] for p in predictors])
            t, base, top = truth[c], self.base[c.context], self.expressed[c.context]
            delta = t - control[c.context]
            absolute = M + np.stack([p.start.get(c.context, base) for p in predictors])
            out["pearson_delta"][:, i] = measure.pearson(delta, M)
            out["rmse"][:, i] = measure.rmse(t[:, top], absolute[:, top])
            if (reference := self.reference[i]) is not None:
                mean, here = reference
                # centroids of this context, or a mean effect on either side's own half of the control cells:
                # a control half in both would correlate them
                beyond = t - base - mean if here else delta - mean
                out["pearson_systema"][:, i] = measure.pearson(beyond, M - mean)
            keep = np.setdiff1d(np.arange(len(self.data.genes)), self.data.targets(c))
            among = self.candidates[i]
            if len(among) > 1:
                T = np.stack([truth[j][:, keep] - control[j.context][:, keep] for j in among])
                flat = T.reshape(-1, len(keep))
                own = M[:, keep]
                distances = {"discrimination": 1 - measure.cosine(flat, own)}
                if full:
                    distances["discrimination_l1"] = cdist(flat, own, "cityblock")
                    distances["discrimination_l2"] = cdist(flat, own)
                for name, d in distances.items():
                    d = np.moveaxis(d.reshape(len(among), shape[0], -1), 0, -1)
                    out[name][:, i] = measure.rank_score(np.round(d, 12), 0)
            if full:
                changed = np.argsort(-np.abs(delta[0]), kind="stable")[:20]
                out["pearson_top20"][:, i] = measure.pearson(delta[:, changed], M[:, changed])
                out["cosine_delta"][:, i] = measure.cosine(delta, M)
                out["mae"][:, i] = measure.mae(t[:, top], absolute[:, top])
                out["wmse"][:, i] = measure.weighted_mse(t, absolute, self._clarity(c))
        return out

    def _clarity(self, c: Condition) -> np.ndarray:
        """Welch's t of the condition against control cells, per gene."""
        sides = [self.data.log[r] for r in (self.data.rows[c], self.data.control[c.context][0])]
        mean = [np.asarray(s.mean(0), np.float64).ravel() for s in sides]
        square = [np.asarray(s.multiply(s).mean(0), np.float64).ravel() for s in sides]
        error = sum((q - m**2) / s.shape[0] for s, m, q in zip(sides, mean, square, strict=True))
        return (mean[0] - mean[1]) / np.sqrt(np.maximum(error, 1e-8))

    def full_truth(self) -> tuple[dict[Condition, np.ndarray], dict[str, np.ndarray]]:
        """True means of the conditions and of the truth's control cells."""
        truth = {c: self.data.centroid(c)[None] for c in self.needed}
        return truth, {k: v[None] for k, v in self.control.items()}

    def half_truth(self, half: int) -> dict[Condition, np.ndarray]:
        return {c: self.data.mean(self.halves[c][half])[None] for c in self.needed}

    def over_cells(self, predictors: Sequence[Predictor], n_boot: int) -> dict[str, np.ndarray]:
        """The fast scores [1 + n_boot, conditions, predictors] with the real cells resampled.

        Resampling adds noise to the truth and so lowers every score; callers centre them.
        """
        sides: dict[Any, np.ndarray] = {c: self.data.rows[c] for c in self.needed}
        sides |= {k: self.data.control[k][0] for k in self.control}
        cells = {s: self.data.cells(r) for s, r in sides.items()}
        weights = {
            s: stats.resample(len(x), n_boot, self.seed, f"perturbation/{s}") for s, x in cells.items()
        }
        parts = []
        for start in range(0, 1 + n_boot, CHUNK):
            rows = slice(start, start + CHUNK)
            mean = {
                s: (weights[s][rows].astype(np.float32) @ x).astype(np.float64) / len(x)
                for s, x in cells.items()
            }
            truth = {c: mean[c] for c in self.needed}
            parts.append(self.profiles(predictors, truth, {k: mean[k] for k in self.control}))
        return {m: np.concatenate([p[m] for p in parts]) for m in FAST}

    def expression(self, predictors: Mapping[str, Predictor]) -> dict[str, np.ndarray]:
        """Measures of differential expression [conditions, predictors (half_split last)]."""
        names = ("de_auprc", "de_overlap", "de_direction", "de_spearman", "de_precision", "de_recall")
        out = {m: np.full((len(self.conditions), len(predictors) + 1), np.nan) for m in names}
        for i, c in enumerate(self.conditions):
            ours, theirs = (self.data.cells(r[:TEST_CELLS]) for r in self.data.control[c.context])
            whole = self._changed(self.order[c], ours)
            first = self._changed(self.halves[c][0], ours)
            for k, p in enumerate([*predictors.values(), self.ceiling]):
                real, effect = first if p is self.ceiling else whole, p.effect[c]
                out["de_auprc"][i, k] = measure.de_auprc(real, np.abs(effect))
                out["de_overlap"][i, k] = measure.de_overlap(real, effect)
                out["de_direction"][i, k] = measure.de_direction(real, effect)
                out["de_spearman"][i, k] = measure.de_spearman(real, effect)
                if p.cells is not None:
                    called = measure.differential(p.cells(c)[:TEST_CELLS], theirs)
                    out["de_precision"][i, k] = measure.de_precision(real, called)
                    out["de_recall"][i, k] = measure.de_recall(real, called)
        return out

    def _changed(self, rows: np.ndarray, control: np.ndarray) -> measure.Changed:
        """Differential expression of real cells; effects as differences of mean log1p expression, as those of
        predictions are.
        """
        cells = self.data.cells(rows[:TEST_CELLS])
        effect = cells.mean(0, dtype=np.float64) - control.mean(0, dtype=np.float64)
        return dataclasses.replace(measure.differential(cells, control), effect=effect)

    def distribution(self, predictors: Mapping[str, Predictor]) -> dict[str, np.ndarray]:
        """Distances between predicted and real cells [conditions, predictors (half_split last)] in components
        of all real cells (the space of the measure, no predictor's); a prediction of means is the control
        cells moved by its effect.

        The same number of cells on both sides and for all conditions, means over a few draws.
        """
        out = {
            m: np.full((len(self.conditions), len(predictors) + 1), np.nan)
            for m in ("edistance", "mmd", "variance_error")
        }
        rows = np.concatenate([self.data.rows[c] for c in self.conditions])
        rows = np.unique(np.concatenate([rows, *(b for a in self.base for b in self.data.control[a])]))
        rows = self.rng.choice(rows, min(len(rows), 3000), replace=False)
        n_axes = min(AXES, len(self.data.genes) - 1, len(rows) - 1)
        axes = TruncatedSVD(n_axes, random_state=self.seed).fit(self.data.log[rows]).components_.T
        n = min(SAMPLE, *(len(h) for c in self.conditions for h in self.halves[c]))
        n = min([n, *(len(self.data.control[k][1]) for k in self.base)])
        for i, c in enumerate(self.conditions):
            real = self.data.cells(self.order[c])
            first = self.data.cells(self.halves[c][0])
            moved = self.data.cells(self.data.control[c.context][1]) @ axes
            width = float(np.median(pdist(real[:SAMPLE] @ axes)))
            for k, p in enumerate([*predictors.values(), self.ceiling]):
                truth = first if p is self.ceiling else real
                if p.cells is None:
                    placed = moved + p.effect[c] @ axes
                else:
                    cells = p.cells(c)
                    out["variance_error"][i, k] = measure.variance_error(truth, cells)
                    placed = cells @ axes
                found = []
                for draw in range(DRAWS):
                    rng = np.random.default_rng([self.seed, 8, draw])
                    x = truth[rng.choice(len(truth), n, replace=False)] @ axes
                    y = placed[rng.choice(len(placed), min(n, len(placed)), replace=False)]
                    found.append((measure.energy_distance(x, y), measure.mmd(x, y, width)))
                out["edistance"][i, k], out["mmd"][i, k] = np.mean(found, axis=0)
        return out


def score(
    out: Results,
    data: Study,
    name: str,
    asked: Sequence[tuple[Condition, Fold]],
    answers: Mapping[str, Predictor],
    about: Mapping[str, Any],
    n_boot: int,
    seed: int,
) -> None:
    """Add the rows of one kind of novelty to ``out``."""
    track = _Track(data, asked, seed)
    conditions = track.conditions
    known = {n: p for n, p in answers.items() if all(c in p.effect for c in conditions)}
    if (shuffled := _shuffled(track)) is not None:
        known["shuffled"] = shuffled
    names, every = list(known), list(known.values())
    whole = {m: v[0] for m, v in track.profiles(every, *track.full_truth(), full=True).items()}
    control = {k: v[None] for k, v in track.control.items()}
    halves = []
    for i in (0, 1):
        other = {c: data.mean(track.halves[c][1 - i]) - track.base[c.context] for c in conditions}
        sides = [*every, Predictor("oracle", other)]
        halves.append(track.profiles(sides, track.half_truth(i), control, full=True))
    half = {m: (halves[0][m][0] + halves[1][m][0]) / 2 for m in halves[0]}
    table = {m: np.concatenate([whole[m], half[m][:, -1:]], 1) for m in whole}
    table |= track.expression(known) | track.distribution(known)
    names.append("half_split")
    kinds = [*(p.kind for p in known.values()), "oracle"]
    notes = [*(p.note for p in known.values()), "half of the cells against the other half"]
    few = len(conditions) < stats.FEW_GROUPS
    weights = stats.resample(len(conditions), 0 if few else n_boot, seed, f"perturbation/{name}")
    sampled = track.over_cells(every, n_boot) if few and n_boot else {}
    method = f"percentile bootstrap over {'real cells' if few else 'held-out conditions'}" + (
        f" (fewer than {stats.FEW_GROUPS} held-out conditions)" if few else ""
    )
    n_cells = int(sum(len(data.rows[c]) for c in conditions))
    floor = "context_mean" if "context_mean" in known else "train_mean"
    true_effect = {c: data.centroid(c) - track.control[c.context] for c in conditions}
    for k, (model, kind) in enumerate(zip(names, kinds, strict=True)):
        row: dict[str, Any] = {**about, "track": name, "model_id": model, "model_kind": kind}
        row |= {"n_cells": n_cells, "n_groups": len(conditions), "ci_method": method}
        for metric, values in table.items():
            defined = np.isfinite(values[:, k])
            if not np.isfinite(values).any() or (
                metric in ("variance_error", "de_precision", "de_recall") and not defined.any()
            ):
                continue  # this track cannot have the measure, or this prediction has no cells
            value = stats.mean(values[:, k], weights)
            if metric in sampled and k < len(known):
                value = stats.centred(np.nanmean(sampled[metric][:, :, k], axis=1))
            absent = f"undefined for {int((~defined).sum())} of {len(defined)} conditions"
            note = "; ".join(filter(None, [notes[k], "" if defined.all() else absent]))
            out.add(value, **row, metric=metric, axis=AXIS[metric], note=note)
            if metric in TASKS["perturbation"].headline:
                for c, v in zip(conditions, values[:, k], strict=True):
                    if np.isfinite(v):
                        alone = {"n_groups": 1, "n_cells": len(data.rows[c]), "ci_method": ""}
                        out.add([v], **row | alone, metric=metric, axis=AXIS[metric], label=str(c))
        predicted = known[model].effect if model in known else true_effect
        spread = np.stack([predicted[c] for c in conditions])
        if len(conditions) > 1:
            out.add([measure.similarity(spread)], **row, metric="similarity", axis="coverage")
        for metric in FAST:
            if np.isfinite(half[metric]).any():
                mine, blind, best = (
                    stats.mean(half[metric][:, i], weights) for i in (k, names.index(floor), -1)
                )
                calibrated, why = _calibrated(mine, blind, best, metric)
                out.add(calibrated, **row, metric="calibrated", setting=metric, note=why)
    sizes = [np.linalg.norm(true_effect[c][track.expressed[c.context]]) for c in conditions]
    at = names.index(floor)
    out.panels.append(
        {
            "panel": "effects",
            "track": name,
            "names": [str(c) for c in conditions],
            "effect": [round(float(e), 4) for e in sizes],
            "metric": "pearson_delta",
            "baseline_id": floor,
            "baseline": [round(float(v), 4) for v in table["pearson_delta"][:, at]],
        }
    )
    out.facts.setdefault("candidates", {})[name] = sorted({len(c) for c in track.candidates})
    out.facts.setdefault("floor", {})[name] = floor


def _shuffled(track: _Track) -> Predictor | None:
    """The real effect of another held-out condition of the same context, for each; None where none is."""
    if any(len(c) < 2 for c in track.candidates):
        return None
    effect = {}
    for c, among in zip(track.conditions, track.candidates, strict=True):
        other = among[1 + int(track.rng.integers(len(among) - 1))]
        effect[c] = track.data.centroid(other) - track.base[c.context]
    return Predictor("control", effect, note="the truth of another held-out condition")


def _calibrated(
    score: np.ndarray, floor: np.ndarray, ceiling: np.ndarray, metric: str
) -> tuple[np.ndarray, str]:
    """(score − floor) / (ceiling − floor), resample by resample; NaN where the ceiling is not above the
    floor, where the measure cannot tell predictions apart on these data.
    """
    sign = -1 if metric == "rmse" else 1
    room = sign * (ceiling - floor)
    sure = room[0] > 0.02 * max(abs(ceiling[0]), abs(floor[0])) and (
        len(room) == 1 or stats.interval(room)[0] > 0
    )
    if not sure:
        return np.array([np.nan]), "half of the real cells is not clearly nearer than the mean effect"
    return np.where(room > 0, sign * (score - floor) / np.where(room > 0, room, 1), np.nan), ""

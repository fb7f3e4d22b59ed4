"""How far a head's probabilities can be believed, and which cells had better get no label.

Host side: numpy arrays of cells that training has not seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax, softmax
from scipy.stats import binom

RANGE = (-3.0, 3.0)  # of the logarithm of a temperature


def log_loss(outputs: np.ndarray, target: np.ndarray, temperature: float = 1.0) -> float:
    """Mean -log probability of the target.

    Args:
      outputs: float [n, C], logits.
      target: int [n], classes; or float [n, C] of 0, 1 and NaN, several classes a cell.
      temperature: that the logits are divided by.
    """
    y = np.asarray(outputs, np.float64) / temperature
    if target.ndim == 1:
        return float(-log_softmax(y, axis=1)[np.arange(len(y)), target].mean())
    known = np.isfinite(target)
    signed = np.where(target > 0.5, y, -y)
    return float(-log_expit(signed)[known].mean())


def fit_temperature(outputs: np.ndarray, target: np.ndarray, units: int | None = None) -> float:
    """The number that logits must be divided by for the smallest :func:`log_loss` (Guo et al., ICML 2017).

    It changes no cell's best class. Between exp(-3) and exp(3); 1 where there is no cell. The loss is that of
    the cells and of one unit more, for which every class is as likely as any other: where all are right the
    model would else be as sure as can be (after Platt, 1999).

    Args:
      outputs, target: as of :func:`log_loss`.
      units: how many there are that do not hang together: cells, the default, or genes that many cells have.
    """
    if not len(target):
        return 1.0
    n = len(target) if units is None else units

    def loss(t: float) -> float:
        y = np.asarray(outputs, np.float64) / math.exp(t)
        if target.ndim == 1:
            any_class = -log_softmax(y, axis=1).mean()
        else:
            any_class = -(log_expit(y) + log_expit(-y))[np.isfinite(target)].mean() / 2
        return (n * log_loss(outputs, target, math.exp(t)) + any_class) / (n + 1)

    found = minimize_scalar(loss, bounds=RANGE, method="bounded")
    return float(math.exp(found.x))


def reliability(confidence: np.ndarray, right: np.ndarray, n_bins: int = 10) -> dict[str, Any]:
    """Confidence against accuracy in bins with equally many cells, and the expected calibration error.

    Returns:
      ``{"ece", "bins": [{"cells", "confidence", "accuracy"}]}``: the error is the mean over cells of the
      distance between the two.
    """
    bins, error = [], 0.0
    for rows in np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, max(len(confidence), 1))):
        if len(rows):
            c, a = float(confidence[rows].mean()), float(right[rows].mean())
            bins.append({"cells": len(rows), "confidence": c, "accuracy": a})
            error += abs(c - a) * len(rows) / len(confidence)
    return {"ece": error, "bins": bins}


@dataclasses.dataclass(frozen=True)
class Rule:
    """From which confidence on a cell gets a label, and what that promises.

    Attributes:
      threshold: least confidence; infinite where no threshold can promise it.
      max_error, certainty: with this certainty (over the draw of the cells that set the threshold) at most
        this share of the cells that get a label get a wrong one, if the cells to be labelled are drawn like
        them.
      cells, assigned, wrong: the cells that set it, those of them that got a label, and a wrong one.
    """

    threshold: float
    max_error: float
    certainty: float
    cells: int
    assigned: int
    wrong: int

    def __str__(self) -> str:
        if math.isinf(self.threshold):
            return (
                f"no threshold keeps errors below {self.max_error:.0%} with a certainty of "
                f"{self.certainty:.0%} on {self.cells:,} held-out cells: all cells are unassigned"
            )
        return (
            f"confidence of at least {self.threshold:.3f}: with a certainty of {self.certainty:.0%} at most "
            f"{self.max_error:.0%} of the assigned cells are wrong, if they are drawn like the "
            f"{self.cells:,} held-out cells; of those {self.assigned:,} are assigned, {self.wrong:,} wrongly"
        )


def unassigned_rule(
    confidence: np.ndarray, right: np.ndarray, max_error: float, certainty: float = 0.9, n_steps: int = 40
) -> Rule:
    """The lowest threshold on the confidence that passes a test of its error rate.

    Thresholds are tried from the strictest on, and the first that fails ends it, so that testing many costs
    no certainty (fixed sequence testing: Angelopoulos et al., "Learn then test", 2021). A threshold passes
    where so few errors among so many assigned cells would have a probability of at most 1 - certainty, were
    the error rate above ``max_error`` (exact binomial tail). The strictest assigns a tenth of the cells, or
    as many as it takes to pass at all.

    Args:
      confidence: float [n], of cells that neither trained nor tuned what gives the confidence.
      right: bool [n], whether the label would be right.
      max_error: largest share of wrong labels among those given.
      certainty: see :class:`Rule`.
      n_steps: thresholds that are tried.

    Raises:
      ValueError: a share that is not between 0 and 1.
    """
    for name, value in (("max_error", max_error), ("certainty", certainty)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
    n = len(confidence)
    order = np.argsort(-confidence, kind="stable")
    ordered, wrong = confidence[order], np.cumsum(~np.asarray(right, bool)[order])
    fewest = math.ceil(math.log(1 - certainty) / math.log(1 - max_error))
    first, best, assigned, errors = max(fewest, n // 10), math.inf, 0, 0
    for k in np.unique(np.linspace(first, n, n_steps).astype(int)) if n >= fewest else ():
        k = int(np.searchsorted(-ordered, -ordered[k - 1], side="right"))  # ties get their label together
        if binom.cdf(wrong[k - 1], k, max_error) > 1 - certainty:
            break
        best, assigned, errors = float(ordered[k - 1]), k, int(wrong[k - 1])
    return Rule(best, max_error, certainty, n, assigned, errors)


def judge(
    kind: str,
    outputs: np.ndarray,
    target: np.ndarray,
    max_error: float | None = None,
    tunes: np.ndarray | None = None,
    units: int | None = None,
) -> tuple[float, dict[str, Any]]:
    """``(temperature, report)`` of a task on held-out cells.

    Args:
      kind: of the :class:`scjax.finetune.Task`.
      outputs: float [n, size], logits; of a regression, values in the units of the target.
      target: int [n], -1 where unknown, or float [n, size], NaN where unknown.
      max_error: of the rule that leaves cells unassigned; None for no rule.
      tunes: bool [n], the cells that set the temperature; the others judge it, and set the rule. None: all do
        both, and what is told of the temperature is too good.
      units: of :func:`fit_temperature`.

    Returns:
      The report: ``cells`` and, of classes, ``accuracy``, ``macro_f1`` over the classes that occur, and of
      the cells that judge the temperature, ``judged``, ``log_loss`` and ``ece`` before and after it,
      ``reliability``, ``rule``; of an order also ``mean_rank_error``; of several labels ``log_loss`` and
      ``average_precision``; of a regression ``r2`` and ``rmse``, means over its values.
    """
    from sklearn.metrics import average_precision_score, f1_score

    report: dict[str, Any] = {}
    sets = judges = np.ones(len(target), bool)
    if tunes is not None:
        sets, judges = tunes, ~tunes
    if kind in ("classes", "ordinal"):
        known = target >= 0
        outputs, target, sets, judges = outputs[known], target[known], sets[known], judges[known]
        if not len(target):
            return 1.0, {"cells": 0}
        temperature = fit_temperature(outputs[sets], target[sets], units)
        guess, report = outputs.argmax(1), report | {"cells": len(target)}
        report["accuracy"] = float((guess == target).mean())
        report["macro_f1"] = float(f1_score(target, guess, labels=np.unique(target), average="macro"))
        if kind == "ordinal":
            report["mean_rank_error"] = float(np.abs(guess - target).mean())
        report |= {"temperature": temperature, "judged": int(judges.sum())}
        if not judges.any():
            return temperature, report
        outputs, target, right = outputs[judges], target[judges], (guess == target)[judges]
        for name, t in (("before", 1.0), ("after", temperature)):
            confidence = softmax(outputs / t, axis=1).max(1)
            told = reliability(confidence, right)
            report |= {f"log_loss_{name}": log_loss(outputs, target, t), f"ece_{name}": told["ece"]}
        report["reliability"] = told["bins"]
        if max_error is not None:
            report["rule"] = _plain(dataclasses.asdict(unassigned_rule(confidence, right, max_error)))
        return temperature, report
    target = target.reshape(outputs.shape)
    known = np.isfinite(target)
    report = {"cells": int(known.any(-1).sum())}
    if not known.any():
        return 1.0, report
    columns = [c for c in range(outputs.shape[1]) if known[:, c].sum() > 1]
    if kind == "multilabel":
        sets, judges = sets & known.any(-1), judges & known.any(-1)
        temperature = fit_temperature(outputs[sets], target[sets], units)
        report["judged"] = int(judges.sum())
        if judges.any():
            report |= {f"log_loss_{name}": log_loss(outputs[judges], target[judges], t)
                       for name, t in (("before", 1.0), ("after", temperature))}  # fmt: skip
        scores = [average_precision_score(target[known[:, c], c], outputs[known[:, c], c]) for c in columns
                  if target[known[:, c], c].any()]  # fmt: skip
        report["average_precision"] = float(np.mean(scores)) if scores else None
        return temperature, report | {"temperature": temperature}
    error = np.where(known, outputs - target, 0.0)
    report["rmse"] = float(np.sqrt((error**2).sum() / known.sum()))
    explained = []
    for c in columns:
        y = target[known[:, c], c]
        explained.append(1 - (error[known[:, c], c] ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-12))
    report["r2"] = float(np.mean(explained)) if explained else None
    return 1.0, report


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Infinity has no place in JSON."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in mapping.items()}

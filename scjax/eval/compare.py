"""Paired differences within an evaluation: each model against the best simple baseline and its untrained
twin.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from scjax.eval import stats
from scjax.eval.environment import provenance
from scjax.eval.results import Results, key
from scjax.eval.schema import MEAN
from scjax.eval.tasks import TASKS
from scjax.eval.verdict import BEST, TWIN


def finish(
    results: Results,
    twins: Mapping[str, str],
    *,
    started: float,
    dataset: str,
    pretrain_overlap: str,
    wall: Mapping[str, float] | None = None,
    **facts: Any,
) -> Results:
    """What every suite ends with: its name and overlap in each row, differences, the facts of the report.

    Args:
        twins: as for :func:`conclude`.
        started: ``time.perf_counter()`` when the suite began. wall: seconds of its parts, if it took them.
        dataset, pretrain_overlap: fields of every row, and facts.
        facts: further facts.
    """
    for entry in results.rows:
        entry |= {"dataset": dataset, "pretrain_overlap": pretrain_overlap}
    conclude(results, twins)
    results.facts |= provenance() | {"dataset": dataset} | facts
    results.facts |= {"twins": dict(twins), "pretrain_overlap": pretrain_overlap}
    results.facts["wall_s"] = {**(wall or {}), "all": round(time.perf_counter() - started, 2)}
    return results


_PLACE = ("task", "track", "head", "setting")  # what is compared lies at one place of the tables


def conclude(results: Results, twins: Mapping[str, str] | None = None) -> Results:
    """Append to ``results`` what its models are worth beside their rivals, and return it.

    For every headline metric of every task, under each head and setting: model − best simple baseline (best
    by the leading metric, under the same head) and model − its twin. Both sides were scored under the same
    resamples of the same units, so their scores are subtracted resample by resample: the interval is that of
    the paired difference, its p-value two-sided from the same resamples, and ``p_holm`` corrects (Holm 1979)
    over all models, partners and tracks of a task in its leading metric.

    Args:
        twins: name of a model → name of its random-initialised twin among the rows.
    """
    twins = dict(twins or {})
    fresh: list[dict[str, Any]] = []
    for place in dict.fromkeys(tuple(r[c] for c in _PLACE) for r in results.rows):
        at = dict(zip(_PLACE, place, strict=True))
        task = TASKS[at["task"]]
        if at["setting"] in task.uncompared:
            continue
        rows = [r for r in results.rows if tuple(r[c] for c in _PLACE) == place and not r["label"]]
        rows = [r for r in rows if r["status"] == "ok" and not r["versus"]]
        best = _best(rows, task.headline[0])
        for entry in rows:
            if entry["model_kind"] == "model" and entry["metric"] in task.headline:
                if best is not None:
                    fresh += _difference(results, entry, best, BEST)
                if entry["model_id"] in twins:
                    fresh += _difference(results, entry, twins[entry["model_id"]], TWIN)
    for name, task in TASKS.items():
        family = [r for r in fresh if r["task"] == name and r["metric"] == task.headline[0]]
        family = [r for r in family if r["group"] in ("", MEAN) and r["p_value"] is not None]
        for entry, p in zip(family, stats.holm([r["p_value"] for r in family]), strict=True):
            entry["p_holm"] = float(p)
    results.rows += fresh
    return results


def _best(rows: Iterable[Mapping[str, Any]], metric: str) -> str | None:
    """The baseline with the best leading score, over all groups where there are several."""
    scores = [r for r in rows if r["metric"] == metric and r["model_kind"] == "baseline"]
    overall = [r for r in scores if r["group"] in ("", MEAN)] or scores
    if not overall:
        return None
    sign = -1 if overall[0]["direction"] == "min" else 1
    return max(overall, key=lambda r: sign * r["value"])["model_id"]


def _difference(results: Results, entry: dict[str, Any], other: str, role: str) -> list[dict[str, Any]]:
    """The row of model − other, or nothing where the two have no resamples in common."""
    mine, theirs = key(entry), key({**entry, "model_id": other})
    if mine not in results.scores or theirs not in results.scores:
        return []
    difference = results.scores[mine] - results.scores[theirs]
    low, high = stats.interval(difference)
    return [
        {
            **entry,
            "value": float(difference[0]),
            "ci_low": low,
            "ci_high": high,
            "p_value": stats.p_value(difference),
            "versus": other,
            "versus_role": role,
            "ci_method": f"paired {entry['ci_method']}",
            "note": "",
        }
    ]

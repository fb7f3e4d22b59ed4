"""Sanity gates: what must hold before a score is worth reading, and what it then says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pandas as pd

from scjax.eval import tables


class Gate(NamedTuple):
    """One finding. ``fail``: the scores must not be believed or do not speak for the model; ``caution``:
    read with care; ``note``: for the record; ``pass``: checked and in order.
    """

    level: Literal["fail", "caution", "note", "pass"]
    message: str


LEADING = (  # task, metric, head, setting
    ("annotation", "macro_f1", "logistic", ""),
    ("clustering", "nmi", "leiden", tables.FIXED),
    ("clustering", "nmi", "kmeans", ""),
    ("integration", "bio", "", ""),
)


def gates(frame: pd.DataFrame, facts: Mapping[str, Any]) -> list[Gate]:
    """All gates of an evaluation, the worst first."""
    if frame.empty:
        return []
    rows = frame[frame["label"].eq("") & frame["status"].eq("ok")]
    scores, differences = rows[rows["versus"].eq("")], rows[rows["versus"].ne("")]
    found: list[Gate] = []
    for model in dict.fromkeys(scores.loc[scores["model_kind"] == "model", "model_id"]):
        for task, metric, head, setting in LEADING:
            of_task = scores[
                scores["task"].eq(task) & scores["metric"].eq(metric) & scores["setting"].eq(setting)
            ]
            of_task = of_task[of_task["head"].isin((head, "majority"))]
            for group in _groups(of_task):
                found += _against_controls(model, of_task[of_task["group"] == group], task, metric, group)
        found += _batch_axis(model, scores)
        found += _twin(model, differences, facts)
    found += _data(frame, facts)
    order = ("fail", "caution", "note", "pass")
    return sorted(dict.fromkeys(found), key=lambda gate: order.index(gate.level))


def _groups(rows: pd.DataFrame) -> list[str]:
    """Held-out groups when they are few enough to be read one by one, else their mean."""
    groups = list(dict.fromkeys(rows["group"]))
    single = [g for g in groups if g != tables.MEAN]
    return single if len(single) <= 3 else [tables.MEAN]


def _against_controls(model: str, rows: pd.DataFrame, task: str, metric: str, group: str) -> list[Gate]:
    values = dict(zip(rows["model_id"], rows["value"], strict=True))
    if model not in values:
        return []
    where = f"{task}, {tables.METRIC_NAMES[metric]}" + (f", {group}" if group else "")
    controls = rows[rows["model_kind"].eq("control")]
    floor = {
        name: kind_value
        for name, kind_value in zip(controls["model_id"], controls["value"], strict=True)
        if not name.startswith("random_init")
    }
    beaten_by = {name: v for name, v in floor.items() if v >= values[model]}
    if beaten_by:
        text = ", ".join(f"{name} {v:.3f}" for name, v in beaten_by.items())
        return [
            Gate(
                "fail",
                f"{where}: {text} does as well as {model} {values[model]:.3f} or better; a control that "
                "knows nothing of cell identity must not",
            )
        ]
    return (
        [Gate("pass", f"{where}: {model} {values[model]:.3f} is above {', '.join(floor)}")] if floor else []
    )


def _batch_axis(model: str, scores: pd.DataFrame) -> list[Gate]:
    rows = scores[scores["task"].eq("integration")]
    value = {(m, axis): v for m, axis, v in zip(rows["model_id"], rows["metric"], rows["value"], strict=True)}
    if ("noise", "batch") not in value or (model, "batch") not in value:
        return []
    noise, own = value["noise", "batch"], value[model, "batch"]
    if noise < own:
        return []
    return [
        Gate(
            "caution",
            f"integration: pure noise mixes batches better ({noise:.3f}) than {model} ({own:.3f}), as it "
            "nearly always does; batch mixing means nothing without bio conservation beside it",
        )
    ]


def _twin(model: str, differences: pd.DataFrame, facts: Mapping[str, Any]) -> list[Gate]:
    rows = differences[differences["model_id"].eq(model)]
    if model not in facts.get("twins", {}):
        return [
            Gate(
                "caution",
                f"no random-initialised twin of {model} was given (controls={{'random_init': key}}): "
                "what pretraining adds to its architecture is not known",
            )
        ]
    found = []
    for task, metric, head, setting in LEADING:
        of = rows[
            rows["task"].eq(task)
            & rows["metric"].eq(metric)
            & rows["head"].eq(head)
            & rows["setting"].eq(setting)
        ]
        of = of[of["versus_role"].eq(TWIN)]
        for group in _groups(of):
            r = of[of["group"] == group].iloc[0].to_dict()
            where = f"{task}, {tables.describe(r)}"
            text = tables.number(r, signed=True)
            if r["value"] <= 0:
                found.append(
                    Gate("fail", f"{where}: {model} is not ahead of its random-initialised twin ({text})")
                )
            elif r["ci_low"] <= 0:
                found.append(
                    Gate(
                        "caution",
                        f"{where}: {model} is ahead of its random-initialised twin by {text}; the "
                        "interval includes zero",
                    )
                )
            else:
                found.append(
                    Gate("pass", f"{where}: {model} is ahead of its random-initialised twin by {text}")
                )
    return found


TWIN = "random-initialised twin"
BEST = "best simple baseline"


def _data(frame: pd.DataFrame, facts: Mapping[str, Any]) -> list[Gate]:
    found = []
    annotated = frame[frame["task"] == "annotation"]
    if annotated["split_scheme"].str.contains("CELLS").any():
        found.append(
            Gate(
                "caution",
                "annotation was split over CELLS, not groups: cells of one donor or study are on both "
                "sides, so these scores do not speak for new donors or studies (give group_key)",
            )
        )
    for r in (
        frame[frame["status"] == "skipped"].drop_duplicates(["model_id", "task", "note"]).to_dict("records")
    ):
        found.append(
            Gate(
                "caution" if r["model_kind"] in ("baseline", "control") else "note",
                f"{r['task']}: {r['model_id']} {r['head']} was skipped: {r['note']}",
            )
        )
    for group, names in facts.get("unseen_labels", {}).items():
        found.append(
            Gate(
                "note",
                f"annotation, {group}: no training cell had the label {', '.join(names)}; every method "
                "scores 0 on it (macro-F1 over the other classes is given apart)",
            )
        )
    n_groups = facts.get("n_groups", 0)
    if 0 < n_groups < 10:
        found.append(
            Gate(
                "note",
                f"only {n_groups} groups: intervals are over the cells of held-out groups and say nothing "
                "about the spread between groups; scores per group are shown",
            )
        )
    overlap = facts.get("pretrain_overlap", "unknown")
    if overlap != "none":
        found.append(Gate("note", f"overlap of these cells with the pretraining data: {overlap}"))
    return found

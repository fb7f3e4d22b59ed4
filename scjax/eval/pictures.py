"""Which pictures an evaluation gets: from rows and panels to captioned figures, task by task."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scjax.eval import charts, figures, tables, verdict
from scjax.eval.environment import missing
from scjax.eval.schema import MEAN, METRICS
from scjax.eval.tasks import TASKS

if TYPE_CHECKING:
    from scjax.eval.results import Results

FEW_SHOT = "annotation/few-shot"
# where the panels belong that do not name their task
TASK_OF = {
    **dict.fromkeys(("confusion", "calibration"), "annotation"),
    "effects": "perturbation",
    "sections": "spatial/niche",
    "features": "modalities/prediction",
}
MOST_MODELS = 3  # of a picture with one part for each model
MOST_LINES = 60  # of a forest plot
CURVES = 8  # of a picture with one line for each representation

Curves = str | os.PathLike[str] | Sequence[Mapping[str, Any]]


class Picture(NamedTuple):
    """A figure: what it is called (also the alternative text), its SVG, what to see in it."""

    name: str
    svg: bytes
    caption: str = ""


def of_task(results: Results, frame: pd.DataFrame, task: str) -> list[Picture]:
    """Every figure of a task that the results allow."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for panel in results.panels:
        if panel.get("task", TASK_OF.get(panel["panel"])) == task:
            panels.setdefault(panel["panel"], []).append(panel)
    rows = frame[frame["task"] == task]
    out = list(_forests(frame, task))
    out += _overview(frame, task)
    if task == FEW_SHOT:
        out += _few_shot(rows)
    for track, of in rows[rows["status"].eq("ok")].groupby("track") if task == "integration" else ():
        caption = (
            "Up: cell types stay apart. Right: batches mix. Blue: models; orange: random-initialised twin; "
            "black: baselines; grey: controls; green: oracle (the labels themselves)."
        )
        name = "Bio conservation against batch mixing" + f", {track}" * bool(track)
        out.append(Picture(name, figures.bio_and_batch(of), caption))
    drawers: dict[str, Callable[[list[dict[str, Any]], pd.DataFrame], Iterator[Picture]]] = {
        "confusion": _confusions,
        "calibration": _calibration,
        "effects": _effects,
        "pr_curve": _precision_recall,
        "sections": _sections,
        "features": _features,
    }
    for kind, draw in drawers.items():
        if kind in panels:
            out += draw(panels[kind], rows)
    return out


def _kinds(rows: pd.DataFrame) -> dict[str, str]:
    """Representation → its kind, models first."""
    named = rows[rows["status"].ne("skipped")].drop_duplicates("model_id")
    kinds = dict(zip(named["model_id"], named["model_kind"], strict=True))
    order = {m: 0.5 if tables.is_twin(m) else tables.KIND_ORDER.index(k) for m, k in kinds.items()}
    return dict(sorted(kinds.items(), key=lambda item: order[item[0]]))


def _best(rows: pd.DataFrame) -> list[str]:
    """The baselines that models are compared with."""
    return list(dict.fromkeys(rows.loc[rows["versus_role"].eq(verdict.BEST), "versus"]))


def _telling(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The representations worth drawing one by one: models, twins, the best simple baselines."""
    best = _best(rows)
    return [(m, k) for m, k in _kinds(rows).items() if k == "model" or tables.is_twin(m) or m in best]


def _drawn(panels: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[Mapping[str, Any]]:
    """Panels of at most CURVES representations, the telling ones first, in the order of the tables."""
    kinds = _kinds(rows)
    here = dict.fromkeys(p["model_id"] for p in panels)
    telling = [m for m, _ in _telling(rows) if m in here]
    keep = [*telling, *(m for m in kinds if m in here and m not in telling)][:CURVES]
    order = {m: i for i, m in enumerate(kinds)}
    return sorted((p for p in panels if p["model_id"] in keep), key=lambda p: order[p["model_id"]])


def _forests(frame: pd.DataFrame, task: str) -> Iterator[Picture]:
    """Paired differences of the leading metric, one picture a model."""
    scores = [s for s in verdict.leading(frame) if s.task == task]
    picked = pd.concat([s.pick(frame) for s in scores]) if scores else frame[:0]
    picked = picked[picked["versus"].ne("") & picked["ci_low"].notna()]
    picked = picked.sort_values("versus_role", ascending=False, kind="stable")
    for model, of in picked.groupby("model_id", sort=False):
        if len(of) > MOST_LINES:
            of = of[of["group"].isin(("", MEAN))][:MOST_LINES]
        if len(of):
            caption = (
                "Right of zero the model is ahead. Orange: against its random-initialised twin; black: "
                "against the best simple baseline. 95 % intervals, paired."
            )
            name = f"{TASKS[task].title}: paired differences of {model}"
            yield Picture(name, figures.forest(of.to_dict("records")), caption)


def _overview(frame: pd.DataFrame, task: str) -> Iterator[Picture]:
    """The leading score in every track, where there are several."""
    scores = [s for s in verdict.leading(frame) if s.task == task]
    if len(scores) < 3 or len({s.metric for s in scores}) > 1:
        return
    rows = pd.concat([s.pick(frame) for s in scores])
    rows = rows[rows["versus"].eq("") & rows["group"].isin(("", MEAN))]
    if len(rows):
        title = METRICS[scores[0].metric].title
        name = f"{TASKS[task].title}: {title} in every part"
        caption = (
            "Filled: models, with 95 % intervals; squares: baselines; crosses: controls; diamonds: oracle."
        )
        yield Picture(name, charts.overview(rows.to_dict("records"), title), caption)


def _few_shot(rows: pd.DataFrame) -> Iterator[Picture]:
    leading = TASKS[FEW_SHOT].leading[0] if FEW_SHOT in TASKS else None
    rows = rows[rows["versus"].eq("") & rows["label"].eq("") & rows["status"].eq("ok")]
    if leading is not None:
        rows = rows[rows["metric"].eq(leading.metric)]
        rows = rows[rows["head"].eq(leading.head)] if leading.head else rows
    rows = rows[rows["group"].isin(("", MEAN))] if rows["group"].isin(("", MEAN)).any() else rows
    if len(rows):
        metric = METRICS[rows["metric"].iloc[0]].title
        kinds = _kinds(rows)
        rows = rows.sort_values("model_id", key=lambda s: s.map(list(kinds).index), kind="stable")
        yield Picture("Scores with few labels", charts.few_shot(rows, metric), "Bands: 95 % intervals.")


def _confusions(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    panels = [p for p in panels if p["head"] == "logistic"]
    caption = (
        "Per cent of the cells of each true label (rows) given each predicted label, logistic regression."
    )
    for model in [m for m, kind in _kinds(rows).items() if kind == "model"][:MOST_MODELS]:
        if of := [p for p in panels if p["model_id"] == model]:
            yield Picture(f"Confusion matrix of {model}", figures.confusion(_few(of)), caption)
    if rows["metric"].eq("f1").any() and (shown := _telling(rows)):
        picture = figures.per_class(rows, shown)
        yield Picture("F1 per label", picture, "Number of test cells in brackets.")


def _few(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One confusion matrix per held-out group if there are at most three, else their sum."""
    if len(panels) <= 3:
        return panels
    counts = np.sum([p["counts"] for p in panels], axis=0).tolist()
    return [{**panels[0], "group": f"each of {len(panels)} groups", "counts": counts}]


def _calibration(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    head = "logistic" if any(p["head"] == "logistic" for p in panels) else panels[0]["head"]
    of: list[Mapping[str, Any]] = [p for p in panels if p["head"] == head]
    groups = list(dict.fromkeys(p["group"] for p in of))
    if len(groups) > 3:  # one picture over all of them, or their mean where there is one
        of = [p for p in of if p["group"] == MEAN] or [_pooled(of, m) for m in _kinds(rows) if m != MEAN]
        of = [p for p in of if p]
    of = _drawn(of, rows)
    if of:
        caption = (
            "On the line, answers are right as often as their confidence says; below it, they are too sure."
        )
        yield Picture("Calibration", charts.calibration(of), caption)


def _pooled(panels: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """The calibration of a model over all held-out groups together."""
    of = [p for p in panels if p["model_id"] == model]
    if not of:
        return {}
    n = np.array([p["n"] for p in of], float)
    weight = np.maximum(n.sum(0), 1)
    mean = {
        key: (np.nan_to_num(np.array([p[key] for p in of], float)) * n).sum(0) / weight
        for key in ("confidence", "accuracy")
    }
    return {**of[0], "group": f"each of {len(of)} groups", "n": n.sum(0), **mean}


def _effects(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    metric = TASKS["perturbation"].leading[0].metric
    for panel in panels:
        here = rows[rows["track"].eq(panel["track"])]
        of = here[here["versus"].eq("")]
        single = of[
            of["metric"].eq(metric) & of["label"].ne("") & of["status"].eq("ok") & of["setting"].eq("")
        ]
        scored = set(single["model_id"]) - {panel.get("baseline_id")}
        drawn = [m for m, _ in _telling(here) if m in scored]
        drawn = drawn or [m for m, kind in _kinds(of).items() if kind == "baseline" and m in scored]
        parts = {m: single[single["model_id"] == m] for m in drawn[:CURVES]}
        scores = {
            m: dict(zip(part["label"], part["value"].astype(float), strict=True)) for m, part in parts.items()
        }
        where, title = f", {panel['track']}" if panel["track"] else "", METRICS[metric].title
        if scores:
            shown = dict(list(scores.items())[:MOST_MODELS])
            caption = (
                "One dot a perturbation; on the line a model predicts it as well as the mean of the training "
                f"perturbations does ({panel.get('baseline_id', 'train_mean')}), which knows nothing of it."
            )
            picture = charts.effects(panel, shown, title, METRICS[metric].direction)
            yield Picture(f"Model against training mean{where}", picture, caption)
            picture = charts.by_effect(panel, scores, _kinds(of), title)
            yield Picture(
                f"Score by size of the effect{where}",
                picture,
                "From twelve perturbations on, means of four bins.",
            )
        table = _calibrated(of)
        if len(table):
            caption = (
                "0: no better than the training mean; 1: as near as the other half of the cells. Not clipped."
            )
            yield Picture(f"Calibrated scores{where}", charts.calibrated(table), caption)


def _calibrated(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores between floor (training mean) and ceiling: representations × metrics."""
    whole = rows[rows["label"].eq("") & rows["status"].eq("ok") & rows["metric"].eq("calibrated")]
    table = whole.pivot_table(index="model_id", columns="setting", values="value", aggfunc="first")
    table = table.astype(float).reindex([m for m in _kinds(rows) if m in table.index])
    table = table[[m for m in METRICS if m in table.columns]]  # the setting is the metric that is calibrated
    return table.rename(columns=lambda m: METRICS[m].title)


def _precision_recall(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    tracks = list(dict.fromkeys(p.get("track", "") for p in panels))
    for i in range(0, len(tracks), 6):
        part = tracks[i : i + 6]
        here = [p for p in panels if p.get("track", "") in part and p["model_kind"] != "oracle"]
        of = _drawn(here, rows)
        if of:
            name = "Precision and recall" + (f", {part[0]} to {part[-1]}" if len(tracks) > 6 else "")
            caption = "Orange dots: the prevalence, which is what a random ranking reaches."
            yield Picture(name, charts.precision_recall(of), caption)


def _sections(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    kinds = _kinds(rows)
    best = _best(rows)
    shown = []
    for p in panels:
        keep = [m for m in p["predicted"] if kinds.get(m, "model") == "model"][:MOST_MODELS]
        keep += [m for m in p["predicted"] if m in best][:1]
        if not best:
            keep += [m for m in p["predicted"] if kinds.get(m) == "baseline"][:1]
        shown.append({**p, "predicted": {m: p["predicted"][m] for m in keep}})
    caption = (
        "Each spot is coloured by its region: the true one at the left, then as predicted by probes "
        "that were trained elsewhere."
    )
    yield Picture("Regions of the sections", charts.sections(shown), caption)


def _features(panels: list[dict[str, Any]], rows: pd.DataFrame) -> Iterator[Picture]:
    for panel in panels:
        track = panel.get("track", "")
        of = rows[rows["track"].eq(track)]
        keep = [m for m in dict(_telling(of)) if m in panel["value"]]
        keep = keep or list(panel["value"])[:CURVES]
        metric = panel.get("metric", "")
        title = METRICS[metric].title if metric in METRICS else "correlation over cells"
        picture = charts.features(
            {**panel, "value": {m: panel["value"][m] for m in keep}}, _kinds(rows), title
        )
        yield Picture("Feature by feature" + f", {track}" * bool(track), picture)


def maps(results: Results) -> tuple[list[Picture], Any]:
    """The UMAP grid and the legend of its colours."""
    drawn = [p for p in results.panels if p["panel"] == "map" and p["status"] == "ok"]
    colours = next((p for p in results.panels if p["panel"] == "colours"), None)
    if not drawn or not colours:
        return [], []
    caption = (
        "UMAP, same cells and parameters in each row. For illustration only: distances and densities in a "
        "UMAP are not scores."
    )
    picture = Picture("UMAP of the representations", figures.maps(drawn, colours), caption)
    return [picture], figures.legend(colours)


# error of a model -> that of what knows nothing of the cell, and what that is called
BASELINES = {"masked_mse": ("gene_mean_mse", "gene means"), "masked_ce": ("frequency_ce", "frequencies")}


def training(curves: Curves) -> dict[str, Any] | None:
    """Loss curves: the picture, and the last error beside that of the no-information baseline."""
    if isinstance(curves, (str, os.PathLike)):
        records = []
        for text in Path(curves).read_text().splitlines():
            try:
                records.append(json.loads(text))
            except json.JSONDecodeError:  # a line cut short when its run was killed
                continue
    else:
        records = [dict(r) for r in curves]
    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in dict.fromkeys(k for r in records for k in r if k != "step"):
        points = [
            (r["step"], r[name]) for r in records if "step" in r and isinstance(r.get(name), (int, float))
        ]
        if points:
            series[name] = (np.array([p[0] for p in points]), np.array([p[1] for p in points], float))
    metrics = {name.rpartition("/")[2] for name in series}
    error = next((m for m in (*BASELINES, "loss") if m in metrics), None)
    if error is None:
        return None
    baseline, nothing = BASELINES.get(error, (None, ""))
    out: dict[str, Any] = {"error": error, "nothing": nothing, "pictures": []}
    for split in ("validation", "train", ""):
        prefix = f"{split}/" if split else ""
        if prefix + error in series:
            value = series[prefix + error][1]
            last = max(1, len(value) // 20)  # the last twentieth of the run
            out |= {
                "split": split or "train",
                "first": float(value[:last].mean()),
                "last": float(value[-last:].mean()),
            }
            if baseline and prefix + baseline in series:
                out["baseline"] = float(series[prefix + baseline][1][-last:].mean())
            break
    if not missing("matplotlib"):
        out["pictures"].append(Picture("Loss curves", figures.curves(series, error, baseline, nothing)))
        probes = {k: v for k, v in series.items() if k.startswith("probe/") and np.isfinite(v[1]).any()}
        if probes:
            caption = "Frozen probes on validation cells while training: what the representation is good for."
            out["pictures"].append(Picture("Probes during training", figures.probes(probes), caption))
    return out

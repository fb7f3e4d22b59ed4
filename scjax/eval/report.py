"""The report: one HTML file that explains itself, with every table and figure inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scjax.eval import figures, tables, verdict
from scjax.eval.environment import missing, version

if TYPE_CHECKING:
    from scjax.eval.results import Results

LOWER_IS_BETTER = ("log_loss", "ece")
PAGE_COLUMNS = 9

Curves = str | os.PathLike[str] | Sequence[Mapping[str, Any]]


def write(
    results: Results, path: Path, title: str | None, curves: Curves | None, facts: Mapping[str, Any]
) -> Path:
    """Write the report of ``results``; see :meth:`scjax.eval.Results.report`."""
    if reason := missing("jinja2"):
        raise ImportError(f"the report needs jinja2, {reason}")
    import jinja2

    frame = results.to_frame()
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": tables.value, "bounds": tables.bounds, "state": verdict.state}
    page = environment.get_template("report.html.j2").render(
        title=title or "Evaluation of cell embeddings",
        facts=results.facts,
        gates=results.gates(),
        verdicts=[_verdict(frame, model) for model in _models(frame)],
        tasks={task: _tables(frame, task) for task in tables.TASKS if task in set(frame["task"])},
        training=None if curves is None else _training(curves),
        pictures=_pictures(results, frame) if not missing("matplotlib") else {},
        no_pictures=missing("matplotlib"),
        card=_card(results.facts, facts),
        skipped_maps=next(
            (p["note"] for p in results.panels if p["panel"] == "map" and p["status"] == "skipped"), ""
        ),
        versions=results.facts.get("versions", {}),
        scjax=version("scjax"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _models(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.loc[frame["model_kind"] == "model", "model_id"]))


def _tables(frame: pd.DataFrame, task: str) -> list[dict[str, Any]]:
    """The table of a task, cut between its spanning headings into pieces that fit on a page."""
    shown = tables.columns(frame, task)
    pieces: list[list[tables.Column]] = [[]]
    for over in dict.fromkeys(column.over for column in shown):
        span = [column for column in shown if column.over == over]
        if len(pieces[-1]) + len(span) > PAGE_COLUMNS:
            pieces.append([])
        pieces[-1] += span
    return [_table(frame, task, piece) for piece in pieces]


def _table(frame: pd.DataFrame, task: str, shown: list[tables.Column]) -> dict[str, Any]:
    """Columns, spanning headings, lines, and in each column the best among models and baselines."""
    lines = tables.lines(frame, task, shown)
    overs = [column.over for column in shown]
    best = []
    for i, column in enumerate(shown):
        sign = -1 if column.fields["metric"] in LOWER_IS_BETTER else 1
        rivals = [line for line in lines if line.kind in ("model", "baseline") and _has_value(line.cells[i])]
        values = {line.model_id: sign * line.cells[i]["value"] for line in rivals}  # type: ignore[index]
        best.append(max(values, key=lambda m: values[m]) if values else None)
    return {
        "columns": shown,
        "spans": [(o, overs.count(o)) for o in dict.fromkeys(overs)],
        "lines": lines,
        "best": best,
    }


def _has_value(cell: Mapping[str, Any] | None) -> bool:
    return cell is not None and cell["status"] == "ok" and cell["value"] is not None


def _verdict(frame: pd.DataFrame, model: str) -> dict[str, Any]:
    """The leading scores of a model, and how each compares with its twin and the best simple baseline."""
    lines: list[dict[str, Any]] = []
    for score in verdict.leading(frame):
        rows = score.pick(frame[frame["model_id"].eq(model)])
        groups = list(dict.fromkeys(rows["group"]))
        for group in groups if len(groups) <= 6 else [tables.MEAN]:
            found = {r["versus_role"]: r for r in rows[rows["group"] == group].to_dict("records")}
            twin, best = found.get(verdict.TWIN), found.get(verdict.BEST)
            lines.append({"own": found[""], "what": tables.describe(found[""]), "twin": twin, "best": best})
    return {"model": model, "lines": lines, "summary": verdict.summary(frame, model)}


# error of a model -> that of what knows nothing of the cell, and what that is called
BASELINES = {"masked_mse": ("gene_mean_mse", "gene means"), "masked_ce": ("frequency_ce", "frequencies")}


def _training(curves: Curves) -> dict[str, Any] | None:
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
    out: dict[str, Any] = {"error": error, "nothing": nothing, "records": len(records)}
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
        out["picture"] = figures.curves(series, error, baseline, nothing)
    return out


def _pictures(results: Results, frame: pd.DataFrame) -> dict[str, Any]:
    """Every figure that the results allow, by name."""
    out: dict[str, Any] = {}
    models = _models(frame)
    rows = tables.differences(frame)
    rows = rows[~rows["head"].isin(("knn", "kmeans")) & rows["metric"].ne("batch")]
    rows = rows.sort_values("versus_role", ascending=False, kind="stable")
    compared = {m: rows[rows["model_id"] == m].to_dict("records") for m in models}
    out["forest"] = {m: figures.forest(of) for m, of in compared.items() if of}
    confusions = [p for p in results.panels if p["panel"] == "confusion" and p["head"] == "logistic"]
    confused = {m: [p for p in confusions if p["model_id"] == m] for m in models}
    out["confusion"] = {m: figures.confusion(_few(of)) for m, of in confused.items() if of}
    if confusions:
        out["per_class"] = figures.per_class(frame, _telling(frame))
    if "integration" in set(frame["task"]):
        out["bio_and_batch"] = figures.bio_and_batch(frame)
    drawn = [p for p in results.panels if p["panel"] == "map" and p["status"] == "ok"]
    colours = next((p for p in results.panels if p["panel"] == "colours"), None)
    if drawn and colours:
        out |= {"maps": figures.maps(drawn, colours), "legend": figures.legend(colours)}
    return out


def _few(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One confusion matrix per held-out group if there are at most three, else their sum."""
    if len(panels) <= 3:
        return panels
    counts = np.sum([p["counts"] for p in panels], axis=0).tolist()
    return [{**panels[0], "group": f"each of {len(panels)} groups", "counts": counts}]


def _telling(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The representations worth comparing class by class: models, twins, the best simple baseline."""
    scored = frame[frame["task"].eq("annotation") & frame["status"].eq("ok")].drop_duplicates("model_id")
    kinds = dict(zip(scored["model_id"], scored["model_kind"], strict=True))
    best = frame.loc[
        frame["task"].eq("annotation") & frame["versus_role"].eq(verdict.BEST), "versus"
    ].unique()
    return [(m, k) for m, k in kinds.items() if k == "model" or tables.is_twin(m) or m in best]


def _card(facts: Mapping[str, Any], further: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card: what was scored, how it was split, what was left out."""

    def listed(sizes: Mapping[str, int] | None) -> str:
        return ", ".join(f"{name} ({n:,})" for name, n in (sizes or {}).items()) or "none"

    lines = [
        ("cells", f"{facts.get('n_cells', 0):,} scored of {facts.get('n_cells_in', 0):,} in the data"),
        ("left out", listed(facts.get("dropped")) if facts.get("dropped") else "none"),
        (f"labels ({facts.get('label_key')})", listed(facts.get("labels"))),
        (f"groups ({facts.get('group_key') or 'no group_key'})", listed(facts.get("groups"))),
        (f"batches ({facts.get('batch_key') or 'no batch_key'})", listed(facts.get("batches"))),
        ("annotation split", facts.get("split_scheme", "not run")),
        ("embeddings", ", ".join(f"{k} ({s[1]} dimensions)" for k, s in facts.get("embeddings", {}).items())),
        (
            "clusters, integration, maps on",
            f"at most about {facts.get('graph_cells', 0):,} cells, stratified",
        ),
        ("seed, resamples", f"{facts.get('seed')}, {facts.get('n_boot', 0):,}"),
        ("overlap with pretraining data", str(facts.get("pretrain_overlap", "unknown"))),
        ("time", f"{facts.get('wall_s', {}).get('all', 0):.0f} s, {facts.get('created', '')}"),
        ("versions", ", ".join(f"{p} {v}" for p, v in facts.get("versions", {}).items())),
    ]
    return lines + [(str(k), f"{v:,}" if isinstance(v, int) else str(v)) for k, v in further.items()]

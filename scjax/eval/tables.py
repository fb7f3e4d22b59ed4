"""Compact tables of results: for a terminal, for a notebook, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from scjax.eval.verdict import Gate

MEAN = "mean of groups"
RANDOM_INIT = "random_init"
MANY = 10  # held-out groups, their mean among them, that are shown one by one
FIXED, SWEEP, ORACLE = "resolution 1.0", "sweep mean", "best NMI (oracle)"  # settings of Leiden
KIND_ORDER = ("model", "baseline", "control", "oracle")
TASKS = ("annotation", "clustering", "integration")

HEADLINE: dict[str, tuple[str, ...]] = {
    "annotation": ("macro_f1", "balanced_accuracy", "accuracy"),
    "clustering": ("nmi", "ari"),
    "integration": ("bio", "batch"),
}
"""Metrics of each task that are compared pair by pair, the leading one first."""

METRIC_NAMES = {
    "macro_f1": "macro-F1",
    "macro_f1_seen": "macro-F1, classes seen in training",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "out_of_set_rate": "out-of-set rate",
    "log_loss": "log-loss",
    "ece": "ECE",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
    "bio": "bio conservation",
    "batch": "batch mixing",
    "clisi": "cLISI",
    "silhouette_label": "silhouette (label)",
    "bras": "BRAS",
    "ilisi": "iLISI",
    "cilisi": "CiLISI",
    "graph_connectivity": "graph connectivity",
    "pcr": "PCR comparison",
    "kbet": "kBET",
    "kmeans_nmi": "k-means NMI",
    "kmeans_ari": "k-means ARI",
}
HEAD_NAMES = {
    "logistic": "logistic regression",
    "knn": "k nearest neighbours",
    "majority": "majority class",
    "leiden": "Leiden",
    "kmeans": "k-means",
}


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading in two parts and the fields that pick its values."""

    over: str
    title: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Line:
    """A line of a table: a representation and, under each column, its row of results or None."""

    model_id: str
    kind: str
    cells: list[dict[str, Any] | None]


def columns(frame: pd.DataFrame, task: str, full: bool = True) -> list[Column]:
    """The columns of a task that have values; ``full=False`` leaves only the leading ones."""
    rows = frame[(frame["task"] == task) & (frame["status"] != "skipped")]
    if task == "annotation":
        groups = [g for g in dict.fromkeys(rows["group"]) if g]
        lead = MEAN if MEAN in groups else (groups[0] if groups else "")
        out = []
        for head in ("logistic", "knn"):
            apart = full and len(groups) <= (MANY if head == "logistic" else 4)
            shown = [lead, *[g for g in groups if g != lead]] if apart else [lead]
            over = f"macro-F1, {HEAD_NAMES[head]}"
            out += [
                Column(
                    over,
                    g if g in (MEAN, lead) else f"on {g}",
                    {"head": head, "metric": "macro_f1", "group": g},
                )
                for g in shown
            ]
        more = ("macro_f1_seen", "balanced_accuracy", "accuracy", "log_loss", "ece") if full else ()
        out += [
            Column(
                "logistic regression, " + lead,
                METRIC_NAMES[m],
                {"head": "logistic", "metric": m, "group": lead},
            )
            for m in more
        ]
    elif task == "clustering":
        out = [
            Column(
                "Leiden, resolution 1.0", METRIC_NAMES[m], {"head": "leiden", "setting": FIXED, "metric": m}
            )
            for m in ("nmi", "ari", "ami")[: 3 if full else 2]
        ]
        other = [
            ("sweep mean", "Leiden, mean of the sweep"),
            ("best NMI (oracle)", "Leiden, best of the sweep*"),
        ]
        out += [
            Column(over, METRIC_NAMES[m], {"head": "leiden", "setting": s, "metric": m})
            for s, over in other
            for m in ("nmi", "ari")
            if full
        ]
        out += [Column("k-means", METRIC_NAMES[m], {"head": "kmeans", "metric": m}) for m in ("nmi", "ari")]
    else:
        out = [Column("axes", METRIC_NAMES[m], {"metric": m}) for m in ("bio", "batch")]
        if full:
            parts = rows[rows["axis"].ne("") & ~rows["metric"].isin(("bio", "batch"))]
            for axis, over in (("bio", "parts of bio conservation"), ("batch", "parts of batch mixing")):
                named = dict.fromkeys(parts.loc[parts["axis"] == axis, "metric"])
                out += [Column(over, METRIC_NAMES[m], {"metric": m}) for m in named]
    scored = rows[rows["versus"].eq("") & rows["label"].eq("")]
    return [c for c in out if len(_pick(scored, c.fields))]


def lines(frame: pd.DataFrame, task: str, shown: Sequence[Column]) -> list[Line]:
    """One line per representation: models, their twins, baselines, controls, oracle."""
    rows = frame[frame["task"].eq(task) & frame["versus"].eq("") & frame["label"].eq("")]
    named = rows.drop_duplicates("model_id")
    rank = [
        0.5 if is_twin(m) else KIND_ORDER.index(k)
        for m, k in zip(named["model_id"], named["model_kind"], strict=True)
    ]
    named = named.assign(rank=rank).sort_values("rank", kind="stable")
    out = []
    for model, kind in zip(named["model_id"], named["model_kind"], strict=True):
        of_model = rows[rows["model_id"] == model]
        if set(of_model["head"]) == {"majority"}:  # has no head of its own: stands in the logistic column
            of_model = of_model.assign(head="logistic")
        skipped = of_model[of_model["status"] == "skipped"]
        found = [_pick(of_model, column.fields) for column in shown]
        cells = [hit.iloc[0].to_dict() if len(hit) else None for hit in found]
        if len(skipped) and not any(cells):
            cells = [skipped.iloc[0].to_dict(), *cells[1:]]
        out.append(Line(model, kind, cells))
    return out


def is_twin(model_id: str) -> bool:
    """Whether this name is that of a random-initialised twin."""
    return model_id.split(" of ")[0] == RANDOM_INIT


def _pick(rows: pd.DataFrame, fields: Mapping[str, str]) -> pd.DataFrame:
    for name, value in fields.items():
        rows = rows[rows[name] == value]
    return rows


def value(cell: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A value alone: ``0.812``; "skipped" or "undefined" where there is none."""
    if cell is None:
        return ""
    if cell["status"] == "skipped":
        return "skipped"
    return "undefined" if cell["value"] is None or pd.isna(cell["value"]) else _digits(cell["value"], signed)


def bounds(cell: Mapping[str, Any] | None, signed: bool = False) -> tuple[str, str] | None:
    """The ends of the interval of a value, if it has one."""
    if cell is None or cell["ci_low"] is None or pd.isna(cell["ci_low"]):
        return None
    return _digits(cell["ci_low"], signed), _digits(cell["ci_high"], signed)


def number(cell: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A value with its interval: ``0.812 [0.793, 0.830]``."""
    ends = bounds(cell, signed)
    return value(cell, signed) + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def _digits(x: float, signed: bool) -> str:
    return f"{round(x, 3) + 0.0:{'+' if signed else ''}.3f}"  # + 0.0: no minus before a zero


def formatted(frame: pd.DataFrame, task: str | None = None) -> pd.DataFrame:
    """Values with intervals as text, indexed by representation and kind."""
    present = [t for t in TASKS if t in set(frame["task"])]
    if task is not None and task not in present:
        raise KeyError(f"no results for task {task!r}; there are: {', '.join(present) or 'none'}")
    parts = []
    for name in [task] if task else present:
        shown = columns(frame, name, full=task is not None)
        body = {
            (line.model_id, line.kind): [number(c) for c in line.cells] for line in lines(frame, name, shown)
        }
        heads = [f"{c.over}: {c.title}" for c in shown]
        parts.append(pd.DataFrame.from_dict(body, orient="index", columns=heads))
    table = pd.concat(parts, axis=1).fillna("") if parts else pd.DataFrame()
    if len(table):
        table.index = pd.MultiIndex.from_tuples(table.index, names=["representation", "kind"])
    return table


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of the leading metric of each task (both axes for integration).

    Of many groups only their mean is kept.
    """
    rows = frame[frame["versus"] != ""]
    leading = {"annotation": ("macro_f1",), "clustering": ("nmi",), "integration": ("bio", "batch")}
    keep = [m in leading[t] for t, m in zip(rows["task"], rows["metric"], strict=True)]
    rows = rows[keep]
    return rows if rows["group"].nunique() <= MANY else rows[rows["group"].isin(("", MEAN))]


def describe(difference: Mapping[str, Any]) -> str:
    """What a difference row compares, in words."""
    parts = [METRIC_NAMES[difference["metric"]]]
    if difference["task"] != "integration":
        parts.append(HEAD_NAMES[difference["head"]])
    if difference["group"]:
        parts.append(difference["group"] if difference["group"] == MEAN else f"on {difference['group']}")
    return ", ".join(parts)


def to_text(frame: pd.DataFrame, facts: Mapping[str, Any], gates: Sequence[Gate]) -> str:
    """Everything as plain text."""
    parts = []
    for task in [t for t in TASKS if t in set(frame["task"])]:
        shown = columns(frame, task, full=False)
        body = {
            f"{line.model_id} ({line.kind})": [number(c) for c in line.cells]
            for line in lines(frame, task, shown)
        }
        table = pd.DataFrame.from_dict(body, orient="index", columns=[f"{c.over}: {c.title}" for c in shown])
        parts.append(f"{task.upper()}\n{table.to_string()}")
    rows = differences(frame).to_dict("records")
    if rows:
        text = [
            f"  {r['model_id']} - {r['versus']} ({r['versus_role']}), {describe(r)}: {number(r, signed=True)}"
            for r in rows
        ]
        parts.append("PAIRED DIFFERENCES\n" + "\n".join(text))
    parts.append("GATES\n" + "\n".join(f"  [{g.level}] {g.message}" for g in gates))
    return "\n\n".join(parts)


def score_tables(frame: pd.DataFrame) -> list[Any]:
    """The main columns of each task as rich tables."""
    from rich.markup import escape
    from rich.table import Table

    style = {"model": "bold", "baseline": "", "control": "dim", "oracle": "dim italic"}
    parts: list[Any] = []
    for task in [t for t in TASKS if t in set(frame["task"])]:
        shown = columns(frame, task, full=False)
        table = Table(title=task, title_justify="left", title_style="bold", header_style="")
        table.add_column("representation")
        table.add_column("kind")
        for column in shown:
            table.add_column(escape(f"{column.over}\n{column.title}"), justify="right")
        for line in lines(frame, task, shown):
            cells = [escape(number(c)) for c in line.cells]
            table.add_row(escape(line.model_id), line.kind, *cells, style=style[line.kind])
        parts.append(table)
    return parts


def gate_lines(gates: Sequence[Gate]) -> list[Any]:
    """Gates as rich text, a colour a level."""
    from rich.text import Text

    colours = {"fail": "bold red", "caution": "yellow", "note": "dim", "pass": "green"}
    return [Text(f"{g.level.upper():>8}  {g.message}", style=colours[g.level]) for g in gates]


def to_rich(frame: pd.DataFrame, facts: Mapping[str, Any], gates: Sequence[Gate]) -> Any:
    """Everything as a rich renderable."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts = score_tables(frame)
    rows = differences(frame).to_dict("records")
    if rows:
        table = Table(
            "model",
            "against",
            "on",
            title="paired differences",
            title_justify="left",
            title_style="bold",
            header_style="",
        )
        table.add_column("difference [95 %]", justify="right")
        for r in rows:
            sure = r["ci_low"] > 0 or r["ci_high"] < 0
            colour = ("green" if r["value"] > 0 else "red") if sure else "yellow"
            table.add_row(
                escape(r["model_id"]),
                escape(f"{r['versus']} ({r['versus_role']})"),
                escape(describe(r)),
                Text(number(r, signed=True), style=colour),
            )
        parts.append(table)
    return Group(*parts, *gate_lines(gates))

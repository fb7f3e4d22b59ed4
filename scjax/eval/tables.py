"""Compact tables of results: for a terminal, for a notebook, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from scjax.eval.schema import HEADS, MEAN, METRICS
from scjax.eval.tasks import TASKS, Columns

if TYPE_CHECKING:
    from scjax.eval.verdict import Gate

RANDOM_INIT = "random_init"
MANY, SEVERAL = 10, 4  # held-out groups, their mean among them, with a column each: first heading, the others
KIND_ORDER = ("model", "baseline", "control", "oracle")


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading in two parts and the fields that pick its values."""

    over: str
    title: str
    fields: dict[str, str]
    group: bool = False  # one of the columns of single held-out groups


@dataclass(frozen=True)
class Line:
    """A line of a table: a representation and, under each column, its row of results or None."""

    model_id: str
    kind: str
    cells: list[dict[str, Any] | None]


def sections(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Every part of the results with a table of its own: task, track ("" where there is one), its rows."""
    for task in TASKS:
        rows = frame[frame["task"] == task]
        for track in dict.fromkeys(rows["track"]):
            yield task, track, rows[rows["track"] == track]


def heading(task: str, track: str = "") -> str:
    """What a table is called: ``Gene function, essential``."""
    return f"{TASKS[task].title}, {track}" if track else TASKS[task].title


def columns(rows: pd.DataFrame, task: str, full: bool = True) -> list[Column]:
    """The columns that have values in these rows of one section; ``full=False``: only the leading ones."""
    scored = rows[rows["status"].ne("skipped") & rows["versus"].eq("") & rows["label"].eq("")]
    out: list[Column] = []
    for block in TASKS[task].columns:
        if full or block.lead:
            out += _block(scored, block, full, most=SEVERAL if any(c.group for c in out) else MANY)
    return [c for c in out if len(_pick(scored, c.fields))]


def _block(scored: pd.DataFrame, block: Columns, full: bool, most: int) -> list[Column]:
    groups = [g for g in dict.fromkeys(_pick(scored, block.fields)["group"]) if g]
    lead = MEAN if MEAN in groups else (groups[0] if groups else "")
    fields = dict(block.fields) | ({"group": lead} if lead else {})
    if not block.by_group:
        over = f"{block.over}, {lead}" if lead else block.over
        return [Column(over, METRICS[m].title, {**fields, "metric": m}) for m in block.metrics]
    shown = [lead, *[g for g in groups if g != lead]] if full and len(groups) <= most else [lead]
    return [
        Column(
            block.over,
            (g or METRICS[m].title) if g == lead else f"on {g}",
            {**fields, "metric": m, "group": g},
            group=bool(g),
        )
        for m in block.metrics
        for g in shown
    ]


def lines(rows: pd.DataFrame, shown: Sequence[Column]) -> list[Line]:
    """One line per representation of a section: models, their twins, baselines, controls, oracle."""
    rows = rows[rows["versus"].eq("") & rows["label"].eq("")]
    named = rows.drop_duplicates("model_id")
    rank = [
        0.5 if is_twin(m) else KIND_ORDER.index(k)
        for m, k in zip(named["model_id"], named["model_kind"], strict=True)
    ]
    named = named.assign(rank=rank).sort_values("rank", kind="stable")
    heads = {column.fields["head"] for column in shown if "head" in column.fields}
    first = next((column.fields["head"] for column in shown if "head" in column.fields), "")
    out = []
    for model, kind in zip(named["model_id"], named["model_kind"], strict=True):
        of_model = rows[rows["model_id"] == model]
        if heads and not heads & set(of_model["head"]):  # has a head of its own: stands in the first column
            of_model = of_model.assign(head=first)
        skipped = of_model[of_model["status"] == "skipped"]
        found = [_pick(of_model, column.fields) for column in shown]
        cells = [hit.iloc[0].to_dict() if len(hit) else None for hit in found]
        if len(skipped) and not any(cells):
            cells = [skipped.iloc[0].to_dict(), *cells[1:]]
        out.append(Line(model, kind, cells))
    return out


def is_twin(model_id: str) -> bool:
    """Whether this name is that of a random-initialised twin."""
    return RANDOM_INIT in model_id  # also "random_init of X", "linear(random_init)"


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


def advantage(difference: Mapping[str, Any]) -> tuple[float, float, float]:
    """A difference and its interval, turned so that above zero the model is ahead."""
    value, low, high = (difference[k] for k in ("value", "ci_low", "ci_high"))
    return (value, low, high) if difference["direction"] == "max" else (-value, -high, -low)


def _digits(x: float, signed: bool) -> str:
    return f"{round(x, 3) + 0.0:{'+' if signed else ''}.3f}"  # + 0.0: no minus before a zero


def formatted(frame: pd.DataFrame, task: str | None = None) -> pd.DataFrame:
    """Values with intervals as text, indexed by representation and kind."""
    present = list(dict.fromkeys(name for name, _, _ in sections(frame)))
    if task is not None and task not in present:
        raise KeyError(f"no results for task {task!r}; there are: {', '.join(present) or 'none'}")
    parts = []
    for name, track, rows in sections(frame):
        if task in (None, name):
            shown = columns(rows, name, full=task is not None)
            body = {
                (line.model_id, line.kind): [number(c) for c in line.cells] for line in lines(rows, shown)
            }
            heads = [f"{track}: " * bool(track) + f"{c.over}: {c.title}" for c in shown]
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
    if rows.empty:
        return rows
    leading = {name: task.headline[:1] for name, task in TASKS.items()} | {"integration": ("bio", "batch")}
    keep = [m in leading[t] for t, m in zip(rows["task"], rows["metric"], strict=True)]
    rows = rows[keep]
    return rows if rows["group"].nunique() <= MANY else rows[rows["group"].isin(("", MEAN))]


def describe(difference: Mapping[str, Any]) -> str:
    """What a difference row compares, in words."""
    parts = [METRICS[difference["metric"]].title]
    if difference["head"]:
        parts.append(HEADS.get(difference["head"], difference["head"]))
    if difference["setting"] and difference["task"] != "clustering":
        parts.append(difference["setting"])
    if difference["group"]:
        parts.append(difference["group"] if difference["group"] == MEAN else f"on {difference['group']}")
    return ", ".join(parts)


def to_text(frame: pd.DataFrame, gates: Sequence[Gate]) -> str:
    """Everything as plain text."""
    parts = []
    for task, track, of in sections(frame):
        shown = columns(of, task, full=False)
        body = {
            f"{line.model_id} ({line.kind})": [number(c) for c in line.cells] for line in lines(of, shown)
        }
        table = pd.DataFrame.from_dict(body, orient="index", columns=[f"{c.over}: {c.title}" for c in shown])
        parts.append(f"{heading(task, track).upper()}\n{table.to_string()}")
    rows = differences(frame).to_dict("records")
    if rows:
        text = [
            f"  {r['model_id']} - {r['versus']} ({r['versus_role']}), {heading(r['task'], r['track'])}: "
            f"{describe(r)}: {number(r, signed=True)}"
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
    for task, track, rows in sections(frame):
        shown = columns(rows, task, full=False)
        title = escape(heading(task, track))
        table = Table(title=title, title_justify="left", title_style="bold", header_style="")
        table.add_column("representation")
        table.add_column("kind")
        for column in shown:
            table.add_column(escape(f"{column.over}\n{column.title}"), justify="right")
        for line in lines(rows, shown):
            cells = [escape(number(c)) for c in line.cells]
            table.add_row(escape(line.model_id), line.kind, *cells, style=style[line.kind])
        parts.append(table)
    return parts


def gate_lines(gates: Sequence[Gate]) -> list[Any]:
    """Gates as rich text, a colour a level."""
    from rich.text import Text

    colours = {"fail": "bold red", "caution": "yellow", "note": "dim", "pass": "green"}
    return [Text(f"{g.level.upper():>8}  {g.message}", style=colours[g.level]) for g in gates]


def to_rich(frame: pd.DataFrame, gates: Sequence[Gate]) -> Any:
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
            value, low, high = advantage(r)
            colour = ("green" if value > 0 else "red") if low > 0 or high < 0 else "yellow"
            table.add_row(
                escape(r["model_id"]),
                escape(f"{r['versus']} ({r['versus_role']})"),
                escape(f"{heading(r['task'], r['track'])}: {describe(r)}"),
                Text(number(r, signed=True), style=colour),
            )
        parts.append(table)
    return Group(*parts, *gate_lines(gates))

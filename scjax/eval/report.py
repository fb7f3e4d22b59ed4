"""The report: what an evaluation found, as one page that explains itself (HTML) or as Markdown."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scjax.eval import pictures, tables, verdict
from scjax.eval.environment import missing, version
from scjax.eval.pictures import Curves, Picture
from scjax.eval.schema import MEAN, METRICS
from scjax.eval.tasks import TASKS

if TYPE_CHECKING:
    from scjax.eval.results import Results

PAGE_COLUMNS = 9
FOLD = 3  # parts of a task with an open table each; of more, all but the picture of them is folded away


@dataclass(frozen=True)
class Table:
    """A table of scores: columns under spanning headings, lines, and the best of each column."""

    columns: list[tables.Column]
    spans: list[tuple[str, int]]
    lines: list[tables.Line]
    best: list[str | None]


@dataclass(frozen=True)
class Section:
    """What the report says of a task: its tables by track, its pictures."""

    task: str
    tracks: dict[str, list[Table]]
    splits: list[str]
    pictures: list[Picture] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Name of the section within the page."""
        return re.sub(r"\W+", "-", self.task)

    @property
    def title(self) -> str:
        return TASKS[self.task].title

    @property
    def intro(self) -> str:
        return TASKS[self.task].intro

    @property
    def note(self) -> str:
        """How to read the tables."""
        down = {c.title for pieces in self.tracks.values() for t in pieces for c in t.columns if _min(c)}
        lower = f" Lower is better: {', '.join(sorted(down))}." if down else ""
        return f"Bold: best of models and baselines.{lower} {TASKS[self.task].note}".strip()

    @property
    def folded(self) -> bool:
        return len(self.tracks) > FOLD


def write(
    results: Results, path: Path, title: str | None, curves: Curves | None, facts: Mapping[str, Any]
) -> Path:
    """Write the report of ``results``; see :meth:`scjax.eval.Results.report`."""
    content = contents(results, title, curves, facts)
    if path.suffix in (".md", ".markdown"):
        from scjax.eval import markdown

        return markdown.write(content, path)
    return write_whole(path, _html(content))


def contents(
    results: Results, title: str | None, curves: Curves | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the report says, whatever the format."""
    frame = results.to_frame()
    drawing = not missing("matplotlib")
    maps, legend = pictures.maps(results) if drawing else ([], [])
    skipped = (p["note"] for p in results.panels if p["panel"] == "map" and p["status"] == "skipped")
    sections = _sections(results, frame, drawing)
    named = ", ".join(s.title for s in sections)
    return {
        "title": title or f"Evaluation{': ' if named else ''}{named.lower()}",
        "scored": _scored(results.facts),
        "few_groups": 0 < results.facts.get("n_groups", 0) < 10 and results.facts["n_groups"],
        "gates": results.gates(),
        "verdicts": [_verdict(frame, model) for model in models(frame)],
        "sections": sections,
        "training": None if curves is None else pictures.training(curves),
        "maps": maps,
        "legend": legend,
        "no_maps": next(skipped, ""),
        "no_pictures": "" if drawing else missing("matplotlib"),
        "card": card(results.facts, facts),
        "rows": {name: text for name, text in WHAT.items() if name in _on_cells(frame)},
        "scjax": version("scjax"),
    }


def _html(content: Mapping[str, Any]) -> str:
    if reason := missing("jinja2"):
        raise ImportError(f"the HTML report needs jinja2, {reason}; a report ending in .md does without")
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "value": tables.value,
        "bounds": tables.bounds,
        "state": verdict.state,
        "is_twin": tables.is_twin,
        "address": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode(),
        "has_p": lambda cell: cell is not None and p_value(cell) is not None,
        "p": lambda cell: f"{p_value(cell):.2g}",
    }
    return environment.get_template("report.html.j2").render(**content)


def write_whole(path: Path, text: str) -> Path:
    """Write to a neighbour and rename, so that ``path`` is the whole file or is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def models(frame: pd.DataFrame) -> list[str]:
    """What is being evaluated."""
    return list(dict.fromkeys(frame.loc[frame["model_kind"] == "model", "model_id"]))


def p_value(cell: Mapping[str, Any]) -> float | None:
    """The p-value of a difference, corrected where it belongs to a family."""
    for name in ("p_holm", "p_value"):
        if cell.get(name) is not None and not pd.isna(cell[name]):
            return float(cell[name])
    return None


def _sections(results: Results, frame: pd.DataFrame, drawing: bool) -> list[Section]:
    tracks: dict[str, dict[str, list[Table]]] = {}
    for task, track, rows in tables.sections(frame):
        tracks.setdefault(task, {})[track] = _tables(rows, task)
    found = []
    for task, of in tracks.items():
        schemes = frame.loc[frame["task"].eq(task) & frame["split_scheme"].ne(""), "split_scheme"]
        drawn = pictures.of_task(results, frame, task) if drawing else []
        found.append(Section(task, of, list(dict.fromkeys(schemes)), drawn))
    return found


def _tables(rows: pd.DataFrame, task: str) -> list[Table]:
    """The table of a section, cut between its spanning headings into pieces that fit on a page."""
    shown = tables.columns(rows, task)
    pieces: list[list[tables.Column]] = [[]]
    for over in dict.fromkeys(column.over for column in shown):
        span = [column for column in shown if column.over == over]
        if len(pieces[-1]) + len(span) > PAGE_COLUMNS and pieces[-1]:
            pieces.append([])
        pieces[-1] += span
    return [_table(rows, piece) for piece in pieces]


def _table(rows: pd.DataFrame, shown: list[tables.Column]) -> Table:
    lines = tables.lines(rows, shown)
    overs = [column.over for column in shown]
    best = []
    for i, column in enumerate(shown):
        sign = -1 if _min(column) else 1
        rivals = [line for line in lines if line.kind in ("model", "baseline") and _ranks(line.cells[i])]
        values = {line.model_id: sign * line.cells[i]["value"] for line in rivals}  # type: ignore[index]
        best.append(max(values, key=lambda m: values[m]) if values else None)
    return Table(shown, [(o, overs.count(o)) for o in dict.fromkeys(overs)], lines, best)


def _min(column: tables.Column) -> bool:
    return METRICS[column.fields["metric"]].direction == "min"


def _ranks(cell: Mapping[str, Any] | None) -> bool:
    """Whether a cell can be the best of its column; coverage is neither good nor bad by itself."""
    return cell is not None and cell["status"] == "ok" and cell["axis"] != "coverage"


def _verdict(frame: pd.DataFrame, model: str) -> dict[str, Any]:
    """The leading scores of a model, and how each compares with its twin and the best simple baseline."""
    lines: list[dict[str, Any]] = []
    for score in verdict.leading(frame):
        rows = score.pick(frame[frame["model_id"].eq(model)])
        groups = list(dict.fromkeys(rows["group"]))
        for group in groups if len(groups) <= 6 else [MEAN]:
            found = {r["versus_role"]: r for r in rows[rows["group"] == group].to_dict("records")}
            if own := found.get(""):
                twin, best = found.get(verdict.TWIN), found.get(verdict.BEST)
                what = f"{score.title}: {tables.describe(own)}"
                lines.append({"own": own, "what": what, "twin": twin, "best": best})
    return {"model": model, "lines": lines, "summary": verdict.summary(frame, model)}


def _on_cells(frame: pd.DataFrame) -> set[str]:
    """Representations of cells; elsewhere the same names (pca, oracle) mean other things."""
    of_cells = frame["task"].str.startswith(("annotation", "clustering", "integration", "spatial/niche"))
    return {str(m).partition(" of ")[0] for m in frame.loc[of_cells, "model_id"]}


# --------------------------------------------------------------------------------- data card
WHAT = {
    "random_init": "the same architecture before training: what it knows comes from the architecture and the "
    "input encoding alone",
    "pca": "50 principal components of log1p counts per 10,000 of 2,000 highly variable genes",
    "hvg": "those genes themselves",
    "depth_only": "log total counts, log number of genes, mitochondrial share: what library size tells",
    "noise": "independent normal numbers",
    "majority": "always the most frequent training label",
    "collapsed": "all cells in nearly the same place",
    "oracle": "the labels themselves, slightly jittered: the ceiling",
}
"""What the rows of cell-level tasks are."""

# facts of the card, in its order, and what they are called; further facts follow under their own names
NAMED = {
    "dataset": "data",
    "n_cells": "cells",
    "dropped": "left out",
    "labels": "labels",
    "groups": "groups",
    "batches": "batches",
    "split_scheme": "split",
    "embeddings": "embeddings",
    "twins": "random-initialised twins",
    "graph_cells": "clusters, integration, maps on",
    "seed": "seed",
    "n_boot": "resamples",
    "pretrain_overlap": "overlap with pretraining data",
    "wall_s": "seconds",
    "created": "created",
    "versions": "versions",
}
_WITHIN = {"n_cells_in", "n_cells_labelled", "label_key", "group_key", "batch_key", "n_groups", "tasks"}
MOST_LISTED = 60  # entries of a fact that are written out


def _scored(facts: Mapping[str, Any]) -> str:
    """What was scored, in one line."""
    parts = [str(facts["dataset"])] if facts.get("dataset") else []
    if facts.get("n_cells"):
        parts.append(f"{facts['n_cells']:,} cells")
    for name, key in (("labels", "label_key"), ("groups", "group_key"), ("batches", "batch_key")):
        if facts.get(name):
            parts.append(f"{len(facts[name])} {name}" + f" ({facts.get(key)})" * bool(facts.get(key)))
    return ", ".join(parts)


def card(facts: Mapping[str, Any], further: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card: what was scored, how it was split, what was left out, with what it was computed."""
    lines = []
    for key, name in NAMED.items():
        if key in facts:
            lines.append((_called(key, name, facts), _said(key, facts)))
    rest = [k for k in facts if k not in NAMED and k not in _WITHIN]
    lines += [(k.replace("_", " "), _plain(facts[k])) for k in rest]
    return lines + [(str(k), _plain(v)) for k, v in further.items()]


def _called(key: str, name: str, facts: Mapping[str, Any]) -> str:
    column = {"labels": "label_key", "groups": "group_key", "batches": "batch_key"}.get(key, "")
    return f"{name} ({facts.get(column) or f'no {column}'})" if column in facts else name


def _said(key: str, facts: Mapping[str, Any]) -> str:
    value = facts[key]
    if key == "n_cells" and "n_cells_in" in facts:
        return f"{value:,} scored of {facts['n_cells_in']:,} in the data"
    if key == "embeddings":
        return ", ".join(f"{k} ({s[1]} dimensions)" for k, s in value.items())
    if key == "graph_cells":
        return f"at most about {value:,} cells, stratified"
    if key == "versions":
        return ", ".join(f"{p} {v}" for p, v in value.items())
    return _plain(value)


def _plain(value: Any) -> str:
    """A fact as text: ``B cell (120), NK cell (33)``."""
    if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, Mapping):
        every = [f"{k} ({_plain(v)})" for k, v in value.items()]
    elif isinstance(value, (list, tuple, set)):
        every = [_plain(v) for v in value]
    elif isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    elif isinstance(value, int):
        return f"{value:,}"
    else:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    more = f", and {len(every) - MOST_LISTED:,} more" if len(every) > MOST_LISTED else ""
    return (", ".join(every[:MOST_LISTED]) or "none") + more

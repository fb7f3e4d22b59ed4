"""What an evaluation found: tidy rows, the facts needed to judge them, and panels for the report."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scjax.eval import stats, tables, verdict
from scjax.eval.environment import missing
from scjax.eval.schema import BLANK, KEY, METRICS, SCHEMA_VERSION
from scjax.eval.tasks import TASKS


def row(**fields: Any) -> dict[str, Any]:
    """One result row; a field, task or metric that the schema lacks is an error."""
    if unknown := set(fields) - set(BLANK):
        raise KeyError(f"unknown result fields {sorted(unknown)}")
    for name, known in (("task", TASKS), ("metric", METRICS)):
        if fields.get(name) and fields[name] not in known:
            raise KeyError(f"unknown {name} {fields[name]!r}; scjax/eval/schema.py names them all")
    direction = METRICS[fields["metric"]].direction if fields.get("metric") else "max"
    return {**BLANK, **fields, "direction": direction}


def key(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells this score from all others of the evaluation."""
    return tuple(entry[c] for c in KEY)


@dataclass
class Results:
    """Scores of one or several representations.

    ``rows`` are dictionaries with the columns of :meth:`to_frame`; ``facts`` describe data, splits and
    versions; ``panels`` hold what only pictures need (confusion counts, maps). ``replicates`` are the
    bootstrap values behind the intervals; they stay in memory and are not saved.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    panels: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict, repr=False)

    def add(self, score: Sequence[float] | np.ndarray, **fields: Any) -> None:
        """Append a score: its value and, if there are any, its resamples (see :mod:`scjax.eval.stats`)."""
        score = np.asarray(score, np.float64)
        entry = row(**fields) | {"value": float(score[0])}
        if not np.isfinite(score[0]):
            entry |= {"value": None, "status": "nan", "ci_method": ""}
        elif len(score) == 1:
            entry |= {"ci_method": ""}
        else:
            low, high = stats.interval(score)
            entry |= {"ci_low": low, "ci_high": high, "n_boot": len(score) - 1}
            self.scores[key(entry)] = score
        self.rows.append(entry)

    def extend(self, other: Results) -> None:
        """Take in the scores of another representation or task."""
        self.rows += other.rows
        self.panels += other.panels
        self.scores |= other.scores

    def skip(self, note: str, **fields: Any) -> None:
        """Append a row for a score that could not be computed, with the reason."""
        self.rows.append(row(**fields, status="skipped", note=note))

    def to_frame(self) -> pd.DataFrame:
        """All rows as a table, one value per row; columns as in the schema."""
        return pd.DataFrame(self.rows, columns=list(BLANK))

    def table(self, task: str | None = None) -> pd.DataFrame:
        """A compact table of values with intervals: one task in full, or the main columns of all."""
        return tables.formatted(self.to_frame(), task)

    def to_text(self) -> str:
        """Tables, paired differences and sanity gates as plain text."""
        return tables.to_text(self.to_frame(), self.gates())

    __str__ = to_text

    def __rich__(self) -> Any:
        return tables.to_rich(self.to_frame(), self.gates())

    def brief(self) -> Any:
        """What fits a screen, for rich to print: scores, where each model stands, gates that did not pass."""
        from rich.console import Group

        frame = self.to_frame()
        models = dict.fromkeys(frame.loc[frame["model_kind"] == "model", "model_id"])
        stands = [line for model in models for line in verdict.summary(frame, model)]
        shut = [gate for gate in self.gates() if gate.level in ("fail", "caution")]
        return Group(*tables.score_tables(frame), *stands, *tables.gate_lines(shut))

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def gates(self) -> list[verdict.Gate]:
        """Sanity gates: what must hold before a score is worth reading (noise below the model, a twin
        present, …).
        """
        return verdict.gates(self.to_frame(), self.facts)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write facts, scores and panels as JSON lines, told apart by their field ``record``; replaces
        ``path`` whole. A name that ends in ``.gz`` is compressed.
        """
        lines = [{"record": "facts", "schema_version": SCHEMA_VERSION, **self.facts}]
        lines += [{"record": "score", **r} for r in self.rows]
        lines += [{"record": "panel", **p} for p in self.panels]
        partial = Path(f"{os.fspath(path)}.partial")
        try:
            text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
            zipped = os.fspath(path).endswith(".gz")
            partial.write_bytes(gzip.compress(text, mtime=0) if zipped else text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, and they alone, as a parquet file (needs pyarrow); replaces ``path`` whole."""
        if reason := missing("pyarrow"):
            raise ImportError(f"parquet needs pyarrow, {reason}")
        partial = Path(f"{os.fspath(path)}.partial")
        try:
            self.to_frame().to_parquet(partial, index=False)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Read what :meth:`to_jsonl` wrote (ValueError names the line that does not fit)."""
        results = cls()
        with gzip.open(path, "rt") if os.fspath(path).endswith(".gz") else open(path) as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    record = line.pop("record")
                    version = line.get("schema_version", SCHEMA_VERSION)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: not a record of scjax.eval results ({error!r})"
                    ) from None
                if version != SCHEMA_VERSION:
                    raise ValueError(
                        f"{path}, line {number}: schema version {version!r}; this reads {SCHEMA_VERSION!r}"
                    )
                if record == "facts":
                    results.facts = {k: v for k, v in line.items() if k != "schema_version"}
                elif record == "score":
                    results.rows.append(row(**line))
                else:
                    results.panels.append(line)
        if not results.facts:
            raise ValueError(f"{path}: no line with the facts of the evaluation; the file is not complete")
        return results

    def report(
        self,
        path: str | os.PathLike[str],
        title: str | None = None,
        curves: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a self-contained HTML report (no network access needed to read it).

        ``curves``: the metrics of a training run, as a path of JSON lines or a list of dictionaries with
        ``step`` and losses, drawn beside the no-information baseline. ``facts``: further lines for the data
        card. Needs jinja2 and matplotlib (the extra ``eval``).
        """
        from scjax.eval.report import write

        return write(self, Path(path), title, curves, facts or {})

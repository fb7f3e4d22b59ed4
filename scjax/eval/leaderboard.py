"""Many evaluations in one table: who is ahead of whom on which data, and which scores must not be ranked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scjax.eval import stats, tables, verdict
from scjax.eval.results import Results
from scjax.eval.schema import MEAN, METRICS
from scjax.eval.tasks import TASKS

COLUMNS = (
    "dataset",
    "task",
    "track",
    "metric",
    "direction",
    "rank",
    "model",
    "kind",
    "value",
    "ci_low",
    "ci_high",
    "ahead_of_baseline",
    "versus",
    "difference",
    "difference_low",
    "difference_high",
    "p_holm",
    "pretrain_overlap",
    "problems",
    "source",
)
SAME = 0.01  # how far apart a baseline may be in two evaluations of the same data, on other machines
PROTOCOL = ("split_scheme", "n_cells", "metric", "head", "setting", "group")

Source = str | os.PathLike[str] | Results


def problems(results: Results) -> list[str]:
    """Why no claim may rest on these results: mandatory controls that are missing, gates that failed."""
    frame = results.to_frame()
    return [*_missing(frame), *(g.message for g in results.gates() if g.level == "fail")]


def _missing(frame: pd.DataFrame) -> list[str]:
    """Controls that a section must have and has no score of."""
    found = []
    for task, track, rows in tables.sections(frame):
        scored = rows[rows["versus"].eq("") & rows["status"].eq("ok")]
        if not scored["model_kind"].eq("model").any():
            continue
        there = set(scored["model_id"])
        absent = [c for c in TASKS[task].blind if c not in there]
        rivals = rows["model_kind"].eq("baseline").any()  # a task without baselines has controls alone
        reasons = rows[rows["model_id"].isin(absent) & rows["status"].ne("ok")]
        why = dict(zip(reasons["model_id"], reasons["note"], strict=True))
        if rivals and not scored["model_kind"].eq("baseline").any():
            absent.append("every simple baseline")
        for control in absent:
            reason = f" ({why[control]})" if why.get(control) else ""
            found.append(f"{tables.heading(task, track)}: the control {control} is missing{reason}.")
    return found


def leaderboard(sources: Iterable[Source], *, allow_unknown: bool = False) -> pd.DataFrame:
    """Rank the models of several evaluations, data set by data set, table by table, by the leading score.

    Simple baselines are ranked with the models, so that it shows where these stand. A model whose results
    have problems (see :func:`problems`) is listed without a rank.

    Args:
        sources: results, or files that ``Results.to_jsonl`` wrote.
        allow_unknown: also rank models of which it is unknown whether their pretraining saw the cells; the
            column ``pretrain_overlap`` then says so.

    Returns:
        One line a model or baseline, with the columns :data:`COLUMNS`. ``difference`` is against the best
        simple baseline, turned so that above zero the model is ahead.

    Raises:
        ValueError: no models; overlap with the pretraining data unknown and not allowed; evaluations of one
        data set that differ in cells, splits, score or in what their baselines reach, which cannot be ranked
        side by side; a model twice.
    """
    rows: list[dict[str, Any]] = []
    for number, source in enumerate(sources, 1):
        if isinstance(source, Results):
            rows += _entries(source, f"results {number}")
        else:
            rows += _entries(Results.read(source), os.fspath(source))
    if not any(r["kind"] == "model" for r in rows):
        raise ValueError("no scores of models to rank in these results")
    unknown = {r["model"]: r["source"] for r in rows if r["pretrain_overlap"] == "unknown"}
    if unknown and not allow_unknown:
        model, where = next(iter(unknown.items()))
        raise ValueError(
            f"{where}: it is not known whether the pretraining of {model} saw these cells; evaluate with "
            "pretrain_overlap= none, study or cell, or allow the unknown, which is then written beside the "
            "score"
        )
    out: list[dict[str, Any]] = []
    for place in dict.fromkeys((r["dataset"], r["task"], r["track"]) for r in rows):
        out += _ranked([r for r in rows if (r["dataset"], r["task"], r["track"]) == place])
    return pd.DataFrame(out, columns=list(COLUMNS))


def _entries(results: Results, source: str) -> list[dict[str, Any]]:
    """The leading score of every model and baseline of an evaluation."""
    frame = results.to_frame()
    kinds = dict(zip(frame["model_id"], frame["model_kind"], strict=True))
    blamed = {m: _blamed(results, frame, m) for m, kind in kinds.items() if kind == "model"}
    out = []
    for score in verdict.leading(frame):
        rows = score.pick(frame)
        own = rows[rows["versus"].eq("") & rows["model_kind"].isin(("model", "baseline"))]
        overall = own[own["group"].isin(("", MEAN))]
        own = overall if len(overall) else own.drop_duplicates("model_id")
        for r in own.to_dict("records"):
            same = rows[rows["model_id"].eq(r["model_id"]) & rows["group"].eq(r["group"])]
            best = next(iter(same[same["versus_role"] == verdict.BEST].to_dict("records")), None)
            out.append(_entry(r, best, blamed.get(r["model_id"], []), source))
    return out


def _blamed(results: Results, frame: pd.DataFrame, model: str) -> list[str]:
    """The problems of one model: those that are left without the others."""
    of = frame[frame["model_kind"].ne("model") | frame["model_id"].eq(model)]
    fails = [g.message for g in verdict.gates(of, results.facts) if g.level == "fail"]
    return [*_missing(of), *fails]


def _entry(
    r: Mapping[str, Any], best: Mapping[str, Any] | None, problems: Sequence[str], source: str
) -> dict[str, Any]:
    gap = (np.nan,) * 3 if best is None else tables.advantage(best)
    state = "" if best is None else verdict.state(best)
    return {
        **{k: r[k] for k in ("dataset", "task", "track", "direction", "value", "ci_low", "ci_high")},
        "metric": tables.describe(r),
        "rank": None,
        "model": r["model_id"],
        "kind": r["model_kind"],
        "ahead_of_baseline": state,
        "versus": "" if best is None else best["versus"],
        **dict(zip(("difference", "difference_low", "difference_high"), gap, strict=True)),
        "p_holm": np.nan if best is None or best["p_holm"] is None else best["p_holm"],
        "pretrain_overlap": r["pretrain_overlap"] if r["model_kind"] == "model" else "",
        "problems": " ".join(p for p in problems if p.startswith(_signs(r["task"], r["track"], r["metric"]))),
        "source": source,
        "protocol": {k: r[k] for k in PROTOCOL},
    }


def _signs(task: str, track: str, metric: str) -> tuple[str, str]:
    """How messages about this table begin."""
    heading = tables.heading(task, track)
    return f"{heading}: ", f"{heading}, {METRICS[metric].title}"


def _ranked(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of one table, best first; those without problems have a rank."""
    _require_same_protocol(entries)
    kept: dict[str, dict[str, Any]] = {}
    for e in entries:
        known = kept.setdefault(e["model"], e)
        where = f"{known['source']} and {e['source']}"
        if known is e:
            continue
        if e["kind"] == "model":
            raise ValueError(f"{where}: both hold scores of {e['model']} on {_place(e)}; rank one of them")
        if abs(known["value"] - e["value"]) > SAME:
            raise ValueError(
                f"{where}: the baseline {e['model']} scores {known['value']:.3f} and {e['value']:.3f} on "
                f"{_place(e)}: not the same data or protocol, so the models cannot be ranked side by side; "
                "give the data sets different names (dataset=)"
            )
    sign = -1 if entries[0]["direction"] == "min" else 1
    ordered = sorted(kept.values(), key=lambda e: (bool(e["problems"]), -sign * e["value"]))
    rank = 0
    for e in ordered:
        if not e["problems"]:
            rank += 1
            e["rank"] = rank
    return ordered


def _place(e: Mapping[str, Any]) -> str:
    return f"{tables.heading(e['task'], e['track'])}{' of ' + e['dataset'] if e['dataset'] else ''}"


def _require_same_protocol(entries: Sequence[Mapping[str, Any]]) -> None:
    first = entries[0]
    for e in entries:
        if differing := [k for k in PROTOCOL if e["protocol"][k] != first["protocol"][k]]:
            k = differing[0]
            if e["source"] == first["source"]:  # baselines of the same evaluation: their own affair
                continue
            raise ValueError(
                f"{first['source']} and {e['source']}: {_place(e)} was scored with {k} "
                f"{first['protocol'][k]!r} there and {e['protocol'][k]!r} here; scores under different "
                "protocols cannot be ranked side by side (give the data sets different names, dataset=)"
            )


def compare(first: Source, second: Source, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The models of one evaluation against those of another, paired by what was held out.

    Saved results hold no resamples, so models are paired by the values of single units (perturbations,
    regulators, genes, or held-out groups) of the leading score of each table. From ten units on there is a
    percentile interval over units; the p-value is that of Wilcoxon's signed ranks, corrected after Holm over
    all lines. Fewer than six units cannot reach 0.05.

    Returns:
        One line a table and pair of models: ``difference`` (first - second, mean over units, turned so that
        above zero the first is ahead), ``ci_low``, ``ci_high``, ``wins`` (share of units where the first is
        ahead), ``n_units``, ``p_value``, ``p_holm``.

    Raises:
        ValueError: no table with units in common; evaluations under different protocols.
    """
    from scipy.stats import wilcoxon

    pair = [s if isinstance(s, Results) else Results.read(s) for s in (first, second)]
    frames = [r.to_frame() for r in pair]
    names = ["the first" if isinstance(s, Results) else os.fspath(s) for s in (first, second)]
    entries = [_entries(r, n) for r, n in zip(pair, names, strict=True)]
    for place in dict.fromkeys((e["dataset"], e["task"], e["track"]) for e in entries[0]):
        here = [[e for e in of if (e["dataset"], e["task"], e["track"]) == place] for of in entries]
        if all(here):
            _ranked([e for of in here for e in of if e["kind"] == "baseline"])
            _require_same_protocol([of[0] for of in here])
    out: list[dict[str, Any]] = []
    theirs = {(s.task, s.track): s for s in verdict.leading(frames[1])}
    for score in verdict.leading(frames[0]):
        if theirs.get((score.task, score.track)) != score:
            continue
        units = [_units(frame, score) for frame in frames]
        for (data, mine), a in units[0].items():
            for (other_data, other), b in units[1].items():
                common = [u for u in a if u in b]
                if data != other_data or not common or (a == b and mine == other):
                    continue
                sign = -1 if METRICS[score.metric].direction == "min" else 1
                apart = sign * np.array([a[u] - b[u] for u in common])
                low = high = None
                if len(apart) >= stats.FEW_GROUPS and n_boot:
                    weights = stats.resample(len(apart), n_boot, seed, "compare")
                    low, high = stats.interval(stats.mean(apart, weights))
                same = not np.any(apart)
                out.append(
                    {
                        **{"dataset": data, "task": score.task, "track": score.track},
                        **{"metric": METRICS[score.metric].title, "first": mine, "second": other},
                        "difference": float(apart.mean()),
                        **{"ci_low": low, "ci_high": high, "wins": float(np.mean(apart > 0))},
                        **{"n_units": len(apart), "p_value": 1.0 if same else float(wilcoxon(apart).pvalue)},
                    }
                )
    if not out:
        raise ValueError(
            f"{names[0]} and {names[1]}: no table that has values of single units (groups, perturbations, "
            "regulators) in both; score the same data under the same dataset name"
        )
    table = pd.DataFrame(out)
    table["p_holm"] = stats.holm(table["p_value"].to_numpy(float))
    return table


def _units(frame: pd.DataFrame, score: verdict.Score) -> dict[tuple[str, str], dict[str, float]]:
    """(dataset, model) -> unit -> its value of the leading score."""
    rows = frame[frame["versus"].eq("") & frame["status"].eq("ok") & frame["model_kind"].eq("model")]
    for name, value in (("task", score.task), ("track", score.track), ("metric", score.metric)):
        rows = rows[rows[name].eq(value)]
    rows = rows[rows["head"].eq(score.head) & rows["setting"].eq(score.setting)]
    single = rows[rows["label"].ne("")]
    unit = "label"
    if not len(single):
        single, unit = rows[~rows["group"].isin(("", MEAN))], "group"
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in single.to_dict("records"):
        found.setdefault((r["dataset"], r["model_id"]), {})[r[unit]] = r["value"]
    return found


def summary(board: pd.DataFrame) -> pd.DataFrame:
    """Model by model: tables it is ranked in, mean share of rivals behind it, where it beats the baseline."""
    ranked = board[board["rank"].notna()].copy()
    size = ranked.groupby(["dataset", "task", "track"])["rank"].transform("max").astype(float)
    ranked["behind"] = (size - ranked["rank"].astype(float)) / (size - 1).clip(lower=1)
    models = board[board["kind"] == "model"]
    of = models.groupby("model", sort=False)
    table = pd.DataFrame(
        {
            "tables": of.size(),
            "ranked": of["rank"].count(),
            "rivals_behind": ranked[ranked["kind"] == "model"].groupby("model")["behind"].mean(),
            "ahead_of_best_baseline": of["ahead_of_baseline"].agg(lambda s: int((s == "ahead").sum())),
            "behind_best_baseline": of["ahead_of_baseline"].agg(lambda s: int((s == "behind").sum())),
        }
    )
    return table.sort_values("rivals_behind", ascending=False)


def to_markdown(board: pd.DataFrame, title: str = "Leaderboard") -> str:
    """The board as Markdown: the summary, then a table for each data set and task."""
    from scjax.eval.markdown import escape, grid

    out = [
        f"# {escape(title)}",
        "",
        "Models and simple baselines, best first, by the leading score of each task.",
    ]
    head = ["model", "tables", "ranked", "share of rivals behind", "ahead of best baseline", "behind it"]
    short = summary(board)
    body = [[escape(m), *(_short(v) for v in r)] for m, r in zip(short.index, short.to_numpy(), strict=True)]
    out += ["", *grid(head, body)]
    for (dataset, task, track), of in board.groupby(["dataset", "task", "track"], sort=False):
        name = tables.heading(task, track) + (f", {dataset}" if dataset else "")
        sign = " (lower is better)" if of["direction"].iloc[0] == "min" else ""
        head = ["rank", "model", f"{of['metric'].iloc[0]}{sign}", "minus best baseline", "p", "overlap", ""]
        out += [f"## {escape(name)}", "", *grid([*map(escape, head)], [[*map(escape, r)] for r in lines(of)])]
    return "\n".join(out)


def lines(of: pd.DataFrame) -> list[list[str]]:
    """The entries of one table as text: rank, model, score, difference, p, overlap, problems."""
    return [_line(r) for r in of.astype(object).where(of.notna(), None).to_dict("records")]


def _line(r: Mapping[str, Any]) -> list[str]:
    gap = {
        "value": r["difference"],
        "ci_low": r["difference_low"],
        "ci_high": r["difference_high"],
        "status": "ok",
    }
    return [
        "" if r["rank"] is None else str(int(r["rank"])),
        r["model"] if r["kind"] == "model" else f"{r['model']} ({r['kind']})",
        tables.number({**r, "status": "ok"}),
        "" if r["difference"] is None else f"{tables.number(gap, signed=True)} ({r['versus']})",
        "" if r["p_holm"] is None else f"{r['p_holm']:.2g}",
        r["pretrain_overlap"],
        r["problems"],
    ]


def _short(value: float) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"


def save(board: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write the board as ``.md``, or whole as ``.csv`` or ``.tsv``."""
    path = Path(path)
    if path.suffix == ".md":
        text = to_markdown(board)
    elif path.suffix in (".csv", ".tsv"):
        text = board.to_csv(index=False, sep="," if path.suffix == ".csv" else "\t")
    else:
        raise ValueError(f"{path}: a leaderboard is written as .md, .csv or .tsv")
    from scjax.eval.report import write_whole

    return write_whole(path, text)

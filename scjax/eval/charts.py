"""Figures of single tasks: perturbations, curves, sections, features; from rows and panels to SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scjax.eval.figures import (
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    RULE,
    blank,
    looks,
    styled,
    svg,
)

MOST_BARS = 40  # features with a line each; of more, the whole distribution is shown


def _above(figure: Any, *lines_and_names: Any) -> None:
    """The legend above the axes, in as many columns as the names leave room for."""
    names = lines_and_names[1] if lines_and_names else figure.axes[0].get_legend_handles_labels()[1]
    room = 14 * figure.get_size_inches()[0]  # characters
    columns = int(room / (max(map(len, names), default=0) + 8))
    figure.legend(*lines_and_names, loc="outside upper center", ncols=max(1, min(len(names), 6, columns)))


def _grid(n: int, width: float = 3.3, height: float = 3.2) -> tuple[Any, list[Any]]:
    """A figure of n square-ish axes, three in a line, none of them empty."""
    across = min(3, n)
    width, height = (1.3 * width, 1.2 * height) if n == 1 else (width, height)
    down = -(-n // across)
    figure = blank(width * across + 0.4, height * down + 0.3)
    axes = [figure.add_subplot(down, across, i + 1) for i in range(n)]
    return figure, axes


# ---------------------------------------------------------------------------- perturbation
def _known(panel: Mapping[str, Any], key: str) -> dict[str, float]:
    """Perturbation → its value in the panel, where it has one."""
    pairs = zip(panel["names"], panel[key], strict=True)
    return {name: float(x) for name, x in pairs if x is not None and np.isfinite(x)}


@styled
def effects(
    panel: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]], title: str, direction: str
) -> bytes:
    """Score of each perturbation (one dot) against that of the training mean, one picture a model.

    ``scores``: model → perturbation → value of the metric called ``title``.
    """
    base, size = _known(panel, "baseline"), _known(panel, "effect")
    figure, grid = _grid(len(scores))
    every = [*base.values(), *(v for of in scores.values() for v in of.values())]
    low, high = min(every), max(every)
    pad = 0.05 * (high - low or 1)
    scale = np.quantile(list(size.values()) or [1.0], [0.05, 0.95])
    for axes, (model, of) in zip(grid, scores.items(), strict=True):
        names = [n for n in of if n in base and n in size]
        x, y = np.array([base[n] for n in names]), np.array([of[n] for n in names])
        ends = [low - pad, high + pad]
        axes.plot(ends, ends, color=MUTED, lw=0.8, zorder=1)
        drawn = axes.scatter(
            x,
            y,
            c=[size[n] for n in names],
            cmap="viridis_r",
            s=20,
            lw=0.4,
            ec="white",
            vmin=scale[0],
            vmax=scale[1],
            zorder=3,
        )
        ahead = (y > x) if direction == "max" else (y < x)
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.set_title(f"{model}: ahead in {int(ahead.sum())} of {len(names)}")
        axes.set_xlabel(f"{title}, training mean")
        axes.grid(color=RULE, lw=0.6)
    grid[0].set_ylabel(f"{title}, model")
    figure.colorbar(drawn, ax=grid, label="size of the real effect", shrink=0.7, aspect=24)
    return svg(figure)


@styled
def by_effect(
    panel: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str], title: str
) -> bytes:
    """Score of each method over the size of the effect, from twelve perturbations on as means of bins."""
    size = _known(panel, "effect")
    values = np.array(list(size.values()))
    binned = len(values) >= 12
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 5)) if binned else values)
    edges = edges if binned else np.append(edges, np.inf)
    figure = blank(7.6, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    look = looks(list(kinds.items()))
    last = max(len(edges) - 2, 0)
    place = {n: min(int(np.searchsorted(edges, e, "right")) - 1, last) for n, e in size.items()}
    centre = [float(np.median([size[n] for n in size if place[n] == b])) for b in range(last + 1)]
    for model, of in scores.items():
        inside = [[of[n] for n in size if place[n] == b and n in of] for b in range(last + 1)]
        mean = [np.mean(v) if v else np.nan for v in inside]
        upper.plot(centre, mean, marker="o", ms=5, label=model, **look[model])
    for edge in edges[1:-1] if binned else ():
        upper.axvline(edge, color=RULE, lw=0.8, zorder=0)
    upper.set_ylabel(f"{title},\nmean of the bin" if binned else title)
    upper.grid(axis="y", color=RULE, lw=0.6)
    lower.yaxis.get_major_locator().set_params(integer=True)
    lower.hist(values, bins=min(30, max(5, len(values) // 3)), color="#b9c2cc", ec="white", lw=0.5)
    lower.set_xlabel("size of the real effect")
    lower.set_ylabel("perturbations")
    _above(figure)
    return svg(figure)


@styled
def calibrated(table: pd.DataFrame) -> bytes:
    """Heat map of calibrated scores: representations × metrics; 0 is the training mean, 1 the ceiling."""
    figure = blank(1.05 * len(table.columns) + 3.0, 0.36 * len(table) + 1.5)
    axes = figure.subplots()
    drawn = axes.imshow(table.to_numpy(float), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(table.to_numpy(float))), strict=True):
        x = round(float(table.iat[i, j]), 2) + 0.0  # no minus before a zero
        colour = "white" if abs(x) > 0.65 else INK
        text = f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=30, ha="right")
    axes.set_yticks(range(len(table)), table.index)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=16, ticks=[-1, 0, 1])
    return svg(figure)


# -------------------------------------------------------------------------------- curves
@styled
def precision_recall(panels: Sequence[Mapping[str, Any]]) -> bytes:
    """Precision against recall, one picture a track, with the line of the prevalence (chance)."""
    tracks = list(dict.fromkeys(p.get("track", "") for p in panels))
    look = looks([(p["model_id"], p["model_kind"]) for p in panels])
    figure, grid = _grid(len(tracks))
    named: dict[str, Any] = {}
    for axes, track in zip(grid, tracks, strict=True):
        of = [p for p in panels if p.get("track", "") == track]
        top = 0.0
        for p in of:
            recall, precision = np.asarray(p["recall"], float), np.asarray(p["precision"], float)
            (line,) = axes.plot(recall, precision, **look[p["model_id"]])
            named.setdefault(p["model_id"], line)
            beyond = recall >= 0.02  # the first few of a ranking are all or nothing
            top = max(top, float(precision[beyond].max(initial=0)))
        prevalence = of[0]["prevalence"]
        axes.axhline(prevalence, color=ORANGE, lw=0.9, ls=(0, (2, 2)), zorder=1)
        axes.set(xlim=(0, 1), ylim=(0, min(1.03, max(1.15 * top, 2 * prevalence))))
        axes.set_title(track or "all")
        axes.set_xlabel(f"recall (prevalence {prevalence:.3g})")
        axes.grid(color=RULE, lw=0.6)
    grid[0].set_ylabel("precision")
    _above(figure, list(named.values()), list(named))
    return svg(figure)


@styled
def calibration(panels: Sequence[Mapping[str, Any]]) -> bytes:
    """Share of right answers against the confidence they came with, one picture a held-out group."""
    groups = list(dict.fromkeys(p["group"] for p in panels))
    look = looks([(p["model_id"], p["model_kind"]) for p in panels])
    figure, grid = _grid(len(groups))
    named: dict[str, Any] = {}
    for axes, group in zip(grid, groups, strict=True):
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8)
        for p in (p for p in panels if p["group"] == group):
            n = np.asarray(p["n"], float)
            full = n > 0
            x, y = np.asarray(p["confidence"], float)[full], np.asarray(p["accuracy"], float)[full]
            (line,) = axes.plot(x, y, marker="o", ms=3.5, **look[p["model_id"]])
            named.setdefault(p["model_id"], line)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        axes.set_title(f"held out: {group}" if group else "")
        axes.set_xlabel("confidence")
        axes.grid(color=RULE, lw=0.6)
    grid[0].set_ylabel("share right")
    _above(figure, list(named.values()), list(named))
    return svg(figure)


@styled
def few_shot(rows: pd.DataFrame, title: str) -> bytes:
    """A score over the number of labelled cells, with its interval; one line a representation."""
    budget = rows["setting"].str.extract(r"^(\d+)", expand=False)
    rows = rows.assign(budget=pd.to_numeric(budget)).dropna(subset="budget")
    shown = list(dict.fromkeys(zip(rows["model_id"], rows["model_kind"], strict=True)))
    look = looks(shown)
    figure = blank(7.6, 3.6)
    axes = figure.subplots()
    for name, _ in shown:
        of = rows[rows["model_id"] == name].dropna(subset="value").sort_values("budget")
        x = of["budget"].to_numpy(float)
        axes.plot(x, of["value"], marker="o", ms=4, label=name, **look[name])
        ends = of[["ci_low", "ci_high"]].astype(float)
        if ends.notna().all(axis=None):
            axes.fill_between(x, ends["ci_low"], ends["ci_high"], color=look[name]["color"], alpha=0.12, lw=0)
    ticks = sorted(set(rows["budget"]))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("labelled training cells of each type")
    axes.set_ylabel(title)
    axes.grid(color=RULE, lw=0.6)
    figure.legend(loc="outside right center")
    return svg(figure)


# ------------------------------------------------------------------- sections and features
@styled
def sections(panels: Sequence[Mapping[str, Any]]) -> bytes:
    """Tissue sections (lines): the true regions, and those that each model predicts, with the share right."""
    across = 1 + max(len(p["predicted"]) for p in panels)
    names = panels[0]["names"]
    width = min(12.0, 3.0 * across)
    extent = [np.ptp(np.asarray(p["xy"], float), axis=0) for p in panels]
    tall = [min(2.0, max(0.3, y / max(x, 1e-9))) for x, y in extent]  # height of each section / its width
    figure = blank(width, sum(width / across * t + 0.3 for t in tall) + 0.5)
    grid = figure.subplots(len(panels), across, squeeze=False, height_ratios=tall)
    for line, panel in zip(grid, panels, strict=True):
        xy, truth = np.asarray(panel["xy"], float), np.asarray(panel["truth"])
        pictures = {"truth": truth} | {m: np.asarray(c) for m, c in panel["predicted"].items()}
        for axes, (what, codes) in zip(line, pictures.items(), strict=False):
            colour = [PALETTE[c % len(PALETTE)] if c >= 0 else RULE for c in codes]
            axes.scatter(xy[:, 0], xy[:, 1], c=colour, s=max(1.0, 2500 / len(xy)), lw=0, rasterized=True)
            right = f": {100 * np.mean(codes == truth):.0f} % right" if what != "truth" else ""
            axes.set_title(what + right, fontsize=8.5)
        for axes in line:
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.spines[:].set_visible(False)
        for axes in line[len(pictures) :]:
            axes.set_visible(False)
        line[0].set_ylabel(str(panel["section"]))
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], marker="o", ls="", ms=5, color=PALETTE[i % len(PALETTE)]) for i in range(len(names))
    ]
    figure.legend(dots, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    return svg(figure)


@styled
def features(panel: Mapping[str, Any], kinds: Mapping[str, str], title: str) -> bytes:
    """A score of every feature: a dot each where they are few, else all of them in order of size."""
    values = {m: np.array([np.nan if x is None else x for x in v], float) for m, v in panel["value"].items()}
    look = looks([(m, kinds.get(m, "model")) for m in values])
    first = next(iter(values.values()))
    if len(first) > MOST_BARS:
        figure = blank(7.6, 3.6)
        axes = figure.subplots()
        for name, v in values.items():
            ordered = np.sort(v[np.isfinite(v)])[::-1]
            axes.plot(np.linspace(0, 100, len(ordered)), ordered, label=name, **look[name])
        axes.set_xlabel(f"features in order of their own score, % of {len(first):,}")
        axes.set_ylabel(title)
        axes.grid(color=RULE, lw=0.6)
        axes.axhline(0, color=MUTED, lw=0.8)
        figure.legend(loc="outside right center")
        return svg(figure)
    order = np.argsort(-np.nan_to_num(first, nan=-np.inf), kind="stable")
    figure = blank(7.6, 1.1 + 0.24 * len(first))
    axes = figure.subplots()
    y = np.arange(len(first))
    for name, v in values.items():
        kind = kinds.get(name, "model")
        filled = {"mfc": look[name]["color"]} if kind == "model" else {"mfc": "white"}
        axes.plot(
            v[order],
            y,
            "o",
            color=look[name]["color"],
            ms=6.5 if kind == "model" else 5.5,
            mew=1.3,
            label=name,
            zorder=look[name]["zorder"],
            **filled,
        )
    axes.set_yticks(y, [panel["names"][i] for i in order])
    axes.set_ylim(len(first) - 0.4, -0.6)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(color=RULE, lw=0.6)
    axes.set_xlabel(title)
    _above(figure)
    return svg(figure)


@styled
def overview(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The leading score of every representation (lines of dots) in every track (one line each)."""
    tracks = list(dict.fromkeys(r["track"] for r in rows))
    shown = list(dict.fromkeys((r["model_id"], r["model_kind"]) for r in rows))
    look = looks(shown)
    figure = blank(7.6, 1.2 + 0.3 * len(tracks))
    axes = figure.subplots()
    for name, kind in shown:
        of = [r for r in rows if r["model_id"] == name and r["value"] is not None]
        y = [tracks.index(r["track"]) for r in of]
        colour = GREEN if kind == "oracle" else look[name]["color"]
        axes.plot(
            [r["value"] for r in of],
            y,
            {"model": "o", "oracle": "D", "control": "x"}.get(kind, "s"),
            color=colour,
            mfc=colour if kind == "model" else "white",
            ms=7 if kind == "model" else 5,
            mew=1.2,
            label=name,
            zorder=look[name]["zorder"],
        )
        for r, at in zip(of, y, strict=True):
            if kind == "model" and r["ci_low"] is not None and np.isfinite(r["ci_low"]):
                axes.plot([r["ci_low"], r["ci_high"]], [at, at], color=colour, lw=1.4)
    axes.set_yticks(range(len(tracks)), tracks)
    axes.set_ylim(len(tracks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(color=RULE, lw=0.6)
    axes.set_xlabel(title)
    _above(figure)
    return svg(figure)

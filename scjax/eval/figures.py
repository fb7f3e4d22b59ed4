"""Drawing for the report: the style, and the figures of cell-level tasks; functions from results to SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scjax.eval import tables, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#22262b", "#8a9099", "#dfe3e8"
BLUE, ORANGE, GREEN = "#2563a8", "#d07a1f", "#3d8b5f"
PALETTE = [
    *(
        "#4e79a7",
        "#f28e2b",
        "#59a14f",
        "#e15759",
        "#b07aa1",
        "#76b7b2",
        "#d4a72c",
        "#9c755f",
        "#ff9da7",
        "#86909c",
    ),
    *(
        "#1f4e79",
        "#a85a00",
        "#2d6a2f",
        "#9c2a2c",
        "#6b4a78",
        "#2f7f79",
        "#8a6d00",
        "#5e4636",
        "#c2556b",
        "#4a525b",
    ),
]
_MODELS = (BLUE, "#7b4fa3", "#158a8a", "#c2437a", "#5b7c1e")
_BASELINES = (INK, "#8c6d31", "#4f7a68", "#7a5575", "#3f6184")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)))
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "scjax",  # the same results give the same file
    "svg.fonttype": "path",
    **{
        f"{side}tick.{key}": value
        for side in "xy"
        for key, value in (("color", MUTED), ("labelcolor", INK), ("major.width", 0.6))
    },
}


def blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def svg(figure: Figure) -> bytes:
    """The figure as the bytes of an SVG file."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", dpi=170, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def styled(draw: Any) -> Any:
    """Draw in the report's style, whatever the user's own settings."""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def colour_of(model_id: str, kind: str) -> str:
    if tables.is_twin(model_id):
        return ORANGE
    return {"model": BLUE, "baseline": INK, "control": "#a4abb3", "oracle": GREEN}[kind]


def looks(shown: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and width of each (representation, kind): models stand out, controls recede."""
    out: dict[str, dict[str, Any]] = {}
    count = {"model": 0, "baseline": 0, "control": 0, "oracle": 0}
    for name, kind in shown:
        if name in out:
            continue
        colour, dashes = colour_of(name, kind), _DASHES[count[kind] % len(_DASHES)]
        if kind == "model":
            colour, dashes = _MODELS[count[kind] % len(_MODELS)], "-"
        elif kind == "baseline":
            colour = _BASELINES[count[kind] % len(_BASELINES)]
        elif tables.is_twin(name):
            dashes = "-"
        out[name] = {
            "color": colour,
            "ls": dashes,
            "lw": 2.2 if kind == "model" else 1.3,
            "zorder": {"model": 5, "oracle": 2, "control": 2}.get(kind, 3) + tables.is_twin(name),
        }
        count[kind] += 1
    return out


@styled
def curves(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]], error: str, baseline: str | None, nothing: str
) -> bytes:
    """Training and validation error over steps, beside the no-information baseline, called ``nothing``."""
    figure = blank(7.6, 3.1)
    axes = figure.subplots()
    shown = 0.0
    for name, (step, value) in series.items():
        split, _, metric = name.rpartition("/")
        if metric == error and split == "validation":
            axes.plot(step, value, color=BLUE, lw=1.8, marker="o", ms=3.5, label="validation error", zorder=3)
        elif metric == error:
            axes.plot(step, value, color="#9dbbe0", lw=1.2, label="training error")
        elif metric == baseline and not (split != "validation" and f"validation/{baseline}" in series):
            axes.plot(step, value, color=INK, lw=1.2, ls=(0, (4, 3)), label=f"{nothing} (no information)")
        else:
            continue
        shown = max(shown, float(np.quantile(value, 0.98)))
    axes.set_ylim(0, shown * 1.15)
    axes.set_xlabel("training step")
    axes.set_ylabel({"masked_mse": "mean squared error", "masked_ce": "cross-entropy"}.get(error, error))
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.legend(loc="upper right", ncols=3)
    return svg(figure)


@styled
def probes(series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Frozen probes over training steps: scores between 0 and 1 at the left, the effective rank at the
    right.
    """
    rank = "probe/effective_rank"
    sides = [[name for name in series if name != rank], [name for name in series if name == rank]]
    sides = [names for names in sides if names]
    figure = blank(7.6, 3.1)
    colours = dict(zip(series, PALETTE, strict=False))
    for axes, names in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        for name in names:
            called = name.removeprefix("probe/").replace("_macro_f1", ", macro-F1").replace("_", " ")
            axes.plot(*series[name], color=colours[name], lw=1.6, marker="o", ms=3, label=called)
        axes.set_ylim(0, 1 if names != [rank] else None)
        axes.set_xlabel("training step")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.legend(loc="best")
    return svg(figure)


@styled
def forest(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Paired differences with their intervals, one line each, around zero; ahead is to the right."""
    figure = blank(7.6, 0.9 + 0.27 * len(rows))
    axes = figure.subplots()
    limit = 0.0
    for y, r in enumerate(rows):
        value, low, high = tables.advantage(r)
        colour = ORANGE if r["versus_role"] == verdict.TWIN else INK
        axes.plot([low, high], [y, y], color=colour, lw=1.8, solid_capstyle="round")
        axes.plot(value, y, "o", color=colour, ms=5)
        limit = max(limit, abs(low), abs(high))
    axes.axvline(0, color=MUTED, lw=0.8)
    limit = 1.08 * limit or 0.05
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    names = [f"{r['track']}: " * bool(r["track"]) + f"{tables.describe(r)}  −  {r['versus']}" for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_xlabel("← behind      ahead →")
    return svg(figure)


@styled
def confusion(panels: Sequence[Mapping[str, Any]]) -> bytes:
    """Row-normalised confusion matrices of one model, side by side by held-out group."""
    names = panels[0]["labels"]
    size = max(2.6, 0.36 * len(names) + 0.4)
    ticks = 0.08 * max(map(len, names))  # inches of the longest name
    figure = blank(min(11.0, size * len(panels) + ticks + 0.5), min(9.0, size + ticks + 0.8))
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        counts = np.asarray(panel["counts"], float)
        support = counts.sum(1, keepdims=True)
        share = np.divide(counts, support, out=np.full_like(counts, np.nan), where=support > 0)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        small = {"ha": "center", "va": "center", "fontsize": 7}
        if len(names) <= 16:
            for i, j in zip(*np.nonzero(np.nan_to_num(share) >= 0.005), strict=True):
                axes.text(
                    j, i, f"{100 * share[i, j]:.0f}", color="white" if share[i, j] > 0.6 else INK, **small
                )
        for i in np.flatnonzero(support[:, 0] == 0):
            axes.text((len(names) - 1) / 2, i, "no cells here", color=MUTED, **small)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"held out: {panel['group']}", loc="left")
        axes.set_xlabel("predicted")
    figure.axes[0].set_ylabel("true")
    return svg(figure)


@styled
def per_class(frame: pd.DataFrame, shown: Sequence[tuple[str, str]]) -> bytes:
    """F1 of each class, mean over held-out groups that have it, of a few representations in one task."""
    rows = frame[frame["metric"].eq("f1") & frame["head"].eq("logistic")]
    first = rows[rows["model_id"] == shown[0][0]]
    support = first.groupby("label")["n_cells"].sum().sort_values(ascending=False)
    figure = blank(7.6, 1.0 + 0.27 * len(support))
    axes = figure.subplots()
    drawn_as = looks(shown)
    for model, kind in shown:
        value = rows[rows["model_id"] == model].groupby("label")["value"].mean().reindex(support.index)
        filled = kind == "model"
        colour = drawn_as[model]["color"]
        look: dict[str, Any] = (
            {"ms": 6.5, "mfc": colour, "zorder": 4} if filled else {"ms": 6, "mfc": "white", "zorder": 3}
        )
        axes.plot(value, range(len(support)), "o", color=colour, mew=1.3, label=model, **look)
    axes.set_yticks(range(len(support)), [f"{name}  ({n:,})" for name, n in support.items()])
    axes.set_ylim(len(support) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("F1, logistic regression, mean over held-out groups")
    axes.tick_params(axis="y", length=0)
    axes.grid(color=RULE, lw=0.6)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown))
    return svg(figure)


@styled
def bio_and_batch(frame: pd.DataFrame) -> bytes:
    """Bio conservation against batch mixing; the good corner is the upper right."""
    rows = frame[frame["task"].eq("integration") & frame["versus"].eq("") & frame["status"].eq("ok")]
    table = rows[rows["metric"].isin(("bio", "batch"))].pivot(
        index=["model_id", "model_kind"], columns="metric", values=["value", "ci_low", "ci_high"]
    )
    figure = blank(5.6, 4.4)
    axes = figure.subplots()
    spots = []
    for (model, kind), r in table.iterrows():
        x, y, colour = float(r["value", "batch"]), float(r["value", "bio"]), colour_of(model, kind)
        if pd.notna(r["ci_low", "bio"]):
            axes.plot([r["ci_low", "batch"], r["ci_high", "batch"]], [y, y], color=colour, lw=1)
            axes.plot([x, x], [r["ci_low", "bio"], r["ci_high", "bio"]], color=colour, lw=1)
        axes.plot(x, y, marker="D" if kind == "oracle" else "o", color=colour, ms=8 if kind == "model" else 6)
        spots.append((x, y, model, colour, kind))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.05)
    _label_points(axes, spots)
    axes.set_xlabel("batch mixing →")
    axes.set_ylabel("bio conservation →")
    axes.grid(color=RULE, lw=0.6)
    return svg(figure)


def _label_points(axes: Axes, spots: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Names beside points, moved up or down until they do not overlap."""
    taken: list[tuple[float, float, float, float]] = []
    for x, y, name, colour, kind in sorted(spots, key=lambda s: s[4] != "model"):
        width, left = 0.022 * len(name), x > 0.7
        start = x - 0.025 - width if left else x + 0.025
        for shift in (0, 0.05, -0.05, 0.1, -0.1, 0.15, -0.15):
            box = (start, y + shift - 0.022, start + width, y + shift + 0.022)
            if all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
                break
        taken.append(box)
        weight = "bold" if kind == "model" else "normal"
        anchor, side = (start + width, "right") if left else (start, "left")
        axes.text(
            anchor, y + shift, name, color=colour, va="center", ha=side, fontsize=8.5, fontweight=weight
        )


@styled
def maps(panels: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> bytes:
    """UMAP of each representation (rows) coloured by label and by batch (columns)."""
    by = [c for c in ("label", "batch") if c in colours]
    figure = blank(4.3 * len(by), 3.3 * len(panels))
    grid = figure.subplots(len(panels), len(by), squeeze=False)
    order = np.random.default_rng(0).permutation(
        len(panels[0]["xy"])
    )  # so that no category covers the others
    for line, panel in zip(grid, panels, strict=True):
        xy = np.asarray(panel["xy"])[order]
        for axes, side in zip(line, by, strict=True):
            codes = np.asarray(colours[side]["codes"])[order]
            colour = np.array([PALETTE[c % len(PALETTE)] for c in codes])
            axes.scatter(xy[:, 0], xy[:, 1], c=colour, s=2.2, lw=0, rasterized=True)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(f"{panel['model_id']}, by {colours[side]['key']}")
    return svg(figure)


def legend(colours: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each way the maps are coloured: its column, and the colour of each name (they repeat after 20)."""
    return [
        (side["key"], [(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(side["names"])])
        for key in ("label", "batch")
        if (side := colours.get(key))
    ]

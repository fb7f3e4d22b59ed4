"""The page of one or several runs: how they stand, their curves, where their time went, how they differ."""

from __future__ import annotations

import base64
import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scjax import __version__
from scjax.cli import runs
from scjax.cli.shared import write_whole
from scjax.eval.environment import missing
from scjax.eval.figures import INK, PALETTE, RULE, blank, styled, svg
from scjax.eval.pictures import BASELINES

POINTS = 1000  # of a curve; of more, neighbours are averaged
NOTHING = {error: least for error, (least, _) in BASELINES.items()}  # error -> that of knowing nothing
APART = ("grad_norm", "learning_rate", "skipped", "skipped_total")  # of train/: shown as optimisation
SPENT = {"step": "steps", "input_wait": "waiting for input", "checkpoint": "saving", "evaluate": "judging"}
NAMES = {
    "grad_norm": "gradient norm",
    "skipped_total": "skipped steps",
    "cells_per_second": "cells a second",
    "tokens_per_second": "tokens a second",
    "flops_per_second": "operations a second",
    "mfu": "MFU",
    "logistic_macro_f1": "logistic regression, macro-F1",
    "knn_macro_f1": "nearest neighbours, macro-F1",
}
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, Curve]  # by the name of a metric


def write(paths: Sequence[Path], page: Path) -> Path:
    """Writes the page of the runs in some directories; returns where.

    Raises:
      FileNotFoundError: there is no run.
      ImportError: matplotlib or jinja2 is not installed.
    """
    if reason := missing("jinja2", "matplotlib"):
        raise ImportError(f"a page of runs needs jinja2 and matplotlib, {reason}")
    import jinja2

    states = [runs.read_state(path) for path in paths]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["address"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    text = environment.get_template("run_page.html.j2").render(**contents(states))
    write_whole(lambda partial: partial.write_text(text, encoding="utf-8"), str(page))
    return page


def contents(states: Sequence[runs.RunState]) -> dict[str, Any]:
    """What the page says."""
    names = _names([state.path for state in states])
    read = [curves(runs.read_metrics(state.path / "metrics.jsonl")) for state in states]
    configs = [runs.read_object(state.path / "config.json") for state in states]
    models = [runs.read_object(state.path / "model.json") for state in states]
    has = [column for column in runs.COLUMNS if any(runs.shown(state.last, column) for state in states)]
    return {
        "columns": has,
        "title": f"Run {names[0]}" if len(names) == 1 else f"{len(names)} runs",
        "runs": [
            _about(name, colour, state, model, of)
            for name, colour, state, model, of in zip(names, PALETTE * 9, states, models, read, strict=False)
        ],
        "pictures": _pictures(dict(zip(names, read, strict=True))),
        "differences": _differences(configs) if len(configs) > 1 else [],
        "config": sorted(_flat(configs[0]).items()) if len(configs) == 1 else [],
        "made": f"scjax {__version__}, {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise ValueError("a run is named twice")
    above = Path(os.path.commonpath(whole))
    return [whole[0].name] if len(whole) == 1 else [str(path.relative_to(above)) for path in whole]


def _about(
    name: str, colour: str, state: runs.RunState, model: Mapping[str, Any], of: Curves
) -> dict[str, Any]:
    status, spent = (
        state.status,
        {what: of[f"time/{what}"][1].sum() for what in SPENT if f"time/{what}" in of},
    )
    whole = sum(spent.values()) or 1.0
    return {
        "name": name,
        "colour": colour,
        "state": state.state or "unknown",
        "system": model.get("system", ""),
        "step": state.step,
        "steps": status.get("steps"),
        "error": status.get("error"),
        "last": {column: runs.shown(state.last, column) for column in runs.COLUMNS},
        "spent": {SPENT[what]: f"{seconds / whole:.1%}" for what, seconds in spent.items()},
        "facts": {
            "directory": str(state.path),
            "corpus": model.get("corpus"),
            "devices": status.get("devices"),
            "processes": status.get("processes"),
            "host": status.get("host"),
            "began": status.get("began"),
            "last heard of": status.get("updated"),
            "starts": status.get("starts"),
            **_start(state.path / "environment.json"),
        },
    }


def _start(file: Path) -> dict[str, str]:
    """What the run was started with last (:mod:`scjax.launch.capture`); {} where nobody wrote it down."""
    starts = runs.read_json(file)
    if not isinstance(starts, list) or not starts:
        return {}
    about = starts[-1]
    versions = {"Python": about.get("python"), **about.get("versions", {})}
    facts = {
        "command": shlex.join(about.get("command", [])),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if git := (about.get("git") or {}).get("scjax"):
        changed = f", {len(git['changed'])} files changed since" if git["changed"] else ""
        facts["commit"] = f"{git['commit']}{changed}"
    return facts


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = str(value)
    return out


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Field -> its value in each run, of the fields that all have, where they are not all the same."""
    flat = [_flat(config) for config in configs]
    fields = sorted(set.intersection(*map(set, flat)))
    values = {name: [config[name] for config in flat] for name in fields}
    return [(name, of) for name, of in values.items() if len(set(of)) > 1]


# --------------------------------------------------------------------------------- pictures
def curves(lines: Sequence[Mapping[str, Any]]) -> Curves:
    """The curve of each metric; what is not a finite number has no point."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and "step" in line:
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return {name: (np.array(steps), np.array(values, float)) for name, (steps, values) in found.items()}


def _thin(curve: Curve) -> Curve:
    block = -(-len(curve[0]) // POINTS)
    starts = np.arange(0, len(curve[0]), block)
    sizes = np.diff(np.append(starts, len(curve[0])))
    steps, values = (np.add.reduceat(axis.astype(float), starts) / sizes for axis in curve)
    return steps, values


def _pictures(read: Mapping[str, Curves]) -> list[tuple[str, bytes, str]]:
    """(heading, picture, caption) of all that the runs have."""
    known = dict.fromkeys(name for of in read.values() for name in of)

    def of_kind(kind: str) -> list[str]:
        return [name.removeprefix(kind) for name in known if name.startswith(kind)]

    least = {NOTHING[error] for error in NOTHING if {f"train/{error}", f"validation/{error}"} & set(known)}
    left_out = {*APART, *least, "masked_gap"}
    losses = [m for m in dict.fromkeys(of_kind("train/") + of_kind("validation/")) if m not in left_out]
    losses.sort(key=lambda metric: metric != "loss")
    drawn = [
        (
            "Losses",
            losses,
            ("train/", "validation/"),
            "Thin: training; with dots: validation" + "; dashed: knowing nothing of the cell" * bool(least),
        ),
        ("Probes", of_kind("probe/"), ("probe/",), "Read off the frozen embedding of validation cells."),
        ("Optimisation", [m for m in APART if m != "skipped"], ("train/",), ""),
        ("Pace", of_kind("throughput/"), ("throughput/",), ""),
    ]
    pictures = []
    for heading, metrics, kinds, caption in drawn:
        metrics = [m for m in metrics if any(kind + m in known for kind in kinds)]
        if metrics:
            pictures.append((heading, _grid(read, metrics, kinds), caption))
    if len(read) == 1 and any(name.startswith("time/") for name in known):
        caption = "Each interval of the log is a column: steps, and what kept the devices from them."
        pictures.append(("Where the time went", _spent(next(iter(read.values()))), caption))
    return pictures


@styled
def _grid(read: Mapping[str, Curves], metrics: Sequence[str], kinds: Sequence[str]) -> bytes:
    """A small picture a metric, a colour a run."""
    from matplotlib.ticker import EngFormatter

    across = min(3, len(metrics))
    down = -(-len(metrics) // across)
    figure = blank(3.45 * across if across > 1 else 6.0, 2.5 * down)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(down, across, i + 1)
        ends = []  # lowest and highest of each curve; of a loss without how it began and rare jumps
        for colour, of in zip(PALETTE * 9, read.values(), strict=False):
            for kind in kinds:
                if kind + metric not in of:
                    continue
                steps, values = _thin(of[kind + metric])
                loss = "validation/" in kinds
                ends.append(np.quantile(values[_begun(len(values)) :], [0, 0.98]) if loss else values)
                dots = kind in ("validation/", "probe/")
                look = (
                    {"marker": "o", "ms": 3, "lw": 1.4, "zorder": 3} if dots else {"lw": 0.8, "alpha": 0.75}
                )
                axes.plot(steps, values, color=colour, **look)
            nothing = [kind + NOTHING[metric] for kind in reversed(kinds) if metric in NOTHING]
            if found := next((name for name in nothing if name in of), None):
                axes.plot(*_thin(of[found]), color=INK, lw=0.9, ls=(0, (4, 3)))
                ends.append(np.quantile(of[found][1], [0, 0.98]))
        low, high = min(map(np.min, ends)), max(map(np.max, ends))
        if metric == "grad_norm" and low > 0:
            axes.set_yscale("log")
        elif low >= 0 and high > 0:
            axes.set_ylim(0, 1.1 * high)
        if high >= 1e4:
            axes.yaxis.set_major_formatter(EngFormatter())
        axes.set_title(NAMES.get(metric, metric.replace("_", " ")))
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.ticklabel_format(axis="x", scilimits=(-3, 6))
        if i + across >= len(metrics):
            axes.set_xlabel("step")
    return svg(figure)


def _begun(n: int) -> int:
    """How many of the first points of a curve are how it began."""
    return min(max(1, n // 10), n - 1)


@styled
def _spent(of: Curves) -> bytes:
    """Shares of each interval."""
    steps = _thin(of["time/step"])[0]
    seconds = []
    for what in SPENT:  # an interval in which something was not done has no value of it
        at, values = of.get(f"time/{what}", (np.empty(0), np.empty(0)))
        dense = np.zeros(len(of["time/step"][0]))
        dense[np.searchsorted(of["time/step"][0], at)] = values
        seconds.append(_thin((of["time/step"][0], dense))[1])
    share = np.array(seconds) / np.maximum(np.sum(seconds, 0), 1e-9)
    steps, share = np.append(0, steps), np.append(share[:, :1], share, 1)  # a column ends at its step
    figure = blank(7.6, 2.4)
    axes = figure.subplots()
    colours = ("#b9c9dc", PALETTE[3], PALETTE[1], PALETTE[4])
    axes.stackplot(steps, 100 * share, colors=colours, labels=SPENT.values(), step="pre", lw=0)
    axes.set(ylim=(0, 100), xlim=(0, steps[-1]))
    axes.set_ylabel("% of the time")
    axes.set_xlabel("step")
    figure.legend(loc="outside upper center", ncols=len(SPENT))
    return svg(figure)

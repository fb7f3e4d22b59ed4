"""``scjax runs``: what runs there are, how they stand, and their curves. Starts without JAX."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scjax.cli.shared import escape, out

DEPTH = 4  # folders below the one that is asked for
TAIL = 2**16  # bytes of metrics.jsonl that hold the last value of each metric
SILENT = 3600.0  # seconds without a word, after which a run on another machine is not called running
WIDE = 200  # columns, where nobody's terminal sets a limit
COLUMNS = {
    "loss": ("train/loss", "{:.4f}"),
    "validation": ("validation/loss", "{:.4f}"),
    "cells/s": ("throughput/cells_per_second", "{:,.0f}"),
    "MFU": ("throughput/mfu", "{:.1%}"),
    "goodput": ("throughput/goodput", "{:.1%}"),
}
STYLES = {"running": "green", "finished": "bold", "preempted": "yellow", "silent": "yellow"}


@dataclasses.dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
      path: its directory.
      status: content of ``status.json`` (see :mod:`scjax.train.status`); {} where there is none.
      last: the last value of each metric, and "step".
    """

    path: Path
    status: dict[str, Any]
    last: dict[str, float]

    @property
    def state(self) -> str:
        """As its status says, but for a run that says "running": "killed" where its process is gone from this
        machine, "silent" where it is another's and has not been heard of for an hour. "" where unknown."""
        told = str(self.status.get("state", ""))
        if told != "running":
            return told
        if self.status.get("host") == socket.gethostname():
            return "running" if _alive(self.status.get("pid", 0), self.updated) else "killed"
        return "running" if time.time() - self.updated < SILENT else "silent"

    @property
    def step(self) -> int:
        return int(max(self.status.get("step", 0), self.last.get("step", 0)))

    @property
    def updated(self) -> float:
        """When it was last heard of, in seconds since 1970."""
        with suppress(KeyError, ValueError, TypeError):
            return datetime.datetime.fromisoformat(self.status["updated"]).timestamp()
        with suppress(OSError):
            return (self.path / "metrics.jsonl").stat().st_mtime
        return 0.0


def read_state(path: str | Path) -> RunState:
    """How the run in a directory stands.

    Raises:
      FileNotFoundError: there is no run, or one that has not begun.
    """
    path = Path(path)
    if not is_run(path):
        raise FileNotFoundError(f"{path} is not the directory of a run that has begun: it has no metrics")
    last: dict[str, float] = {}
    for line in _lines(path / "metrics.jsonl", TAIL):
        last |= {name: value for name, value in line.items() if value is not None}
    return RunState(path, read_object(path / "status.json"), last)


def is_run(path: Path) -> bool:
    return (path / "model.json").is_file() and any(
        (path / name).is_file() for name in ("status.json", "metrics.jsonl")
    )


def find_runs(directory: Path) -> Iterator[Path]:
    """The runs in a directory and in the folders below it, in alphabetical order."""
    if is_run(directory):
        yield directory
        return
    floor = len(directory.parts) + DEPTH
    for folder, names, _ in os.walk(directory):
        here = Path(folder)
        if is_run(here):
            yield here
        inside = is_run(here) or len(here.parts) >= floor or (here / "manifests").is_dir()  # a corpus
        names[:] = [] if inside else sorted(name for name in names if not name.startswith("."))


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none, or none that is whole."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object; {} where there is none."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, all of them; [] where there is none."""
    return list(_lines(path, None))


def _lines(path: Path, tail: int | None) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that is perhaps being written, or of its last bytes."""
    with suppress(OSError), path.open("rb") as file:
        if tail is not None and path.stat().st_size > tail:
            file.seek(-tail, os.SEEK_END)
            file.readline()
        for line in file:
            with suppress(ValueError):
                yield json.loads(line)


def _alive(pid: int, updated: float) -> bool:
    """Whether a process of this machine is there, and not another that has got its number since."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError, ValueError, StopIteration):  # not on Linux: believe the number
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") <= updated + 2
    return True


# -------------------------------------------------------------------------------- commands
def list_(args: argparse.Namespace) -> int:
    directory = Path(args.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; runs are in the folders given as --workdir")
    states = [read_state(path) for path in find_runs(directory)]
    if not states:
        raise FileNotFoundError(f"no runs in {directory}, {DEPTH} folders deep")
    table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("step", *COLUMNS, "updated"):
        table.add_column(heading, justify="right", no_wrap=True)
    for state in states:
        name = str(state.path.relative_to(directory)) if state.path != directory else state.path.name
        style = STYLES.get(state.state, "red")
        steps = state.status.get("steps")
        table.add_row(
            escape(name),
            f"[{style}]{state.state}[/]" if state.state else "",
            f"{state.step:,}" + (f"/{steps:,}" if steps else ""),
            *(shown(state.last, column) for column in COLUMNS),
            _ago(time.time() - state.updated),
        )
    (out if out.is_terminal else Console(width=WIDE)).print(table)
    for state in states:
        if state.state == "failed":
            out.print(
                f"{state.path}: {state.status.get('error')}", highlight=False, markup=False, soft_wrap=True
            )
    return 0


def shown(last: dict[str, float], column: str) -> str:
    """The last value of what a column of ``COLUMNS`` shows; "" where a run has none."""
    metric, form = COLUMNS[column]
    return form.format(last[metric]) if metric in last else ""


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def report(args: argparse.Namespace) -> int:
    from scjax.cli.run_page import write

    if args.out is None and len(args.runs) > 1:
        raise ValueError("of several runs, a page needs a name: --out FILE.html")
    path = write([Path(run) for run in args.runs], Path(args.out or Path(args.runs[0]) / "run.html"))
    out.print(f"report: {path}", highlight=False, soft_wrap=True)
    return 0


def add_commands(commands: Any) -> None:
    """Adds ``runs`` and ``runs report`` to the commands of ``scjax``."""
    command = commands.add_parser(
        "runs", help="list runs with state and last metrics", epilog="further: scjax runs report -h"
    )
    command.set_defaults(run=list_)
    command.add_argument("directory", metavar="DIR", nargs="?", default="runs", help="default: runs")

    command = commands.add_parser("runs report", help="a page with the curves of one or several runs")
    command.set_defaults(run=report)
    command.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    command.add_argument("--out", metavar="FILE.html", help="default: run.html in the run's directory")

"""A progress bar for work counted in cells."""

from __future__ import annotations

from typing import Any

import rich.console
import rich.progress
import rich.text


def counted(n: int, what: str) -> str:
    """ "1 part", "2 parts"."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


class _Speed(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> rich.text.Text:
        speed = task.finished_speed or task.speed
        shown = "" if speed is None else f"{speed:,.0f} cells/s"
        return rich.text.Text(shown, style="progress.data.speed", no_wrap=True)


def cell_progress(shown: bool) -> rich.progress.Progress:
    """What is being done, a bar, cells done and in all, cells/s, time left; on stderr."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f} cells"),
        _Speed(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        disable=not shown,
    )


class BuildProgress:
    """The bar of a build: what is being read or written, by whomever."""

    def __init__(self, bar: rich.progress.Progress, job: Any) -> None:
        self._bar, self._job = bar, job
        self._active: dict[tuple[str, int], int] = {}
        self._rows: dict[str, rich.progress.TaskID] = {}
        self._parts = len(job.last_tasks())

    def stage(self, word: str, total: int, completed: int) -> None:
        """A new line: "reading" or "writing", with the cells there are and those done by earlier runs."""
        self._rows[word] = self._bar.add_task(word, total=total, completed=completed)
        self._active.clear()

    def __call__(self, task: tuple[str, int], cells: int | None) -> None:
        """See ``executors.Report``."""
        word = "writing" if task[0] == "part" else "reading"
        if cells is None:
            self._active.pop(task, None)
        else:
            self._active[task] = self._active.get(task, 0) + cells
        if not self._active:
            what = (
                counted(self._parts, "part")
                if task[0] == "part"
                else counted(len(self._job.studies), "source")
            )
        elif task[0] == "part":
            numbers = sorted(number + 1 for _, number in self._active)
            what = f"part {', '.join(map(str, numbers[:3]))} of {self._parts}"
        else:
            names = sorted({self._job.doing(each) for each in self._active})
            what = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        row = self._rows.get(word)
        if row is not None:
            self._bar.update(row, description=f"{word} {what}"[:60])
            self._bar.advance(row, cells or 0)

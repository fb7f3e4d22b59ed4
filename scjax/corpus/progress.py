"""A progress bar for work counted in cells."""

from __future__ import annotations

import rich.console
import rich.progress
import rich.text


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

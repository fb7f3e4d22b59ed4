"""How far a run is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class RunProgress:
    """Shows step, cells a second, time left and loss. Only process 0 shows anything.

    Args:
      steps: of the whole run.
      step: done already.
      console: where to show; the terminal by default.
    """

    def __init__(self, steps: int, step: int = 0, console: Console | None = None):
        self.steps = steps
        self._console = console or Console(quiet=jax.process_index() != 0)
        self._last = (step, time.monotonic())
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("", total=steps, completed=step, rate="", loss="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar; costs next to nothing."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, loss: float, cells_per_second: float | None) -> None:
        """Shows the newest loss and speed; on anything but a terminal, prints one line."""
        rate = "" if cells_per_second is None else f"{cells_per_second:,.0f} cells/s"
        self._bar.update(self._task, completed=step, rate=rate, loss=f"loss {loss:.4f}")
        if not self._console.is_terminal:
            (before, then), self._last = self._last, (step, time.monotonic())
            left = (self._last[1] - then) / max(step - before, 1) * (self.steps - step)
            minutes, seconds = divmod(round(left), 60)
            parts = [f"step {step}/{self.steps}", f"loss {loss:.4f}", rate, f"{minutes}:{seconds:02d} left"]
            self.say("  ".join(part for part in parts if part))

    def say(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

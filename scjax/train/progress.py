"""How far a run is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

RATES = {"throughput/cells_per_second": "cells/s", "throughput/tokens_per_second": "tokens/s"}


class RunProgress:
    """Shows step, cells and tokens a second, MFU, time left and loss. Only process 0 shows anything.

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

    def show(self, step: int, means: Mapping[str, float]) -> None:
        """Shows the newest loss and pace of :meth:`scjax.train.Meter.mean`; on anything but a terminal, as a
        line."""
        told = [f"{means[name]:,.0f} {unit}" for name, unit in RATES.items() if name in means]
        if "throughput/mfu" in means:
            told.append(f"MFU {means['throughput/mfu']:.1%}")
        elif "throughput/flops_per_second" in means:
            told.append(f"{means['throughput/flops_per_second'] / 1e9:,.1f} GFLOP/s")
        if means.get("train/skipped_total"):
            told.append(f"{means['train/skipped_total']:.0f} skipped")
        rate, loss = "  ".join(told), f"loss {means.get('train/loss', math.nan):.4f}"
        self._bar.update(self._task, completed=step, rate=rate, loss=loss)
        if not self._console.is_terminal:
            (before, then), self._last = self._last, (step, time.monotonic())
            left = (self._last[1] - then) / max(step - before, 1) * (self.steps - step)
            minutes, seconds = divmod(round(left), 60)
            parts = [f"step {step}/{self.steps}", loss, rate, f"{minutes}:{seconds:02d} left"]
            self.say("  ".join(part for part in parts if part))

    def say(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

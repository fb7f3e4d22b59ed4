"""A few steps as the profiler sees them."""

from __future__ import annotations

import pathlib

import jax

from scjax.train.step import Metrics


class Profile:
    """Writes a profile of a few steps of process 0 into ``profile/`` of a run.

    ``tensorboard --logdir RUN/profile`` shows it where xprof is installed; Perfetto (ui.perfetto.dev) opens
    the ``.trace.json.gz`` in it. A run that goes on beyond these steps writes none: give later ones.
    """

    def __init__(self, directory: str | pathlib.Path, steps: tuple[int, int] | None, step: int):
        """Args:
        directory: the run directory.
        steps: the first step, from 1, and how many (``train.profile``); None for no profile.
        step: done already.
        """
        self._directory = pathlib.Path(directory) / "profile"
        first, number = steps or (0, 0)
        self._before, self._last = first - 1, first - 1 + number
        self._on = False
        self._begin(step)

    def _begin(self, step: int) -> None:
        if step == self._before and jax.process_index() == 0:
            jax.profiler.start_trace(self._directory)
            self._on = True

    def after(self, step: int, metrics: Metrics) -> None:
        """``step`` has been given to the devices; waits for it at both ends of the profile."""
        if step == self._before:
            jax.block_until_ready(metrics)
            self._begin(step)
        elif self._on and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what there is of a profile that has begun."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False

"""Metrics: read from the device a step late, averaged over an interval, written as JSON lines.

Names are paths: ``train/loss``, ``validation/masked_mse``, ``throughput/cells_per_second``.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from scjax.train.step import Metrics


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is NaN or infinite."""


class Meter:
    """Means of (sum, weight) metrics over the steps since the last :meth:`mean`.

    The metrics of a step are read when the next step has been given to the device, so that reading them
    never makes the device wait. Every step is checked: a non-finite loss or gradient raises at the
    latest when its mean is asked for, so whoever calls :meth:`mean` before saving saves no state that a
    bad step has touched.

    Attributes:
      cells_per_second: over the interval that the last :meth:`mean` closed, the step that compiled left
        out; None before there is one.
    """

    def __init__(self) -> None:
        self.cells_per_second: float | None = None
        self._pending: tuple[int, Metrics] | None = None
        self._totals: dict[str, list[float]] = {}
        self._clock: float | None = None
        self._timed_cells = 0.0

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of ``step`` and reads those of the step before.

        Raises:
          NonFiniteLoss: the step before has a non-finite loss or gradient.
        """
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
        self._read()
        self._pending = (step, metrics)
        if self._clock is None:  # the first step compiles: neither its time nor its cells count
            self._clock = time.perf_counter()
            self._timed_cells = -float(metrics["cells"][0])

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()}
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values.get(name, (0.0,))[0])]
        if bad:
            told = ", ".join(f"{name.replace('_', ' ')} {values[name][0]}" for name in bad)
            raise NonFiniteLoss(
                f"step {step}: {told}. Nothing from this step on is saved: the last checkpoint is good. A "
                "lower optimizer.learning_rate, a longer warm-up or a smaller clip_norm may help"
            )
        for name, (total, weight) in values.items():
            sums = self._totals.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += weight
        self._timed_cells += values["cells"][0]

    def mean(self, prefix: str) -> dict[str, float]:
        """``{"<prefix>/<name>": mean}``, and starts a new interval. A metric without weight is left out.

        Raises:
          NonFiniteLoss: the last step has a non-finite loss or gradient.
        """
        self._read()
        means = {
            f"{prefix}/{name}": total / weight for name, (total, weight) in self._totals.items() if weight
        }
        means.pop(f"{prefix}/cells", None)
        if self._clock is not None and self._timed_cells > 0:
            self.cells_per_second = self._timed_cells / (time.perf_counter() - self._clock)
        self._totals = {}
        self.restart_clock()
        return means

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done since :meth:`mean`, such as validation."""
        self._clock, self._timed_cells = time.perf_counter(), 0.0


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    lines = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard files of a run. Only process 0 writes.

    Args:
      directory: the run directory.
      step: the step that the run starts from; lines beyond it, written by a run that went on after its
        last checkpoint and was then killed, are dropped, so that the file becomes that of a run which
        was never interrupted.
    """

    def __init__(self, directory: str | pathlib.Path, step: int = 0):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        self._file = self._tensorboard = None
        if jax.process_index() != 0:
            return
        if self.path.exists():
            kept = "".join(
                json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= step
            )
            partial = self.path.with_name(".metrics.jsonl.partial")
            partial.write_text(kept)
            os.replace(partial, self.path)
        self._file = self.path.open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            print("tensorboardX is not installed: metrics.jsonl only, no TensorBoard files", flush=True)
        else:
            self._tensorboard = SummaryWriter(
                str(pathlib.Path(directory) / "tensorboard"), purge_step=step + 1
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line ``{"step": step, name: value, ...}``; a non-finite value becomes null."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self.path)) from error
        if self._tensorboard is not None:
            for name, value in finite.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

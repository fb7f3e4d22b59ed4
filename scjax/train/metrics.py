"""Metrics: read from the device a step late, averaged over an interval, written as JSON lines.

Names are paths: ``train/loss``, ``validation/masked_mse``. All that depends on the clock is called
``time/…`` (seconds of the interval) or ``throughput/…``; see :meth:`Meter.mean`.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from scjax.config import ConfigError
from scjax.parallel.hardware import device_of
from scjax.train.step import WORK, Metrics

TOLD = 8  # skipped steps that an error names


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is NaN or infinite."""


class TooManySkipped(FloatingPointError):
    """So many bad steps were skipped that something must be wrong: the data, or a step before them, whose
    loss was good, and after which the model was not."""


class Meter:
    """Means of (sum, weight) metrics over the steps since the last :meth:`mean`, and how fast they went.

    The metrics of a step are read when the next step has been given to the device, so that reading them
    never makes the device wait. Every step is checked: a non-finite loss or gradient raises at the
    latest when its mean is asked for, so whoever calls :meth:`mean` before saving saves no state that a
    bad step has touched. Steps that :mod:`scjax.train.guard` skipped are counted.

    Attributes:
      skipping: whether the step read last was skipped.
    """

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        began: float | None = None,
        productive: float = 0.0,
        totals: Mapping[str, Sequence[float]] | None = None,
    ):
        """Args:
        mesh: the devices of a run, whose pace is then told; None for means only.
        began: when the run began, for its goodput (``Status.began``).
        productive: seconds that it has spent on steps since, as far as they are kept
          (``MetricsLog.productive``).
        totals: :meth:`totals` of the run that this one goes on with.
        """
        self.skipping = False
        self._pending: tuple[int, Metrics] | None = None
        self._totals: dict[str, list[float]] = {name: list(sums) for name, sums in (totals or {}).items()}
        self._skipped: collections.deque[str] = collections.deque(maxlen=TOLD)
        self._mesh, self._productive = mesh, productive
        self._began = time.time() if began is None else began
        self._first: int | None = None  # step
        self._start_interval()

    def _start_interval(self) -> None:
        self._clock = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._work = dict.fromkeys(WORK, 0.0)

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Counts what is done inside as ``time/<what>``, not as time of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - began

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of ``step`` and reads those of the step before.

        Raises:
          NonFiniteLoss: the step before has a non-finite loss or gradient.
          TooManySkipped: the step before was skipped, and fills the limit.
        """
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
        self._read()
        self._pending = (step, metrics)
        if self._first is None:  # it may have been compiled: neither its time nor its cells count
            self._first = step
            jax.block_until_ready(metrics)
            self._start_interval()

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()}
        work = {name: values.pop(name, (0.0, 0.0))[0] for name in WORK}
        if step != self._first:
            self._work = {name: self._work[name] + work[name] for name in WORK}
        skipped_loss, skipped_norm = (values.pop(f"skipped_{of}", (0.0, 0.0)) for of in ("loss", "grad_norm"))
        self.skipping = values.get("skipped", (0.0,))[0] > 0
        if self.skipping:
            self._skipped.append(f"{step} (loss {skipped_loss[0]:.4g}, grad norm {skipped_norm[0]:.4g})")
        if values.pop("guard_full", (0.0,))[0]:
            raise TooManySkipped(
                f"{values['skipped_total'][0]:.0f} bad steps have been skipped, the last of them: step "
                f"{', '.join(self._skipped)}. None of them changed anything, and no checkpoint was "
                "written right after one. Go on from the last one with a lower optimizer.learning_rate, or "
                "look at the data; train.guard.limit says how many are borne"
            )
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values.get(name, (0.0,))[0])]
        if bad:
            told = ", ".join(f"{name.replace('_', ' ')} {values[name][0]}" for name in bad)
            raise NonFiniteLoss(
                f"step {step}: {told}. Nothing from this step on is saved; checkpoints are from before. A "
                "lower optimizer.learning_rate, a longer warm-up or a smaller clip_norm may help"
            )
        for name, (total, weight) in values.items():
            sums = self._totals.setdefault(name, [0.0, 0.0])
            if name == "skipped_total":
                sums[:] = 0.0, 0.0  # the latest is what counts
            sums[0] += total
            sums[1] += weight

    def totals(self) -> dict[str, list[float]]:
        """Sum and weight of each metric over the steps since the last :meth:`mean`: what a run that leaves in
        the middle of an interval goes on with.

        Raises:
          NonFiniteLoss, TooManySkipped: of the last step, as in :meth:`add`.
        """
        self._read()
        return self._totals

    def mean(self, prefix: str) -> dict[str, float]:
        """``{"<prefix>/<name>": mean}``, and starts a new interval. A metric without weight is left out.

        ``<prefix>/skipped`` is not a mean but the number of steps skipped in the interval,
        ``<prefix>/skipped_total`` that since step 0.

        A meter with a mesh adds the pace. Seconds of the interval, which is since the last mean, so that they
        add up to all of it but for the first step, which compiles: ``time/<what>`` as it was timed, and
        ``time/step``, the rest: the devices at work, or waited for. Over steps and their input:
        ``throughput/cells_per_second``, ``throughput/tokens_per_second``, ``throughput/flops_per_second``
        (operations that the model is worth, see :mod:`scjax.nn.work`, of all devices) and, where the peak of
        the devices is known, ``throughput/mfu``, the share of their peak in bfloat16. Since the run began:
        ``throughput/goodput``, the share of the time that was spent on steps of which the run still has what
        they learned; starting, compiling, saving, judging and what a stop lost are not.

        Raises:
          NonFiniteLoss, TooManySkipped: of the last step, as in :meth:`add`.
        """
        self._read()
        counts = {name: totals[0] for name, totals in self._totals.items() if name == "skipped"}
        means = {
            f"{prefix}/{name}": counts.get(name, total / weight)
            for name, (total, weight) in self._totals.items()
            if weight
        }
        self._totals = {}
        if self._mesh is not None and self._first is not None:
            means |= self._pace(self._mesh)
            self._start_interval()
        return means

    def _pace(self, mesh: Mesh) -> dict[str, float]:
        """Of the interval that ends now."""
        step = time.perf_counter() - self._clock - sum(self._spent.values())
        self._productive += step
        pace = {f"time/{what}": seconds for what, seconds in self._spent.items()} | {"time/step": step}
        busy = step + self._spent.get("input_wait", 0.0)
        for what, name in (("cells", "cells"), ("tokens", "tokens"), ("operations", "flops")):
            if self._work[what]:
                pace[f"throughput/{name}_per_second"] = self._work[what] / busy
        peak = device_of(mesh.devices.flat[0].device_kind).peak_bf16
        if peak is not None and self._work["operations"]:
            pace["throughput/mfu"] = self._work["operations"] / busy / (mesh.size * peak)
        pace["throughput/goodput"] = self._productive / max(time.time() - self._began, self._productive)
        return pace


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
    """``metrics.jsonl``, TensorBoard files and, on request, Weights & Biases. Only process 0 writes.

    Args:
      directory: the run directory.
      step: that of the checkpoint which the run goes on from, None for none; lines beyond it, written by a
        run that went on and was then killed, are dropped, so that the file becomes that of a run which was
        never interrupted.
      wandb: project of Weights & Biases, where a run that resumes goes on as the same run; its steps are in
        the metric "step". ``WANDB_MODE=offline`` keeps all in ``wandb/`` of the run, for ``wandb sync``.

    Raises:
      ConfigError: ``wandb`` without the package.

    Attributes:
      productive: seconds that the steps of the lines kept took.
    """

    def __init__(self, directory: str | pathlib.Path, step: int | None = None, wandb: str | None = None):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        self.productive, last = 0.0, -1 if step is None else step
        self._file = self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        if wandb is not None:
            self._wandb = _weights_and_biases(wandb, pathlib.Path(directory))
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= last]
            self.productive = sum(line.get("time/step", 0.0) for line in kept)
            partial = self.path.with_name(".metrics.jsonl.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(partial, self.path)
        self._file = self.path.open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            print("tensorboardX is not installed: metrics.jsonl only, no TensorBoard files", flush=True)
        else:
            self._tensorboard = SummaryWriter(
                str(pathlib.Path(directory) / "tensorboard"), purge_step=last + 1
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
        known = {name: value for name, value in finite.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **known})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _weights_and_biases(project: str, directory: pathlib.Path) -> Any:
    """A run of Weights & Biases; the same one whenever it is called for a directory."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is {project!r}, but wandb cannot be imported ({error}): pip install 'scjax[wandb]'"
        ) from None
    name = directory / "wandb" / "id"  # what they know it by
    name.parent.mkdir(exist_ok=True)
    if not name.exists():
        name.write_text(secrets.token_hex(4))
    config = directory / "config.json"
    run = wandb.init(
        project=project,
        id=name.read_text(),
        resume="allow",
        name=directory.name,
        dir=directory,
        config=json.loads(config.read_text()) if config.exists() else None,
        settings=wandb.Settings(console="off"),  # leaves the bar alone
    )
    run.define_metric("*", step_metric="step")
    return run

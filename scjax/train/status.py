"""What a run is doing, in ``status.json``: for people, for ``scjax runs`` and for tools of a cluster.

{
  "state": "running",         or "finished", "preempted" (left early, to be started again), "failed"
  "step": 1200, "steps": 20000,
  "began": "2026-03-01T09:00:00+00:00",      the first start of the run
  "updated": "2026-03-01T11:20:41+00:00",
  "idle": 0.0,                seconds between an end and going on with more steps
  "starts": 2,                how often it was started
  "host": "node17", "pid": 4711,             of process 0
  "processes": 4, "devices": "32 NVIDIA H100 80GB HBM3",
  "error": null               what a failed run ended with
}

A process that is killed cannot say so: whoever reads "running" has to look whether the process is there, as
``scjax runs`` does.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import jax

from scjax.train.run import write_text

SELDOM = 10.0  # seconds at least between two updates of a run that goes on
FILE = "status.json"


class Status:
    """Keeps ``status.json`` while a run goes on; use it as the outermost context of the loop.

    The file is written whole or not at all, and only by process 0. That a disk is full is for the checkpoints
    to say, not for this.

    Attributes:
      began: when the run began, in seconds since 1970, moved on by the time in which it had nothing to do.
    """

    def __init__(self, directory: str | pathlib.Path, step: int, steps: int):
        """Args:
        directory: the run directory.
        step, steps: done already, and of the whole run.
        """
        self._file = pathlib.Path(directory) / FILE
        self._written = 0.0
        now, before = time.time(), self._before()
        device = jax.devices()[0]
        self._about = {
            "state": "running",
            "step": step,
            "steps": steps,
            "began": before.get("began", _as_text(now)),
            "updated": "",
            "idle": before.get("idle", 0.0),
            "starts": before.get("starts", 0) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": jax.process_count(),
            "devices": f"{jax.device_count()} {device.device_kind}",
            "error": None,
        }
        if before.get("state") == "finished":
            self._about["idle"] += max(now - _as_seconds(before["updated"]), 0.0)
        self.began = _as_seconds(self._about["began"]) + self._about["idle"]

    def _before(self) -> dict[str, Any]:
        """What earlier processes of this run left; nothing where the file is not ours or damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads(self._file.read_text())
            _as_seconds(before["began"]), _as_seconds(before["updated"])
            return before
        return {}

    def __enter__(self) -> Status:
        self._write()
        return self

    def at(self, step: int) -> None:
        """The run has done ``step`` steps; written now and then."""
        self._about["step"] = step
        if time.monotonic() - self._written > SELDOM:
            self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends without an error is finished, or has left early on purpose."""
        if error is not None and not isinstance(error, SystemExit):
            about = str(error).splitlines()
            self._about |= {"state": "failed", "error": ": ".join([type(error).__name__, *about[:1]])}
        else:
            done = self._about["step"] >= self._about["steps"]
            self._about["state"] = "finished" if done else "preempted"
        self._write()

    def _write(self) -> None:
        self._about["updated"] = _as_text(time.time())
        self._written = time.monotonic()
        if jax.process_index() == 0:
            with suppress(OSError):
                write_text(self._file, json.dumps(self._about, indent=2) + "\n")


def _as_text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _as_seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()

"""Preemption: a run that is told to go saves itself and leaves, to be started again.

Notice is given by SIGTERM (Slurm, Kubernetes, cloud machines), by SIGUSR1 (``sbatch --signal``), by Ctrl-C,
or by a file or URL that is watched. All processes of a run leave at the same step: JAX's preemption service
agrees on one, see ``jax.experimental.multihost_utils.reached_preemption_sync_point``.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import urllib.error
import urllib.request
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from scjax.launch.codes import REQUEUE

VARIABLE = "SCJAX_PREEMPTION_NOTICE"
POLL = 5.0  # seconds between two looks at the file or URL
_NO_NOTICE = ("", "FALSE", "NONE")


class Preemption:
    """Takes notices of preemption while it is entered. Enter it first of all, in the main thread::

        with Preemption() as preemption:
            distributed_start()
            ...
            while step < steps:
                ...
                leaving = preemption.reached(step)
                ...  # if leaving: save, break
        sys.exit(REQUEUE)

    Before the first call of :meth:`reached` there is nothing to save: a process that runs alone, or has not
    joined the others yet, leaves at once, with exit code ``REQUEUE``; Ctrl-C there is what it always is.
    Whatever comes after the first notice is not heeded, but for Ctrl-C, which then stops at once.

    Args:
      notice: a path or http(s) URL to watch; by default that in the environment variable
        ``SCJAX_PREEMPTION_NOTICE``, where it is set. A path gives notice by being there; a URL by an answer
        other than an error, ``FALSE`` and ``NONE``, as that of Google's machines does
        (``http://metadata.google.internal/computeMetadata/v1/instance/preempted``).
    """

    def __init__(self, notice: str | os.PathLike[str] | None = None):
        self._notice = os.environ.get(VARIABLE) if notice is None else os.fspath(notice)
        self._noticed = self._running = self._leaving = False
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> Preemption:
        joined = jax.distributed.is_initialized()  # JAX then listens to SIGTERM, below Python
        signals = (signal.SIGINT, signal.SIGUSR1, *(() if joined else (signal.SIGTERM,)))
        self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
        if self._notice:
            threading.Thread(target=self._watch, args=(self._notice,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for number, previous in self._previous.items():  # a second notice must not spoil the exit code
            signal.signal(number, signal.SIG_IGN if self._leaving else previous or signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to save now and leave, after ``step`` steps. Every process calls it after each step, and
        all get the same answer."""
        self._running = True
        if not jax.distributed.is_initialized():
            self._leaving = self._noticed
        else:
            if self._noticed:  # before the processes had joined, or in a way that only this one knows of
                self._noticed = False
                os.kill(os.getpid(), signal.SIGTERM)
            self._leaving = multihost_utils.reached_preemption_sync_point(step)
        return self._leaving

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and (self._noticed or self._leaving or not self._running):
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            print("Ctrl-C: saving after this step; once more stops at once", file=sys.stderr, flush=True)
        self._noticed = True
        if not self._running and not jax.distributed.is_initialized():
            self._leaving = True
            name = signal.Signals(number).name
            print(f"{name} before the first step: leaving, to be started again", file=sys.stderr, flush=True)
            raise SystemExit(REQUEUE)

    def _watch(self, notice: str) -> None:
        while not _given(notice):
            if self._left.wait(POLL):
                return
        os.kill(os.getpid(), signal.SIGUSR1)


def _given(notice: str) -> bool:
    """Whether a file or URL gives notice of preemption; see :class:`Preemption`."""
    if not notice.startswith(("http://", "https://")):
        return pathlib.Path(notice).exists()
    request = urllib.request.Request(notice, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=POLL) as answer:
            return answer.read(64).decode(errors="replace").strip().upper() not in _NO_NOTICE
    except (urllib.error.URLError, OSError):
        return False

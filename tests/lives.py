"""Lives of one run after another, at the price of a fork each; see fork_server.py."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import runs

from scjax.train import checkpoint_steps

CONFIG = "tests/tiny_config.py"


class Lives:
    """Starts pretraining of the tiny model on one device, one life at a time.

    Args:
      corpus: what it trains on.
      cache: for compiled functions.
    """

    def __init__(self, corpus: pathlib.Path, cache: pathlib.Path):
        self.corpus = corpus
        self._server = subprocess.Popen(
            [sys.executable, str(runs.ROOT / "tests" / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=runs.ROOT,
            env=runs.environment(cache, devices=1),
        )

    def begin(self, workdir: pathlib.Path, **overrides: Any) -> Life:
        flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
        argv = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.corpus={self.corpus}", *flags]
        request = {"argv": argv, "output": str(runs.output_of(workdir))}
        runs.output_of(workdir).write_text("")  # that of the life before is not taken for this one's
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Life(workdir, self._answer()["pid"], lambda: self._answer()["code"])

    def whole(self, workdir: pathlib.Path, **overrides: Any) -> str:
        """A life to the end of the run; its output."""
        life = self.begin(workdir, **overrides)
        assert life.end() == 0, life.output
        return life.output

    def _answer(self) -> dict[str, int]:
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


class Life:
    """A running process of a run.

    Attributes:
      began: by time.monotonic().
    """

    def __init__(self, workdir: pathlib.Path, pid: int, code: Callable[[], int]):
        self.workdir, self._pid, self._code = workdir, pid, code
        self.began = time.monotonic()

    @property
    def alive(self) -> bool:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something to happen, or for the process to end."""
        while self.alive and not condition():
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def end(self) -> int:
        """Waits for the end; exit status, or minus the signal."""
        return self._code()

    @property
    def output(self) -> str:
        return runs.output_of(self.workdir).read_text()


def last_step(workdir: pathlib.Path) -> int:
    """That of the last whole line of metrics; 0 without any."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 4000))
        whole = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    return json.loads(whole)["step"] if whole else 0


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest complete checkpoint; 0 without any."""
    return max(checkpoint_steps(workdir / "checkpoints"), default=0)


def writing(workdir: pathlib.Path) -> int | None:
    """Step of the checkpoint that is being written, or was when the run was killed."""
    found = [
        int(path.name.split(".")[0]) for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    ]
    return max(found, default=None)


def contents(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: fingerprints of all arrays of the state, the place in the data."""
    at = workdir / "checkpoints" / str(step)
    return {name: json.loads((at / name / "metadata").read_text()) for name in ("meta", "data")}

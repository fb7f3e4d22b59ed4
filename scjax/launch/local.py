"""Runs on this machine: one process, or several that are one run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from scjax.config import ConfigError
from scjax.launch.codes import LOST, REQUEUE

GRACE = 60.0  # seconds for the processes of a run that leaves in good order to follow the first
LAST_WORDS = 5.0  # seconds for the survivors of a lost process to say what they saw
TICK = 0.05  # seconds between two looks at the processes
SHOWN = 15  # lines of output that an error repeats
KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGTERM)  # from outside, not by itself


@dataclasses.dataclass
class LocalRun:
    """A run on this machine, started again as often as it should be.

    Attributes:
      command: of each process.
      directory: for the output of all processes but the first, ``process-1.log`` and so on.
      processes: how many are one run. They find each other by ``JAX_COORDINATOR_ADDRESS``,
        ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.
      gpus: of each process, dealt in order from ``CUDA_VISIBLE_DEVICES`` or from 0; None: all see all.
      environment: variables beside those of this process.
      restarts: how often a run that saved itself (exit 75) or lost a process is started again.
      say: takes lines about what happens.
    """

    command: Sequence[str]
    directory: Path
    processes: int = 1
    gpus: int | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restarts: int = 3
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)

    def __post_init__(self) -> None:
        if self.processes < 1 or self.restarts < 0 or (self.gpus is not None and self.gpus < 1):
            raise ConfigError("--processes and --gpus must be at least 1, --restarts at least 0")
        self._running: list[subprocess.Popen] = []
        self._stopping = False

    def run(self) -> int:
        """Runs to the end; the exit status of the run (128 and the signal for one that was killed).

        SIGTERM and SIGINT are passed on as SIGTERM, upon which a run saves itself; the second SIGINT kills.
        """
        before = {name: signal.signal(name, self._stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            for restart in range(self.restarts + 1):
                code, why = self._once()
                again = code == REQUEUE or code > 128
                if not again or self._stopping or restart == self.restarts:
                    break
                self.say(f"launch: {why}; started again ({restart + 1} of at most {self.restarts})")
            if code:
                self.say(f"launch: {why}")
            return code
        finally:
            for process in self._running:
                if process.poll() is None:
                    process.kill()
            for name, handler in before.items():
                signal.signal(name, handler)

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping

    def environment_of(self, index: int, port: int) -> dict[str, str]:
        """What process ``index`` has in its environment beside that of this process."""
        given = dict(self.environment)
        if self.processes > 1:
            given |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(self.processes),
                "JAX_PROCESS_ID": str(index),
            }
        if self.gpus is not None:
            visible = given.get("CUDA_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
            needed = self.processes * self.gpus
            devices = visible.split(",") if visible else [str(i) for i in range(needed)]
            if len(devices) < needed:
                raise ConfigError(
                    f"{self.processes} processes of {self.gpus} GPUs each; CUDA_VISIBLE_DEVICES={visible}"
                )
            given["CUDA_VISIBLE_DEVICES"] = ",".join(devices[index * self.gpus : (index + 1) * self.gpus])
        return given

    def output_of(self, index: int) -> Path | None:
        """Where a process writes; None: the first writes here."""
        return self.directory / f"process-{index}.log" if index else None

    def _once(self) -> tuple[int, str]:
        """Starts all processes and waits for them; exit status and what happened."""
        port = _free_port()
        self._running = []
        for index in range(self.processes):
            output = self.output_of(index)
            with output.open("a") if output else contextlib.nullcontext() as file:
                self._running.append(
                    subprocess.Popen(
                        self.command,
                        env=os.environ | self.environment_of(index, port),
                        stdout=file,
                        stderr=file,
                        start_new_session=True,  # signals of the terminal come here alone
                    )
                )
        if self._stopping:  # before all were there to be told
            self._stop(signal.SIGTERM)
        first = self._first_to_fail()
        if first is None:
            return 0, ""
        code = _status(self._running[first])
        others = [process for process in self._running if process is not self._running[first]]
        self._await(others, GRACE if code == REQUEUE else LAST_WORDS)
        stopped = sum(process.poll() is None for process in others)
        for process in others:
            process.kill()
            process.wait()
        return code, self._story(first, code, stopped)

    def _first_to_fail(self) -> int | None:
        """The process that was first to end with another status than 0; of several, one that was killed
        rather than one that complains. None: all ended well."""
        while True:
            codes = [process.poll() for process in self._running]
            if failed := [i for i, code in enumerate(codes) if code]:
                return min(failed, key=lambda i: (codes[i] not in KILLED, i))
            if None not in codes:
                return None
            time.sleep(TICK)

    def _await(self, processes: Sequence[subprocess.Popen], seconds: float) -> None:
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(TICK)

    def _story(self, index: int, code: int, stopped: int) -> str:
        if code == REQUEUE:
            return "the run saved itself and asks to be started again (exit 75)"
        process = self._running[index]
        name = f"process {index} of {self.processes} (pid {process.pid})" if self.processes > 1 else "the run"
        if process.returncode < 0:
            story = f"{name} was killed by {signal.Signals(-process.returncode).name}"
        elif code == LOST:
            story = f"{name} lost another, which its output names"
        else:
            story = f"{name} failed with exit status {code}"
        if stopped:
            story += f"; the other {'process was' if stopped == 1 else f'{stopped} processes were'} stopped"
        output = self.output_of(index)
        if output is not None:
            lines = output.read_text(errors="replace").splitlines()[-SHOWN:]
            story += f"; the end of {output}:\n" + "\n".join(f"  {line}" for line in lines)
        return story

    def _stop(self, number: int, frame: FrameType | None = None) -> None:
        second = self._stopping and number == signal.SIGINT
        self._stopping = True
        for process in self._running:
            if process.poll() is None:
                process.kill() if second else process.terminate()


def _status(process: subprocess.Popen) -> int:
    """As a shell tells it."""
    code = process.wait()
    return 128 - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]

"""Several processes that are one run: they start together, wait for each other and end together.

JAX joins them. Its coordination service, which process 0 holds, ends all processes once one of them is lost;
but it names that one by its number at best, and a process that fails by itself first waits minutes for the
others. So every process also gives signs of life through the service, and process 0 watches them, as the
others watch it: whatever ends a run then says which process it was, where, and why.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

from scjax.launch.codes import LOST, REQUEUE

TICK = 4.0  # seconds between two signs of life
MISSED = 6  # ticks without one, by the watcher's own count, after which a process is taken for dead
# Seconds until JAX itself ends all processes, from below Python: where even the watcher is stuck.
HEARTBEAT = 50
DAY = 86_400
_SIGNS = "scjax/signs/"  # <process>: a number that grows, _LEFT, or _FAILED and what happened
_NAMES = "scjax/names/"
_TOLD = "scjax/told/"  # <question>/<process>: its answer
_LEFT, _FAILED = "left", "!"
_KEPT: list[Any] = []  # what a handler of signals points to
_watch: _Watch | None = None
_questions = itertools.count()  # the same ones, in the same order, on every process


def distributed_start(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Joins the processes of a run; ``(process index, process count)``. Call it before anything else
    touches a device. Does nothing, and returns ``(0, 1)``, where nothing asks for several processes.

    Joined are: processes started with ``JAX_COORDINATOR_ADDRESS`` (host:port), ``JAX_NUM_PROCESSES``
    and ``JAX_PROCESS_ID``; and those of a Slurm step, an Open MPI run, a Kubernetes indexed job or a
    TPU pod of more than one task, for which JAX finds the three by itself.

    From then on a process that is killed, hangs or cannot be reached ends all others within a minute: each
    names it by index, host and pid and exits with status ``LOST``. See :func:`together` for one that fails.

    Raises:
      ValueError: some but not all of the three variables are set.
    """
    global _watch
    environ = os.environ if environ is None else environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environ.get(name)]
    if not given and not _started_by_a_cluster(environ):
        return 0, 1
    if given and len(given) < len(names) and not _started_by_a_cluster(environ):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(f"{', '.join(given)} set without {missing}: several processes need all three")
    if not jax.distributed.is_initialized():
        options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT}
        if len(given) == len(names):
            address, count, index = (environ[name] for name in names)
            options |= {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        jax.distributed.initialize(**options)
    if _watch is None and jax.process_count() > 1:
        _watch = _Watch()
    return jax.process_index(), jax.process_count()


def _started_by_a_cluster(environ: Mapping[str, str]) -> bool:
    """Whether the environment is that of one of several tasks that JAX can join by itself."""

    def more_than_one(name: str) -> bool:
        return environ.get(name, "").isdigit() and int(environ[name]) > 1

    return (
        (more_than_one("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environ)
        or more_than_one("OMPI_COMM_WORLD_SIZE")
        or ("KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ)
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or environ.get("SCJAX_CLUSTER") == "1"  # of `scjax launch tpu`: nothing else there speaks of a pod
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error that leaves this block in one process of a run ends all of them: the process prints it, tells
    the others, and exits with status 1 at once. The others say which process failed, and how, and follow.

    Where the error is that of a collective operation, the process first waits for who was lost. Alone, and
    for an exit with 0 or ``REQUEUE``, in which all processes agree, the block changes nothing.
    """
    try:
        yield
    except BaseException as error:
        agreed = isinstance(error, SystemExit) and error.code in (None, 0, REQUEUE)
        if _watch is None or agreed:
            raise
        _watch.fail(error)


class _Watch:
    """Signs of life of this process, and an eye on those of others: process 0 on all, all on process 0."""

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # as Orbax does: the store has no public name

        client: Any = global_state.client
        self._client = client
        self._index, count = jax.process_index(), jax.process_count()
        self._client.key_value_set(
            f"{_NAMES}{self._index}",
            f"process {self._index} (host {socket.gethostname()}, pid {os.getpid()})",
        )
        self._sign("0")
        self._client.wait_at_barrier("scjax:names", 300_000)
        self._names = {_number(key): name for key, name in self._client.key_value_dir_get(_NAMES)}
        self._name = self._names[self._index]
        watched = range(1, count) if self._index == 0 else [0]
        self._missed = dict.fromkeys(watched, 0)  # signs of life that did not come, in a row
        if self._index != 0:
            _last_words(
                f"{self._name} is aborted. Where the lines above tell of the leader, or of the coordination "
                f"service: that is {self._names[0]}, which has died or cannot be reached\n"
            )
        self._done = threading.Event()
        threading.Thread(target=self._run, name="scjax-watch", daemon=True).start()
        atexit.register(self._leave)  # runs before JAX takes its leave, which was registered earlier

    def fail(self, error: BaseException) -> NoReturn:
        """Ends the run because of an error in this process."""
        if _collective(error):
            time.sleep(HEARTBEAT)  # before that, the watch ends this process if another one was lost
        self._done.set()
        if isinstance(error, SystemExit):
            told = str(error.code)
            print(told, file=sys.stderr)
        else:
            told = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
        self._end(f"{self._name} has failed: {told[:1000]}", 1)

    def _run(self) -> None:
        tick, last = 0, dict[int, str]()
        while not self._done.wait(TICK):
            try:
                signs = self._signs()
                for sign in signs.values():
                    if sign.startswith(_FAILED):
                        code, _, what = sign.removeprefix(_FAILED).partition(" ")
                        self._end(what, int(code))
                for i, missed in self._missed.items():
                    alive = i in signs and (signs[i] != last.get(i) or signs[i] == _LEFT)
                    self._missed[i] = 0 if alive else missed + 1
                last = signs
                lost = [self._names[i] for i, missed in self._missed.items() if missed >= MISSED]
                if lost:
                    what = "gave no sign of life for {:.0f} s: killed, stuck or out of reach"
                    self._end(f"{', '.join(lost)} {what.format(TICK * MISSED)}", LOST)
                if signs:
                    tick += 1
                    self._sign(str(tick))
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is leaving or lost: what can be read of it next will tell

    def _signs(self) -> dict[int, str]:
        """The last signs of the processes watched, as far as they can be had."""
        if self._index == 0:
            found = {_number(key): sign for key, sign in self._client.key_value_dir_get(_SIGNS)}
            return {i: found[i] for i in self._missed}
        try:
            return {0: self._client.blocking_key_value_get(f"{_SIGNS}0", int(1000 * TICK / 4))}
        except jax.errors.JaxRuntimeError:
            return {}

    def _sign(self, sign: str) -> None:
        self._client.key_value_set(f"{_SIGNS}{self._index}", sign, allow_overwrite=True)

    def _end(self, what: str, code: int) -> NoReturn:
        """Ends this process, and so the run: process 0 tells all, the others tell process 0."""
        if not what.startswith(self._name):
            print(f"{what}. {self._name} ends with the run", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._index == 0 or not what.startswith(self._names[0]):
            self._sign(f"{_FAILED}{code} {what}")
        until = time.monotonic() + 2 * TICK
        while self._index == 0 and time.monotonic() < until:  # with it goes the store in which they read
            alive = [sign for i, sign in self._signs().items() if self._missed[i] < MISSED]
            if all(sign.startswith((_FAILED, _LEFT)) for sign in alive):
                break
            time.sleep(TICK / 20)
        os._exit(code)

    def _leave(self) -> None:
        self._done.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._sign(_LEFT)


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])


def _collective(error: BaseException | None) -> bool:
    """Whether an error of JAX's runtime is among what led to this one."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _last_words(text: str) -> None:
    """Has this process write ``text`` to stderr when it is aborted.

    That is what JAX does, within milliseconds of the death of process 0, in a thread of its own. The handler
    is compiled: nobody can tell who holds the interpreter's lock then, or whether memory is to be had.
    """
    import numba

    libc = ctypes.CDLL(None)
    libc.write.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)
    libc.write.restype = ctypes.c_ssize_t
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_size_t)
    _KEPT.append(ctypes.create_string_buffer(text.encode()))
    write, address, size = libc.write, ctypes.addressof(_KEPT[-1]), len(_KEPT[-1].value)

    @numba.cfunc("void(int32)")
    def handler(_: int) -> None:
        write(2, address, size)

    _KEPT.append(handler)
    libc.signal(signal.SIGABRT, handler.address)


def barrier(name: str) -> None:
    """Waits until every process is here; nothing on one process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_all(text: str) -> list[str]:
    """What each process says here, in their order. It goes through the coordination service and not over the
    devices, so that processes may come at any time, and from a device operation that failed."""
    if jax.process_count() == 1:
        return [text]
    from jax._src.distributed import global_state

    client: Any = global_state.client
    told = f"{_TOLD}{next(_questions)}/"
    client.key_value_set(f"{told}{jax.process_index()}", f":{text}")  # never empty
    keys = [f"{told}{index}" for index in range(jax.process_count())]
    return [client.blocking_key_value_get(key, 1000 * DAY).removeprefix(":") for key in keys]

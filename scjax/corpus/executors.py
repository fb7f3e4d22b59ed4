"""Who does the tasks of a build: this process, processes beside it, or a Dask cluster."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from scjax.corpus.tasks import Job, Task

WORKER_BYTES = 2**30  # that one worker needs at most: a run of rows, or two shards
SMALL = 2**25  # stored values below which a process is not worth starting

Report = Callable[[Task, int | None], None]  # a task has begun (0), read or written cells, or is done (None)


def here(job: Job, tasks: Sequence[Task], report: Report) -> None:
    """Does the tasks in this process, one after the other."""
    for task in tasks:
        report(task, 0)
        job.run(task, functools.partial(report, task))
        report(task, None)


def n_workers(job: Job, asked: int | None) -> int:
    """How many processes to use: as asked, else one per CPU that memory allows; one for small builds."""
    if asked is not None:
        if asked < 1:
            raise ValueError(f"workers={asked} must be at least 1")
        return asked
    if job.plan.n_stored < SMALL:
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, _free_bytes() // WORKER_BYTES))


def _free_bytes() -> int:
    """Memory that may be used: what the machine has left, or less where a container has a limit."""
    free = 2**62
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = pathlib.Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


# ------------------------------------------------------------------ processes
_START = "import sys; from scjax.corpus.executors import serve; serve(int(sys.argv[1]))"


def beside(
    job: Job, tasks: Sequence[Task], report: Report, workers: int, processes: Processes | None = None
) -> None:
    """Does the tasks in ``workers`` new processes; those that read sources in memory in this one.

    The processes are new interpreters, neither forked (threads and JAX would not survive) nor through
    multiprocessing (which runs the user's script again in each).

    Args:
      processes: those of an earlier call, to be used again.

    Raises:
      What a task raised; RuntimeError if a process died.
    """
    ours = [task for task in tasks if job.in_memory(task)]
    left = [task for task in tasks if not job.in_memory(task)]
    here(job, ours, report)
    left.reverse()
    with Processes(job) if processes is None else contextlib.nullcontext(processes) as held:
        children = held.get(min(workers, len(left)))
        busy: dict[Connection, Task] = {}

        def give(connection: Connection) -> None:
            if left:
                busy[connection] = left.pop()
                report(busy[connection], 0)
                with contextlib.suppress(OSError):  # of one that is dead, which receiving finds out
                    connection.send(busy[connection])

        for connection in children:
            give(connection)
        while busy:
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                task = busy[connection]
                try:
                    cells, error = connection.recv()
                except (EOFError, OSError):
                    code = children[connection].wait()
                    raise RuntimeError(
                        f"a worker process ended ({'signal' if code < 0 else 'status'} {abs(code)}) at "
                        f"{task[0]} {task[1]} ({job.doing(task)}); if memory ran out, use fewer workers"
                    ) from None
                if error is not None:
                    raise error
                report(task, cells)
                if cells is None:
                    del busy[connection]
                    give(connection)


class Processes:
    """Worker processes of one job, started when they are asked for, ended with the block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._held: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def get(self, n: int) -> dict[Connection, subprocess.Popen[bytes]]:
        """``n`` of them; those that are there already know the job and need not begin anew."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        while len(self._held) < n:
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-c", _START, str(theirs.fileno())]
                child = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            self._held[ours] = child
            with contextlib.suppress(OSError):
                ours.send((self._job.root, self._job.folder))
        return dict(itertools.islice(self._held.items(), n))

    def __exit__(self, *_: object) -> None:
        for connection, child in self._held.items():
            child.kill()
            child.wait()
            connection.close()
        self._held.clear()


def serve(number: int) -> None:
    """The life of a worker process: does what it is sent until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    connection = Connection(number)
    job = Job(*connection.recv())
    tasks: queue.Queue[Task] = queue.Queue()

    def listen() -> None:
        try:
            while True:
                tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)  # whatever is under way: nobody waits for it, and a half-written result has no name

    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            job.run(task, lambda cells: connection.send((cells, None)))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
            connection.send((None, portable(error)))
        else:
            connection.send((None, None))


def portable(error: BaseException) -> BaseException:
    """An exception that travels between processes, with the traceback as a note."""
    import pickle

    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any class may fail in its own way
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    error.add_note(f"in a worker process:\n{trace}")
    return error


# ------------------------------------------------------------------ Dask
def on_dask(job: Job, tasks: Sequence[Task], report: Report, address: str) -> None:
    """Hands the tasks to a running Dask cluster, whose workers see the same file system.

    Raises:
      ImportError: Dask is not installed here.
      ValueError: a source is in the memory of this process.
      What a task raised.
    """
    try:
        import distributed
    except ImportError as error:
        raise ImportError("a Dask cluster needs dask and distributed: pip install 'scjax[build]'") from error
    memory = [task for task in tasks if job.in_memory(task)]
    if memory:
        raise ValueError(
            f"the source {job.doing(memory[0])!r} is in the memory of this process, out of reach of a Dask "
            "cluster: write it to a file first"
        )
    with distributed.Client(address, set_as_default=False) as client:
        where = str(job.root.resolve()), str(job.folder.resolve())
        futures = {
            client.submit(
                run_task, *where, task, pure=False, key=f"scjax-{job.folder.name}-{task[0]}-{task[1]}"
            ): task
            for task in tasks
        }
        for task in tasks:
            report(task, 0)
        try:
            for future in distributed.as_completed(futures, loop=client.loop):
                cells = future.result()
                report(futures[future], cells)
                report(futures[future], None)
        finally:
            client.cancel(list(futures))


def run_task(root: str, folder: str, task: Task) -> int:
    """One task, wherever it is run; returns the cells that it read or wrote."""
    cells: list[int] = []
    _job(root, folder).run(task, cells.append)
    return sum(cells)


@functools.lru_cache(maxsize=2)
def _job(root: str, folder: str) -> Any:
    return Job(pathlib.Path(root), pathlib.Path(folder))

"""Carrying out a build or an append: plan, map, reduce, commit, and going on after an earlier run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scjax.corpus import locks
from scjax.corpus.commit import NothingKeptError, commit, finished, record_of
from scjax.corpus.executors import Processes, beside, here, n_workers, on_dask
from scjax.corpus.format import Layout
from scjax.corpus.plan import Base, Options, Study, make_plan, plan_key
from scjax.corpus.progress import BuildProgress, cell_progress
from scjax.corpus.tasks import Job, Task
from scjax.genes import Vocabulary

FOLDERS = ("parts", "index", "vocab", "manifests", "sources")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to build, and who is to do it.

    Attributes:
      arguments: as the caller gave them, for the note on sources.
      workers: processes; None chooses.
      task: (i, n): do the i-th of n shares of what can be done now.
      dask: address of a Dask scheduler.
    """

    root: pathlib.Path
    studies: tuple[Study, ...]
    vocabulary: Vocabulary | None
    options: Options
    layout: Layout
    base: Base | None
    arguments: dict[str, Any]
    workers: int | None
    task: tuple[int, int] | None
    dask: str | None
    progress: bool

    def __post_init__(self) -> None:
        if self.task is not None:
            share, of = self.task
            if not 0 <= share < of:
                raise ValueError(f"task=({share}, {of}): the shares of {of} are 0 to {of - 1}")
            memory = [study.name for study in self.studies if study.in_memory]
            if memory:
                raise ValueError(f"task= needs sources in files; in memory: {', '.join(memory)}")
        if sum(how is not None for how in (self.workers, self.task, self.dask)) > 1:
            raise ValueError("workers=, task= and dask= exclude each other")

    @functools.cached_property
    def key(self) -> str:
        """See ``plan_key``."""
        return plan_key(self.studies, self.vocabulary, self.options, self.layout, self.base)

    def is_done(self) -> bool:
        """Whether the present state is what this asks for, and the caller cannot know that it is.

        True for another share of the same work, and where the process was killed right after its commit.
        """
        if not (self.root / "HEAD").exists():
            return False
        unaware = self.task is not None or (self.root / locks.WORK).is_dir()
        return unaware and finished(self.root, self.key) is not None

    def tidy(self) -> None:
        """Takes away what is left of the work when it is done, unless somebody is at it."""
        with contextlib.suppress(FileExistsError), locks.writing(self.root) as work:
            shutil.rmtree(work / self.key, ignore_errors=True)


def carry_out(request: Request) -> str | None:
    """Does the work; returns the id of the new manifest, None where other shares have work left.

    Raises:
      FileExistsError: another build or append is under way there.
      What the plan and the tasks raise, with a word on what was kept.
    """
    key = request.key
    if request.is_done():
        request.tidy()
        return finished(request.root, key)
    together = request.task is not None
    with _holding(request.root, together) as hold:
        work = hold.work
        done = finished(request.root, key) if together else None
        if done is not None:  # by another share, since we looked
            shutil.rmtree(work / key, ignore_errors=True)
            return done
        _clear(request, hold, key)
        folder = work / key
        folder.mkdir(exist_ok=True)
        try:
            with _only_one(folder / "plan.lock"):
                if not (folder / "plan.pkl").exists():
                    args = request.studies, request.vocabulary, request.options, request.layout
                    make_plan(*args, folder, request.base)
            job = Job(request.root, folder, request.studies)
            with _disk(job), cell_progress(request.progress) as bar, Processes(job) as processes:
                complete = _stages(request, job, BuildProgress(bar, job), processes)
            if not complete:
                return None
            with _only_one(folder / "commit.lock"), _disk(job):
                done = finished(request.root, key)
                if done is None:
                    done = commit(job, record_of(request.arguments, request.studies, key))
        except BaseException as error:
            if together:  # another share may have been faster, and taken the folder away
                done = finished(request.root, key) if isinstance(error, FileNotFoundError) else None
                if done is not None:
                    return done
            elif isinstance(error, NothingKeptError) or not _kept(folder):
                shutil.rmtree(folder, ignore_errors=True)
                raise
            told = _with_word(error, folder)
            if told is error:
                raise
            raise told from error
        shutil.rmtree(folder, ignore_errors=True)
        return done


def _stages(request: Request, job: Job, progress: BuildProgress, processes: Processes) -> bool:
    """All tasks in their order, or this share of what can be done now; whether all are done."""
    plan = job.plan
    for word, tasks in (
        ("reading", job.first_tasks()),
        ("comparing", job.middle_tasks()),
        ("writing", job.last_tasks()),
    ):
        left = [task for task in tasks if not job.done(task)]
        if word != "comparing":
            before = plan.n_cells if not left else 0
            if word == "reading":
                before = sum(
                    last - first
                    for number, (_, first, last) in enumerate(plan.runs)
                    if job.done(("map", number))
                )
            progress.stage(word, plan.n_cells, before)
        if request.task is not None and word != "comparing":
            share, of = request.task
            mine = [task for turn, task in enumerate(tasks) if turn % of == share and task in set(left)]
            here(job, mine, progress)
            left = [task for task in left if not job.done(task)]
            if left:
                print(
                    f"share {share} of {of} is done; {len(left)} of {len(tasks)} tasks of {word} are left "
                    "to other shares; call again when they are done",
                    file=sys.stderr,
                )
                return False
        else:
            _do(request, job, left, progress, processes)
    return True


def _do(
    request: Request, job: Job, tasks: Sequence[Task], progress: BuildProgress, processes: Processes
) -> None:
    if not tasks:
        return
    if request.dask is not None:
        on_dask(job, tasks, progress, request.dask)
        return
    workers = 1 if request.task is not None else n_workers(job, request.workers)
    if min(workers, len(tasks)) == 1:
        here(job, tasks, progress)
    else:
        beside(job, tasks, progress, workers, processes)


# ------------------------------------------------------------------ the folder
def _clear(request: Request, hold: _Hold, key: str) -> None:
    """Takes away what other plans left, and half-written results of this one."""
    work = hold.work
    others = [path for path in work.iterdir() if path.name not in ("lock", key)]
    if others:
        if not hold.alone():
            raise FileExistsError(
                f"{request.root}: the work of another plan lies in {work} and others are busy there: the "
                "arguments or the sources of this call are not those of the other shares"
            )
        names = ", ".join(path.name for path in others)
        print(f"{work}: removing the unfinished work of another plan ({names})", file=sys.stderr)
        for path in others:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if request.base is None and not (work / key).exists() and not (request.root / "HEAD").exists():
        for name in FOLDERS:  # of a build that was stopped in its commit
            shutil.rmtree(request.root / name, ignore_errors=True)
    if request.task is None:  # nobody else is at it: what is half written is nobody's
        for path in (work / key).glob("tmp-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclasses.dataclass(frozen=True)
class _Hold:
    """The folder for work, and whether its lock could be had alone, if only for now."""

    work: pathlib.Path
    alone: Callable[[], bool]


@contextlib.contextmanager
def _holding(root: pathlib.Path, together: bool) -> Iterator[_Hold]:
    """Holds a corpus for writing: alone, or together with other shares of one build.

    Raises:
      FileExistsError: somebody else is writing there.
    """
    if not together:
        with locks.writing(root) as work:
            yield _Hold(work, lambda: True)
        return
    work = root / locks.WORK
    patience = 40  # a share that ends holds the folder alone for a moment
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(work / "lock", "a+b")
        except FileNotFoundError:  # whoever held it has just removed the folder
            continue
        with lock:
            if not locks.lock(lock.fileno(), shared=True, wait=False):
                patience -= 1
                if patience:
                    time.sleep(0.05)
                    continue
                raise FileExistsError(
                    f"{root}: a build, append, repair or gc that does not share its work is writing there now"
                )
            if not locks.is_there(lock.fileno(), work / "lock"):
                continue
            yield _Hold(work, functools.partial(_alone, lock.fileno()))
            break
    # The last of several takes the empty folder away: whose lock fails here is not the last.
    if work.is_dir():
        with contextlib.suppress(FileExistsError), locks.writing(root):
            pass


def _alone(fd: int) -> bool:
    """Takes a shared lock alone if nobody else holds it."""
    if locks.lock(fd, shared=False, wait=False):
        return True
    locks.lock(fd, shared=True, wait=True)
    return False


@contextlib.contextmanager
def _only_one(path: pathlib.Path) -> Iterator[None]:
    """Waits until nobody else is inside. Where the file system has no locks all go on: results are whole."""
    with open(path, "a+b") as file:
        locks.lock(file.fileno(), shared=False, wait=True)
        yield


def _kept(folder: pathlib.Path) -> list[str]:
    """The results in a plan's folder that a later run need not make again."""
    if not folder.is_dir():
        return []
    return [name for name in os.listdir(folder) if name.startswith(("map-", "part-", "duplicates"))]


def _with_word(error: BaseException, folder: pathlib.Path) -> BaseException:
    """The error with a word on what was kept, where its message is a text."""
    n_kept = len(_kept(folder))
    if not n_kept or not isinstance(error, OSError | ValueError | KeyError | RuntimeError):
        return error
    word = (
        f"; {n_kept} finished pieces of work are kept in {folder}: the same command goes on from there "
        f"(to give up, remove {folder.parent})"
    )
    changed: BaseException
    if isinstance(error, OSError) and error.errno is not None:
        changed = type(error)(error.errno, f"{error.strerror}{word}")
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        try:
            changed = type(error)(error.args[0] + word)
        except TypeError:  # a class that is made of more than it tells, as JSONDecodeError
            return error
    else:
        return error
    for note in getattr(error, "__notes__", ()):
        changed.add_note(note)
    return changed


@contextlib.contextmanager
def _disk(job: Job) -> Iterator[None]:
    """A full disk is reported with what was there and what the build needs."""
    free = shutil.disk_usage(job.root).free
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full: about {6 * job.plan.n_stored / 2**20:,.0f} MiB are needed in all under "
            f"{job.root}, {free / 2**20:,.0f} MiB were free at the start",
        ) from error

"""The tasks of a build. Each leaves one result, whole or not at all, and does nothing where it is there.

In the folder of a plan: ``plan.pkl``, ``study-<n>.pkl``; then ``hash-<n>`` (the sha256 of a source),
``map-<n>`` (a fragment), ``duplicates`` and ``part-<n>``. Any process that sees the folder may do any task.
"""

from __future__ import annotations

import functools
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scjax.corpus.fragments import Fragment, whole_folder, write_fragment
from scjax.corpus.plan import Base, Facts, Plan, Study, write_whole
from scjax.corpus.shuffle import write_part
from scjax.corpus.sources import Source

if TYPE_CHECKING:
    from scjax.corpus.corpus import Part

Task = tuple[str, int]  # what to do ("hash", "map", "duplicates", "part") and its number
_SORTED = 2**24  # content hashes compared in one go


class Job:
    """A plan in its folder, and the tasks that carry it out.

    Attributes:
      root: folder of the corpus.
      folder: of the plan.
      studies: the sources, those in memory with their data where this process has it.
    """

    def __init__(
        self, root: pathlib.Path, folder: pathlib.Path, studies: Sequence[Study] | None = None
    ) -> None:
        self.root, self.folder = root, folder
        self.plan: Plan = pickle.loads((folder / "plan.pkl").read_bytes())
        self.studies = tuple(studies or self.plan.studies)

    def first_tasks(self) -> list[Task]:
        """Those that read sources; they wait for nothing."""
        tasks: list[Task] = [("hash", number) for number in range(len(self.studies))]
        return tasks + [("map", number) for number in range(len(self.plan.runs))]

    def middle_tasks(self) -> list[Task]:
        """What waits for all of the first and is waited for by all of the last."""
        return [("duplicates", 0)] if self.plan.options.drop_duplicates else []

    def last_tasks(self) -> list[Task]:
        """Those that write parts."""
        return [("part", number) for number in range(len(self.plan.places.splits))]

    def path(self, task: Task) -> pathlib.Path:
        """Where the result of a task is."""
        kind, number = task
        return self.folder / (kind if kind == "duplicates" else f"{kind}-{number:06d}")

    def done(self, task: Task) -> bool:
        return self.path(task).exists()

    def in_memory(self, task: Task) -> bool:
        """Whether a task reads a source that only this process has."""
        kind, number = task
        if kind == "map":
            return self.studies[self.plan.runs[number][0]].in_memory
        return kind == "hash" and self.studies[number].in_memory

    def doing(self, task: Task) -> str:
        """What a progress bar says of a task."""
        kind, number = task
        if kind == "map":
            return self.studies[self.plan.runs[number][0]].name
        return self.studies[number].name if kind == "hash" else kind

    def run(self, task: Task, advance: Callable[[int], None] = lambda cells: None) -> None:
        """Does a task, unless it is done.

        Args:
          advance: told how many cells were read or written since it was last told.
        """
        if self.done(task):
            return
        kind, number = task
        if kind == "hash":
            write_whole(self.path(task), self._source(number).sha256().encode())
            return
        with whole_folder(self.path(task)) as folder:
            if kind == "map":
                run = self.plan.runs[number]
                source = self._source(run[0])
                write_fragment(folder, self.plan, self.facts(run[0]), source, run, folder, advance)
            elif kind == "duplicates":
                gone = find_duplicates(self)
                (folder / "rows.pkl").write_bytes(pickle.dumps(gone, protocol=5))
            else:
                write_part(folder, self.plan, number, self.fragments, self.duplicates, advance)

    def facts(self, number: int) -> Facts:
        """What the plan knows of a source."""
        return pickle.loads((self.folder / f"study-{number:06d}.pkl").read_bytes())

    def _source(self, number: int) -> Source:
        held = self.__dict__.get("_held")
        if held is None or held[0] != number:  # one source is kept open: its runs often come in a row
            held = self.__dict__["_held"] = (number, self.studies[number].open())
        return held[1]

    @functools.cached_property
    def fragments(self) -> list[Fragment]:
        """Of all runs, in order; they must be there."""
        return [Fragment(self.path(("map", number))) for number in range(len(self.plan.runs))]

    @functools.cached_property
    def duplicates(self) -> dict[int, np.ndarray]:
        """Number of a fragment -> its rows that are left out, because an earlier cell holds the same."""
        if not self.plan.options.drop_duplicates:
            return {}
        return pickle.loads((self.path(("duplicates", 0)) / "rows.pkl").read_bytes())


def _old_parts(root: pathlib.Path, base: Base) -> Sequence[Part]:
    """The parts of the state that is added to. They are the first of every later state, too."""
    from scjax.corpus.corpus import Corpus

    try:
        return Corpus.open(root, base.manifest_id).parts
    except FileNotFoundError:  # a repair, after gc has removed that state
        parts = Corpus.open(root).parts
        ends = [part.first_row + part.n_cells for part in parts]
        if sum(base.n_cells) not in ends:
            raise
        return parts[: ends.index(sum(base.n_cells)) + 1]


def find_duplicates(job: Job) -> dict[int, np.ndarray]:
    """Of cells with the same content hash the first stays, in the order of data sets and rows.

    Those of the corpus that is added to come before all. The hashes are looked at in as many rounds as keep
    memory bounded.
    """
    plan = job.plan
    old = _old_parts(job.root, plan.base) if plan.base else ()
    n_cells = plan.n_cells + sum(part.n_cells for part in old)
    rounds = -(-n_cells // _SORTED)
    gone: dict[int, list[np.ndarray]] = {}
    for this in range(rounds):
        hashes, order, places = [], [], []
        for number, part in enumerate(old, -len(old)):
            content = part.column("content")
            some = np.flatnonzero(content[:, 0] % rounds == this)
            hashes.append(content[some])
            order.append(some)
            places.append(np.column_stack([np.full(len(some), number), some]))
        for number in range(len(plan.runs)):
            folder = job.path(("map", number))
            content = np.load(folder / "content.npy")
            some = np.flatnonzero(content[:, 0] % rounds == this)
            hashes.append(content[some])
            order.append(np.load(folder / "row.npy")[some])
            places.append(np.column_stack([np.full(len(some), number), some]))
        content, row, place = np.concatenate(hashes), np.concatenate(order), np.concatenate(places)
        # runs are numbered in the order of data sets and rows, so the run and the row give a cell's turn
        turn = np.lexsort((row, place[:, 0], content[:, 1], content[:, 0]))
        same = (np.diff(content[turn], axis=0) == 0).all(1)
        repeated = place[turn[1:][same]]
        for number in np.unique(repeated[repeated[:, 0] >= 0, 0]).tolist():
            gone.setdefault(number, []).append(repeated[repeated[:, 0] == number, 1])
    return {number: np.sort(np.concatenate(rows)) for number, rows in gone.items()}

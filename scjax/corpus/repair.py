"""Making a damaged corpus whole again, from its own other parts or from the sources that it was built of.

A build gives the same bytes again, so a damaged part is built once more, alone, and its objects are put in
the place of the damaged ones. Nothing is put in place that is not, byte for byte, what the manifest tells of.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anndata as ad
import numpy as np
import zarr

from scjax.corpus.executors import Processes, beside, here, n_workers
from scjax.corpus.format import Layout
from scjax.corpus.fragments import Head, whole_folder
from scjax.corpus.locks import writing
from scjax.corpus.manifest import digest, hash_bytes, read_manifest, write_durably
from scjax.corpus.plan import Base, Options, Plan, Study, list_studies, make_plan, write_whole
from scjax.corpus.progress import BuildProgress, cell_progress
from scjax.corpus.store import LocalStore, local_folder
from scjax.corpus.tasks import Job, Task
from scjax.corpus.verify import damaged
from scjax.genes import Vocabulary


def repair_corpus(
    path: str | os.PathLike[str], sources: Any = None, workers: int | None = None, progress: bool = True
) -> list[str]:
    """Replaces what is damaged or missing in a corpus: HEAD, vocabulary, measured genes, parts.

    The sources are read again where a part or the measured genes are to be made anew; the vocabulary comes
    from any part that is whole, if it can.

    Args:
      path: folder of the corpus.
      sources: where the sources are now, if not where they were: name of a data set -> path or AnnData, or
        what ``build_corpus`` was given. Sources that were in memory must be given.
      workers: processes to read and write parts with, as in ``build_corpus``.
      progress: show a progress bar.

    Returns:
      Names of the objects that were replaced, sorted; empty if all was well.

    Raises:
      FileExistsError: something is being written to the corpus now.
      FileNotFoundError: a source is gone; names all that are.
      ValueError: a source has changed; a manifest is damaged; what came out is not what the manifest tells
        of. Nothing of that data set or part was replaced.
    """
    root = local_folder(path)
    if not (root / "manifests").is_dir():
        read_manifest(root)  # says what there is instead
    given = _given(sources)
    with writing(root) as work:
        repaired = _head(root, work)
        state = _State.read(root)
        broken = damaged(LocalStore(root), state.objects)
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda part: damaged(LocalStore(root), part["objects"]), state.parts.values())
            parts = {name: list(names) for name, names in zip(state.parts, found, strict=True) if names}
        measured = [name for name in broken if name.startswith("index/measured/")]
        for name in broken:
            if name not in measured:
                _vocabulary(root, work, state, name, parts, given)
                repaired.append(name)
        for record in state.records:
            wanted = {part: parts[part] for part in record["parts"] if part in parts}
            lost = [s["name"] for s in record["sources"] if state.measured.get(s["name"]) in measured]
            if wanted or lost:
                repaired += _again(root, work, state, record, wanted, lost, given, workers, progress)
        left = sorted({*broken, *(name for names in parts.values() for name in names)} - {*repaired})
        if left or state.unreadable:
            raise ValueError(_hopeless(root, left, state))
    return sorted({*repaired})  # data sets that measured the same genes share an object


@dataclasses.dataclass(frozen=True)
class _State:
    """All manifests of a corpus together, and the notes on its sources.

    Attributes:
      manifests: id -> content.
      objects, parts: what they tell of; a part by its id.
      measured, sha256: data set -> name of its object, hash of its source.
      records: the notes on sources, the oldest build first.
      unreadable: ids of manifests that are damaged.
    """

    manifests: dict[str, dict[str, Any]]
    objects: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    measured: dict[str, str]
    sha256: dict[str, str]
    records: list[dict[str, Any]]
    unreadable: list[str]

    @classmethod
    def read(cls, root: pathlib.Path) -> _State:
        state = cls({}, {}, {}, {}, {}, [], [])
        for file in sorted((root / "manifests").glob("*.json")):
            try:
                content = read_manifest(root, file.stem)[1]
            except (OSError, ValueError):
                state.unreadable.append(file.stem)
                continue
            state.manifests[file.stem] = content
            state.objects.update(content["objects"])
            state.parts.update((part["id"], part) for part in content["parts"])
            for entry in content["datasets"]:
                state.measured[entry["name"]] = entry["measured"]
                state.sha256[entry["name"]] = entry["sha256"]
        for file in sorted((root / "sources").glob("*.json")):
            try:
                record = json.loads(file.read_bytes())
                if {"parts", "sources", "options", "layout", "base"} <= record.keys():
                    state.records.append(record)
            except (ValueError, AttributeError):
                continue
        state.records.sort(key=lambda record: len(record["base"]["datasets"]) if record["base"] else 0)
        return state


def _given(sources: Any) -> dict[str, Any]:
    """Data set, or name of its file -> where it is now."""
    if sources is None or isinstance(sources, Mapping | list | tuple) and not sources:
        return {}
    if isinstance(sources, Mapping):
        return dict(sources)
    studies = list_studies(sources, None, None)
    files = {os.path.basename(study.data): study.data for study in studies if not study.in_memory}
    return files | {study.name: study.data for study in studies}


def _hopeless(root: pathlib.Path, left: list[str], state: _State) -> str:
    what = []
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        what.append(
            f"nothing tells which sources {shown} came from (the folder sources has no note on it): "
            "build the corpus again"
        )
    if state.unreadable:
        what.append(
            f"damaged manifests cannot be made again: {', '.join(state.unreadable)}; gc with drop_old "
            "removes those of earlier states"
        )
    return f"{root}: {'; '.join(what)}"


# ------------------------------------------------------------------ without sources
def _head(root: pathlib.Path, work: pathlib.Path) -> list[str]:
    """Makes HEAD name a state again, if it does not and there is no doubt which."""
    head = root / "HEAD"
    said = head.read_bytes().decode(errors="replace").strip() if head.is_file() else ""
    state = _State.read(root)
    if said in state.manifests:
        return []
    if said in state.unreadable or not state.manifests:
        read_manifest(root)  # raises
    if not said and any(path.name != "lock" for path in work.iterdir()):
        raise FileNotFoundError(f"{root}: a build was interrupted here, run it again")
    near = [name for name in state.manifests if sum(map(str.__ne__, name, said)) <= 2 and len(said) >= 11]
    parents = {content["parent"] for content in state.manifests.values()}
    chosen = near if len(near) == 1 else [name for name in state.manifests if name not in parents]
    if len(chosen) != 1:
        raise ValueError(
            f"{head}: damaged ({said[:40]!r}), and any of {', '.join(chosen)} may be the present state: "
            "write the id of the right one into the file"
        )
    write_durably(head, f"{chosen[0]}\n".encode(), work / "HEAD.partial")
    return ["HEAD"]


def _vocabulary(
    root: pathlib.Path,
    work: pathlib.Path,
    state: _State,
    name: str,
    broken: Mapping[str, Sequence[str]],
    given: Mapping[str, Any],
) -> None:
    """The vocabulary stands in every part, but for other names of its genes; else it is in the sources."""
    fields = ("symbol", "species", "biotype")
    for part_id in state.parts:
        if not any("/var/" in object_ for object_ in broken.get(part_id, ())):
            part: Any = zarr.open_group(root / "parts" / f"{part_id}.zarr", mode="r")
            var = ad.io.read_elem(part["var"])
            columns = {field: [str(value) for value in var[field]] for field in fields}
            if _put_vocabulary(root, work, state, name, Vocabulary(list(var.index), **columns)):
                return
            break
    for record in state.records:
        if record["base"] is None:
            studies = _studies(root, state, record, given)
            vocabulary = Vocabulary.from_anndata(study.open().var for study in studies)
            if _put_vocabulary(root, work, state, name, vocabulary):
                return
    raise ValueError(
        f"{root / name}: damaged, and neither the parts nor the sources hold all of it: copy the file of the "
        "vocabulary that the corpus was built with there"
    )


def _put_vocabulary(
    root: pathlib.Path, work: pathlib.Path, state: _State, name: str, vocabulary: Vocabulary
) -> bool:
    vocabulary.to_tsv(work / "vocabulary.tsv")
    content = (work / "vocabulary.tsv").read_bytes()
    (work / "vocabulary.tsv").unlink()
    if hash_bytes(content) != state.objects[name]:
        return False
    (root / name).parent.mkdir(exist_ok=True)
    write_durably(root / name, content, work / "vocabulary.partial")
    return True


# ------------------------------------------------------------------ from the sources
def _studies(
    root: pathlib.Path, state: _State, record: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Study, ...]:
    """The sources of a build, where they are now, and known to be what they were."""
    studies = tuple(
        Study(_where(source, given), source["name"], source["layer"]) for source in record["sources"]
    )
    gone = [
        f"{study.name} ({'was in memory' if study.data is None else study.data})"
        for study in studies
        if study.data is None or not study.in_memory and not os.path.exists(study.data)
    ]
    if gone:
        raise FileNotFoundError(
            f"{root}: sources that are needed for the repair are gone: {', '.join(gone)}; say where they are "
            "now with sources="
        )
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda study: study.open().sha256(), studies)
        changed = [
            f"{study.name} ({'in memory' if study.in_memory else study.data})"
            for study, sha256 in zip(studies, hashes, strict=True)
            if sha256 != state.sha256.get(study.name, sha256)
        ]
    if changed:
        raise ValueError(
            f"{root}: sources have changed since the corpus was built of them (another sha256): "
            f"{', '.join(changed)}; say with sources= where they are as they were"
        )
    return studies


def _where(source: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    path = source["path"]
    return given.get(source["name"], path if path is None else given.get(os.path.basename(path), path))


def _again(
    root: pathlib.Path,
    work: pathlib.Path,
    state: _State,
    record: Mapping[str, Any],
    broken: Mapping[str, Sequence[str]],
    lost: Sequence[str],
    given: Mapping[str, Any],
    workers: int | None,
    progress: bool,
) -> list[str]:
    """Makes damaged parts and measured genes of one build or append again; the objects that were replaced.

    Args:
      record: the note on that build.
      broken: id of a part -> its damaged objects.
      lost: data sets whose measured genes are damaged.
    """
    studies = _studies(root, state, record, given)
    folder = work / f"repair-{digest(record)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        options = Options(**{key: _tuples(value) for key, value in record["options"].items()})
        base = record["base"]
        if base is not None:
            base = Base(**(base | {key: tuple(base[key]) for key in ("datasets", "n_cells")}))
        plan = make_plan(
            studies, _any_vocabulary(root, state, record), options, Layout(**record["layout"]), folder, base
        )
        repaired = [_measured(root, work, state, Job(root, folder, studies), name) for name in lost]
        if broken:
            plan = dataclasses.replace(plan, only=_wanted(plan, record, broken))
            write_whole(folder / "plan.pkl", pickle.dumps(plan, protocol=5))
            job = Job(root, folder, studies)
            with cell_progress(progress) as bar:
                n_cells = sum(state.parts[part]["n_cells"] for part in broken)
                _carry_out(job, workers, n_cells, BuildProgress(bar, job))
            repaired += _put_parts(root, job, broken)
        return repaired
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tuples(value: Any) -> Any:
    """Lists of a note as the tuples that they were."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _any_vocabulary(root: pathlib.Path, state: _State, record: Mapping[str, Any]) -> Vocabulary:
    """Of the state that the parts of a build belong to."""
    for content in state.manifests.values():
        if set(record["parts"]) & {part["id"] for part in content["parts"]}:
            return Vocabulary.from_tsv(root / content["vocabulary"]["file"])
    raise ValueError(f"{root}: no manifest tells of the parts {', '.join(record['parts'][:3])}")


def _wanted(
    plan: Plan, record: Mapping[str, Any], broken: Mapping[str, Sequence[str]]
) -> tuple[int, ...] | None:
    """The numbers of damaged parts in the plan; None, for all, where cells that are not to be kept matter."""
    if len(record["parts"]) != len(plan.places.splits) or plan.options.drop_duplicates:
        return None
    return tuple(number for number, part_id in enumerate(record["parts"]) if part_id in broken)


def _carry_out(job: Job, workers: int | None, n_cells: int, report: BuildProgress) -> None:
    """Reads what the wanted parts need and writes them; ``n_cells`` are theirs."""
    plan = job.plan
    reading: list[Task] = []
    for number, run in enumerate(plan.runs):
        if _has_wanted(job, run):
            reading.append(("map", number))
        else:
            _empty_fragment(job, number)
    parts = [task for task in job.last_tasks() if plan.only is None or task[1] in plan.only]
    report.stage("reading", sum(last - first for _, first, last in (plan.runs[n] for _, n in reading)), 0)
    with Processes(job) as processes:
        for tasks in (reading, job.middle_tasks(), parts):
            if tasks is parts:
                report.stage("writing", plan.n_cells if plan.only is None else n_cells, 0)
            n = min(n_workers(job, workers), len(tasks))
            if n > 1:
                beside(job, tasks, report, n, processes)
            else:
                here(job, tasks, report)


def _has_wanted(job: Job, run: tuple[int, int, int]) -> bool:
    """Whether a run of rows holds cells of the wanted parts. In a shuffled corpus every long run does."""
    plan = job.plan
    if plan.only is None:
        return True
    held = plan.places.held(*run, job.facts(run[0]).held)
    return bool(np.isin(plan.places.parts(plan.places.keys(*run), held), plan.only).any())


def _empty_fragment(job: Job, number: int) -> None:
    """What a map task leaves of rows that nobody wants."""
    none = np.zeros(len(job.plan.places.splits) + 1, np.int64)
    with whole_folder(job.path(("map", number))) as folder:
        for name in ("genes", "counts", "cells"):
            (folder / name).touch()
        (folder / "head.pkl").write_bytes(pickle.dumps(Head(np.dtype(np.uint8), none, none, none, {}), 5))


def _measured(root: pathlib.Path, work: pathlib.Path, state: _State, job: Job, dataset: str) -> str:
    name = state.measured[dataset]
    number = [study.name for study in job.studies].index(dataset)
    genes, ids = np.zeros(len(job.plan.vocabulary), np.uint8), job.facts(number).ids
    genes[ids[ids >= 0]] = 1
    buffer = io.BytesIO()
    np.save(buffer, np.packbits(genes, bitorder="little"))
    content = buffer.getvalue()
    if hash_bytes(content) != state.objects[name]:
        raise ValueError(
            f"{root / name}: the genes of {dataset} come out as others than the manifest tells of"
        )
    (root / name).parent.mkdir(exist_ok=True)
    write_durably(root / name, content, work / "measured.partial")
    return name


def _put_parts(root: pathlib.Path, job: Job, broken: Mapping[str, Sequence[str]]) -> list[str]:
    """Puts the objects of parts that came out as they were in the places of the damaged ones."""
    made = {}
    for task in job.last_tasks():
        if job.done(task):
            entry = json.loads((job.path(task) / "record.json").read_bytes())
            made[entry.get("id")] = job.path(task)
    other = [part_id for part_id in broken if part_id not in made]
    if other:
        raise ValueError(
            f"{root}: built again from the same sources, part {', '.join(other)} comes out with other bytes: "
            "another version of scjax, zarr or numcodecs made it; nothing was replaced. Install the version "
            "that the manifest names, or build the corpus again"
        )
    os.sync()  # what takes the place of damaged objects is on the disk before it does
    repaired = []
    for part_id, names in broken.items():
        for name in names:
            kind, _, rest = name.split("/", 2)
            source = made[part_id] / ("part.zarr" if kind == "parts" else "index") / rest
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, root / name)
            repaired.append(name)
    return repaired

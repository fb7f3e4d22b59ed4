"""Life of a corpus in one process: locks, what gc takes and what it leaves, what verify and info tell."""

import io
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import rich.console
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus, locks
from scjax.corpus import manifest as manifests
from scjax.corpus.append import append_corpus
from scjax.corpus.gc import gc_corpus
from scjax.corpus.index import write_index
from scjax.corpus.reader import CorruptDataError

TINY = {"part_cells": 64, "inner": 512, "shard": 2048, "progress": False}


def files(root: pathlib.Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    """A corpus that was added to twice, and the ids of its three states."""
    root = tmp_path_factory.mktemp("grown") / "c"
    states = [build_corpus(synthetic_adata(70, 40, seed=1), root, names=["a"], **TINY).manifest_id]
    for seed, name in ((2, "b"), (3, "c")):
        more = append_corpus(root, synthetic_adata(50, 40, seed=seed), names=[name], progress=False)
        states.append(more.manifest_id)
    return root, states


@pytest.fixture
def corpus(grown, tmp_path) -> tuple[pathlib.Path, list[str]]:
    shutil.copytree(grown[0], tmp_path / "c")
    return tmp_path / "c", grown[1]


# -- gc


def test_nothing_to_collect(corpus):
    root, states = corpus
    before = files(root)
    report = gc_corpus(root)
    assert (report.removed, report.bytes, files(root)) == ([], 0, before)
    assert report.kept == {
        states[2]: "it is the present state (HEAD)",
        states[1]: "it is an earlier state (drop_old removes those)",
        states[0]: "it is an earlier state (drop_old removes those)",
    }
    assert not (root / ".build").exists()


def litter(root: pathlib.Path) -> dict[str, int]:
    """What interrupted work leaves, and its sizes."""
    part = Corpus.open(root).parts[0]
    left = {
        "parts/0123456789ab.zarr/X/data/c/0": 100,
        "parts/0123456789ab.zarr/zarr.json": 1,
        f"parts/{part.id}.zarr/X/data/c/0.partial": 7,
        "index/0123456789ab/nnz.npy": 20,
        "index/measured/0123456789ab.npy": 3,
        "vocab/0123456789ab.tsv": 4,
        "manifests/HEAD.partial": 5,
        "manifests/.0123456789ab.json.partial": 6,
        "statistics/0123456789ab.npz": 8,
        "sources/0123456789ab.json": 9,
        ".build/0123456789abcdef/map-000000/genes": 1000,
    }
    for name, size in left.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(size))
    (root / ".build" / "lock").touch()  # of a process that was killed
    return left


def test_leftovers_go(corpus):
    root, _ = corpus
    before = files(root)
    left = litter(root)
    (root / "README.txt").write_text("what the users put here is theirs")
    (root / "parts" / "empty").mkdir()
    looked = gc_corpus(root, dry_run=True)
    assert files(root) == before | left.keys() | {"README.txt", ".build/lock"}
    report = gc_corpus(root)
    assert report == looked and report.bytes == sum(left.values())
    assert files(root) == before | {"README.txt"} and not (root / "parts" / "empty").exists()
    folders = {"parts/0123456789ab.zarr", "index/0123456789ab", ".build"}
    alone = {name for name in left if not any(name.startswith(f"{folder}/") for folder in folders)}
    assert set(report.removed) == folders | alone
    assert gc_corpus(root).removed == [] and Corpus.open(root).verify(progress=False) == []


def test_old_states_go_only_when_asked_and_only_what_is_theirs(corpus):
    root, states = corpus
    Corpus.open(root, states[0]).statistics(progress=False)
    Corpus.open(root).statistics(progress=False)
    before = files(root)
    report = gc_corpus(root, drop_old=True, keep=[states[1]])
    assert report.kept == {
        states[2]: "it is the present state (HEAD)",
        states[1]: "it was asked to stay",
    }
    assert set(report.removed) == {f"manifests/{states[0]}.json", f"statistics/{states[0]}.npz"}
    assert files(root) == before - set(report.removed)
    with pytest.raises(FileNotFoundError, match=f"no manifest '{states[0]}'"):
        Corpus.open(root, states[0])
    assert len(Corpus.open(root, states[1])) == 120 and len(Corpus.open(root)) == 170
    gc_corpus(root, drop_old=True)
    assert Corpus.open(root).verify(progress=False) == []
    # what made a part is needed to repair it, even when the state that brought it is gone
    assert {path.stem for path in (root / "sources").iterdir()} == set(states)


def test_objects_of_an_old_state_alone_go_with_it(corpus):
    """A state of two, of which the present one names only the newer parts."""
    root, states = corpus
    content = json.loads((root / "manifests" / f"{states[2]}.json").read_bytes())
    first = {part.id for part in Corpus.open(root, states[0]).parts}
    content["parts"] = [part for part in content["parts"] if part["id"] not in first]
    content["parent"] = states[2]
    manifest_id, text = manifests.encode(content)
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", text)
    manifests.commit(root, manifest_id)
    before = files(root)
    gc_corpus(root)
    assert files(root) == before
    report = gc_corpus(root, drop_old=True)
    assert {f"parts/{part}.zarr" for part in first} | {f"index/{part}" for part in first} <= set(
        report.removed
    )
    assert not any(part in name for name in files(root) for part in first)
    assert Corpus.open(root).read(slice(None)).n_obs == len(Corpus.open(root)) < 170


def test_a_state_that_never_became_the_present_one_goes(corpus):
    """An append that was stopped between its manifest and HEAD."""
    root, states = corpus
    (root / "HEAD").write_text(f"{states[1]}\n")
    shutil.rmtree(root / ".build", ignore_errors=True)
    newest = Corpus.open(root, states[2]).parts[-1].id
    report = gc_corpus(root)
    assert {f"manifests/{states[2]}.json", f"parts/{newest}.zarr"} <= set(report.removed)
    assert states[0] in report.kept and Corpus.open(root).verify(progress=False) == []
    # an old state stays, although the one between it and the present one is gone
    append_corpus(root, synthetic_adata(50, 40, seed=3), names=["d"], progress=False)
    gc_corpus(root, drop_old=True, keep=[states[0]])
    assert states[0] in gc_corpus(root).kept


def test_what_a_reader_has_open_stays(corpus):
    root, states = corpus
    reader = Corpus.open(root, states[0])
    report = gc_corpus(root, drop_old=True)
    assert report.kept[states[0]] == "a reader has it open" and states[1] not in report.kept
    part = reader.parts[0]
    del reader  # a part that is in use is enough
    assert states[0] in gc_corpus(root, drop_old=True).kept
    assert part.column("nnz").all()
    copy = pickle.loads(pickle.dumps(Corpus.open(root, states[0])))
    del part
    assert states[0] in gc_corpus(root, drop_old=True).kept
    assert len(copy) == 70
    del copy
    assert list(gc_corpus(root, drop_old=True).kept) == [states[2]]


def test_a_reader_that_nobody_sees_gets_a_clear_error(corpus, monkeypatch):
    """On another machine, on a file system without shared locks."""
    root, states = corpus
    content = json.loads((root / "manifests" / f"{states[0]}.json").read_bytes())
    assert content["parent"] is None
    with monkeypatch.context() as patch:
        patch.setattr(locks, "fcntl", None)
        reader = Corpus.open(root, states[0])
    rows = reader.read(slice(None)).X.toarray()
    report = gc_corpus(root, drop_old=True)
    assert states[0] not in report.kept
    np.testing.assert_array_equal(reader.read(slice(None)).X.toarray(), rows)  # its objects are still needed
    shutil.rmtree(reader.parts[0].path)
    shutil.rmtree(reader.parts[0].index)
    with pytest.raises(CorruptDataError, match="missing.*removed by gc"):
        Corpus(root, states[0], content, reader.store).read([0])


def test_gc_waits_for_nobody_and_disturbs_no_writer(corpus):
    root, _ = corpus
    left = litter(root)
    with (
        locks.writing(root),
        pytest.raises(FileExistsError, match="another build, append, repair or gc is writing there now"),
    ):
        gc_corpus(root)
    assert left.keys() <= files(root)
    assert gc_corpus(root).bytes == sum(left.values())


def test_gc_refuses_what_it_cannot_judge(corpus, tmp_path):
    root, states = corpus
    with pytest.raises(FileNotFoundError, match=r"no manifest '0123' to keep; there are: "):
        gc_corpus(root, keep=["0123"], drop_old=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        gc_corpus(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    old = root / "manifests" / f"{states[0]}.json"
    old.write_bytes(old.read_bytes()[:-5])
    before = files(root) | litter(root).keys()
    with pytest.raises(ValueError, match=f"{states[0]}.json: damaged"):
        gc_corpus(root)
    assert before <= files(root)
    gc_corpus(root, drop_old=True)  # nobody needs to know what it said
    assert Corpus.open(root).verify(progress=False) == []


# -- locks


def test_an_append_and_a_gc_between_two_steps_of_opening(corpus, monkeypatch):
    """HEAD is read, then a new state comes and the old one goes: the new one is opened."""
    root, states = corpus
    (root / "HEAD").write_text(f"{states[0]}\n")
    read = locks.read_manifest

    def slow(path, manifest_id=None):
        found = read(path, manifest_id)
        if found[0] == states[0]:
            (root / "HEAD").write_text(f"{states[2]}\n")
            (root / "manifests" / f"{states[0]}.json").unlink()
        return found

    monkeypatch.setattr(locks, "read_manifest", slow)
    assert Corpus.open(root).manifest_id == states[2]
    with pytest.raises(FileNotFoundError, match=f"no manifest '{states[0]}'"):
        Corpus.open(root, states[0])


def test_many_open_corpora_cost_a_descriptor_each_and_give_it_back(corpus):
    root, _ = corpus
    before = len(os.listdir("/proc/self/fd"))
    held = [Corpus.open(root) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del held
    assert len(os.listdir("/proc/self/fd")) == before


# -- verify, info


def test_verify_notes_leftovers_and_finds_old_states_damaged(corpus):
    root, states = corpus
    left = litter(root)
    found = Corpus.open(root).verify(progress=False)
    assert found == [] and len(found.notes) == 1
    assert (
        f"no manifest needs {len(left) - 1} files" in found.notes[0] and "gc removes them" in found.notes[0]
    )
    old = root / "manifests" / f"{states[0]}.json"
    old.write_bytes(old.read_bytes()[:-5])
    found = Corpus.open(root).verify(progress=False)
    assert len(found) == 1 and f"{states[0]}.json: damaged" in found[0] and found.notes == []


@pytest.mark.parametrize("workers", [1, 3])
def test_verify_finds_the_same_with_any_number_of_workers(corpus, workers):
    from scjax.corpus.verify import verify

    root, _ = corpus
    parts = Corpus.open(root).parts
    for part in parts[1:]:
        path = part.index / "total.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = verify(Corpus.open(root), progress=False, workers=workers)
    assert [line.partition(":")[0] for line in found] == [f"index/{part.id}/total.npy" for part in parts[1:]]


def test_verify_holds_the_totals_against_the_parts(corpus):
    root, states = corpus
    content = json.loads((root / "manifests" / f"{states[2]}.json").read_bytes())
    content["totals"]["nnz"] += 1
    content["totals"]["train"] -= 1
    manifest_id, text = manifests.encode(content)
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", text)
    found = Corpus.open(root, manifest_id).verify(progress=False)
    assert len(found) == 2 and "(nnz)" in found[0] and "(train)" in found[1]


def test_verify_holds_content_hashes_against_the_counts(tmp_path):
    cells = synthetic_adata(90, 40)
    root = build_corpus(cells, tmp_path / "c", drop_duplicates=True, **TINY).path
    assert Corpus.open(root).verify(progress=False) == []
    part = Corpus.open(root).parts[1]
    columns = {name: part.column(name) for name in part.arrays.names}
    columns["content"][[5, 6]] = columns["content"][[6, 5]]
    write_index(part.index, columns, columns["nnz"])
    content = Corpus.open(root).manifest
    for name in (entry := content["parts"][1]["objects"]):
        entry[name] = manifests.hash_object(root / name)
    manifest_id, text = manifests.encode(content)
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", text)
    found = Corpus.open(root, manifest_id).verify(progress=False)
    assert found == [f"part {part.id}: cell 5 has another hash than index/content.npy says"]


def test_info_tells_the_history_and_why_cells_are_not_there(corpus, tmp_path):
    root, states = corpus

    def text(opened: Corpus) -> str:
        console = rich.console.Console(width=160, file=io.StringIO())
        console.print(opened.info())
        return console.file.getvalue()

    said = text(Corpus.open(root))
    assert all(state in said for state in states) and "the cells are shuffled (seed 0)" in said
    gc_corpus(root, drop_old=True)
    assert states[1] in (said := text(Corpus.open(root))) and "removed" in said and states[0] not in said

    poor = synthetic_adata(60, 40, seed=5)
    poor.X.data[: poor.X.indptr[7]] = 0
    poor.write_h5ad(tmp_path / "poor.h5ad")
    said = text(build_corpus(tmp_path / "poor.h5ad", tmp_path / "d", min_genes=2, shuffle=False, **TINY))
    assert "7 empty" in said and "in the order of their sources" in said
    per_cell = (tmp_path / "poor.h5ad").stat().st_size / 60
    assert f"{per_cell:,.0f} bytes per cell" in said and "from" not in said

"""The tasks of a build: the same bytes whoever does them, in whatever order; failures keep finished work."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import tracemalloc

import anndata as ad
import h5py
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import sparse
from synthetic import synthetic_adata
from test_corpus import same_bytes, same_cells

from scjax.corpus import Corpus, CountsError, build_corpus, commit, engine, executors, plan, shuffle, tasks
from scjax.corpus.fragments import Fragment

TINY = {"part_cells": 64, "inner": 256, "shard": 1024, "progress": False}


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """Several map tasks out of a small file."""
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 1500)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[pathlib.Path]:
    folder = tmp_path_factory.mktemp("sources")
    paths = []
    for name, n_genes, layout in (("a", 40, "csr"), ("b", 50, "csc"), ("c", 45, "dense")):
        adata = synthetic_adata(90, n_genes, seed=len(paths))
        adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
        adata.obs["dose"] = np.arange(90) / 7
        adata.obsm["panel"] = np.random.default_rng(n_genes).random((90, 3), np.float32)
        paths.append(folder / f"{name}.h5ad")
        adata.write_h5ad(paths[-1])
    return paths


OPTIONS = {"validation": 0.2, "split_by": "donor", "drop_duplicates": True, "seed": 5} | TINY
OPTIONS["values"] = ["dose", "panel"]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> pathlib.Path:
    """The corpus, built in one go."""
    out = tmp_path_factory.mktemp("whole") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RUN_ELEMENTS", 1500)
        build_corpus(files, out, **OPTIONS, workers=1)
    assert Corpus.open(out).verify(progress=False) == []
    return out


def test_the_cells_are_those_of_the_sources(whole, files):
    corpus = Corpus.open(whole)
    assert len(corpus.parts) >= 5
    studies = {}
    for path in files:
        study = ad.read_h5ad(path)
        if not sparse.issparse(study.X):
            study.X = sparse.csr_matrix(study.X)
        study.X = study.X.tocsr()
        studies[path.stem] = study
    same_cells(corpus, studies)


def test_any_number_of_processes(whole, files, tmp_path):
    corpus = build_corpus(files, tmp_path / "c", **OPTIONS, workers=2)
    assert corpus.manifest_id == Corpus.open(whole).manifest_id
    same_bytes(whole, tmp_path / "c")


@hypothesis.given(st.randoms(use_true_random=False))
@hypothesis.settings(
    max_examples=4, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_order_of_tasks(whole, files, tmp_path_factory, random):
    out = tmp_path_factory.mktemp("order") / "c"
    done = []

    def shuffled(job, todo, report):
        todo = list(todo)
        random.shuffle(todo)
        done.extend(todo)
        executors.here(job, todo, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "here", shuffled)
        patch.setattr(plan, "RUN_ELEMENTS", 1500)
        build_corpus(files, out, **OPTIONS)
    assert len(done) >= 15 and {kind for kind, _ in done} == {"hash", "map", "duplicates", "part"}
    same_bytes(whole, out)


@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=4, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_shares_in_any_order(whole, files, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("shares") / "c"
    of = data.draw(st.integers(1, 4))
    corpus, rounds = None, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RUN_ELEMENTS", 1500)
        while corpus is None:
            rounds += 1
            for share in data.draw(st.permutations(range(of))):
                corpus = build_corpus(files, out, **OPTIONS, task=(share, of)) or corpus
        assert rounds <= 3
        # a share that comes late finds all done
        assert build_corpus(files, out, **OPTIONS, task=(0, of)).manifest_id == corpus.manifest_id
    same_bytes(whole, out)
    assert not (out / ".build").exists()


def test_shares_say_what_is_left(files, tmp_path, capsys):
    assert build_corpus(files, tmp_path / "c", **OPTIONS, task=(1, 3)) is None
    message = capsys.readouterr().err
    assert "share 1 of 3 is done; " in message and "tasks of reading are left" in message
    with pytest.raises(ValueError, match="the shares of 3 are 0 to 2"):
        build_corpus(files, tmp_path / "c", **OPTIONS, task=(3, 3))
    with pytest.raises(ValueError, match="needs sources in files; in memory: adata"):
        build_corpus(synthetic_adata(9, 9), tmp_path / "c", task=(0, 2))
    with pytest.raises(ValueError, match="exclude each other"):
        build_corpus(files, tmp_path / "c", task=(0, 2), workers=2)


SHARES = """
    import sys
    import time
    from scjax.corpus import build_corpus, plan
    plan.RUN_ELEMENTS = 1500
    out, share, *files = sys.argv[1:]
    options = {options}
    for _ in range(600):
        time.sleep(0.1)
        if build_corpus(files, out, **options, task=(int(share), 2)) is not None:
            break
    else:
        sys.exit("never complete")
"""


def test_two_shares_at_the_same_time(whole, files, tmp_path):
    code = textwrap.dedent(SHARES.format(options=OPTIONS))
    out = tmp_path / "c"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, out, str(share), *files], stderr=subprocess.PIPE, text=True
        )
        for share in range(2)
    ]
    for child in children:
        _, errors = child.communicate()
        assert child.returncode == 0, errors
    same_bytes(whole, out)


def test_on_a_dask_cluster(whole, files, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        build_corpus(files, tmp_path / "c", **OPTIONS, dask=cluster.scheduler_address)
        with pytest.raises(ValueError, match="'adata' is in the memory of this process"):
            build_corpus(synthetic_adata(9, 9), tmp_path / "d", dask=cluster.scheduler_address)
    same_bytes(whole, tmp_path / "c")


def test_dask_that_is_not_installed(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'scjax\[build\]'"):
        build_corpus(files, tmp_path / "c", **OPTIONS, dask="tcp://127.0.0.1:1")


# -- what goes wrong


def spoil(path: pathlib.Path, row: int) -> None:
    with h5py.File(path, "a") as file:
        at = int(file["X/indptr"][row])
        file["X/data"][at] = -1.0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_what_is_finished(tmp_path, monkeypatch, workers):
    path, out = tmp_path / "s.h5ad", tmp_path / "c"
    synthetic_adata(3000, 100).write_h5ad(path)
    spoil(path, 2990)  # beyond what the first look sees
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 40_000)
    options = TINY | {"part_cells": 3000}
    with pytest.raises(CountsError, match=r"row 2990 \(cell 'cell2990'\).*-1 is negative") as caught:
        build_corpus(path, out, **options, workers=workers)
    assert len(list(out.glob(".build/*/map-*"))) >= (2 if workers == 1 else 1)
    text = str(caught.value)
    assert "finished pieces of work are kept in" in text and f"remove {out}/.build" in text
    if workers == 2:
        assert "in a worker process" in caught.value.__notes__[0]
    assert not any("tmp-" in p.name for p in out.rglob("*")) or workers == 2
    with pytest.raises(FileNotFoundError, match="a build was interrupted here, run it again"):
        Corpus.open(out)


def test_a_rerun_goes_on_from_what_is_finished(files, whole, tmp_path, monkeypatch):
    out, written = tmp_path / "c", []

    def failing(folder, *args):
        if len(written) == 2:
            raise RuntimeError("out of coffee")
        written.append(folder)
        shuffle.write_part(folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_part", failing)
        with pytest.raises(RuntimeError, match="out of coffee; .* the same command goes on from there"):
            build_corpus(files, out, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_fragment", lambda *_: pytest.fail("a fragment was made twice"))
        patch.setattr(
            tasks, "write_part", lambda folder, *a: [written.append(folder), shuffle.write_part(folder, *a)]
        )
        build_corpus(files, out, **OPTIONS)
    assert len(written) == len(Corpus.open(out).parts)
    same_bytes(whole, out)


def test_another_plan_takes_the_place_of_what_was_left(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr("scjax.corpus.manifest.commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # in the last step: the parts have their places already
            build_corpus(files, out, **OPTIONS)
    assert (out / "parts").is_dir() and not (out / "HEAD").exists()
    build_corpus(files, out, **OPTIONS | {"seed": 6})
    assert "removing the unfinished work of another plan" in capsys.readouterr().err
    build_corpus(files, tmp_path / "d", **OPTIONS | {"seed": 6})
    same_bytes(tmp_path / "d", out)


def test_a_source_that_changed_makes_another_plan(files, tmp_path):
    path = tmp_path / "s.h5ad"
    synthetic_adata(80, 40).write_h5ad(path)
    assert build_corpus(path, tmp_path / "c", **TINY, task=(1, 2)) is None
    synthetic_adata(80, 40, seed=3).write_h5ad(path)
    build_corpus(path, tmp_path / "c", **TINY)
    same_cells(Corpus.open(tmp_path / "c"), {"s": synthetic_adata(80, 40, seed=3)})


def test_two_builders(files, tmp_path):
    out = tmp_path / "c"
    with engine.locks.writing(out):
        for how in ({}, {"task": (0, 2)}):
            with pytest.raises(FileExistsError, match="is writing there now"):
                build_corpus(files, out, **OPTIONS, **how)
    with engine._holding(out, together=True) as hold:
        (hold.work / "another-plan").mkdir()
        with pytest.raises(FileExistsError, match="is writing there now"):
            build_corpus(files, out, **OPTIONS)
        with pytest.raises(FileExistsError, match="the work of another plan lies in"):
            build_corpus(files, out, **OPTIONS, task=(0, 2))
    assert build_corpus(files, out, **OPTIONS) is not None


@pytest.mark.parametrize("before_it_is_told", [False, True])
def test_a_worker_that_dies(files, tmp_path, monkeypatch, before_it_is_told):
    monkeypatch.setattr(executors, "_START", "import os; os._exit(3)")
    if before_it_is_told:
        get = executors.Processes.get

        def late(self, n):
            children = get(self, n)
            for child in children.values():
                child.wait()
            return children

        monkeypatch.setattr(executors.Processes, "get", late)
    with pytest.raises(RuntimeError, match=r"a worker process ended \(status 3\) at .*use fewer workers"):
        build_corpus(files, tmp_path / "c", **OPTIONS, workers=2)


def test_damaged_work_is_found(files, tmp_path):
    """A fragment that changed after it was written, as a power cut may leave it."""
    out = tmp_path / "c"
    options = OPTIONS | {"drop_duplicates": False}
    for share in range(2):
        build_corpus(files, out, **options, task=(share, 2))
    panel = next(out.glob(".build/*/map-*/values-1"))
    kept = panel.read_bytes()
    panel.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(OSError, match=r"map-0000\d\d: values-1 have changed since they were written; remove"):
        build_corpus(files, out, **options)
    panel.write_bytes(kept)
    genes = next(out.glob(".build/*/map-*/genes"))
    content = bytearray(genes.read_bytes())
    content[len(content) // 2] ^= 1
    genes.write_bytes(content)
    with pytest.raises(OSError, match=r"map-0000\d\d: genes have changed since they were written; remove it"):
        build_corpus(files, out, **options)
    os.truncate(genes, len(content) // 2)
    with pytest.raises(OSError, match="cut short"):
        build_corpus(files, out, **options)


def test_a_part_that_a_power_cut_spoiled_is_made_again(files, whole, tmp_path, monkeypatch):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(commit, "_datasets", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(files, out, **OPTIONS)
    shard = sorted(out.glob(".build/*/part-*/part.zarr/X/data/c/0"))[2]
    os.truncate(shard, 0)
    with pytest.raises(OSError, match="X/data/c/0: is not as it was written; the part is made again"):
        build_corpus(files, out, **OPTIONS)
    build_corpus(files, out, **OPTIONS)
    same_bytes(whole, out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(
            f"FULL DISK NOT TESTED: this process may not mount a small file system ({mount.stderr.strip()})"
        )
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(("cells", "stage"), [(9000, "map"), (1900, "part")])
def test_a_full_disk(small_disk, tmp_path, cells, stage):
    path = tmp_path / "s.h5ad"
    adata = synthetic_adata(cells, 120)
    adata.obs = adata.obs[["donor"]]
    adata.write_h5ad(path)
    options = TINY | {"part_cells": 256, "shard": 4096}
    out = small_disk / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RUN_ELEMENTS", 40_000)
        with pytest.raises(OSError, match="the disk is full: about .* MiB are needed") as caught:
            build_corpus(path, out, **options)
        assert caught.value.errno == errno.ENOSPC and "1 MiB were free at the start" in str(caught.value)
        assert "the same command goes on from there" in str(caught.value)
        folder = next((out / ".build").iterdir())
        assert list(folder.glob(f"{stage}-*")) and not list(folder.glob("tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        build_corpus(path, out, **options)
        build_corpus(path, tmp_path / "clean", **options)
    same_bytes(tmp_path / "clean", out)


def test_memory_of_writing_a_part_is_bounded_by_a_shard(tmp_path, monkeypatch):
    """A part of 2.4 million stored values (14 MB of fragments) is written with less than 3 MB."""
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 2**19)
    rng = np.random.default_rng(0)
    genes = np.sort(rng.permuted(np.tile(np.arange(3000), (1000, 1)), axis=1)[:, :2400], axis=1)
    counts = rng.integers(256, 9000, genes.size).astype(np.float32)
    x = sparse.csr_matrix((counts, genes.ravel(), np.arange(1001) * 2400), shape=(1000, 3000))
    with pytest.MonkeyPatch.context() as patch:
        peaks = []

        def measured(folder, plan_, part, fragments, *rest):
            assert sum(os.path.getsize(f.folder / n) for f in fragments for n in ("genes", "counts")) > 9e6
            tracemalloc.start()
            try:
                shuffle.write_part(folder, plan_, part, fragments, *rest)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()

        patch.setattr(tasks, "write_part", measured)
        corpus = build_corpus(ad.AnnData(x), tmp_path / "c", inner=2**14, shard=2**16, progress=False)
    assert len(corpus.parts) == 1 and corpus.parts[0].nnz == 2_400_000
    assert len(peaks) == 1 and peaks[0] < 3e6, peaks


def test_a_fragment_is_sorted_by_part(files, tmp_path):
    build_corpus(files, tmp_path / "c", **OPTIONS, task=(0, 1))  # all of it
    for share in range(2):
        build_corpus(files, tmp_path / "d", **OPTIONS, task=(share, 2))
    folder = next((tmp_path / "d" / ".build").glob("?" * 12))
    job = tasks.Job(tmp_path / "d", folder)
    assert len(job.plan.runs) > 4
    for number, (_, first, last) in enumerate(job.plan.runs):
        fragment = Fragment(job.path(("map", number)))
        assert fragment.head.rows[-1] + sum(fragment.head.dropped.values()) == last - first
        for part in range(len(job.plan.places.splits)):
            cells = fragment.cells(part)
            n = int(fragment.head.rows[part + 1] - fragment.head.rows[part])
            assert (0 if cells is None else len(cells["key"])) == n
            assert cells is None or (np.diff(cells["key"].astype(object)) > 0).all()


def test_progress_says_what_is_read_and_written(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    said = []

    class Heard(engine.BuildProgress):
        def __call__(self, task, cells):
            super().__call__(task, cells)
            said.extend(row.description for row in self._bar.tasks)

    monkeypatch.setattr(engine, "BuildProgress", Heard)
    build_corpus(files, tmp_path / "c", **OPTIONS | {"progress": True}, workers=2)
    lines = capsys.readouterr().err.splitlines()
    for line, what in zip(lines[-2:], ("reading 3 sources", "writing 5 parts"), strict=True):
        assert what in line and "270/270 cells" in line and "cells/s" in line
    assert {"reading a, b", "writing part 1, 2 of 5"} <= set(said)


def test_a_word_on_what_is_kept_does_not_hide_an_error(tmp_path):
    (tmp_path / "map-000000").mkdir()
    kept = "1 finished pieces of work are kept"
    assert kept in str(engine._with_word(ValueError("bad"), tmp_path))
    error = json.JSONDecodeError("bad", "{", 1)  # cannot be made again of its message alone
    assert engine._with_word(error, tmp_path) is error

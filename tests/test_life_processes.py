"""Real processes on a corpus: readers while it grows and is cleaned, writers that meet, kills, full disks."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus
from scjax.corpus import manifest as manifests
from scjax.corpus.append import append_corpus
from scjax.corpus.gc import gc_corpus
from scjax.corpus.repair import repair_corpus

TINY = {"part_cells": 64, "inner": 512, "shard": 2048, "progress": False}
HERE = pathlib.Path(__file__).parent


def start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )


def grow(root: pathlib.Path, name: str, n_cells: int = 50) -> Corpus:
    cells = synthetic_adata(n_cells, 40, seed=sum(map(ord, name)))
    return append_corpus(root, cells, names=[name], progress=False)


READER = """
    import hashlib, sys
    from scjax.corpus import Corpus
    from scjax.loader import Loader
    from scjax.types import FIELDS
    corpus = Corpus.open(sys.argv[1])
    def epoch():
        found = hashlib.sha256()
        for batch in Loader(corpus, 16, seed=1, epochs=1, prefetch=2):
            for name in FIELDS:
                values = getattr(batch, name)
                for array in values.values() if isinstance(values, dict) else [values]:
                    found.update(array.tobytes())
        cells = corpus.read(slice(None))
        found.update(cells.X.indices.tobytes() + cells.X.data.tobytes() + str(cells.obs).encode())
        return found.hexdigest()
    first = epoch()
    print(corpus.manifest_id, flush=True)
    for _ in sys.stdin:  # a line for every epoch that is asked for
        assert epoch() == first
        print("same", flush=True)
"""


def test_readers_go_on_while_a_corpus_grows_and_is_cleaned(tmp_path):
    root = tmp_path / "c"
    oldest = build_corpus(synthetic_adata(150, 40), root, **TINY).manifest_id
    states = [oldest]
    with start(READER, root) as of_old:
        assert of_old.stdout.readline() == f"{oldest}\n", of_old.stderr.read()
        states.append(grow(root, "more").manifest_id)
        with start(READER, root) as of_new:
            assert of_new.stdout.readline() == f"{states[1]}\n", of_new.stderr.read()
            for name in ("still more", "and more"):
                for reader in (of_old, of_new):  # while they read, the corpus changes under them
                    reader.stdin.write("go\n")
                    reader.stdin.flush()
                states.append(grow(root, name).manifest_id)
                report = gc_corpus(root, drop_old=True)
                assert report.kept == {
                    states[-1]: "it is the present state (HEAD)",
                    **dict.fromkeys(states[:2], "a reader has it open"),
                }
                for reader in (of_old, of_new):
                    assert reader.stdout.readline() == "same\n", reader.stderr.read()
            of_new.stdin.close()
            assert of_new.wait() == 0
        assert list(gc_corpus(root, drop_old=True).kept) == [states[-1], oldest]
        of_old.send_signal(signal.SIGKILL)  # the lock goes with the process, however it ends
        of_old.wait()
    assert list(gc_corpus(root, drop_old=True).kept) == [states[-1]]
    assert Corpus.open(root).verify(progress=False) == []


def test_a_fork_shares_the_lock_of_its_parent(tmp_path):
    """It ends when both have let go, in whatever order."""
    manifest = tmp_path / "m.json"
    manifest.touch()
    code = """
        import os, pathlib, sys
        from scjax.corpus import locks
        path = pathlib.Path(sys.argv[1])
        def free():
            with locks.unread(path) as nobody:
                return nobody
        for child_first in (True, False):
            lock = locks.ReaderLock(path)
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(write)
                os.read(read, 1)
                del lock
                os._exit(0)
            if child_first:
                os.close(write)
                os.waitpid(child, 0)
                print(free(), end=" ")
                del lock
            else:
                del lock
                print(free(), end=" ")
                os.close(write)
                os.waitpid(child, 0)
            os.close(read)
            print(free(), end=" ")
    """
    with start(code, manifest) as child:
        said, complaint = child.communicate()
    assert said == "False True False True ", complaint


WRITER = """
    import sys
    from scjax.corpus import build_corpus
    from scjax.corpus.append import append_corpus
    from synthetic import synthetic_adata
    what, root, name = sys.argv[1:]
    cells = synthetic_adata(300, 40, seed=sum(map(ord, name)))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        if what == "build":
            build_corpus(cells, root, names=[name], part_cells=64, inner=512, shard=2048, progress=False)
        else:
            append_corpus(root, cells, names=[name], progress=False)
        print("done", flush=True)
    except FileExistsError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("what", ["build", "append"])
def test_two_writers_on_one_corpus(tmp_path, what):
    """One does its work, the other says why not; two appends may also follow one another."""
    root = tmp_path / "c"
    if what == "append":
        build_corpus(synthetic_adata(100, 40), root, **TINY)
    with start(WRITER, what, root, "one") as one, start(WRITER, what, root, "two") as two:
        for writer in (one, two):
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        for writer in (one, two):
            writer.stdin.write("go\n")
            writer.stdin.flush()
        said = [writer.stdout.readline() for writer in (one, two)]
        ended = [writer.communicate() for writer in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0), ended
    corpus = Corpus.open(root)
    done = [name for name, words in zip(("one", "two"), said, strict=True) if words == "done\n"]
    assert [name for name in corpus.datasets if name in ("one", "two")] in (done, done[::-1]) and done
    refused = [words for words in said if words != "done\n"]
    assert all("writing there now" in words or "holds a corpus already" in words for words in refused)
    assert len(refused) == 1 or what == "append"
    assert len(corpus) == (100 if what == "append" else 0) + 300 * len(done)
    found = corpus.verify(progress=False)
    assert found == [] and found.notes == []


def test_gc_while_an_append_is_under_way(tmp_path):
    root = tmp_path / "c"
    build_corpus(synthetic_adata(100, 40), root, **TINY)
    code = """
        import sys
        from scjax.corpus import tasks
        from scjax.corpus.append import append_corpus
        from synthetic import synthetic_adata
        write = tasks.write_part
        def stop(*arguments):
            print("reached", flush=True)
            sys.stdin.readline()
            return write(*arguments)
        tasks.write_part = stop
        append_corpus(sys.argv[1], synthetic_adata(50, 40, seed=1), names=["b"], workers=1, progress=False)
    """
    with start(code, root) as child:
        assert child.stdout.readline() == "reached\n", child.stderr.read()
        with pytest.raises(FileExistsError, match="writing there now"):
            gc_corpus(root)
        with pytest.raises(FileExistsError, match="writing there now"):
            gc_corpus(root, dry_run=True)
        assert len(Corpus.open(root)) == 100
        child.communicate("go\n")
        assert child.returncode == 0
    assert Corpus.open(root).datasets == ["adata", "b"] and gc_corpus(root).removed == []

    with start(code.replace('["b"]', '["c"]').replace("seed=1", "seed=2"), root) as child:
        assert child.stdout.readline() == "reached\n", child.stderr.read()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (root / ".build").is_dir()
    assert gc_corpus(root).removed == [".build"] and not (root / ".build").exists()
    grow(root, "c")
    assert Corpus.open(root).verify(progress=False) == []


# One interpreter that forks for every point: what costs is importing, not gc.
KILLER = """
    import os, pathlib, shutil, signal, sys
    from scjax.corpus import Corpus
    from scjax.corpus.gc import gc_corpus
    root, work, clean = map(pathlib.Path, sys.argv[1:])
    def tree(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    def strike(point):
        left = point
        def struck(function):
            def counting(*arguments, **options):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*arguments, **options)
            return counting
        for name in ("unlink", "rmdir", "rename", "fsync"):
            setattr(os, name, struck(getattr(os, name)))
    point = 0
    while True:
        shutil.copytree(root, work)
        child = os.fork()
        if child == 0:
            strike(point)
            gc_corpus(work, drop_old=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, status
        there = [path.stem for path in (work / "manifests").glob("*.json")]
        assert Corpus.open(work).manifest_id in there
        for manifest in there:  # whatever is there can be read to the last cell
            corpus = Corpus.open(work, manifest)
            assert len(corpus.read(slice(None))) == len(corpus)
        assert Corpus.open(work).verify(progress=False) == []
        del corpus
        gc_corpus(work, drop_old=True)
        assert tree(work) == tree(clean), set(tree(work)) ^ set(tree(clean))
        shutil.rmtree(work)
        if not killed:
            print(point, flush=True)
            break
        point += 1 if point < 12 else 7  # manifests and work first, then one object after another
"""


def test_a_gc_that_is_killed_anywhere_leaves_whole_states_and_is_finished_by_the_next(tmp_path):
    """Killed before the system calls by which it changes something."""
    root = tmp_path / "c"
    first = build_corpus(synthetic_adata(60, 40), root, **TINY)
    last = grow(root, "b", 40)
    # a present state that does not name the first parts, so that gc has objects to remove
    content = dict(last.manifest)
    old = {part.id for part in first.parts}
    content |= {
        "parts": [part for part in content["parts"] if part["id"] not in old],
        "parent": last.manifest_id,
    }
    content["datasets"] = [
        dict(entry, n_cells=0 if entry["name"] == "adata" else entry["n_cells"])
        for entry in content["datasets"]
    ]
    totals = {"n_cells": 40, "train": 40, "validation": 0, "nnz": sum(p["nnz"] for p in content["parts"])}
    content["totals"] = content["totals"] | totals
    manifest_id, text = manifests.encode(content)
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", text)
    manifests.commit(root, manifest_id)
    del first, last
    for name in (
        ".build/0123/map-000000/genes",
        ".build/0123/part-000000/record.json",
        "index/stray/nnz.npy",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"left")
    shutil.copytree(root, tmp_path / "clean")
    gc_corpus(tmp_path / "clean", drop_old=True)
    assert not old & {path.name for path in (tmp_path / "clean" / "index").iterdir()}

    with start(KILLER, root, tmp_path / "work", tmp_path / "clean") as child:
        said, complaint = child.communicate()
        assert child.returncode == 0, complaint
    assert int(said) > 60  # places where it was killed


@pytest.mark.parametrize("place", ["building", "placing"])
def test_a_repair_that_is_killed_leaves_no_half_and_is_finished_by_the_next(tmp_path, place):
    root = tmp_path / "c"
    synthetic_adata(150, 40).write_h5ad(tmp_path / "cells.h5ad")
    build_corpus(tmp_path / "cells.h5ad", root, **TINY)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    damaged = [part.index / name for part in Corpus.open(root).parts for name in ("nnz.npy", "total.npy")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-8] + b"ABCDEFGH")
    code = """
        import os, signal, sys
        from scjax.corpus import repair, tasks
        left = int(sys.argv[3])
        where, name = (tasks, "write_part") if sys.argv[2] == "building" else (os, "replace")
        function = getattr(where, name)
        def counting(*arguments):
            global left
            if sys.argv[2] == "building" or "repair-" in str(arguments[0]) and "part-" in str(arguments[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return function(*arguments)
        setattr(where, name, counting)
        repair.repair_corpus(sys.argv[1], progress=False)
    """
    with start(code, root, place, 2) as child:
        _, complaint = child.communicate()
        assert child.returncode == -signal.SIGKILL, complaint
    changed = [path for path in damaged if path.read_bytes() != before[path]]
    assert len(changed) == len(damaged) - (2 if place == "placing" else 0)
    assert sorted(repair_corpus(root, progress=False)) == sorted(str(p.relative_to(root)) for p in changed)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=4k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"FULL DISK NOT TESTED: may not mount a file system ({mounted.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("n_cells", [400, 2500], ids=["while writing", "while reading"])
def test_a_disk_that_is_full_during_an_append(small_disk, n_cells):
    root = small_disk / "c"
    before = build_corpus(synthetic_adata(60, 200), root, **TINY)
    rows = before.read(slice(None)).X.toarray()
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as file:  # leaves about 400 KiB
        stat = os.statvfs(small_disk)
        file.write(bytes(stat.f_bavail * stat.f_frsize - 400 * 1024))
    with pytest.raises(OSError, match="the disk is full") as caught:
        append_corpus(root, synthetic_adata(n_cells, 200, seed=1), names=["b"], progress=False)
    assert caught.value.errno == errno.ENOSPC
    for corpus in (before, Corpus.open(root)):
        assert (
            corpus.manifest_id == before.manifest_id and (corpus.read(slice(None)).X.toarray() == rows).all()
        )
    assert Corpus.open(root).verify(progress=False) == []
    gc_corpus(root)  # frees what the append has left, in a full disk
    assert not (root / ".build").exists() and Corpus.open(root).verify(progress=False).notes == []
    ballast.unlink()
    assert len(append_corpus(root, synthetic_adata(90, 200, seed=1), names=["b"], progress=False)) == 150

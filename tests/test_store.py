"""Where a corpus is read from: folders, plain HTTP, and the cache that keeps what was read."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from loading import build, study, two_studies

from scjax.corpus import Corpus, append_corpus, build_corpus
from scjax.corpus.cache import CachedStore, _Ranges, shrink
from scjax.corpus.gc import gc_corpus
from scjax.corpus.reader import PartReader
from scjax.corpus.remote import Patience
from scjax.corpus.repair import repair_corpus
from scjax.corpus.store import CorruptDataError, LocalStore, StoreError, open_store

QUICK = Patience(timeout=5.0, total=5.0, attempts=3, pause=0.01)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Corpus:
    few = {"part_cells": 700, "inner": 2**11, "shard": 2**14}  # objects
    return build(two_studies(), tmp_path_factory.mktemp("corpus") / "c", validation=0.2, **few)


@pytest.fixture
def server(file_server, local):
    return file_server(local.path)


def same(a: Corpus, b: Corpus, rows=slice(None)) -> None:
    x, y = a.read(rows), b.read(rows)
    assert (x.X != y.X).nnz == 0 and x.obs.equals(y.obs) and x.var.equals(y.var)


def spans(requests, where=""):
    """Path -> sorted (first, last) of the ranges asked for."""
    found = {}
    for path, span in requests:
        if span and where in path:
            first, last = span.removeprefix("bytes=").split("-")
            found.setdefault(path, []).append((int(first), int(last)))
    return {path: sorted(ranges) for path, ranges in found.items()}


# ---- without a cache


def test_a_corpus_over_http_is_the_corpus(server, local):
    far = Corpus.open(server.url, cache=False)
    assert [path for path, _ in server.requests] == ["/HEAD", f"/manifests/{local.manifest_id}.json"]
    assert (len(far), far.path, far.manifest_id) == (len(local), server.url, local.manifest_id)
    assert far.vocabulary == local.vocabulary and far.obs.equals(local.obs)
    assert (far.measured_table() == local.measured_table()).all()
    rows = np.random.default_rng(0).integers(0, len(local), 300)
    same(far, local, rows)
    same(far, local)
    for ours, theirs in zip(far.parts, local.parts, strict=True):
        for name in theirs.arrays.names:
            np.testing.assert_array_equal(ours.column(name, 7, 30), theirs.column(name, 7, 30))
    assert far.verify(progress=False) == []
    np.testing.assert_array_equal(
        far.statistics(progress=False).median, local.statistics(progress=False).median
    )


def test_a_url_of_a_folder(local):
    assert isinstance(open_store(f"file://{local.path}"), LocalStore)
    same(Corpus.open(f"file://{local.path}"), local, [3, 1])


def test_neighbouring_chunks_are_one_request(server, local):
    far = Corpus.open(server.url, cache=False)
    part = far.parts[0]
    indices, data = np.empty(part.nnz, part.index_dtype), np.empty(part.nnz, part.x_dtype)
    server.requests.clear()
    PartReader(part).read_spans([(0, part.nnz)], indices, data)
    asked = spans(server.requests)
    assert len(asked) == 2 * -(-part.nnz // 2**14) > 4  # shards of both arrays
    assert part.nnz / part.inner > 2 * len(asked)  # of several chunks each
    assert all(len(ranges) == 2 for ranges in asked.values())  # the index of the shard, then its chunks
    expected = np.empty(part.nnz, part.index_dtype)
    PartReader(local.parts[0]).indices.read(0, part.nnz, expected)
    np.testing.assert_array_equal(indices, expected)


def test_what_is_no_corpus_is_said(server, tmp_path, file_server, local):
    with pytest.raises(FileNotFoundError, match=f"{server.url}/nowhere: no file HEAD, so no complete corpus"):
        Corpus.open(f"{server.url}/nowhere", cache=False, patience=QUICK)
    with pytest.raises(FileNotFoundError, match=r"no manifest '0123456789ab'$"):
        Corpus.open(server.url, "0123456789ab", cache=False)
    with pytest.raises(ValueError, match="gopher://x: no object store can be made of it"):
        Corpus.open("gopher://x")
    shutil.copytree(local.path, tmp_path / "c")
    (tmp_path / "c" / "HEAD").write_text("a page about something else\n")
    for where in (tmp_path / "c", file_server(tmp_path / "c").url):
        with pytest.raises(ValueError, match="HEAD: damaged: 'a page about something else' names no"):
            Corpus.open(where)


def test_a_server_without_ranges_is_told(server):
    server.ranges = False
    far = Corpus.open(server.url, cache=False)
    with pytest.raises(StoreError, match=r"nnz.npy: reading .* must answer requests for ranges of a file"):
        far.read([0])
    assert len([path for path, span in server.requests if "nnz.npy" in path and span]) == 1


WRITERS = {
    "append": lambda url: append_corpus(url, [study(20, 0)]),
    "build": lambda url: build_corpus([study(20, 0)], url),
    "gc": gc_corpus,
    "repair": repair_corpus,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_url_is_not_written_to(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="s3://b/c: a corpus is built, added to, .* in a folder; copy"):
        write("s3://b/c")
    assert list(tmp_path.iterdir()) == []


def test_nobody_listens():
    pytest.importorskip("obstore")
    with pytest.raises(StoreError, match=r"127.0.0.1:9/HEAD: reading it failed 3 times in .* s, the last"):
        Corpus.open("http://127.0.0.1:9", cache=False, patience=QUICK)


def test_without_obstore_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r"reading s3://b/c needs obstore: pip install 'scjax\[remote\]'"):
        Corpus.open("s3://b/c")


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("lost", ["X/data/c/0", "X/data/zarr.json", "obs/_index/c/0", "index"])
def test_a_part_that_was_removed_is_said_to_be(local, tmp_path, file_server, lost, far):
    shutil.copytree(local.path, tmp_path / "c")
    corpus = Corpus.open(file_server(tmp_path / "c").url if far else tmp_path / "c", cache=False)
    part = corpus.parts[0]
    name = f"index/{part.id}/nnz.npy" if lost == "index" else f"parts/{part.id}.zarr/{lost}"
    (tmp_path / "c" / name).unlink()
    with pytest.raises(CorruptDataError, match=f"part {part.id}.*{lost}.* is missing: .*removed by gc since"):
        corpus.read([0])


# ---- the cache


def test_what_was_read_is_not_asked_for_again(server, local, tmp_path):
    first = Corpus.open(server.url, cache=tmp_path / "cache")
    same(first, local, np.arange(0, len(local), 5))
    same(first, local)
    assert first.obs.equals(local.obs) and first.vocabulary == local.vocabulary
    for path, ranges in spans(server.requests, "/c/").items():
        assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False)), path
    whole = [path for path, span in server.requests if not span and path != "/HEAD"]
    assert len(set(whole)) == len(whole)
    server.requests.clear()
    again = pickle.loads(pickle.dumps(Corpus.open(server.url, cache=tmp_path / "cache")))
    same(again, local)
    assert again.obs.equals(local.obs) and again.vocabulary == local.vocabulary
    assert [path for path, _ in server.requests] == ["/HEAD"]


def test_the_default_place_of_the_cache(server, local, tmp_path):
    Corpus.open(server.url)
    copy = tmp_path / "default-cache" / "manifests" / f"{local.manifest_id}.json"
    assert copy.read_bytes() == (local.path / "manifests" / copy.name).read_bytes()


def test_any_damage_to_the_cache_is_mended(server, local, tmp_path):
    cache = tmp_path / "cache"
    same(Corpus.open(server.url, cache=cache), local)
    copies = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "lock")
    rng = np.random.default_rng(1)
    assert len(copies) > 50
    for turn in range(6):
        for path in copies:
            content = bytearray(path.read_bytes())
            if turn == 4:
                content = content[: len(content) // 2]
            elif turn == 5:
                content = content[:-1]
            else:
                # near the end of a shard's copy is the list of what is there
                at = rng.integers(len(content)) if turn < 2 else len(content) - 1 - rng.integers(20 * turn)
                content[max(at, 0)] ^= 1 << rng.integers(8)
            path.write_bytes(content)
        same(Corpus.open(server.url, cache=cache), local)
    server.requests.clear()
    same(Corpus.open(server.url, cache=cache), local)
    assert [path for path, _ in server.requests] == ["/HEAD"]  # all is well again


def test_damaged_copies_that_cannot_be_replaced_are_passed_by(server, local, tmp_path):
    cache = tmp_path / "cache"
    same(Corpus.open(server.url, cache=cache), local)
    damaged = [path for path in cache.rglob("*") if ".npy." in path.name or "/c/" in str(path)]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    far = Corpus.open(server.url, cache=cache)
    with (
        pytest.warns(RuntimeWarning, match="goes on without keeping") as said,
        far.store.filling(1),
    ):
        raise OSError("the disk is gone")
    same(far, local)
    same(far, local, [3, 700])
    assert len(said) == 1 and len(damaged) > 10


def test_threads_share_a_cache(server, local, tmp_path):
    corpora = [Corpus.open(server.url, cache=tmp_path / "cache") for _ in range(2)]

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, len(local), 150)
        same(corpora[seed % 2], local, rows)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(16)))
    assert not corpora[0].store._under_way


def test_threads_of_one_store_fetch_a_range_once(server, local, tmp_path):
    corpus = Corpus.open(server.url, cache=tmp_path / "cache")
    name = f"parts/{corpus.parts[0].id}.zarr/X/data/c/0"
    entry = corpus.parts[0].objects[name]
    whole = np.fromfile(local.path / name, np.uint8)
    gate = threading.Barrier(6)

    def read(number):
        out = np.empty(whole.size - 10 * number, np.uint8)
        gate.wait()
        corpus.store.open(name, entry).readinto(10 * number, out)
        np.testing.assert_array_equal(out, whole[10 * number :])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    ranges = spans(server.requests)[f"/{name}"]
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))


def test_two_processes_share_a_cache(server, local, tmp_path):
    code = f"""
import sys
import numpy as np
from scjax.corpus import Corpus, append_corpus, build_corpus
for turn in range(3):
    far = Corpus.open({server.url!r}, cache={str(tmp_path / "cache")!r}, cache_bytes=400_000)
    rows = np.random.default_rng([int(sys.argv[1]), turn]).integers(0, len(far), 200)
    assert (far.read(rows).X != Corpus.open({str(local.path)!r}).read(rows).X).nnz == 0
print("done")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    runs = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=240)
        assert (run.returncode, out) == (0, "done\n"), err
    same(Corpus.open(server.url, cache=tmp_path / "cache"), local)


def held(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()}


def test_a_cache_stays_small_and_its_readers_go_on(server, local, tmp_path):
    cache = tmp_path / "cache"
    same(Corpus.open(server.url, cache=cache), local)
    full = sum(held(cache).values())
    limit = full // 2
    # a reader that was there before, and holds what is now taken away under it
    before = Corpus.open(server.url, cache=cache)
    reader = PartReader(before.parts[0])
    genes, counts = np.empty(before.parts[0].nnz, "u4"), np.empty(before.parts[0].nnz, "f4")
    reader.read_spans([(0, 2000)], genes, counts)
    shards = [path for path in held(cache) if "/X/" in str(path)]
    for path in shards[: len(shards) // 2]:
        os.utime(path, (0, 0))
    bounded = Corpus.open(server.url, cache=cache, cache_bytes=limit)
    bounded.store._count(1)
    there = held(cache)
    assert sum(there.values()) <= limit
    assert not set(shards[: len(shards) // 2]) & set(there)  # what was not used for longest went first
    server.requests.clear()
    reader.read_spans([(0, len(genes))], genes, counts)
    expected = np.empty_like(genes), np.empty_like(counts)
    PartReader(local.parts[0]).read_spans([(0, len(genes))], *expected)
    np.testing.assert_array_equal(genes, expected[0])
    np.testing.assert_array_equal(counts, expected[1])
    for _ in range(3):
        same(bounded, local)
        assert sum(held(cache).values()) <= limit + limit // 8 + 65536


def test_a_bounded_cache_takes_away_its_own_files_only(server, local, tmp_path):
    cache = tmp_path / "cache"
    other = [cache / name for name in ("study.h5ad", "sub/deep.bin", "parts/list.txt", "manifests/plan.json")]
    for path in other:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100_000)
    same(Corpus.open(server.url, cache=cache), local)
    shrink(cache, 1)
    assert {path for path in held(cache) if path.name != "lock"} == set(other)
    before = held(local.path)
    shrink(local.path, 1)
    assert held(local.path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(
            f"FULL DISK NOT TESTED: this process may not mount a small file system ({mount.stderr.strip()})"
        )
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_stops_the_caching_and_nothing_else(server, local, small_disk):
    far = Corpus.open(server.url, cache=small_disk / "cache")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same(far, local)
        same(far, local, [5, 900])
    assert len(said) == 1
    assert "the disk is full; reading" in str(said[0].message) and server.url in str(said[0].message)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        same(Corpus.open(server.url, cache=small_disk / "cache"), local)  # with the copies that were kept


def test_a_folder_that_cannot_be_written_to(server, local, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="goes on without keeping what is read"):
        far = Corpus.open(server.url, cache=tmp_path / "file")
    same(far, local, [1, 2])


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12)


@hypothesis.given(added=ranges, asked=st.tuples(st.integers(0, 60), st.integers(1, 20)))
def test_the_ranges_of_a_copy_are_a_set(added, asked):
    found, there = _Ranges(), set()
    for low, length in added:
        found.add(low, low + length)
        there |= set(range(low, low + length))
    low, high = asked[0], sum(asked)
    pieces = found.missing(low, high)
    assert [i for a, b in pieces for i in range(a, b)] == sorted(set(range(low, high)) - there)
    assert all(a < b for a, b in pieces)
    assert all(a < b for a, b in zip(found._high, found._low[1:], strict=False))


def test_a_store_survives_pickling(server, tmp_path):
    store = open_store(server.url, tmp_path / "cache", 10**6, QUICK)
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again, CachedStore) and again.limit == 10**6 and again.folder == tmp_path / "cache"
    assert again.read("HEAD") == store.read("HEAD") and again.exists("HEAD") and not again.exists("TAIL")

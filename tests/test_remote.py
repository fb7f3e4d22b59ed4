"""A corpus on an S3 server that misbehaves: the right cells, or a clear error in bounded time."""

import pickle
import shutil

import numpy as np
import pytest
from loading import assert_same, build, take, two_studies
from s3 import upload

from scjax.corpus import Corpus
from scjax.corpus.remote import SIDE_BY_SIDE, Patience
from scjax.corpus.store import CorruptDataError, StoreError
from scjax.loader import Loader

FEW = {"part_cells": 700, "inner": 2**11, "shard": 2**14}  # objects
QUICK = Patience(timeout=0.5, total=20.0, attempts=4, pause=0.01)
ROWS = [0, 7, 500, 1199]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Corpus:
    return build(two_studies(), tmp_path_factory.mktemp("corpus") / "c", validation=0.2, **FEW)


@pytest.fixture(scope="module")
def url(local, s3_port):
    return upload(local.path, s3_port, "corpora/small")


@pytest.fixture
def proxy(s3_proxy):
    return s3_proxy


def open_far(url, **options) -> Corpus:
    return Corpus.open(url, **({"cache": False, "patience": QUICK} | options))


def same(a: Corpus, b: Corpus, rows) -> None:
    x, y = a.read(rows), b.read(rows)
    assert (x.X != y.X).nnz == 0 and x.obs.equals(y.obs) and x.var.equals(y.var)


@pytest.mark.parametrize("cache", [False, None], ids=["uncached", "cached"])
def test_everything_a_path_can_do(url, proxy, local, cache):
    far = open_far(url, cache=cache)
    assert far.path == url and len(far) == 1200 and repr(far).startswith(f"Corpus('{url}': 1,200 cells")
    assert far.vocabulary == local.vocabulary and far.obs.equals(local.obs) and far.datasets == local.datasets
    same(far, local, slice(None))
    same(far, local, [])
    part = pickle.loads(pickle.dumps(far.parts[1]))
    np.testing.assert_array_equal(part.total, local.parts[1].total)
    assert far.info() is not None


def test_verify_finds_damage_on_the_server(local, tmp_path, s3_corpus):
    folder = tmp_path / "c"
    shutil.copytree(local.path, folder)
    shard = sorted(folder.glob("parts/*/X/data/c/0"))[1]
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    far = open_far(s3_corpus(folder))
    (problem,) = far.verify(progress=False)
    assert problem.startswith(str(shard.relative_to(folder))) and "its content has changed" in problem
    part = next(part for part in far.parts if part.id in str(shard))
    with pytest.raises(CorruptDataError, match=rf"part {part.id}, array X/data, shard 0, chunk 0: its"):
        far.read(slice(part.first_row, part.first_row + part.n_cells))


def test_what_is_not_there_is_said(url, proxy):
    with pytest.raises(FileNotFoundError, match="s3://cells/elsewhere: no file HEAD, so no complete corpus"):
        open_far("s3://cells/elsewhere")
    with pytest.raises(FileNotFoundError, match="s3://nobody/x: no file HEAD"):
        open_far("s3://nobody/x")
    assert len(proxy.requests) == 2  # what is not there is not asked for again


OBJECTS = ["HEAD", "manifests/", "vocab/", "columns.json", "nnz.npy", "obs/_index/c", "X/data/zarr.json"]
OBJECTS += ["X/data/c/0", "X/indices/c/0"]


def use(url):
    """Reads something of every kind of object; a new corpus, so that nothing is known yet."""
    far = open_far(url)
    _ = far.vocabulary
    return far


@pytest.mark.parametrize("kind", ["slow", "stall", "503", "429", "reset", "close", "short", "flip"])
def test_a_fault_that_passes_is_not_noticed(url, proxy, local, kind):
    for where in OBJECTS:
        proxy.spoil(kind, where, times=1, seconds=1.0)
    if kind == "flip":  # nothing checks HEAD but the name of the manifest that is not there
        proxy.faults[:] = [fault for fault in proxy.faults if fault.where != "HEAD"]
    same(use(url), local, ROWS)
    assert not any(fault.times for fault in proxy.faults)


@pytest.mark.parametrize("where", OBJECTS)
def test_an_object_that_does_not_come_is_named(url, proxy, where):
    proxy.spoil("503", where)
    with pytest.raises(StoreError, match=rf"{url}/.*{where}.*failed 4 times in .* s, .*503 Service Unav"):
        use(url).read(ROWS)
    assert len(proxy.gets(where)) <= 4 * len({path for path, _ in proxy.gets(where)})


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("slow", StoreError, "failed 4 times in .* the last time so: .*timed out"),
        ("stall", StoreError, "failed 4 times in .* the last time so: .*timed out"),
        ("429", StoreError, "failed 4 times in .* 429 Too Many Requests"),
        ("reset", StoreError, "failed 4 times in"),
        ("close", StoreError, "failed 4 times in"),
        ("short", CorruptDataError, "failed 3 times in .* bytes came"),
        ("flip", CorruptDataError, "array X/data, shard 0.*checksum"),
        ("403", StoreError, "is not allowed: .*403 Forbidden"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_names_it(url, proxy, local, kind, error, message):
    part = local.parts[0]
    name = f"parts/{part.id}.zarr/X/data/c/0"
    proxy.spoil(kind, name, seconds=1.5)
    with pytest.raises(error, match=message) as caught:
        use(url).read([0])
    assert f"{url}/{name}" in str(caught.value)
    assert len(proxy.gets(name)) <= 4
    proxy.heal()
    same(use(url), local, [0])


@pytest.mark.parametrize("where", OBJECTS)
def test_wrong_bytes_are_never_believed(url, proxy, where):
    proxy.spoil("flip", where)
    with pytest.raises((CorruptDataError, ValueError, FileNotFoundError)) as caught:
        use(url).read(ROWS)
    assert where.rstrip("/") in str(caught.value) or "no manifest" in str(caught.value)


def test_an_object_cut_short_on_the_server_is_named(local, tmp_path, s3_corpus):
    folder = tmp_path / "c"
    shutil.copytree(local.path, folder)
    part = local.parts[0]
    shard = folder / f"parts/{part.id}.zarr/X/data/c/0"
    shard.write_bytes(shard.read_bytes()[:-50])
    far = open_far(s3_corpus(folder))
    with pytest.raises(CorruptDataError, match=r"X/data/c/0 is cut short: it has [\d,]+ bytes, at least"):
        far.read([0])


def test_ranges_are_fetched_side_by_side_within_a_bound(url, proxy, local):
    far = open_far(url, patience=Patience())
    proxy.hold, proxy.most = 0.05, 0
    same(far, local, slice(None))
    assert 4 < proxy.most <= SIDE_BY_SIDE + 1


def test_the_cache_mends_what_the_network_spoils(url, proxy, local, tmp_path):
    for kind in ("flip", "close", "503"):  # each object is asked for once more after a flip
        proxy.spoil(kind, "/X/indices/c/", times=1)
        proxy.spoil(kind, "/X/data/c/1", times=1)
        proxy.spoil(kind, "nnz.npy", times=1)
    same(open_far(url, cache=tmp_path / "cache"), local, slice(None))
    proxy.heal()
    proxy.requests.clear()
    same(open_far(url, cache=tmp_path / "cache"), local, slice(None))
    assert [path.rpartition("/")[2] for path, _ in proxy.gets()] == ["HEAD"]


def test_a_loader_gives_the_batches_of_the_folder(url, proxy, local, tmp_path):
    options = {"window": 64, "seed": 3, "epochs": 1}
    expected = take(Loader(local, 48, **options), 12)
    for cache in (False, tmp_path / "cache", tmp_path / "cache"):
        for kind in ("503", "flip", "close", "short"):
            proxy.spoil(kind, "/X/data/", times=1)
            proxy.spoil(kind, "/index/", times=1)
        found = take(Loader(open_far(url, cache=cache), 48, **options), 12)
        proxy.heal()
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def test_a_fault_that_stays_surfaces_in_next(url, proxy, local):
    loader = Loader(open_far(url), 48, window=64, epochs=1)
    iterator = iter(loader)
    proxy.spoil("503", "/X/indices/")
    with pytest.raises(StoreError, match="X/indices/.* failed 4 times"):
        list(iterator)
    iterator.close()

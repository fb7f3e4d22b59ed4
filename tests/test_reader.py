"""The shard reader against zarr-python: the same elements for every codec, a clear error for every damage."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import hash_tree
from zarr.codecs import BloscCodec, Crc32cCodec

from scjax.corpus.index import PartIndex, write_index
from scjax.corpus.reader import CorruptDataError, PartReader, ShardCache, ShardedArray
from scjax.corpus.store import LocalStore

BLOSC = {"lz4": ("lz4", 3, "shuffle"), "bits": ("lz4", 5, "bitshuffle"), "zstd": ("zstd", 1, "shuffle")}


def write(path, values, *, chunk=64, per_shard=4, blosc="lz4", checksum=True, fill_value=0):
    compressors: list = []
    if blosc:
        cname, level, shuffle = BLOSC[blosc]
        compressors += [BloscCodec(cname=cname, clevel=level, shuffle=shuffle, typesize=values.itemsize)]
    if checksum:
        compressors += [Crc32cCodec()]
    array = zarr.create_array(
        path, shape=values.shape, dtype=values.dtype, chunks=(chunk,), shards=(chunk * per_shard,),
        compressors=compressors or None, fill_value=fill_value,
    )  # fmt: skip
    array[:] = values
    return path


def counts(n, dtype="uint16", seed=0):
    return np.random.default_rng(seed).integers(1, 500, n).astype(dtype)


@pytest.mark.parametrize("blosc", ["lz4", "bits", "zstd", None])
@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float32"])
def test_reads_what_zarr_reads(tmp_path, blosc, checksum, dtype):
    values = counts(1000, dtype)
    path = write(tmp_path / "a", values, blosc=blosc, checksum=checksum)
    array = ShardedArray(path)
    assert (len(array), array.chunk, array.shard, array.dtype) == (1000, 64, 256, np.dtype(dtype))
    for low, high in [(0, 1000), (0, 0), (64, 128), (63, 129), (255, 257), (0, 64), (990, 1000), (500, 501)]:
        out = np.zeros(high - low, dtype)
        array.read(low, high, out)
        np.testing.assert_array_equal(out, zarr.open_array(path, mode="r")[low:high])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n=st.integers(1, 700), chunk=st.integers(1, 90), per_shard=st.integers(1, 5))
def test_any_range_of_any_shape(tmp_path_factory, data, n, chunk, per_shard):
    values = counts(n, seed=n)
    path = write(tmp_path_factory.mktemp("a") / "a", values, chunk=chunk, per_shard=per_shard)
    array = ShardedArray(path)
    for _ in range(5):
        low = data.draw(st.integers(0, n))
        high = data.draw(st.integers(low, n))
        out = np.zeros(high - low, "uint16")
        array.read(low, high, out)
        np.testing.assert_array_equal(out, values[low:high])


def test_chunks_never_written_hold_the_fill_value(tmp_path):
    values = np.full(256, 7, "uint16")
    values[:64] = counts(64)
    path = write(tmp_path / "a", values, fill_value=7)
    assert (ShardedArray(path)._open(0).offset[1:3]) == [2**64 - 1] * 2  # zarr did leave them out
    out = np.zeros(256, "uint16")
    ShardedArray(path).read(0, 256, out)
    np.testing.assert_array_equal(out, values)


def test_converts_to_another_type_and_into_strided_memory(tmp_path):
    values = counts(300)
    array = ShardedArray(write(tmp_path / "a", values))
    floats, strided = np.zeros(290, "float32"), np.zeros(600, "uint16")
    array.read(10, 300, floats)
    array.read(0, 300, strided[::2])
    np.testing.assert_array_equal(floats, values[10:300])
    np.testing.assert_array_equal(strided[::2], values)
    assert not strided[1::2].any()


def test_range_and_shape_are_checked(tmp_path):
    array = ShardedArray(write(tmp_path / "a", counts(100)), name="array a")
    with pytest.raises(IndexError, match=r"array a: \[90, 101\) is outside an array of 100 elements"):
        array.read(90, 101, np.zeros(11, "uint16"))
    with pytest.raises(ValueError, match=r"10 elements do not fit an array of shape \(9,\)"):
        array.read(0, 10, np.zeros(9, "uint16"))


def test_other_layouts_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zarr.json is missing"):
        ShardedArray(tmp_path)
    zarr.create_array(tmp_path / "plain", shape=(10,), dtype="uint16", chunks=(5,))
    with pytest.raises(ValueError, match=r"outer codecs is \['bytes', 'zstd'\].*'sharding_indexed'"):
        ShardedArray(tmp_path / "plain")
    zarr.create_array(tmp_path / "zstd", shape=(10,), dtype="uint16", chunks=(5,), shards=(10,))
    with pytest.raises(ValueError, match=r"inner codecs is \['bytes', 'zstd'\]"):
        ShardedArray(tmp_path / "zstd")
    zarr.create_array(tmp_path / "two", shape=(4, 4), dtype="uint16", chunks=(2, 2), shards=(4, 4))
    with pytest.raises(ValueError, match=r"shape of the chunks behind the rows is \[2\]"):
        ShardedArray(tmp_path / "two")
    (tmp_path / "two/zarr.json").write_text('{"zarr_format": 3')
    with pytest.raises(CorruptDataError, match=r"zarr.json is not JSON"):
        ShardedArray(tmp_path / "two")


# ---- damage


def flip(path, offset):
    blob = bytearray(Path(path).read_bytes())
    blob[offset] ^= 0x40
    Path(path).write_bytes(bytes(blob))


def read_all(path):
    array = ShardedArray(path, name="part p7, array X/data")
    array.read(0, len(array), np.zeros(len(array), array.dtype))


@pytest.mark.parametrize("blosc", ["lz4", None])
def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path, blosc):
    path = write(tmp_path / "a", counts(100), chunk=16, per_shard=8, blosc=blosc)
    shard = path / "c/0"
    for offset in range(shard.stat().st_size):
        flip(shard, offset)
        with pytest.raises(CorruptDataError, match=r"part p7, array X/data, shard 0.*checksum.*c/0"):
            read_all(path)
        flip(shard, offset)
    read_all(path)


def test_a_damaged_chunk_is_named(tmp_path):
    path = write(tmp_path / "a", counts(1000))
    offset = ShardedArray(path)._open(2).offset[3]
    flip(path / "c/2", offset + 20)
    with pytest.raises(CorruptDataError, match=r"part p7, array X/data, shard 2, chunk 3: its checksum"):
        read_all(path)


def test_without_a_checksum_blosc_headers_are_checked(tmp_path):
    path = write(tmp_path / "a", counts(1000), checksum=False)
    for byte in (4, 12):
        flip(path / "c/1", byte)
        with pytest.raises(CorruptDataError, match=r"shard 1, chunk 0: its header promises"):
            read_all(path)
        flip(path / "c/1", byte)


def test_a_shard_cut_short_or_missing_is_named(tmp_path):
    path = write(tmp_path / "a", counts(1000))
    whole = (path / "c/1").read_bytes()
    (path / "c/1").write_bytes(whole[:40])
    with pytest.raises(CorruptDataError, match=r"array X/data, shard 1: .*cut short \(40 bytes"):
        read_all(path)
    (path / "c/1").write_bytes(whole[:-100])
    with pytest.raises(CorruptDataError, match=r"array X/data, shard 1: the checksum of the index"):
        read_all(path)
    (path / "c/1").write_bytes(whole[100:])  # the index is whole, the chunks are not
    with pytest.raises(CorruptDataError, match=r"array X/data, shard 1, chunk 3: lies beyond the end"):
        read_all(path)
    (path / "c/1").unlink()
    with pytest.raises(CorruptDataError, match=r"array X/data, shard 1: the file .*c/1 is missing"):
        read_all(path)


# ---- files and threads


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_open_files_are_kept_bounded_and_closed(tmp_path):
    path = write(tmp_path / "a", counts(1000), chunk=16, per_shard=2)
    before = open_files()
    cache = ShardCache(limit=5)
    array = ShardedArray(path, shards=cache)
    out = np.zeros(1000, "uint16")
    for _ in range(2):
        array.read(0, 1000, out)
        assert open_files() == before + 5
    cache.close()
    assert open_files() == before
    np.testing.assert_array_equal(out, counts(1000))


def part(tmp_path, n_cells=2500, seed=0):
    """A part as the corpus stores it, as far as the reader looks."""
    rng = np.random.default_rng(seed)
    nnz = rng.integers(0, 9, n_cells).astype("uint32")
    indptr = np.concatenate([[0], np.cumsum(nnz)]).astype("int64")
    folder = tmp_path / "parts/p7.zarr/X"
    write(folder / "indices", counts(indptr[-1], seed=1), chunk=100)
    write(folder / "data", counts(indptr[-1], "uint32", seed=2), chunk=100, blosc="bits")
    write_index(tmp_path / "index/p7", {}, nnz)
    objects = hash_tree(tmp_path, tmp_path / "index", tmp_path / "parts")
    store = LocalStore(tmp_path)
    arrays = PartIndex(store, "p7", n_cells, int(indptr[-1]), objects)
    return SimpleNamespace(id="p7", n_cells=n_cells, arrays=arrays, store=store, objects=objects), indptr


def test_rows_of_a_part(tmp_path):
    stored, indptr = part(tmp_path)
    reader = PartReader(stored)
    for first, last in [(0, 2500), (0, 1024), (1023, 1025), (1024, 2048), (7, 7), (2499, 2500), (2047, 2048)]:
        assert reader.row_span(first, last) == (indptr[first], indptr[last])


def test_an_index_that_contradicts_itself_is_noticed(tmp_path):
    stored, _ = part(tmp_path)
    stored.arrays.blocks[2] += 1
    reader = PartReader(stored)
    assert reader.row_span(0, 1024) == (0, stored.arrays.blocks[1])
    with pytest.raises(CorruptDataError, match=r"part p7: nnz.npy and blocks.npy .* in rows 1024 to 2047"):
        reader.row_span(1000, 1100)


@pytest.mark.parametrize("threads", [0, 2])
def test_spans_come_one_after_the_other(tmp_path, threads):
    stored, indptr = part(tmp_path)
    reader, spans = PartReader(stored), [(50, 1500), (0, 3), (3, 3), (1499, 1700)]
    total = sum(high - low for low, high in spans)
    indices, data = np.zeros(total + 5, "uint16"), np.zeros(total + 5, "float32")
    pool = ThreadPoolExecutor(threads) if threads else None
    reader.read_spans(spans, indices, data, pool)
    for array, seed in ((indices, 1), (data, 2)):
        whole = counts(indptr[-1], seed=seed)
        np.testing.assert_array_equal(array[:total], np.concatenate([whole[a:b] for a, b in spans]))
        assert not array[total:].any()
    flip(tmp_path / "parts/p7.zarr/X/data/c/1", 30)
    with pytest.raises(CorruptDataError, match=r"part p7, array X/data, shard 1, chunk 0"):
        reader.read_spans(spans, indices, data, pool)
    if pool:
        pool.shutdown()


def test_many_threads_read_the_same_array(tmp_path):
    values = counts(20_000)
    array = ShardedArray(write(tmp_path / "a", values, chunk=50, per_shard=3), shards=ShardCache(limit=2))

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            low, high = np.sort(rng.integers(0, 20_001, 2))
            out = np.zeros(high - low, "uint16")
            array.read(int(low), int(high), out)
            np.testing.assert_array_equal(out, values[low:high])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))

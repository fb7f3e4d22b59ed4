"""The index of a part: columns that are written, read in slices and checked block by block."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from loading import hash_tree

from scjax.corpus.index import PartIndex, column_layout, write_index
from scjax.corpus.store import CorruptDataError, LocalStore

N = 2500


@pytest.fixture(scope="module")
def columns():
    rng = np.random.default_rng(0)
    return {
        "nnz": rng.integers(1, 3000, N).astype("u4"),
        "total": rng.gamma(2, 1000, N),
        "codes/dataset": rng.integers(0, 9, N).astype("i4"),
        "codes/cell type": rng.integers(-1, 40, N).astype("i4"),
        "content": rng.integers(0, 2**64, (N, 2), dtype="u8"),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, columns):
    root = tmp_path_factory.mktemp("index")
    write_index(root / "index/p", {name: v for name, v in columns.items() if name != "nnz"}, columns["nnz"])
    return root


def opened(root, **changed) -> PartIndex:
    objects = hash_tree(root, root / "index")
    nnz = int(np.load(root / "index/p/nnz.npy").sum(dtype=np.int64))
    return PartIndex(LocalStore(root), "p", N, **{"nnz": nnz, "objects": objects} | changed)


def test_what_is_written(root, columns):
    assert json.loads((root / "index/p/columns.json").read_text()) == list(columns)
    checks = np.load(root / "index/p/checks.npy")
    assert checks.dtype == np.uint32 and checks.shape == (5, 3)
    for name, values in columns.items():  # plain files, for whoever has nothing but numpy
        np.testing.assert_array_equal(np.load(root / "index/p" / f"{name}.npy"), values)
    starts = np.concatenate([[0], np.cumsum(columns["nnz"], dtype=np.int64)])
    assert opened(root).blocks.tolist() == [0, starts[1024], starts[2048], starts[-1]]


@hypothesis.given(st.data())
def test_a_slice_is_the_slice(root, columns, data):
    index = opened(root)
    name = data.draw(st.sampled_from(list(columns)))
    first = data.draw(st.integers(0, N))
    last = data.draw(st.integers(first, N))
    found = index.read(name, first, last)
    np.testing.assert_array_equal(found, columns[name][first:last])
    assert found.dtype == column_layout(name)[0] and found.flags.writeable


def test_a_label_that_came_later_is_unknown_everywhere(root):
    found = opened(root).read("codes/donor", 5, 9)
    assert found.tolist() == [-1] * 4 and found.dtype == np.int32


def test_what_is_not_there(root):
    index = opened(root)
    for first, last in ((-1, 3), (4, 3), (0, N + 1)):
        with pytest.raises(IndexError, match=rf"part p: rows \[{first}, {last}\) are outside a part of {N}"):
            index.read("nnz", first, last)
    with pytest.raises(
        KeyError, match="no column 'depth'; there are nnz, total, content, codes/<label> and values/<name>"
    ):
        index.read("depth", 0, 1)


def test_a_part_without_content_hashes_says_so(tmp_path):
    write_index(tmp_path / "index/p", {}, np.ones(N, "u4"))
    with pytest.raises(KeyError, match="part p has no column 'content'; it has nnz"):
        opened(tmp_path).read("content", 0, 1)


def test_a_column_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"column total: shape \(3,\) does not fit 2 cells"):
        write_index(tmp_path, {"total": np.ones(3)}, np.ones(2, "u4"))
    with pytest.raises(ValueError, match=r"column content: shape \(2,\) does not fit 2 cells"):
        write_index(tmp_path, {"content": np.ones(2, "u8")}, np.ones(2, "u4"))


def test_damage_names_the_column_and_its_rows(root, tmp_path):
    path = root / "index/p/total.npy"
    whole = path.read_bytes()
    index, objects = opened(root), hash_tree(root, root / "index")
    try:
        changed = bytearray(whole)
        changed[len(whole) - N * 8 + 1500 * 8] ^= 1
        path.write_bytes(changed)
        index.read("total", 0, 1024)  # another block
        with pytest.raises(CorruptDataError, match=r"part p, column total: rows 1024 to 2047 of"):
            index.read("total", 1000, 1030)
        path.write_bytes(whole[:-800])
        with pytest.raises(CorruptDataError, match=r"total.npy is cut short, \d+ of 3616 bytes are"):
            index.read("total", 2400, 2500)
        path.unlink()
        with pytest.raises(CorruptDataError, match=r"part p, column total: the file .*total.npy is missing"):
            index.read("total", 0, 1)
    finally:
        path.write_bytes(whole)
    with pytest.raises(CorruptDataError, match="part p: its index ends at element .*, the manifest says 7"):
        opened(root, nnz=7)
    for name in ("columns.json", "checks.npy", "blocks.npy"):
        entry = {**objects[f"index/p/{name}"], "crc32c": "00000000"}
        with pytest.raises(CorruptDataError, match=f"part p, index: .*{name} does not have the checksum"):
            opened(root, objects={**objects, f"index/p/{name}": entry})

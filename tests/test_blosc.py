"""Blosc chunks decoded by the C functions, and by numcodecs where they cannot be reached."""

import numpy as np
import pytest
from numcodecs import Blosc

from scjax.corpus import blosc

CODECS = [
    ("lz4", Blosc.SHUFFLE),
    ("lz4", Blosc.BITSHUFFLE),
    ("zstd", Blosc.SHUFFLE),
    ("lz4", Blosc.NOSHUFFLE),
]


def chunk(dtype, codec, shuffle, n=30_000):
    values = np.random.default_rng(0).geometric(0.4, n).astype(dtype)
    stored = Blosc(cname=codec, clevel=3, shuffle=shuffle, blocksize=4096).encode(values)
    return values, np.frombuffer(stored, np.uint8)


@pytest.fixture(params=["C functions", "numcodecs"])
def way(request, monkeypatch):
    if request.param == "numcodecs":
        monkeypatch.setattr(blosc, "_library", lambda: None)
    elif blosc._library() is None:
        pytest.skip("this build of numcodecs hides the C functions")


@pytest.mark.parametrize(("codec", "shuffle"), CODECS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
def test_any_part_of_a_chunk(way, codec, shuffle, dtype):
    values, stored = chunk(dtype, codec, shuffle)
    assert blosc.sizes(stored) == (values.itemsize, values.nbytes, stored.size)
    for first, last in [(0, 30_000), (0, 1), (29_999, 30_000), (777, 12_345), (4096, 8192), (5, 5)]:
        out = np.zeros(last - first, dtype)
        blosc.decode(stored, first, out)
        np.testing.assert_array_equal(out, values[first:last])


def test_nothing_is_written_outside(way):
    values, stored = chunk(np.uint16, "lz4", Blosc.SHUFFLE)
    room = np.full(1100, 7, np.uint16)
    blosc.decode(stored, 2000, room[50:-50])
    np.testing.assert_array_equal(room[50:-50], values[2000:3000])
    assert (room[:50] == 7).all() and (room[-50:] == 7).all()


def test_bytes_that_are_no_chunk():
    values, stored = chunk(np.uint16, "lz4", Blosc.SHUFFLE)
    broken = stored.copy()
    broken[16:] = 255
    with pytest.raises(RuntimeError):
        blosc.decode(broken, 0, np.zeros_like(values))
    with pytest.raises(RuntimeError):
        blosc.decode(stored, 29_000, np.zeros(2000, np.uint16))
    with pytest.raises(RuntimeError):
        blosc.decode(stored, 0, np.zeros(10, np.uint32))
    assert blosc.sizes(stored[:5])[2] == 0

"""Batches placed ahead are those of the loader, and the cursor is that of the batch handed out."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from contextlib import closing

import jax
import numpy as np
import pytest
from loading import assert_same, build, take, two_studies

from scjax.loader import Loader
from scjax.parallel import MeshConfig, Prefetch, make_mesh


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    corpus = build(two_studies(), tmp_path_factory.mktemp("prefetch") / "corpus")
    return Loader(corpus, 32, seed=3, window=64, labels=["dataset"], epochs=1)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=4, fsdp=2))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "scjax-prefetch"]


def test_the_same_batches_on_the_devices(loader, mesh):
    expected = take(loader, loader.steps_per_epoch)
    with closing(Prefetch(iter(loader), mesh)) as batches:
        placed = list(batches)
        assert len(placed) == len(expected) > 10
        for ours, theirs in zip(placed, expected, strict=True):
            assert_same(jax.device_get(ours), theirs)  # still what it was, however far the loader is by now
            assert ours.gene_id.sharding.mesh == mesh and len(ours.gene_id.addressable_shards) == 8
        for _ in range(2):  # it stays at its end
            with pytest.raises(StopIteration):
                next(batches)
        assert batches.waited > 0
    assert not threads()


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_cursor_is_that_of_the_batch_handed_out(loader, mesh, ahead):
    plain = iter(loader)
    with closing(Prefetch(iter(loader), mesh, ahead)) as batches:
        assert batches.get_state() == plain.get_state()
        for _ in range(5):
            next(batches), next(plain)
            assert batches.get_state() == plain.get_state()
        state = batches.get_state()
    (expected,) = take(loader, 1, state)
    resumed = iter(loader)
    resumed.set_state(state)
    with closing(Prefetch(resumed, mesh, ahead)) as batches:
        assert_same(jax.device_get(next(batches)), expected)
    plain.close()


class Failing:
    """Good for some batches; counts what is asked of it."""

    def __init__(self, batch, good):
        self.batch, self.good, self.asked, self.closed = batch, good, 0, False

    def __next__(self):
        self.asked += 1
        if self.asked > self.good:
            raise OSError("the disk is gone")
        return self.batch

    def get_state(self):
        return {"step": self.asked}

    def close(self):
        assert not threads(), "closed under a thread that reads"
        self.closed = True


def test_an_error_comes_where_its_batch_would(loader, mesh):
    (batch,) = take(loader, 1)
    source = Failing(batch, 3)
    with closing(Prefetch(source, mesh)) as batches:
        for i in range(3):
            next(batches)
            assert batches.get_state() == {"step": i + 1}
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(batches)
        assert batches.get_state() == {"step": 3}
    assert source.closed
    odd = batch.replace(**{name: getattr(batch, name)[:31] for name in ("gene_id", "count", "weight")})
    with closing(Prefetch(Failing(odd, 9), mesh)) as batches:
        with pytest.raises(ValueError, match="31 cells cannot be split evenly over data 4 × fsdp 2"):
            next(batches)


def test_it_runs_ahead_so_far_and_no_further(loader, mesh):
    (batch,) = take(loader, 1)
    source = Failing(batch, 1000)
    with closing(Prefetch(source, mesh, ahead=3)) as batches:
        next(batches)
        while source.asked < 4:  # the one handed out and three ahead; hangs if it does not read on
            time.sleep(0.001)
        time.sleep(0.05)
        assert source.asked == 4


def test_closed_or_forgotten_it_ends_its_thread(loader, mesh):
    (batch,) = take(loader, 1)
    source = Failing(batch, 1000)
    batches = Prefetch(source, mesh)
    next(batches)
    batches.close()
    batches.close()
    assert source.closed and not threads()
    with pytest.raises(ValueError, match="closed"):
        next(batches)

    source = Failing(batch, 1000)
    kept = list(itertools.islice(Prefetch(source, mesh), 2))
    gc.collect()
    assert source.closed and not threads()
    np.testing.assert_array_equal(kept[1].row, batch.row)

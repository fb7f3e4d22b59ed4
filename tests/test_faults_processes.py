"""Runs of several processes: one of them is lost, fails, or the number of them changes."""

from __future__ import annotations

import re
import signal
import socket
import time

import pytest
import runs
from lives import contents, last_step, newest

from scjax.launch.codes import LOST, REQUEUE

pytestmark = pytest.mark.faults
CONFIG = "tests/tiny_config.py"
ENDLESS = {"train__steps": 10**6, "train__checkpoint_every": 5, "train__eval_every": 10**6}

# Saves two checkpoints of an array of which each process holds half, damages what process 1 wrote of the
# newer one, and restores.
RESTORES = """
import os, pathlib, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from scjax.parallel import MeshConfig, barrier, distributed_start, make_mesh, together
from scjax.train import Checkpoints

distributed_start()
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
sharding = NamedSharding(make_mesh(MeshConfig(1, 2, 1)), P("fsdp"))
abstract = {"w": jax.ShapeDtypeStruct((2, 300_000), np.float32, sharding=sharding)}

def state(step):
    values = np.random.default_rng(step).standard_normal((2, 300_000)).astype(np.float32)
    return {"w": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}

with together():
    checkpoints = Checkpoints(workdir, {})
    for step in (4, 8):
        checkpoints.save(step, state(step), {})
    checkpoints.close()
    if jax.process_index() == 0:
        for damaged in [8] if workdir.name == "newer" else [4, 8]:
            files = (workdir / str(damaged) / "state" / "ocdbt.process_1").rglob("d/*")
            file = max(files, key=lambda path: path.stat().st_size)
            assert file.stat().st_size > 1_000_000
            os.truncate(file, 1000)
    barrier("damaged")
    restored = Checkpoints(workdir, {}).restore(abstract)
    for mine, saved in zip(*(s["w"].addressable_shards for s in (restored.state, state(4)))):
        np.testing.assert_array_equal(mine.data, saved.data)
    print("restored", restored.step)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    runs.build_corpus(directory / "corpus")
    return directory


def start(place, workdir, count, devices, **overrides):
    """All processes of a run."""
    port = runs.free_port()
    options = {"cache": place / "cache", "devices": devices, "data__corpus": place / "corpus", **overrides}
    shares = [(index, count, port) if count > 1 else None for index in range(count)]
    return [runs.start(CONFIG, workdir, process=share, **options) for share in shares]


def wait_until(condition, *processes):
    end = time.monotonic() + 300
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < end
        time.sleep(0.01)


def outputs(workdir, processes):
    return [runs.output_of(workdir, index).read_text() for index in range(len(processes))]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_process_takes_all_down_and_is_named(place, lost, how):
    """Within a minute, with the index, host and pid of the one that was lost; not as one that fails does."""
    workdir = place / f"lost{lost}{how.name}"
    processes = start(place, workdir, 2, 2, **ENDLESS)
    try:
        wait_until(lambda: newest(workdir) >= 5, *processes)
        processes[lost].send_signal(how)
        code = processes[1 - lost].wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = outputs(workdir, processes)[1 - lost]
    assert code in (LOST, -signal.SIGABRT), output  # JAX aborts at once where process 0 is gone
    name = f"process {lost} (host {socket.gethostname()}, pid {processes[lost].pid})"
    last = output.splitlines()[-1]
    assert name in last and ("no sign of life" in last or "has died or cannot be reached" in last), output
    assert newest(workdir) >= 5  # nothing that was saved is lost


def test_a_process_that_fails_takes_all_down_and_is_named(place):
    """Here one of two cannot read the corpus, while the other waits for it."""
    workdir = place / "failed"
    options = {"cache": place / "cache", "devices": 1, **ENDLESS}
    port = runs.free_port()
    corpora = [place / "corpus", place / "nowhere"]
    processes = [
        runs.start(CONFIG, workdir, process=(index, 2, port), data__corpus=corpus, **options)
        for index, corpus in enumerate(corpora)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    name = f"process 1 (host {socket.gethostname()}, pid {processes[1].pid}) has failed: "
    for index, output in enumerate(outputs(workdir, processes)):
        assert ("nowhere" if index == 1 else name) in output.splitlines()[-1], output


@pytest.mark.parametrize("damaged", ["newer", "both"])
def test_a_checkpoint_that_one_process_cannot_read(place, damaged):
    """The other one could. Both pass it over; where no other is left, both say so."""
    script, workdir, port = place / "restores.py", place / damaged, runs.free_port()
    script.write_text(RESTORES)
    both = [
        runs.start(CONFIG, workdir, process=(index, 2, port), cache=place / "cache", script=script)
        for index in range(2)
    ]
    output = runs.finish(*both, workdir=workdir, succeed=damaged == "newer")
    if damaged == "newer":
        told = "checkpoint 8 cannot be read and is set aside; going on from 4. (process 1: "
        assert told in output and all("restored 4" in text for text in outputs(workdir, both))
        assert sorted(path.name for path in workdir.iterdir()) == ["4", "8.damaged"]
    else:
        for text in outputs(workdir, both):
            assert re.search(r"no checkpoint in .* can be read: 8: process 1: .*; 4: process 1: ", text), text


def test_two_processes_then_one_then_four(place):
    """Two are told to leave, of which only one hears it; one is killed; four go on to the end. All on four
    devices, so that the sums are the same but for their order."""
    few = {"train__steps": 120, "train__checkpoint_every": 8, "mesh__fsdp": 2, "train__log_every": 5}
    whole, moved = place / "whole", place / "moved"
    runs.finish(*start(place, whole, 1, 4, **few), workdir=whole)

    two = start(place, moved, 2, 2, **few)
    wait_until(lambda: last_step(moved) >= 5, *two)
    two[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in two] == [REQUEUE] * 2, outputs(moved, two)
    left = int(re.search(r"told to leave: saving step (\d+)", outputs(moved, two)[0])[1])
    assert newest(moved) == left < 120

    (one,) = start(place, moved, 1, 4, **few)
    wait_until(lambda: newest(moved) > left, one)
    one.kill()
    assert one.wait() == -signal.SIGKILL, outputs(moved, [one])
    assert f"steps {left} to 120" in outputs(moved, [one])[0]
    saved = newest(moved)
    assert left < saved < 120

    four = start(place, moved, 4, 1, **few)
    assert f"steps {saved} to 120" in runs.finish(*four, workdir=moved)
    lines = zip(runs.metrics(moved), runs.metrics(whole), strict=True)
    for line, expected in lines:
        assert line == pytest.approx(expected, rel=1e-4)
    assert contents(moved, 120)["data"] == contents(whole, 120)["data"]

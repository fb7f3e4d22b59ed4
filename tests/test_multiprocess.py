"""Two processes of four virtual devices are one process of eight, and of one."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import runs

from scjax.train import checkpoint_steps, read_model

CONFIG = "tests/tiny_config.py"
RECORDING = runs.ROOT / "tests" / "recording_pretrain.py"
STEPS = 14
FSDP = {"mesh__data": 2, "mesh__fsdp": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("multiprocess")
    runs.build_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="module")
def options(place):
    return {"cache": place / "cache", "data__corpus": place / "corpus", "script": RECORDING}


@pytest.fixture(scope="module")
def one_process(place, options):
    """Eight devices in one process."""
    runs.pretrain(CONFIG, place / "one", devices=8, train__steps=STEPS, **FSDP, **options)
    return place / "one"


@pytest.fixture(scope="module")
def two_processes(place, options):
    """Four devices in each of two processes; stops two steps early."""
    workdir, port = place / "two", runs.free_port()
    both = [
        runs.start(
            CONFIG, workdir, devices=4, process=(i, 2, port), train__steps=STEPS - 2, **FSDP, **options
        )
        for i in range(2)
    ]
    output = runs.finish(*both, workdir=workdir)
    assert "2 process(es)" in output
    assert "loss" not in runs.output_of(workdir, 1).read_text()  # only the first process talks
    return workdir


def recorded(workdir, processes: int) -> list[tuple[list[int], list[int]]]:
    """Per step, the row numbers and sums of gene ids of the global batch, in order."""
    parts = [
        json.loads(workdir.with_name(f"{workdir.name}.rows.{i}.json").read_text()) for i in range(processes)
    ]
    out = []
    for step in zip(*parts, strict=True):
        shares = {int(start): share for part in step for start, share in part.items()}
        rows, genes = zip(*(shares[start] for start in sorted(shares)), strict=True)
        out.append((sum(rows, []), sum(genes, [])))
    return out


def test_the_same_global_batches(one_process, two_processes):
    one, two = recorded(one_process, 1), recorded(two_processes, 2)
    assert len(two) < len(one)
    shared = min(len(one), len(two)) - 4  # the last ones are of validation
    assert shared >= STEPS - 4
    assert two[:shared] == one[:shared]
    assert all(len(rows) == 16 for rows, _ in two)
    # each process reads its half
    halves = json.loads(two_processes.with_name("two.rows.1.json").read_text())
    assert all(sorted(map(int, step)) == [8, 10, 12, 14] for step in halves)


def test_the_same_losses(one_process, two_processes):
    one, two = runs.metrics(one_process), runs.metrics(two_processes)
    last = two.pop()  # the shorter run is validated at its own end
    assert last["step"] == STEPS - 2 and "validation/loss" in last
    assert len(two) == STEPS - 2 + 1 and "validation/loss" in two[8]
    for a, b in zip(two, one, strict=False):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_checkpoint_of_two_processes_goes_on_in_one(place, options, one_process, two_processes):
    """With one device, to the end of the run that was never interrupted."""
    assert checkpoint_steps(two_processes / "checkpoints") == [6, 12]
    model = read_model(two_processes)
    assert model["step"] == 12 and model["params"]["query"]["kernel"].shape == (16, 16)
    output = runs.pretrain(CONFIG, two_processes, devices=1, train__steps=STEPS, **options)
    assert f"steps 12 to {STEPS}" in output
    expected = {(line["step"], "train/loss" in line): line for line in runs.metrics(one_process)}
    resumed = [line for line in runs.metrics(two_processes) if line["step"] > 12]
    assert len(resumed) == 3  # two of training, one of validation
    for line in resumed:
        assert line == pytest.approx(expected[line["step"], "train/loss" in line], rel=1e-5)
    a, b = read_model(one_process), read_model(two_processes)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a["params"], b["params"]
    )

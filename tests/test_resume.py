"""A run that is killed and started again is the run that was never killed, to the bit."""

from __future__ import annotations

import json
import random
import signal
import time
from contextlib import closing

import jax
import numpy as np
import pytest
import runs

from scjax.corpus import Corpus
from scjax.loader import Loader
from scjax.train import checkpoint_steps, read_metrics, read_model

SMOKE = "configs/scgpt.py:smoke"
# the second pass begins in the middle, between two checkpoints
SHORT = {"train__steps": 90, "train__log_every": 4, "train__checkpoint_every": 10, "train__eval_every": 15,
         "optimizer__warmup_steps": 5, "data__genes": "", "data__batch_size": 32, "model__d_model": 32,
         "model__dropout": 0.1, "model__second_pass_after": 35}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus and a cache of compiled functions."""
    directory = tmp_path_factory.mktemp("resume")
    runs.build_corpus(directory / "corpus")
    return directory


def options(place, **overrides):
    return {"cache": place / "cache", "data__corpus": place / "corpus", **overrides}


def meta(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def test_killed_and_resumed(place):
    whole, killed = place / "whole", place / "killed"
    output = runs.pretrain(SMOKE, whole, **options(place, **SHORT))
    assert "masked error" in output and "checkpoints [70, 80, 90]" in output

    kills = []
    for wanted in (10, 40):  # killed twice, some way after a checkpoint
        process = runs.start(SMOKE, killed, **options(place, **SHORT))
        beyond = wanted + random.randint(1, 12)
        while process.poll() is None:
            lines = read_metrics(killed / "metrics.jsonl") if (killed / "metrics.jsonl").exists() else []
            saved = checkpoint_steps(killed / "checkpoints")
            if saved and saved[-1] >= wanted and lines and lines[-1]["step"] >= beyond:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, runs.output_of(killed).read_text()
        kills.append(checkpoint_steps(killed / "checkpoints")[-1])
        assert kills[-1] < 90
    output = runs.pretrain(SMOKE, killed, **options(place, **SHORT))
    assert f"steps {kills[-1]} to 90" in output

    assert runs.metrics(killed) == runs.metrics(whole)
    assert [line["step"] for line in runs.metrics(whole) if "validation/loss" in line] == [
        15,
        30,
        45,
        60,
        75,
        90,
    ]
    a, b = read_model(whole), read_model(killed)
    assert a["step"] == b["step"] == 90
    jax.tree.map(np.testing.assert_array_equal, a["params"], b["params"])
    jax.tree.map(np.testing.assert_array_equal, a["buffers"], b["buffers"])
    # the optimiser's moments too, and the place in the data
    assert meta(whole, 90)["fingerprint"] == meta(killed, 90)["fingerprint"]
    cursors = [(w / "checkpoints" / "90" / "data" / "metadata").read_text() for w in (whole, killed)]
    assert cursors[0] == cursors[1]

    # it is done: starting it again changes nothing
    output = runs.pretrain(SMOKE, killed, **options(place, **SHORT))
    assert "steps 90 to 90" in output and runs.metrics(killed) == runs.metrics(whole)


def test_refused_before_anything_is_touched(place):
    workdir = place / "refused"
    few = {"train__steps": 4, "train__checkpoint_every": 2}
    runs.pretrain("tests/tiny_config.py", workdir, **options(place, **few))
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    other = runs.build_corpus(place / "other_corpus", seed=1)
    for change, told in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"model__dropout": 0.2}, "model.dropout: 0.1 -> 0.2"),
        ({"data__corpus": other}, "began with corpus "),
        ({"data__batch_size": 32}, "batch_size was 16 and is 32"),
    ):
        output = runs.pretrain(
            "tests/tiny_config.py", workdir, succeed=False, **options(place, **few | change)
        )
        assert told in output.splitlines()[-1], output
        after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
        assert after == before


@pytest.mark.parametrize("bad_step", [8, 9])  # between two checkpoints, and the step of one
def test_a_non_finite_loss_stops_the_run(place, bad_step):
    corpus = Corpus.open(place / "corpus")
    loader = Loader(corpus, 16, window=8, group_lengths=True, labels=["dataset"])
    with closing(iter(loader)) as batches:
        row = [next(batches) for _ in range(bad_step)][-1].row[0]
    workdir = place / f"exploding{bad_step}"
    often = {
        "train__steps": 14,
        "train__checkpoint_every": 3,
        "train__log_every": 5,
        "model__explode_at": row,
    }
    output = runs.pretrain("tests/tiny_config.py", workdir, succeed=False, **options(place, **often))
    told = f"NonFiniteLoss: step {bad_step}: loss nan, grad norm nan. Nothing from this step on is saved"
    assert told in output.splitlines()[-1]
    assert checkpoint_steps(workdir / "checkpoints") == [3, 6]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(read_model(workdir)["params"]))
    assert [line["step"] for line in runs.metrics(workdir)][-1] < bad_step


def test_no_checkpoint_follows_a_step_that_wrecked_the_model(place):
    workdir = place / "wrecked"
    few = {"train__checkpoint_every": 3, "train__log_every": 2, "train__guard": "{'limit': 5.0}"}
    runs.pretrain("tests/tiny_config.py", workdir, **options(place, train__steps=6, **few))
    far = {"train__steps": 40, "train__eval_every": 100, "optimizer__learning_rate": 1e30}
    output = runs.pretrain("tests/tiny_config.py", workdir, succeed=False, **options(place, **few, **far))
    assert "TooManySkipped: 5 bad steps have been skipped" in output.splitlines()[-1]
    assert checkpoint_steps(workdir / "checkpoints") == [3, 6]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(read_model(workdir)["params"]))


def test_a_misspelt_key_is_told(place):
    workdir = place / "misspelt"
    config = place / "misspelt.py"
    text = (runs.ROOT / "tests" / "tiny_config.py").read_text()
    config.write_text(text.replace('"learning_rate"', '"learnin_rate"'))
    output = runs.pretrain(str(config), workdir, succeed=False, **options(place))
    assert (
        "config.optimizer.learnin_rate is unknown; did you mean 'learning_rate'?" in output.splitlines()[-1]
    )
    assert not workdir.exists()

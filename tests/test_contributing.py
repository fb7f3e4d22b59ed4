"""What CONTRIBUTING.md says about a system of one's own, done as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from synthetic import synthetic_adata

import scjax
from scjax.train import read_metrics

TEXT = (runs.ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A directory with the files of the page, a corpus, and the run that the page's command makes."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "mine").mkdir()
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
    assert set(files) == {"bag.py", "bag_config.py"}
    for name, text in files.items():
        (folder / "mine" / name).write_text(text)
    runs.build_corpus(folder / "runs" / "pbmc" / "corpus")
    (folder / "experiments").symlink_to(runs.ROOT / "experiments")

    (command,) = re.findall(r"^    PYTHONPATH=mine python (experiments/pretrain.py .*)$", TEXT, re.MULTILINE)
    short = ["--config.data.batch_size=16", "--config.train.steps=40", "--config.train.log_every=5"]
    done = subprocess.run(
        [sys.executable, *runs.WARNINGS, *shlex.split(command), *short],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "mine"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation: masked error" in done.stdout and "(gene_mean_mse)" in done.stdout
    return folder


@pytest.fixture
def model(there, monkeypatch):
    monkeypatch.syspath_prepend(there / "mine")
    monkeypatch.chdir(there)
    (line,) = re.findall(r"^model = scjax.load\(.*\)$", TEXT, re.MULTILINE)
    return eval(line.removeprefix("model = "), {"scjax": scjax})


def test_it_learns(there):
    losses = [
        line["train/loss"] for line in read_metrics(there / "runs/bag/metrics.jsonl") if "train/loss" in line
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_it_embeds_each_cell_by_itself(model):
    assert model.system == "bag:Bag" and model.step == 40
    cells = synthetic_adata(60, 48, seed=3)
    (line,) = re.findall(r"^scjax.embed\(.*\)", TEXT, re.MULTILINE)
    exec(line, {"scjax": scjax, "cells": cells, "model": model})
    whole = cells.obsm["X_scjax"]
    assert whole.shape == (60, 32)
    some = np.array([40, 3])
    np.testing.assert_allclose(model.embed(cells[some], batch_size=2), whole[some], atol=2e-6)
    order = np.random.default_rng(0).permutation(48)
    np.testing.assert_allclose(model.embed(cells[:, order].copy()), whole, atol=2e-6)
    assert np.abs(model.random_twin().embed(cells) - whole).max() > 0.01
    assert model.gene_embedding().shape == (48, 32)


def test_it_annotates(model):
    reference, query = synthetic_adata(150, 48, seed=3), synthetic_adata(60, 48, seed=4)
    (line,) = re.findall(r"^scjax.annotate\(.*?\)", TEXT, re.MULTILINE)
    exec(line, {"scjax": scjax, "query": query, "model": model, "reference": reference})
    right = (query.obs["scjax_cell_type"].astype(str) == query.obs["cell_type"].astype(str)).mean()
    assert right > 0.6  # four types, planted


def test_its_gradients_reach_every_parameter(model):
    from tiny_model import cells

    from scjax.nn import bind

    def total(params):
        return bind(model.abstract, params, model.buffers).loss(cells(0), jax.random.key(0))[0]

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(model.params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_its_file_is_formatted_as_the_rest(there):
    for command in (["check"], ["format", "--check", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(runs.ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, str(there / "mine")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

"""The tool that tells how well batches mix a corpus."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.corpus import build_corpus
from scjax.loader import Loader

TOOL = Path(__file__).parent.parent / "tools" / "mixing.py"
spec = importlib.util.spec_from_file_location("mixing", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture(scope="module", params=[False, True], ids=["shuffled", "as the sources"])
def corpus(request, tmp_path_factory):
    """Forty thousand cells of few genes, in data sets of unequal size, donor by donor."""
    rng = np.random.default_rng(0)
    size = (rng.dirichlet(np.full(30, 2.0)) * 40_000).astype(int) + 50
    studies = {}
    for number, n in enumerate(size):
        x = sparse.csr_matrix(rng.poisson(0.7, (n, 12)).astype(np.float32) + np.eye(12, dtype=np.float32)[0])
        obs = pd.DataFrame({"donor": np.sort(rng.integers(0, 4, n)), "cell_type": rng.integers(0, 9, n)})
        obs = obs.astype(str).astype("category").set_index(pd.Index([f"{number}-{i}" for i in range(n)]))
        studies[f"study{number}"] = ad.AnnData(
            x, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(12)])
        )
    return build_corpus(
        list(studies.values()),
        tmp_path_factory.mktemp("mixing") / "corpus",
        names=list(studies),
        shuffle=not request.param,
        inner=2**9,
        shard=2**14,
        workers=1,
        progress=False,
    )


@pytest.mark.parametrize("batch_size", [128, 512])
def test_batches_mix_a_corpus_as_well_as_independent_draws(corpus, batch_size):
    """With the defaults: within 1.6 of independent draws as the sources have the cells, 1.1 shuffled."""
    most = 1.1 if corpus.manifest["shuffled"] else 1.6
    loader = Loader(corpus, batch_size, labels=())
    batches = tool.batches_of(loader, 0, 10**6)
    for step in (0, len(batches) - 1):
        np.testing.assert_array_equal(batches[step], loader.order.rows(0, step))
    for column in ("dataset", "cell_type"):
        codes = np.concatenate([part.codes(column) for part in corpus.parts])
        found = tool.mixing(batches, codes)
        assert found["variance"] < most
        assert found["entropy"] > found["entropy_of_draws"] - 0.03


def test_the_command(corpus, tmp_path):
    command = [
        sys.executable,
        TOOL,
        corpus.path,
        "--batch-size",
        "256",
        "--weights",
        '{"dataset": 0.2}',
        "--json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["column"] for line in lines] == ["dataset", "donor", "cell_type"]
    assert all(line["draws"] == line["cells"] == len(corpus) for line in lines)
    assert all(line["source order"] != corpus.manifest["shuffled"] for line in lines)
    assert lines[0]["variance"] < 1.6 and lines[0]["over_read"] > 0.5
    run = subprocess.run([*command[:-3], "--group-lengths"], capture_output=True, text=True, check=True)
    assert "variance / iid" in run.stdout and "cell_type" in run.stdout


def test_the_measure():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(20), 5000) - 1
    drawn = tool.mixing(rng.integers(0, len(codes), (2000, 256)), codes)
    assert drawn["variance"] == pytest.approx(1, abs=0.05)
    assert drawn["entropy"] == pytest.approx(drawn["entropy_of_draws"], abs=0.01)
    in_order = tool.mixing(np.arange(len(codes) // 250 * 250).reshape(-1, 250), codes)
    assert in_order["variance"] == pytest.approx(250, rel=0.01) and in_order["entropy"] == 0
    pairs = tool.mixing(np.repeat(rng.integers(0, len(codes), (2000, 128)), 2, axis=1), codes)
    assert pairs["variance"] == pytest.approx(2, abs=0.1)

"""The evaluation stands alone: an environment without JAX, Flax and PyTorch imports it and runs it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import scjax

NEEDS = ("numpy", "scipy", "pandas", "scikit-learn", "anndata", "threadpoolctl")  # what scjax.eval stands on
REPORT = ("jinja2", "matplotlib")
ABSENT = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "tensorstore")

RUN = """
import importlib.util, sys
import anndata as ad, numpy as np, pandas as pd
found = [m for m in {absent} if importlib.util.find_spec(m)]
assert not found, found
import scjax.eval
rng = np.random.default_rng(0)
n, types = 240, 3
label, donor, batch = rng.integers(types, size=n), rng.integers(4, size=n), rng.integers(2, size=n)
rate = np.exp(rng.normal(size=(types, 60)))
adata = ad.AnnData(rng.poisson(rate[label]).astype(np.float32))
adata.obs = pd.DataFrame({{"kind": label, "donor": donor, "batch": batch}}).astype(str)
adata.obs_names = [f"c{{i}}" for i in range(n)]
adata.obsm["X_other"] = np.log1p(adata.X) @ rng.normal(size=(60, 8))
X = adata.obsm["X_other"]
alone = scjax.eval.annotation(X, label, donor, n_boot=20)
assert [r for r in alone.rows if r["metric"] == "macro_f1" and r["value"] > 0.5]
keys = dict(label_key="kind", group_key="donor", batch_key="batch")
results = scjax.eval.run(adata, ["X_other"], **keys, n_boot=20)
assert {{"annotation", "clustering", "integration", "diagnostics"}} <= {{r["task"] for r in results.rows}}
genes = pd.DataFrame(rng.normal(size=(60, 8)), index=adata.var_names)
known = {{g: int(x) for g, x in zip(adata.var_names, genes[0] > 0)}}
assert scjax.eval.genes({{"table": genes}}, {{"half": known}}, expression=adata, n_boot=20).rows
adata.obsm["protein"] = pd.DataFrame(adata.X[:, :6], index=adata.obs_names, columns=list("abcdef"))
assert scjax.eval.matching(adata, "protein", {{"joint": (X, X + 0.01)}}, n_boot=20).rows
assert scjax.eval.modality_prediction(adata, "protein", embeddings=["X_other"], n_boot=20).rows
results.to_jsonl("results.jsonl")
page = results.report("report.html").read_text()
assert "X_other" in page and "data:image/svg+xml" in page
print("ran", len(scjax.eval.Results.read("results.jsonl").rows))
"""


def closure(*names: str) -> set[str]:
    """The distributions that these need, by their metadata, themselves included."""
    seen: set[tuple[str, str]] = set()
    wanted = [(name, "") for name in names]
    while wanted:
        name, extra = wanted.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in importlib.metadata.requires(name) or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                wanted += [(need.name, e) for e in ("", *need.extras)]
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Python of a virtual environment with the packages of the evaluation and scjax, and nothing else."""
    home = tmp_path_factory.mktemp("alone")
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    for name in closure(*NEEDS, *REPORT):
        distribution = importlib.metadata.distribution(name)
        for path in {
            Path(file).parts[0] for file in distribution.files or () if ".." not in Path(file).parts
        }:
            target = Path(distribution.locate_file(path))
            if not (site / path).exists() and path != "__pycache__":
                (site / path).symlink_to(target)
    (site / "scjax").symlink_to(Path(scjax.__file__).parent)
    return home / "bin" / "python"


def test_runs_where_there_is_no_jax_flax_or_torch(environment, tmp_path):
    code = RUN.format(absent=ABSENT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [environment, "-I", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran ")
    assert sys.executable != str(environment)

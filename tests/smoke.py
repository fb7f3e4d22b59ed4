"""Cells that ship with the package as files and as a corpus, and runs of the configs on them."""

import os
import subprocess
import sys
from pathlib import Path

import scjax
from scjax.cli.main import main

ROOT = Path(__file__).parent.parent
STUDIES = ("pbmc3k", "pbmc_facs")


def write_cells(folder: Path, every: int = 6) -> None:
    """Every so many cells of the two studies: both.h5ad, a file of each, a corpus and 300 variable genes."""
    cells = scjax.datasets.pbmc()[::every].copy()
    cells.write_h5ad(folder / "both.h5ad")
    for study in STUDIES:
        cells[cells.obs["study"] == study].copy().write_h5ad(folder / f"{study}.h5ad")
    sources = [str(folder / f"{study}.h5ad") for study in STUDIES]
    build = ["corpus", "build", *sources, "--out", str(folder / "corpus"), "--validation", "0.1"]
    genes = ["corpus", "genes", str(folder / "corpus"), "--top", "300", "--out", str(folder / "genes.tsv")]
    assert main(build) == 0 and main(genes) == 0


def run_experiment(*args: str, fast_compile: bool = True) -> subprocess.CompletedProcess:
    """experiments/pretrain.py in a process of its own; ``fast_compile`` for runs of a few steps."""
    flags = "--xla_backend_optimization_level=0" if fast_compile else ""
    command = [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *args]
    env = dict(os.environ, XLA_FLAGS=flags)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def smoke(config: str, folder: Path, **options: bool) -> Path:
    """The run directory of a config's ``:smoke`` on what :func:`write_cells` wrote."""
    workdir = folder / "runs" / config
    done = run_experiment(
        f"--config={ROOT}/configs/{config}.py:smoke",
        f"--workdir={workdir}",
        f"--config.data.corpus={folder}/corpus",
        f"--config.data.genes={folder}/genes.tsv",
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir

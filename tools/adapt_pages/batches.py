"""Batch correction by training on four studies of blood, beside what corrects principal components.

    python tools/adapt_pages/batches.py
    rivals/bin/python tools/adapt_pages/batches_rivals.py     (before it, where scVI is to be compared)

Trains ``configs/batches.py`` once for each way on the same cells, from scratch, and scores the embeddings by
scjax.eval.integration: two axes, batches mixed and kinds of cells kept apart, which are never summed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
from batches_data import BATCH, BLOOD, LABEL, N_GENES, PER_STUDY, cells, scored
from common import ROOT, arguments, page, table

import scjax
from scjax.eval.baselines import Expression

WAYS = ("none", "token", "dab", "norm", "token+dab+norm")
METRICS = ("bio", "batch", "clisi", "kmeans_nmi", "ilisi", "cilisi", "bras", "pcr")
UNCORRECTED, NOISE = "PCA (uncorrected)", "noise"


def prepared(adata: ad.AnnData, where: Path) -> None:
    """The corpus of these cells and its variable genes, once."""
    from scjax.corpus import variable_genes

    if not (where / "corpus" / "HEAD").exists():
        where.mkdir(parents=True, exist_ok=True)
        for study in BLOOD:
            adata[adata.obs[BATCH] == study].copy().write_h5ad(where / f"{study}.h5ad")
        sources = [where / f"{study}.h5ad" for study in BLOOD]
        scjax.build_corpus(sources, where / "corpus", labels=[LABEL])
    variable_genes(scjax.Corpus.open(where / "corpus"), N_GENES).to_tsv(where / "genes.tsv")


def trained(way: str, where: Path, steps: int, seed: int) -> scjax.api.Model:
    workdir = where / f"{way}-{seed}"
    options = {"data.corpus": where / "corpus", "data.genes": where / "genes.tsv", "train.steps": steps}
    options |= {"seed": seed, "train.checkpoint_every": steps, "model.max_length": 97}
    if "dab" in way:
        options["model.base.model.max_length"] = options.pop("model.max_length")
    command = [sys.executable, "experiments/pretrain.py", f"--config=configs/batches.py:{way}"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in options.items())]
    if not (workdir / f"done-{steps}").exists():
        subprocess.run(command, check=True, cwd=ROOT)
        (workdir / f"done-{steps}").touch()
    return scjax.load(workdir)


def corrected(
    way: str, adata: ad.AnnData, pca: np.ndarray, where: Path, steps: int, seed: int
) -> dict[str, dict]:
    """Scores of one trained model; of "token" also where the embedding is not told the study."""
    model, found = trained(way, where, steps, seed), {}
    for told in (True, False) if way == "token" else (True,):
        name = f"scGPT, {way}" + ("" if told else ", token absent")

        def score(told: bool = told, name: str = name) -> dict:
            scjax.embed(adata, model, key_added="X", context=told)
            return scored(adata, name, adata.obsm["X"], pca)

        found[name] = kept(model.path / f"scores_{told}.json", score)
    return found


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What was scored before a page was stopped is not scored again; without runs/adapt/batches all is."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    return {metric: tuple(score) for metric, score in json.loads(file.read_text()).items()}


def main() -> None:
    args = arguments(__doc__, steps=200, seed=0)
    adata = cells(args.data)
    where = ROOT / "runs" / "adapt" / "batches"
    prepared(adata, where)
    pca = Expression(adata.X, list(adata.var_names)).pca(np.arange(adata.n_obs))
    noise = np.random.default_rng(0).normal(size=(adata.n_obs, 50)).astype(np.float32)
    found = {UNCORRECTED: kept(where / "pca.json", lambda: scored(adata, "pca", pca, pca, "baseline"))}
    found[NOISE] = kept(where / "noise.json", lambda: scored(adata, "noise", noise, pca, "control"))
    rivals = args.out / "batches_rivals.json"
    said = {"note": "no scores of Harmony and scVI at hand: tools/adapt_pages/batches_rivals.py makes them"}
    if rivals.exists():
        said = json.loads(rivals.read_text())
        found |= {name: {m: tuple(v) for m, v in s.items()} for name, s in said.pop("scores").items()}
    ours: dict[str, dict] = {}
    for way in WAYS:
        ours |= corrected(way, adata, pca, where, args.steps, args.seed)
    found |= ours
    rows = [
        [name, *(shown(s.get(metric), metric in METRICS[:2]) for metric in METRICS)]
        for name, s in found.items()
    ]
    text = (
        f"{adata.n_obs:,} cells, {PER_STUDY:,} of each study ({', '.join(BLOOD)}), on {adata.n_vars:,} "
        f"shared genes; models read the {N_GENES:,} most variable, are trained from scratch for "
        f"{args.steps} steps of 64 cells, seed {args.seed} (one: small differences between models are "
        "not to be believed), without labels of types. Scores: `scjax.eval.integration`, 3 samples of 2,000 "
        "cells with a type, 95 % bootstrap intervals over cells and samples. The axis `bio` (types kept "
        "apart) and the axis `batch` (studies mixed within types) are not to be summed: noise mixes "
        "perfectly. Harmony works on the same 50 components, scVI on counts of as many variable genes. "
    )
    page(
        args.out / "batches.md",
        "Batch correction by training, four studies of blood",
        verdict(found, ours),
        "python tools/adapt_pages/batches.py",
        {"": text + said["note"] + ".", "Scores": table(["", *METRICS], rows), "What is compared": WHAT},
        {name: {m: list(v) for m, v in s.items()} for name, s in found.items()},
    )


def shown(score: tuple[float, float | None, float | None] | None, interval: bool) -> str:
    if score is None:
        return ""
    value, low, high = score
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if interval and low is not None else f"{value:.3f}"


def verdict(found: dict, ours: dict) -> str:
    """Where the trained correction that mixes best, of those that keep the types, stands by the others."""
    none = found["scGPT, none"]
    kept = [name for name in ours if name != "scGPT, none" and ours[name]["bio"][0] >= none["bio"][0] - 0.02]
    best = max(kept or [n for n in ours if n != "scGPT, none"], key=lambda name: ours[name]["batch"][0])

    def against(name: str) -> str:
        signs = []
        for axis in ("bio", "batch"):
            (a, *mine), (b, *its) = found[best][axis], found[name][axis]
            apart = max(mine[0], its[0]) > min(mine[1], its[1])
            word = ("above" if a > b else "below") if apart else "level with"
            signs.append(f"{word} it on {axis} ({a:.3f}, {b:.3f})")
        return f"{name}: {signs[0]}, {signs[1]}."

    names = [UNCORRECTED, *(n for n in found if n not in ours and n not in (NOISE, UNCORRECTED))]
    told = " ".join(against(name) for name in names)
    better = [n for n in names if all(found[n][axis][1] > found[best][axis][2] for axis in ("bio", "batch"))]
    lead = (
        f"{' and '.join(better)} beat{'' if better[1:] else 's'} the best trained correction on both axes. "
    )
    return (
        f"{lead if better else ''}Of the corrections trained, {best.removeprefix('scGPT, ')} mixes best"
        f"{' of those that keep the types' if kept else ', and none keeps the types'}: batch "
        f"{none['batch'][0]:.3f} to {found[best]['batch'][0]:.3f}, bio {none['bio'][0]:.3f} to "
        f"{found[best]['bio'][0]:.3f} against the same model uncorrected. Beside {told}"
    )


WHAT = """- none, token, dab, norm: `configs/batches.py`. token: the study stands in the input, dropped for
a tenth of the cells in training ("token absent": not told for the embedding); dab: a network that tells the
study off the embedding, gradient reversed; norm: embedded tokens normalised by the statistics of each
cell's own study.
- PCA: 50 components of log expression of 2,000 variable genes. noise: 50 random numbers a cell."""


if __name__ == "__main__":
    main()

"""Predicted perturbations beside everything simple that could predict them: unseen genes, cell types, donors.

    python tools/adapt_pages/perturbation.py

Each experiment is one run of experiments/perturb.py, which trains, predicts what was held out and has it
scored by scjax.eval. With --start base the runs begin with the shared pretrained model of
tools/adapt_pages/base.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from common import ROOT, arguments, base, page, read, table
from sklearn.decomposition import PCA

from scjax.eval import Results
from scjax.eval.perturbation_data import lognormalise

TITLE = "Predicted perturbations"
COMMAND = "python tools/adapt_pages/perturbation.py"
WORK = ROOT / "runs" / "adapt" / "perturbation"
GENETIC = "perturb_norman_mcfaline_500g"
METRICS = ("pearson_delta", "pearson_systema", "rmse", "discrimination", "edistance")
HEADINGS = ("Pearson of effects", "beyond the mean effect", "RMSE", "discrimination", "energy distance")
MODEL = {"d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 64, "max_length": 65}


def experiments(data: Path) -> Iterator[tuple[str, str, ad.AnnData, dict[str, Any]]]:
    """Name, what is asked, cells, and fields of ``told``."""
    cells = read(data, GENETIC)
    genes = {"tokens": "('features',)", "shift": "('targets', 'features')"}
    genes |= {"features": str(WORK / "genes.tsv")}
    of_k562 = (cells.obs["cell_type"] == "k562").to_numpy()
    yield "k562", "Norman and McFaline-Figueroa, K562: unseen genes and pairs", cells[of_k562].copy(), genes
    glioma = cells[~of_k562].copy()
    yield (
        *("glioma", "McFaline-Figueroa, three glioma lines: unseen genes", glioma),
        genes | {"context": "cell_type"},
    )
    label = {"tokens": "('perturbation',)", "shift": "('perturbation',)", "unseen": "context"}
    drug = read(data, "gbm_panobinostat_300g")
    yield (
        *("panobinostat", "Panobinostat in glioblastoma slices: two of five patients unseen", drug),
        label | {"kind": "chemical", "context": "donor", "fraction": 0.4},
    )
    kang = read(data, "kang_ifnb_labelled_10x")
    stimulus = label | {"kind": "environmental"}
    yield (
        *("kang_types", "Interferon beta in blood: two of five cell types unseen", kang.copy()),
        stimulus | {"context": "cell_type", "fraction": 0.4},
    )
    donor = kang.obs["donor"].astype(str)
    kang.obs["donor_type"] = donor + " " + kang.obs["cell_type"].astype(str)
    control = (kang.obs["perturbation"] == "control").to_numpy()
    half = np.random.default_rng(0).permutation(kang.n_obs) % 2 == 0
    kang.obs["train"] = np.where(control, half, (donor == "101").to_numpy())
    yield (
        *("kang_donor", "Interferon beta in blood: one of two donors unseen", kang),
        stimulus | {"context": "donor_type", "split": "train"},
    )


def gene_table(data: Path) -> None:
    """Genes by loadings on twenty components of blood cells, which are no part of the experiments."""
    blood = read(data, "pbmc3k_10xv1")
    blood = blood[:, np.asarray((blood.X > 0).sum(0)).ravel() >= 10].copy()
    fitted = PCA(20, svd_solver="arpack", random_state=0).fit(lognormalise(blood.X))
    loadings = pd.DataFrame(
        fitted.components_.T * np.sqrt(fitted.explained_variance_), index=blood.var_names.astype(str)
    )
    names = read(data, GENETIC).obs["perturbation"].unique()
    targets = sorted({gene for name in names for gene in name.split("+")} - {"control"})
    # a gene that blood does not express has no component of it
    loadings = loadings.reindex(targets).fillna(0.0) / loadings.loc[:, 0].std()
    loadings.to_csv(WORK / "genes.tsv", sep="\t")


def run(name: str, cells: ad.AnnData, told: dict[str, Any], args: Any, start: Path | None) -> Results:
    """Trains and scores; a run that is there is taken."""
    workdir = WORK / (name if start is None else f"{name}_base")
    if not (workdir / "scores.jsonl").exists():
        cells.obs = cells.obs.loc[:, [c for c in cells.obs if cells.obs[c].notna().all()]]
        cells.write_h5ad(WORK / f"{name}.h5ad")
        fields = {"data.corpus": WORK / f"{name}.h5ad", "data.batch_size": 64, "told.set_size": 16}
        fields |= {"train.steps": args.steps, "train.log_every": 50, "train.checkpoint_every": args.steps}
        fields |= {"optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 20, "told.validation": 0.0}
        fields |= {"optimizer.weight_decay": 0.05, "told.max_cells": 192, "model.rank": 16}
        fields |= {f"told.{key}": value for key, value in told.items()}
        fields |= {f"model.base.model.{key}": value for key, value in MODEL.items()} if start is None else {}
        fields |= {} if start is None else {"start": start}
        command = [sys.executable, "experiments/perturb.py", "--config=configs/perturb.py"]
        command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in fields.items())]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(WORK / "compiled"),
        }
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return Results.read(workdir / "scores.jsonl")


def scores(results: Results) -> tuple[str, dict[str, dict[str, Any]]]:
    """A section: a table for each kind of novelty; and how the model stands, by kind."""
    frame = results.to_frame()
    frame = frame[(frame["label"] == "") & (frame["status"] == "ok")]
    parts, stands = [], {}
    for track, rows in frame.groupby("track"):
        own = rows[(rows["versus"] == "") & rows["metric"].isin(METRICS) & (rows["setting"] == "")]
        lines = []
        for model, its in own.groupby("model_id", sort=False):
            of = {row["metric"]: row for _, row in its.iterrows()}
            shown = [_interval(of[m]) if m in of else "" for m in METRICS]
            lines.append([f"**{model}**" if model == "model" else model, its["model_kind"].iloc[0], *shown])
        told = own["n_groups"].max(), own["n_cells"].max(), own["ci_method"].iloc[0]
        parts += [
            f"**{track}**: {told[0]} held-out condition(s), {told[1]:,} cells; 95 % intervals: {told[2]}.",
            table(["", "kind", *HEADINGS], lines),
        ]
        stands[str(track)] = _standing(rows, own)
    return "\n\n".join(parts), stands


def _interval(row: pd.Series) -> str:
    low, high = row["ci_low"], row["ci_high"]
    interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) and np.isfinite(high) else ""
    return f"{row['value']:.3f}{interval}"


def _standing(rows: pd.DataFrame, own: pd.DataFrame) -> dict[str, str]:
    """ "ahead", "behind" or "level" of the model and the best simple baseline, by Pearson of effects."""
    simple = own[(own["metric"] == "pearson_delta") & (own["model_kind"] == "baseline")]
    best = simple.loc[simple["value"].idxmax(), "model_id"]
    ours = own[(own["metric"] == "pearson_delta") & (own["model_id"] == "model")].iloc[0]
    paired = rows[
        (rows["metric"] == "pearson_delta") & (rows["model_id"] == "model") & (rows["versus"] == best)
    ]
    if len(paired):
        low, high = paired.iloc[0][["ci_low", "ci_high"]]
    else:
        rival = simple[simple["model_id"] == best].iloc[0]
        low, high = ours["ci_low"] - rival["ci_high"], ours["ci_high"] - rival["ci_low"]
    how = "ahead" if low > 0 else "behind" if high < 0 else "level"
    value = simple["value"].max()
    n = int(ours["n_groups"])
    return {
        "how": how,
        "n": n,
        "best": str(best),
        "numbers": f"{ours['value']:.3f} against {value:.3f} of {best}",
    }


def verdict(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One sentence for how often the model beats the best simple baseline, and where it does not."""
    every = [(name, track, of) for name, tracks in found.items() for track, of in tracks.items()]
    of = {how: [f"{n}, {t} ({o['best']}; {o['n']} held out)" for n, t, o in every if o["how"] == how]
          for how in ("ahead", "behind", "level")}  # fmt: skip
    told = [f"clearly ahead of the best simple baseline in {len(of['ahead'])} of {len(every)} comparisons"]
    if of["ahead"]:
        told[0] += f": {'; '.join(of['ahead'])}"
    if of["behind"]:
        told.append(f"The plain baseline wins in {len(of['behind'])}: {'; '.join(of['behind'])}")
    if of["level"]:
        told.append(f"They cannot be told apart in {len(of['level'])}: {'; '.join(of['level'])}")
    return f"By the Pearson correlation of effects the model is {'. '.join(told)}."


def main() -> None:
    args = arguments(__doc__, steps=250, start="scratch")
    WORK.mkdir(parents=True, exist_ok=True)
    gene_table(args.data)
    start = base(args.data) if args.start == "base" else None
    sections, found, values = {}, {}, {}
    own = ", ".join(f"{key} {value}" for key, value in MODEL.items())
    begins = "the shared pretrained scGPT" if start else f"a scGPT of its own from random weights ({own})"
    sections[""] = (
        f"Each model is {begins} with the affine decoder of scjax.models.perturbation: {args.steps} steps "
        "of 4 sets of 16 cells, on the error of the mean and a tenth of the energy distance; one seed. "
        "It reads the control cells and is told perturbed genes by a vector of each and by their "
        "loadings on 20 components of other blood cells (few of them are measured, and some not "
        "expressed there), a drug or stimulus by a learned vector. (The vector of each gene was added "
        "after a first run had been scored, in which genes that blood does not express looked alike.) "
        "What is held out, and half of the control cells, it never saw. The rest is of scjax.eval: "
        "linear(features) is a ridge regression on the same table of genes; half_split, half of the real "
        "cells against the other, is what can be reached. Of RMSE and energy distance lower is better."
    )
    for name, title, cells, told in experiments(args.data):
        results = run(name, cells, told, args, start)
        sections[title], found[name] = scores(results)
        values[name] = found[name]
    page(args.out / "perturbation.md", TITLE, verdict(found), COMMAND, sections, values)


if __name__ == "__main__":
    main()

"""What the :smoke of some configs reads, made in seconds of the cells that ship with the package.

python tools/smoke_data.py citeseq --out runs/citeseq/planted    (a corpus, proteins drawn for each cell)
python tools/smoke_data.py genes --out runs/genes/planted        (which genes are of the ribosome)
python tools/smoke_data.py priors --out runs/priors/planted      (two tables of gene vectors)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import scjax
from scjax.corpus import variable_genes
from scjax.genes import coexpression, spectral, write_vectors
from scjax.genes.autoencoder import masked_autoencoder

CARRIED = {  # protein: the cell types that carry it have this in their names
    "CD3": "T",
    "CD4": "CD4 T",
    "CD8": "CD8 T",
    "CD14": "CD14 monocyte",
    "CD16": "FCGR3A monocyte",
    "CD19": "B",
    "CD34": "CD34+",
    "CD56": "NK",
    "IgG1": "-",
}


def citeseq(folder: Path) -> None:
    """A corpus of real RNA and drawn proteins, and its 300 most variable genes.

    A protein is a gamma-Poisson count: ten molecules of background, and a hundred more in the cell types that
    carry it; IgG1, the control, is background alone.
    """
    cells, rng = scjax.datasets.pbmc()[::4].copy(), np.random.default_rng(0)
    kind = cells.obs["cell_type"].astype(str)
    carries = np.array([[name in of for name in CARRIED.values()] for of in kind])
    mean = (10 + 100 * carries) * rng.lognormal(0, 0.3, (cells.n_obs, 1))
    counts = rng.poisson(rng.gamma(5.0, mean / 5.0)).astype(np.float32)
    cells.obsm["protein"] = pd.DataFrame(counts, cells.obs_names, list(CARRIED))
    how = {"names": ["pbmc"], "values": ["protein"], "validation": 0.1, "progress": False}
    scjax.build_corpus([cells], folder / "corpus", **how)
    variable_genes(scjax.Corpus.open(folder / "corpus"), 300).to_tsv(folder / "genes.tsv")


def genes(folder: Path) -> None:
    """A table of 1 for the genes of the proteins of the ribosome, by their symbols, and 0 for others."""
    names = scjax.datasets.pbmc().var_names
    table = pd.DataFrame({"gene": names, "ribosome": [int(name[:3] in ("RPL", "RPS")) for name in names]})
    table.to_csv(folder / "ribosome.tsv", sep="\t", index=False)


def priors(folder: Path) -> None:
    """Vectors from one graph of co-expression: eigenvectors, and those of a masked graph autoencoder."""
    cells = scjax.datasets.pbmc()
    graph = coexpression(cells.X, list(cells.var_names), min_cells=600)
    made = {"spectral": spectral(graph, 32), "masked": masked_autoencoder(graph, 32, steps=50)[0]}
    for name, vectors in made.items():
        write_vectors(folder / f"{name}.npz", graph.names, vectors, {"graph": graph.summary, "method": name})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    makers = {made.__name__: made for made in (citeseq, genes, priors)}
    parser.add_argument("config", choices=makers, help="whose smoke is to read it")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    makers[args.config](args.out)


if __name__ == "__main__":
    main()

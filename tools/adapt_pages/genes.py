"""What static vectors of genes, and states in cells, tell of what genes do, in families not seen before.

python tools/adapt_pages/genes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from common import arguments, base, page, read, table
from fitting import kept, over

import scjax
import scjax.eval
from scjax.eval import gene_sets
from scjax.genes import lsa, read_descriptions, read_graph, spectral

CELLS, SHOWN = "pbmc4k_10xv2", ("auroc", "macro_ap")
COLLECTION = "reactome_wikipathways_msigdb_v7.5.1.gmt.gz"


def main() -> None:
    args = arguments(__doc__, cells=256, repeats=1, sets=12)
    model = scjax.load(base(args.data))
    twin = model.random_twin()
    adata = read(args.data, CELLS)
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[: args.cells]].copy()
    batches = kept(adata, model.vocabulary, 32, bucket_lengths=None, duplicates="sum")
    symbols = model.vocabulary.symbols
    tables = {"states": _states(model, batches), "states of a random network": _states(twin, batches)}
    there = tables["states"].index  # genes that the cells express
    for name, of in (("static vectors", model), ("static vectors of a random network", twin)):
        tables[name] = _once(pd.DataFrame(of.gene_embedding(), index=symbols)).loc[there]
    folder = args.data / "genes"
    texts = read_descriptions(folder / "hgnc_like_symbols_aliases_human.tsv.gz", "symbol", ["gene_name"])
    texts = {gene: words for gene, words in texts.items() if gene in set(there)}
    tables["text (LSA)"] = _whole(pd.DataFrame(lsa(texts, 64), index=list(texts)), there)
    network = read_graph(folder / "ppi_omnipath_human.tsv.gz")
    tables["PPI, spectral"] = _whole(pd.DataFrame(spectral(network, 64), index=list(network.names)), there)

    labels = _labels(folder, set(there))
    found = scjax.eval.genes(
        tables,
        labels,
        collections={"Reactome and WikiPathways": gene_sets.read_gmt(folder / COLLECTION)},
        background=list(there),
        expression=adata,
        baselines=["text (LSA)", "PPI, spectral"],
        twins={"states": "states of a random network"},
        dataset=CELLS,
        repeats=args.repeats,
        max_sets=args.sets,
        n_boot=500,
    )
    _page(args, found, labels, len(there))


def _states(model: Any, batches: list[Any]) -> pd.DataFrame:
    """The mean state of each gene over the cells that express it, by symbol."""
    n = len(model.vocabulary)

    def states(module: Any, batch: Any) -> Any:
        gene, x = module.states(batch)
        return jnp.where(batch.weight[:, None] > 0, gene, -1), x.astype(jnp.float32)

    run, total, count = over(states, model.abstract), 0.0, np.zeros(n)
    for batch in batches:
        gene, x = run(model.params, model.buffers, [batch])
        here, sums = gene >= 0, np.zeros((n, x.shape[-1]))
        np.add.at(sums, gene[here], x[here])
        np.add.at(count, gene[here], 1)
        total = total + sums
    keep = count >= 5
    means = pd.DataFrame(total[keep] / count[keep, None], index=np.array(model.vocabulary.symbols)[keep])
    return _once(means)


def _once(given: pd.DataFrame) -> pd.DataFrame:
    """Of genes that share a symbol the first."""
    return given[~given.index.duplicated()]


def _whole(given: pd.DataFrame, genes: Any) -> pd.DataFrame:
    """The table at all genes, zero where it has none: that a source does not know a gene tells something."""
    return given.reindex(genes).fillna(0.0)


def _labels(folder: Path, there: set[str]) -> dict[str, dict[str, int]]:
    lists = gene_sets.read_lists(folder / "gene_property_lists_human.tsv.gz")
    dosage = {g for n, of in lists.items() if "haploinsufficiency" in n or "clingen" in n for g in of}
    among = lambda of: gene_sets.contrast(there & set(of), there - set(of))  # noqa: E731
    wanted = {
        "dosage-sensitive or tolerant to loss": gene_sets.contrast(
            dosage & there, set(lists["homozygous_lof_tolerant_twohit"]) & there
        ),
        "essential in cell lines": among(lists["CEGv2_subset_universe"]),
        "essential in the mouse": among(lists["mgi_essential"]),
    }
    return {
        name: of for name, of in wanted.items() if min(sum(of.values()), len(of) - sum(of.values())) >= 15
    }


def _page(args: Any, found: Any, labels: Any, n: int) -> None:
    rows = [
        r
        for r in found.rows
        if r["metric"] in SHOWN
        and not r["versus"]
        and not r["label"]
        and r["head"] in ("logistic", "ridge", "frequency")
        and (r["task"] != "genes/property" or r["head"] != "ridge")
    ]
    tracks = list(dict.fromkeys(r["track"] for r in rows))
    score = {(r["model_id"], r["track"]): r for r in rows if np.isfinite(r["value"])}
    names = [name for name in dict.fromkeys(r["model_id"] for r in rows) if name != "oracle"]

    def show(name: str, track: str) -> str:
        r = score.get((name, track))
        return "" if r is None else f"{r['value']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]"

    simple = ("expression_level", "pca", "coexpression", "random", "text (LSA)", "PPI, spectral")
    said = []
    for track in tracks:
        best = max((s for s in simple if (s, track) in score), key=lambda s: score[s, track]["value"])
        ahead = [
            m for m in ("states", "static vectors") if score[m, track]["ci_low"] > score[best, track]["value"]
        ]
        values = ", ".join(f"{m} {score[m, track]['value']:.3f}" for m in ("states", "static vectors", best))
        said.append(f"{track}: {' and '.join(ahead) or 'neither'} ahead of {best} ({values})")
    verdict = (
        "Vectors of genes from a small model, beside the best of expression level, co-expression, text and "
        f"interactions: {'; '.join(said)}."
    )
    positives = "; ".join(f"{name}: {sum(of.values())} of {len(of)}" for name, of in labels.items())
    how = (
        f"{n:,} genes of the model's vocabulary that at least 5 of {args.cells} cells of {CELLS} "
        "express (the base "
        f'was pretrained on that study, among others, without labels; {positives}). "static '
        'vectors" are the gene '
        'embedding of the model, "states" the mean over cells of a gene\'s state in the last layer; "random '
        'network" is the same architecture untrained. Logistic regression for properties '
        "(AUROC), ridge regression "
        f"for {args.sets} sets drawn from Reactome and WikiPathways (mean average precision); "
        f"{args.repeats} x 5 "
        "folds over gene families guessed from symbols, so that paralogues of one name are "
        "never on both sides; "
        "intervals: 95 % bootstrap over families, 500 resamples. A table counts as ahead where "
        "its interval lies "
        "above the other's score."
    )
    page(
        args.out / "gene_function.md",
        "Gene function from vectors of genes",
        verdict,
        "python tools/adapt_pages/genes.py",
        {
            "Scores": table(
                ["vectors", *tracks], [[name, *(show(name, t) for t in tracks)] for name in names]
            ),
            "How": how,
        },
        {f"{m} | {t}": r["value"] for (m, t), r in score.items()},
    )


if __name__ == "__main__":
    main()

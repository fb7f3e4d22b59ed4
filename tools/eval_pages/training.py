"""What pretraining did, without labels: diagnostics, masked values, invariance, overlap with the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from eval_pages.common import MODEL, Page, embedded, read, seen

import scjax.eval
from scjax.eval import Results

BLOOD, COUNT = "kang_ctrl_8donors_10x", 2000  # cells masked
PBMC = "pbmc3k_10xv1"


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """Diagnostics of two sets of blood cells; the rest needs a model."""
    for name in (BLOOD, PBMC):
        title = f"What the representation of {name} holds besides biology"
        yield f"diagnostics_{name}", title, partial(_diagnostics, data, model, name)
    if model is not None:
        yield "masked_values", "Masked values of blood cells", partial(_masked, data, model)
        yield "invariance", "Does a cell stand for itself?", partial(_invariance, data, model)


def _diagnostics(data: Path, model: Path | None, name: str) -> Results:
    adata = read(data, name)
    subject = embedded(data, adata, model)
    if not subject.embeddings:
        raise ValueError("diagnostics of the development data need a model (--model)")
    group = "donor" if "donor" in adata.obs and adata.obs["donor"].nunique() > 1 else None
    results = scjax.eval.diagnostics(
        adata,
        subject.embeddings,
        group_key=group,
        controls=subject.controls,
        dataset=name,
    )
    results.facts |= subject.facts
    return results


def _masked(data: Path, model: Path) -> Results:
    """Values of the model's own scale, hidden as in its training; its twin is shown the same."""
    import scjax

    adata = read(data, BLOOD)
    adata = adata[np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:COUNT])].copy()
    handle = scjax.load(model)
    truth, mask, mine = _hidden(handle, adata)
    _, again, twin = _hidden(handle.random_twin(), adata)
    assert (mask == again).all()  # masks come from (key, row, gene), not from parameters
    results = scjax.eval.masked_error(
        truth,
        {MODEL: mine, "random_init": twin},
        mask,
        groups=adata.obs["donor"],
        genes=handle.vocabulary.symbols,
        twins={MODEL: "random_init"},
        dataset=BLOOD,
    )
    results.facts["pretrain_overlap"] = seen(model, adata).verdict
    return results


def _hidden(handle: Any, adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, what was hidden, predictions), each [cells, genes of the model], of an scGPT model."""
    import jax

    from scjax.loader import cells

    @jax.jit
    def run(batch: Any) -> Any:
        tokens = handle.module.encode(batch, jax.random.key(0))
        _, states = handle.module(tokens)
        return tokens.gene_id, tokens.target, tokens.hidden, handle.module.decoder(states, None)[0]

    out = np.zeros((3, adata.n_obs, len(handle.vocabulary)), np.float32)
    start = 0
    for batch in cells(adata, handle.vocabulary, 64, duplicates="sum"):
        gene, *found = (np.asarray(x)[: adata.n_obs - start] for x in run(batch))
        row, slot = np.nonzero(gene >= 0)
        for table, values in zip(out, found, strict=True):
            table[start + row, gene[row, slot]] = values[row, slot]
        start += 64
    return out[0], out[1] > 0, out[2]


def _invariance(data: Path, model: Path) -> Results:
    import scjax

    return scjax.eval.invariance(scjax.load(model), read(data, BLOOD), name=MODEL, n_cells=128, dataset=BLOOD)

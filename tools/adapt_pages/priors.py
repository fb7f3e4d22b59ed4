"""Do graphs and texts about genes help a model with genes that it has never seen in a cell?

    python tools/adapt_pages/priors.py

One small scGPT for each kind of gene table, trained on three studies of blood in which a quarter of the genes
are struck out, and tested on the hidden values of a fourth study, where they are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, page, read, table
from fitting import Fit, kept, over

from scjax.genes import (
    Vocabulary,
    coexpression,
    lsa,
    match_values,
    read_descriptions,
    read_graph,
    shuffled,
    spectral,
)
from scjax.genes.autoencoder import masked_autoencoder
from scjax.genes.graph import GeneGraph, normalised
from scjax.genes.sentences import sentence_vectors
from scjax.genes.tables import GeneValues
from scjax.models import build

TRAIN, TEST, ELSEWHERE = ("pbmc3k_10xv1", "pbmc4k_10xv2"), "kang_ifnb_2k_10x", "breast_cancer_31lines_dropseq"
DIM, N_GENES, N_CELLS, LENGTH = 64, 1200, 1500, 97
MODEL = {
    **{"d_model": 48, "n_heads": 2, "n_layers": 2, "d_ff": 96, "max_length": LENGTH, "dropout": 0.0},
    **{"norm": "pre", "values": "binned", "n_bins": 51, "tie": "mid", "value_scale": 1 / 50},
    **{"objective": "masked", "mask_fractions": (0.5,), "mvc_weight": 0.0, "dtype": "float32"},
}
CONTROL = {
    "PPI, spectral": "PPI shuffled, spectral",
    "PPI, masked autoencoder": "PPI shuffled, masked autoencoder",
    "co-expression in breast cancer lines": "random table",
    "text, MiniLM": "text of other genes, MiniLM",
    "text, words (LSA)": "random table",
    "PPI and text, mixed": "controls of both, mixed",
    "learned": "random table",
}


def main() -> None:
    args = arguments(__doc__, steps=300, seeds=2)
    studies = {name: read(args.data, name) for name in (*TRAIN, TEST)}
    vocabulary, counts = _genes(studies)
    rng = np.random.default_rng(0)
    unseen = rng.random(len(vocabulary)) < 0.25
    tables = _tables(args.data, vocabulary, rng)
    train: list[Any] = []
    for name in TRAIN:
        adata = studies[name][:, counts[name]]
        of = vocabulary.match(adata.var).ids
        adata = adata[rng.permutation(adata.n_obs)[:N_CELLS], (of >= 0) & ~unseen[of]].copy()
        train += kept(adata, vocabulary, 32)
    cells = studies[TEST]
    cells = cells[cells.obs["condition"].isin(["control", "ctrl"])]
    test = kept(cells[:640].copy(), vocabulary, 32)
    mean = _mean(train, len(vocabulary))

    errors: dict[str, list[np.ndarray]] = {}
    fits: dict[str, tuple[Fit, Any]] = {}
    for name, parts in tables.items():
        kind = {0: "random", 1: "projected"}.get(len(parts), "mixed")
        config: dict[str, Any] = {"kind": kind} | ({"dim": DIM} if kind == "projected" else {})
        if kind == "mixed":
            config["mix"] = {part: {"kind": "projected", "dim": DIM} for part in parts}
        if kind not in fits:
            model = build("scgpt", MODEL | {"gene_table": config}, len(vocabulary))
            fits[kind] = Fit(model, args.steps, 3e-3), over(_hidden, model)
        places = {part: "gene" if kind == "projected" else f"gene/mixed/{part}" for part in parts}
        values = {f"{places[p]}/table": parts[p].values for p in parts}
        values |= {f"{places[p]}/known": parts[p].known for p in parts}
        for seed in range(args.seeds):
            fit, read_values = fits[kind]
            found = read_values(*fit(train, values, seed=seed), test)
            errors.setdefault(name, []).append(_by_gene(found, mean, len(vocabulary)))
            print(f"{name}, seed {seed}", flush=True)
    _page(args, errors, unseen, tables, vocabulary)


# ------------------------------------------------------------------------------------------- what is given
def _genes(studies: dict[str, Any]) -> tuple[Vocabulary, dict[str, np.ndarray]]:
    """The genes found in most cells, over studies, among those that all studies measure."""
    shared = set.intersection(*(set(s.var_names) for s in studies.values()))
    names = sorted(shared)
    found = sum(np.asarray((s[:, names].X > 0).mean(0)).ravel() for s in studies.values())
    chosen = [names[i] for i in np.sort(np.argsort(-found)[:N_GENES])]
    return Vocabulary(chosen), {n: np.isin(s.var_names, chosen) for n, s in studies.items()}


def _tables(data: Path, vocabulary: Vocabulary, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Name of a condition -> its tables, all of one width, matched to the vocabulary."""
    n, folder = len(vocabulary), data / "genes"
    ppi = read_graph(folder / "ppi_omnipath_human.tsv.gz")
    texts = read_descriptions(folder / "hgnc_like_symbols_aliases_human.tsv.gz", "symbol", ["gene_name"])
    texts = {g: words for g, words in texts.items() if g in vocabulary}
    minilm, symbols = _narrow(sentence_vectors(list(texts.values()))), list(texts)
    lines = read(data, ELSEWHERE)
    lines = lines[:, np.isin(lines.var_names, vocabulary.symbols)]
    together = coexpression(lines.X, list(lines.var_names), source=ELSEWHERE)

    def matched(names: Any, vectors: np.ndarray) -> Any:
        return match_values(GeneValues(tuple(names), vectors, ""), vocabulary)

    def of(graph: GeneGraph, method: str) -> Any:
        vectors = (
            spectral(graph, DIM) if method == "spectral" else masked_autoencoder(graph, DIM, steps=150)[0]
        )
        return matched(graph.names, vectors)

    null = shuffled(ppi)
    other = matched(symbols, minilm[rng.permutation(len(symbols))])
    text, spectrum, no_spectrum = matched(symbols, minilm), of(ppi, "spectral"), of(null, "spectral")
    return {
        "learned": {},
        "random table": {"t": matched(vocabulary.symbols, rng.normal(size=(n, DIM)).astype(np.float32))},
        "PPI, spectral": {"t": spectrum},
        "PPI shuffled, spectral": {"t": no_spectrum},
        "PPI, masked autoencoder": {"t": of(ppi, "masked")},
        "PPI shuffled, masked autoencoder": {"t": of(null, "masked")},
        "co-expression in breast cancer lines": {"t": of(together, "spectral")},
        "text, MiniLM": {"t": text},
        "text of other genes, MiniLM": {"t": other},
        "text, words (LSA)": {"t": matched(symbols, lsa(texts, DIM))},
        "PPI and text, mixed": {"graph": spectrum, "text": text},
        "controls of both, mixed": {"graph": no_spectrum, "text": other},
    }


def _narrow(vectors: np.ndarray) -> np.ndarray:
    """The leading principal components, so that all tables have one width."""
    centred = vectors - vectors.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return normalised(left[:, :DIM] * size[:DIM])


# ------------------------------------------------------------------------------------------------- scores
def _mean(train: list[Any], n: int) -> float:
    """Of all values in the training cells, as the model sees them."""
    model = build("scgpt", MODEL, n).make()
    run = jax.jit(lambda batch: (model.values(batch, None) * (batch.gene_id >= 0)).sum())
    return float(sum(run(batch) for batch in train) / sum((batch.gene_id >= 0).sum() for batch in train))


def _hidden(module: Any, batch: Any) -> tuple[Any, ...]:
    """Gene (-1: not hidden), value and prediction of each token."""
    tokens = module.encode(batch, jax.random.key(7))
    gene = jnp.where(tokens.hidden, tokens.gene_id, -1)
    return gene, tokens.target, module.decoder(module(tokens)[1], None)[0]


def _by_gene(found: tuple[np.ndarray, ...], mean: float, n: int) -> np.ndarray:
    """[3, n]: squared errors of hidden values, how many there are, and squared errors of one number."""
    gene, value, guess = (x.ravel() for x in found)
    here, out = gene >= 0, np.zeros((3, n))
    for row, of in enumerate(((guess - value) ** 2, np.ones(len(gene)), (mean - value) ** 2)):
        np.add.at(out[row], gene[here], of[here])
    return out


def _page(args: Any, errors: Any, unseen: Any, tables: Any, vocabulary: Any) -> None:
    of = {name: np.sum(found, 0) for name, found in errors.items()}
    plain = of["learned"]
    judged = plain[1] > 5 * args.seeds
    rng = np.random.default_rng(3)
    draws: dict[bool, list[np.ndarray]] = {}
    for group in (True, False):
        genes = np.flatnonzero(judged & (unseen == group))
        draws[group] = [genes, *(rng.choice(genes, len(genes)) for _ in range(1000))]

    def error(name: str, genes: np.ndarray) -> float:
        return of[name][0, genes].sum() / of[name][1, genes].sum()

    def interval(values: list[float]) -> str:
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return f"{values[0]:+.1%} [{low:+.1%}, {high:+.1%}]"

    rows, gains = [], {}
    for name in sorted(of, key=lambda name: error(name, draws[True][0])):
        row: list[Any] = [name, min((int(t.known.sum()) for t in tables[name].values()), default=0)]
        for group in (True, False):
            row.append(f"{1000 * error(name, draws[group][0]):.2f}")
            control = CONTROL.get(name)
            if control is None:
                row.append("(control)")
                continue
            gain = [1 - error(name, genes) / error(control, genes) for genes in draws[group]]
            low, high = np.percentile(gain[1:], [2.5, 97.5])
            gains[name, group] = (gain[0], low, high)
            row.append(interval(gain))
        rows.append(row)
    best = min(CONTROL, key=lambda name: error(name, draws[True][0]))
    won = [name for name in CONTROL if name != "learned" and gains[name, True][1] > 0]
    gain, low, high = gains[best, True]
    verdict = (
        f"On genes never seen in training the best table, {best}, has {gain:.1%} [{low:.1%}, "
        f"{high:.1%}] less "
        f"squared error than its control ({CONTROL[best]}); {len(won)} of {len(CONTROL) - 1} "
        "tables are ahead of "
        "theirs"
    )
    verdict += f" ({'; '.join(won)})." if won else ": no table is shown to help."
    seen_won = [n for n in CONTROL if n != "learned" and gains[n, False][1] > 0]
    verb = "are" if len(seen_won) > 1 else "is"
    verdict += f" On genes that were trained on, {', '.join(seen_won) or 'none'} {verb}."
    first = draws[True][0]
    constant = f"{1000 * plain[2, first].sum() / plain[1, first].sum():.2f}"
    head = ["gene table", "genes with a vector", "unseen genes: error x 1000", "against its control"]
    head += ["trained genes: error x 1000", "against its control"]
    how = (
        f"{len(vocabulary):,} genes found in most cells of {', '.join((*TRAIN, TEST))}; a quarter of them, "
        f"{int(unseen.sum())}, are struck out of the training cells ({N_CELLS:,} at most of each of "
        f"{' and '.join(TRAIN)}). A scGPT of two layers of width 48 is trained for {args.steps} "
        "steps of 32 cells, "
        f"{args.seeds} seeds of the order of cells, and half of the values of the unstimulated "
        f"cells of {TEST} are "
        "hidden from it. Errors are of binned values (0 to 1) of expressed genes, by mean "
        "square. Tables of graphs "
        f"and texts are {DIM} wide (MiniLM by its principal components) and stand under a "
        "learned linear map; "
        '"learned" has none, so that its vectors of unseen genes are as they began. "PPI" is '
        "OmniPath's list of "
        "protein interactions; shuffled keeps the degree of each gene. Intervals: 95 % "
        "percentile bootstrap over "
        "genes (seeds pooled). The same number for all genes, the mean of the training values, "
        f"has {constant} on "
        "the unseen ones."
    )
    page(
        args.out / "gene_priors.md",
        "Gene tables from graphs and texts",
        verdict,
        "python tools/adapt_pages/priors.py",
        {"Hidden values of another study": table(head, rows), "How": how},
        {name: [error(name, draws[group][0]) for group in (True, False)] for name in of},
    )


if __name__ == "__main__":
    main()

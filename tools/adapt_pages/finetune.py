"""Fine-tuning against a frozen probe, a pretrained start against a random one, by the number of labels.

    make quickstart
    python tools/adapt_pages/finetune.py
    python tools/adapt_pages/finetune.py --base runs/adapt/base --name finetune_mixed

The first begins with the model of the quickstart, which was trained on two of the studies, without labels and
on genes that vary in blood; the second with the base of the other pages (base.py), of eight studies, most of
them not of blood. Four studies of blood; two of them in turn are held out as a whole. Cell types of the
others are learned from 1 %, 10 % or all of their labels, and predicted in the study held out.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from common import BASE, arguments, base, blood, page, table
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import f1_score

HELD_OUT = ("kang_ifnb_2k_10x", "pbmc_facs_10xv1")
LABEL = "cell_type_harmonised"
SHARES = (0.01, 0.1, 1.0)
RATES = {"lora": 5e-3, "all": 1e-3}
N_BOOT = 500
NAMES = {
    "pca": "PCA + logistic regression",
    "probe": "frozen probe",
    "lora": "LoRA",
    "all": "full fine-tuning",
}


def take(cells: ad.AnnData, rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(np.flatnonzero(rows))[:n])


def pca(train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Fifty components of log counts per 10,000, fitted to all cells of the training studies."""

    def logs(cells: ad.AnnData) -> sparse.csr_matrix:
        x = sparse.csr_matrix(cells.X, dtype=np.float64)
        return (sparse.diags(1e4 / np.maximum(np.asarray(x.sum(1)).ravel(), 1)) @ x).log1p()

    reduce = TruncatedSVD(50, random_state=0).fit(logs(train))
    return reduce.transform(logs(train)), reduce.transform(logs(test))


def scores(truth: np.ndarray, guess: np.ndarray, seed: int) -> np.ndarray:
    """Macro-F1 over the types of the test cells, then that of each resample of them: [1 + N_BOOT]."""
    rng, labels = np.random.default_rng(seed), np.unique(truth)
    out = []
    for b in range(1 + N_BOOT):
        rows = np.arange(len(truth)) if b == 0 else rng.integers(len(truth), size=len(truth))
        f1 = f1_score(truth[rows], guess[rows], labels=labels, average="macro", zero_division=0)
        out.append(f1)
    return np.array(out)


def main() -> None:
    args = arguments(__doc__, steps=200, cells=500, length=129, base="runs/quickstart", name="finetune")
    import scjax
    from scjax.api import Model
    from scjax.finetune import FitConfig, Task, fit, predict
    from scjax.finetune.annotate import probe

    began = time.process_time()
    start = Path(args.base)
    pretrained = scjax.load(base(args.data) if start.resolve() == BASE else start)
    # fewer tokens a cell, for all methods alike: this page is made on two processor cores
    pretrained = dataclasses.replace(pretrained, config=pretrained.config | {"max_length": args.length})
    starts = {"pretrained": pretrained, "random": pretrained.random_twin()}
    cells = blood(args.data)
    known = cells.obs[LABEL].notna() & ~cells.obs[LABEL].astype(str).isin(["unlabelled", "unknown", "nan"])
    cells = cells[known.to_numpy()].copy()
    study, label = cells.obs["study"].astype(str).to_numpy(), cells.obs[LABEL].astype(str).to_numpy()
    result: dict[tuple[str, float, str, str], np.ndarray] = {}
    sizes: dict[str, Any] = {}
    for held in HELD_OUT:
        rng = np.random.default_rng(0)
        others = [name for name in np.unique(study) if name != held]
        pool = np.concatenate([take(cells, study == name, args.cells, rng) for name in others])
        shared = [t for t in np.unique(label[pool]) if (label[pool] == t).sum() >= 20]
        pool = pool[np.isin(label[pool], shared)]
        test = take(cells, (study == held) & np.isin(label, shared), args.cells, rng)
        train, query = cells[pool].copy(), cells[test].copy()
        truth = label[test]
        sizes[held] = {"train": len(pool), "test": len(test), "types": len(shared)}
        vectors = {("pca", "none"): pca(train, query)}
        for start, model in starts.items():
            vectors["probe", start] = (model.embed(train), model.embed(query))
        # one cell of each type first, so that few labels still name every type
        order = rng.permutation(len(pool))
        first = [order[np.argmax(label[pool][order] == t)] for t in shared]
        order = np.concatenate([first, order[~np.isin(order, first)]])
        for share in SHARES:
            rows = order[: max(round(share * len(pool)), len(shared))]
            names = label[pool][rows]

            def note(
                method: str, start: str, guess: np.ndarray, held: str = held, share: float = share
            ) -> None:
                result[held, share, method, start] = scores(truth, guess, 0)  # noqa: B023
                value = result[held, share, method, start][0]
                print(
                    f"{time.process_time() - began:6.0f} s  {held} {share:.0%} {method} {start} {value:.3f}"
                )

            for (method, start), (x, x_query) in vectors.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    guess = probe(x[rows], names).predict(x_query)
                result[held, share, method, start] = scores(truth, guess, 0)
            with tempfile.TemporaryDirectory() as folder:
                labelled = train[rows].copy()
                options = {"names": ["train"], "labels": [LABEL], "progress": False, "workers": 1}
                corpus = scjax.build_corpus([labelled], f"{folder}/corpus", **options)
                for method, rate in RATES.items():
                    how = FitConfig(
                        method, steps=args.steps, learning_rate=rate, weights={LABEL: 0.0}, patience=None
                    )
                    for start, model in starts.items():
                        found = fit(model, corpus, {"type": Task(source=LABEL)}, how)
                        found.pop("report")
                        told = predict(Model(**found), query, batch_size=100)["type"]
                        classes = np.array(found["categories"][LABEL])
                        result[held, share, method, start] = scores(truth, classes[told.argmax(1)], 0)
            print(f"{time.process_time() - began:.0f} s: {held}, {share:.0%} of labels", flush=True)
    sections, verdict, values = report(result, sizes)
    sections["Data and settings"] = (
        f"{args.cells} labelled cells of each of three studies are 100 %, {args.cells} cells of "
        "the fourth are the test, types with 20 cells or more in training; cells with a type of "
        f"`{LABEL}`. Held out in turn: {', '.join(f'`{name}` ({of})' for name, of in sizes.items())}. "
        "At 1 % every type has at least one cell. The base: "
        f"`{Path(pretrained.path).name}`, {pretrained.system} of {pretrained.n_parameters:,} parameters, "
        f"step {pretrained.step:,}; it has "
        "seen no label, and nothing of Kang. It reads the "
        f"{args.length - 1} most expressed genes of a cell. Fine-tuning: {args.steps} steps of 32 cells, "
        f"classes drawn alike, learning rates {RATES}, nothing chosen on the test study, no early stopping "
        "(too few labels). LoRA: rank 8 in all products of all layers. The probes are a logistic regression "
        "on standardised vectors, strength by cross-validation; PCA sees all cells of the training studies. "
        f"Intervals: 95 %, {N_BOOT} resamples of the test cells, paired in differences; they hold for cells "
        "of that study and not for other studies. One draw of the labels, one seed. "
        f"{time.process_time() - began:,.0f} processor seconds."
    )
    page(
        args.out / f"{args.name}.md",
        "Fine-tuning, by the number of labels",
        verdict,
        " ".join(["python tools/adapt_pages/finetune.py", *sys.argv[1:]]),
        sections,
        values,
    )


def interval(x: np.ndarray) -> str:
    low, high = np.quantile(x[1:], [0.025, 0.975])
    return f"{x[0]:.3f} ({low:.3f} to {high:.3f})"


def report(
    result: Mapping[tuple[str, float, str, str], np.ndarray], sizes: Mapping[str, Any]
) -> tuple[dict[str, str], str, Any]:
    """Sections, the verdict and the numbers of a page."""
    ways = [("pca", "none"), *((m, s) for m in ("probe", "lora", "all") for s in ("pretrained", "random"))]
    name = lambda m, s: NAMES[m] + ("" if s == "none" else f", {s} start")  # noqa: E731
    studies = list(sizes)
    mean = {(f, m, s): np.mean([result[h, f, m, s] for h in studies], 0) for f in SHARES for m, s in ways}
    shown = [f"{share:.0%}" for share in SHARES]
    scores = table(
        ["mean of the two studies", *shown],
        [[name(m, s), *(interval(mean[f, m, s]) for f in SHARES)] for m, s in ways],
    )
    each = table(
        ["study held out", "method", *shown],
        [[h, name(m, s), *(float(result[h, f, m, s][0]) for f in SHARES)] for h in studies for m, s in ways],
    )
    pairs = {
        "LoRA - frozen probe": (("lora", "pretrained"), ("probe", "pretrained")),
        "full - frozen probe": (("all", "pretrained"), ("probe", "pretrained")),
        "frozen probe: pretrained - random": (("probe", "pretrained"), ("probe", "random")),
        "LoRA: pretrained - random": (("lora", "pretrained"), ("lora", "random")),
        "full: pretrained - random": (("all", "pretrained"), ("all", "random")),
        "LoRA - PCA": (("lora", "pretrained"), ("pca", "none")),
        "full - PCA": (("all", "pretrained"), ("pca", "none")),
    }
    gaps = {what: [mean[f, *a] - mean[f, *b] for f in SHARES] for what, (a, b) in pairs.items()}
    differences = table(["difference", *shown], [[what, *map(interval, of)] for what, of in gaps.items()])

    def clear(of: Sequence[np.ndarray], sign: int = 1) -> str:
        """At which shares of labels the interval of a difference lies above (below) 0."""
        where = [at for at, x in zip(shown, of, strict=True) if (np.quantile(sign * x[1:], 0.025) > 0)]
        return ", ".join(where) if where else "no share of labels"

    best = {f: max(ways, key=lambda way: mean[f, *way][0]) for f in SHARES}
    wins = "; ".join(
        f"{at}: {name(*best[f])} ({mean[f, *best[f]][0]:.2f}; PCA {mean[f, 'pca', 'none'][0]:.2f})"
        for at, f in zip(shown, SHARES, strict=True)
    )
    plain = [at for at, f in zip(shown, SHARES, strict=True) if best[f][0] == "pca"]
    better, worse = ([clear(gaps[f"{m} - frozen probe"], sign) for m in ("LoRA", "full")] for sign in (1, -1))
    started = [clear(gaps[f"{m}: pretrained - random"]) for m in ("LoRA", "full")]
    verdict = f"PCA with a logistic regression wins at {', '.join(plain)} of labels. " if plain else ""
    verdict += (
        f"Best macro-F1 in a study held out, by share of labels: {wins}. Fine-tuning is clearly better than "
        f"the frozen probe at {better[0]} (LoRA) and {better[1]} (full), clearly worse at {worse[0]} and "
        f"{worse[1]}; a pretrained start clearly better than a random one at {started[0]} (LoRA) and "
        f"{started[1]} (full)."
    )
    sections = {
        "Macro-F1 of cell types in the study held out": scores,
        "Differences": differences + "\n\nClearly: the interval of the difference does not hold 0.",
        "Each study": each,
    }
    values = {
        "macro_f1": {f"{h} {f} {m} {s}": float(x[0]) for (h, f, m, s), x in result.items()},
        "differences": {
            what: {at: [float(x[0]), *map(float, np.quantile(x[1:], [0.025, 0.975]))]
                   for at, x in zip(shown, of, strict=True)}
            for what, of in gaps.items()
        },
        "sizes": dict(sizes),
    }  # fmt: skip
    return sections, verdict, values


if __name__ == "__main__":
    main()

"""Mapping cells onto a labelled reference, on real data: labels, kinds that the reference lacks, the rates.

    python tools/adapt_pages/retrieval.py

For each pair of reference and query, :func:`scjax.map_cells` on the embedding of the shared base model (or
of ``--model RUN``), beside the same on its random twin, on principal components and on noise, and beside
logistic regression on the embedding and on the components. Components, scaling and rules are fitted on the
reference alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
from common import BASE, arguments, base, blood, page, read, table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scjax
from scjax.eval import stats
from scjax.eval.baselines import Expression
from scjax.reference import Reference

Pair = tuple[
    str, str, ad.AnnData, np.ndarray, str, str | None
]  # name, about, cells, is reference, label, group
MODEL, TWIN, PCA, NOISE = "model", "random twin", "PCA", "noise"
N_BOOT, MAX_HELD_OUT, N_STUDY, N_KANG = 1000, 3, 800, 2400


def sampled(cells: ad.AnnData, by: str, n: int, rng: np.random.Generator) -> ad.AnnData:
    """At most n labelled cells of each group."""
    known = np.flatnonzero(cells.obs["cell_type_harmonised"].astype(str) != "unlabelled")
    group = cells.obs[by].astype(str).to_numpy()[known]
    rows = [rng.permutation(known[group == name])[:n] for name in np.unique(group)]
    return cells[np.sort(np.concatenate(rows))].copy()


def pairs(data: Path, rng: np.random.Generator) -> Iterator[Pair]:
    cells = sampled(blood(data), "study", N_STUDY, rng)
    about = "three studies; query: Kang et al., a study that pretraining did not see"
    is_reference = (cells.obs["study"] != "kang_ifnb_2k_10x").to_numpy()
    yield "blood, a new study", about, cells, is_reference, "cell_type_harmonised", "study"

    cells = sampled(read(data, "kang_ctrl_8donors_10x"), "donor", N_KANG // 8, rng)
    donors = sorted(cells.obs["donor"].unique())
    is_reference = cells.obs["donor"].isin(donors[::2]).to_numpy()
    about = f"donors {', '.join(donors[::2])} of a panel of 1,287 genes; query: the four others"
    yield "blood, new donors", about, cells, is_reference, "cell_type", "donor"

    cells = read(data, "pancreas_baron_cross_species_350")
    is_reference = (cells.obs["species"] == "human").to_numpy()
    about = "four human donors; query: two mice, their genes by human names"
    yield "pancreas, another species", about, cells, is_reference, "cell_type", "donor"

    cells = read(data, "breast_cancer_31lines_dropseq")
    is_reference = rng.permutation(cells.n_obs) % 2 == 0
    about = "half of the cells; query: the other half (one study: the easy case)"
    yield "31 cell lines, same study", about, cells, is_reference, "cell_type", None


def embedded(cells: ad.AnnData, is_reference: np.ndarray, model: scjax.api.Model, seed: int) -> None:
    """All representations into obsm; what is fitted, on the reference."""
    scjax.embed(cells, model, key_added=MODEL)
    scjax.embed(cells, model.random_twin(), key_added=TWIN)
    cells.obsm[PCA] = Expression(cells.X, list(cells.var_names), seed).pca(np.flatnonzero(is_reference))
    cells.obsm[NOISE] = np.random.default_rng(seed).normal(size=(cells.n_obs, 50)).astype(np.float32)


def mapped(
    cells: ad.AnnData, is_reference: np.ndarray, key: str, label: str, group: str | None
) -> tuple[Reference, ad.AnnData]:
    metric = "euclidean" if key == PCA else "cosine"
    query = cells[~is_reference].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = scjax.build_reference(
            cells[is_reference].copy(), labels=label, obsm=key, group=group, metric=metric
        )
        scjax.map_cells(query, reference)
    return reference, query


def regression(cells: ad.AnnData, rows: np.ndarray, key: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels, highest probability) of all cells by logistic regression on those of ``rows``."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    probe.fit(cells.obsm[key][rows], cells.obs[label].astype(str).to_numpy()[rows])
    probability = probe.predict_proba(cells.obsm[key])
    return probe.classes_[probability.argmax(1)], probability.max(1)


def scores(truth: np.ndarray, guess: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Value and resamples over query cells, the same cells for every method."""
    names, codes = np.unique(np.concatenate([truth, guess]), return_inverse=True)
    weights = stats.resample(len(truth), N_BOOT, seed, "retrieval")
    seen = np.ones(len(names), bool)
    return stats.classification(codes[: len(truth)], codes[len(truth) :], seen, weights)


def shown(score: np.ndarray) -> str:
    low, high = np.nanpercentile(score[1:], [2.5, 97.5])
    return f"{score[0]:.3f} [{low:.3f}, {high:.3f}]"


def held_out(
    cells: ad.AnnData, is_reference: np.ndarray, label: str, group: str | None, keys: list[str]
) -> dict[str, list[list[float]]]:
    """Types left out of the reference one at a time: AUROC of the distance, flagged and falsely flagged."""
    names = cells.obs[label].astype(str).to_numpy()
    sizes = cells.obs[label][~is_reference].value_counts()
    known = set(names[is_reference])
    types = [name for name in sizes.index if sizes[name] >= 15 and name in known][:MAX_HELD_OUT]
    found: dict[str, list[list[float]]] = {}
    for held in types:
        without = cells[~(is_reference & (names == held))]
        rest = is_reference[~(is_reference & (names == held))]
        new = names[~is_reference] == held
        for key in keys:
            query = mapped(without, rest, key, label, group)[1].obs
            auroc = roc_auc_score(new, query["scjax_distance"])
            none = (query[f"scjax_{label}"] == "unassigned").to_numpy()
            found.setdefault(f"kNN on {key}", []).append([auroc, none[new].mean(), none[~new].mean()])
        for key in (MODEL, PCA):
            sure = regression(without, np.flatnonzero(rest), key, label)[1][~rest]
            found.setdefault(f"regression on {key}", []).append([roc_auc_score(new, -sure), np.nan, np.nan])
    return found


def main() -> None:
    args = arguments(__doc__, seed=0, model="")
    rng = np.random.default_rng(args.seed)
    model = scjax.load(args.model or base(args.data))
    sections, values, results = {}, {}, {}
    for name, about, cells, is_reference, label, group in pairs(args.data, rng):
        labelled = (cells.obs[label].notna() & (cells.obs[label].astype(str) != "unlabelled")).to_numpy()
        cells, is_reference = cells[labelled].copy(), is_reference[labelled]
        embedded(cells, is_reference, model, args.seed)
        truth = cells.obs[label].astype(str).to_numpy()
        known = np.isin(truth, truth[is_reference])[~is_reference]
        rows, found = [], {}
        for key in (MODEL, TWIN, PCA, NOISE):
            reference, query = mapped(cells, is_reference, key, label, group)
            obs, right = query.obs, truth[~is_reference]
            found[f"kNN on {key}"] = scores(
                right[known], obs[f"scjax_{label}_best"].astype(str)[known], args.seed
            )
            covered = [t in s.split(" | ") for t, s in zip(right, obs[f"scjax_{label}_set"], strict=True)]
            given = (obs[f"scjax_{label}"] != "unassigned").to_numpy()
            wrong = (obs[f"scjax_{label}"].astype(str) != right) & given
            near = reference.nearest(query.obsm["X_scjax"], query.obs_names, 5)[label].astype(str).to_numpy()
            rates = [np.mean(covered), given.mean(), wrong.sum() / max(given.sum(), 1)]
            rates += [obs["scjax_outside"].mean(), (near.reshape(-1, 5) == right[:, None]).mean()]
            rows.append([f"kNN on {key}", *map(float, rates)])
        for key in (MODEL, TWIN, PCA):
            guess = regression(cells, np.flatnonzero(is_reference), key, label)[0][~is_reference]
            found[f"regression on {key}"] = scores(truth[~is_reference][known], guess[known], args.seed)
        novel = held_out(cells, is_reference, label, group, [MODEL, PCA, NOISE])
        results[name] = {method: score["macro_f1"] for method, score in found.items()}
        head = [[m, shown(s["macro_f1"]), shown(s["accuracy"])] for m, s in found.items()]
        left = [[m, *map(float, np.mean(v, 0))] for m, v in novel.items()]
        sections[name.capitalize()] = "\n\n".join(
            [
                f"Reference: {is_reference.sum():,} cells, {about} ({(~is_reference).sum():,} cells, "
                f"{known.sum():,} of kinds that the reference has). Rules set between groups: "
                f"{group or 'none'}.",
                table(["labels", "macro-F1", "accuracy"], head),
                table(
                    [
                        "rates",
                        "sets hold the truth",
                        "assigned",
                        "wrong of these",
                        "outside",
                        "5 nearest alike",
                    ],
                    rows,
                ),
                f"{len(next(iter(novel.values())))} types left out of the reference in turn (means):",
                table(["held out", "AUROC", "unassigned: the new", "unassigned: the others"], left),
            ]
        )
        values[name] = {
            "macro_f1": {
                m: [float(x) for x in (s["macro_f1"][0], *np.nanpercentile(s["macro_f1"][1:], [2.5, 97.5]))]
                for m, s in found.items()
            },
            "rates": rows,
            "held_out": left,
        }
        print(name, *head, *rows, *left, sep="\n", flush=True)
    page(
        args.out / "retrieval.md",
        "Mapping cells onto a reference",
        verdict(results),
        "python tools/adapt_pages/retrieval.py" + (f" --model {args.model}" if args.model else ""),
        {
            "": NOTES + f" Model: `{Path(args.model or BASE).name}`, {model.system}, step {model.step:,}, "
            f"{len(model.vocabulary):,} genes."
        }
        | sections,
        values,
    )


def verdict(results: dict[str, dict[str, np.ndarray]]) -> str:
    """Where kNN on the model's embedding beats the best plain way on components, by paired intervals."""
    better, worse = [], []
    for name, found in results.items():
        plain = max((found["kNN on PCA"], found["regression on PCA"]), key=lambda score: score[0])
        low, high = np.nanpercentile(found["kNN on model"][1:] - plain[1:], [2.5, 97.5])
        if low > 0 or high < 0:
            (better if low > 0 else worse).append(name)
    n = len(results)
    told = lambda where: f"{len(where)} of {n}" + (f" ({'; '.join(where)})" if where else "")  # noqa: E731
    return (
        f"Label transfer by kNN on the small pretrained model is better than the best of kNN and logistic "
        f"regression on principal components in {told(better)} settings and worse in {told(worse)} "
        "(macro-F1, paired 95 % intervals over query cells)."
    )


NOTES = f"""kNN: `scjax.build_reference` and `scjax.map_cells` with 15 neighbours; at most 5 % of the labels
given are to be wrong, at most 5 % of the sets to miss the truth, at most 1 % of cells of the reference's
kinds to be called outside. These rates hold for cells like those of the reference (where rules are set
between groups: for a new group like the others); the tables say what becomes of them in another study or
species. Where no threshold keeps errors between the reference's own groups that low, no cell gets a label.
Regression: logistic, standardised, C 0.1, classes balanced. Intervals: 95 %, {N_BOOT} resamples of query
cells of the kinds that the reference has. "5 nearest alike": share of the five nearest reference cells that
are of the query cell's kind. Types left out of the reference: AUROC of the distance over that of the
reference's own cells (regression: of the highest probability) in telling the new type from the others;
"unassigned": of the new type (more is better) and of the others (less is better). All cells have labels; at
most {N_STUDY} of a blood study and {N_KANG // 8} of a Kang donor are taken."""


if __name__ == "__main__":
    main()

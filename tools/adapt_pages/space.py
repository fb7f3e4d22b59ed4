"""What it helps a model to know where a cell lies: masked expression and regions, of sections never seen.

    python tools/adapt_pages/space.py

Two sets: STARmap of mouse cortex (3 sections, layers) and the HER2 breast tumours (8 sections of 8 patients,
regions by a pathologist). Whole sections are held out. A small scGPT of a panel of variable genes is trained
from scratch on the others four times, with nothing beside the counts, with coordinates, with the principal
components of the nearest cells, and with those of other cells of the section.
"""

from __future__ import annotations

from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, page, read, table
from fitting import Fit, kept, over
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scjax import models
from scjax.datasets.space import centred_coordinates, log_components, neighbour_features, shuffled
from scjax.eval import space, stats
from scjax.genes import Vocabulary

K, COMPONENTS, PANEL, N_BOOT, BATCH = 8, 8, 48, 1000, 64
SETS = {
    "starmap_mouse_mpfc_3sections": ("STARmap, mouse cortex", "layer", 3),
    "st_her2_breast_8sections": ("HER2+ breast tumours", "region", 4),
}
UNKNOWN = ("undetermined",)
NONE, PLACE, NEAR, MIXED = (
    "model, counts alone",
    "model + coordinates",
    "model + neighbours",
    "model + shuffled neighbours",
)
ARMS = {NONE: (), PLACE: ("coordinates",), NEAR: ("neighbours",), MIXED: ("neighbours",)}
TOKENS = {
    "coordinates": {"kind": "coordinates", "size": 2, "scale": 0.2, "dropout": 0.1},
    "neighbours": {"kind": "neighbours", "size": K, "width": COMPONENTS, "dropout": 0.1},
}
MODEL = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "d_ff": 64,
    "dropout": 0.0,
    "norm": "pre",
    "max_length": PANEL + 1,
    "values": "log1p",
    "value_scale": 0.2,
    "zeros": True,
    "objective": "masked",
    "mask_fractions": (0.5,),
    "remat": "none",
}
ALONE, JOINT, AROUND, XY = "PCA", "PCA + neighbourhood mean", "neighbourhood mean", "coordinates"
MEANS = "gene means"


HOW = """Panel: the {PANEL} genes whose log counts vary most (chosen on all sections, by no label); each is a
token, half of them are hidden, and depth is that of the whole cell. R² is 1 - squared error / that of each
gene's mean over training cells, on the held-out sections; the same values are hidden for every method.
Neighbours: the {K} nearest cells of the section, {COMPONENTS} principal components of all genes each, fitted
on the training sections. A neighbour's counts are counts of the held-out section: this is imputation within a
section that was measured. Coordinates: about the centre of each section, in units of its spread; sections are
not aligned. Regions: logistic regression on the frozen embedding, its context included, of the training
sections.

Baselines: probabilistic PCA of the panel, alone and with the mean of the neighbours' components beside it;
for regions, logistic regression on 16 components of all genes (no panel), on the neighbourhood mean, on both,
and on coordinates.

Model: scGPT, two layers of width 32, from scratch, {steps} steps of {BATCH} cells, one seed a fold: small
and short, so that the page takes minutes. Intervals: 95 %, {N_BOOT:,} paired resamples of contiguous blocks
of the sections; they hold neither the spread over seeds nor, with so few sections, that over sections.
"Above" and "below" mean that the interval of the difference leaves out 0.
"""


def panel_of(adata: ad.AnnData) -> np.ndarray:
    """The genes whose log counts vary most."""
    x = sparse.csr_matrix(adata.X, dtype=np.float64)
    depth = np.maximum(np.asarray(x.sum(1)).ravel(), 1)
    x = (sparse.diags(1e4 / depth) @ x).log1p()
    variance = np.asarray(x.power(2).mean(0) - np.power(x.mean(0), 2)).ravel()
    return np.sort(np.argsort(-variance, kind="stable")[:PANEL])


def read_out(module: Any, batch: Any) -> dict[str, Any]:
    """Of each cell [B]: squared errors of the hidden genes by the model and by the genes' means; in the order
    of the vocabulary [B, PANEL]: values, and which are hidden; and the embedding."""
    tokens = module.encode(batch, jax.random.key(7))
    order = jnp.argsort(tokens.gene_id, axis=1)
    _, states = module(tokens, batch=batch)
    guess, _ = module.decoder(states, None)
    wrong = {"model": guess, "means": module.gene_mean(tokens.gene_id)}
    squared = {name: (tokens.hidden * (x - tokens.target) ** 2).sum(1) for name, x in wrong.items()}
    sort = lambda x: jnp.take_along_axis(x, order, axis=1)  # noqa: E731
    return squared | {"value": sort(tokens.target), "hidden": sort(tokens.hidden), "z": module.embed(batch)}


def by_components(
    train: np.ndarray, test: np.ndarray, hidden: np.ndarray, also: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """Squared errors [cells] of hidden values by probabilistic PCA (Tipping and Bishop 1999) of the training
    values [cells, genes], with further columns that are always seen; the better of several sizes by training
    error on values hidden alike."""
    mean, spread = train.mean(0), np.maximum(train.std(0), 1e-6)
    if also is not None:
        scale = np.maximum(also[0].std(0), 1e-6)
        extra = [(x - also[0].mean(0)) / scale for x in also]
    values, vectors = np.linalg.eigh(np.cov(_beside((train - mean) / spread, also and extra[0]).T))
    rng, best = np.random.default_rng(0), (np.inf, np.empty(0))
    masks = rng.permuted(np.tile(np.arange(train.shape[1]) < train.shape[1] // 2, (len(train), 1)), axis=1)
    rows = rng.permutation(len(train))[:400]
    for size in (2, 4, 8, 16):
        noise = values[:-size].mean()
        W = vectors[:, -size:] * np.sqrt(np.maximum(values[-size:] - noise, 1e-9))

        def error(
            x: np.ndarray, hide: np.ndarray, more: Any, W: np.ndarray = W, noise: float = noise
        ) -> np.ndarray:
            z = _beside((x - mean) / spread, more)
            seen = _beside(~hide, None if more is None else np.ones(more.shape, bool)).astype(float)
            inner = np.einsum("ns,sa,sb->nab", seen, W, W) + noise * np.eye(W.shape[1])
            score = np.linalg.solve(inner, ((seen * z) @ W)[..., None])[..., 0]
            guess = (score @ W[: x.shape[1]].T) * spread + mean
            return (hide * (guess - x) ** 2).sum(1)

        own = error(train[rows], masks[rows], also and extra[0][rows]).sum()
        if own < best[0]:
            best = own, error(test, hidden, also and extra[1])
    return best[1]


def _beside(x: np.ndarray, more: np.ndarray | None) -> np.ndarray:
    return x if more is None else np.column_stack([x, more])


def measure(adata: ad.AnnData, label: str, n_folds: int, steps: int, say: Any) -> dict[str, Any]:
    """Of all cells, held out: squared errors by method, guessed labels by method; whose order they are in."""
    genes = panel_of(adata)
    panel = adata[:, genes].copy()
    vocabulary = Vocabulary(list(panel.var_names))
    section = adata.obs["section"].astype(str).to_numpy()
    names = sorted(set(section))
    depth = np.asarray(adata.X.sum(1)).ravel()
    truth = adata.obs[label].astype(str).to_numpy()
    codes = {name: i for i, name in enumerate(sorted(set(truth) - set(UNKNOWN)))}
    known = np.isin(truth, list(codes))
    models_of: dict[tuple[str, ...], Any] = {}
    for context in set(ARMS.values()):
        model = models.build("scgpt", MODEL | {"context": {n: TOKENS[n] for n in context}}, PANEL)
        models_of[context] = Fit(model, steps, 3e-3), over(read_out, model)
    centred_coordinates(adata, section_key="section")
    wrong: dict[str, np.ndarray] = {}
    guess: dict[str, np.ndarray] = {}
    for fold in range(n_folds):
        held = [name for i, name in enumerate(names) if i % n_folds == fold]
        test = np.isin(section, held)
        own = log_components(adata, 2 * COMPONENTS, np.flatnonzero(~test))
        adata.obsm["own"] = own
        neighbour_features(adata, K, COMPONENTS, section_key="section", features="own")
        near = adata.obsm["neighbours"]
        around = near.reshape(len(near), K, COMPONENTS).mean(1)
        matrices: dict[str, np.ndarray] = {}
        for arm, context in ARMS.items():
            panel.obsm["coordinates"] = adata.obsm["coordinates"]
            panel.obsm["neighbours"] = shuffled(near, section, seed=fold) if arm == MIXED else near
            batches = {}
            for part, rows in {"train": ~test, "test": test}.items():
                found = kept(panel[rows].copy(), vocabulary, BATCH, values=context)
                # as much as the whole cell has, not its panel
                at = np.concatenate([depth[rows], np.zeros(-rows.sum() % BATCH)]).reshape(-1, BATCH)
                batches[part] = [
                    b.replace(depth=d.astype(np.float32)) for b, d in zip(found, at, strict=True)
                ]
            fit, judge = models_of[context]
            params, buffers = fit(batches["train"], seed=fold)
            of = {part: judge(params, buffers, batches[part]) for part in batches}
            matrices[arm] = np.empty((len(adata), of["test"]["z"].shape[1]), np.float32)
            matrices[arm][test], matrices[arm][~test] = of["test"]["z"], of["train"]["z"]
            errors = {arm: of["test"]["model"], MEANS: of["test"]["means"]}
            if arm == NONE:
                seen, value, hide = of["train"]["value"], of["test"]["value"], of["test"]["hidden"]
                errors[ALONE] = by_components(seen, value, hide, None)
                errors[JOINT] = by_components(seen, value, hide, (around[~test], around[test]))
            for name, error in errors.items():
                wrong.setdefault(name, np.zeros(len(adata)))[test] = error
        matrices |= {
            ALONE: own,
            AROUND: around,
            JOINT: np.column_stack([own, around]),
            XY: adata.obsm["coordinates"],
        }
        for name, Z in matrices.items():
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced"))
            probe.fit(Z[~test & known], truth[~test & known])
            guess.setdefault(name, np.zeros(len(adata), int))[test] = [
                codes[g] for g in probe.predict(Z[test])
            ]
        say(f"{label}: fold {fold + 1} of {n_folds}")
    code = np.array([codes.get(name, -1) for name in truth])
    return {"wrong": wrong, "guess": guess, "truth": code, "known": known, "n": len(codes)}


def scored(adata: ad.AnnData, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """R² of hidden values and macro-F1 of regions by method, each with its resamples (contiguous blocks)."""
    place = space.locate(adata, "spatial", "section")
    weights = space.resampled(place, N_BOOT, 0, "space").cells.astype(float)
    plain = weights @ found["wrong"][MEANS]
    share = {m: 1 - weights @ e / plain for m, e in found["wrong"].items() if m != MEANS}
    rows, seen = found["known"], np.ones(found["n"], bool)
    few = space.resampled(place, N_BOOT, 0, "space").cells[:, rows]
    regions = {
        m: stats.classification(found["truth"][rows], g[rows], seen, few)["macro_f1"]
        for m, g in found["guess"].items()
    }
    return share, {m: stats.centred(f1) for m, f1 in regions.items()}


def shown(score: np.ndarray) -> str:
    low, high = stats.interval(score)
    return f"{score[0]:.3f} [{low:.3f}, {high:.3f}]"


def better(a: np.ndarray, b: np.ndarray) -> str:
    """Whether one score is above another, by the interval of their difference."""
    low, high = stats.interval(a - b)
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def against(of: dict[str, np.ndarray], others: tuple[str, ...]) -> str:
    """How the model with neighbours stands to others."""
    near = of[NEAR]
    return "; ".join(f"{better(near, of[m])} {m} ({shown(near - of[m])})" for m in others if m in of)


def main() -> None:
    args = arguments(__doc__, steps=200, sets=",".join(SETS))
    sections, values, verdict = {}, {}, []
    for name in args.sets.split(","):
        title, label, n_folds = SETS[name]
        adata = read(args.data, name)
        found = measure(adata, label, n_folds, args.steps, lambda line: print(line, flush=True))
        share, regions = scored(adata, found)
        rows = [
            [m, *(shown(of[m]) if m in of else "" for of in (share, regions))]
            for m in (*ARMS, ALONE, JOINT, AROUND, XY)
        ]
        lost = int((~found["known"]).sum())
        sections[title] = "\n\n".join(
            [
                f"`{name}`: {adata.n_obs:,} cells or spots, {adata.obs['section'].nunique()} sections, held "
                f"out in {n_folds} folds; {found['n']} values of `{label}`"
                + (f" ({lost} spots without one are not scored on it)." if lost else "."),
                table(["", "R² of hidden expression", f"macro-F1 of {label}s"], rows),
                f"Expression: {NEAR} is {against(share, (NONE, MIXED, PLACE, JOINT))}.",
                f"{label.capitalize()}s: {NEAR} is {against(regions, (NONE, MIXED, PLACE, JOINT, XY))}.",
            ]
        )
        scores = {"r2": share, "macro_f1": regions}
        values[name] = {
            what: {m: [float(x[0]), *stats.interval(x)] for m, x in of.items()} for what, of in scores.items()
        }
        for what, of in (("hidden expression", share), (f"{label}s", regions)):
            wins = better(of[JOINT], of[NEAR]) == "above"
            verdict.append(
                f"{title}, {what}: {'the plain baseline wins; ' if wins else ''}the model with its "
                f"neighbours has {of[NEAR][0]:.3f}, {better(of[NEAR], of[NONE])} that without "
                f"({of[NONE][0]:.3f}), shuffled ones {of[MIXED][0]:.3f}, coordinates {of[PLACE][0]:.3f}; PCA "
                f"with the neighbourhood mean {of[JOINT][0]:.3f}"
            )
    page(
        args.out / "space.md",
        "Space as context",
        ". ".join(verdict) + ".",
        "python tools/adapt_pages/space.py" + (f" --sets {args.sets}" if args.sets != ",".join(SETS) else ""),
        sections | {"How": HOW.format(steps=args.steps, **globals())},
        values,
    )


if __name__ == "__main__":
    main()

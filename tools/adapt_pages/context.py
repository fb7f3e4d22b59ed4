"""What metadata tokens change: the same small scGPT trained with and without assay, tissue and study.

    python tools/adapt_pages/context.py

Three arms, each from several seeds: without metadata; with it, each of the three absent in 30 % of the
cells of training; and with the metadata of another cell, drawn once for all ("shuffled"). Judged on held-
out cells of the studies of training and on a study that training did not see, whose study code is therefore
absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import anndata as ad
import jax
import numpy as np
from common import arguments, page, read, table
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scjax
from scjax import models
from scjax.eval import stats
from scjax.genes import Vocabulary
from scjax.loader import cells as batches_of
from scjax.nn import bind
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step
from scjax.types import CellBatch

STUDIES = ("pbmc3k_10xv1", "pbmc4k_10xv2", "pbmc_facs_10xv1", "pbmc_frozen_donorA_10xv1")
STUDIES += ("breast_cancer_31lines_dropseq", "lung_tumour_dc_913", "lymph_node_ref_330", "tumour_copykat_302")
UNSEEN = "kang_ifnb_2k_10x"
NAMES = ("dataset", "technology", "tissue")
ARMS = ("without", "metadata", "shuffled")
PER_STUDY, N_GENES, BATCH, HELD_OUT = 300, 800, 32, 0.2
MODEL = {
    **{"d_model": 48, "n_heads": 2, "n_layers": 2, "d_ff": 96, "dropout": 0.0, "max_length": 97},
    **{"tie": "mid", "value_scale": 1 / 50, "objective": "masked"},
}
Modes = dict[str, CellBatch]


def gather(args: Any) -> ad.AnnData:
    """Cells of all studies on the variable ones of their shared genes, coarse tissues as categories."""
    rng = np.random.default_rng(0)
    found = []
    for name in (*STUDIES, UNSEEN):
        one = read(args.data, name)
        one = one[one.obs["condition"] == "ctrl"] if name == UNSEEN else one
        one = one[np.sort(rng.permutation(one.n_obs)[:PER_STUDY])].copy()
        one.var_names_make_unique()
        if "cell_type_harmonised" not in one.obs:
            one.obs["cell_type_harmonised"] = "unlabelled"
        one.obs = one.obs[[*NAMES, "cell_type_harmonised"]].astype(str)
        found.append(one)
    together = ad.concat(found, join="inner", index_unique="-", keys=(*STUDIES, UNSEEN))
    together.obs["tissue"] = [text.split(" (")[0].split(",")[0] for text in together.obs["tissue"]]
    seen = (together.obs["dataset"] != UNSEEN).to_numpy()
    log = logged(together[seen])
    spread = np.asarray(log.multiply(log).mean(0) - np.square(log.mean(0))).ravel()
    return together[:, np.sort(np.argsort(-spread)[:N_GENES])].copy()


def logged(cells: ad.AnnData) -> Any:
    """log(1 + counts per 10,000), sparse."""
    x = cells.X.tocsr().astype(np.float64)
    x = x.multiply(1e4 / np.maximum(x.sum(1), 1)).tocsr()
    x.data = np.log1p(x.data)
    return x


def take(batch: CellBatch, rows: np.ndarray) -> CellBatch:
    return jax.tree.map(lambda x: x[rows], batch)


def relabelled(batch: CellBatch, rows: np.ndarray | None) -> CellBatch:
    """With the metadata of the cells ``rows``; None for no metadata."""
    return batch.replace(
        label={k: np.full_like(v, -1) if rows is None else v[rows] for k, v in batch.label.items()}
    )


class Arm:
    """A model with or without tokens, its step and its judges, compiled once for all seeds."""

    def __init__(self, sizes: dict[str, int], steps: int):
        tokens = {name: {"kind": "label", "size": n, "dropout": 0.3} for name, n in sizes.items()}
        self.config, self.steps = MODEL | {"context": tokens}, steps
        model = models.build("scgpt", self.config, N_GENES)
        self.mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
        how = {"learning_rate": 2e-3, "warmup_steps": 50, "end_factor": 0.02, "weight_decay": 0.01}
        self.tx, _ = make_optimizer(OptimizerConfig(**how, clip_norm=1.0, b2=0.99), steps, model)
        self.state = abstract_state(model, self.tx, self.mesh)
        self.step = make_train_step(model, self.tx, self.state, seed=0)
        # one cell after the other has its own sum of squares and number of hidden genes
        self.judge = jax.jit(partial(_errors, model))
        self.vectors = jax.jit(partial(_embed, model))

    def train(self, cells: CellBatch, seed: int) -> Any:
        """The state after training, its cells drawn by ``seed``."""
        state = init_state(models.build("scgpt", self.config, N_GENES, seed), self.tx, self.state)
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            state, _ = self.step(state, place(take(cells, rng.integers(0, len(cells.row), BATCH)), self.mesh))
        return state

    def errors(self, state: Any, cells: CellBatch) -> np.ndarray:
        """float64 [cells, 2]: mean squared error of a cell's hidden genes, and that of the genes' means."""
        found = [self.judge(state["params"], state["buffers"], part) for part in parts(cells)]
        return np.concatenate(found)[: len(cells.row)].astype(np.float64)

    def embed(self, state: Any, cells: CellBatch) -> np.ndarray:
        found = [self.vectors(state["params"], state["buffers"], part) for part in parts(cells)]
        return np.concatenate(found)[: len(cells.row)]


def parts(cells: CellBatch, size: int = 128) -> Iterator[CellBatch]:
    for first in range(0, len(cells.row), size):
        yield take(cells, np.arange(first, first + size) % len(cells.row))


def _errors(model: Any, params: Any, buffers: Any, cells: CellBatch) -> jax.Array:
    def one(cell: CellBatch) -> jax.Array:
        module = bind(model, params, buffers)
        module.eval()
        alone = jax.tree.map(lambda x: x[None], cell)
        _, _, metrics = module.loss(alone, jax.random.key(1))
        pairs = (metrics["masked_mse"], metrics["gene_mean_mse"])
        return jax.numpy.stack([total / weight for total, weight in pairs])

    return jax.vmap(one)(cells)


def _embed(model: Any, params: Any, buffers: Any, cells: CellBatch) -> jax.Array:
    module = bind(model, params, buffers)
    module.eval()
    return module.embed(cells)


def probes(x: np.ndarray, cell_type: np.ndarray, study: np.ndarray) -> dict[str, float]:
    """Cell types read off with one study held out after the other; bio conservation and batch mixing."""
    scores = []
    for held in np.unique(study):
        fit, test = study != held, study == held
        test &= np.isin(cell_type, cell_type[fit])
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
        )
        guess = probe.fit(x[fit], cell_type[fit]).predict(x[test])
        scores.append(f1_score(cell_type[test], guess, average="macro", labels=np.unique(cell_type[test])))
    found = scjax.eval.integration(x, cell_type, study, max_cells=1500, repeats=1, n_boot=0).rows
    axes = {row["metric"]: row["value"] for row in found if row["metric"] in ("bio", "batch")}
    return {"macro-F1": float(np.mean(scores)), **axes}


def main() -> None:
    args = arguments(__doc__, steps=500, seeds=3)
    cells = gather(args)
    vocabulary = Vocabulary.from_anndata([cells])
    study = cells.obs["dataset"].to_numpy()
    rng = np.random.default_rng(1)
    seen = study != UNSEEN
    held = seen & (rng.random(cells.n_obs) < HELD_OUT)
    categories = {name: sorted(set(cells.obs[name][seen])) for name in NAMES}
    cells.obs["dataset"] = cells.obs["dataset"].where(seen, "unknown")  # the token is absent there
    every = next(batches_of(cells, vocabulary, cells.n_obs, labels=NAMES, categories=categories, layer=None))
    trained = take(every, np.flatnonzero(seen & ~held))
    mixed = rng.permutation(len(trained.row))
    cohorts = {"studies of training": take(every, np.flatnonzero(held)), "new study": take(every, ~seen)}
    labelled = (cells.obs["cell_type_harmonised"] != "unlabelled").to_numpy()
    blood = labelled & np.isin(study, (*STUDIES[:3], UNSEEN))
    cell_type = cells.obs["cell_type_harmonised"].to_numpy(str)[blood]

    sizes = {name: len(names) for name, names in categories.items()}
    arms = {"without": Arm({}, args.steps), "metadata": Arm(sizes, args.steps)}
    arms["shuffled"] = arms["metadata"]  # the same network
    errors: dict[tuple[str, str, str], list[np.ndarray]] = {}
    read_off: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name in ARMS:
            arm = arms[name]
            state = arm.train(relabelled(trained, mixed) if name == "shuffled" else trained, seed)
            for cohort, given in cohorts.items():
                other = rng.permutation(len(given.row))
                modes: Modes = {"given": given, "absent": relabelled(given, None)}
                if name != "without":
                    modes["another cell's"] = relabelled(given, other)
                for mode, batch in modes.items():
                    if name == "without" and mode == "given":
                        continue
                    errors.setdefault((name, mode, cohort), []).append(arm.errors(state, batch))
            of_blood = take(every, blood)
            for mode, batch in {"given": of_blood, "absent": relabelled(of_blood, None)}.items():
                if name == "without" and mode == "given":
                    continue
                x = arm.embed(state, batch)
                read_off.setdefault((name, mode), []).append(probes(x, cell_type, study[blood]))
            print(seed, name, {k[1:]: float(v[-1][:, 0].mean()) for k, v in errors.items() if k[0] == name})
    components = PCA(50, random_state=0).fit_transform(logged(cells[blood]).toarray())
    read_off["principal components", ""] = [probes(components, cell_type, study[blood])]
    write(args, errors, read_off, len(trained.row), int(blood.sum()))


def write(args: Any, errors: Any, read_off: Any, n_trained: int, n_blood: int) -> None:
    mean = {key: np.mean(value, 0) for key, value in errors.items()}  # over seeds, [cells, 2]
    rows: list[list[Any]] = []
    change: dict[tuple[str, str, str], tuple[float, float, float, bool]] = {}
    for cohort in ("studies of training", "new study"):
        plain = mean["without", "absent", cohort]
        weights = stats.resample(len(plain), 1000, 0, "context")
        rows.append(["gene means", "", cohort, f"{plain[:, 1].mean():.5f}", "", ""])
        for (arm, mode, where), value in mean.items():
            if where != cohort:
                continue
            relative = 100 * (stats.mean(value[:, 0], weights) / stats.mean(plain[:, 0], weights) - 1)
            pairs = zip(errors[arm, mode, where], errors["without", "absent", where], strict=True)
            by_seed = [100 * (one[:, 0].mean() / plain_one[:, 0].mean() - 1) for one, plain_one in pairs]
            agree = bool(min(by_seed) > 0 or max(by_seed) < 0)
            change[arm, mode, where] = (float(relative[0]), *stats.interval(relative), agree)
            of_seeds = [float(one[:, 0].mean()) for one in errors[arm, mode, where]]
            spread = f"{min(of_seeds):.5f} to {max(of_seeds):.5f}"
            error, told = f"{value[:, 0].mean():.5f}", "{:+.1f} % [{:+.1f}, {:+.1f}]"
            told = told.format(*change[arm, mode, where][:3])
            told, mode = ("", "") if arm == "without" else (told, mode)
            rows.append([arm, mode, cohort, error, told, spread])
    probed = []
    for (arm, mode), found in read_off.items():
        each = {m: [one[m] for one in found] for m in ("macro-F1", "bio", "batch")}
        probed.append([arm, mode if arm != "without" else "", *(shown(v) for v in each.values())])
    f1 = {key: np.mean([one["macro-F1"] for one in found]) for key, found in read_off.items()}
    mixing = {key: np.mean([one["batch"] for one in found]) for key, found in read_off.items()}
    head = ["trained", "metadata at test", "cells", "error", "against without", "over seeds"]
    sections = {
        "": NOTES.format(seeds=args.seeds, steps=args.steps, n=n_trained, blood=n_blood),
        "Values of hidden genes": table(head, rows),
        "Cell types and batches of the four blood studies": table(
            ["trained", "metadata at test", "macro-F1, new study", "bio", "batch mixing"], probed
        ),
    }
    values = {
        "change_percent": {" | ".join(k): v for k, v in change.items()},
        "probes": {" | ".join(k): v for k, v in read_off.items()},
    }
    command = "python tools/adapt_pages/context.py"
    page(args.out / "context.md", "Metadata tokens", verdict(change, f1, mixing), command, sections, values)


def shown(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (
        f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    )


def verdict(change: Any, f1: Any, mixing: Any) -> str:
    def said(key: tuple[str, str, str]) -> str:
        value, low, high, agree = change[key]
        sure = agree and (high < 0 or low > 0)
        what = ("lowers" if value < 0 else "raises") if sure else "does not clearly change"
        return f"{what} the error of hidden genes ({value:+.1f} %, [{low:+.1f}, {high:+.1f}])"

    seen, new = "studies of training", "new study"
    best = max(f1["metadata", "given"], f1["metadata", "absent"])
    wins = best > f1["without", "absent"] and best > f1["principal components", ""]
    plain = max(
        (f1["without", "absent"], "no metadata"), (f1["principal components", ""], "principal components")
    )
    return (
        f"Metadata given to a small model {said(('metadata', 'given', seen))} in held-out cells of the "
        f"studies of training and {said(('metadata', 'given', new))} in a new study; absent at test, having "
        f"trained with it {said(('metadata', 'absent', seen))}; shuffled metadata "
        f"{said(('shuffled', 'given', seen))}. For cell types of a new study it "
        f"{'helps' if wins else 'does not help'}: macro-F1 {best:.3f} at best, "
        f"{plain[0]:.3f} with {plain[1]}; batch mixing {mixing['metadata', 'given']:.3f} given and "
        f"{mixing['metadata', 'absent']:.3f} absent, {mixing['without', 'absent']:.3f} without."
    )


NOTES = f"""scGPT, 2 layers of width 48, 96 genes a cell, objective "masked"; {N_GENES} variable genes of
those that all studies share; {{steps}} steps of {BATCH} cells from {{seeds}} seeds. Trained on {{n:,}}
cells: at most {PER_STUDY} of each of {len(STUDIES)} human studies, of which {HELD_OUT:.0%} are held out at
random. The new study: unstimulated cells of Kang et al.; its tissue and assay are known from training, its
study is not, and that token is absent. Tokens: study, assay (`technology`) and tissue, each dropped with
probability 0.3 in training. "Shuffled": trained with the metadata of another cell, the same all along.
"Another cell's": metadata of another test cell (in the new study all cells have the same). Error: mean
squared error of hidden values (bins / 50), the same hidden genes for all; intervals: 95 %, 1,000 resamples
of test cells, of the mean over seeds. The first line calls a change clear where the interval says so and
all seeds agree. Cell types: logistic regression on the embedding of {{blood:,}} labelled cells, each of the
four studies held out in turn, macro-F1; "bio" and "batch mixing" are the axes of `scjax.eval.integration`;
in brackets lowest and highest seed."""


if __name__ == "__main__":
    main()

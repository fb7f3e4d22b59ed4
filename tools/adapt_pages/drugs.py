"""Does a pretrained profile help to say what a drug does to a cell line?

    pip install --no-deps gdsctools==1.0.1     (GDSC v17 is among its files; it is not imported)
    python tools/adapt_pages/drugs.py

Profiles: 31 breast cancer lines of 30 cells (Gambardella et al. 2022), 27 of which GDSC screened (Iorio et
al., Cell 2016; natural logarithm of the IC50 in micromolar). Lines, drugs, or both are held out.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pandas as pd
from common import arguments, base, page, read, table
from fitting import Fit, over
from sklearn.decomposition import PCA

import scjax
from scjax import models
from scjax.eval import stats
from scjax.finetune.drugs import baselines, log_profiles, split_pairs
from scjax.types import CellBatch

LINES = "breast_cancer_31lines_dropseq"
LEAST, BITS, FOLDS, N_BOOT, BATCH = 20, 8, 4, 1000, 256
SPLITS = {"sample": "unseen lines", "drug": "unseen drugs", "both": "both unseen"}
BASE, TWIN, COMPONENTS, ALONE = (
    "model on the base",
    "model on its random twin",
    "model on PCA",
    "model, drug alone",
)
PLAIN = ("drug mean", "sample mean", "additive", "ridge", "ridge with products")


def gdsc(folder: str) -> pd.DataFrame:
    """log IC50, NaN where it was not measured: one row a cell line, by name, one column a drug."""
    if folder == "gdsctools":
        found = importlib.util.find_spec("gdsctools")
        if found is None or not found.submodule_search_locations:
            raise SystemExit(
                "no responses: pip install --no-deps gdsctools==1.0.1, or give --responses FOLDER"
            )
        folder = str(Path(found.submodule_search_locations[0]) / "data")
    ic50 = pd.read_csv(Path(folder) / "IC50_v17.csv.gz").set_index("COSMIC_ID")
    about = pd.read_csv(Path(folder) / "cosmic_info.csv.gz")
    names = {code: plain(name) for name, code in zip(about["SAMPLE_NAME"], about["COSMIC_ID"], strict=True)}
    ic50.columns = [column.removesuffix("_IC50") for column in ic50.columns]
    return ic50.set_axis([names.get(code, str(code)) for code in ic50.index])


def plain(name: Any) -> str:
    return re.sub("[^A-Z0-9]", "", str(name).upper())


def profiles_of(adata: ad.AnnData, model: scjax.api.Model) -> dict[str, pd.DataFrame]:
    """Name -> one row a line: the mean embedding of its cells, their components, nothing."""
    line = adata.obs["cell_type"].astype(str).to_numpy()
    out = {}
    for name, own in ((BASE, model), (TWIN, model.random_twin())):
        out[name] = pd.DataFrame(own.embed(adata)).groupby(line).mean()
    log = log_profiles(adata, "cell_type")
    components = PCA(min(16, len(log) - 1), random_state=0).fit_transform(log.to_numpy())
    out[COMPONENTS] = pd.DataFrame(components, index=log.index)
    out[ALONE] = pd.DataFrame(np.zeros((len(log), 1)), index=log.index)
    width = max(profile.shape[1] for profile in out.values())  # of one length, to be compiled once
    out = {name: profile.reindex(columns=range(width), fill_value=0.0) for name, profile in out.items()}
    return out | {"log": log}


def batches(
    pairs: pd.DataFrame, profile: pd.DataFrame, drug: pd.DataFrame, codes: np.ndarray
) -> list[CellBatch]:
    """Pairs as batches of a base that is given the profile."""
    out = []
    for first in range(0, len(pairs), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(pairs) - 1)
        some, n = pairs.iloc[rows], min(BATCH, len(pairs) - first)
        one = np.ones(BATCH, np.float32)
        value = {
            "profile": profile.loc[some["sample"]].to_numpy(np.float32),
            "fingerprint": drug.loc[some["drug"]].to_numpy(np.float32),
            "response": some["response"].to_numpy(np.float32),
        }
        out.append(
            CellBatch(
                *(np.zeros((BATCH, 1), np.int32), np.ones((BATCH, 1), np.float32), one, one.astype(np.int32)),
                *(rows.astype(np.uint32), {"drug": codes[rows].astype(np.int32)}, value),
                weight=(np.arange(BATCH) < n).astype(np.float32),
            )
        )
    return out


class Learner:
    """The model on profiles of one length, compiled once."""

    def __init__(self, length: int, n_drugs: int, bits: int, by_name: bool, steps: int):
        drug: dict[str, Any] = {"fingerprint": {"kind": "value", "size": bits}}
        if by_name:
            drug["drug"] = {"kind": "label", "size": n_drugs}
        config = {
            "base": {"system": "given:Given", "model": {"size": length}},
            "tasks": {"response": {"kind": "regression", "size": 1, "hidden": (32,)}},
            "drug": drug,
            "width": 16,
        }
        model = models.build("scjax.finetune.drugs:DrugResponse", config, 1)
        self.fit = Fit(model, steps, 5e-3, weight_decay=0.1)
        self.features = over(lambda module, batch: module.features(batch), model)
        self.predict = over(lambda module, batch: module.predict(batch)["response"][:, 0], model)

    def __call__(self, train: list[CellBatch], test: list[CellBatch], seed: int) -> np.ndarray:
        def prepare(state: Any) -> Any:
            """Features and targets in units of their spread, as experiments/finetune.py sets them."""
            x = self.features(state["params"], state["buffers"], train)
            y = np.concatenate([b.value["response"][b.weight > 0] for b in train])
            spread = np.where(x.std(0) > 1e-6, x.std(0), 1.0)
            head = state["buffers"]["heads"]["response"]
            head |= {"centre": jnp.asarray(x.mean(0)), "spread": jnp.asarray(spread)}
            head |= {"mean": jnp.full(1, y.mean()), "scale": jnp.full(1, y.std())}
            return state

        return self.predict(*self.fit(train, prepare=prepare, seed=seed), test)


def predictions(
    pairs: pd.DataFrame,
    profiles: dict[str, pd.DataFrame],
    drug: pd.DataFrame,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Split -> (positions of the pairs that were tested, method -> predictions of them)."""
    codes = pd.factorize(pairs["drug"], sort=True)[0]
    log, out = profiles["log"], {}
    learners: dict[tuple[int, bool], Learner] = {}
    for unseen in SPLITS:
        tested, found = [], {}
        for fold, (train, test) in enumerate(split_pairs(pairs, unseen, FOLDS)):
            tested.append(test)
            of = baselines(pairs, train, test, log, drug, unseen=unseen)
            for name, profile in profiles.items():
                if name == "log":
                    continue
                key = profile.shape[1], unseen == "sample"
                if key not in learners:
                    learners[key] = Learner(key[0], int(codes.max()) + 1, drug.shape[1], key[1], steps)
                parts = [batches(pairs.iloc[i], profile, drug, codes[i]) for i in (train, test)]
                of[name] = learners[key](*parts, seed=fold)
            for name, y in of.items():
                found.setdefault(name, []).append(y)
        say(f"{SPLITS[unseen]} done")
        out[unseen] = np.concatenate(tested), {name: np.concatenate(y) for name, y in found.items()}
    return out


def resampled(pairs: pd.DataFrame, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """ "rmse" and "r": the mean over drugs of the correlation over lines, with resamples of lines."""
    lines, names = pd.factorize(pairs["sample"], sort=True)
    drugs = pd.factorize(pairs["drug"], sort=True)[0]
    shape = len(names), drugs.max() + 1
    there, Y, P = (np.zeros(shape) for _ in range(3))
    there[lines, drugs], Y[lines, drugs], P[lines, drugs] = 1, pairs["response"], predicted
    weights = stats.resample(len(names), N_BOOT, 0, "lines").astype(float)
    n = weights @ there
    rmse = np.sqrt((weights @ (there * (Y - P) ** 2)).sum(1) / n.sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        y, p = weights @ Y / n, weights @ P / n
        cov = weights @ (Y * P) / n - y * p
        variance = (weights @ Y**2 / n - y**2) * (weights @ P**2 / n - p**2)
        r = np.where(variance > 1e-12, cov / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
    enough = (there.sum(0) >= 4) & (n > 0)
    r = np.where(enough, r, 0).sum(1) / np.maximum(enough.sum(1), 1)
    return {"rmse": stats.centred(rmse), "r": stats.centred(r)}


def shown(score: np.ndarray) -> str:
    low, high = stats.interval(score)
    return f"{score[0]:.3f} [{low:.3f}, {high:.3f}]"


def report(
    pairs: pd.DataFrame, found: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]
) -> tuple[str, list[str], Any]:
    """Tables, a verdict of each split, and values."""
    parts, verdict, values = [], [], {}
    for unseen, (rows, of) in found.items():
        tested = pairs.iloc[rows]
        score = {name: resampled(tested, y) for name, y in of.items()}
        methods = [m for m in (*PLAIN, ALONE, TWIN, COMPONENTS, BASE) if m in score]
        lines = [[m, shown(score[m]["rmse"]), shown(score[m]["r"])] for m in methods]
        parts.append(f"### {SPLITS[unseen].capitalize()} ({len(rows):,} pairs)")
        parts.append(table(["", "error (rmse)", "correlation over lines within a drug"], lines))
        plain_best = min(PLAIN, key=lambda m: float(score[m]["rmse"][0]))
        best = min(methods[len(PLAIN) + 1 :], key=lambda m: float(score[m]["rmse"][0]))
        low, high = stats.interval(score[best]["rmse"] - score[plain_best]["rmse"])
        wins = "the plain baseline wins" if low > 0 else "the model wins" if high < 0 else "no difference"
        text = f"{SPLITS[unseen]}: {wins} ({best} {score[best]['rmse'][0]:.3f}, {plain_best} "
        text += f"{score[plain_best]['rmse'][0]:.3f}, additive {score['additive']['rmse'][0]:.3f})"
        if BASE in score:
            low, high = stats.interval(score[BASE]["rmse"] - score[TWIN]["rmse"])
            does = "helps" if high < 0 else "hurts" if low > 0 else "makes no difference"
            text += f", pretraining {does}"
        verdict.append(text)
        values[unseen] = {
            m: {what: [float(x[0]), *stats.interval(x)] for what, x in score[m].items()} for m in methods
        }
    return "\n\n".join(parts), verdict, values


HOW = """Each line is embedded once, as the mean over its 30 cells, by `{model}` (the random twin is the same
network untrained) and by 16 principal components; the base is frozen. The model is
`scjax.finetune.drugs.DrugResponse`: drug encoder beside the profile, their product, one hidden layer of 32;
{steps} steps of {BATCH} pairs, one seed a fold. A drug is told by its fingerprint and, where it was seen, by
a learned vector of its own too. "Model, drug alone" is told nothing of the line.

Structures are not among the files, so a drug's fingerprint is {BITS} principal components of its responses in
the {others} other lines that GDSC screened. `split_pairs` with {FOLDS} folds; baselines:
`scjax.finetune.drugs.baselines`, with components of the same profiles and the same fingerprints. Intervals:
95 %, {N_BOOT:,} resamples of the {lines} lines, paired between methods; with so few lines they are wide, and
methods that tie may differ. Nothing is tuned; the first line names the best of the models and the best of
the plain methods by these same scores. Correlations are over pooled folds, where the mean of the training
lines alone lies below 0. That the model finds an interaction where there is one is planted in
`tests/test_drugs.py`.
{minutes:.0f} CPU minutes.
"""


def main() -> None:
    args = arguments(__doc__, steps=150, responses="gdsctools", model="")
    started = time.process_time()
    adata = read(args.data, LINES)
    ic50 = gdsc(args.responses)
    model = args.model or str(base(args.data))
    profiles = profiles_of(adata, scjax.load(model))
    say = lambda line: print(line, flush=True)  # noqa: E731

    own = ic50.loc[[name for name in profiles["log"].index if name in ic50.index]]
    others = ic50.drop(index=own.index)
    kept = own.columns[(own.notna().sum() >= LEAST) & (others.notna().sum() >= 100)]
    level = others[kept].sub(others[kept].mean(axis=1), axis=0)
    told = PCA(BITS, random_state=0).fit_transform(level.fillna(level.mean()).T.to_numpy())
    told = pd.DataFrame(told / told.std(0), index=kept)
    pairs = own[kept].rename_axis(index="sample", columns="drug").stack().rename("response").reset_index()
    real = {name: profile.loc[own.index] for name, profile in profiles.items()}
    text, verdict, values = report(pairs, predictions(pairs, real, told, args.steps, say))

    minutes = (time.process_time() - started) / 60
    how = HOW.format(
        steps=args.steps, others=len(others), lines=len(own), model=model, minutes=minutes, **globals()
    )
    page(
        args.out / "drug_response.md",
        "Drug response",
        f"Real responses (GDSC v17, {len(pairs):,} pairs of {len(own)} lines and {len(kept)} drugs; error of "
        f"log IC50): {'; '.join(verdict)}.",
        "python tools/adapt_pages/drugs.py" + (f" --model {args.model}" if args.model else ""),
        {"": f"`IC50_v17.csv.gz` of the package gdsctools 1.0.1.\n\n{text}", "How": how},
        values,
    )


if __name__ == "__main__":
    main()

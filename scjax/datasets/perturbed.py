"""A simulated experiment with perturbed cells, where it is known what every condition does."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


def perturbed(
    n_genes: int = 60,
    n_targets: int = 16,
    n_doubles: int = 24,
    cells: int = 40,
    *,
    doses: tuple[float, ...] = (),
    shared: float = 0.4,
    specific: float = 0.5,
    seed: int = 0,
) -> ad.AnnData:
    """Counts of control cells and of cells of single and double conditions in two cell lines.

    A condition changes the log of the expected counts by an effect that all conditions share and one of its
    own, linear in the four features of each target and the same in both lines; effects of two targets add
    up. Targets are not among the measured genes.

    Args:
      n_genes: measured genes "G0", "G1", ...
      n_targets: genes "T0", "T1", ... that are perturbed, each alone.
      n_doubles: pairs of them, "T0+T1", drawn at random.
      cells: of each condition in each line; eight times as many control cells.
      doses: with some, compounds of these doses in the place of genes: no pairs, and the effect is
        multiplied by dose / (1 + dose).
      shared, specific: sizes of the two kinds of effect, standard deviations of the change of the log.
      seed: of all of it.

    Returns:
      obs "perturbation" ("control" for none), "cell_line", and "dose" where there are doses; in uns
      "features", a DataFrame [target x 4], and "shared" and "specific", DataFrames [condition x gene] of the
      planted changes.
    """
    rng = np.random.default_rng([seed, 11])
    genes, targets = [f"G{i}" for i in range(n_genes)], [f"T{i}" for i in range(n_targets)]
    features = pd.DataFrame(rng.normal(size=(n_targets, 4)), index=targets)
    own = specific * features.to_numpy() @ rng.normal(size=(4, n_genes)) / 2
    common = shared * rng.normal(size=n_genes)
    lines = {line: rng.gamma(1.0, 5.0, n_genes) + 0.5 for line in ("one", "two")}

    pairs = [(a, b) for a in range(n_targets) for b in range(a)]
    chosen = rng.permutation(len(pairs))[: 0 if doses else n_doubles]
    conditions = {f"T{i}": [i] for i in range(n_targets)}
    conditions |= {"+".join(sorted((f"T{a}", f"T{b}"))): [a, b] for a, b in (pairs[i] for i in chosen)}
    effects = {name: own[of].sum(0) for name, of in conditions.items()}

    counts, obs = [], []
    for line, base in lines.items():
        for name in ("control", *conditions):
            for dose in doses if doses and name != "control" else (0.0,):
                n = 8 * cells if name == "control" else cells
                change = np.zeros(n_genes) if name == "control" else common + effects[name]
                change = change * (dose / (1 + dose) if dose else 1.0)
                depth = rng.lognormal(0.0, 0.3, (n, 1))
                counts.append(rng.poisson(base * np.exp(change) * depth))
                obs += [(name, line, dose)] * n
    table = pd.DataFrame(obs, columns=["perturbation", "cell_line", "dose"])
    table.index = pd.Index([f"cell{i}" for i in range(len(table))])
    out = ad.AnnData(
        sparse.csr_matrix(np.concatenate(counts).astype(np.float32)),
        table if doses else table.drop(columns="dose"),
        pd.DataFrame(index=pd.Index(genes)),
    )
    out.uns["features"] = features.set_axis([f"feature{i}" for i in range(4)], axis=1)
    out.uns["shared"] = pd.DataFrame([common] * len(effects), index=list(effects), columns=genes)
    out.uns["specific"] = pd.DataFrame(list(effects.values()), index=list(effects), columns=genes)
    return out

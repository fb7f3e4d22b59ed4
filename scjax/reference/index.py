"""The index: embedded cells of known kinds, saved as a directory that describes itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

import scjax
from scjax.api import Model
from scjax.interop.files import sha256
from scjax.interop.pretrained import whole_directory
from scjax.reference.vectors import (
    as_model,
    gene_overlap,
    identity,
    label_column,
    nearest,
    obsm_of,
    scaled,
    votes_of,
)

if TYPE_CHECKING:
    import anndata

FORMAT = 1
MAX_CALIBRATED = 10_000  # cells of the reference that are mapped onto the others


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """N embedded cells with labels, and how each of them maps onto the others.

    Attributes:
      vectors: float32 or float16 [N, D]; of length 1 where the metric is "cosine".
      obs: N rows: the label columns (categorical, missing where a cell has no such label) and the group.
      own: N rows, missing where a cell was not mapped onto the others: "distance", its mean distance to its
        k nearest others, and for each label column the "share" of votes that its most voted label got,
        whether that label is "correct", and the share of votes for its "true" label.
      card: what ``index.json`` says: how the cells were embedded, the metric, k, labels, genes.
      path: where it was read from or saved to; None if it only is in memory.
    """

    vectors: np.ndarray
    obs: pd.DataFrame
    own: pd.DataFrame
    card: dict[str, Any]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def labels(self) -> list[str]:
        return list(self.card["labels"])

    def save(self, path: str | Path) -> None:
        """Writes a directory, ``cells.h5ad`` (any AnnData reads it) and ``index.json``: whole or not at all.

        Raises:
          FileExistsError: something is there.
        """
        import anndata

        with whole_directory(path) as partial:
            cells = anndata.AnnData(self.vectors, obs=self.obs, obsm={"own": self.own})
            cells.write_h5ad(partial / "cells.h5ad", compression="gzip")
            card = self.card | {"sha256": sha256(partial / "cells.h5ad")}
            (partial / "index.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, path: str | Path) -> Reference:
        """Reads what :meth:`save` wrote.

        Raises:
          FileNotFoundError: no index there. ValueError: another format, or files that are damaged.
        """
        import anndata

        path = Path(path)
        if not (path / "index.json").is_file():
            raise FileNotFoundError(f"{path}: no reference index there (it would hold index.json)")
        try:
            card = json.loads((path / "index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / 'index.json'}: damaged ({error})") from error
        if card.get("format") != FORMAT:
            raise ValueError(f"{path}: format {card.get('format')!r}; this scjax reads format {FORMAT}")
        file = path / "cells.h5ad"
        if not file.is_file() or sha256(file) != card["sha256"]:
            raise ValueError(f"{file}: missing or damaged (its checksum is not that of index.json)")
        cells = anndata.read_h5ad(file)
        return cls(np.asarray(cells.X), cells.obs, cells.obsm["own"], card, path)

    # ------------------------------------------------------------------ search
    def model(self, model: Model | str | Path | None = None) -> Model | None:
        """The model that embedded these cells; None where they were embedded by something else.

        Args:
          model: where it is, or what :func:`scjax.load` returned; None for where it was.

        Raises:
          ValueError: it is not there any more, or the one given is another.
        """
        made = self.card["embedding"]
        if "obsm" in made:
            if model is not None:
                raise ValueError(f"the reference was made of obsm[{made['obsm']!r}]; it takes no model")
            return None
        if model is None and not Path(made["model"]).exists():
            raise ValueError(
                f"the reference was made with the model {made['model']}, which is not there: "
                "say with model= (--model) where it is now"
            )
        model = as_model(made["model"] if model is None else model)
        if (told := identity(model)["parameters"]) != made["parameters"]:
            raise ValueError(
                f"{model.path} at step {model.step} is not the model of the reference, {made['model']} at "
                f"step {made['step']}: parameters {told[:12]}, not {made['parameters'][:12]}"
            )
        return model

    def embed(self, adata: anndata.AnnData, model: Model | None = None, **options: Any) -> np.ndarray:
        """float32 [n_obs, D]: cells as the cells of the reference were embedded, told the same context.

        Args:
          model: from :meth:`model`.
          **options: ``batch_size``, ``layer``, ``progress``, see :func:`scjax.embed`.

        Raises:
          ValueError: no such obsm matrix, or one of another width; vectors that are not finite; cells without
            the context that those of the reference had.
        """
        made = self.card["embedding"]
        if "obsm" in made:
            vectors = obsm_of(adata, made["obsm"], self.vectors.shape[1])
        else:
            model = model or self.model()
            assert model is not None
            if (told := made["context"]) and (lacks := sorted({*told} - {*adata.obs.columns, *adata.obsm})):
                raise ValueError(
                    f"the cells have no {lacks[0]!r} in obs or obsm, which the reference was embedded with: "
                    "add it, or build the reference with context=False (map build --no-context)"
                )
            vectors = model.embed(adata, context=told, **options)
        return scaled(vectors, self.card["metric"])

    def search(self, vectors: np.ndarray, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``(distance, cell)`` [n, k] of the k nearest cells of the reference, the nearest first.

        Distances are Euclidean; of vectors of length 1 where the metric is "cosine".
        """
        return nearest(self.vectors, vectors, k or self.card["k"])

    def nearest(self, vectors: np.ndarray, names: Sequence[str], k: int = 5) -> pd.DataFrame:
        """The k nearest cells of the reference to each of ``vectors`` [n, D] from :meth:`embed`: one row each
        with columns cell, rank, distance, reference_cell and the labels."""
        distance, cell = self.search(vectors, k)
        n, k = cell.shape
        found = self.obs.iloc[cell.ravel()]
        table = {
            "cell": np.repeat(np.asarray(names, object), k),
            "rank": np.tile(np.arange(1, k + 1), n),
            "distance": distance.ravel(),
            "reference_cell": found.index.to_numpy(),
        }
        return pd.DataFrame(table | {name: found[name].to_numpy() for name in self.obs.columns})

    def votes(self, distance: np.ndarray, cell: np.ndarray, label: str) -> np.ndarray:
        """float64 [n, labels]: shares of the votes of the neighbours found, in the order of the categories.

        A neighbour at distance d votes with weight exp(-d^2 / mean d^2), the mean being over the cell's
        neighbours; one without a label does not vote. Rows of cells without any vote are 0.
        """
        column = self.obs[label].cat
        return votes_of(distance, column.codes.to_numpy()[cell], len(column.categories))


def build_reference(
    adata: anndata.AnnData,
    *,
    labels: str | Sequence[str],
    model: Model | str | Path | None = None,
    obsm: str | None = None,
    group: str | None = None,
    k: int = 15,
    metric: Literal["cosine", "euclidean"] = "cosine",
    dtype: Literal["float32", "float16"] = "float32",
    unlabelled: str = "unlabelled",
    seed: int = 0,
    context: bool | Sequence[str] = True,
    **options: Any,
) -> Reference:
    """An index of labelled cells, which :func:`map_cells` maps others onto.

    Args:
      adata: cells; those without any label are left out.
      labels: obs columns with the labels to transfer. The first says of what kind a cell is where distances
        are judged.
      model: embeds the raw counts of ``adata``; or
      obsm: the embedding that is there. Cells to be mapped must have one of the same space under that name.
      group: obs column (donor, study, batch): cells are mapped onto those of other groups alone when the
        rules are set, so that these hold for cells of a new group. None: onto all others, and they hold for
        further cells of the same groups.
      k: neighbours that vote.
      metric: "cosine" (vectors are scaled to length 1) or "euclidean".
      dtype: of the vectors on disk.
      unlabelled: value of a label column that means none.
      seed: of the sample of cells that are mapped onto the others, if there are more than 10,000.
      context: what the model is told of the cells beside counts, see :func:`scjax.embed`; cells are then
        mapped with the same. False to map cells of studies that the model was not trained on.
      **options: ``batch_size``, ``layer``, ``progress``, see :func:`scjax.embed`.

    Raises:
      ValueError: no such column or matrix (lists those there are), fewer than two labels, fewer than two
        groups, too few cells, vectors that are not finite.
    """
    labels = [labels] if isinstance(labels, str) else list(labels)
    if (model is None) == (obsm is None):
        raise ValueError("name the embedding of the reference: either model or obsm")
    if not labels:
        raise ValueError("labels: name one obs column or more")
    for column in [*labels, *([group] if group else [])]:
        if column not in adata.obs:
            raise ValueError(
                f"the reference has no obs column {column!r}; there are {sorted(adata.obs.columns)}"
            )
    obs = pd.DataFrame({name: label_column(adata.obs[name], unlabelled) for name in labels}, adata.obs_names)
    known = obs.notna().any(axis=1).to_numpy()
    obs = obs[known].apply(lambda column: column.cat.remove_unused_categories())
    if few := [name for name in labels if len(obs[name].cat.categories) < 2]:
        raise ValueError(f"obs[{few[0]!r}] of the reference holds fewer than two labels")
    if group:
        obs[group] = pd.Categorical(adata.obs[group].astype(str)[known])
        if len(obs[group].cat.categories) < 2:
            raise ValueError(f"obs[{group!r}] of the reference holds one group; rules need two or more")
    if not 1 <= k < len(obs):
        raise ValueError(f"k = {k}: the reference has {len(obs)} labelled cells; 1 to one less is possible")

    cells = adata[known]
    card: dict[str, Any] = {"format": FORMAT, "scjax": scjax.__version__}
    if model is None:
        vectors = obsm_of(cells, str(obsm))
        card["embedding"] = {"obsm": obsm}
    else:
        model = as_model(model)
        told = model.context_in(cells, context)
        names = [*told["labels"], *told["values"]]
        vectors = model.embed(cells, context=names, **options)
        card |= {
            "embedding": identity(model) | {"context": names},
            "genes": gene_overlap(model, cells, options.get("layer")),
        }
    vectors = scaled(vectors, metric).astype(dtype)
    own = _own(vectors, obs, labels, group, k, seed)
    card |= {"cells": len(obs), "dimensions": vectors.shape[1], "dtype": dtype, "metric": metric, "k": k}
    card |= {"group": group, "labels": {name: obs[name].value_counts().to_dict() for name in labels}}
    card["own accuracy"] = {name: float(own[f"{name} correct"].mean()) for name in labels}
    return Reference(vectors, obs, own, card)


def _own(
    vectors: np.ndarray, obs: pd.DataFrame, labels: list[str], group: str | None, k: int, seed: int
) -> pd.DataFrame:
    """Each cell, or a sample, mapped onto the others or onto other groups; see :class:`Reference`."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(obs))[:MAX_CALIBRATED])
    part = obs[group].cat.codes.to_numpy() if group else np.arange(len(obs))
    distance, cell = _others(vectors, part, chosen, k, group)
    own = pd.DataFrame(index=obs.index)

    def put(name: str, values: np.ndarray) -> None:
        own[name] = np.full(len(obs), np.nan, np.float32)
        own.iloc[chosen, -1] = values.astype(np.float32)

    put("distance", distance.mean(1))
    for name in labels:
        code, n = obs[name].cat.codes.to_numpy(), len(obs[name].cat.categories)
        share, true = votes_of(distance, code[cell], n), code[chosen]
        # a label that one group alone has cannot be found among the others: it says nothing of the votes
        places = pd.Series(part[code >= 0]).groupby(code[code >= 0]).nunique().reindex(range(n))
        judged = (true >= 0) & (places.to_numpy()[true] > 1)
        if not judged.any():
            raise ValueError(f"no label of obs[{name!r}] occurs in two groups of obs[{group!r}]")
        put(f"{name} share", np.where(judged, share.max(1), np.nan))
        right = (share.argmax(1) == true) & (share.max(1) > 0)  # without any vote nothing is
        put(f"{name} correct", np.where(judged, right, np.nan))
        put(f"{name} true", np.where(judged, share[np.arange(len(true)), np.maximum(true, 0)], np.nan))
    return own


def _others(
    vectors: np.ndarray, part: np.ndarray, chosen: np.ndarray, k: int, group: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """``(distance, cell)`` [chosen, k] of the nearest cells of other parts; without groups, other cells."""
    if group is None:
        distance, cell = nearest(vectors, vectors[chosen], k + 1)
        self_or_last = cell == chosen[:, None]  # where copies of a cell crowd it out, the last goes
        self_or_last[~self_or_last.any(1), -1] = True
        return distance[~self_or_last].reshape(-1, k), cell[~self_or_last].reshape(-1, k)
    distance, cell = np.zeros((len(chosen), k)), np.zeros((len(chosen), k), int)
    for code in np.unique(part[chosen]):
        others, at = np.flatnonzero(part != code), np.flatnonzero(part[chosen] == code)
        if len(others) < k:
            raise ValueError(f"k = {k}: outside one of the groups of obs[{group!r}] are {len(others)} cells")
        distance[at], of_others = nearest(vectors[others], vectors[chosen[at]], k)
        cell[at] = others[of_others]
    return distance, cell

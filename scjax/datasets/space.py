"""Where cells lie, as inputs of a model: what the neighbours of a cell express, and its coordinates.

Both are matrices in ``obsm``, made before a corpus is built (``values=["neighbours", "coordinates"]``), and
read as context tokens of the kinds "neighbours" and "coordinates". Cells of different sections are never
compared.

Features of neighbours are the same numbers, to the bit, however a section is turned, mirrored or moved. On an
array several neighbours are equally far; which of them come first is decided by a hash of the cells' names,
which knows neither place nor expression. Coordinates are the same, but for rounding, wherever a section lies;
they are not when it is turned or mirrored, so they mean something only where sections lie alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

SAME = 1e-3  # distances that differ by less than this share of the spacing are equal: coordinates are rounded


def neighbour_features(
    adata: ad.AnnData,
    k: int = 8,
    components: int = 16,
    *,
    spatial_key: str = "spatial",
    section_key: str | None = None,
    features: str | None = None,
    train: Sequence[str] | None = None,
    summary: Literal["each", "mean"] = "each",
    layer: str | None = None,
    key_added: str = "neighbours",
) -> None:
    """Adds what the ``k`` nearest other cells of the same section express.

    Writes ``adata.obsm[key_added]``, float32 [n, k x components], the nearest neighbour first, for a context
    token of kind "neighbours" of size ``k`` and width ``components``; with ``summary="mean"`` the mean over
    the neighbours, [n, components]. The cell itself is no part of it.

    Args:
      adata: raw counts in ``X`` or ``layer``, coordinates [n, 2 or 3] in ``obsm[spatial_key]``.
      section_key: obs column of sections; None: one section.
      features: obsm key of what is told of a neighbour, such as a model's embedding, whose first
        ``components`` columns are taken; None for principal components of log counts per 10,000.
      train: names of the sections that the components are fitted on; None for all.

    Raises:
      KeyError: no such coordinates, sections, features or layer; lists those there are.
      ValueError: coordinates that are not numbers, a section of at most k cells, cells at the same place,
        more components than there are, names of cells that are not unique.
    """
    if k < 1 or components < 1:
        raise ValueError(f"k = {k} neighbours and {components} components: both must be at least 1")
    xy, section, names = _located(adata, spatial_key, section_key)
    for s, name in enumerate(names):
        if (n := int((section == s).sum())) <= k:
            raise ValueError(
                f"section {name!r} has {n} cells, too few for {k} neighbours of each: lower k, or drop it"
            )
    if features is None:
        told = log_components(adata, components, _training_rows(section, names, train), layer)
    elif features in adata.obsm:
        told = np.asarray(adata.obsm[features], np.float32)
        if told.ndim != 2 or told.shape[1] < components or not np.isfinite(told).all():
            raise ValueError(
                f"obsm[{features!r}] has shape {told.shape}; finite numbers, [cells, {components} or more], "
                "are needed"
            )
        told = told[:, :components]
    else:
        raise KeyError(f"no features: obsm has no {features!r}; it holds {list(adata.obsm)}")
    near = told[nearest(xy, section, k, adata.obs_names)]
    adata.obsm[key_added] = near.mean(1) if summary == "mean" else near.reshape(len(near), -1)


def centred_coordinates(
    adata: ad.AnnData,
    *,
    spatial_key: str = "spatial",
    section_key: str | None = None,
    key_added: str = "coordinates",
) -> None:
    """Adds coordinates about the centre of each section, in units of its spread.

    Writes ``adata.obsm[key_added]``, float32 [n, 2 or 3]: the root of the mean squared distance from the
    centre is 1 in each section. For a context token of kind "coordinates" with ``scale`` about 1.

    Raises:
      KeyError, ValueError: as :func:`neighbour_features`.
    """
    xy, section, names = _located(adata, spatial_key, section_key)
    for s in range(len(names)):
        rows = section == s
        xy[rows] -= xy[rows].mean(0)
        xy[rows] /= max(float(np.sqrt((xy[rows] ** 2).sum(1).mean())), 1e-12)
    adata.obsm[key_added] = xy.astype(np.float32)


def shuffled(values: np.ndarray, section: Sequence[str] | np.ndarray, seed: int = 0) -> np.ndarray:
    """The rows of ``values`` permuted within each section: a control that keeps all but the place."""
    out, rng = np.array(values), np.random.default_rng(seed)
    codes = pd.factorize(np.asarray(section))[0]
    for s in range(codes.max() + 1):
        rows = np.flatnonzero(codes == s)
        out[rows] = out[rng.permutation(rows)]
    return out


def nearest(xy: np.ndarray, section: np.ndarray, k: int, names: Sequence[str]) -> np.ndarray:
    """int64 [n, k]: positions of the k nearest other cells of the same section, the nearest first.

    Args:
      xy: float64 [n, 2 or 3]. section: codes [n], each of more than k cells. names: of the cells, unique.
    """
    if not pd.Index(names).is_unique:
        raise ValueError("cells share names, which decide between equally far neighbours: make them unique")
    order = np.argsort([f"{zlib.crc32(str(name).encode()):010d}{name}" for name in names], kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    out = np.empty((len(xy), k), np.int64)
    for s in np.unique(section):
        rows = np.flatnonzero(section == s)
        for at, found in _shells(xy[rows], k, rank[rows]):
            out[rows[at]] = rows[found]
    return out


def _shells(xy: np.ndarray, k: int, rank: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(cells, their neighbours [cells, k]): by distance, and by rank where distances are equal. More
    neighbours are looked at until the last that are equally far as the k-th are among them."""
    index = NearestNeighbors().fit(xy)
    spacing = float(np.median(index.kneighbors(n_neighbors=1)[0]))
    todo, wide = np.arange(len(xy)), min(2 * k + 8, len(xy) - 1)
    while len(todo):
        whole = wide == len(xy) - 1
        # one more is the cell itself
        distance, found = index.kneighbors(xy[todo], wide + 1)
        other = found != todo[:, None]
        distance = distance[other].reshape(len(todo), wide)
        found = found[other].reshape(len(todo), wide)
        shell = np.cumsum(np.diff(distance, axis=1, prepend=0) > SAME * spacing, axis=1)
        done = whole | (shell[:, -1] > shell[:, k - 1])
        order = np.lexsort((rank[found], shell), axis=1)[:, :k]
        yield todo[done], np.take_along_axis(found, order, axis=1)[done]
        todo, wide = todo[~done], min(2 * wide, len(xy) - 1)


def _located(
    adata: ad.AnnData, spatial_key: str, section_key: str | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Coordinates float64 [n, 2 or 3], codes of sections [n] and their names, checked."""
    if spatial_key not in adata.obsm:
        raise KeyError(f"no coordinates: obsm has no {spatial_key!r}; it holds {list(adata.obsm)}")
    try:
        xy = np.array(adata.obsm[spatial_key], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"obsm[{spatial_key!r}] does not hold numbers: {error}") from None
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        raise ValueError(f"obsm[{spatial_key!r}] has shape {xy.shape}; [cells, 2 or 3 coordinates] is needed")
    if section_key is None:
        section, names = np.zeros(len(xy), np.int64), ["all cells"]
    elif section_key not in adata.obs:
        raise KeyError(f"no sections: obs has no {section_key!r}; it holds {list(adata.obs)}")
    else:
        column = adata.obs[section_key]
        if column.isna().any():
            raise ValueError(f"{int(column.isna().sum())} cells have no {section_key!r}; drop them")
        section, found = pd.factorize(column.astype(str), sort=True)
        names = list(found)
    bad = ~np.isfinite(xy).all(1)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"obsm[{spatial_key!r}]: {int(bad.sum())} cells have no finite coordinates, such as "
            f"{adata.obs_names[first]!r} of section {names[section[first]]!r}; drop them"
        )
    twice = pd.DataFrame(np.column_stack([section, xy])).duplicated(keep=False).to_numpy()
    if twice.any():
        first = int(np.flatnonzero(twice)[0])
        such = f"such as {adata.obs_names[first]!r} of section {names[section[first]]!r}"
        raise ValueError(
            f"obsm[{spatial_key!r}]: {int(twice.sum())} cells lie exactly where another of their section "
            f"does, {such}; drop the copies, or name the column of sections if these are several"
        )
    return xy, section, names


def _training_rows(section: np.ndarray, names: list[str], train: Sequence[str] | None) -> np.ndarray:
    if train is None:
        return np.arange(len(section))
    if missing := sorted(set(map(str, train)) - set(names)):
        raise KeyError(f"no sections {missing}; there are {names}")
    return np.flatnonzero(np.isin(section, [names.index(str(name)) for name in train]))


def log_components(
    adata: ad.AnnData, components: int, train: np.ndarray, layer: str | None = None
) -> np.ndarray:
    """float32 [n, components]: principal components of log counts per 10,000 fitted on the rows ``train``,
    in units of the spread of the first."""
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r}; there are {list(adata.layers)}")
    counts = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32)
    if components > (most := min(len(train), counts.shape[1]) - 1):
        size = f"{len(train)} cells x {counts.shape[1]} genes"
        raise ValueError(f"{components} components of {size}: there are {most} at most")
    depth = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    values = (sparse.diags(1e4 / depth) @ counts).log1p().tocsr()
    pca = PCA(components, svd_solver="arpack", random_state=0).fit(values[train])
    return (pca.transform(values) / np.sqrt(pca.explained_variance_[0])).astype(np.float32)


def planted_sections(
    n_sections: int = 4, n_cells: int = 400, n_genes: int = 24, *, seed: int = 0
) -> ad.AnnData:
    """Sections with a planted spatial field: raw counts of genes that know nothing of each other.

    The rate of the first gene, "FIELD", is a smooth function of the place relative to the section's centre,
    the same in all sections; that of all others is the same everywhere. So nothing of a cell but its place
    tells how much of FIELD it has, and each section lies somewhere else.

    Returns: n_sections x n_cells cells, obs "section", obsm "spatial" (in units of the section's width), and
      "field", the log of the rate of FIELD.
    """
    rng = np.random.default_rng(seed)
    place = rng.uniform(-0.5, 0.5, (n_sections * n_cells, 2))
    field = 2.0 + np.sin(2 * np.pi * place[:, 0]) + 0.7 * np.cos(2 * np.pi * place[:, 1])
    rate = np.full((len(place), n_genes), np.exp(2.0))
    rate[:, 0] = np.exp(field)
    section = np.repeat(np.arange(n_sections), n_cells)
    genes = ["FIELD", *(f"GENE{i}" for i in range(1, n_genes))]
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(
            {"section": pd.Categorical([f"s{s}" for s in section])},
            index=[f"s{s}_{i}" for i, s in enumerate(section)],
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": place + rng.normal(size=(n_sections, 2))[section] * 10, "field": field[:, None]},
    )

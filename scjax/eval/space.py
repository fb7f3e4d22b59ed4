"""Where spots and cells lie: sections, contiguous blocks to hold out, neighbours, spatial autocorrelation.

Neighbouring spots are near copies of each other. A random split puts one copy on each side, so what is held
out here is whole sections, or contiguous blocks with a margin around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

from scjax.eval import checks, stats
from scjax.eval.results import Results
from scjax.eval.schema import MEAN

BLOCKS, BLOCK_SIZE = 16, 20  # blocks of a section at most; spots of a block at least
FEW_SECTIONS = 3  # with fewer sections than this, blocks inside them are held out
MARGIN = 2.0  # width of the margin around held-out blocks, in typical distances between neighbours
SAME_PLACE = 0.05  # share of cells lying exactly on another one above which something is wrong with the table


@dataclass(frozen=True)
class Space:
    """Positions of cells; made by :func:`locate`."""

    xy: np.ndarray  # float64[n, 2 or 3]
    section: np.ndarray  # int64[n]
    section_names: list[str]
    block: np.ndarray  # int64[n]: contiguous blocks, numbered through all sections
    unit: np.ndarray  # int64[n]: what is held out: group, section or block
    unit_names: list[str]
    held_out: str  # "section", "block" or the name of the group column

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def scaled(self) -> np.ndarray:
        """Coordinates about the centre of each section, in units of its spread."""
        out = np.empty_like(self.xy)
        for s in range(len(self.section_names)):
            rows = self.section == s
            centred = self.xy[rows] - self.xy[rows].mean(0)
            out[rows] = centred / max(float(np.sqrt((centred**2).sum(1).mean())), 1e-12)
        return out

    def take(self, rows: np.ndarray) -> Space:
        """The cells at these positions; names are kept."""
        return Space(
            self.xy[rows],
            self.section[rows],
            self.section_names,
            self.block[rows],
            self.unit[rows],
            self.unit_names,
            self.held_out,
        )

    def away_from(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """The training cells that are not within the margin around test cells, where blocks are held out."""
        if self.held_out != "block":
            return train
        keep = np.ones(len(train), bool)
        for s in range(len(self.section_names)):
            at = np.flatnonzero(self.section[train] == s)
            held = test[self.section[test] == s]
            if len(at) and len(held):
                reach = MARGIN * spacing(self.xy[self.section == s])
                nearest = NearestNeighbors(n_neighbors=1).fit(self.xy[held]).kneighbors(self.xy[train[at]])[0]
                keep[at] = nearest[:, 0] > reach
        return train[keep]


def locate(
    adata: ad.AnnData, coordinates: str, section_key: str | None = None, group_key: str | None = None
) -> Space:
    """Coordinates, sections and what to hold out: groups (donors) if given, sections from three on, else
    blocks.

    Raises:
        KeyError: a key that adata lacks. ValueError: coordinates that are not numbers, of the wrong shape, or
            shared by many cells; a section that belongs to two groups; too few groups, cells or blocks.
    """
    if coordinates not in adata.obsm:
        held = ", ".join(adata.obsm) or "nothing"
        raise KeyError(f"no coordinates: obsm has no {coordinates!r}; it holds: {held}")
    try:
        xy = np.asarray(adata.obsm[coordinates], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"obsm[{coordinates!r}] is not numeric: {error}") from None
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        raise ValueError(f"obsm[{coordinates!r}] has shape {xy.shape}; [cells, 2 or 3 coordinates] is needed")
    if bad := int((~np.isfinite(xy)).any(1).sum()):
        raise ValueError(
            f"obsm[{coordinates!r}]: {bad} of {len(xy)} cells have no finite coordinates; drop them"
        )
    section, names = _codes(adata, section_key, "section")
    for s, name in enumerate(names):
        rows = section == s
        if rows.sum() < BLOCK_SIZE:
            raise ValueError(
                f"section {name!r} has {int(rows.sum())} cells; at least {BLOCK_SIZE} are needed: drop it"
            )
        distinct = len(np.unique(xy[rows], axis=0))
        if distinct < (1 - SAME_PLACE) * rows.sum():
            raise ValueError(
                f"{int(rows.sum()) - distinct} of {int(rows.sum())} cells of section {name!r} lie exactly "
                "where another one does; if these are several sections, name their column with section_key; "
                "if cells are listed twice, drop the copies"
            )
    block = _blocks(xy, section)
    if group_key is not None:
        group, group_names = _codes(adata, group_key, "group")
        pairs = np.unique(np.stack([section, group]), axis=1)
        torn = np.flatnonzero(np.bincount(pairs[0]) > 1)
        if len(torn) and section_key is None:
            raise ValueError(
                f"section_key is needed beside group_key={group_key!r}: coordinates of different "
                "sections cannot be compared"
            )
        if len(torn):
            raise ValueError(
                f"section {names[torn[0]]!r} belongs to several values of {group_key!r}; a group holds whole "
                "sections"
            )
        if len(group_names) < 2:
            raise ValueError(
                f"{group_key!r} has a single value; at least two groups are needed to hold one out"
            )
        return Space(xy, section, names, block, group, group_names, group_key)
    if len(names) >= FEW_SECTIONS:
        return Space(xy, section, names, block, section, names, "section")
    owner = [names[section[block == b][0]] for b in range(block.max() + 1)]
    titles = [f"{name} block {b}" if len(names) > 1 else f"block {b}" for b, name in enumerate(owner)]
    if len(titles) < 4:
        raise ValueError(
            f"{len(xy)} cells make {len(titles)} contiguous blocks of {BLOCK_SIZE} or more; at least 4 are "
            "needed to hold some out"
        )
    return Space(xy, section, names, block, block, titles, "block")


def _codes(adata: ad.AnnData, key: str | None, role: str) -> tuple[np.ndarray, list[str]]:
    if key is None:
        return np.zeros(adata.n_obs, np.int64), [f"all {role}s"]
    codes, names = checks.encode(checks.column(adata.obs, key, role), role, adata.n_obs)
    if (codes < 0).any():
        raise ValueError(
            f"{int((codes < 0).sum())} of {adata.n_obs} cells have no {role} ({key!r}); drop them"
        )
    return codes, names


def _blocks(xy: np.ndarray, section: np.ndarray) -> np.ndarray:
    """Blocks of equal numbers of neighbouring cells: each section is halved at the median of its longer side,
    the halves again, down to a sixteenth.
    """
    block, n = np.zeros(len(xy), np.int64), 0
    for s in np.unique(section):
        parts = [np.flatnonzero(section == s)]
        while 2 * len(parts) <= BLOCKS and len(parts[0]) >= 2 * BLOCK_SIZE:
            halves = []
            for rows in parts:
                axis = int(np.argmax(np.ptp(xy[rows], axis=0)))
                order = rows[np.argsort(xy[rows, axis], kind="stable")]
                halves += np.array_split(order, 2)
            parts = halves
        for rows in parts:
            block[rows] = n
            n += 1
    return block


def spacing(xy: np.ndarray) -> float:
    """Median distance of a cell to its nearest neighbour elsewhere."""
    distance = NearestNeighbors(n_neighbors=min(4, len(xy))).fit(xy).kneighbors(xy)[0][:, 1:]
    nearest = np.where(distance > 0, distance, np.inf).min(1)
    return float(np.median(nearest[np.isfinite(nearest)])) if np.isfinite(nearest).any() else 0.0


def neighbours(xy: np.ndarray, section: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other cells of the same section: distances float64[n, k] and positions int64[n, k].

    Raises ValueError where a section has too few cells.
    """
    distance, index = np.zeros((len(xy), k)), np.zeros((len(xy), k), np.int64)
    for s in np.unique(section):
        rows = np.flatnonzero(section == s)
        if len(rows) <= k:
            raise ValueError(
                f"a section has {len(rows)} usable cells, too few for {k} neighbours of each; lower "
                "n_neighbors or drop it"
            )
        d, i = NearestNeighbors(n_neighbors=k).fit(xy[rows]).kneighbors()  # without X: never the cell itself
        distance[rows], index[rows] = d, rows[i]
    return distance, index


def graph(index: np.ndarray) -> sp.csr_matrix:
    """Neighbours int64[n, k] as a sparse matrix of ones [n, n]; row i points at the neighbours of cell i."""
    n, k = index.shape
    return sp.csr_matrix((np.ones(n * k), index.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))


def morans_i(values: np.ndarray, graph: Any) -> np.ndarray:
    """Moran's I of each column of ``values`` [n, features] on a graph of weights [n, n]; 0 where the values
    are constant.

    I = n / Σw · Σ w_ij z_i z_j / Σ z_i² with z the values about their mean (Moran 1950): 1 where neighbours
    are alike, −1 / (n − 1) on average where values lie at random.
    """
    z = np.asarray(values, np.float64)
    z = z - z.mean(0)
    square = (z**2).sum(0)
    varies = square > 1e-12 * np.maximum((np.asarray(values, np.float64) ** 2).sum(0), 1e-300)
    weight = float(graph.sum())
    if weight == 0:
        return np.zeros(z.shape[1])
    cross = (z * (graph @ z)).sum(0)
    return np.where(varies, len(z) / weight * cross / np.where(varies, square, 1), 0.0)


def composition(label: np.ndarray, n_labels: int, index: np.ndarray) -> np.ndarray:
    """Share of each label among the neighbours of each cell: float64[n, n_labels], rows sum to one."""
    return np.asarray(graph(index) @ np.eye(n_labels)[label]) / index.shape[1]


def density(distance: np.ndarray, section: np.ndarray) -> np.ndarray | None:
    """Log of the number of cells per area around each cell, standardised within its section: float64[n]; None
    where cells lie on a grid, whose density is that of the grid.
    """
    out = np.zeros(len(distance))
    for s in np.unique(section):
        rows = section == s
        low, high = np.quantile(distance[rows, 0], [0.1, 0.9])
        if high <= 1.1 * low:
            return None
        value = -np.log(np.maximum(distance[rows, -1], 1e-12 * max(high, 1e-300)))
        out[rows] = (value - value.mean()) / max(float(value.std()), 1e-12)
    return out


@dataclass(frozen=True)
class Weights:
    """Resamples of the cells of a task, the same for all representations."""

    cells: np.ndarray  # uint8[1 + n_boot, n]: by contiguous blocks within each section
    parts: dict[str, np.ndarray]  # section → positions; one entry without a name where there is one
    sections: np.ndarray | None  # uint8[1 + n_boot, parts] where sections are many enough to be resampled

    @property
    def method(self) -> str:
        if self.sections is not None:
            return "percentile bootstrap over sections"
        few = f" of each section (fewer than {stats.FEW_GROUPS} sections)" * (len(self.parts) > 1)
        return f"percentile bootstrap over contiguous blocks{few}"

    def over_parts(self, of_part: Mapping[str, np.ndarray]) -> np.ndarray:
        """Mean over sections of scores [1 + n_boot], those that are undefined left out."""
        known = [s for s in of_part.values() if np.isfinite(s[0])]
        if not known:
            return np.array([np.nan])
        if self.sections is not None and len(known) == len(of_part):
            return stats.mean(np.array([s[0] for s in known]), self.sections)
        with np.errstate(invalid="ignore"):
            return np.nanmean(known, axis=0)

    def add(self, out: Results, scores: Mapping[str, Mapping[str, np.ndarray]], **fields: Any) -> None:
        """Add scores {metric: {section: score}} and their means over sections, where there are several."""
        for metric, of_part in scores.items():
            for part, score in of_part.items():
                method = "percentile bootstrap over contiguous blocks" + (" of the section" if part else "")
                n = len(self.parts[part])
                out.add(score, **fields, metric=metric, group=part, n_cells=n, ci_method=method)
            if len(self.parts) > 1:
                mean, n = self.over_parts(of_part), self.cells.shape[1]
                out.add(mean, **fields, metric=metric, group=MEAN, n_cells=n, ci_method=self.method)


def resampled(place: Space, n_boot: int, seed: int, task: str) -> Weights:
    """Resamples of cells by blocks, and of sections where there are ten or more."""
    weights = np.ones((1 + n_boot, len(place)), np.uint8)
    parts = {}
    for s, name in enumerate(place.section_names):
        rows = np.flatnonzero(place.section == s)
        if not len(rows):
            continue
        parts[name if len(place.section_names) > 1 else ""] = rows
        _, block = np.unique(place.block[rows], return_inverse=True)
        drawn = stats.resample(int(block.max()) + 1, n_boot, seed, f"{task}/{name}")
        weights[:, rows] = drawn[:, block]
    sections = None
    if len(parts) >= stats.FEW_GROUPS:
        sections = stats.resample(len(parts), n_boot, seed, f"{task} sections")
    return Weights(weights, parts, sections)

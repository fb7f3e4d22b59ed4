"""Raw counts that behave like real ones, in any number: sources for build, loader and benchmarks.

    python tools/simulate_corpus.py /tmp/sim                    # 300,000 cells x 20,000 genes, 30 .h5ad files
    python tools/simulate_corpus.py /tmp/sim --corpus           # and the corpus built from them
    python tools/simulate_corpus.py /tmp/one --one-file --gzip
    python tools/simulate_corpus.py --virtual 100_000_000 /tmp/sim/corpus /tmp/sim/virtual

A cell draws its molecules, one after the other, from the profile of its cell type: gene frequencies follow
Zipf's law, gene programmes that the type has switched on multiply them, and a Gamma variable per cell and
gene makes the counts of a type's cells over-dispersed (negative binomial). About 1,840 of 20,000 genes are
expressed in a cell, two thirds of them with one molecule. Cells are ordered as studies deliver them: data set
by data set (of unequal size), donor by donor, with the cell types mixed; a few types are unknown.

The files are as found in the wild: CSR with float32 counts and int32 indices. The content depends on the
sizes and the seed, not on the number of threads or files.

--virtual makes a corpus of many more cells out of a real one: a manifest in which each real part appears
again and again under other ids, which are links to it. Opening and reading it is as real as it gets; only the
disk and the page cache hold less than they would.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import anndata as ad
import h5py
import numba
import numpy as np
import pandas as pd

AT_ONCE = 4096  # cells drawn together
PIECE = 2**23  # stored values copied together
DEPTH = 0.225  # mean molecules of a cell, per gene of the vocabulary
LEVELS = 256  # of the Gamma noise
SHAPE = 2.0
PROGRAMMES, OF_A_TYPE = 60, 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Study:
    """All that is decided before the first molecule is drawn.

    Attributes:
      obs: one row per cell.
      profile: float64 [types, genes], how often each gene is drawn.
      type_of: int32 [cells], row of ``profile``.
      depth: int32 [cells], molecules.
      seed: of the molecules.
    """

    obs: pd.DataFrame
    profile: np.ndarray
    type_of: np.ndarray
    depth: np.ndarray
    seed: int


def plan(cells: int, genes: int, datasets: int = 30, types: int = 60, seed: int = 0) -> Study:
    """Data sets, donors, cell types and depths.

    Raises:
      ValueError: fewer cells than data sets, or too few genes for a count to be a count.
    """
    if not 1 <= datasets <= cells or genes < 20 or types < 1:
        raise ValueError(
            f"{cells} cells, {datasets} data sets, {types} types, {genes} genes: every data set "
            "needs a cell, and there must be 20 genes and a type"
        )
    rng = np.random.default_rng([seed, 1])
    profile = (rng.permutation(genes) + 30.0) ** -1.0 * np.ones((types, 1))
    up = rng.random((PROGRAMMES, genes)) < 0.015
    strength = np.where(up, rng.lognormal(1.5, 0.6, (PROGRAMMES, genes)), 1.0)
    for row in profile:
        row *= strength[rng.choice(PROGRAMMES, OF_A_TYPE, replace=False)].prod(axis=0)
        row *= rng.lognormal(0.0, 0.9, genes)

    share = rng.dirichlet(np.full(datasets, 2.0))
    sizes = 1 + np.floor(share * (cells - datasets)).astype(np.int64)
    sizes[int(sizes.argmax())] += cells - sizes.sum()
    dataset = np.repeat(np.arange(datasets), sizes)
    donor, type_of = np.empty(cells, np.int64), np.empty(cells, np.int32)
    scale = np.empty(cells)
    for d in range(datasets):
        mine, n = dataset == d, int(sizes[d])
        donor[mine] = np.sort(rng.integers(0, 8, n)) + 8 * d
        type_of[mine] = rng.choice(types, n, p=rng.dirichlet(np.full(types, 0.25)))
        scale[mine] = rng.lognormal(0.0, 0.3) * rng.lognormal(0.0, 0.4, n)
    depth = np.clip(DEPTH * genes * scale / scale.mean(), 0.02 * genes + 5, 3.0 * genes).astype(np.int32)

    def names(pattern: str, codes: np.ndarray) -> pd.Categorical:
        return pd.Categorical([pattern.format(code) for code in codes.tolist()])

    cell_type = np.array([f"type {t:02d}" for t in type_of.tolist()], object)
    cell_type[rng.random(cells) < 0.03] = "unknown"
    obs = pd.DataFrame(
        {
            "dataset": names("study{:02d}", dataset),
            "donor": names("donor{:03d}", donor),
            "cell_type": pd.Categorical(cell_type),
            "tissue": names("tissue {}", dataset % 12),
            "assay": names("assay {}", dataset % 4),
            "sex": pd.Categorical(np.array(["female", "male"])[donor % 2]),
            "n_counts": depth.astype(np.float32),
        },
        index=[f"cell{i:09d}" for i in range(cells)],
    )
    return Study(obs, profile, type_of, depth, seed)


@numba.njit(cache=True)
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True)
def _alias(weights):
    """Walker's table of one distribution: uint64 [genes], threshold and other gene, 32 bits each."""
    n = weights.size
    scaled = weights * (n / weights.sum())
    other = np.arange(n)
    few, many = np.empty(n, np.int64), np.empty(n, np.int64)
    n_few = n_many = 0
    for i in range(n):
        if scaled[i] < 1.0:
            few[n_few] = i
            n_few += 1
        else:
            many[n_many] = i
            n_many += 1
    while n_few > 0 and n_many > 0:
        n_few -= 1
        low, high = few[n_few], many[n_many - 1]
        other[low] = high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            n_many -= 1
            few[n_few] = high
            n_few += 1
    table = np.empty(n, np.uint64)
    for i in range(n):
        threshold = np.uint64(min(scaled[i], 1.0) * 4294967295.0)
        table[i] = threshold << np.uint64(32) | np.uint64(other[i])
    return table


@numba.njit(parallel=True, cache=True)
def _draw(table, type_of, depth, accept, seed, first, begins, gene, count, n_genes):
    """Molecules of cells [first, first + n) into ``gene`` and ``count`` from ``begins`` on, by gene."""
    low = np.uint64(0xFFFFFFFF)
    width = np.uint64(table.shape[1])
    for i in numba.prange(type_of.size):
        held = np.zeros(table.shape[1], np.uint16)
        cell = _mix(np.uint64(seed) ^ _mix(np.uint64(first + i) + GOLDEN))
        state, row, drawn = cell, table[type_of[i]], 0
        while drawn < depth[i]:
            state += GOLDEN
            bits = _mix(state)
            j = (bits >> np.uint64(32)) * width >> np.uint64(32)
            if (bits & low) > row[j] >> np.uint64(32):
                j = row[j] & low
            # the cell's own liking of the gene, always the same; a molecule is kept in proportion to it
            liking = accept[_mix(cell ^ (j + np.uint64(1)) * GOLDEN) & np.uint64(LEVELS - 1)]
            if _mix(state ^ cell) & low < liking and held[j] < np.uint16(65535):
                held[j] += np.uint16(1)
                drawn += 1
        at = begins[i]
        for j in range(table.shape[1]):
            if held[j] > 0:
                gene[at] = j
                count[at] = held[j]
                at += 1
        n_genes[i] = at - begins[i]


def draw(study: Study, first: int = 0, last: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """The counts of cells [first, last), some thousand at a time.

    Yields:
      (n_genes, gene, count): int64 [n] expressed genes of each cell; uint16 each, all expressed genes in
      ascending order cell by cell, and their counts.
    """
    last = len(study.depth) if last is None else last
    table = np.stack([_alias(row) for row in study.profile])
    # Gamma at the middle of each of its LEVELS quantiles, as the odds of keeping a molecule
    draws = np.random.default_rng(2).gamma(SHAPE, 1 / SHAPE, 2**18)
    gamma = np.quantile(draws, (np.arange(LEVELS) + 0.5) / LEVELS)
    accept = (gamma / gamma.max() * 4294967295.0).astype(np.uint64)
    genes = table.shape[1]
    for start in range(first, last, AT_ONCE):
        stop = min(start + AT_ONCE, last)
        most = np.minimum(study.depth[start:stop], genes).astype(np.int64)
        begins, n_genes = np.cumsum(most) - most, np.empty(stop - start, np.int64)
        gene, count = np.empty(most.sum(), np.uint16), np.empty(most.sum(), np.uint16)
        _draw(
            table,
            study.type_of[start:stop],
            study.depth[start:stop],
            accept,
            study.seed,
            start,
            begins,
            gene,
            count,
            n_genes,
        )
        used = [slice(b, b + n) for b, n in zip(begins.tolist(), n_genes.tolist(), strict=True)]
        yield n_genes, np.concatenate([gene[s] for s in used]), np.concatenate([count[s] for s in used])


def write_h5ad(study: Study, path: pathlib.Path, first: int, last: int, gzip: bool = False) -> int:
    """Cells [first, last) as one file; returns the number of stored values."""
    obs = study.obs.iloc[first:last].copy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    genes = study.profile.shape[1]
    var = pd.DataFrame(
        {"feature_name": [f"GENE{i}" for i in range(genes)]}, index=[f"ENSG{i:011d}" for i in range(genes)]
    )
    ad.AnnData(obs=obs, var=var).write_h5ad(path)
    lengths = []
    with (
        tempfile.TemporaryFile(dir=path.parent) as gene_file,
        tempfile.TemporaryFile(dir=path.parent) as count_file,
    ):
        for n_genes, gene, count in draw(study, first, last):
            lengths.append(n_genes)
            gene_file.write(gene.data)
            count_file.write(count.data)
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        with h5py.File(path, "r+") as file:
            file.pop("X", None)  # that of an AnnData without a matrix
            x = file.create_group("X")
            x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            x.attrs["shape"] = np.array([last - first, genes])
            x.create_dataset("indptr", data=indptr)
            how = {"compression": "gzip"} if gzip else {}
            nnz = int(indptr[-1])
            for name, spool, dtype in (("indices", gene_file, np.int32), ("data", count_file, np.float32)):
                stored = x.create_dataset(name, (nnz,), dtype, **how)
                spool.seek(0)
                for at in range(0, nnz, PIECE):
                    n = min(PIECE, nnz - at)
                    stored[at : at + n] = np.frombuffer(spool.read(2 * n), np.uint16)
    return nnz


def simulate(
    out: pathlib.Path, study: Study, *, gzip: bool = False, one_file: bool = False
) -> list[pathlib.Path]:
    """Writes the .h5ad files into ``out``, which is made if need be; returns their paths, in cell order."""
    out.mkdir(parents=True, exist_ok=True)
    codes = study.obs["dataset"].cat.codes.to_numpy()
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    names = [str(study.obs["dataset"].iloc[first]) for first in cuts[:-1]]
    if one_file:
        cuts, names = [0, len(codes)], ["all"]
    paths = [out / f"{name}.h5ad" for name in names]
    for path, first, last in zip(paths, cuts[:-1], cuts[1:], strict=True):
        nnz = write_h5ad(study, path, first, last, gzip)
        size = path.stat().st_size
        print(
            f"{path}: {last - first:,} cells, {nnz / (last - first):,.0f} expressed genes, "
            f"{size / (last - first):,.0f} bytes each",
            file=sys.stderr,
        )
    return paths


def virtual_corpus(corpus: pathlib.Path, out: pathlib.Path, cells: int) -> int:
    """A corpus of at least ``cells`` cells whose parts are links to those of ``corpus``, again and again.

    Data sets and their accounts are those of the real corpus. Returns the number of cells.

    Raises:
      FileExistsError: ``out`` is there.
    """
    from scjax.corpus import manifest as manifests

    corpus = corpus.resolve()
    _, real = manifests.read_manifest(corpus)
    out.mkdir(parents=True)
    for folder in ("parts", "index", "manifests"):
        (out / folder).mkdir()
    for name in [real["vocabulary"]["file"].split("/")[0], "index/measured"]:
        (out / name).symlink_to(corpus / name)
    parts: list[dict[str, Any]] = []
    total = 0
    while total < cells:
        part = real["parts"][len(parts) % len(real["parts"])]
        old, new = part["id"], f"{part['id']}-{len(parts):06d}"
        (out / "parts" / f"{new}.zarr").symlink_to(corpus / "parts" / f"{old}.zarr")
        (out / "index" / new).symlink_to(corpus / "index" / old)
        objects = {
            name.replace(f"parts/{old}.zarr/", f"parts/{new}.zarr/").replace(
                f"index/{old}/", f"index/{new}/"
            ): check
            for name, check in part["objects"].items()
        }
        parts.append({**part, "id": new, "objects": objects})
        total += part["n_cells"]
    times = total / real["totals"]["n_cells"]
    by_split = {
        split: sum(part["n_cells"] for part in parts if part["split"] == split)
        for split in ("train", "validation")
    }
    totals = {
        **real["totals"],
        "n_cells": total,
        **by_split,
        "nnz": sum(part["nnz"] for part in parts),
        "bytes": int(real["totals"]["bytes"] * times),
    }
    manifest_id, content = manifests.encode({**real, "totals": totals, "parts": parts})
    manifests.write_durably(out / "manifests" / f"{manifest_id}.json", content)
    manifests.commit(out, manifest_id)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=pathlib.Path, help="OUT; with --virtual: CORPUS OUT")
    parser.add_argument("--cells", type=int, default=300_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--datasets", type=int, default=30)
    parser.add_argument("--types", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gzip", action="store_true", help="compress the .h5ad files")
    parser.add_argument("--one-file", action="store_true", help="all data sets in one .h5ad file")
    parser.add_argument("--corpus", action="store_true", help="build OUT/corpus from the files")
    parser.add_argument("--virtual", type=int, metavar="CELLS", help="a corpus of links, at least this large")
    args = parser.parse_args()
    if len(args.paths) != (1 if args.virtual is None else 2):
        parser.error("one folder; with --virtual a corpus and a new folder")
    if args.virtual is not None:
        cells = virtual_corpus(args.paths[0], args.paths[1], args.virtual)
        print(json.dumps({"corpus": str(args.paths[1]), "cells": cells}))
        return
    out = args.paths[0]
    study = plan(args.cells, args.genes, min(args.datasets, args.cells), args.types, args.seed)
    files = simulate(out / "h5ad", study, gzip=args.gzip, one_file=args.one_file)
    print(json.dumps({"files": len(files), "cells": args.cells, "genes": args.genes, "seed": args.seed}))
    if args.corpus:
        from scjax.corpus import build_corpus

        print(build_corpus(files, out / "corpus"))


if __name__ == "__main__":
    main()

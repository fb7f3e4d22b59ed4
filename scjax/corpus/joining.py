"""Modalities that are kept apart, brought together: each a matrix of obsm beside the counts of the cells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

_WAYS = ("error", "nan", "drop")


def join_modalities(
    rna: Any, others: Mapping[str, ad.AnnData] | None = None, *, missing: str = "error", key: str = "rna"
) -> ad.AnnData:
    """Puts proteins, chromatin, ... beside the counts of the same cells, by the names of the cells.

    Args:
      rna: AnnData of counts; or a MuData, whose modality ``key`` it is, and all others the others.
      others: name -> AnnData whose X is to be ``obsm[name]``, a table of float32 with its var_names. Choose
        its features first: a table of all peaks of a genome fits no memory.
      missing: cells that not all have: an "error"; "nan" keeps the cells of ``rna``, with NaN where they are
        missing, and leaves out the others; "drop" keeps those that all have.

    Returns:
      A new AnnData with the counts, obs and var of ``rna``: what ``build_corpus(..., values=[name])`` takes.

    Raises:
      ValueError: cells that are not shared (how many, which, and whether an ending such as -1 is what tells
        them apart), names of cells that are not unique, numbers that X does not hold.
      KeyError: no modality of that name.
    """
    if missing not in _WAYS:
        raise ValueError(f"missing={missing!r}: there are {', '.join(_WAYS)}")
    if hasattr(rna, "mod"):
        others = {name: each for name, each in rna.mod.items() if name != key} | dict(others or {})
        if key not in rna.mod:
            raise KeyError(f"no modality {key!r} to be the counts; there are {list(rna.mod)}")
        rna = rna.mod[key]
    if not others:
        raise ValueError("no other modality to join; give others={name: AnnData}")
    shared = np.ones(rna.n_obs, bool)
    for name, other in {key: rna, **others}.items():
        if not other.obs_names.is_unique:
            twice = other.obs_names[other.obs_names.duplicated()][0]
            raise ValueError(f"modality {name!r}: the cell {twice!r} is there more than once")
        there = rna.obs_names.isin(other.obs_names)
        if missing == "error" and (not there.all() or other.n_obs > there.sum()):
            raise ValueError(_apart(name, key, rna.obs_names, other.obs_names))
        shared &= there
        if not there.any():
            raise ValueError(_apart(name, key, rna.obs_names, other.obs_names))
    if missing == "drop":
        if not shared.any():
            raise ValueError(f"no cell is in all modalities ({key}, {', '.join(others)})")
        rna = rna[shared]
    joined = rna.copy()
    for name, other in others.items():
        joined.obsm[name] = _table(name, other, joined.obs_names)
    return joined


def _table(name: str, other: ad.AnnData, cells: pd.Index) -> pd.DataFrame:
    """float32, one row for each of ``cells``; NaN where ``other`` does not have it."""
    at = other.obs_names.get_indexer(cells)
    rows = other.X[at[at >= 0]]
    try:
        found = np.asarray(rows.toarray() if sparse.issparse(rows) else rows, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"modality {name!r}: X holds no numbers ({error})") from error
    values = np.full((len(cells), other.n_vars), np.nan, np.float32)
    values[at >= 0] = found
    return pd.DataFrame(values, index=cells, columns=other.var_names)


def _apart(name: str, key: str, cells: pd.Index, others: pd.Index) -> str:
    """What cells two modalities do not share, and why that may be."""
    alone = [(key, cells.difference(others, sort=False)), (name, others.difference(cells, sort=False))]
    told = [
        f"{len(names):,} cells are in {where!r} alone ({', '.join(map(str, names[:3]))}"
        f"{', ...' if len(names) > 3 else ''})"
        for where, names in alone
        if len(names)
    ]
    bare = [{re.sub(r"[-_.]\w{1,3}$", "", str(cell)) for cell in index} for index in (cells, others)]
    n_shared = len(cells) - len(alone[0][1])
    ending = len(bare[0] & bare[1]) > n_shared
    return (
        f"modalities {key!r} and {name!r} do not share all cells: {n_shared:,} have both, "
        f"{' and '.join(told)}; "
        + ("the names differ in their endings (such as -1): make them alike; " if ending else "")
        + 'missing="drop" keeps the cells that all have, missing="nan" all of the first'
    )

"""Which source a path is, and all sources of files, folders and globs."""

from __future__ import annotations

import glob
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import anndata as ad
import h5py

from scjax.corpus.sources.base import Source
from scjax.corpus.sources.h5ad import H5adSource
from scjax.corpus.sources.memory import MemorySource
from scjax.corpus.sources.mtx import MtxSource, files_of_matrix, matrices_in, mtx_name
from scjax.corpus.sources.tenx import TenxSource, is_tenx
from scjax.corpus.sources.zarrs import ZarrSource, is_store

RECOGNISED = (
    "an .h5ad file, an AnnData zarr store, a 10x .h5 file, a folder with matrix.mtx[.gz], barcodes.tsv[.gz] "
    "and features.tsv[.gz] or genes.tsv[.gz], or an AnnData"
)
# The matrix of one sample, which Cell Ranger (with a prefix, too) and STARsolo lay out several times over.
_LAYOUT = re.compile(r"(?P<sample>.*?)(raw|filtered)_(feature|gene)_bc_matri(x|ces)(_h5)?(\.h5)?")
_STARSOLO = {"raw", "filtered"}


def open_source(data: Any, *, name: str | None = None, layer: str | None = None) -> Source:
    """Opens one study, whatever it is kept in.

    Args:
      data: path of an .h5ad file (CSR, CSC or dense), of an AnnData zarr store (version 2 or 3), of a 10x
        .h5 file (Cell Ranger 2 or later), of a 10x folder or its matrix.mtx[.gz], or of a folder that holds
        exactly one of these; or an AnnData.
      name: data set name; default: the file's stem, "adata" in memory.
      layer: where the counts are: None or "X", "raw", or the name of a layer.

    Raises:
      FileNotFoundError, OSError, ValueError, KeyError: no such file, not one of these, damaged or truncated,
        no such matrix (those there are are listed).
    """
    if isinstance(data, ad.AnnData):
        return MemorySource(data, name or default_name(data), layer or "X")
    if not isinstance(data, str | os.PathLike):
        raise ValueError(f"a source is a path or an AnnData, not {type(data).__name__}")
    path = pathlib.Path(data)
    layer = layer or "X"
    if path.is_dir():
        found = [path] if is_store(path) else list(_below(path))
        if len(found) != 1:
            raise (
                _nothing(path)
                if not found
                else ValueError(
                    f"{path}: holds {len(found)} sources, not one: {', '.join(map(str, found[:5]))}"
                )
            )
        if is_store(found[0]):
            return ZarrSource(found[0], name or default_name(path), layer)
        if found[0] != path:
            return open_source(found[0], name=name or default_name(path), layer=layer)
        return MtxSource(path, name or default_name(path), layer)
    if path.name.endswith((".mtx", ".mtx.gz")):
        return MtxSource(path, name or default_name(path), layer)
    if path.exists() and not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file; a source is {RECOGNISED}")
    if is_tenx(path):
        return TenxSource(path, name or default_name(path), layer)
    return H5adSource(path, name or default_name(path), layer)


def files_of(data: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files that a source is read from, found without opening it. FileNotFoundError if one is missing."""
    path = pathlib.Path(data)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return files_of_matrix(path) if path.name.endswith((".mtx", ".mtx.gz")) else [path]


def default_name(data: Any) -> str:
    """The name of a data set that was given none: what the path calls it, without suffixes."""
    if not isinstance(data, str | os.PathLike):
        return "adata"
    path = pathlib.Path(os.path.abspath(data))
    if path.name.endswith((".mtx", ".mtx.gz")):
        return mtx_name(path)
    return path.stem if path.suffix in (".h5ad", ".h5", ".hdf5", ".zarr") or path.is_file() else path.name


def list_sources(items: Any) -> dict[str, Any]:
    """Every source that files, folders, globs and AnnData objects stand for.

    Args:
      items: one or a list of: path of a source, folder (every source below it, sorted; hidden names and
        what is no source are left aside), glob ("data/**/*.h5ad"), AnnData.

    Returns:
      Unique name -> what ``open_source`` takes, in the order given. A name is the file's stem; where stems
      are alike, the path from the folder that they have in common, without its suffix if that still tells
      them apart. Several AnnData objects are adata0, adata1, ... by their place in the list.

    Raises:
      FileNotFoundError: nothing is there, or no file matches a glob.
      ValueError: a folder holds no source, or Cell Ranger's matrix in several layouts or both raw and
        filtered; one source is named twice; no items.
    """
    single = isinstance(items, str | os.PathLike | ad.AnnData)
    given = [items] if single else list(items)
    if not given:
        raise ValueError("no sources to build a corpus from")
    found: list[Any] = []
    for item in given:
        found += [item] if isinstance(item, ad.AnnData) else _expand(item)
    seen = Counter(os.path.realpath(item) for item in found if not isinstance(item, ad.AnnData))
    twice = [path for path, times in seen.items() if times > 1]
    if twice:
        raise ValueError(f"named twice among the sources, so its cells would be there twice: {twice[0]}")
    return dict(zip(_names(found), found, strict=True))


def _expand(item: Any) -> list[pathlib.Path]:
    if not isinstance(item, str | os.PathLike):
        raise ValueError(f"a source is a path or an AnnData, not {type(item).__name__}")
    path = pathlib.Path(item)
    if not path.exists() and glob.has_magic(os.fspath(item)):
        matches = sorted(pathlib.Path(match) for match in glob.glob(os.fspath(item), recursive=True))
        if not matches:
            raise FileNotFoundError(f"{item}: nothing matches")
        return [source for match in matches for source in _expand(match)]
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    if is_store(path):
        return [path]
    found = list(_below(path))
    if not found:
        raise _nothing(path)
    return found


def _nothing(folder: pathlib.Path) -> ValueError:
    names = sorted(os.listdir(folder))
    holds = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ValueError(
        f"{folder}: no source in this folder (holds: {holds or 'nothing'}); a source is {RECOGNISED}"
    )


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The sources in a folder and below, sorted by path."""
    if (folder / "HEAD").is_file() and (folder / "manifests").is_dir():
        raise ValueError(f"{folder}: is a corpus, not a source; append to it, or mix corpora when loading")
    layouts = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        found = _LAYOUT.fullmatch(name)
        if found or name in _STARSOLO:
            layouts[found["sample"] if found else ""].append(name)
    for same in layouts.values():
        if len(same) > 1:
            raise ValueError(
                f"{folder}: holds the same cells several times ({', '.join(same)}); name the one that is "
                f"meant, or a glob such as '**/{same[0]}'"
            )
    matrices = matrices_in(folder)
    if len(matrices) == 1 and mtx_name(matrices[0]) == mtx_name(folder / "matrix.mtx"):
        yield folder
        matrices = []
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    for entry in sorted(inside, key=lambda path: path.as_posix()):
        if entry in matrices or entry.suffix == ".h5ad":
            yield entry
        elif entry.is_dir():
            if is_store(entry):
                yield entry
            else:
                yield from _below(entry)
        elif entry.suffix in (".h5", ".hdf5") and h5py.is_hdf5(entry) and is_tenx(entry):
            yield entry


def _names(items: Iterable[Any]) -> list[str]:
    items = list(items)
    names = [default_name(item) for item in items]
    several = sum(isinstance(item, ad.AnnData) for item in items) > 1
    names = [
        f"adata{i}" if several and isinstance(item, ad.AnnData) else name
        for i, (item, name) in enumerate(zip(items, names, strict=True))
    ]
    alike = defaultdict(list)
    for i, name in enumerate(names):
        alike[name].append(i)
    for same in alike.values():
        paths = [i for i in same if not isinstance(items[i], ad.AnnData)]
        if len(same) > 1 and len(paths) > 1:
            whole = [pathlib.Path(os.path.abspath(items[i])) for i in paths]
            root = os.path.commonpath([path.parent for path in whole])
            relative = [path.relative_to(root) for path in whole]
            short = [
                (path.parent / default_name(p)).as_posix() for path, p in zip(relative, whole, strict=True)
            ]
            unique = len(set(short)) == len(short)
            for i, name, path in zip(paths, short, relative, strict=True):
                names[i] = name if unique else path.as_posix()
    left = [name for name, times in Counter(names).items() if times > 1]
    if left:
        raise ValueError(f"several sources are called {', '.join(left)}: give each its own with names=")
    return names

"""What several commands have in common: consoles, reading cells, files that are whole or not there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

out, err = Console(), Console(stderr=True)


def escape(text: str) -> str:
    """Text for rich, with brackets that are only brackets."""
    return text.replace("[", r"\[")


def read(path: str) -> Any:
    """An AnnData; errors name the file."""
    import anndata
    import h5py

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file; an .h5ad file is needed")
    try:
        return anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, truncated or not an AnnData file ({error})") from error


def refuse_existing(path: str, force: bool) -> None:
    """An output that is there is replaced only when asked."""
    if os.path.exists(path) and not force:
        raise ValueError(f"{path} exists; name another --out or add --force to replace it")


def write_whole(write: Callable[[Path], Any], path: str) -> None:
    """Writes to a neighbour and renames, so that ``path`` is the whole file or is not there."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def add_reading(command: argparse.ArgumentParser) -> None:
    """Options of commands that read counts."""
    command.add_argument("--layer", metavar="NAME", help="layer with the raw counts (default: X)")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--force", action="store_true", help="replace what is there")

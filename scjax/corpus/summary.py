"""What a corpus holds and how it came to be, as tables for people."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table
import rich.text

from scjax.corpus.manifest import read_manifest
from scjax.corpus.progress import counted

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus

ROWS = 100  # of a table, at most
STATES = 10  # of the history, at most
MIB = 2**20


def summarise(corpus: Corpus) -> rich.console.Group:
    """See ``Corpus.info``."""
    tables = [_datasets(corpus), _labels(corpus)]
    if corpus.panels:
        tables.append(_values(corpus))
    history = _history(corpus)
    if history.row_count > 1:
        tables.append(history)
    return rich.console.Group(rich.text.Text("\n".join(_lines(corpus))), *tables)


def _lines(corpus: Corpus) -> list[str]:
    manifest = corpus.manifest
    totals, quantiles, n = manifest["totals"], manifest["nnz_quantiles"], len(corpus)
    split = f"{totals['train']:,} train, {totals['validation']:,} validation"
    by = manifest["options"].get("split_by")
    order = "shuffled" if manifest.get("shuffled", True) else "in the order of their sources"
    size = f"{totals['bytes'] / MIB:,.1f} MiB, {totals['bytes'] / n:,.0f} bytes per cell"
    size += f" (codec {manifest['codec']})"
    cells, bytes_ = _source_sizes(corpus)
    if cells:
        size += f"; the files of the sources: {bytes_ / MIB:,.1f} MiB, {bytes_ / cells:,.0f} bytes per cell"
        if cells < sum(entry["n_cells_in"] for entry in manifest["datasets"]):
            size += " (of those that are still there)"
    return [
        f"{corpus.path}  (manifest {corpus.manifest_id}, scjax {manifest['scjax']})",
        f"{n:,} cells ({split}{f', split by {by}' if by else ''}) in {counted(len(corpus.parts), 'part')}",
        f"the cells are {order} (seed {manifest['seed']})",
        f"{manifest['vocabulary']['n_genes']:,} genes (vocabulary {manifest['vocabulary']['hash'][:12]})",
        f"expressed genes per cell: median {quantiles['0.5']:,}, 99% {quantiles['0.99']:,}, "
        f"most {quantiles['1.0']:,}",
        size,
    ]


def _source_sizes(corpus: Corpus) -> tuple[int, int]:
    """(cells, bytes) of the source files that are still where they were when the corpus was built."""
    if not isinstance(corpus.path, pathlib.Path):
        return 0, 0
    sizes: dict[str, int] = {}
    for note in sorted((corpus.path / "sources").glob("*.json")):
        try:
            for source in json.loads(note.read_bytes())["sources"]:
                if source["path"] and os.path.isfile(source["path"]):
                    sizes[source["name"]] = os.path.getsize(source["path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the note is for information only
    there = [entry for entry in corpus.manifest["datasets"] if entry["name"] in sizes]
    return sum(entry["n_cells_in"] for entry in there), sum(sizes[entry["name"]] for entry in there)


def _table(title: str, *headings: str, numbers: tuple[str, ...] = ()) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return table


def _datasets(corpus: Corpus) -> rich.table.Table:
    entries = corpus.manifest["datasets"]
    table = _table(
        "data sets",
        *("name", "species", "cells", "dropped", "genes matched", "layer"),
        numbers=("cells", "genes matched"),
    )
    for entry in entries[:ROWS]:
        table.add_row(
            entry["name"],
            ", ".join(filter(None, entry["species"])),
            f"{entry['n_cells']:,}",
            _dropped(entry["dropped"]),
            f"{entry['genes_matched']:,} of {entry['genes_total']:,}",
            entry["layer"],
        )
    if len(entries) > ROWS:
        rest = entries[ROWS:]
        dropped: dict[str, int] = {}
        for entry in rest:
            for why, n in entry["dropped"].items():
                dropped[why] = dropped.get(why, 0) + n
        cells = f"{sum(entry['n_cells'] for entry in rest):,}"
        table.add_row(f"and {len(rest):,} more", "", cells, _dropped(dropped), "", "")
    return table


def _dropped(account: dict[str, int]) -> str:
    """Cells left out, by reason."""
    return ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in account.items() if n) or "0"


def _labels(corpus: Corpus) -> rich.table.Table:
    table = _table("labels", "label", "values", "for example", numbers=("values",))
    for column, categories in corpus.columns.items():
        shown = ", ".join(categories[:5]) + (", ..." if len(categories) > 5 else "")
        table.add_row(column, f"{len(categories):,}", shown)
    return table


def _values(corpus: Corpus) -> rich.table.Table:
    table = _table(
        "values", "value", "features", "for example", "data sets", numbers=("features", "data sets")
    )
    for name, panel in corpus.panels.items():
        shown = "a column of obs" if panel.column else None if panel.named else "without names"
        shown = shown or ", ".join(panel.features[:5]) + (", ..." if len(panel.features) > 5 else "")
        having = sum(name in entry.get("values", ()) for entry in corpus.manifest["datasets"])
        table.add_row(name, f"{len(panel.features):,}", shown, f"{having:,} of {len(corpus.datasets):,}")
    return table


def _history(corpus: Corpus) -> rich.table.Table:
    """The state that is open and those it came from, as far as they are still there."""
    numbers = ("cells", "parts", "data sets")
    table = _table("history", "manifest", "from", *numbers, "scjax", numbers=numbers)
    manifest_id: str | None = corpus.manifest_id
    manifest: dict[str, Any] = corpus.manifest
    while manifest_id is not None and table.row_count < STATES:
        parent = manifest["parent"]
        table.add_row(
            manifest_id,
            parent or "",
            f"{manifest['totals']['n_cells']:,}",
            f"{len(manifest['parts']):,}",
            f"{len(manifest['datasets']):,}",
            manifest["scjax"],
        )
        manifest_id = parent
        if parent is not None:
            try:
                manifest = read_manifest(_root(corpus), parent)[1]
            except (OSError, ValueError) as error:
                gone = "removed" if isinstance(error, FileNotFoundError) else "cannot be read"
                table.add_row(parent, gone, "", "", "", "")
                break
    return table


def _root(corpus: Corpus) -> Any:
    return corpus.path if isinstance(corpus.path, pathlib.Path) else corpus.store

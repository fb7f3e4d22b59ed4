"""What a corpus holds, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich.console
import rich.table
import rich.text

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus


def summarise(corpus: Corpus) -> rich.console.Group:
    """See ``Corpus.info``."""
    manifest = corpus.manifest
    totals, quantiles, n = manifest["totals"], manifest["nnz_quantiles"], len(corpus)
    split = f"{totals['train']:,} train, {totals['validation']:,} validation"
    lines = [
        f"{corpus.path}  (manifest {corpus.manifest_id}, scjax {manifest['scjax']})",
        f"{n:,} cells ({split}) in {len(corpus.parts):,} parts, seed {manifest['seed']}",
        f"{manifest['vocabulary']['n_genes']:,} genes (vocabulary {manifest['vocabulary']['hash'][:12]})",
        f"expressed genes per cell: median {quantiles['0.5']:,}, 99% {quantiles['0.99']:,}, "
        f"most {quantiles['1.0']:,}",
        f"{totals['bytes'] / 2**20:,.1f} MiB, {totals['bytes'] / n:,.0f} bytes per cell "
        f"(codec {manifest['codec']})",
    ]
    sets = rich.table.Table(title="data sets", title_justify="left")
    for heading in ("name", "species", "cells", "dropped", "genes matched", "layer"):
        number = heading in ("cells", "dropped", "genes matched")
        sets.add_column(heading, justify="right" if number else "left", overflow="fold")
    for entry in manifest["datasets"]:
        sets.add_row(
            entry["name"],
            ", ".join(filter(None, entry["species"])),
            f"{entry['n_cells']:,}",
            f"{sum(entry['dropped'].values()):,}",
            f"{entry['genes_matched']:,} of {entry['genes_total']:,}",
            entry["layer"],
        )
    labels = rich.table.Table("label", "values", "for example", title="labels", title_justify="left")
    for column, categories in corpus.columns.items():
        shown = ", ".join(categories[:5]) + (", ..." if len(categories) > 5 else "")
        labels.add_row(column, f"{len(categories):,}", shown)
    return rich.console.Group(rich.text.Text("\n".join(lines)), sets, labels)

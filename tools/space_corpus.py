"""Sections with coordinates -> a corpus whose cells know what their neighbours express and where they lie.

    python tools/space_corpus.py SECTIONS.h5ad --section-key section --out runs/space/corpus
    python tools/space_corpus.py --out runs/space/corpus      (a planted field, for configs/space.py:smoke)

One file holds all sections: raw counts, coordinates in obsm. Whole sections become validation cells; the
components that describe neighbours are fitted on all of them, by no label. ``configs/space.py`` trains on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad

from scjax import build_corpus
from scjax.datasets.space import centred_coordinates, neighbour_features, planted_sections


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", type=Path, nargs="?", help="h5ad; a planted field if left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--section-key", default="section")
    parser.add_argument("--spatial-key", default="spatial")
    parser.add_argument("-k", type=int, default=8, help="neighbours of a cell")
    parser.add_argument("--components", type=int, default=8, help="numbers a neighbour is described by")
    parser.add_argument("--validation", type=float, default=0.25)
    args = parser.parse_args(argv)
    adata = ad.read_h5ad(args.sections) if args.sections else planted_sections()
    keys = {"spatial_key": args.spatial_key, "section_key": args.section_key}
    neighbour_features(adata, args.k, args.components, **keys)
    centred_coordinates(adata, **keys)
    build_corpus(
        [adata],
        args.out,
        names=[args.sections.stem if args.sections else "planted"],
        values=["neighbours", "coordinates"],
        validation=args.validation,
        split_by=args.section_key,
    )


if __name__ == "__main__":
    main()

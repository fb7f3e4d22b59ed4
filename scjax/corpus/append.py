"""Adding studies to a corpus: new parts and a new manifest; the old one and its readers stay as they are."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scjax.corpus.commit import finished
from scjax.corpus.corpus import Corpus
from scjax.corpus.engine import Request, carry_out
from scjax.corpus.format import Layout
from scjax.corpus.manifest import read_manifest
from scjax.corpus.plan import Base, Options, list_studies, named_tables, pairs
from scjax.corpus.store import local_folder


def append_corpus(
    path: str | pathlib.Path,
    sources: Any,
    *,
    layer: str | Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    orthologs: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    names: Sequence[str] | None = None,
    validation: float | None = None,
    seed: int | None = None,
    min_genes: int | None = None,
    min_counts: float | None = None,
    drop_duplicates: bool | None = None,
    shuffle: bool | None = None,
    min_match: float | None = None,
    allow_non_integer: bool | None = None,
    duplicates: str | None = None,
    unknown: Sequence[str] | None = None,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> Corpus:
    """Adds studies to a corpus.

    Vocabulary, codec and sizes of the corpus stay; counts of other genes are left out. Old cells keep their
    row numbers, old labels their codes: new categories come after the old ones, and labels that are new to
    the corpus are -1 in its old cells. Values and their features stay those that the corpus was built with:
    other features are left out and counted, and what a study lacks is NaN. With ``split_by``, groups that the
    corpus knows stay in their split.
    Until the very end readers see the old state; a killed append is invisible, and the same call goes on
    where it was stopped.

    Args:
      path: folder of the corpus.
      sources, layer, names: as in ``build_corpus``; names must be new to the corpus.
      labels, columns, validation, seed, min_genes, min_counts, drop_duplicates, shuffle, min_match,
        allow_non_integer, duplicates, unknown: as in ``build_corpus``; None: as the corpus was built.
        Duplicates are looked for among the old cells, too.
      orthologs: as in ``build_corpus``, of the new studies; a table of the build is not used again.
      workers, task, dask, progress: as in ``build_corpus``.

    Returns:
      The corpus in its new state; None with ``task`` while other shares have work left.

    Raises:
      FileNotFoundError: there is no corpus.
      FileExistsError: somebody else is writing there, or has changed the corpus meanwhile.
      ValueError: a name is in the corpus already, few genes match its vocabulary, or ``drop_duplicates`` is
        asked of a corpus that was built without.
      And what ``build_corpus`` raises.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    arguments = {
        name: value
        for name, value in given.items()
        if name not in ("path", "sources", "orthologs", "workers", "task", "dask", "progress")
    }
    root = local_folder(path)
    studies = list_studies(sources, names, layer)

    def request(base_id: str, base: dict[str, Any]) -> Request:
        options = _options(base, given)
        layout = Layout(base["codec"], base["part_cells"], base["inner"], base["shard"])
        vocabulary = Corpus.open(root, base_id).vocabulary
        return Request(
            root,
            studies,
            vocabulary,
            options,
            layout,
            _base(base_id, base),
            arguments,
            workers,
            task,
            dask,
            progress,
        )

    head, content = read_manifest(root)
    if content["parent"] is not None and (root / "manifests" / f"{content['parent']}.json").is_file():
        before = request(*read_manifest(root, content["parent"]))
        if before.is_done():  # by another share, or by this call when it was killed right after its commit
            before.tidy()
            return Corpus.open(root, finished(root, before.key))
    wanted = request(head, content)
    known = [study.name for study in studies if study.name in content["columns"]["dataset"]]
    if known:
        raise ValueError(
            f"{root}: holds data sets called {', '.join(known[:5])} already; give the new ones other names "
            "(names=) if they are other cells"
        )
    if wanted.options.drop_duplicates:
        _check_hashes(root, content)
    manifest_id = carry_out(wanted)
    # None for a share of the work only, see build_corpus.
    return None if manifest_id is None else Corpus.open(root, manifest_id)  # type: ignore[return-value]


def _options(base: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """The options of this append: what was given, else what the corpus was built with."""
    # "shuffled" is of all cells, and false after one append without; that is not how the corpus was built
    held = {"values": (), "shuffle": base["shuffled"], **base["options"], "seed": base["seed"]}
    held |= {name: given[name] for name in held if name in given}
    held["columns"] = pairs(held["columns"])
    held["orthologs"] = named_tables(given.get("orthologs"))
    for name in ("labels", "unknown", "values"):
        values = held[name]
        held[name] = values if values is None else (values,) if isinstance(values, str) else tuple(values)
    if not held["validation"]:
        held["split_by"] = None
    return Options(**held)


def _base(manifest_id: str, manifest: Mapping[str, Any]) -> Base:
    columns = {name: values for name, values in manifest["columns"].items() if name != "dataset"}
    totals = manifest["totals"]
    return Base(
        manifest_id,
        tuple(manifest["columns"]["dataset"]),
        columns,
        manifest.get("split_groups", {"train": [], "validation": []}),
        (totals["train"], totals["validation"]),
        manifest.get("values", {}),
    )


def _check_hashes(root: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """ValueError where old cells have no content hash to compare with."""
    for part in manifest["parts"]:
        if f"index/{part['id']}/content.npy" not in part["objects"]:
            raise ValueError(
                f"{root}: drop_duplicates needs the hashes of the old cells, and part {part['id']} was built "
                "without; build the corpus again with drop_duplicates, or append without"
            )

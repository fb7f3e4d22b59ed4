"""Several corpora as one: for training on data that was built at different times, places or species.

A mixture holds nothing of its own. Rows are numbered corpus after corpus, label columns and their categories
are those of all, genes those of one vocabulary, and a column "corpus" says where a cell is from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.corpus import Corpus, Part, as_obsm, row_numbers
from scjax.corpus.manifest import digest
from scjax.corpus.panels import Panel, unite
from scjax.genes import Vocabulary

if TYPE_CHECKING:
    from scjax.corpus.statistics import GeneStatistics

COLUMN = "corpus"


@dataclasses.dataclass(frozen=True)
class MemberPart(Part):
    """A part of one of the corpora of a mixture. The row numbers are those of the mixture.

    Attributes:
      code_maps: label -> int32 [categories + 1], from the codes that are stored to those of
        ``Mixture.columns``; the last entry is that of -1.
      vocabulary: the genes as stored.
      origin: where its corpus is, for messages.
    """

    code_maps: Mapping[str, np.ndarray] = dataclasses.field(repr=False, compare=False)
    vocabulary: Vocabulary = dataclasses.field(repr=False, compare=False)
    origin: str

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """As ``Part.column``, label codes by the categories of the mixture."""
        if not name.startswith("codes/"):
            return super().column(name, first, last)
        label = name.removeprefix("codes/")
        if label not in self.code_maps:
            raise KeyError(f"no label column {label!r}; there are: {', '.join(sorted(self.code_maps))}")
        stored = self.arrays.read(name, first, self.n_cells if last is None else last)
        return self.code_maps[label][stored]


class Mixture:
    """Corpora side by side, for the loader, for training and for ``read``.

    Attributes:
      members: the corpora by name, in order.
      shares: name -> share of the draws of a training epoch; None: as many as there are cells.
      path: names the members in messages.
      manifest_id: 12 hex digits of the members' manifests, their names, the shares and the genes.
      parts: of all members, rows numbered one corpus after the other.
      columns: label columns and their categories, over all members; "corpus" is among them.
      datasets: names of the data sets of all members; where two are called alike, with their corpus's name.
      panels: their values, united by the names of their features; NaN where a member has none.
      apart: values that do not unite, name -> why.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus] | Mapping[str, Corpus],
        shares: Mapping[str, float] | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        """Args:
          corpora: two or more; by name, or else they are called after their folders.
          shares: name -> share of what is drawn for training, relative to each other. All corpora that are
            named come in these proportions, whatever their sizes; those that are not do not come.
          vocabulary: the genes of the mixture. By default that of the corpora where it is the same in all,
            and the union of theirs, matched by id, symbol and alias, where it is not.

        Raises:
          ValueError: no corpus, names that are not unique, a share that is not one, a label column "corpus",
            or genes that are ambiguous between the vocabularies.
          KeyError: a share for a corpus that is not there.
        """
        if not isinstance(corpora, Mapping):
            named = _names([str(corpus.path) for corpus in corpora])
            corpora = dict(zip(named, corpora, strict=True))
        if not corpora:
            raise ValueError("a mixture of no corpora")
        self.members: dict[str, Corpus] = dict(corpora)
        for name, corpus in self.members.items():
            if COLUMN in corpus.columns:
                raise ValueError(
                    f"{corpus.path} (called {name!r}) has a label column {COLUMN!r}; in a mixture that is "
                    "the column that says which corpus a cell is of"
                )
        self.shares = None if shares is None else _check_shares(shares, self.members)
        self.vocabulary = _vocabulary(self.members) if vocabulary is None else vocabulary
        self.path = " + ".join(str(corpus.path) for corpus in self.members.values())

        self._dataset_names = {name: list(corpus.datasets) for name, corpus in self.members.items()}
        every = [dataset for names in self._dataset_names.values() for dataset in names]
        for name, names in self._dataset_names.items():
            self._dataset_names[name] = [f"{name}/{d}" if every.count(d) > 1 else d for d in names]
        self.datasets = [dataset for names in self._dataset_names.values() for dataset in names]
        self.columns: dict[str, list[str]] = {COLUMN: list(self.members), "dataset": self.datasets}
        for corpus in self.members.values():
            for column, categories in corpus.columns.items():
                if column != "dataset":
                    known = self.columns.setdefault(column, [])
                    seen = set(known)
                    known += [category for category in categories if category not in seen]

        self.panels: dict[str, Panel] = {}
        self.apart: dict[str, str] = {}
        for value in dict.fromkeys(value for corpus in self.members.values() for value in corpus.panels):
            having = [(c.path, c.panels[value]) for c in self.members.values() if value in c.panels]
            try:
                self.panels[value] = unite(value, having)
            except ValueError as error:
                self.apart[value] = str(error)

        self.parts: tuple[MemberPart, ...] = ()
        self._starts: dict[str, int] = {}
        first = 0
        for name, corpus in self.members.items():
            self._starts[name] = first
            maps = self._code_maps(name, corpus)
            for part in corpus.parts:
                fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(Part)}
                fields["first_row"], fields["panels"] = first + part.first_row, self.panels
                self.parts += (
                    MemberPart(
                        **fields, code_maps=maps, vocabulary=corpus.vocabulary, origin=str(corpus.path)
                    ),
                )
            first += len(corpus)
        self._len = first

        ids = {name: corpus.manifest_id for name, corpus in self.members.items()}
        self.manifest_id = digest(
            {"members": list(ids.items()), "shares": self.shares, "vocabulary": self.vocabulary.hash}
        )
        self.manifest: dict[str, Any] = {
            "members": ids,
            "shares": self.shares,
            "shuffled": all(corpus.manifest.get("shuffled", True) for corpus in self.members.values()),
            "vocabulary": {"hash": self.vocabulary.hash, "n_genes": len(self.vocabulary)},
            "columns": self.columns,
            "datasets": [
                {**entry, "name": dataset}
                for name, corpus in self.members.items()
                for entry, dataset in zip(corpus.manifest["datasets"], self._dataset_names[name], strict=True)
            ],
        }

    @property
    def values(self) -> dict[str, list[str]]:
        """As ``Corpus.values``, of all members."""
        return {name: list(panel.features) for name, panel in self.panels.items()}

    def _code_maps(self, name: str, corpus: Corpus) -> dict[str, np.ndarray]:
        maps = {}
        for column, categories in self.columns.items():
            number = {category: code for code, category in enumerate(categories)}
            there = self._dataset_names[name] if column == "dataset" else corpus.columns.get(column, [])
            unknown = number[name] if column == COLUMN else -1
            maps[column] = np.array([*(number[category] for category in there), unknown], np.int32)
        return maps

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        return (
            f"Mixture({', '.join(self.members)}: {len(self):,} cells, {len(self.vocabulary):,} genes, "
            f"{len(self.parts)} parts, {self.manifest_id})"
        )

    @property
    def obs(self) -> pd.DataFrame:
        """Label columns of all cells as categoricals; the index is the row number."""
        table = {}
        for column, categories in self.columns.items():
            codes = np.concatenate([part.codes(column) for part in self.parts])
            table[column] = pd.Categorical.from_codes(codes, categories=categories)
        return pd.DataFrame(table)

    def split(self, name: str) -> tuple[MemberPart, ...]:
        """The parts of "train" or "validation"."""
        if name not in ("train", "validation"):
            raise ValueError(f"split {name!r}: there are train and validation")
        return tuple(part for part in self.parts if part.split == name)

    def measured(self, dataset: str | int) -> np.ndarray:
        """bool [n_genes], genes of the mixture that a data set measured."""
        if isinstance(dataset, str):
            if dataset not in self.datasets:
                raise KeyError(f"no data set {dataset!r}; there are: {', '.join(self.datasets)}")
            dataset = self.datasets.index(dataset)
        for name, corpus in self.members.items():
            if dataset < len(corpus.datasets):
                out = np.zeros(len(self.vocabulary), bool)
                genes = self._genes(name)
                out[genes[(genes >= 0) & corpus.measured(dataset)]] = True
                return out
            dataset -= len(corpus.datasets)
        raise IndexError(f"no data set of that number; there are {len(self.datasets)}")

    def measured_table(self) -> np.ndarray:
        """bool [n_datasets, n_genes], ``measured`` of every data set."""
        return np.stack([self.measured(i) for i in range(len(self.datasets))])

    def _genes(self, name: str) -> np.ndarray:
        """int32 [genes of a member]: what each is in the mixture, -1 where it is not."""
        if name not in self._gene_maps:
            there = self.members[name].vocabulary
            table = pd.DataFrame({"gene_symbol": there.symbols}, index=there.ids)
            same = there.hash == self.vocabulary.hash
            self._gene_maps[name] = (
                np.arange(len(there), dtype=np.int32) if same else self.vocabulary.match(table).ids
            )
        return self._gene_maps[name]

    @functools.cached_property
    def _gene_maps(self) -> dict[str, np.ndarray]:
        return {}

    def read(self, rows: Any) -> ad.AnnData:
        """Reads cells by row number, as ``Corpus.read``; "corpus" is among the columns of obs, and a cell's
        name begins with that of its corpus.

        Raises:
          IndexError: a row outside 0 .. len - 1.
        """
        rows = row_numbers(rows, len(self), "mixture")
        pieces: list[tuple[sparse.csr_matrix, ad.AnnData]] = []
        at: list[np.ndarray] = []
        for name, corpus in self.members.items():
            start = self._starts[name]
            mine = np.flatnonzero((rows >= start) & (rows < start + len(corpus)))
            if not len(mine) and (pieces or name != list(self.members)[-1]):
                continue
            piece = corpus.read(rows[mine] - start)
            genes = self._genes(name)
            place = sparse.csr_matrix(
                (np.ones((genes >= 0).sum(), piece.X.dtype), (np.flatnonzero(genes >= 0), genes[genes >= 0])),
                shape=(len(genes), len(self.vocabulary)),
            )
            piece.obs[COLUMN] = name
            piece.obs_names = [f"{name}/{cell}" for cell in piece.obs_names]
            pieces.append((sparse.csr_matrix(piece.X) @ place, piece))
            at.append(mine)
        order = np.argsort(np.concatenate(at), kind="stable")
        x = sparse.vstack([x for x, _ in pieces], format="csr")[order]
        x.sort_indices()
        obs = pd.concat([piece.obs for _, piece in pieces]).iloc[order]
        obsm = {
            name: np.concatenate([_matrix(piece, name, panel) for _, piece in pieces])[order]
            for name, panel in self.panels.items()
            if not panel.column
        }
        fields = {f: list(getattr(self.vocabulary, f)) for f in ("symbol", "species", "biotype")}
        var = pd.DataFrame(fields, index=self.vocabulary.ids)
        return ad.AnnData(x, obs=obs, var=var, obsm=as_obsm(obsm, self.panels, obs.index))

    def statistics(self, progress: bool = True) -> GeneStatistics:
        """Statistics of the members put together, each cell with the same weight whatever the shares.

        Counts, means and detection are those of all training cells. The median of a gene that several
        members express is the mean of theirs in the logarithm, by cells that express it: close to, but not,
        the median of all.
        """
        from scjax.corpus.statistics import GeneStatistics

        n = len(self.vocabulary)
        cells, detected = np.zeros(n, np.int64), np.zeros(n, np.int64)
        sums, logs = np.zeros(n), np.zeros(n)
        for name, corpus in self.members.items():
            found, genes = corpus.statistics(progress=progress), self._genes(name)
            mine, to = genes >= 0, genes[genes >= 0]
            cells[to] += found.n_cells[mine]
            detected[to] += found.n_detected[mine]
            sums[to] += np.where(found.n_cells > 0, found.mean * found.n_cells, 0)[mine]
            there = found.n_detected > 0
            log = np.log(found.median, out=np.zeros(len(there)), where=there)
            logs[to] += (log * found.n_detected)[mine]
        mean = np.divide(sums, cells, out=np.full(n, np.nan), where=cells > 0)
        log = np.divide(logs, detected, out=np.full(n, np.nan), where=detected > 0)
        return GeneStatistics(cells, detected, mean, np.exp(log))


def _matrix(piece: ad.AnnData, name: str, panel: Panel) -> np.ndarray:
    """float32 [cells, features]: a value of the cells of one member as the mixture has it."""
    if name not in piece.obsm:
        return np.full((piece.n_obs, *panel.shape), np.nan, np.float32)
    table = piece.obsm[name]
    return table.reindex(columns=list(panel.features)).to_numpy() if panel.named else np.asarray(table)


def open_corpus(
    what: str | pathlib.Path | Sequence[str | pathlib.Path],
    shares: Mapping[str, float] | None = None,
    vocabulary: Vocabulary | None = None,
    **options: Any,
) -> Corpus | Mixture:
    """Opens a corpus, or several as a mixture.

    Args:
      what: a folder or URL; ``path@manifest`` for an earlier state of it; or several of these.
      shares, vocabulary: of a mixture, see :class:`Mixture`. Its corpora are called after their folders.
      options: further arguments of ``Corpus.open``.

    Raises:
      ValueError: shares or a vocabulary for a single corpus; otherwise as ``Corpus.open`` and ``Mixture``.
    """
    if not isinstance(what, str | pathlib.Path):
        return Mixture([_open(each, options) for each in what], shares, vocabulary)
    if shares is not None or vocabulary is not None:
        raise ValueError(f"{what}: shares and a vocabulary are for several corpora")
    return _open(what, options)


def _open(what: str | pathlib.Path, options: dict[str, Any]) -> Corpus:
    path, at, manifest = str(what).rpartition("@")
    if at and "/" not in manifest and not pathlib.Path(str(what)).exists():
        return Corpus.open(path, manifest, **options)
    return Corpus.open(what, **options)


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of folders: the last part of each, more of it where that is not enough."""
    parts = [[piece for piece in path.replace("\\", "/").split("/") if piece] for path in paths]
    if len({tuple(piece) for piece in parts}) < len(parts):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} is in the mixture twice; pass a mapping from names to corpora")
    for k in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(piece[-k:]) for piece in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _check_shares(shares: Mapping[str, float], members: Mapping[str, Corpus]) -> dict[str, float]:
    for name, share in shares.items():
        if name not in members:
            raise KeyError(f"shares: no corpus {name!r} in the mixture; there are {list(members)}")
        if isinstance(share, bool) or not math.isfinite(share) or share < 0:
            raise ValueError(f"shares: {name!r} has {share!r}; shares are numbers from 0 up")
    if not any(shares.values()):
        raise ValueError("shares: all are 0")
    return {name: float(share) for name, share in shares.items()}


def _vocabulary(members: Mapping[str, Corpus]) -> Vocabulary:
    """That of the members, or the union of theirs: genes of the first, then what each further one adds."""
    union, *others = members.values()
    genes = union.vocabulary
    for corpus in others:
        there = corpus.vocabulary
        if there.hash == genes.hash:
            continue
        match = genes.match(pd.DataFrame({"gene_symbol": there.symbols}, index=there.ids))
        if match.duplicates:
            gene, names = next(iter(match.duplicates.items()))
            raise ValueError(
                f"{len(match.duplicates)} genes of {corpus.path} are the same one in the other corpora: "
                f"{gene} is {names}; pass a vocabulary for the mixture"
            )
        new = np.flatnonzero(match.ids < 0)
        fields, more = genes.to_dict(), there.to_dict()
        genes = Vocabulary.from_dict(
            {field: [*values, *(more[field][i] for i in new)] for field, values in fields.items()}
        )
    return genes

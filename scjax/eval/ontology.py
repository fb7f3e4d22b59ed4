"""Ontologies of cell types: near misses told apart from gross ones.

Studies label at different depths, and plain accuracy punishes the more exact answer. With an ontology (such
as the Cell Ontology, which users bring as a file) annotation is also scored for answers that are an ancestor
or a descendant of the truth, for the distance between the two, and for the information they share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

_ROOT = ""  # stands above all roots, so that any two terms have an ancestor in common


def _plain(text: str) -> str:
    """Labels are compared without case, and with one space for blanks, ``_``, ``-`` and ``:``."""
    return re.sub(r"[\s_:\-]+", " ", str(text)).strip().casefold()


@dataclass(frozen=True)
class Ontology:
    """Terms with their parents (is_a) and the texts they are known by.

    Args:
        parents: term → the terms right above it; every term is a key.
        texts: (text, term) pairs by falling authority: identifiers, names, synonyms. A text that means two
            terms at the same authority means none.
    """

    parents: dict[str, frozenset[str]]
    texts: tuple[tuple[tuple[str, str], ...], ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def _lookup(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for level in self.texts:
            of_level: dict[str, set[str]] = {}
            for text, term in level:
                of_level.setdefault(_plain(text), set()).add(term)
            for text, terms in of_level.items():
                if len(terms) == 1:
                    found.setdefault(text, next(iter(terms)))
        return found

    def match(self, labels: Iterable[str]) -> list[str | None]:
        """The term of each label, by identifier, name or exact synonym; None where there is none."""
        return [self._lookup.get(_plain(label)) for label in labels]

    @cached_property
    def _heights(self) -> dict[str, dict[str, int]]:
        """Term → its ancestors (itself among them) and the fewest steps up to each."""
        found: dict[str, dict[str, int]] = {_ROOT: {_ROOT: 0}}
        for start in self.parents:
            stack = [start]
            while stack:
                term = stack[-1]
                above = self.parents[term] or {_ROOT}
                waiting = [p for p in above if p not in found]
                if term in found or not waiting:
                    stack.pop()
                    if term not in found:
                        up: dict[str, int] = {term: 0}
                        for parent in above:
                            for ancestor, steps in found[parent].items():
                                up[ancestor] = min(up.get(ancestor, steps + 1), steps + 1)
                        found[term] = up
                elif set(waiting) & set(stack):
                    raise ValueError(
                        f"ontology {self.source}: {waiting[0]!r} is above itself (a cycle of is_a)"
                    )
                else:
                    stack.append(waiting[0])
        return found

    @cached_property
    def _information(self) -> dict[str, float]:
        """Term → 1 − log(its descendants and itself) / log(all terms) (Seco et al. 2004): 1 for leaves, 0 at
        the root.
        """
        below = dict.fromkeys(self._heights, 0)
        for up in self._heights.values():
            for ancestor in up:
                below[ancestor] += 1
        return {term: 1 - float(np.log(n) / np.log(len(below))) for term, n in below.items()}

    def related(self, a: str, b: str) -> bool:
        """Whether one of two terms is the other or an ancestor of it."""
        return a in self._heights[b] or b in self._heights[a]

    def distance(self, a: str, b: str) -> int:
        """Fewest is_a steps from one term up to a common ancestor and down to the other."""
        up, down = self._heights[a], self._heights[b]
        return min(up[term] + down[term] for term in up.keys() & down.keys())

    def similarity(self, a: str, b: str) -> float:
        """Lin's similarity (1998): the information of the most informative common ancestor over the mean of
        their own, in [0, 1].
        """
        if a == b:
            return 1.0
        common = self._heights[a].keys() & self._heights[b].keys()
        own = self._information[a] + self._information[b]
        return 2 * max(self._information[term] for term in common) / own if own > 0 else 0.0


def read_ontology(path: str | os.PathLike[str] | Ontology) -> Ontology:
    """Read an OBO file, or a table of two columns: child, parent (tab or comma between them; ``#`` comments).

    Of OBO files: terms that are not obsolete, with id, alt_id, name, EXACT synonyms and is_a.

    Raises:
        ValueError: no terms with parents were found; a line is not a pair.
    """
    if isinstance(path, Ontology):
        return path
    text = Path(path).read_text(encoding="utf-8")
    if re.search(r"^\[Term\]", text, re.MULTILINE):
        found = _obo(text, str(path))
    else:
        found = _edges(text, str(path))
    if not any(found.parents.values()):
        raise ValueError(
            f"{path}: no is_a relations found; an OBO file or a table 'child<TAB>parent' is needed"
        )
    return found


def _obo(text: str, source: str) -> Ontology:
    parents: dict[str, frozenset[str]] = {}
    ids, names, synonyms = [], [], []
    for stanza in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        lines = stanza.splitlines()
        if lines[0].strip() != "Term]":
            continue
        pairs = [line.partition(":")[::2] for line in lines[1:] if ":" in line]
        fields = [(tag.strip(), value.strip()) for tag, value in pairs]
        term = next((value for tag, value in fields if tag == "id"), "")
        if not term or ("is_obsolete", "true") in fields:
            continue
        above = [re.split(r"[\s{!]", value)[0] for tag, value in fields if tag == "is_a"]
        parents[term] = frozenset(above)
        ids += [(term, term)] + [(value, term) for tag, value in fields if tag == "alt_id"]
        names += [(value, term) for tag, value in fields if tag == "name"]
        quoted = [re.match(r'"(.*?)"\s+EXACT', value) for tag, value in fields if tag == "synonym"]
        synonyms += [(found[1], term) for found in quoted if found]
    return _closed(parents, (ids, names, synonyms), source)


def _edges(text: str, source: str) -> Ontology:
    parents: dict[str, frozenset[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pair = [part.strip().strip('"') for part in line.split("\t" if "\t" in line else ",")]
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{source}, line {number}: {line!r} is not a pair 'child<TAB>parent'")
        child, parent = pair
        if number == 1 and (child.lower(), parent.lower()) == ("child", "parent"):
            continue
        parents[child] = parents.get(child, frozenset()) | {parent}
    return _closed(parents, ([(t, t) for t in parents],), source)


def _closed(
    parents: dict[str, frozenset[str]], texts: Sequence[Sequence[tuple[str, str]]], source: str
) -> Ontology:
    """With the terms that are only named as parents."""
    only_above = sorted(set().union(*parents.values()) - set(parents)) if parents else []
    first = [*texts[0], *((term, term) for term in only_above)]
    closed = {**parents, **dict.fromkeys(only_above, frozenset())}
    return Ontology(closed, tuple(map(tuple, [first, *texts[1:]])), source)


@dataclass(frozen=True)
class Relations:
    """How the labels of a data set lie to each other: [labels, labels], truth first."""

    known: np.ndarray  # bool[labels]: which are terms
    related: np.ndarray  # one is the other or an ancestor of it
    similarity: np.ndarray  # Lin; 0 with a label that is no term
    distance: np.ndarray  # steps; with a label that is no term, the longest between any two that are
    unmatched: list[str]


def relations(ontology: Ontology, labels: Sequence[str]) -> Relations:
    """The relations of these labels.

    Raises:
        ValueError: fewer than two of the labels are terms of the ontology.
    """
    terms = ontology.match(labels)
    unmatched = [label for label, term in zip(labels, terms, strict=True) if term is None]
    if len(labels) - len(unmatched) < 2:
        raise ValueError(
            f"only {len(labels) - len(unmatched)} of {len(labels)} labels are terms of {ontology.source}; "
            f"labels must be identifiers, names or exact synonyms of its terms. Not found: {unmatched[:10]}"
        )
    n = len(labels)
    related, similarity, distance = np.eye(n, dtype=bool), np.eye(n), np.full((n, n), np.nan)
    for i, a in enumerate(terms):
        for j, b in enumerate(terms):
            if a is not None and b is not None:
                related[i, j] = ontology.related(a, b)
                similarity[i, j] = ontology.similarity(a, b)
                distance[i, j] = ontology.distance(a, b)
    distance = np.where(np.isnan(distance), np.nanmax(distance), distance)
    np.fill_diagonal(distance, 0)
    return Relations(np.array([t is not None for t in terms]), related, similarity, distance, unmatched)

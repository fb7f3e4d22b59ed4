"""The obs columns of many studies as one table: one name, one kind and one list of categories per column."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

_MAX_INT = np.iinfo(np.int64).max
MAX_CATEGORIES = 4096  # a text column with more values than this is kept as plain text
RESERVED = ("scjax_dataset", "scjax_source_row", "scjax_cell_id")
_SEPARATORS = re.compile(r"(?<!\d)[-_. ]+|[-_. ]+(?!\d)")
_SNAKE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")


def alike(name: str) -> str:
    """What is left of a column's name without case, "_", "-", "." and spaces: CellType -> celltype.

    A separator between two digits stays: ``res.0.1`` and ``res.01`` are two columns.
    """
    return re.sub(r"[-_. ]+", ".", _SEPARATORS.sub("", name)).casefold() or name


@dataclasses.dataclass
class _Column:
    spellings: Counter[str] = dataclasses.field(default_factory=Counter)
    kinds: set[str] = dataclasses.field(default_factory=set)
    values: set[str] | None = dataclasses.field(default_factory=set)
    complete: bool = True
    studies: int = 0


class ObsSchema:
    """Collects the obs columns of all studies, then encodes each study's obs alike.

    Columns whose names differ only in case, "_", "-", "." and spaces are one: it has the name that
    ``columns``, the corpus that is added to, or ``labels`` gives it, else the snake_case spelling if that
    occurs, else the most frequent, else the first in the alphabet.

    Categoricals, strings and what else is no number become categories (sorted, at most MAX_CATEGORIES,
    more only in a column asked for as a label) or plain text. Numbers stay numbers; where a study lacks one,
    it is NaN; those that int64 does not hold become text. Truth values that some study lacks become the
    categories False and True.

    Args:
      labels: columns to keep as labels; None: all categories.
      unknown: label values that mean "not known".
      columns: name -> other names for it. In each study the first of these that it has is taken, and any
        other, of the same name or listed, is left out.
      values: names that columns of numbers are asked for by.

    Attributes:
      kinds, categories: after ``finish``: name -> "category", "text" or a dtype; name -> its categories.
    """

    def __init__(
        self,
        labels: Sequence[str] | None,
        unknown: Sequence[str],
        columns: Mapping[str, Sequence[str]] | None = None,
        values: Sequence[str] = (),
    ) -> None:
        self._unknown = set(unknown)
        self._columns: dict[str, _Column] = {}
        self._studies = 0
        self._fixed = {"dataset": "dataset"}  # alike(name) -> the name that the column has whatever occurs
        self._listed: dict[str, list[str]] = {}  # alike(name) -> other names, the most wanted first
        self._target: dict[str, str] = {}  # alike(other name) -> alike(name)
        self._base: dict[str, Sequence[str]] = {}
        self._forced: set[str] = set()
        self._labels = labels
        for name, others in (columns or {}).items():
            key = alike(name)
            others = [others] if isinstance(others, str) else list(others)
            if key in self._listed:
                raise ValueError(f"columns= names {self._fixed[key]!r} and {name!r}, which are one column")
            self._fixed[key], self._listed[key] = name, others
            for other in others:
                if self._target.setdefault(alike(other), key) != key:
                    raise ValueError(f"columns= gives {other!r} to two columns, one of them {name!r}")
        for name in labels or ():
            key = self._key(name)
            self._fixed.setdefault(key, name)
            self._forced.add(key)
        for name in values:
            self._fixed.setdefault(self._key(name), name)

    def extend(self, columns: Mapping[str, Sequence[str]]) -> None:
        """Takes over the label columns of a corpus that is added to; to be called before ``add``.

        They keep their names, are labels again whatever the studies hold there, and their categories keep
        their codes: new ones come after them.

        Args:
          columns: label column -> categories; "dataset" is left aside.
        """
        for name, values in columns.items():
            if name == "dataset":
                continue
            key = self._key(name)
            self._fixed[key] = name
            self._base[key] = list(values)
            self._forced.add(key)

    def _key(self, name: str) -> str:
        return self._target.get(alike(name), alike(name))

    def add(self, obs: pd.DataFrame, where: str) -> None:
        """Notes the columns of one study.

        Raises:
          ValueError: a name that a store cannot hold, or two columns that would be one.
        """
        self._studies += 1
        for key, name in self._own(obs.columns, where).items():
            values = obs[name]
            column = self._columns.setdefault(key, _Column())
            kind = _kind(values.dtype)
            if kind == "int" and (values > _MAX_INT).any():
                kind = "text"
            column.spellings[name] += 1
            column.kinds.add(kind)
            column.studies += 1
            column.complete &= not values.isna().any()
            if column.values is not None and (kind in ("text", "bool") or key in self._forced):
                column.values |= set(categorise(values)[1])
                if len(column.values) > MAX_CATEGORIES and key not in self._forced:
                    column.values = None

    def _own(self, names: Iterable[Any], where: str = "obs") -> dict[str, str]:
        """alike(name) -> the one column of a study that it is."""
        claims: dict[str, list[str]] = {}
        for name in names:
            if name in RESERVED:
                continue
            if not isinstance(name, str) or "/" in name or name.startswith(".") or name in ("", "_index"):
                raise ValueError(
                    f"{where}: the obs column {name!r} must be renamed: a name is text, without '/', "
                    "does not begin with '.' and is not '_index'"
                )
            claims.setdefault(self._key(name), []).append(name)
        own = {}
        for key, found in claims.items():
            for other in self._listed.get(key, ()):
                same = [name for name in found if name == other]
                if not same and alike(other) != key:
                    same = [name for name in found if alike(name) == alike(other)]
                if same:
                    found = same
                    break
            if len(found) > 1:
                kept = self._fixed.get(key) or _best(Counter(found))
                other = next(name for name in found if name != kept)
                raise ValueError(
                    f"{where}: obs columns {' and '.join(map(repr, found))} differ in case and separators "
                    f"only; say which is meant, as in columns={{{kept!r}: [{other!r}]}} "
                    f"(--column {kept}={other}), or rename one in the source"
                )
            own[key] = found[0]
        return own

    def find(self, obs: pd.DataFrame, name: str) -> str | None:
        """What a study calls a column, in its own spelling; None where it has none."""
        return self._own(obs.columns).get(self._key(name))

    def renamed(self, obs: pd.DataFrame) -> dict[str, str | None]:
        """Column of a study -> its name in the corpus, where they differ; None where it is left out.

        To be asked after ``finish``; the manifest records it.
        """
        own = self._own(obs.columns)
        names = {name: self._names[key] for key, name in own.items() if self._names[key] != name}
        left = [name for name in obs.columns if name not in own.values() and name not in RESERVED]
        return names | dict.fromkeys(left)

    def finish(self, matrices: Collection[str] = ()) -> None:
        """Fixes name, kind and categories of every column.

        Args:
          matrices: names that are no columns but matrices of obsm, which ``columns`` may list, too.

        Raises:
          KeyError: a label, or a column that others are to be renamed to, that no study has by any name.
        """
        there = {
            key: self._fixed.get(key) or _best(column.spellings) for key, column in self._columns.items()
        }
        missing = [
            name for name in self._labels or () if self._key(name) not in {"dataset", *there, *self._base}
        ]
        if missing:
            raise KeyError(
                f"no obs column {', '.join(map(repr, missing))} in any source; "
                f"there are: {', '.join(there.values()) or 'none'}"
            )
        for key, others in self._listed.items():
            if key not in there and key not in self._base and self._fixed[key] not in matrices:
                raise KeyError(
                    f"columns: no source has an obs column {self._fixed[key]!r}, or one of {others} to "
                    f"become it; there are: {', '.join(there.values()) or 'none'}"
                )
        self._names = there | {key: self._fixed[key] for key in self._base}
        self.kinds: dict[str, Any] = {}
        self.categories: dict[str, list[str]] = {}
        for key, name in self._names.items():
            column = self._columns.get(key, _Column(kinds={"text"}))
            complete = column.complete and column.studies == self._studies
            text = "text" in column.kinds or key in self._forced
            if text or ("bool" in column.kinds and (not complete or len(column.kinds) > 1)):
                # A number in one study and text in another is text: its values were not collected.
                as_category = column.values is not None and (len(column.kinds) == 1 or key in self._forced)
                self.kinds[name] = "category" if as_category else "text"
                if as_category:
                    old = list(self._base.get(key, ()))
                    self.categories[name] = [*old, *sorted((column.values or set()) - set(old))]
            elif column.kinds == {"bool"}:
                self.kinds[name] = np.dtype(bool)
            else:
                whole = column.kinds == {"int"} and complete
                self.kinds[name] = np.dtype(np.int64 if whole else np.float64)

    @property
    def labels(self) -> dict[str, list[str]]:
        """Label columns and their categories, without the values that stand for "unknown"."""
        chosen = list(self.categories)
        if self._labels is not None:
            keys = dict.fromkeys([*self._base, *map(self._key, self._labels)])
            chosen = [self._names[key] for key in keys if key != "dataset"]
        return {
            name: [value for value in self.categories[name] if value not in self._unknown]
            for name in chosen
            if name != "dataset"
        }

    def encode(self, obs: pd.DataFrame) -> dict[str, np.ndarray]:
        """The columns of one study: int32 codes, object arrays of str, or numbers."""
        encoded = {}
        own = self._own(obs.columns)
        for key, name in self._names.items():
            kind = self.kinds[name]
            values = obs[own[key]] if key in own else None
            if kind == "category":
                encoded[name] = np.full(len(obs), -1, np.int32)
                if values is not None:
                    codes, texts = categorise(values)
                    encoded[name] = _recode(codes, texts, self.categories[name])
            elif kind == "text":
                encoded[name] = np.full(len(obs), "", object)
                if values is not None:
                    codes, texts = categorise(values)
                    encoded[name] = np.array([*texts, ""], object)[codes]
            elif values is None:
                encoded[name] = np.full(len(obs), np.nan)
            else:
                encoded[name] = (
                    values.to_numpy(dtype=kind, na_value=np.nan)
                    if kind.kind == "f"
                    else values.to_numpy(kind)
                )
        return encoded

    def label_codes(
        self, name: str, codes: np.ndarray, categories: Sequence[str] | None = None
    ) -> np.ndarray:
        """Codes of an encoded column -> codes into ``categories`` (``labels[name]``), -1 where unknown."""
        known = [None if value in self._unknown else value for value in self.categories[name]]
        return _recode(codes, known, self.labels[name] if categories is None else categories)


def _best(spellings: Mapping[str, int]) -> str:
    """The spelling that a column keeps: snake_case, the most frequent, the first in the alphabet."""

    def rank(name: str) -> tuple[bool, int, int, str]:
        snake = _SNAKE.fullmatch(name) is not None
        return not snake, -name.count("_") if snake else 0, -spellings[name], name

    return min(spellings, key=rank)


def _kind(dtype: Any) -> str:
    if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_complex_dtype(dtype):
        return "text"
    if pd.api.types.is_bool_dtype(dtype):
        return "bool"
    if pd.api.types.is_integer_dtype(dtype):
        return "int"
    return "float" if pd.api.types.is_float_dtype(dtype) else "text"


def _text(value: Any) -> str:
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def categorise(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """(codes, -1 where missing; the distinct values that occur, as text)."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        codes, categories = values.cat.codes.to_numpy(), [_text(v) for v in values.cat.categories]
    else:
        codes, distinct = pd.factorize(values)
        categories = [_text(v) for v in distinct]
    used = np.unique(codes[codes >= 0])
    texts = [categories[i] for i in used]
    return np.where(codes >= 0, np.searchsorted(used, codes), -1), texts


def _recode(codes: np.ndarray, old: Sequence[str | None], new: Sequence[str]) -> np.ndarray:
    position: Mapping[str | None, int] = {value: i for i, value in enumerate(new)}
    table = np.array([position.get(value, -1) for value in old] + [-1], np.int32)
    return table[codes]

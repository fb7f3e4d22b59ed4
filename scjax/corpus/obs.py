"""The obs columns of many studies as one table: one kind and one list of categories per column."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

MAX_CATEGORIES = 4096  # a text column with more values than this is kept as plain text
RESERVED = ("scjax_dataset", "scjax_source_row", "scjax_cell_id")


@dataclasses.dataclass
class _Column:
    kinds: set[str] = dataclasses.field(default_factory=set)
    values: set[str] | None = dataclasses.field(default_factory=set)
    complete: bool = True
    studies: int = 0


class ObsSchema:
    """Collects the obs columns of all studies, then encodes each study's obs alike.

    Categoricals, strings and what else is no number become categories (sorted, at most MAX_CATEGORIES,
    more only in a column asked for as a label) or plain text. Numbers stay numbers; where a study lacks one,
    it is NaN. Truth values that some study lacks become the categories False and True.
    """

    def __init__(self, labels: Sequence[str] | None, unknown: Sequence[str]) -> None:
        self._forced = set(labels or ())
        self._labels = labels
        self._unknown = set(unknown)
        self._columns: dict[str, _Column] = {}
        self._studies = 0

    def add(self, obs: pd.DataFrame, where: str) -> None:
        """Notes the columns of one study. ValueError for a name that a store cannot hold."""
        self._studies += 1
        for name in obs.columns:
            if name in RESERVED:
                continue
            if not isinstance(name, str) or "/" in name or name.startswith(".") or name in ("", "_index"):
                raise ValueError(
                    f"{where}: the obs column {name!r} must be renamed: a name is text, without '/', "
                    "does not begin with '.' and is not '_index'"
                )
            values = obs[name]
            column = self._columns.setdefault(name, _Column())
            kind = _kind(values.dtype)
            column.kinds.add(kind)
            column.studies += 1
            column.complete &= not values.isna().any()
            if column.values is not None and (kind in ("text", "bool") or name in self._forced):
                column.values |= set(categorise(values)[1])
                if len(column.values) > MAX_CATEGORIES and name not in self._forced:
                    column.values = None

    def finish(self) -> None:
        """Fixes kind and categories of every column. KeyError for a label that no study has."""
        missing = [name for name in self._labels or () if name not in self._columns and name != "dataset"]
        if missing:
            raise KeyError(
                f"no obs column {', '.join(map(repr, missing))} in any source; "
                f"there are: {', '.join(self._columns) or 'none'}"
            )
        alike = collections.defaultdict(set)
        for name in {*self._columns, "dataset"}:
            alike[name.casefold()].add(name)
        for names in alike.values():
            if len(names) > 1:  # each is a file, and some file systems do not tell them apart
                raise ValueError(
                    f"obs columns {' and '.join(map(repr, sorted(names)))} differ in case only; "
                    "rename them alike in the sources"
                )
        self.kinds: dict[str, Any] = {}
        self.categories: dict[str, list[str]] = {}
        for name, column in self._columns.items():
            complete = column.complete and column.studies == self._studies
            text = "text" in column.kinds or name in self._forced
            if text or ("bool" in column.kinds and (not complete or len(column.kinds) > 1)):
                # A number in one study and text in another is text: its values were not collected.
                as_category = column.values is not None and (len(column.kinds) == 1 or name in self._forced)
                self.kinds[name] = "category" if as_category else "text"
                if as_category:
                    self.categories[name] = sorted(column.values or ())
            elif column.kinds == {"bool"}:
                self.kinds[name] = np.dtype(bool)
            else:
                whole = column.kinds == {"int"} and complete
                self.kinds[name] = np.dtype(np.int64 if whole else np.float64)

    @property
    def labels(self) -> dict[str, list[str]]:
        """Label columns and their categories, without the values that stand for "unknown"."""
        chosen = self._labels if self._labels is not None else self.categories
        return {
            name: [value for value in self.categories[name] if value not in self._unknown]
            for name in chosen
            if name != "dataset"
        }

    def encode(self, obs: pd.DataFrame) -> dict[str, np.ndarray]:
        """The columns of one study: int32 codes, object arrays of str, or numbers."""
        encoded = {}
        for name, kind in self.kinds.items():
            values = obs[name] if name in obs else None
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

    def label_codes(self, name: str, codes: np.ndarray) -> np.ndarray:
        """Codes of an encoded column -> codes into ``labels[name]``, -1 where unknown."""
        return _recode(codes, self.categories[name], self.labels[name])


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


def _recode(codes: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    position: Mapping[str, int] = {value: i for i, value in enumerate(new)}
    table = np.array([position.get(value, -1) for value in old] + [-1], np.int32)
    return table[codes]

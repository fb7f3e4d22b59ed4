"""The conditions of a perturbation experiment, from their names to what a model reads of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scjax.genes import Vocabulary

Kind = Literal["genetic", "chemical", "environmental"]
UNPERTURBED = ("ctrl", "")  # beside the name of the control itself, as parts of names such as "KLF1+ctrl"
UNNAMED = ("", "nan", "none", "unlabelled", "unknown")


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What becomes of the name and the dose of a condition.

    Attributes:
      vocabulary: genes of the model, for the ids of perturbed genes; they need not be measured.
      control: name of the unperturbed cells.
      kind: "genetic": names are genes, those of a combination joined by "+" in any order. Names of a
        "chemical" or "environmental" condition are taken as they are.
      seen: names in training, whose codes are those of the label "perturbation".
      size: perturbed genes of a condition, at most.
      features: a description of every gene, compound or stimulus [name x d] (fingerprints, vectors of
        genes), so that those never seen can be asked for; a combination is the sum of its genes. None: none.
      dosed: conditions have a dose.

    Raises:
      ValueError: features that are no numbers, or several rows of one name.
    """

    vocabulary: Vocabulary
    control: str = "control"
    kind: Kind = "genetic"
    seen: tuple[str, ...] = ()
    size: int = 2
    features: pd.DataFrame | None = None
    dosed: bool = False

    def __post_init__(self) -> None:
        if self.features is None:
            return
        if self.features.index.has_duplicates:
            twice = self.features.index[self.features.index.duplicated()][0]
            raise ValueError(f"the table of features has several rows of {str(twice)!r}; keep one")
        try:
            self.features.to_numpy(np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the table of features holds what is no number: {error}") from None

    def parts(self, name: str) -> tuple[str, ...]:
        """The perturbed genes of a condition in one order, or its only name; () for the control.

        Raises:
          ValueError: no name, or more genes than ``size``.
        """
        name = str(name).strip()
        if name.lower() in UNNAMED:
            raise ValueError(f"{name!r} names no condition; the control is called {self.control!r}")
        if name == self.control:
            return ()
        if self.kind != "genetic":
            return (name,)
        parts = {part.strip() for part in name.split("+")} - {self.control, *UNPERTURBED}
        if len(parts) > self.size:
            raise ValueError(
                f"condition {name!r} perturbs {len(parts)} genes; the model was made for {self.size}: raise "
                "the size of its token"
            )
        return tuple(sorted(parts))

    def canonical(self, name: str) -> str:
        """One name for one condition: "B+A" is "A+B", "A+ctrl" is "A"."""
        return "+".join(self.parts(name)) or self.control

    def code(self, name: str) -> int:
        """The code of a condition seen in training, -1 for any other: of those a learned table knows
        nothing."""
        name = self.canonical(name)
        return self.seen.index(name) if name in self.seen else -1

    def read(self, name: str, dose: float = 0.0, *, wanted: Sequence[str] = ()) -> dict[str, Any]:
        """What a model can be told of a condition.

        Args:
          name: of the condition.
          dose: above 0, where conditions are dosed.
          wanted: names of the result that the model reads, which therefore must be known: of the control all
            are absent.

        Returns:
          "perturbation", its code; "targets" float32 [size], ids of perturbed genes, -1 where there is none;
          "features" float32 [d]; "dose" float32 [1], its decimal logarithm. NaN where absent.

        Raises:
          KeyError: a condition never seen, a gene not in the vocabulary, a name without features; says which,
            and the nearest.
          ValueError: a dose that is missing or not above 0; features that are not finite, where they are
            wanted: NaN is how the control is told.
        """
        parts = self.parts(name)
        d = 0 if self.features is None else self.features.shape[1]
        out: dict[str, Any] = {
            "perturbation": self.code(name),
            "targets": np.full(self.size, -1, np.float32),
            "features": np.full(d, np.nan, np.float32),
            "dose": np.full(1, np.nan, np.float32),
        }
        if not parts:
            return out
        if "perturbation" in wanted and out["perturbation"] < 0:
            raise KeyError(
                f"condition {name!r} was never seen in training{_near(name, self.seen)}: a learned table has "
                "no row for it. Conditions told by their genes (targets) or by features can be new"
            )
        if self.kind == "genetic":
            for i, gene in enumerate(parts):
                if gene in self.vocabulary:
                    out["targets"][i] = self.vocabulary.id_of(gene)
                elif "targets" in wanted:
                    try:
                        self.vocabulary.id_of(gene)
                    except KeyError as error:
                        raise KeyError(
                            f"condition {name!r}: {error.args[0]}. A table of features can describe genes "
                            "that the model has no vector of"
                        ) from None
        if self.features is not None:
            if absent := [part for part in parts if part not in self.features.index]:
                if "features" in wanted:
                    names = [str(n) for n in self.features.index]
                    raise KeyError(
                        f"condition {name!r}: the table of {len(names)} features has no row "
                        f"{absent[0]!r}{_near(absent[0], names)}"
                    )
            else:
                rows = self.features.loc[list(parts)].to_numpy(np.float32)
                if "features" in wanted and not (finite := np.isfinite(rows).all(1)).all():
                    raise ValueError(
                        f"condition {name!r}: the features of {parts[int(finite.argmin())]!r} hold NaN or "
                        "infinite values, which would be read as nothing done; fill them in, or leave its "
                        "cells out"
                    )
                out["features"] = rows.sum(0)
        if self.dosed:
            if not dose > 0:
                raise ValueError(f"condition {name!r} has the dose {dose}; a dose above 0 is needed")
            out["dose"][:] = np.log10(dose)
        return out


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=2)
    some = f"nearest: {', '.join(found)}" if found else f"there are {', '.join(known[:4])}, ..."
    return f" ({some})" if known else ""

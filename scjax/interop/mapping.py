"""Tensors of a published checkpoint <-> the variables of a model, by one table of rules for both ways.

A rule names a tensor of theirs and a variable of ours and knows the two transforms between them. In a
name of theirs ``{i}`` stands for the number of a layer; ours has the layers stacked on a new first axis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.table
import rich.text

from scjax.nn import flatten, nest

Tree = dict[str, Any]
Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of theirs that make up one variable of ours.

    Attributes:
      theirs: their names; several where one variable of ours joins them (queries, keys and values).
      ours: path of the variable, "params/transformer/blocks/up/kernel".
      to_ours: their tensors, in the order of ``theirs``, to one layer of ours.
      to_theirs: the inverse; a sequence of tensors in the order of ``theirs``.
    """

    theirs: tuple[str, ...]
    ours: str
    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], Sequence[np.ndarray]]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs[0]


def one(
    theirs: str, ours: str, to_ours: Transform = lambda x: x, to_theirs: Transform = lambda x: x
) -> list[Rule]:
    """One tensor, one variable."""
    return [Rule((theirs,), ours, to_ours, lambda x: (to_theirs(x),))]


def dense(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """A dense layer: torch's weight (out, in) is our kernel (in, out)."""
    rules = one(f"{theirs}.weight", f"{ours}/kernel", np.transpose, np.transpose)
    return rules + (one(f"{theirs}.bias", f"{ours}/bias") if bias else [])


def norm(theirs: str, ours: str) -> list[Rule]:
    """A LayerNorm: weight and bias are scale and bias."""
    return one(f"{theirs}.weight", f"{ours}/scale") + one(f"{theirs}.bias", f"{ours}/bias")


def qkv(theirs: Sequence[str], ours: str, n_heads: int, *, bias: bool = True) -> list[Rule]:
    """The projections of self-attention, to our kernel (in, 3, heads, d_head).

    Args:
      theirs: one prefix whose weight holds queries, keys and values one after another
        (3 * heads * d_head, in), or three prefixes. A name given as ``(weight name, bias name)`` joined by
        "|" is taken as it is ("self_attn.in_proj_weight|self_attn.in_proj_bias").
      ours: prefix of the layer.
      n_heads: number of heads; they lie one after another in each of the three.
    """
    names = [t.split("|") if "|" in t else [f"{t}.weight", f"{t}.bias"] for t in theirs]

    def to_kernel(*weights: np.ndarray) -> np.ndarray:
        w = np.concatenate(weights)  # (3 H D, in)
        return np.moveaxis(w.reshape(3, n_heads, -1, w.shape[-1]), -1, 0)

    def from_kernel(kernel: np.ndarray) -> Sequence[np.ndarray]:
        w = np.moveaxis(kernel, 0, -1).reshape(-1, kernel.shape[0])
        return np.split(w, len(names))

    def from_bias(b: np.ndarray) -> Sequence[np.ndarray]:
        return np.split(b.reshape(-1), len(names))

    rules = [Rule(tuple(n[0] for n in names), f"{ours}/kernel", to_kernel, from_kernel)]
    if bias:
        rules.append(
            Rule(
                tuple(n[1] for n in names),
                f"{ours}/bias",
                lambda *b: np.concatenate(b).reshape(3, n_heads, -1),
                from_bias,
            )
        )
    return rules


def attention_out(theirs: str, ours: str, n_heads: int) -> list[Rule]:
    """The output projection of attention: (out, heads * d_head) is our kernel (heads, d_head, out)."""
    return [
        Rule(
            (f"{theirs}.weight",),
            f"{ours}/kernel",
            lambda w: w.T.reshape(n_heads, -1, w.shape[0]),
            lambda k: (k.reshape(-1, k.shape[-1]).T,),
        ),
        *one(f"{theirs}.bias", f"{ours}/bias"),
    ]


def rows(theirs: str, ours: str, order: np.ndarray) -> list[Rule]:
    """A table whose rows stand in another order: row i of ours is row ``order[i]`` of theirs."""
    back = np.argsort(order)
    return one(theirs, ours, lambda t: t[order], lambda t: t[back])


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every tensor of a checkpoint.

    Attributes:
      used: their name -> our path.
      ignored: their name -> why.
      missing: our path -> the names of theirs that would have filled it.
    """

    used: dict[str, str]
    ignored: dict[str, str]
    missing: dict[str, tuple[str, ...]]

    def table(self, title: str = "") -> rich.table.Table:
        """To print with rich: a line a variable of ours, then one a tensor that is not needed, with why, then
        what is missing. Layers are written together, "layers.{0..11}.linear1.weight"."""
        table = rich.table.Table(title=title or None, title_justify="left")
        for name in ("in the checkpoint", "tensors", "in the model"):
            table.add_column(name, justify="right" if name == "tensors" else "left", overflow="fold")

        def add(groups: Mapping[str, Sequence[str]], style: str | None = None) -> None:
            for what, names in groups.items():
                text = [rich.text.Text(t) for t in ("\n".join(together(names)), str(len(names)), what)]
                table.add_row(*text, style=style)
            table.add_section()

        add(_by_value(self.used))
        add({f"not needed: {why}": names for why, names in _by_value(self.ignored).items()}, "dim")
        add({f"{path}: MISSING": names for path, names in self.missing.items()}, "bold red")
        table.caption = f"{len(self.used)} used, {len(self.ignored)} not needed, {len(self.missing)} missing"
        return table


def _by_value(entries: Mapping[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, value in entries.items():
        out.setdefault(value, []).append(name)
    return out


def together(names: Sequence[str]) -> list[str]:
    """Names that differ in the number of their layer as one: "layers.{0..11}.norm1.weight"."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = f"{name[: found.start()]}{{}}{name[found.end() :]}" if found else name
        numbers.setdefault(key, []).extend([int(found[0])] if found else [])
    out = []
    for key, layers in numbers.items():
        span = f"{{{min(layers)}..{max(layers)}}}" if len(layers) > 1 else "".join(map(str, layers))
        if len(layers) > 1 and sorted(layers) != list(range(min(layers), max(layers) + 1)):
            span = f"{{{','.join(map(str, sorted(layers)))}}}"
        out.append(key.replace("{}", span, 1))
    return out


def import_tensors(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    ignored: Mapping[str, str] | None = None,
    fill: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Tree], Account]:
    """The variables of a model from the tensors of a checkpoint.

    Args:
      rules: of the system.
      tensors: their name -> array.
      shapes: ``scjax.nn.shapes_of(model)``.
      ignored: regular expression -> why a tensor whose whole name matches is not needed.
      fill: our path -> value of variables that checkpoints do not hold (running means, medians).

    Returns:
      ``({"params", "buffers"}, account)``.

    Raises:
      ValueError: a tensor has another shape than its variable (names key, theirs and ours), a tensor is
        neither used nor known to be unneeded, or a variable gets no value.
    """
    wanted, left = flatten(shapes), dict(tensors)
    out: dict[str, np.ndarray] = {}
    for path, value in (fill or {}).items():
        if path in wanted:
            filling = np.asarray(value, wanted[path].dtype)
            if filling.ndim and filling.shape != wanted[path].shape:
                raise ValueError(
                    f"the value of {path} has the shape {list(filling.shape)}, that of the model is "
                    f"{list(wanted[path].shape)}"
                )
            out[path] = np.broadcast_to(filling, wanted[path].shape)
    used: dict[str, str] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        if rule.ours not in wanted:
            raise ValueError(f"the rule for {rule.theirs} fills {rule.ours}, which the model does not have")
        shape = wanted[rule.ours].shape
        layers = range(shape[0]) if rule.stacked else [0]
        named = [[name.replace("{i}", str(i)) for name in rule.theirs] for i in layers]
        absent = [name for names in named for name in names if name not in tensors]
        if absent:
            missing[rule.ours] = tuple(absent)
            for name in {name for names in named for name in names}:
                left.pop(name, None)  # those that are there are not superfluous
            continue
        values = []
        for names in named:
            theirs = [np.asarray(tensors[name]) for name in names]
            try:
                value = rule.to_ours(*theirs)
            except (ValueError, IndexError) as error:
                value, problem = np.empty(()), f" ({error})"
            else:
                problem = ""
            expected = shape[1:] if rule.stacked else shape
            if value.shape != expected:
                held = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(names, theirs, strict=True))
                raise ValueError(f"{held} does not fit {rule.ours} {list(expected)} of the model{problem}")
            values.append(value)
            for name in names:
                used[name] = rule.ours
                left.pop(name, None)
        out[rule.ours] = np.asarray(np.stack(values) if rule.stacked else values[0], wanted[rule.ours].dtype)
    why: dict[str, str] = {}
    for name in left:
        for pattern, reason in (ignored or {}).items():
            if re.fullmatch(pattern, name):
                why[name] = reason
                break
    account = Account(used, why, missing)
    problems = []
    unknown = [name for name in left if name not in why]
    if unknown:
        shown = [f"{name} {list(np.shape(tensors[name]))}" for name in unknown[:8]]
        problems.append(f"{len(unknown)} tensors of the checkpoint have no place: {_listed(shown, unknown)}")
    empty = [path for path in wanted if path not in out]
    if empty:
        shown = [f"{path} (from {', '.join(missing.get(path, ('no rule',))[:3])})" for path in empty[:5]]
        problems.append(
            f"{len(empty)} variables of the model are not in the checkpoint: {_listed(shown, empty)}"
        )
    if problems:
        raise ValueError(". ".join(problems))
    return nest({path: out[path] for path in wanted}), account


def _listed(shown: Sequence[str], of: Sequence[str]) -> str:
    return "; ".join(shown) + (f"; and {len(of) - len(shown)} more" if len(of) > len(shown) else "")


def export_tensors(rules: Sequence[Rule], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors from our variables: the way of :func:`import_tensors` back."""
    ours, out = flatten(variables), {}
    for rule in rules:
        value = np.asarray(ours[rule.ours])
        for i, layer in enumerate(value if rule.stacked else value[None]):
            for name, tensor in zip(rule.theirs, rule.to_theirs(layer), strict=True):
                out[name.replace("{i}", str(i))] = np.asarray(tensor, order="C")
    return out

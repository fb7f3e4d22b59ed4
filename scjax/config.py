"""From the open dictionaries of a config file to frozen, checked dataclasses.

Config files are ``ml_collections`` dictionaries because those are easy to write, fork and override on
the command line. Code takes frozen dataclasses, so that a misspelt or missing key is an error where
it enters and not an ignored wish.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
INF = float("inf")


class ConfigError(ValueError):
    """A key or value of a config that cannot be used; the message names it in full."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` did you mean 'd_model'?`` for the known name closest to ``name``, or nothing if none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" did you mean {found[0]!r}?" if found else ""


def from_config(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """Builds the frozen dataclass ``cls`` from a mapping (``dict`` or ``ConfigDict``).

    Fields annotated with a dataclass, or a mapping of them, are built from nested mappings; lists become
    tuples where a tuple is annotated, and an int is taken where a float is.

    Args:
      cls: a dataclass with annotated fields.
      mapping: field name to value; fields with a default may be left out.
      where: what error messages call the mapping, such as ``"config.model"``.

    Raises:
      ConfigError: an unknown key (names the nearest valid one), a missing key, or a value of the
        wrong type.
    """
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        raise ConfigError(f"{where} is {mapping!r}; it must be a mapping with the keys of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    given = dict(mapping.items())
    for key in given:
        if key not in fields:
            valid = f"Valid keys: {', '.join(fields)}"
            raise ConfigError(f"{where}.{key} is unknown;{nearest(key, fields)} {valid}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{where}.{name} is missing; {cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _check(value, hints[key], f"{where}.{key}") for key, value in given.items()})


def within(config: Any, **bounds: tuple[float, float]) -> None:
    """Raises ConfigError naming the first field of ``config`` that lies outside its (lowest, highest)."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            allowed = f"at least {low:g}" if high == INF else f"from {low:g} to {high:g}"
            raise ConfigError(f"model.{name} = {getattr(config, name)}; it must be {allowed}")


def _check(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for, converted only where nothing is lost."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _check(value, option, where)
            except ConfigError:
                continue
        raise ConfigError(f"{where} is {value!r}; expected {_name(hint)}")
    if origin is typing.Literal:
        if value not in args:
            near = nearest(value, [a for a in args if isinstance(a, str)]) if isinstance(value, str) else ""
            raise ConfigError(f"{where} is {value!r};{near} It must be one of {', '.join(map(repr, args))}")
        return value
    if hint is type(None):
        if value is not None:
            raise ConfigError(f"{where} is {value!r}; expected None")
        return None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_config(hint, value, where)
    kind = origin or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if args and len(args) != len(value):
            raise ConfigError(f"{where} is {value!r}; expected {len(args)} values")
        return tuple(_check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if kind in (dict, Mapping) or getattr(kind, "__name__", "") == "Mapping":
        if hasattr(value, "items"):
            plain = value.to_dict() if hasattr(value, "to_dict") else dict(value.items())
            return {k: _check(v, args[1], f"{where}.{k}") for k, v in plain.items()} if args else plain
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {value!r}; expected {_name(hint)}")


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")

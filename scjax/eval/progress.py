"""Progress of long work, shown where somebody asked for it: the work only says what it goes through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_BAR: ContextVar[Any] = ContextVar("bar", default=None)


@contextlib.contextmanager
def shown(show: bool = True) -> Iterator[None]:
    """While this lasts, :func:`each` draws a bar: what is done now, how much is left, how long it takes."""
    if not show or _BAR.get() is not None:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Left

    look = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), Left())
    bar = Progress(*look, TextColumn("{task.description}"), console=Console(stderr=True), transient=True)
    with bar:
        token = _BAR.set(bar)
        try:
            yield
        finally:
            _BAR.reset(token)


def each(items: Collection[T], what: str, name: Callable[[T], str] = str) -> Iterator[T]:
    """The items, one by one, with a line of the bar: ``perturbation: X_model``."""
    bar = _BAR.get()
    if bar is None:
        yield from items
        return
    line = bar.add_task(what, total=len(items))
    try:
        for item in items:
            bar.update(line, description=f"{what}: {name(item)}", refresh=True)
            yield item
            bar.advance(line)
    finally:
        bar.remove_task(line)

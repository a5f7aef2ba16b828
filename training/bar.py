"""How far is something that is counted? A bar in a terminal, elsewhere a line each 30 s.

Both go to stderr, so that what a command prints as its result stands alone on stdout. What is over
sooner says nothing where there is no terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0
T = TypeVar("T", covariant=True)


class SizedIterable(Protocol[T]):
    """What can be counted first and then gone through."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T]: ...


class Bar(AbstractContextManager[Any]):
    """A context manager; `advance` it.

    Args:
        title: of the part.
        total: how many there are.
        unit: of what, in the plural.
        done: how many were done by an earlier process.
        show: False where another process shows it.
        leave: whether a terminal keeps it when it is over.

    Attributes:
        note: told with the rest.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        show: bool = True,
        leave: bool = False,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.show, self.note = show, ""
        self._first, self._start = done, time.perf_counter()
        self._said = self._start
        self._bar = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, leave=leave)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, many: int = 1) -> None:
        """So many more are done."""
        self.done += many
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(many)
        elif time.perf_counter() - self._said >= SECONDS_BETWEEN_LINES:
            self.tell()

    def tell(self) -> None:
        """Show the note now; where there is no terminal, by a line."""
        if self._bar is not None:
            self._bar.set_postfix_str(self.note)
        if not self.show or self._bar is not None:
            return
        self._said = time.perf_counter()
        each = (self._said - self._start) / max(self.done - self._first, 1)
        left = f"{tqdm.format_interval(each * (self.total - self.done))} left"
        parts = [f"{self.done:,} of {self.total:,} {self.unit}", left, self.note]
        print(f"{self.title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def track(items: SizedIterable[T], title: str, unit: str) -> Iterator[T]:
    """The items, one by one, under a `Bar`."""
    with Bar(title, len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance()

"""How do demo and study say what they are at? On stderr, out of the way of what they print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_console = Console(stderr=True)


def say(message: str) -> None:
    """One line."""
    _console.print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def part(title: str) -> Iterator[None]:
    """Announce a part, and the seconds it took."""
    _console.rule(title, align="left")
    start = time.perf_counter()
    yield
    say(f"{title}: {time.perf_counter() - start:.0f} s")

"""How is a fault in data told? Place, field, what came, and what was expected, always alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A fault in training data; built by `fault`, which words every message the same way.

    Takes one string so that a data-loader worker can hand it to the parent process unchanged.
    """

    id: str | None = None  # the faulty entry's id, where it has one


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry stands: file, ``index 3`` or ``line 4``, its id when it has one."""

    path: Path
    where: str = ""
    id: str | None = None

    def __str__(self) -> str:
        name = f" (id {short(repr(self.id))})" if self.id is not None else ""
        return f"{self.path}{', ' if self.where else ''}{self.where}{name}"


def fault(place: Place, field: str, got: object, expected: str) -> DataError:
    """The one wording of a data fault: place, field, what came (cut if long), what was expected."""
    got = short(str(got), 400)
    text = f"{place}: field {field!r}: got {got}, expected {expected}"
    error = DataError(text.encode("utf-8", "backslashreplace").decode())  # can be printed anywhere
    error.id = place.id
    return error


@contextmanager
def named(place: Place, field: str, expected: str, what: str = "") -> Iterator[None]:
    """Whatever a library or the system raises within, as the `DataError` of a sample.

    The one place where errors on a sample's way are turned into faults; a `StopIteration` too,
    which a data loader would take for the end of the data. `what` came before the error's words.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        got = f"{short(what)}: " if what else ""
        got += f"{type(error).__name__}: {short(str(error))}"
        raise fault(place, field, got, expected) from error


def shown(value: object) -> str:
    """``repr`` of a value with its type, cut to a readable length."""
    return f"{type(value).__name__} {short(repr(value), 60)}"


def short(text: str, most: int = 200) -> str:
    """A text of at most about `most` letters; of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}... {len(text):,} letters ...{text[-most // 6 :]}"
